# SPDX-License-Identifier: Apache-2.0
"""Attention over causal and Λ schedules beside what torch offers, on random and on real inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from bench import captured, inputs, peers
from bench.case import Case, Options, Outputs, gemm_limit, largest_error
from bench.flash_pair import flash_pair

SINK, WINDOW = 16, 512
# Forward, and with gradients, of the largest entry. float32: twenty times its rounding unit; gradients of float32 SDPA
# itself are off by a few 1e-6. bfloat16: three and five of its rounding units, 2**-8. Every kernel rounds the weights
# before it multiplies them with values, and the result; a third unit is for what is smaller. A gradient has the
# weights', their gradients', the result's, and the output's, which its delta is computed from; the fifth as before.
TOLERANCES = {torch.float32: (1e-5, 5e-5), torch.bfloat16: (1.2e-2, 2e-2)}


@dataclass(frozen=True)
class Work:
    """Shape and rule of one attention workload; no window means causal."""

    length: int
    sink: int | None = SINK
    window: int | None = WINDOW
    backward: bool = False
    rope: bool = False
    source: str = inputs.RANDOM
    heads: int = 8
    head_dim: int = 64
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def flops(self) -> float:
        """4 D per kept pair forward (two products), 10 D more backward (five)."""
        pairs = peers.kept_pairs(self.length, self.sink, self.window)
        return (14.0 if self.backward else 4.0) * self.head_dim * pairs * self.heads * self.batch

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """query, key, value and, for backward, the gradient of the output."""
        shape = (self.heads, self.length, self.head_dim)
        tensors = inputs.attention_inputs(self.source, *shape, self.backward, self.device, self.dtype)
        for tensor in tensors[:3]:
            tensor.requires_grad_(self.backward)
        return tensors


def contender(
    backward: bool, make: Callable[..., Callable[[], torch.Tensor]]
) -> Callable[[Any], Callable[[], Outputs]]:
    """Turns make(query, key, value) -> call into a contender that also runs backward where the work asks for it."""

    def prepare(tensors: tuple[torch.Tensor, ...]) -> Callable[[], Outputs]:
        query, key, value = tensors[:3]
        attend = make(query, key, value)

        def forward() -> Outputs:
            with torch.no_grad():
                return (attend(),)

        def forward_and_backward() -> Outputs:
            output = attend()
            return (output.detach(), *torch.autograd.grad(output, (query, key, value), tensors[3]))

        return forward_and_backward if backward else forward

    return prepare


def _pycore(work: Work) -> Callable[..., Callable[[], torch.Tensor]]:
    def make(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        from pycore import ops
        from pycore.positions import rope_tables

        if work.window is None:
            return lambda: ops.attention(query, key, value)
        rope = None
        if work.rope:
            # Rotations are relative to a tile of 64 keys, so the table ends one tile after the distance limit.
            rope = rope_tables(work.window + 65, work.head_dim, device=work.device)
        return lambda: ops.lambda_attention(query, key, value, sink_size=work.sink, window_size=work.window, rope=rope)

    return make


def _check(work: Work) -> Callable[[Any], Callable[[Outputs], float]]:
    """Compares with float64, a stretch of rows at a time: all of them up to 8192 and for gradients, else three."""
    stretches = list(range(0, work.length, peers.CHUNK))
    if work.length > 8192 and not work.backward:
        stretches = [stretches[0], stretches[len(stretches) // 2], stretches[-1]]

    def check(tensors: tuple[torch.Tensor, ...]) -> Callable[[Outputs], float]:
        given, grad = [x.detach() for x in tensors[:3]], tensors[-1]
        if work.backward:
            given = [x.double().requires_grad_() for x in given]
        parts, gradients = [], [torch.zeros_like(x) for x in given] if work.backward else []
        for start in stretches:
            part = peers.reference(*given, work.sink, work.window, [start], work.rope)
            parts.append(part.detach())
            if work.backward:  # added up, so that the graph of one stretch is all there is in memory
                found = torch.autograd.grad(part, given, grad[:, :, start : start + peers.CHUNK].double())
                gradients = [total + more for total, more in zip(gradients, found, strict=True)]
        expected = [torch.cat(parts, dim=2), *gradients]
        rows = torch.cat([torch.arange(start, min(start + peers.CHUNK, work.length)) for start in stretches])

        def error(outputs: Outputs) -> float:
            chosen = outputs if len(rows) == work.length else [output[:, :, rows] for output in outputs]
            return largest_error(chosen, expected)

        return error

    return check


def case_of(name: str, group: str, work: Work, peer_names: Iterable[str], **more: Any) -> Case:
    """One workload with pycore and the peers of these names."""
    makers: dict[str, Callable[..., Callable[[], torch.Tensor]]] = {
        "masked SDPA": lambda q, k, v: peers.masked_sdpa(q, k, v, work.sink, work.window),
        "chunked SDPA": lambda q, k, v: peers.chunked_sdpa(q, k, v, work.sink, work.window),
        "chunked matmul": lambda q, k, v: peers.chunked_rope(q, k, v, work.sink, work.window),
        "SDPA is_causal": peers.causal_sdpa,
        "SDPA, FlashAttention-2": lambda q, k, v: peers.causal_sdpa(q, k, v, SDPBackend.FLASH_ATTENTION),
        "SDPA, cuDNN": lambda q, k, v: peers.causal_sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION),
        "SDPA, memory-efficient": lambda q, k, v: peers.causal_sdpa(q, k, v, SDPBackend.EFFICIENT_ATTENTION),
        "two FlashAttention-2 calls, merged": lambda q, k, v: flash_pair(q, k, v, work.sink, work.window),
        "compiled FlexAttention": lambda q, k, v: peers.compiled_flex(q, k, v, work.sink, work.window),
    }
    contenders = {"pycore": contender(work.backward, _pycore(work))}
    contenders |= {peer: contender(work.backward, makers[peer]) for peer in peer_names}
    return Case(
        name=name,
        group=group,
        inputs=work.inputs,
        contenders=contenders,
        check=_check(work),
        tolerance=TOLERANCES[work.dtype][work.backward],
        flops=work.flops,
        limit=gemm_limit(work.dtype, work.device),
        device=work.device,
        **more,
    )


def cases(options: Options) -> Iterable[Case]:
    """Rows 1 to 3 of the design's table, then sweeps over length and window; all float32.

    On a GPU the quick run has the rows alone, and no FlexAttention, whose compilation takes longer than all else here:
    it is in bench_attention_cuda.py, in the dtype that GPUs are used with.
    """
    device, on_cpu = options.device, options.device == "cpu"
    flex = ("compiled FlexAttention",) if on_cpu or not options.quick else ()
    main = "Λ forward"
    yield case_of(
        "Λ forward, L 8192",
        main,
        Work(8192, device=device),
        ("masked SDPA", *flex, "chunked SDPA"),
        memory=("pycore", "masked SDPA", *flex, "chunked SDPA"),
    )
    if on_cpu and captured.present():
        real = {"source": captured.NAME, "heads": captured.HEADS, "head_dim": captured.HEAD_DIM}
        work = Work(captured.TOKENS, **real, batch=len(captured.LAYERS))
        yield case_of(
            f"Λ forward, L {captured.TOKENS}, {captured.NAME}, B{work.batch} H{work.heads} D{work.head_dim}",
            main,
            work,
            ("masked SDPA", "chunked SDPA"),
        )
        yield case_of(
            f"causal forward, L {captured.TOKENS}, {captured.NAME}, B{work.batch} H{work.heads} D{work.head_dim}",
            "causal forward",
            dataclasses.replace(work, sink=None, window=None),
            ("SDPA is_causal",),
        )
    named = inputs.text_model() if on_cpu and not captured.present() else None
    if named is not None:
        source, model = named
        heads, head_dim = model.config.heads, model.config.head_dim
        yield case_of(
            f"Λ forward, L 8192, {source}" + ("" if (heads, head_dim) == (8, 64) else f", H{heads} D{head_dim}"),
            main,
            Work(8192, source=source, heads=heads, head_dim=head_dim, device=device),
            ("masked SDPA", "chunked SDPA"),
        )
    yield case_of(
        "Λ forward, L 8192, RoPE with limit",
        main,
        Work(8192, rope=True, device=device),
        ("chunked matmul",),
        memory=("pycore", "chunked matmul"),
    )
    yield case_of(
        "causal forward, L 8192",
        "causal forward",
        Work(8192, None, None, device=device),
        ("SDPA is_causal",) if options.quick else ("SDPA is_causal", "compiled FlexAttention"),
        memory=("pycore", "SDPA is_causal"),
    )
    yield case_of(
        "Λ forward and backward, L 4096",
        "Λ forward and backward",
        Work(4096, backward=True, device=device),
        ("masked SDPA", "chunked SDPA"),
        memory=("pycore", "masked SDPA", "chunked SDPA"),
    )
    if options.quick and not on_cpu:
        return
    lengths = (1024, 4096, 16384, 131072) if options.quick else tuple(2**power for power in range(10, 18))
    for length in lengths:
        affordable = ["chunked SDPA"] if length <= (16384 if options.quick else 131072) else []
        if length <= (4096 if options.quick else 16384):
            affordable.append("masked SDPA")
        yield case_of(
            f"length {length}",
            "time against length (Λ forward)",
            Work(length, device=device),
            affordable,
            axis=("length", float(length)),
            memory=("pycore",),
        )
    windows = (64, 512, 4096) if options.quick else (64, 128, 256, 512, 1024, 2048, 4096)
    for window in windows:
        yield case_of(
            f"window {window}",
            "time against window (Λ forward, L 8192)",
            Work(8192, window=window, device=device),
            ("chunked SDPA",) if options.quick else ("chunked SDPA", "masked SDPA"),
            axis=("window", float(window)),
        )


def bench_attention(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
