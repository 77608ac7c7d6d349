# SPDX-License-Identifier: Apache-2.0
"""Segments of each batch row, windows inside segments, and windows to the right: values, gradients, bits and errors.

tests/native/tile_schedule.cpp counts the tiles they visit, and tests/test_schedules.py has the masks by hand.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pycore import native
from pycore.ops import attention, lambda_attention
from pycore.reference import attention as reference
from pycore.schedules import Causal, Full, Lambda, Prefix, Schedule, Segments, Tree, to_flex_block_mask
from tests.support.attention_inputs import Case, lengths, qkv, random_tree, tables
from tests.support.attention_options import NAMES, assert_same, dtype_id, expected, ours, results
from tests.support.tolerance import assert_as_accurate

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


def rows(*numbers: tuple[int, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


TWO = rows((0, 30, 97, 130), (10, 10, 64, 64))  # the second row has no key before 10 and none from 64 on
SCHEDULES = [
    Segments(TWO), Segments(TWO, causal=False), Segments(TWO, window_size=20), Segments(TWO, True, 9, 3),
    Segments(TWO, False, 20), Segments(TWO, False, 20, 5, 7), Segments(lengths(0, 70, 130), False, None, 0, 33),
    Segments(lengths(0, 5, 130), window_size=70, sink_size=66), Lambda(0, 30, right=20), Lambda(5, 1, right=64),
    Lambda(70, 20, right=3), Lambda(3, 40, right=None), Lambda(0, 64, right=10),
]  # fmt: skip
CASES = [
    Case(n, 130, schedule, d, value_dim=dv, batch=2)
    for schedule in SCHEDULES
    for n, d, dv in [(130, 33, 20), (1, 40, None)]
] + [
    Case(97, 130, schedule, 40, batch=2, rope_dim=16, interleaved=limit is None, distance_limit=limit, bias=20,
         sinks=True, softcap=4.0, heads=4, kv_heads=2)
    for schedule in SCHEDULES
    for limit in (None, 70)
] + [
    Case(30, 130, Segments(rows((0, 20, 60, 130), (3, 40, 43, 43)), False, 15, 2, 8), batch=2, key_starts=(0, 70),
         key_lengths=(130, 113), query_lengths=(30, 25), rope_dim=8, distance_limit=20),
    Case(130, 97, Segments(lengths(-50, 40, 97), False, 40, 0, 10), rope_dim=8, distance_limit=40),
    Case(30, 60, Lambda(9, 50, right=2), 32, batch=2, key_offset=(100, 0), bias=120, distance_limit=90),
    Case(4, 1300, Segments(lengths(0, 20, 2**62), window_size=100, sink_size=70), heads=1),
]  # fmt: skip
CASES += [
    Case(n, 130, schedule, 32, batch=2, symmetric=True, heads=4, kv_heads=2, distance_limit=limit, **table)
    for schedule in (Full(), Lambda(3, 40, right=50), Lambda(3, 40, right=None), Segments(TWO, False, 40, 3, 50))
    for n, limit, table in [
        (130, None, {"alibi": True}), (97, 60, {"alibi": "rows", "sinks": True}), (130, 90, {"bias": 20}),
        (131, None, {"bias": 300, "softcap": 4.0}), (9, 60, {"alibi": True}),
    ]
] + [
    Case(97, 130, schedule, 40, batch=3, alibi="rows", heads=4, kv_heads=2, distance_limit=limit)
    for schedule in (Causal(), Lambda(5, 40), Full(), Tree(random_tree(40)))
    for limit in (None, 70)
] + [
    Case(30, 130, Prefix(lengths(40, 200)), batch=2, key_starts=(0, 70), key_lengths=(130, 113), alibi="rows",
         symmetric=True, rope_dim=8, query_lengths=(30, 5)),
    Case(70, 97, Lambda(5, 40), 16, alibi=True, symmetric=True),  # causal: nothing to be symmetric about
]  # fmt: skip


def case_id(x: Any) -> str:
    return str(x).removeprefix("torch.")


# Half precision is a matter of loads and stores: what it shares with float32 need not be seen again.
DTYPED_CASES = [(F32, case) for case in CASES] + [(BF16, case) for case in CASES[::5]]


@pytest.mark.parametrize("dtype, case", DTYPED_CASES, ids=case_id)
def test_as_accurate_as_plain_torch(dtype: torch.dtype, case: Case, isa: str) -> None:
    """Values and gradients of everything that has one."""
    actual = results(ours, case, dtype, dtype, F32)
    exact, plain = expected(case, dtype)
    for name, x, y, z in zip(NAMES, actual, exact, plain, strict=False):
        assert_as_accurate(x, y, z.to(x.dtype), name)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_float64_is_the_reference(case: Case) -> None:
    actual, exact = (results(f, case, F64, F64, F64) for f in (ours, reference.attention))
    for name, x, y in zip(NAMES, actual, exact, strict=False):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "schedule",
    [Segments(rows((0, 3, 7), (2, 2, 6))), Segments(rows((0, 3, 7), (2, 7, 7)), window_size=2, sink_size=1),
     Segments(lengths(0, 2, 7), False, 3, 1, 1), Lambda(1, 2, right=2)],
    ids=lambda s: "-".join(map(str, s.args)),
)  # fmt: skip
def test_gradcheck(schedule: Schedule, threads: None) -> None:
    torch.set_num_threads(1)
    case = Case(5, 7, schedule, 4, 3, batch=2, bias=3, rope_dim=4, distance_limit=5)
    options = case.options(F64, F64)
    inputs = [x.requires_grad_() for x in (*case.inputs(F64), options.pop("distance_bias"))]

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, distance_bias=bias, **options)

    assert torch.autograd.gradcheck(f, inputs)


# ---- what a window leaves out, and what a row is alone -------------------------------------------------------------


def with_gradients(schedule: Schedule, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves, schedule=schedule, **options)
    return (out.detach(), *torch.autograd.grad(out, leaves, out.detach().cos()))


@pytest.mark.parametrize("wide", [Segments(TWO, window_size=130), Segments(TWO, True, 1, sink_size=2**62),
                                  Segments(TWO, True, 2**62, 3, 0)], ids=["window", "sinks", "both"])  # fmt: skip
def test_a_window_as_long_as_the_segments_is_none(wide: Segments, isa: str) -> None:
    inputs = qkv(2, 4, 2, 130, 130, 40)
    assert_same(with_gradients(wide, *inputs), with_gradients(Segments(TWO), *inputs))
    both = Segments(TWO, False, 130, 0, 130)
    assert_same(with_gradients(both, *inputs), with_gradients(Segments(TWO, False), *inputs))


def test_one_segment_is_a_window_and_its_sinks(isa: str) -> None:
    """And a window without bounds is every key."""
    inputs = qkv(2, 4, 2, 97, 130, 40)
    one = lengths(0, 130)
    for causal, right in ((True, 0), (False, 9), (False, None)):
        segments = Segments(one, causal, 30, 7, None if causal else right)
        assert_same(with_gradients(segments, *inputs), with_gradients(Lambda(7, 30, right), *inputs))
    assert_same(with_gradients(Lambda(0, 2**62, None), *inputs), with_gradients(Full(), *inputs))
    assert_same(with_gradients(Lambda(0, 2**62), *inputs), with_gradients(Causal(), *inputs))


@pytest.mark.parametrize("right", [0, 40], ids=["causal", "both-sides"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
def test_a_packed_row_is_each_text_alone(right: int, dtype: torch.dtype, isa: str) -> None:
    """Bit for bit where texts begin with a segment of 1024 positions, or with a tile and do not cross one."""
    texts = rows((0, 64, 300, 1024, 1400), (0, 512, 960, 1024, 1024))
    q, k, v = qkv(2, 4, 2, 1400, 1400, 24, dtype=dtype)
    options = {"rope": tables(264, 16), "distance_limit": 200, "distance_bias": torch.randn(4, 50), "return_lse": True}
    window = {"window_size": 100, "sink_size": 5, "right": right or None}
    out, lse = attention(q, k, v, schedule=Segments(texts, right == 0, **window), **options)
    for b, boundaries in enumerate(texts.tolist()):
        for start, end in zip(boundaries[:-1], boundaries[1:], strict=True):
            if start == end:
                continue
            part = [x[b : b + 1, :, start:end] for x in (q, k, v)]
            alone = attention(*part, schedule=Lambda(5, 100, right), **options)
            packed = out[b : b + 1, :, start:end], lse[b : b + 1, :, start:end]
            if start % 64 == 0 and (start % 1024 == 0 or end <= 1024):
                assert_same(alone, packed)
            torch.testing.assert_close(alone[0], packed[0], rtol=1e-2, atol=1e-5 if dtype == F32 else 1e-2)
        assert out[b, :, boundaries[-1] :].count_nonzero() == 0


def test_a_batch_row_is_the_row_alone(isa: str) -> None:
    """Other rows' boundaries do not matter, nor does the padding of a row's own."""
    inputs = qkv(2, 4, 2, 130, 130, 40)
    for schedule in SCHEDULES[:6]:
        assert isinstance(schedule, Segments)
        both = with_gradients(schedule, *inputs)
        for b in range(2):
            own = torch.cat([schedule.boundaries[b], schedule.boundaries[b, -1:].expand(3)])
            for boundaries in (own, own[None]):
                alone = with_gradients(replace(schedule, boundaries=boundaries), *(x[b : b + 1] for x in inputs))
                assert_same(alone, tuple(x[b : b + 1] for x in both))
    shared = with_gradients(Segments(lengths(0, 50, 130)), *inputs)
    assert_same(with_gradients(Segments(lengths(0, 50, 130).repeat(2, 1)), *inputs), shared)
    assert_same(with_gradients(Segments(lengths(0, 50, 130)[None]), *inputs), shared)


def test_chunks_padding_and_threads(isa: str, threads: None) -> None:
    schedule = Segments(lengths(0, 200, 700, 1100), window_size=150, sink_size=10)
    q, k, v = qkv(2, 4, 2, 1100, 1100, 24)
    whole = attention(q, k, v, schedule=schedule, return_lse=True)
    for start, end in ((0, 333), (333, 1100), (199, 201), (705, 706), (1099, 1100)):
        part = attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], schedule=schedule, return_lse=True)
        assert_same(part, tuple(x[:, :, start:end] for x in whole))
    padded = [torch.nn.functional.pad(x, (0, 0, 37, 5), value=torch.nan) for x in (k, v)]
    options = {"key_starts": lengths(37, 37), "key_lengths": lengths(1137, 1137), "return_lse": True}
    assert_same(attention(q, *padded, schedule=schedule, **options), whole)
    for each in (schedule, Segments(schedule.boundaries, False, 150, 10, 30), Lambda(10, 150, right=30)):
        seen = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append((*with_gradients(each, q, k, v), attention(q[:, :, -1:], k, v, schedule=each)))
        assert_same(seen[1], seen[0])
        assert_same(seen[2], seen[0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.kind}-{'-'.join(map(str, s.args))}")
def test_what_is_not_kept_does_not_matter(schedule: Schedule, isa: str) -> None:
    """NaN in every key and value that a block of rows does not keep leaves its bits."""
    inputs = qkv(2, 2, 1, 130, 130, 40)
    whole = attention(*inputs, schedule=schedule, return_lse=True)
    position = torch.arange(130)
    masks = torch.stack([reference.keep_mask(schedule, position[:, None], position[None], b) for b in range(2)])
    for first, last in ((0, 10), (29, 31), (60, 66), (128, 130)):
        left_out = ~masks[:, first:last].any(1)[:, None, :, None]
        k, v = (x.masked_fill(left_out, torch.nan) for x in inputs[1:])
        part = attention(inputs[0], k, v, schedule=schedule, return_lse=True)
        assert_same(tuple(x[:, :, first:last] for x in part), tuple(x[:, :, first:last] for x in whole))


def test_keys_outside_all_segments_have_no_gradient(isa: str) -> None:
    """Whatever they hold; those inside have the same bits."""
    q, k, v = qkv(2, 2, 1, 130, 130, 40)
    outside = torch.ones(2, 1, 130, 1, dtype=torch.bool)
    outside[0], outside[1, :, 10:64] = False, False
    for schedule in SCHEDULES[:6]:
        plain = with_gradients(schedule, q, k, v)
        poisoned = with_gradients(schedule, q, *(x.masked_fill(outside, torch.nan) for x in (k, v)))
        assert_same(poisoned, plain)
        assert all(x.masked_select(outside).count_nonzero() == 0 for x in plain[2:])


# ---- biases on both sides, slopes of each batch row ---------------------------------------------------------------


def test_symmetric_biases_by_hand(isa: str) -> None:
    """-slope |i - j|, as encoders have it, and the table's entry of |i - j|."""
    q, k, v = qkv(2, 2, 2, 70, 70, 16)
    slopes, table = torch.tensor([[0.5, 0.25], [0.125, 0.0]]), torch.randn(2, 70)
    position = torch.arange(70)
    away = (position[:, None] - position[None]).abs()
    for options, bias in (
        ({"alibi_slopes": slopes[0]}, -slopes[0][None, :, None, None] * away),
        ({"alibi_slopes": slopes}, -slopes[:, :, None, None] * away),
        ({"alibi_slopes": slopes, "distance_limit": 30}, -slopes[:, :, None, None] * away.clamp(max=30)),
        ({"distance_bias": table}, table[:, away][None]),
    ):
        out = attention(q, k, v, schedule=Full(), symmetric_bias=True, **options)
        plain = torch.softmax(q @ k.mT * 0.25 + bias, dim=3) @ v
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
        near = (away <= 9)[None, None]
        plain = torch.softmax((q @ k.mT * 0.25 + bias).masked_fill(~near, -torch.inf), dim=3) @ v
        window = {"sink_size": 0, "window_size": 10, "right": 9, "symmetric_bias": True, "distance_limit": 70}
        torch.testing.assert_close(lambda_attention(q, k, v, **window | options), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", [Causal(), Lambda(3, 20), Segments(TWO)], ids=lambda s: s.kind)
def test_symmetry_is_for_keys_after_the_query(schedule: Schedule, isa: str) -> None:
    inputs, bias = qkv(2, 2, 1, 130, 130, 16), torch.randn(2, 40)
    plain = attention(*inputs, schedule=schedule, distance_bias=bias, return_lse=True)
    both = attention(*inputs, schedule=schedule, distance_bias=bias, symmetric_bias=True, return_lse=True)
    assert_same(both, plain)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_id)
@pytest.mark.parametrize("schedule", [Causal(), Lambda(3, 20, right=5), Full()], ids=lambda s: s.kind)
def test_slopes_of_a_row_are_those_of_the_row_alone(schedule: Schedule, dtype: torch.dtype, isa: str) -> None:
    """Bits of outputs and gradients; also a row of slopes for all, or the same for each, and slopes between others."""
    inputs, slopes = qkv(3, 4, 2, 40, 90, 24, dtype=dtype), torch.rand(3, 4)
    whole = with_gradients(schedule, *inputs, alibi_slopes=slopes, symmetric_bias=True)
    for b in range(3):
        row = [x[b : b + 1] for x in inputs]
        for given in (slopes[b], slopes[b : b + 1]):
            alone = with_gradients(schedule, *row, alibi_slopes=given, symmetric_bias=True)
            assert_same(alone, tuple(x[b : b + 1] for x in whole))
    shared = with_gradients(schedule, *inputs, alibi_slopes=slopes[1])
    for given in (slopes[1:2], slopes[1].expand(3, 4), slopes[1].repeat(3, 2)[:, :4]):
        assert_same(with_gradients(schedule, *inputs, alibi_slopes=given), shared)


def test_vmap_over_slopes(isa: str) -> None:
    q, k, v = qkv(6, 4, 2, 30, 40, 16)
    slopes = torch.rand(3, 2, 4)
    inputs = [x.unflatten(0, (3, 2)) for x in (q, k, v)]
    f = lambda *x: attention(*x[:3], alibi_slopes=x[3])  # noqa: E731
    whole = attention(q, k, v, alibi_slopes=slopes.flatten(0, 1)).unflatten(0, (3, 2))
    assert torch.equal(torch.vmap(f)(*inputs, slopes), whole)
    assert torch.equal(torch.vmap(f, (0, 0, 0, 2))(*inputs, slopes.permute(1, 2, 0)), whole)
    for given, dim in ((slopes[:, 0], 0), (slopes[:, 1].T, 1), (slopes[0], None), (slopes[0, 0], None)):
        loop = [f(*(x[i] for x in inputs), given if dim is None else given.select(dim, i)) for i in range(3)]
        assert torch.equal(torch.vmap(f, (0, 0, 0, dim))(*inputs, given), torch.stack(loop))


# ---- transforms ----------------------------------------------------------------------------------------------------


def test_vmap_over_boundaries(isa: str) -> None:
    """One for a sample, one for each batch row of a sample, or one for all; over gradients as well."""
    q, k, v = qkv(6, 4, 2, 30, 40, 16)
    several = rows((0, 10, 40), (5, 5, 30), (0, 40, 40), (1, 2, 3), (0, 39, 40), (20, 30, 40))
    inputs = [x.unflatten(0, (3, 2)) for x in (q, k, v)]

    def grads(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor) -> tuple[Tensor, ...]:
        def loss(*x: Tensor) -> Tensor:
            return attention(*x, schedule=Segments(boundaries, window_size=7, sink_size=2)).square().sum()

        return torch.func.grad(loss, (0, 1, 2))(q, k, v)

    f = lambda *x: attention(*x[:3], schedule=Segments(x[3], window_size=7, sink_size=2))  # noqa: E731
    whole = attention(q, k, v, schedule=Segments(several, window_size=7, sink_size=2)).unflatten(0, (3, 2))
    assert torch.equal(torch.vmap(f)(*inputs, several.view(3, 2, 3)), whole)
    assert torch.equal(torch.vmap(f, (0, 0, 0, 1))(*inputs, several.view(3, 2, 3).transpose(0, 1)), whole)
    for boundaries, dim in ((several[:3], 0), (several[:3].T, 1), (several[:2], None), (several[0], None)):
        loop = [f(*(x[i] for x in inputs), boundaries if dim is None else boundaries.select(dim, i)) for i in range(3)]
        assert torch.equal(torch.vmap(f, (0, 0, 0, dim))(*inputs, boundaries), torch.stack(loop))
    mapped = torch.vmap(f, (None, None, None, 0))(*(x[0] for x in inputs), several[:3])
    assert torch.equal(mapped, torch.stack([f(*(x[0] for x in inputs), several[i]) for i in range(3)]))


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_compile(dynamic: bool | None) -> None:
    """New boundaries, windows and lengths need no graph each."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def f(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, window: int, right: int) -> Tensor:
        x = attention(q, k, v, schedule=Segments(boundaries, window_size=window, sink_size=3))
        x = x + attention(
            q, k, v, schedule=Segments(boundaries, False, window, 3, right), alibi_slopes=q[:, :, 0, 0].contiguous()
        )
        options = {"sink_size": 3, "window_size": window, "right": right, "symmetric_bias": True}
        return x + lambda_attention(q, k, v, alibi_slopes=q[0, :, 0, 0].contiguous(), **options)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=counter)
    for step, n in enumerate((50, 51, 90, 130)):
        leaves = [x.requires_grad_() for x in qkv(2, 4, 2, n, n, 8)]
        boundaries = torch.stack([torch.arange(0, n, 9 + step)[:5], torch.arange(5)])
        actual, wanted = (g(*leaves, boundaries, 11 + step, 5 + step) for g in (compiled, f))
        assert torch.equal(actual, wanted)
        assert_same(*(torch.autograd.grad(x.square().sum(), leaves) for x in (actual, wanted)))
    assert counter.frame_count <= 3
    torch._dynamo.reset()


def test_export() -> None:
    class Encoder(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, slopes: Tensor) -> Tensor:
            schedule = Segments(boundaries, False, 5, 2, 3)
            return attention(q, k, v, schedule=schedule, alibi_slopes=slopes, symmetric_bias=True)

    n = torch.export.Dim("n", min=2, max=500)
    given = rows((0, 20, 50), (0, 50, 50)), torch.rand(2, 4)
    shapes = ({2: n}, {2: n}, {2: n}, None, None)
    exported = torch.export.export(Encoder(), (*qkv(2, 4, 2, 50, 50, 8), *given), dynamic_shapes=shapes).module()
    inputs = qkv(2, 4, 2, 77, 77, 8)
    assert torch.equal(exported(*inputs, *given), Encoder()(*inputs, *given))


@pytest.mark.parametrize("schedule", SCHEDULES[3:6:2] + SCHEDULES[8:9], ids=lambda s: "-".join(map(str, s.args)))
def test_opcheck(schedule: Schedule) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, 2, 20, 130, 16))
    rest = (
        *[None] * 9,
        schedule.tensor,
        None,
        None,
        "attention",
        schedule.kind,
        schedule.args,
        False,
        -1,
        0.3,
        0.0,
        0.0,
    )
    torch.library.opcheck(torch.ops.pycore.attention, (q, k, v, *rest))


def test_native(isa: str) -> None:
    """The same bits from NumPy arrays, forward and backward."""
    inputs = qkv(2, 4, 2, 60, 130, 16)
    for schedule in SCHEDULES:
        tensor = None if schedule.tensor is None else schedule.tensor.numpy()
        options = {"schedule": schedule.kind, "schedule_args": schedule.args, "schedule_tensor": tensor}
        arrays = [x.numpy() for x in inputs]
        out, lse = native.attention(*arrays, **options)
        wanted = with_gradients(schedule, *inputs)
        grad_out = wanted[0].cos().numpy()
        grads = native.attention_backward(grad_out, None, out, lse, *arrays, **options)[:3]
        for x, y in zip((out, *grads), wanted, strict=True):
            assert np.array_equal(x, y.numpy())


def test_flex_takes_boundaries_of_rows() -> None:
    mask = to_flex_block_mask(Segments(TWO), batch=2, heads=1, query_length=130, key_length=130)
    zero = torch.zeros(2, 1, 1, dtype=torch.int64)
    row, position = torch.arange(2)[:, None, None], torch.arange(130)
    wanted = torch.stack([reference.keep_mask(Segments(TWO), position[:, None], position[None], b) for b in range(2)])
    assert torch.equal(mask.mask_mod(row, zero, position[:, None], position[None]), wanted)


# ---- errors --------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Schedule, dict[str, Any], str]] = {
    "rows": (
        Segments(lengths(0, 9).expand(3, 2)), {},
        "boundaries has 3 rows and must have one, or one for each of 2 batch rows",
    ),
    "empty": (
        Segments(torch.zeros(2, 0, dtype=torch.int64)), {}, "boundaries is empty and must have at least one entry",
    ),
    "order": (
        Segments(rows((0, 5, 9), (0, 5, 4))), {},
        "boundaries[1, 2] is 4 and must not be less than the one before it, 5",
    ),
    "window": (Segments(lengths(0, 9), window_size=0), {}, "window_size is 0 and must be at least 1"),
    "sinks": (Segments(lengths(0, 9), True, 3, -1), {}, "sink_size is -1 and must be at least 0"),
    "right": (Segments(lengths(0, 9), False, right=-1), {}, "right is -1 and must be at least 0"),
    "right-causal": (Segments(lengths(0, 9), right=2), {}, "right is 2 and must be 0 where the schedule is causal"),
    "right-limit": (
        Segments(lengths(0, 9), False, right=8), {"distance_limit": 7},
        "distance_limit is 7 and must be at least right, 8",
    ),
    "lambda-right": (Lambda(1, 3, -1), {}, "right is -1 and must be at least 0"),
    "lambda-right-limit": (
        Lambda(1, 3, right=8), {"distance_limit": 7}, "distance_limit is 7 and must be at least right, 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_schedules(name: str) -> None:
    schedule, options, message = BAD[name]
    with pytest.raises(ValueError, match=f"^attention: {re.escape(message)}$"):
        attention(*qkv(2, 2, 1, 9, 9, 8), schedule=schedule, **options)


@pytest.mark.parametrize(
    "schedule, message",
    [(Segments(lengths(0, 9), window_size=2.0), "window_size is a float"),
     (Segments(lengths(0, 9), sink_size=None), "sink_size is a NoneType"),
     (Segments(lengths(0, 9), False, right="2"), "right is a str"), (Lambda(1, None), "window_size is a NoneType"),
     (Lambda(1, 2, right=1.0), "right is a float")],
    ids=["window", "sinks", "right", "lambda-window", "lambda-right"],
)  # fmt: skip
def test_numbers_are_ints(schedule: Schedule, message: str) -> None:
    with pytest.raises(TypeError, match=f"^attention: {message} and must be an int$"):
        attention(*qkv(2, 2, 1, 9, 9, 8), schedule=schedule)
    with pytest.raises(TypeError, match="^attention: symmetric_bias is a int and must be a bool$"):
        attention(*qkv(2, 2, 1, 9, 9, 8), symmetric_bias=1)


def test_a_window_to_the_right_moves_the_usual_limit(isa: str) -> None:
    """lambda_attention's distance_limit is the window's longer side where it is not given."""
    inputs = qkv(1, 2, 1, 90, 90, 16)
    options = {"sink_size": 3, "window_size": 10, "right": 30, "rope": tables(94, 16)}
    given = lambda_attention(*inputs, **options, distance_limit=30)
    assert torch.equal(lambda_attention(*inputs, **options), given)
    other = lambda_attention(*inputs, **options | {"rope": tables(200, 16)}, distance_limit=60)
    assert not torch.equal(other, given)
    with pytest.raises(ValueError, match="^lambda_attention: distance_limit is 29 and must be at least right, 30$"):
        lambda_attention(*inputs, **options, distance_limit=29)
    all_of_it = lambda_attention(*inputs, sink_size=0, window_size=90, right=None)
    assert torch.equal(all_of_it, attention(*inputs, schedule=Full()))


def test_boundaries_of_any_number(isa: str) -> None:
    """Beyond the keys, below 0, at the ends of int64, and none at all: positions are compared, and nothing else."""
    inputs = qkv(2, 2, 1, 70, 90, 16)
    least, most = -(2**63), 2**63 - 1
    for boundaries, same in (
        (rows((least, most), (least, most)), lengths(0, 90)),
        (rows((-5, 30, most), (least, 30, 2**62)), lengths(0, 30, 90)),
        (rows((least, least, 0, 90, most), (0, 0, 90, 2**61, 2**61 + 1)), lengths(0, 90)),
    ):
        for window in ({}, {"window_size": 7}, {"causal": False, "window_size": 7, "right": 5}):
            actual = with_gradients(Segments(boundaries, **window), *inputs)
            assert_same(actual, with_gradients(Segments(same, **window), *inputs))
    for boundaries in (rows((most, most), (least, least)), rows((0,), (90,)), rows((90, 99), (-9, 0))):
        for window in ({}, {"window_size": 7, "sink_size": 2**62}, {"causal": False, "right": 2**62}):
            out = attention(*inputs, schedule=Segments(boundaries, **window), return_lse=True)
            assert out[0].count_nonzero() == 0 and bool((out[1] == -torch.inf).all())


def test_expanded_boundaries_are_copied() -> None:
    query, key, value = torch.randn(3, 2, 2, 9, 8).unbind()
    one = attention(query, key, value, schedule=Segments(lengths(0, 4, 9)))
    each = attention(query, key, value, schedule=Segments(lengths(0, 4, 9).expand(2, 3)))
    assert torch.equal(one, each)
