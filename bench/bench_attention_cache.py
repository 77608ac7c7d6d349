# SPDX-License-Identifier: Apache-2.0
"""A step of decoding on evicting caches: one token in, one query answered, where reading the window is the limit.

A token goes through the caches of several layers (`bench.case.through_layers` says why).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Case, Options, Outputs, Prepare, largest_error, layers_of, through_layers

HEADS, KV_HEADS, HEAD_DIM, SINK = 32, 8, 128, 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
LAYERS_BYTES = 64 * 2**20  # of keys and values of all layers: many small ones, as a window has them
GROUP = f"Λ decode on caches (1 token through layers of 64 MB, {HEADS} heads over {KV_HEADS}, D {HEAD_DIM})"

# The query, key and value of one new token, and the keys and values before it.
Inputs = tuple[torch.Tensor, ...]


def _inputs(batch: int, window: int, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(window)

    def draw(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, heads, tokens, HEAD_DIM, generator=generator, device=device).to(dtype)

    return draw(HEADS, 1), draw(KV_HEADS, 1), draw(KV_HEADS, 1), *(draw(KV_HEADS, SINK + window) for _ in range(2))


def _folded(query: torch.Tensor) -> torch.Tensor:
    return query.view(-1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)


def _pycore(window: int) -> Prepare:
    def prepare(tensors: Inputs) -> Callable[[], Outputs]:
        from pycore import LambdaKVCache

        query, key, value, keys, values = tensors
        cache = LambdaKVCache(SINK, window)
        cache.append(keys, values)

        def step() -> Outputs:
            out = cache.append_and_attend(query, key, value)
            assert isinstance(out, torch.Tensor)
            return (out,)

        return step

    return prepare


def _concatenated(window: int) -> Prepare:
    """What an evicting cache of transformers does: concatenate what stays and what comes."""

    def prepare(tensors: Inputs) -> Callable[[], Outputs]:
        query, key, value, *kept = tensors

        def step() -> Outputs:
            for i, new in enumerate((key, value)):
                kept[i] = torch.cat([kept[i][:, :, :SINK], kept[i][:, :, SINK + 1 :], new], dim=2)
            return (scaled_dot_product_attention(_folded(query), *kept).view_as(query),)

        return step

    return prepare


def _ring(window: int) -> Prepare:
    """The best form in plain torch: a ring written in place, whose order softmax without positions does not see."""

    def prepare(tensors: Inputs) -> Callable[[], Outputs]:
        query, key, value, *given = tensors
        kept = [x.clone() for x in given]
        at = 0

        def step() -> Outputs:
            nonlocal at
            for held, new in zip(kept, (key, value), strict=True):
                held[:, :, SINK + at : SINK + at + 1] = new
            at = (at + 1) % window
            return (scaled_dot_product_attention(_folded(query), *kept).view_as(query),)

        return step

    return prepare


def _check(tensors: Inputs) -> Callable[[Outputs], float]:
    """The first step, after which the oldest token of the window has left."""
    query, key, value, *before = (x.double() for x in tensors)
    kept = (
        torch.cat([x[:, :, :SINK], x[:, :, SINK + 1 :], new], dim=2)
        for x, new in zip(before, (key, value), strict=True)
    )
    expected = scaled_dot_product_attention(_folded(query), *kept).view_as(query)
    return lambda outputs: largest_error(outputs, [expected] * len(outputs))


def step_case(name: str, window: int, dtype: torch.dtype, batch: int = 1, device: str = "cpu") -> Case:
    """A step whose window is full, so that with every token one leaves."""
    layer_bytes = 2 * batch * KV_HEADS * (SINK + window) * HEAD_DIM * dtype.itemsize
    layers = layers_of(LAYERS_BYTES, layer_bytes) if device == "cpu" else 1
    contenders = {
        "pycore": _pycore(window),
        "ring + SDPA, heads folded": _ring(window),
        "cat + SDPA, heads folded": _concatenated(window),
    }
    return Case(
        name=name,
        group=GROUP,
        inputs=lambda: _inputs(batch, window, dtype, device),
        contenders={name: through_layers(layers, one) for name, one in contenders.items()},
        check=_check,
        tolerance=TOLERANCE[dtype],
        bytes=float(layers * layer_bytes),
        device=device,
    )


def cases(options: Options) -> Iterable[Case]:
    """Two windows in float32 and bfloat16."""
    if options.device != "cpu":
        return
    for dtype in (torch.float32, torch.bfloat16):
        for window in (512, 4096):
            yield step_case(f"Λ decode, window {window}, {str(dtype).removeprefix('torch.')}", window, dtype)


def bench_attention_cache(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
