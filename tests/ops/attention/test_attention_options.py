# SPDX-License-Identifier: Apache-2.0
"""Half precision, distance_bias, ALiBi, sink_logits, softcap, Prefix and Segments: values, gradients and their bits.

Dropout has a file of its own (test_attention_dropout.py), and so have vmap, autocast and the like
(test_attention_transforms.py).
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore.ops import attention, lambda_attention
from pycore.reference import attention as reference
from pycore.schedules import Causal, Full, Lambda, Prefix, Schedule, Segments
from tests.support.attention_inputs import Case, lengths, qkv, tables
from tests.support.attention_options import (
    BF16,
    F16,
    F32,
    F64,
    NAMES,
    TABLES,
    assert_same,
    dtype_id,
    expected,
    ours,
    results,
)
from tests.support.tolerance import assert_as_accurate


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


# ---- gradcheck -----------------------------------------------------------------------------------------------------

SMALL = [
    Case(5, 7, schedule, 4, 3, heads=2, kv_heads=1, bias=n, sinks=True, softcap=cap, rope_dim=r, distance_limit=limit)
    for schedule in (Full(), Causal(), Lambda(2, 3), prefix(4), segments(0, 3, 7), segments(0, 3, 7, causal=False))
    for n, cap, r, limit in [(3, 0.0, 0, None), (9, 1.5, 4, 5)]
] + [Case(7, 5, Causal(), 4, bias=2, sinks=True, heads=2), Case(3, 70, Full(), 3, bias=60, softcap=2.0, heads=1)]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case: Case, threads: None) -> None:
    """Of the tables too, through out and lse."""
    torch.set_num_threads(1)
    options = case.options(F64, F64)
    names = [name for name in TABLES if name in options]
    inputs = [x.requires_grad_() for x in (*case.inputs(F64), *(options.pop(name) for name in names))]

    def f(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(q, k, v, **options, **dict(zip(names, given, strict=True)), return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(f, inputs)


def test_gradients_that_are_not_asked_for() -> None:
    """Each table's alone, and none: what is asked for does not depend on what else is."""
    inputs = qkv(1, 4, 2, 30, 40, 16)
    bias, sinks = torch.randn(4, 9), torch.randn(4)
    both = [bias.clone().requires_grad_(), sinks.clone().requires_grad_()]
    expected_pair = torch.autograd.grad(attention(*inputs, distance_bias=both[0], sink_logits=both[1]).sum(), both)
    only = bias.clone().requires_grad_()
    loss = attention(*inputs, distance_bias=only, sink_logits=sinks).sum()
    assert torch.equal(torch.autograd.grad(loss, only)[0], expected_pair[0])
    only = sinks.clone().requires_grad_()
    loss = attention(*inputs, distance_bias=bias, sink_logits=only).sum()
    assert torch.equal(torch.autograd.grad(loss, only)[0], expected_pair[1])
    query = inputs[0].clone().requires_grad_()
    attention(query, *inputs[1:], distance_bias=bias, sink_logits=sinks).sum().backward()
    assert query.grad is not None and query.grad.isfinite().all()


# ---- distance_bias and ALiBi ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [40, 100, 400], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=dtype_id)
def test_alibi_is_a_distance_bias(dtype: torch.dtype, limit: int, isa: str) -> None:
    q, k, v = qkv(2, 4, 2, 203, 300, 40, dtype=dtype)
    table_dtype = F64 if dtype == F64 else F32
    slopes = torch.tensor([0.5, 0.25, 0.0, 1 / 3], dtype=table_dtype)
    table = -slopes[:, None] * torch.arange(limit + 1, dtype=table_dtype)
    options = {"sink_size": 70, "window_size": 40, "distance_limit": limit, "return_lse": True}
    implicit = lambda_attention(q, k, v, alibi_slopes=slopes, **options)
    explicit = lambda_attention(q, k, v, distance_bias=table, **options)
    assert all(torch.equal(x, y) for x, y in zip(implicit, explicit, strict=True))
    # Here sinks stand farther than the limit: without it they would see other biases, and still count for something.
    if limit == 40:
        farther = lambda_attention(q, k, v, alibi_slopes=slopes, **options | {"distance_limit": 2**62})
        assert not torch.equal(implicit[1], farther[1])


@pytest.mark.parametrize("schedule", [Causal(), Full(), Lambda(3, 70), prefix(80, 20)], ids=lambda s: s.kind)
def test_the_last_bias_holds_beyond_the_table(schedule: Schedule, isa: str) -> None:
    q, k, v = qkv(2, 2, 1, 97, 130, 32)
    short = torch.randn(2, 20)
    long = torch.cat([short, short[:, -1:].expand(-1, 130)], dim=1)
    assert torch.equal(
        attention(q, k, v, schedule=schedule, distance_bias=short),
        attention(q, k, v, schedule=schedule, distance_bias=long),
    )
    # A limit is a shorter table, where nothing is rotated.
    if not isinstance(schedule, Lambda):
        assert torch.equal(
            attention(q, k, v, schedule=schedule, distance_bias=long, distance_limit=10),
            attention(q, k, v, schedule=schedule, distance_bias=short[:, :11]),
        )


@pytest.mark.parametrize("schedule", [Full(), prefix(130, 130), segments(0, 130, causal=False)], ids=lambda s: s.kind)
def test_keys_after_the_query_have_the_bias_of_distance_0(schedule: Schedule, isa: str) -> None:
    q, k, v = qkv(2, 2, 1, 130, 130, 32)
    bias = torch.zeros(2, 5)
    bias[:, 0] = -torch.inf  # leaves only keys at positive distances
    out, lse = attention(q, k, v, schedule=schedule, distance_bias=bias, return_lse=True)
    for i in (1, 64, 129):
        alone = torch.softmax(q[:, :, i : i + 1] @ k[:, :, :i].mT * 32**-0.5, dim=3) @ v[:, :, :i]
        torch.testing.assert_close(out[:, :, i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["expanded", "sliced"])
def test_strided_tables(layout: str, isa: str) -> None:
    q, k, v = qkv(1, 4, 2, 70, 97, 32)
    bias = torch.randn(4, 30)
    if layout == "expanded":
        bias = bias[:1].expand(4, -1)
    else:
        bias = torch.cat([bias, torch.full((4, 5), torch.nan)], dim=1)[:, :30]
    assert not bias.is_contiguous()
    grads = []
    for table in (bias.detach().requires_grad_(), bias.contiguous().requires_grad_()):
        out = attention(q, k, v, distance_bias=table)
        grads.append((out, torch.autograd.grad(out.square().sum(), table)[0]))
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


# ---- sink_logits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=dtype_id)
def test_a_row_without_a_key_has_its_sink(dtype: torch.dtype, isa: str) -> None:
    """Zeros, and the lse of the sink alone, which takes all of lse's gradient."""
    inputs = [x.requires_grad_() for x in qkv(1, 2, 1, 130, 90, 32, dtype=dtype)]
    sinks = torch.tensor([0.3, -7.0], dtype=F64 if dtype == F64 else F32, requires_grad=True)
    out, lse = attention(*inputs, sink_logits=sinks, return_lse=True)
    assert out[:, :, :40].count_nonzero() == 0 and out[:, :, 40:].count_nonzero() > 0
    assert torch.equal(lse[0, :, :40], sinks[:, None].expand(-1, 40))
    assert bool((lse[0, :, 40:] > sinks[:, None]).all())
    grads = torch.autograd.grad((out[:, :, :40].sum() + lse[:, :, :40].sum()), (sinks, *inputs))
    assert torch.equal(grads[0], torch.full_like(sinks, 40))
    assert all(x.count_nonzero() == 0 for x in grads[1:])


def test_sinks_of_no_weight_and_of_all_weight(isa: str) -> None:
    q, k, v = qkv(1, 2, 1, 70, 97, 32)
    plain = attention(q, k, v, return_lse=True)
    none = attention(q, k, v, sink_logits=torch.full((2,), -torch.inf), return_lse=True)
    assert all(torch.equal(x, y) for x, y in zip(plain, none, strict=True))
    out, lse = attention(q, k, v, sink_logits=torch.full((2,), 1e4), return_lse=True)
    assert out.count_nonzero() == 0 and bool((lse == 1e4).all())


# ---- softcap -------------------------------------------------------------------------------------------------------


def test_softcap_bounds_the_logits(isa: str) -> None:
    """By any factor: at scores of thousands every key counts exp(±cap)."""
    q, k, v = qkv(1, 1, 1, 97, 97, 32)
    q, k = 100 * q.abs(), 100 * k.abs()
    out, lse = attention(q, k, v, softcap=3.0, schedule=Full(), return_lse=True)
    torch.testing.assert_close(out, v.mean(dim=2, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, torch.full_like(lse, 3 + torch.tensor(97.0).log().item()))
    out, lse = attention(-q, k, v, softcap=3.0, schedule=Full(), return_lse=True)
    torch.testing.assert_close(lse, torch.full_like(lse, -3 + torch.tensor(97.0).log().item()))


def test_a_huge_softcap_is_none(isa: str) -> None:
    q, k, v = qkv(1, 2, 1, 97, 97, 32)
    torch.testing.assert_close(attention(q, k, v, softcap=1e6), attention(q, k, v), rtol=1e-5, atol=1e-5)


# ---- Segments and Prefix -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not-causal"])
def test_each_segment_alone(causal: bool, dtype: torch.dtype, isa: str) -> None:
    """Bit for bit where segments begin with a tile (reductions are cut by position), and nearly so elsewhere."""
    numbers = [0, 64, 192, 200, 256, 300, 301]
    q, k, v = qkv(2, 4, 2, 301, 301, 40, 24, dtype=dtype)
    options = {"distance_bias": torch.randn(4, 50), "sink_logits": torch.randn(4), "softcap": 5.0, "return_lse": True}
    out, lse = attention(q, k, v, schedule=segments(*numbers, causal=causal), **options)
    for start, end in zip(numbers[:-1], numbers[1:], strict=True):
        part = [x[:, :, start:end] for x in (q, k, v)]
        alone = attention(*part, schedule=Causal() if causal else Full(), **options)
        if start % 64 == 0:
            assert torch.equal(alone[0], out[:, :, start:end]) and torch.equal(alone[1], lse[:, :, start:end])
        torch.testing.assert_close(alone[0], out[:, :, start:end])
        torch.testing.assert_close(alone[1], lse[:, :, start:end], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not-causal"])
def test_other_segments_are_not_read(causal: bool, isa: str) -> None:
    q, k, v = qkv(1, 2, 1, 301, 301, 40)
    schedule = segments(0, 64, 100, 250, 301, causal=causal)
    out = attention(q, k, v, schedule=schedule)
    for start, end in ((0, 64), (64, 100), (100, 250), (250, 301)):
        poisoned = [torch.full_like(x, torch.nan) for x in (k, v)]
        for x, y in zip(poisoned, (k, v), strict=True):
            x[:, :, start:end] = y[:, :, start:end]
        assert torch.equal(attention(q[:, :, :], *poisoned, schedule=schedule)[:, :, start:end], out[:, :, start:end])


def test_prefix_between_causal_and_full(isa: str) -> None:
    q, k, v = qkv(2, 2, 1, 130, 130, 40)
    causal, full = attention(q, k, v), attention(q, k, v, schedule=Full())
    assert torch.equal(attention(q, k, v, schedule=prefix(0, 130)), torch.stack([causal[0], full[1]]))
    assert torch.equal(attention(q, k, v, schedule=prefix(1, 2**62)), torch.stack([causal[0], full[1]]))


# ---- float16 and bfloat16 ------------------------------------------------------------------------------------------


def every_half(dtype: torch.dtype) -> Tensor:
    """All 2^16 of them, as rows of 64."""
    return torch.arange(2**16).to(torch.int16).view(dtype).view(1, 1, 1024, 64)


def same_numbers(x: Tensor, y: Tensor) -> bool:
    """Bit for bit, except that any NaN is any other, and one zero the other: sums begin at +0."""
    return x.dtype == y.dtype and bool(((x == y) | (x.isnan() & y.isnan())).all())


@pytest.mark.parametrize("dtype", [F16, BF16], ids=dtype_id)
def test_every_half_is_loaded_and_stored(dtype: torch.dtype, isa: str) -> None:
    """A query with one key returns its value."""
    values = every_half(dtype)
    q, k = (torch.zeros(1, 1, 1024, 1, dtype=dtype) for _ in range(2))
    one_key_each = segments(*range(1025))
    assert same_numbers(attention(q, k, values, schedule=one_key_each), values)
    # And beside the vectors' whole widths.
    for width in (1, 3, 17, 63):
        rows = values[..., :width].contiguous()
        assert same_numbers(attention(q, k, rows, schedule=one_key_each), rows)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=dtype_id)
def test_halves_are_rounded_as_torch_does(dtype: torch.dtype, isa: str) -> None:
    """The mean of two neighbours is a tie, which goes to the even one; thrice one and once the other is none."""
    finite = every_half(dtype).flatten()
    finite = finite[finite.isfinite()].double().unique()  # ascending
    # bfloat16's smallest are subnormal in float32 too, where a mean is rounded before it gets here.
    finite = finite[(finite.abs() >= torch.finfo(F32).smallest_normal) | (dtype == F16)]
    x, y = finite[:-1], finite[1:]
    quads = torch.stack([torch.stack([x, x, y, y]), torch.stack([x, y, y, y]), torch.stack([x, x, x, y])])
    quads = quads.transpose(0, 1).flatten(1)  # [4 keys, channels]
    values = quads.to(dtype)[None, None]
    q, k = torch.zeros(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 4, 1, dtype=dtype)
    exact = quads.float().mean(dim=0)  # exact in float32 while neighbours are, and torch rounds it
    assert torch.equal(exact.double(), quads.mean(dim=0)) or dtype == BF16
    keep = exact.double() == quads.mean(dim=0)
    out = attention(q, k, values).flatten()
    assert int(keep.sum()) > 100_000
    assert torch.equal(out[keep], exact.to(dtype)[keep])


@pytest.mark.parametrize("dtype", [F16, BF16], ids=dtype_id)
def test_half_inputs_are_float32_inputs(dtype: torch.dtype, isa: str) -> None:
    """The same bits, up to the one rounding of out; gradients differ by what rounding out does to them."""
    inputs = qkv(2, 4, 2, 97, 130, 111, 33, dtype=dtype)
    options = {"schedule": Lambda(5, 40), "distance_bias": torch.randn(4, 30), "sink_logits": torch.randn(4)}
    options |= {"softcap": 5.0, "rope": tables(130, 32), "distance_limit": 60, "return_lse": True}
    out, lse = attention(*inputs, **options)
    wide, wide_lse = attention(*(x.float() for x in inputs), **options)
    assert torch.equal(out, wide.to(dtype)) and torch.equal(lse, wide_lse)


# ---- the same bits -------------------------------------------------------------------------------------------------

LENGTH = 1100
BIAS, SINK_LOGITS = torch.randn(4, 300, generator=torch.Generator().manual_seed(5)), torch.tensor([0.0, 2.0, -1.0, 9.0])
BITS: dict[str, dict[str, Any]] = {
    "plain": {"schedule": Causal()},
    "bias-sinks-softcap": {
        "schedule": Causal(), "distance_bias": BIAS, "sink_logits": SINK_LOGITS, "softcap": 3.0,
    },
    "lambda-all": {
        "schedule": Lambda(70, 200), "distance_bias": BIAS, "sink_logits": SINK_LOGITS, "softcap": 3.0,
        "rope": tables(264, 24), "distance_limit": 200,
    },
    "alibi": {"schedule": Lambda(70, 200), "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.0]), "distance_limit": 1000},
    "segments": {"schedule": segments(0, 10, 700, 1010, 1100), "distance_bias": BIAS, "sink_logits": SINK_LOGITS},
}  # fmt: skip
bits = pytest.mark.parametrize("name", BITS)
dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=dtype_id)


@functools.cache
def long_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return qkv(2, 4, 2, LENGTH, LENGTH, 40, 24, dtype=dtype)


@bits
@dtypes
def test_chunks_and_single_rows_and_batch_rows(dtype: torch.dtype, name: str, isa: str) -> None:
    q, k, v = long_inputs(dtype)
    out, lse = ours(q, k, v, **BITS[name])
    ends = [(0, 501), (501, 1002), (1002, LENGTH), (990, 1003), (1003, 1030)]
    for start, end in ends + [(i, i + 1) for i in (0, 1, 63, 64, 65, 699, 700, 1009, 1010, 1023, 1024, 1099)]:
        part = ours(q[:, :, start:end], k[:, :, :end], v[:, :, :end], **BITS[name])
        assert_same(part, (out[:, :, start:end], lse[:, :, start:end]))
    for b in range(2):
        assert_same(ours(q[b : b + 1], k[b : b + 1], v[b : b + 1], **BITS[name]), (out[b : b + 1], lse[b : b + 1]))


@bits
@dtypes
@pytest.mark.parametrize("queries", [1, 7, LENGTH])
def test_threads_do_not_matter(queries: int, dtype: torch.dtype, name: str, isa: str, threads: None) -> None:
    """Nor for the gradients of the tables."""
    if isa == "scalar" and dtype != torch.float32:
        queries = min(queries, 300)  # these convert number by number; how work is divided does not depend on the dtype
    seen = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        inputs = [x.detach().requires_grad_() for x in long_inputs(dtype)]
        options = {key: x.detach().requires_grad_() if key in TABLES else x for key, x in BITS[name].items()}
        out, lse = ours(inputs[0][:, :, -queries:], *inputs[1:], **options)
        leaves = inputs + [x for key, x in options.items() if key in TABLES]
        grads = torch.autograd.grad((out, lse), leaves, (torch.cos(lse)[..., None].to(dtype).expand_as(out), lse.sin()))
        seen.append((out, lse, *grads))
    assert_same(seen[1], seen[0])
    assert_same(seen[2], seen[0])


@dtypes
def test_prefix_in_chunks(dtype: torch.dtype, isa: str) -> None:
    """A chunk sees what one pass sees once the prefix is there."""
    q, k, v = long_inputs(dtype)
    options = {"schedule": prefix(100, 70), "distance_bias": BIAS, "sink_logits": SINK_LOGITS}
    out, lse = ours(q, k, v, **options)
    for start, end in [(0, 100), (100, 163), (163, 164), (164, 1050), (1050, LENGTH), (LENGTH - 1, LENGTH)]:
        part = ours(q[:, :, start:end], k[:, :, :end], v[:, :, :end], **options)
        assert_same(part, (out[:, :, start:end], lse[:, :, start:end]))
    for b in range(2):
        options["schedule"] = prefix((100, 70)[b])
        assert_same(ours(q[b : b + 1], k[b : b + 1], v[b : b + 1], **options), (out[b : b + 1], lse[b : b + 1]))
