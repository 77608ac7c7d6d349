# SPDX-License-Identifier: Apache-2.0
"""Half precision, distance_bias, ALiBi, sink_logits, softcap, Prefix and Segments: values, gradients and their bits.

Dropout has a file of its own (test_attention_dropout.py), and so have vmap, autocast and the like
(test_attention_transforms.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_inputs import Case, lengths, qkv, tables
from tolerance import assert_as_accurate
from torch import Tensor

from pycore.ops import attention, lambda_attention
from pycore.reference import attention as reference
from pycore.schedules import Causal, Full, Lambda, Prefix, Schedule, Segments

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
TABLES = ("distance_bias", "sink_logits")


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def prefix(*numbers: int) -> Prefix:
    return Prefix(lengths(*numbers))


def segments(*numbers: int, causal: bool = True) -> Segments:
    return Segments(lengths(*numbers), causal)


SIX = [
    Full(), Causal(), Lambda(5, 40), prefix(50), segments(0, 30, 30, 64, 97), segments(0, 30, 30, 64, 97, causal=False),
]  # fmt: skip
SHAPES = [
    Case(n, m, schedule, d, value_dim=dv)
    for n, m, d, dv in [(97, 97, 32, None), (1, 97, 40, 64), (130, 97, 111, 33), (17, 203, 7, None)]
    for schedule in SIX
] + [Case(70, 1100, Causal(), 64, heads=1), Case(0, 5, Causal()), Case(5, 0, Full()), Case(3, 5, Causal(), 64, 0)]
ROPES = [
    Case(97, 130, schedule, 32, rope_dim=r, interleaved=interleaved, distance_limit=limit)
    for schedule in (*SIX, prefix(100), segments(0, 130, causal=False))
    for r, interleaved, limit in [(32, False, None), (8, True, 45)]
]
BIASES = [
    Case(97, 130, schedule, bias=n, distance_limit=limit)
    for schedule in (Full(), Causal(), Lambda(5, 40), prefix(70), segments(0, 60, 130, causal=False))
    for n, limit in [(1, None), (20, None), (300, None), (300, 45), (20, 45)]
] + [
    Case(130, 97, Full(), bias=9), Case(130, 97, prefix(97), bias=50), Case(3, 1100, Causal(), bias=2000, heads=1),
    Case(97, 97, Lambda(70, 20), rope_dim=8, distance_limit=20, bias=30, heads=4, kv_heads=2, batch=2),
    Case(5, 60, Lambda(9, 50), 32, batch=2, key_offset=(100, 0), bias=120, distance_limit=90),
    Case(97, 130, Causal(), 32, batch=2, bias=40, key_starts=(0, 70), key_lengths=(130, 81), query_lengths=(97, 30)),
]  # fmt: skip
ALIBIS = [
    Case(97, 130, Lambda(5, 40), alibi=True, distance_limit=40), Case(97, 130, Lambda(5, 40), alibi=True,
    distance_limit=100), Case(1, 339, Lambda(70, 100), alibi=True, distance_limit=339, heads=6, kv_heads=2),
    Case(70, 97, Lambda(3, 20), alibi=True, rope_dim=16, distance_limit=20, softcap=3.0, sinks=True),
]  # fmt: skip
SINKS = [
    Case(97, 97, schedule, sinks=True, heads=h, kv_heads=kv) for schedule in SIX for h, kv in [(2, 1), (6, 2)]
] + [
    Case(130, 97, Causal(), sinks=True), Case(1, 339, Lambda(4, 100), sinks=True, heads=8, kv_heads=2),
    Case(20, 97, Causal(), sinks=True, batch=3, key_lengths=(97, 5, 0), query_lengths=(20, 7, 3)),
    Case(3, 1100, Causal(), sinks=True), Case(5, 0, Full(), sinks=True),
]  # fmt: skip
SOFTCAPS = [
    Case(97, 130, schedule, softcap=cap, scale=scale)
    for schedule in (Causal(), Lambda(5, 40))
    for cap, scale in [(0.5, None), (5.0, None), (30.0, None), (5.0, 3.0), (5.0, -0.3), (5.0, 0.0)]
]
PREFIXES = [
    Case(n, m, prefix(*numbers), batch=len(numbers), heads=1)
    for n, m, numbers in [
        (97, 97, (0, 1, 64, 97)), (30, 130, (100, 101, 128, 130)), (130, 97, (10, 97)), (1, 200, (0, 200)),
        (97, 97, (2**40, 2**62)), (200, 200, (65, 127)),
    ]
] + [
    Case(30, 130, prefix(0, 40, 200), batch=3, key_starts=(0, 70, 30), key_lengths=(130, 113, 100), rope_dim=8,
         query_lengths=(30, 5, 0), distance_limit=40),
    Case(5, 60, prefix(30, 130), batch=2, key_offset=(100, 100)),
]  # fmt: skip
SEGMENTS = [
    Case(n, m, segments(*numbers, causal=causal), heads=1)
    for causal in (True, False)
    for n, m, numbers in [
        (130, 130, (0, 130)), (130, 130, (0, 64, 128, 130)), (130, 130, (0, 1, 2, 63, 65, 130)),
        (130, 130, (20, 40, 100)), (97, 130, (0, 0, 50, 50, 50, 130, 130)), (130, 97, (0, 40, 97)),
        (97, 97, (5,)), (97, 97, (-40, 30, 2**62)), (1, 203, (0, 100, 203)), (339, 339, (0, 10, 200, 210, 339)),
    ]
] + [
    Case(30, 130, segments(0, 20, 60, 130, causal=causal), batch=2, key_starts=(0, 70), key_lengths=(130, 113),
         query_lengths=(30, 25), rope_dim=8)
    for causal in (True, False)
]  # fmt: skip
TOGETHER = [
    Case(97, 130, schedule, 40, rope_dim=16, interleaved=interleaved, distance_limit=45, bias=40, sinks=True,
         softcap=4.0, heads=4, kv_heads=2)
    for schedule in (*SIX, segments(0, 64, 130, causal=False))
    for interleaved in (False, True)
]  # fmt: skip
CASES = SHAPES + ROPES + BIASES + ALIBIS + SINKS + SOFTCAPS + PREFIXES + SEGMENTS + TOGETHER
# Half precision is a matter of loads and stores: what it shares with float32 need not be seen again.
HALF_CASES = SHAPES + ROPES[::3] + BIASES[::4] + ALIBIS + SINKS[::3] + SOFTCAPS[::4] + PREFIXES[::3] + SEGMENTS[::5]
HALF_CASES += TOGETHER
DTYPED_CASES = [(F32, case) for case in CASES] + [(dtype, case) for dtype in (F16, BF16) for case in HALF_CASES]
every_case = pytest.mark.parametrize("dtype, case", DTYPED_CASES, ids=lambda x: str(x).removeprefix("torch."))


def ours(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of the op that has these options."""
    if "alibi_slopes" not in options:
        return attention(q, k, v, **options, return_lse=True)
    sink_size, window_size = options.pop("schedule").args
    return lambda_attention(q, k, v, sink_size=sink_size, window_size=window_size, **options, return_lse=True)


def results(function: Any, case: Case, dtype: torch.dtype, compute: torch.dtype, table: torch.dtype) -> list[Tensor]:
    """(out, lse, gradients of query, key, value, and of distance_bias and sink_logits where there are some).

    The inputs are rounded to `dtype` and the tables to float32 (float64 for float64); both then go to `function` as
    `compute` and `table`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if function is reference.attention else threads)  # many small operations
    exact_table = F64 if dtype == F64 else F32
    options = case.options(exact_table, exact_table)
    for name, x in options.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            options[name] = x.to(table).requires_grad_(name in TABLES)
    if "rope" in options:
        options["rope"] = tuple(x.to(table) for x in options["rope"])
    inputs = [x.to(compute).requires_grad_() for x in case.inputs(dtype)]
    out, lse = function(*inputs, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(dtype).to(x.dtype) for x in (out, lse)]
    leaves = inputs + [options[name] for name in TABLES if name in options]
    gradients = torch.autograd.grad((out, lse), leaves, weights, allow_unused=True)
    torch.set_num_threads(threads)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]
    return [out.detach(), lse.detach(), *gradients]


NAMES = ["out", "lse", "grad_query", "grad_key", "grad_value", "first table's gradient", "second table's gradient"]


@functools.cache
def expected(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The reference's results: in float64, and in plain torch of this dtype."""
    exact = results(reference.attention, case, dtype, F64, F64)
    plain = results(reference.attention, case, dtype, dtype, dtype)
    if dtype in (F16, BF16):
        # Stricter than the rule asks: out is computed in float32 and rounded once, lse is float32.
        out, lse, *_ = results(reference.attention, case, dtype, F32, F32)
        plain[:2] = out.to(dtype), lse
    return exact, plain


@every_case
def test_as_accurate_as_plain_torch(dtype: torch.dtype, case: Case, isa: str) -> None:
    """Values and gradients; outputs and gradients have their inputs' dtypes."""
    actual = results(ours, case, dtype, dtype, F32)
    exact, plain = expected(case, dtype)
    assert [x.dtype for x in actual] == [dtype, F32, *[dtype] * 3, *[F32] * (len(actual) - 5)]
    for name, x, y, z in zip(NAMES, actual, exact, plain, strict=False):
        assert_as_accurate(x, y, z.to(x.dtype), name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_the_reference(case: Case) -> None:
    actual = results(ours, case, F64, F64, F64)
    exact = results(reference.attention, case, F64, F64, F64)
    for name, x, y in zip(NAMES, actual, exact, strict=False):
        assert x.dtype == F64
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
