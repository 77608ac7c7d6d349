# SPDX-License-Identifier: Apache-2.0
"""Values of `attention` and `lambda_attention`, against the reference in float64 and LM-Infinite's own formula."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore import native
from pycore.ops import attention, lambda_attention
from pycore.reference import attention as reference
from pycore.schedules import Causal, Full, Lambda, Schedule
from tests.support.allocations import allocations
from tests.support.attention_inputs import Case, lengths, qkv, tables
from tests.support.tolerance import assert_as_accurate

F32, F64 = torch.float32, torch.float64

# Every length with every schedule would take an hour; each list varies one thing and prunes the others.
LENGTHS = [
    Case(n, m, schedule)
    for n, m in [(0, 0), (0, 17), (17, 0), (1, 1), (17, 17), (97, 97), (113, 203), (203, 113), (128, 217), (1, 339),
                 (339, 1), (3, 1024)]
    for schedule in (Full(), Causal(), Lambda(5, 40))
] + [
    Case(1023, 1024, Causal(), heads=1), Case(1024, 1023, Lambda(16, 100), heads=1), Case(1025, 1025, Full(), heads=1),
    Case(1025, 1025, Causal(), heads=1), Case(1025, 1025, Lambda(3, 130), heads=1), Case(2, 2100, Causal()),
    Case(130, 1300, Lambda(70, 900), heads=1),
]  # fmt: skip
HEAD_DIMS = [
    Case(70, 97, Causal(), d, value_dim=dv)
    for d, dv in [(1, None), (7, None), (32, None), (40, 64), (64, 40), (80, None), (96, 1), (111, None), (111, 113),
                  (128, 256), (256, 128), (64, 0)]
]  # fmt: skip
GROUPS = [
    Case(n, 113, schedule, batch=2, heads=h, kv_heads=kv)
    for n, h, kv in [(113, 4, 4), (113, 6, 2), (1, 8, 1), (5, 12, 3), (1, 32, 8), (30, 7, 1), (1, 100, 1), (2, 0, 1)]
    for schedule in (Causal(), Lambda(2, 30))
]
LAMBDAS = [
    Case(n, m, Lambda(sinks, window), heads=1)
    for n, m, sinks, window in [
        (97, 97, 4, 1000), (97, 97, 0, 1), (97, 97, 4, 1), (97, 97, 0, 16), (97, 97, 200, 8), (97, 97, 97, 1),
        (339, 339, 64, 64), (339, 339, 63, 65), (339, 339, 65, 63), (339, 339, 100, 128), (339, 339, 30, 63),
        (339, 339, 1, 64), (339, 339, 128, 65), (70, 339, 8, 128), (339, 70, 8, 20), (1, 339, 130, 1),
    ]
]  # fmt: skip
ROPES = [
    Case(n, m, schedule, d, heads=2, rope_dim=r, interleaved=interleaved, distance_limit=limit)
    for n, m, schedule, d, r, interleaved, limit in [
        (97, 97, Causal(), 32, 32, False, None), (97, 97, Causal(), 32, 32, True, None),
        (97, 97, Causal(), 111, 32, False, None), (97, 97, Causal(), 111, 110, True, None),
        (97, 97, Causal(), 40, 40, False, None), (97, 97, Causal(), 48, 2, False, None),
        (203, 113, Causal(), 64, 16, False, None), (113, 203, Full(), 32, 8, False, None),
        (203, 113, Full(), 32, 8, True, 30), (17, 97, Full(), 32, 32, False, 0),
        (203, 203, Causal(), 32, 8, False, 0), (203, 203, Causal(), 32, 8, True, 50),
        (203, 203, Causal(), 32, 8, False, 64),
        (203, 203, Causal(), 32, 32, False, 2**62), (1, 339, Causal(), 32, 32, False, 100),
        (339, 339, Lambda(10, 64), 32, 8, False, 64), (339, 339, Lambda(10, 64), 32, 8, True, 65),
        (339, 339, Lambda(100, 63), 32, 32, False, 63), (339, 339, Lambda(70, 1), 40, 8, False, 1),
        (339, 339, Lambda(4, 65), 32, 8, False, 200), (97, 97, Lambda(4, 1000), 32, 32, False, 1000),
        (113, 339, Lambda(130, 40), 32, 8, False, 40), (1, 339, Lambda(130, 40), 32, 32, True, 40),
        (1, 339, Lambda(0, 40), 80, 32, False, 40), (339, 113, Lambda(7, 20), 32, 8, False, 20),
    ]
] + [Case(1025, 1025, Lambda(33, 200), 32, heads=1, rope_dim=4, distance_limit=200)]  # fmt: skip
SCALES = [Case(97, 97, Lambda(3, 40), scale=scale) for scale in (1.0, 0.0, -0.25, 4.0, 1e-50)]
ROWS = [
    Case(97, 203, schedule, batch=3, **rows)
    for schedule in (Full(), Causal(), Lambda(9, 50))
    for rows in (
        {"key_starts": (0, 70, 203)},
        {"key_lengths": (203, 64, 0)},
        {"query_lengths": (97, 5, 0)},
        {"key_starts": (3, 0, 100), "key_lengths": (140, 203, 101), "query_lengths": (97, 64, 65)},
    )
] + [
    Case(5, 60, schedule, batch=2, key_offset=(100, 0), rope_dim=8, distance_limit=limit, **rows)
    for schedule, limit in [
        (Lambda(9, 50), 50), (Lambda(9, 20), 300), (Lambda(0, 50), 50), (Lambda(70, 50), 50), (Causal(), 90)
    ]
    for rows in ({}, {"key_starts": (20, 3), "key_lengths": (60, 41), "query_lengths": (5, 2)})
]  # fmt: skip
CASES = LENGTHS + HEAD_DIMS + GROUPS + LAMBDAS + ROPES + SCALES + ROWS


@functools.cache
def expected(case: Case, dtype: torch.dtype, table_dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    """The reference's (out, lse), computed in `dtype`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations
    result = reference.attention(*case.inputs(dtype), **case.options(dtype, table_dtype))
    torch.set_num_threads(threads)
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_as_accurate_as_plain_torch(case: Case, isa: str) -> None:
    out, lse = attention(*case.inputs(F32), **case.options(F32), return_lse=True)
    assert out.is_contiguous() and lse.dtype == F32
    for what, actual, exact, plain in zip(
        ("out", "lse"), (out, lse), expected(case, F64), expected(case, F32), strict=True
    ):
        assert_as_accurate(actual, exact, plain, what)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_the_reference(case: Case) -> None:
    # Tables in float64: products of float32 ones are not the rotation by the sum of their angles to 1e-13.
    table_dtype = F64 if case.rope_dim else F32
    actual = attention(*case.inputs(F64), **case.options(F64, table_dtype), return_lse=True)
    for x, exact in zip(actual, expected(case, F64, table_dtype), strict=True):
        assert x.dtype == F64
        torch.testing.assert_close(x, exact, rtol=1e-13, atol=1e-13)


# ---- LM-Infinite, section 3 ----------------------------------------------------------------------------------------


def lm_infinite(q: Tensor, k: Tensor, v: Tensor, sinks: int, limit: int, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Two branches and one softmax, as the paper has them, for one head: [Q, D], [K, D], [K, D].

    Local: query and key rotated by their positions, for distances below the limit. Global: the query rotated by the
    limit against keys that are not rotated at all, for the first tokens beyond it.
    """

    def rotated(x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = rope[0][positions], rope[1][positions]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    j = torch.arange(len(k))
    i = torch.arange(len(k) - len(q), len(k))
    distance = i[:, None] - j[None, :]
    local = rotated(q, i) @ rotated(k, j).T
    stationary = rotated(q, torch.full_like(i, limit)) @ k.T
    is_local = (distance >= 0) & (distance < limit)
    is_global = (distance >= limit) & (j < sinks)
    logits = torch.cat(
        [local.masked_fill(~is_local, -torch.inf), stationary.masked_fill(~is_global, -torch.inf)], dim=1
    )
    return (logits * q.shape[1] ** -0.5).softmax(dim=1) @ torch.cat([v, v])


@pytest.mark.parametrize(
    "queries, keys, sinks, limit",
    [(8, 8, 4, 16), (16, 16, 4, 16), (17, 17, 4, 16), (64, 64, 4, 16), (100, 100, 4, 16), (1, 100, 4, 16),
     (1, 10, 4, 16), (1, 17, 4, 16), (1, 3, 4, 16), (33, 33, 20, 16), (5, 25, 4, 16), (40, 60, 4, 16), (7, 40, 4, 16),
     (300, 300, 80, 70)],
    ids=str,
)  # fmt: skip
def test_lm_infinite_exactly(queries: int, keys: int, sinks: int, limit: int) -> None:
    """Its official code ties the limit to the window and refuses (7, 40): there a chunk meets a cache not yet cut."""
    q, k, v = qkv(1, 2, 2, queries, keys, 16, dtype=F64)
    rope = tables(keys + limit, 16, F64)
    out = lambda_attention(q, k, v, sink_size=sinks, window_size=limit, rope=rope)
    for h in range(2):
        exact = lm_infinite(q[0, h], k[0, h], v[0, h], sinks, limit, rope)
        assert (out[0, h] - exact).abs().max() <= 1e-13


def test_lambda_attention_defaults() -> None:
    """The distance limit is the window unless it is given; 2**62 is none."""
    q, k, v = qkv(1, 2, 1, 50, 50, 16)
    rope = tables(80, 16)

    def schedule(limit: int | None) -> Tensor:
        return attention(q, k, v, schedule=Lambda(4, 10), rope=rope, distance_limit=limit)

    options = {"sink_size": 4, "window_size": 10, "rope": rope}
    assert torch.equal(lambda_attention(q, k, v, **options), schedule(10))
    assert torch.equal(lambda_attention(q, k, v, **options, distance_limit=12), schedule(12))
    assert torch.equal(lambda_attention(q, k, v, **options, distance_limit=2**62), schedule(None))
    assert not torch.equal(schedule(10), schedule(12)) and not torch.equal(schedule(10), schedule(None))


def test_degenerate_lambdas_are_other_schedules(isa: str) -> None:
    q, k, v = qkv(1, 2, 1, 150, 150, 16)
    causal = attention(q, k, v)
    assert torch.equal(lambda_attention(q, k, v, sink_size=0, window_size=150), causal)
    assert torch.equal(lambda_attention(q, k, v, sink_size=150, window_size=1), causal)
    assert torch.equal(attention(q, k, v, schedule=Full())[:, :, -1], causal[:, :, -1])


def test_like_scaled_dot_product_attention(isa: str) -> None:
    q, k, v = qkv(2, 4, 2, 130, 130, 64)
    options = {"is_causal": True, "enable_gqa": True}
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    assert_as_accurate(attention(q, k, v), exact, plain)


@pytest.mark.parametrize("size", [2**40, 2**61, 2**62, 2**63 - 1], ids=["2^40", "2^61", "2^62", "2^63-1"])
def test_absurd_sizes_mean_all(size: int, isa: str) -> None:
    q, k, v = qkv(1, 2, 1, 130, 130, 16)
    rope = tables(130, 16)
    everything = attention(q, k, v, rope=rope)
    for options in (
        {"schedule": Causal(), "distance_limit": size},
        {"schedule": Lambda(0, size), "distance_limit": None},
        {"schedule": Lambda(size, 1), "distance_limit": size},
        {"schedule": Lambda(size, size), "distance_limit": size},
    ):
        x = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attention(*x, rope=rope, **options)
        assert torch.equal(out, everything)
        out.sum().backward()
        assert all(t.grad.isfinite().all() for t in x)


# ---- memory layouts ------------------------------------------------------------------------------------------------


def sliced(x: Tensor) -> Tensor:
    """The same numbers as a slice of something larger, NaN around it."""
    around = x.new_full([n + 3 for n in x.shape], torch.nan)
    inner = around[1:-2, 2:-1, 1:-2, 2:-1]
    inner.copy_(x)
    return inner


LAYOUTS = {
    "batch-length-heads-dim": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "length-batch-heads-dim": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "last-dim-not-contiguous": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every-other-channel": lambda x: torch.stack([x, x * torch.nan], dim=-1)[..., 0],
    "every-other-row": lambda x: torch.stack([x, x * torch.nan], dim=3)[:, :, :, 0],
    "sliced": sliced,
}


@pytest.mark.parametrize("schedule", [Causal(), Lambda(3, 40)], ids=["causal", "lambda"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_change_a_bit(layout: str, schedule: Schedule, isa: str) -> None:
    inputs = qkv(2, 4, 2, 70, 97, 40, 24)
    moved = [LAYOUTS[layout](x) for x in inputs]
    assert all(torch.equal(x, y) and x.stride() != y.stride() for x, y in zip(inputs, moved, strict=True))
    rope = tables(97, 16)
    expected_pair = attention(*inputs, schedule=schedule, rope=rope, return_lse=True)
    actual_pair = attention(*moved, schedule=schedule, rope=rope, return_lse=True)
    assert all(torch.equal(x, y) for x, y in zip(actual_pair, expected_pair, strict=True))


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (3,), (0, 1), (0, 1, 2, 3)], ids=str)
def test_expanded_inputs(dims: tuple[int, ...], isa: str) -> None:
    inputs = qkv(2, 2, 2, 97, 97, 32)
    expanded = []
    for x in inputs:
        first = x[tuple(slice(0, 1) if d in dims else slice(None) for d in range(4))]
        expanded.append(first.expand(x.shape))
    rope = tables(97, 32)
    rope = tuple(t[:1].expand(97, 16) for t in rope) if 2 in dims else rope
    actual = attention(*expanded, rope=rope, return_lse=True)
    copies = attention(*(x.contiguous() for x in expanded), rope=tuple(t.contiguous() for t in rope), return_lse=True)
    assert all(torch.equal(x, y) for x, y in zip(actual, copies, strict=True))


@pytest.mark.parametrize(
    "shape",
    [(0, 2, 1, 5, 7), (2, 0, 1, 5, 7), (2, 2, 1, 0, 7), (2, 2, 1, 5, 0), (0, 0, 0, 0, 0), (2, 0, 0, 5, 7)],
    ids=lambda s: "B{}-H{}over{}-L{}x{}".format(*s),
)
@pytest.mark.parametrize("schedule", [Full(), Causal(), Lambda(2, 3)], ids=["full", "causal", "lambda"])
def test_empty_inputs(shape: tuple[int, ...], schedule: Schedule) -> None:
    inputs = [x.requires_grad_() for x in qkv(*shape, 8, 6)]
    out, lse = attention(*inputs, schedule=schedule, rope=tables(8, 8), return_lse=True)
    assert out.shape == (shape[0], shape[1], shape[3], 6) and lse.shape == out.shape[:3]
    assert out.count_nonzero() == 0 and bool((lse == -torch.inf).all())
    out.sum().backward()
    for x in inputs:
        assert x.grad is not None and x.grad.shape == x.shape and x.grad.count_nonzero() == 0


# ---- what must not be read, and what must show ---------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 30], ids=["no-rope", "rope-limit"])
@pytest.mark.parametrize("schedule", [Causal(), Lambda(0, 30), Lambda(5, 30)], ids=str)
@pytest.mark.parametrize("row", [0, 1, 29, 40, 64, 100, 149])
def test_keys_that_are_not_kept_do_not_matter(row: int, schedule: Schedule, limit: int | None, isa: str) -> None:
    """NaN in every key and value a row does not keep leaves the row's bits alone."""
    q, k, v = qkv(1, 2, 1, 150, 150, 24)
    rope = None if limit is None else tables(94, 24)
    out, lse = attention(q, k, v, schedule=schedule, rope=rope, distance_limit=limit, return_lse=True)
    kept = reference.keep_mask(schedule, torch.tensor([[row]]), torch.arange(150)[None])[0]
    for poison in (torch.nan, torch.inf):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, ~kept] = poison
        v2[:, :, ~kept] = poison
        out2, lse2 = attention(q, k2, v2, schedule=schedule, rope=rope, distance_limit=limit, return_lse=True)
        assert torch.equal(out2[:, :, row], out[:, :, row]) and torch.equal(lse2[:, :, row], lse[:, :, row])


@pytest.mark.parametrize("what", ["query", "key", "value"])
@pytest.mark.parametrize("row", [0, 5, 70])
@pytest.mark.parametrize("schedule", [Causal(), Lambda(3, 20), Full()], ids=str)
def test_nan_in_a_kept_pair_shows(what: str, row: int, schedule: Schedule, isa: str) -> None:
    """Never silence: exactly the rows that see a NaN are NaN."""
    inputs = dict(zip(("query", "key", "value"), qkv(1, 1, 1, 100, 100, 16), strict=True))
    inputs[what][:, :, row] = torch.nan
    out, lse = attention(**inputs, schedule=schedule, return_lse=True)
    sees = reference.keep_mask(schedule, torch.arange(100)[:, None], torch.arange(100)[None])[:, row]
    if what == "query":
        sees = torch.arange(100) == row
    assert torch.equal(out[0, 0].isnan().all(1), sees) and torch.equal(out[0, 0].isnan().any(1), sees)
    assert torch.equal(lse[0, 0].isnan(), sees & (what != "value"))


def test_all_nan_queries_stay_nan(isa: str) -> None:
    q, k, v = qkv(1, 3, 1, 1100, 1100, 8)
    out, lse = attention(torch.full_like(q, torch.nan), k, v, schedule=Lambda(3, 80), return_lse=True)
    assert out.isnan().all() and lse.isnan().all()


def test_rows_without_a_key(isa: str) -> None:
    """More queries than keys: the first rows stand before every key."""
    q, k, v = qkv(1, 4, 2, 200, 90, 32)
    for schedule in (Causal(), Lambda(4, 10)):
        out, lse = attention(q, k, v, schedule=schedule, rope=tables(90, 32), return_lse=True)
        assert out[:, :, :110].count_nonzero() == 0 and bool((lse[:, :, :110] == -torch.inf).all())
        assert out[:, :, 110:].isfinite().all() and lse[:, :, 110:].isfinite().all()
        assert torch.equal(out[:, :, 110:], attention(q[:, :, 110:], k, v, schedule=schedule, rope=tables(90, 32)))


def test_large_scores_do_not_overflow(isa: str) -> None:
    q, k, v = qkv(1, 1, 1, 70, 70, 16)
    out, lse = attention(100 * q, 100 * k, v, return_lse=True)
    exact = reference.attention(100 * q.double(), 100 * k.double(), v.double())
    plain = reference.attention(100 * q, 100 * k, v)
    assert_as_accurate(out, exact[0], plain[0], "out")
    assert_as_accurate(lse, exact[1], plain[1], "lse")


def test_inputs_are_not_written(isa: str) -> None:
    inputs = qkv(1, 2, 1, 70, 70, 32)
    copies = [x.clone() for x in inputs]
    attention(*inputs, rope=tables(70, 32))
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies, strict=True))


def test_reads_stay_inside_the_inputs(isa: str) -> None:
    """In a process of its own, with every input between pages that cannot be read."""
    command = [sys.executable, "-m", "tests.support.guarded_attention", isa]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[3])
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
    assert done.stdout.split() == ["tables", "ends", "middle"]


# ---- cost ----------------------------------------------------------------------------------------------------------


def allocated(length: int, backward: bool) -> int:
    """Bytes the Λ op asks torch's allocator for, beyond its results: its scratch."""
    q, k, v = (x.requires_grad_(backward) for x in qkv(1, 1, 1, length, length, 16))
    rope = tables(64 + 64, 16)

    def call() -> None:
        out = lambda_attention(q, k, v, sink_size=4, window_size=64, rope=rope)
        if backward:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    asked = sum(allocations(call))
    rows = length * 4
    results = rows * (16 + 1)  # out, lse
    if backward:
        results += rows * (1 + 3 * 16 + 16 + 1)  # what rounding lse left out; gradients, grad_out, delta
    assert asked >= results, "the profiler missed an allocation"
    return asked - results


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_beyond_the_results_does_not_grow(backward: bool) -> None:
    short, long = allocated(4096, backward), allocated(32768, backward)
    assert long <= short + 4096  # rounding
    assert short < 1 << 22


ONE_QUERY: dict[str, dict[str, Any]] = {
    "full": {"schedule": "full"},
    "lambda": {"schedule": "lambda", "schedule_args": [1 << 24, 1 << 23]},
    "segments": {"schedule": "segments", "schedule_args": [1], "schedule_tensor": lengths(0, 1 << 24, 1 << 25)},
    "key-subset": {
        "schedule": "key_subset", "schedule_args": [1],
        "schedule_tensor": torch.ones(1, 1 << 19, dtype=torch.int64),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_QUERY)
def test_one_query_on_two_threads_costs_no_more_than_on_one(name: str) -> None:
    """Of 2**25 keys, the first token of every tile or all: finding a thread's share of them must not be the work."""
    query = torch.randn(1, 1, 1, 8)
    key = torch.randn(1, 1, 1, 8).expand(-1, -1, 1 << 25, -1)

    def seconds(threads: int) -> float:
        begin = time.perf_counter()
        native.attention(query, key, key, threads=threads, **ONE_QUERY[name])
        return time.perf_counter() - begin

    one, two = (min(seconds(threads) for _ in range(2)) for threads in (1, 2))
    assert two < 2 * one
