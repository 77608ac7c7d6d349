# SPDX-License-Identifier: Apache-2.0
"""What each option of attention costs: beside the same call without it, and FlexAttention with the same score_mod."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench import peers
from bench.case import Case, Options, Outputs, largest_error

HEADS, LENGTH, HEAD_DIM, SINK, WINDOW = 8, 8192, 64, 16, 512
SOFTCAP = 20.0
GROUP = f"options of Λ forward (L {LENGTH})"
# The options by name; of FlexAttention those that it can say.
OPTIONS = ("ALiBi", "distance bias", "softcap", "sink logits", "bfloat16", "float16", "padding")
QUICK = ("ALiBi", "bfloat16")
WITH_FLEX = ("ALiBi", "distance bias", "softcap", "bfloat16", "float16")

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _tables(option: str) -> dict[str, Any]:
    """The op's arguments for an option."""
    generator = torch.Generator().manual_seed(2)
    if option == "ALiBi":
        return {"alibi_slopes": torch.tensor([2.0**-i for i in range(1, HEADS + 1)])}
    if option == "distance bias":
        return {"distance_bias": torch.randn(HEADS, WINDOW + 1, generator=generator)}
    if option == "softcap":
        return {"softcap": SOFTCAP}
    if option == "sink logits":
        return {"sink_logits": torch.randn(HEADS, generator=generator)}
    if option == "padding":
        return {"key_starts": torch.tensor([1000])}
    return {}


def _inputs(option: str) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(option, torch.float32)
    return tuple(torch.randn(1, HEADS, LENGTH, HEAD_DIM, generator=generator).to(dtype) for _ in range(3))


def _pycore(options: dict[str, Any], dtype: torch.dtype | None = None) -> Callable[[Inputs], Callable[[], Outputs]]:
    def prepare(tensors: Inputs) -> Callable[[], Outputs]:
        from pycore import ops

        given = tensors if dtype is None else [x.to(dtype) for x in tensors]
        return lambda: (ops.lambda_attention(*given, sink_size=SINK, window_size=WINDOW, **options),)

    return prepare


def _flex(option: str) -> Callable[[Inputs], Callable[[], Outputs]]:
    def prepare(tensors: Inputs) -> Callable[[], Outputs]:
        call = peers.compiled_flex(*tensors, SINK, WINDOW, _score_mod(option))
        return lambda: (call(),)

    return prepare


def _score_mod(option: str) -> Callable[..., torch.Tensor] | None:
    tables = _tables(option)
    if option == "ALiBi":
        slopes = tables["alibi_slopes"]
        return lambda score, b, h, i, j: score - slopes[h] * (i - j).clamp(max=WINDOW)
    if option == "distance bias":
        bias = tables["distance_bias"]
        return lambda score, b, h, i, j: score + bias[h, (i - j).clamp(0, WINDOW)]
    if option == "softcap":
        return lambda score, b, h, i, j: SOFTCAP * torch.tanh(score / SOFTCAP)
    return None


def _check(option: str) -> Callable[[Inputs], Callable[[Outputs], float]]:
    """Three stretches of rows against pycore's own reference in float64, which shares no code with the kernel."""
    rows = torch.cat([torch.arange(start, start + 64) for start in (1000, LENGTH // 2, LENGTH - 64)])

    def check(tensors: Inputs) -> Callable[[Outputs], float]:
        from pycore.reference import attention as reference
        from pycore.schedules import Lambda

        tables = {
            name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in _tables(option).items()
        }
        query, key, value = (x.double() for x in tensors)
        parts = []
        for first in (int(rows[0]), int(rows[64]), int(rows[128])):
            end = first + 64
            part, _ = reference.attention(
                query[:, :, first:end],
                key[:, :, :end],
                value[:, :, :end],
                schedule=Lambda(SINK, WINDOW),
                distance_limit=WINDOW,
                **tables,
            )
            parts.append(part)
        expected = torch.cat(parts, dim=2)
        return lambda outputs: largest_error([outputs[0][:, :, rows]], [expected])

    return check


def cases(options: Options) -> Iterable[Case]:
    """Each option beside the plain call; the 16-bit dtypes beside float32."""
    if options.device != "cpu":
        return
    for option in QUICK if options.quick else OPTIONS:
        half = option in ("bfloat16", "float16")
        contenders = {"pycore": _pycore(_tables(option))}
        if option in WITH_FLEX:
            contenders["compiled FlexAttention"] = _flex(option)
        if half:
            contenders["pycore, float32"] = _pycore({}, torch.float32)
        pairs = peers.kept_pairs(LENGTH - (1000 if option == "padding" else 0), SINK, WINDOW)
        yield Case(
            name=f"Λ forward, L {LENGTH}, {option}",
            group=GROUP,
            inputs=lambda option=option: _inputs(option),
            contenders=contenders,
            check=_check(option),
            tolerance=1e-2 if half else 1e-5,
            flops=4.0 * HEAD_DIM * pairs * HEADS,
        )


def bench_attention_options(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
