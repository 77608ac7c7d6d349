# SPDX-License-Identifier: Apache-2.0
"""Gradients of `attention`: gradcheck in float64, float32 against the reference, and what must not reach them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore.ops import attention, lambda_attention
from pycore.reference import attention as reference
from pycore.schedules import Causal, Full, Lambda, Schedule
from tests.support.attention_inputs import Case, lengths, qkv, tables
from tests.support.tolerance import assert_as_accurate

F32, F64 = torch.float32, torch.float64
NAMES = ("grad_query", "grad_key", "grad_value")

# ---- gradcheck -----------------------------------------------------------------------------------------------------

SMALL = [
    Case(5, 7, Full(), 4, 3), Case(5, 7, Causal(), 4, 3), Case(7, 5, Causal(), 4), Case(6, 9, Lambda(2, 3), 4, 3),
    Case(6, 6, Lambda(9, 2), 4, heads=4, kv_heads=2), Case(3, 6, Causal(), 5, heads=3, kv_heads=1, batch=2),
    Case(5, 8, Causal(), 6, rope_dim=6), Case(5, 8, Causal(), 6, rope_dim=4, interleaved=True),
    Case(8, 5, Full(), 6, rope_dim=4), Case(6, 9, Causal(), 6, rope_dim=6, distance_limit=3),
    Case(6, 9, Lambda(2, 3), 6, rope_dim=6, distance_limit=3), Case(6, 9, Lambda(3, 2), 6, rope_dim=4, distance_limit=4,
    interleaved=True), Case(4, 6, Causal(), 4, rope_dim=4, distance_limit=0), Case(4, 6, Causal(), 4, scale=-0.7),
    Case(4, 6, Causal(), 4, scale=0.0),
]  # fmt: skip
CROSSING = [  # of key tiles, so gradcheck takes random directions only
    Case(70, 130, Causal(), 3, heads=1), Case(70, 130, Lambda(66, 10), 4, rope_dim=4, distance_limit=10, heads=1),
    Case(5, 1100, Lambda(1, 1060), 2, rope_dim=2, distance_limit=1060, heads=2),
]  # fmt: skip


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of tiny calls."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("through", ["out", "lse", "both"])
@pytest.mark.parametrize("case", SMALL + CROSSING, ids=str)
@pytest.mark.usefixtures("one_thread")
def test_gradcheck(case: Case, through: str) -> None:
    options = case.options(F64, F64)
    inputs = [x.requires_grad_() for x in case.inputs(F64)]

    def f(*inputs: Tensor) -> tuple[Tensor, ...]:
        out, lse = attention(*inputs, **options, return_lse=True)
        lse = lse.masked_fill(lse == -torch.inf, 0)  # rows without a key
        return {"out": (out,), "lse": (lse,), "both": (out, lse)}[through]

    # Every entry of small Jacobians in one of the three, else random directions.
    assert torch.autograd.gradcheck(f, inputs, fast_mode=case in CROSSING or through != "both")


@pytest.mark.parametrize(
    "rows",
    [
        {"key_starts": lengths(0, 3, 6)},
        {"key_lengths": lengths(6, 2, 0)},
        {"query_lengths": lengths(5, 0, 2)},
        {"key_offset": lengths(0, 4, 9)},
        {"key_starts": lengths(0, 1, 2), "key_lengths": lengths(4, 6, 5), "key_offset": lengths(0, 3, 1)},
    ],
    ids=lambda rows: "+".join(rows),
)
@pytest.mark.parametrize("schedule", [Full(), Causal(), Lambda(2, 3)], ids=str)
@pytest.mark.usefixtures("one_thread")
def test_gradcheck_lengths(schedule: Schedule, rows: dict[str, Tensor]) -> None:
    inputs = [x.requires_grad_() for x in qkv(3, 2, 1, 5, 6, 4, dtype=F64)]
    rope = tables(20, 4, F64)
    limit = 3 if isinstance(schedule, Lambda) else None
    assert torch.autograd.gradcheck(
        lambda *x: attention(*x, schedule=schedule, rope=rope, distance_limit=limit, **rows), inputs
    )


@pytest.mark.usefixtures("one_thread")
def test_gradcheck_lambda_attention() -> None:
    inputs = [x.requires_grad_() for x in qkv(1, 4, 2, 5, 8, 4, dtype=F64)]
    rope = tables(20, 4, F64)
    assert torch.autograd.gradcheck(lambda *x: lambda_attention(*x, sink_size=2, window_size=3, rope=rope), inputs)


# ---- float32 -------------------------------------------------------------------------------------------------------

CASES = [
    Case(n, m, schedule, 32)
    for n, m in [(1, 1), (17, 17), (113, 203), (128, 217), (1, 339)]
    for schedule in (Full(), Causal(), Lambda(5, 40))
] + [
    Case(70, 97, Causal(), d, value_dim=dv)
    for d, dv in [(1, None), (40, 64), (80, 24), (96, None), (111, 113), (256, 128)]
] + [
    Case(97, 97, Lambda(sinks, window), heads=1)
    for sinks, window in [(4, 1000), (0, 1), (200, 8), (63, 65), (64, 64), (65, 63)]
] + [
    Case(30, 97, Causal(), batch=2, heads=6, kv_heads=2), Case(1, 97, Lambda(3, 40), heads=8, kv_heads=1),
    Case(97, 97, Lambda(3, 40), scale=4.0), Case(97, 97, Lambda(3, 40), scale=-0.25),
] + [
    Case(n, m, schedule, d, rope_dim=r, interleaved=interleaved, distance_limit=limit)
    for n, m, schedule, d, r, interleaved, limit in [
        (97, 97, Causal(), 32, 32, False, None), (97, 97, Causal(), 32, 8, True, None),
        (97, 97, Causal(), 111, 32, False, 20), (17, 97, Full(), 32, 8, False, None),
        (203, 203, Causal(), 32, 8, False, 64),
        (203, 203, Lambda(10, 64), 32, 32, False, 64), (203, 203, Lambda(100, 63), 32, 8, True, 70),
        (203, 203, Lambda(70, 1), 40, 8, False, 1), (1, 203, Lambda(130, 40), 32, 8, False, 40),
    ]
] + [Case(1025, 1025, Lambda(3, 130), heads=1), Case(3, 1100, Causal(), 32, rope_dim=4)]  # fmt: skip


def loss_weights(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of out and lse: the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(1)
    dim = case.head_dim if case.value_dim is None else case.value_dim
    grad_out = torch.randn(case.batch, case.heads, case.query_length, dim, generator=generator)
    grad_lse = torch.randn(case.batch, case.heads, case.query_length, generator=generator)
    return grad_out.to(dtype), grad_lse.to(dtype)


@functools.cache
def expected(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The reference's gradients, computed in `dtype`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations
    inputs = [x.requires_grad_() for x in case.inputs(dtype)]
    results = reference.attention(*inputs, **case.options(dtype))
    gradients = torch.autograd.grad(results, inputs, loss_weights(case, dtype))
    torch.set_num_threads(threads)
    return gradients


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_as_accurate_as_plain_torch(case: Case, isa: str) -> None:
    inputs = [x.requires_grad_() for x in case.inputs(F32)]
    results = attention(*inputs, **case.options(F32), return_lse=True)
    gradients = torch.autograd.grad(results, inputs, loss_weights(case, F32))
    for name, actual, exact, plain in zip(NAMES, gradients, expected(case, F64), expected(case, F32), strict=True):
        assert_as_accurate(actual, exact, plain, name)


def moved(x: Tensor) -> Tensor:
    """The same numbers in a [batch, length, heads, channels] layout."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize(
    "layout",
    [moved, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), lambda x: torch.stack([x, x], dim=-1)[..., 0]],
    ids=["batch-length-heads-dim", "last-dim-not-contiguous", "every-other-channel"],
)
def test_strided_gradients(layout: Any, isa: str) -> None:
    """Of strided inputs, for a strided gradient of out."""
    inputs = qkv(2, 4, 2, 70, 97, 40, 24)
    grad_out = torch.randn(2, 4, 70, 24)

    def gradients(inputs: list[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(attention(*inputs, schedule=Lambda(3, 20)), inputs, grad_out)

    dense = gradients(list(inputs), grad_out)
    for x, y in zip(gradients([layout(x) for x in inputs], layout(grad_out)), dense, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (3,), (2,), (0, 1), (1, 3)], ids=str)
def test_expanded_gradient_of_out(dims: tuple[int, ...], isa: str) -> None:
    """As `.sum()` gives it: every stride 0."""
    inputs = [x.requires_grad_() for x in qkv(2, 4, 2, 70, 97, 40, 24)]
    out, lse = attention(*inputs, return_lse=True)
    shape = [1 if d in dims else n for d, n in enumerate(out.shape)]
    grad_out = torch.randn(shape).expand(out.shape)
    grad_lse = torch.ones(()).expand(lse.shape)
    expanded = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse), retain_graph=True)
    dense = torch.autograd.grad((out, lse), inputs, (grad_out.contiguous(), grad_lse.contiguous()))
    assert all(torch.equal(x, y) for x, y in zip(expanded, dense, strict=True))


def test_expanded_inputs_collect_their_gradients(isa: str) -> None:
    """A key expanded over the batch gets the sum over the batch."""
    q, k, v = qkv(3, 2, 1, 30, 40, 16)
    one_k, one_v = k[:1].clone().requires_grad_(), v[:1].clone().requires_grad_()
    attention(q, one_k.expand(3, -1, -1, -1), one_v.expand(3, -1, -1, -1)).square().sum().backward()
    many_k, many_v = (x[:1].repeat(3, 1, 1, 1).requires_grad_() for x in (k, v))
    attention(q, many_k, many_v).square().sum().backward()
    assert torch.equal(one_k.grad, many_k.grad.sum(0, keepdim=True))
    assert torch.equal(one_v.grad, many_v.grad.sum(0, keepdim=True))


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone(wanted: str, isa: str) -> None:
    inputs = qkv(1, 2, 1, 30, 40, 16)
    together = [x.clone().requires_grad_() for x in inputs]
    attention(*together).sum().backward()
    i = NAMES.index(wanted)
    alone = [x.clone().requires_grad_(n == i) for n, x in enumerate(inputs)]
    attention(*alone).sum().backward()
    assert torch.equal(alone[i].grad, together[i].grad)
    assert all(x.grad is None for n, x in enumerate(alone) if n != i)


# ---- what must not reach a gradient, and what must -----------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 30], ids=["no-rope", "rope-limit"])
@pytest.mark.parametrize("schedule", [Causal(), Lambda(0, 30), Lambda(5, 30)], ids=str)
@pytest.mark.parametrize("what", ["key", "value", "query", "grad_out"])
@pytest.mark.parametrize("row", [0, 40, 64, 149])
def test_nan_reaches_only_what_is_connected(
    row: int, what: str, schedule: Schedule, limit: int | None, isa: str
) -> None:
    """Gradients of queries and keys with no kept pair to a NaN keep their bits."""
    q, k, v = qkv(1, 2, 1, 150, 150, 24)
    rope = None if limit is None else tables(94, 24)
    grad_out = torch.randn(1, 2, 150, 24)

    def gradients(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        inputs = [tensors[name].clone().requires_grad_() for name in ("query", "key", "value")]
        out = attention(*inputs, schedule=schedule, rope=rope, distance_limit=limit)
        return torch.autograd.grad(out, inputs, tensors["grad_out"])

    tensors = {"query": q, "key": k, "value": v, "grad_out": grad_out}
    clean = gradients(tensors)
    poisoned = tensors[what].clone()
    poisoned[:, :, row] = torch.nan
    actual = gradients(tensors | {what: poisoned})
    keep = reference.keep_mask(schedule, torch.arange(150)[:, None], torch.arange(150)[None])  # [query, key]
    queries = keep[:, row] if what in ("key", "value") else torch.arange(150) == row  # that see the NaN
    keys = keep[queries].any(dim=0)  # that those queries see
    for x, y, touched in zip(actual, clean, (queries, keys, keys), strict=True):
        assert torch.equal(x[:, :, ~touched], y[:, :, ~touched])
        assert x[:, :, ~touched].isfinite().all()
    assert actual[0][:, :, queries].isnan().any(dim=3).all()


def test_rows_without_a_key_have_no_gradient(isa: str) -> None:
    """And give none, whatever the gradients of their out and lse are."""
    q, k, v = qkv(1, 4, 2, 200, 90, 32)
    rope = tables(90, 32)
    for schedule in (Causal(), Lambda(4, 10)):
        limit = 10 if isinstance(schedule, Lambda) else None
        options = {"schedule": schedule, "rope": rope, "distance_limit": limit, "return_lse": True}
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attention(*inputs, **options)
        for fill in (1.0, torch.nan):
            grad_out, grad_lse = torch.ones_like(out), torch.ones_like(lse)
            grad_out[:, :, :110] = fill
            grad_lse[:, :, :110] = fill
            gradients = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse), retain_graph=True)
            assert gradients[0][:, :, :110].count_nonzero() == 0
            short = [q[:, :, 110:].clone().requires_grad_(), *inputs[1:]]
            alone = torch.autograd.grad(
                attention(*short, **options),
                short,
                (grad_out[:, :, 110:].contiguous(), grad_lse[:, :, 110:].contiguous()),
            )
            assert torch.equal(gradients[0][:, :, 110:], alone[0])
            assert torch.equal(gradients[1], alone[1]) and torch.equal(gradients[2], alone[2])


def test_keys_that_no_row_keeps_have_no_gradient(isa: str) -> None:
    inputs = [x.requires_grad_() for x in qkv(1, 2, 1, 3, 200, 16)]
    attention(*inputs, schedule=Lambda(2, 10)).sum().backward()
    for x in inputs[1:]:
        assert x.grad[:, :, 2:188].count_nonzero() == 0
        assert x.grad[:, :, :2].count_nonzero() == 2 * 16 and x.grad[:, :, 188:].count_nonzero() == 12 * 16


def test_large_scores_have_finite_gradients(isa: str) -> None:
    q, k, v = qkv(1, 1, 1, 150, 150, 16)
    inputs = [x.requires_grad_() for x in (30 * q, 30 * k, v)]
    gradients = torch.autograd.grad(attention(*inputs).sum(), inputs)
    assert all(x.isfinite().all() for x in gradients)


def test_second_derivatives_are_refused() -> None:
    x, k, v = (t.requires_grad_() for t in qkv(1, 1, 1, 5, 5, 8))
    (gradient,) = torch.autograd.grad(attention(x, k, v).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^attention: second derivatives are not available$"):
        torch.autograd.grad((gradient * x).sum(), x)
