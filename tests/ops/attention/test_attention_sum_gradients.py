# SPDX-License-Identifier: Apache-2.0
"""Gradients of alibi_slopes, and of scale and softcap where they are tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from pycore import native
from pycore.ops import attention, lambda_attention
from pycore.reference import attention as reference
from pycore.schedules import Causal, Full, KeySubset, Lambda, Prefix, Probabilistic, Segments, Tree
from tests.support.attention_inputs import Case, qkv, tables
from tests.support.tolerance import assert_as_accurate

F32, F64 = torch.float32, torch.float64
NAMES = ("scale", "softcap", "alibi_slopes")
PARENTS = torch.tensor([-1, 0, 0, 1])

SMALL = [
    Case(5, 7, Full(), 4, 3), Case(7, 5, Causal(), 4), Case(6, 9, Causal(), 4, scale=-0.7, sinks=True),
    Case(4, 6, Causal(), 4, scale=0.0), Case(6, 9, Lambda(2, 3), 4, 3, heads=4, kv_heads=2, batch=2),
    Case(70, 130, Lambda(66, 10), 4, 3, heads=4, kv_heads=2, batch=2), Case(5, 8, Causal(), 6, rope_dim=4),
    Case(6, 9, Lambda(2, 3), 6, 4, rope_dim=6, distance_limit=3, sinks=True, batch=2, key_lengths=(9, 3),
         query_lengths=(6, 2)),
    Case(4, 9, Causal(), 4, batch=3, key_starts=(0, 3, 9), key_offset=(0, 5, 2)),
    Case(6, 9, Prefix(torch.tensor([4, 0])), 4, batch=2), Case(9, 9, Segments(torch.tensor([0, 4, 9])), 4),
    Case(6, 9, KeySubset(torch.tensor([0, 3, 4, 8])), 4), Case(4, 9, Tree(PARENTS), 4),
    Case(60, 90, Probabilistic(torch.full((9,), 0.5), seed=3, block_size=16, correction="importance"), 4),
    Case(0, 5, Full(), 4), Case(5, 0, Full(), 4),
]  # fmt: skip
LONG = [
    Case(150, 203, Causal(), 32, heads=4, kv_heads=2), Case(203, 203, Lambda(10, 64), 40, rope_dim=8,
    distance_limit=64, sinks=True), Case(97, 400, Full(), 24, batch=2), Case(1, 700, Causal(), 64, heads=8),
]  # fmt: skip


def values(case: Case, dtype: torch.dtype, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """scale, softcap and slopes, [H] or for each batch row."""
    generator = torch.Generator().manual_seed(case.heads)
    scale = torch.tensor(0.4 if case.scale is None else case.scale, dtype=F64)
    shape = (case.heads,) if rows is None else (rows, case.heads)
    return scale.to(dtype), torch.tensor(1.7, dtype=dtype), (torch.rand(shape, generator=generator) / 8).to(dtype)


def options_of(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    options = case.options(dtype, dtype)
    options.pop("scale")
    return options


def loss(results: Any) -> Tensor:
    """The same weights in every dtype."""
    total: Any = 0
    generator = torch.Generator().manual_seed(1)
    for result in results:
        weight = torch.randn(result.shape, generator=generator, dtype=F64).to(result.dtype)
        total = total + (result.masked_fill(result == -torch.inf, 0) * weight).sum()
    return total


def gradients(function: Callable[..., Any], case: Case, dtype: torch.dtype, capped: bool = True) -> tuple[Tensor, ...]:
    inputs = [x.nan_to_num() for x in case.inputs(dtype)]
    scale, softcap, slopes = (x.requires_grad_() for x in values(case, dtype))
    results = function(
        *inputs, scale=scale, softcap=softcap if capped else 0.0, alibi_slopes=slopes, **options_of(case, dtype)
    )
    return torch.autograd.grad(loss(results), (scale, softcap, slopes) if capped else (scale, slopes))


def ours(*inputs: Tensor, **options: Any) -> Any:
    return attention(*inputs, **options, return_lse=True)


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "softcap"])
@pytest.mark.parametrize("case", SMALL + LONG, ids=str)
def test_float64_is_the_references(case: Case, capped: bool) -> None:
    actual, expected = (gradients(f, case, F64, capped) for f in (ours, reference.attention))
    for mine, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "softcap"])
@pytest.mark.parametrize("case", LONG + SMALL[:6], ids=str)
def test_float32_is_as_accurate_as_plain_torch(case: Case, capped: bool, isa: str) -> None:
    """A sum of many numbers that cancel is held to the sum of their sizes, for which its error is small or not."""
    query, key, value = (x.nan_to_num() for x in case.inputs(F64))
    scale, softcap, slopes = values(case, F64)
    options = options_of(case, F64) | {"softcap": softcap if capped else 0.0}
    distances = torch.arange(case.key_length + max(case.key_offset or [0]) + 1)
    table = (-slopes[:, None] * distances).requires_grad_()
    results = reference.attention(query.requires_grad_(), key, value, scale=scale, distance_bias=table, **options)
    by_query, by_distance = torch.autograd.grad(loss(results), (query, table))
    sizes = {"scale": (query * by_query).abs().sum(), "slopes": (by_distance * distances).abs().sum()}
    sizes["softcap"] = sizes["scale"]
    actual, exact, plain = (
        gradients(f, case, dtype, capped)
        for f, dtype in ((ours, F32), (reference.attention, F64), (reference.attention, F32))
    )
    names = ("scale", "softcap", "slopes") if capped else ("scale", "slopes")
    for name, mine, true, theirs in zip(names, actual, exact, plain, strict=True):
        size = sizes[name].clamp(min=1.0).reshape(1)
        assert_as_accurate(*(torch.cat([x.flatten(), size.to(x.dtype)]) for x in (mine, true, theirs)), name)


@pytest.mark.parametrize("case", SMALL[:11], ids=str)
def test_gradcheck(case: Case) -> None:
    options = options_of(case, F64)
    query, key, value = (x.nan_to_num() for x in case.inputs(F64))

    def f(*given: Tensor) -> Tensor:
        scale, softcap, slopes, query = given
        return attention(query, key, value, scale=scale, softcap=softcap, alibi_slopes=slopes, **options)

    inputs = tuple(x.requires_grad_() for x in (*values(case, F64), query))
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


def test_scale_with_a_bias_and_softcap_together(isa: str) -> None:
    """And a gradient of the bias beside them, which is what it is without."""
    inputs = qkv(1, 2, 1, 70, 90, 16)
    bias = torch.randn(2, 40, requires_grad=True)
    scale, cap = torch.tensor(0.3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    out = attention(*inputs, distance_bias=bias, scale=scale, softcap=cap)
    got = torch.autograd.grad(out.square().sum(), (bias, scale, cap))
    alone = attention(*inputs, distance_bias=bias, scale=0.3, softcap=2.0)
    assert torch.equal(out, alone)
    assert torch.equal(got[0], torch.autograd.grad(alone.square().sum(), bias)[0])
    wide = [x.detach().double().requires_grad_() for x in (bias, scale, cap)]
    true = reference.attention(*(x.double() for x in inputs), distance_bias=wide[0], scale=wide[1], softcap=wide[2])[0]
    for mine, exact in zip(got, torch.autograd.grad(true.square().sum(), wide), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=2e-5, atol=2e-5 * exact.abs().max().item())


def test_under_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the slope of a line, with one seed."""
    seed = torch.tensor([424242])
    monkeypatch.setattr(torch, "randint", lambda *args, **options: seed)
    inputs, case = qkv(2, 2, 1, 30, 40, 8, dtype=F64), Case(30, 40, Causal(), 8, batch=2)

    def f(scale: Tensor, softcap: Tensor, slopes: Tensor) -> Tensor:
        return loss((attention(*inputs, dropout_p=0.4, scale=scale, softcap=softcap, alibi_slopes=slopes),))

    given = [x.requires_grad_() for x in values(case, F64)]
    actual = torch.autograd.grad(f(*given), given)
    step = 1e-6
    for place, gradient in enumerate(actual):
        for index in range(gradient.numel()):
            ends = []
            for sign in (1, -1):
                moved = [x.detach().clone() for x in given]
                moved[place].view(-1)[index] += sign * step
                ends.append(f(*moved))
            torch.testing.assert_close(gradient.view(-1)[index], (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_slopes_of_each_batch_row(rows: int, symmetric: bool, isa: str) -> None:
    """Each row's gradient is what the row alone gives, and one row for all gets their sum."""
    inputs = qkv(3, 4, 2, 70, 90, 16)
    slopes = (torch.rand(rows, 4) / 8).requires_grad_()
    options: dict[str, Any] = {"schedule": Full(), "symmetric_bias": symmetric}

    def gradient(inputs: Any, slopes: Tensor) -> Tensor:
        return torch.autograd.grad(attention(*inputs, alibi_slopes=slopes, **options).square().sum(), slopes)[0]

    actual = gradient(inputs, slopes)
    assert actual.shape == slopes.shape
    alone = torch.stack(
        [gradient([x[b : b + 1] for x in inputs], slopes[b % rows].detach().requires_grad_()) for b in range(3)]
    )
    if rows == 3:
        assert torch.equal(actual, alone)
    else:
        torch.testing.assert_close(actual[0], alone.sum(0), rtol=1e-6, atol=1e-6)


def test_the_same_bits_with_any_number_of_threads(isa: str) -> None:
    case = Case(203, 300, Lambda(10, 100), 32, batch=2, heads=4, kv_heads=2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(gradients(ours, case, F32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_queries(dtype: torch.dtype, isa: str) -> None:
    """Scale and softcap of any floating dtype get gradients of that dtype."""
    inputs = [x.to(dtype) for x in qkv(1, 2, 1, 60, 80, 16)]
    scale, cap = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (0.5, 2.0))
    out = attention(*inputs, scale=scale, softcap=cap)
    got = torch.autograd.grad(out.float().sum(), (scale, cap))
    wide = [x.detach().double().requires_grad_() for x in (scale, cap)]
    true = reference.attention(*(x.double() for x in inputs), scale=wide[0], softcap=wide[1])[0]
    expected = torch.autograd.grad(true.sum(), wide)
    for mine, exact in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), exact, rtol=0.05, atol=0.3)


def test_a_tensor_is_read_as_the_number_it_holds() -> None:
    inputs = qkv(1, 2, 1, 20, 30, 8)
    plain = attention(*inputs, scale=0.3125, softcap=3.0, dropout_p=0.0)
    for dtype in (F32, F64, torch.bfloat16):
        scale, cap = torch.tensor(0.3125, dtype=dtype), torch.tensor(3.0, dtype=dtype)
        assert torch.equal(attention(*inputs, scale=scale, softcap=cap), plain)
    assert torch.equal(attention(*inputs, scale=torch.tensor(2)), attention(*inputs, scale=2))
    for name, bad, message in (
        ("scale", torch.tensor(torch.nan), "scale is nan"),
        ("softcap", torch.tensor(-1.0), "softcap is -1"),
    ):
        with pytest.raises(ValueError, match=f"^attention: {message}"):
            attention(*inputs, **{name: bad})
    for bad in (torch.ones(1), torch.tensor(True)):
        with pytest.raises(TypeError, match="^attention: scale is a Tensor and must be a number$"):
            attention(*inputs, scale=bad)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_fullgraph(dynamic: bool) -> None:
    """With values that change, and gradients."""
    torch._dynamo.reset()

    def f(query: Tensor, key: Tensor, value: Tensor, scale: Tensor, softcap: Tensor, slopes: Tensor) -> Tensor:
        return attention(query, key, value, scale=scale, softcap=softcap, alibi_slopes=slopes)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length, start in ((20, 0.3), (31, 0.4), (32, 0.5)):
        inputs = qkv(1, 2, 1, length, length, 8)
        given = [torch.tensor(start), torch.tensor(2 + start), torch.rand(2)]
        results = []
        for function in (f, compiled):
            leaves = [x.clone().requires_grad_() for x in given]
            out = function(*inputs, *leaves)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_opcheck() -> None:
    query, key, value = (x.requires_grad_() for x in qkv(1, 2, 1, 5, 6, 4))
    numbers = torch.tensor([0.4, 1.5, 0.0], dtype=F64, requires_grad=True)
    slopes = torch.rand(2, requires_grad=True)
    args = (
        query,
        key,
        value,
        None,
        None,
        None,
        slopes,
        *[None] * 8,
        "attention",
        "causal",
        [],
        False,
        -1,
        1.0,
        0.0,
        0.0,
    )
    torch.library.opcheck(torch.ops.pycore.attention.default, (*args, 0, False, numbers, True))


def test_torch_func_and_vmap() -> None:
    inputs = qkv(3, 2, 1, 12, 15, 8, dtype=F64)
    scale, cap, slopes = values(Case(12, 15, Causal(), 8), F64)

    def of(function: Callable[..., Any]) -> Callable[..., Tensor]:
        def f(scale: Tensor, cap: Tensor, slopes: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return function(query, key, value, scale=scale, softcap=cap, alibi_slopes=slopes).square().sum()

        return f

    mine, theirs = of(attention), of(lambda *x, **options: reference.attention(*x, schedule=Causal(), **options)[0])
    places = (0, 1, 2)
    for transform in (grad, jacrev):
        actual, expected = (transform(f, places)(scale, cap, slopes, *inputs) for f in (mine, theirs))
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    samples = [x[:, None] for x in inputs]
    mapped = vmap(grad(mine, places), (None, None, None, 0, 0, 0))(scale, cap, slopes, *samples)
    for b in range(3):
        single = grad(theirs, places)(scale, cap, slopes, *(x[b] for x in samples))
        for x, y in zip(mapped, single, strict=True):
            torch.testing.assert_close(x[b], y, rtol=1e-10, atol=1e-10)


def test_middle_tokens_give_slopes_their_whole_gradient() -> None:
    for rows in (None, 2):
        case = Case(1, 30, Lambda(2, 5), 6, batch=2)
        query, key, value = qkv(2, 2, 1, 1, 30, 6, dtype=F64)
        scale, cap, slopes = (x.requires_grad_() for x in values(case, F64, rows))
        out = lambda_attention(
            query, key, value, sink_size=2, window_size=5, middle_topk=4, alibi_slopes=slopes, scale=scale, softcap=cap
        )
        actual = torch.autograd.grad(out.square().sum(), (slopes, scale, cap))
        expected: Any = [torch.zeros_like(x) for x in (slopes, scale, cap)]
        for b in range(2):
            own = slopes if rows is None else slopes[b]
            one = reference.attention(
                query[b : b + 1], key[b : b + 1], value[b : b + 1], schedule=Lambda(2, 5), distance_limit=5,
                middle_topk=4, alibi_slopes=own, scale=scale, softcap=cap,
            )[0]  # fmt: skip
            more = torch.autograd.grad(one.square().sum(), (slopes, scale, cap))
            expected = [x + y for x, y in zip(expected, more, strict=True)]
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_native_face() -> None:
    query, key, value = qkv(2, 2, 1, 20, 30, 8)
    slopes = torch.rand(2, 2) / 8
    scale, cap = torch.tensor(0.3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    leaf = slopes.clone().requires_grad_()
    out, lse = attention(query, key, value, alibi_slopes=leaf, scale=scale, softcap=cap, return_lse=True)
    weight = torch.randn_like(out)
    expected = torch.autograd.grad(out, (leaf, scale, cap), weight)
    arrays = [x.detach().numpy() for x in (query, key, value)]
    options: dict[str, Any] = {"alibi_slopes": slopes.numpy(), "scale": 0.30000001192092896, "softcap": 2.0}
    low = np.empty((2, 2, 20), np.float32)
    native_out, native_lse = native.attention(*arrays, **options, lse_low=low)
    given, numbers = np.empty((2, 2), np.float32), np.empty(2)
    call = (weight.numpy(), None, native_out, native_lse, *arrays)
    native.attention_backward(*call, **options, lse_low=low, grad_numbers=numbers, grad_alibi_slopes=given)
    assert np.array_equal(given, expected[0].numpy())
    assert np.array_equal(numbers.astype(np.float32), [expected[1].item(), expected[2].item()])
    with pytest.raises(ValueError, match="^attention_backward: grad_alibi_slopes is given and must be None"):
        native.attention_backward(*call, grad_alibi_slopes=given)
    with pytest.raises(ValueError, match="^attention_backward: grad_numbers"):
        native.attention_backward(*call, grad_numbers=np.empty(3))
    with pytest.raises(ValueError, match="^attention_backward: grad_numbers"):
        native.attention_backward(*call, grad_numbers=np.empty(2, np.float32))


def test_tables_that_want_no_gradient_get_none() -> None:
    query, key, value = (x.requires_grad_() for x in qkv(1, 2, 1, 20, 30, 8))
    scale, slopes = torch.tensor(0.3), torch.rand(2)
    attention(query, key, value, scale=scale, alibi_slopes=slopes).sum().backward()
    assert scale.grad is None and slopes.grad is None and query.grad is not None


def test_rope_and_rows_without_keys() -> None:
    """Rows that keep no key add nothing, whatever the gradients of their out and lse are."""
    query, key, value = qkv(1, 2, 1, 20, 8, 8)
    scale = torch.tensor(0.3, requires_grad=True)
    slopes = torch.rand(2, requires_grad=True)
    options: dict[str, Any] = {"rope": tables(84, 4), "scale": scale, "alibi_slopes": slopes, "return_lse": True}
    out, lse = attention(query, key, value, **options)
    poisoned = [torch.ones_like(out), torch.ones_like(lse)]
    for x in poisoned:
        x[:, :, :12] = torch.nan
    actual = torch.autograd.grad((out, lse), (scale, slopes), poisoned)
    short = attention(query[:, :, 12:], key, value, **options)
    expected = torch.autograd.grad(short, (scale, slopes), [torch.ones_like(x) for x in short])
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
