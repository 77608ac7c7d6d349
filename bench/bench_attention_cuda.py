# SPDX-License-Identifier: Apache-2.0
"""What has to be shown on a GPU: bfloat16 at head_dim 128 beside the kernels that users have there, and exact float32.

The published figures for this shape (16 k tokens, 16 heads of 128 channels) are those of FlashAttention-2 and -3 and of
cuDNN. Of these torch brings FlashAttention-2, which does Λ in two calls (flash_pair.py), and cuDNN.
`all_cases` takes sizes and a device, so that tests/test_bench.py runs every case on the CPU at tiny lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from bench.bench_attention import Work, case_of
from bench.bench_attention_cache import step_case
from bench.bench_attention_decode import decode_case
from bench.bench_attention_probabilistic import Round, round_case
from bench.case import Case, Options

FLASH, CUDNN, FLEX = "SDPA, FlashAttention-2", "SDPA, cuDNN", "compiled FlexAttention"
PAIR = "two FlashAttention-2 calls, merged"
DENSITIES = (1.0, 0.5, 0.3, 0.1)


@dataclass(frozen=True)
class Sizes:
    """What a GPU is given, and a test makes small."""

    length: int = 16384
    short: int = 8192  # of the quick run's dense gradients
    heads: int = 16
    sink: int = 16
    windows: tuple[int, int] = (4096, 512)
    keys: int = 32768  # of decoding
    exact: int = 4096  # of float32
    device: str = "cuda"


def all_cases(quick: bool, sizes: Sizes) -> Iterable[Case]:
    """Dense, Λ and probabilistic attention, decoding, and float32."""
    yield from _causal(quick, sizes)
    yield from _lambda(quick, sizes)
    yield from _probabilistic(quick, sizes)
    yield from _decode(sizes)
    work = Work(sizes.exact, None, None, head_dim=64, heads=sizes.heads // 2, device=sizes.device)
    name = f"causal forward, float32, L {work.length}, H {work.heads}, D 64"
    yield case_of(name, "causal, float32", work, ("SDPA, memory-efficient",))


def _half(sizes: Sizes, length: int, window: int | None = None, backward: bool = False) -> Work:
    """The shape of the published figures: with causal attention where there is no window."""
    shape = {"heads": sizes.heads, "head_dim": 128, "dtype": torch.bfloat16, "device": sizes.device}
    return Work(length, None if window is None else sizes.sink, window, backward, **shape)


def _causal(quick: bool, sizes: Sizes) -> Iterable[Case]:
    group = "causal, bfloat16"
    work = _half(sizes, sizes.length)
    dense = (FLASH, CUDNN, FLEX)
    yield case_of(f"causal forward, L {work.length}, D 128", group, work, dense, memory=("pycore", FLASH))
    if not quick:
        narrow = replace(work, heads=2 * work.heads, head_dim=64)
        yield case_of(f"causal forward, L {work.length}, D 64", group, narrow, (FLASH, CUDNN))
    work = _half(sizes, sizes.short if quick else sizes.length, backward=True)
    name = f"causal forward and backward, L {work.length}, D 128"
    yield case_of(name, group, work, dense, memory=("pycore", FLASH))


def _lambda(quick: bool, sizes: Sizes) -> Iterable[Case]:
    """FlexAttention's backward pass takes longest to compile, so the quick run has it for one window only."""
    group = f"Λ, bfloat16 (L {sizes.length}, D 128, sink {sizes.sink})"
    for window in sizes.windows:
        yield case_of(f"Λ forward, window {window}", group, _half(sizes, sizes.length, window), (PAIR, FLEX))
    for window in sizes.windows:
        with_flex = not quick or window == sizes.windows[0]
        yield case_of(
            f"Λ forward and backward, window {window}",
            group,
            _half(sizes, sizes.length, window, backward=True),
            (PAIR, FLEX) if with_flex else (PAIR,),
            memory=("pycore", PAIR),
        )


def _probabilistic(quick: bool, sizes: Sizes) -> Iterable[Case]:
    """Triton's FlexAttention kernel takes tiles of 128 queries, so no blocks of 64."""
    shape = {"heads": sizes.heads, "head_dim": 128, "dtype": torch.bfloat16, "device": sizes.device}
    for block, backward in ((64, False), (128, False), (128, True)):
        if backward and quick:
            continue
        what = f"{'forward and backward' if backward else 'forward'}, bfloat16, blocks of {block}"
        for density in DENSITIES:
            yield round_case(
                f"probabilistic {what}, density {density}",
                f"probabilistic {what} (L {sizes.length}, D 128)",
                Round(density, backward, sizes.length, block, **shape),
                with_flex=block == 128 and (not quick or density == 0.3),
            )


def _decode(sizes: Sizes) -> Iterable[Case]:
    """Held against the rate of copying: one query leaves the device nothing to do but to read the keys."""
    for batch in (8, 1):
        yield decode_case(
            f"decode, batch {batch}, {sizes.keys} keys",
            "decode, bfloat16 (1 query, 32 heads over 8, D 128)",
            sizes.keys,
            torch.bfloat16,
            ("SDPA, enable_gqa", "SDPA, heads folded"),
            batch,
            sizes.device,
        )
    window = sizes.windows[0]
    yield step_case(f"Λ decode, batch 8, window {window}", window, torch.bfloat16, batch=8, device=sizes.device)


def cases(options: Options) -> Iterable[Case]:
    """Everything on a GPU, nothing elsewhere."""
    if options.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # torch's default: float32 means float32
        yield from all_cases(options.quick, Sizes())


def bench_attention_cuda(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
