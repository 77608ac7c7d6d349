# SPDX-License-Identifier: Apache-2.0
"""invariant_linears: the bits of invariant_linear layer by layer, in one call, under every transform, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore import native, ops
from pycore.reference import linear as reference
from tests.support.tolerance import assert_as_accurate

kernel = torch.ops.pycore.invariant_linears
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
parametrize_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

# (rows, K, N of each): one layer, query beside few heads, gate and up, none, odd ones, a cut inside a thread's share.
SHAPES: list[tuple[int, int, tuple[int, ...]]] = [
    (1, 64, (7,)), (1, 576, (576, 192, 192)), (2, 300, (129, 129)), (6, 33, (1, 0, 18)), (7, 257, (65, 31, 16)),
    (97, 40, (130, 3)), (0, 9, (4, 4)), (3, 0, (5, 2)), (1, 2050, (40, 50, 60, 70)),
]  # fmt: skip


def made(
    shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    rows, k, columns = shape
    x = torch.randn(rows, k).to(dtype)
    return x, [torch.randn(n, k).to(dtype) for n in columns], [torch.randn(n).to(dtype) for n in columns]


def one_by_one(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None = None) -> Tensor:
    pairs = zip(weights, biases or [None] * len(weights), strict=True)
    return torch.cat([ops.invariant_linear(x, weight, bias) for weight, bias in pairs], -1)


@parametrize_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(isa: str, shape: tuple[int, int, tuple[int, ...]], dtype: torch.dtype) -> None:
    x, weights, biases = made(shape, dtype)
    for given in (None, biases):
        out = ops.invariant_linears(x, weights, given)
        assert torch.equal(out, one_by_one(x, weights, given)) and out.is_contiguous() and out.dtype == dtype
        wide = reference.invariant_linears(
            x.double(), [w.double() for w in weights], given and [b.double() for b in given]
        )
        if dtype != torch.float64:  # which is the truth
            assert_as_accurate(out, wide, reference.invariant_linears(x, weights, given))


@parametrize_dtype
def test_how_x_and_weights_lie(isa: str, dtype: torch.dtype) -> None:
    x, weights, biases = made((12, 70, (40, 24)), dtype)
    expected = ops.invariant_linears(x, weights, biases)
    apart = torch.empty(2, 64, 70, dtype=dtype)  # rows with gaps, of one stretch of memory
    apart[0, :40], apart[1, :48:2] = weights[0], weights[1]
    assert torch.equal(ops.invariant_linears(x, [apart[0, :40], apart[1, :48:2]], biases), expected)
    turned = x.view(3, 4, 70).transpose(0, 1)
    assert torch.equal(ops.invariant_linears(turned, weights, biases), expected.view(3, 4, 64).transpose(0, 1))
    by_column = [w.t().contiguous().t() for w in weights]
    assert torch.equal(ops.invariant_linears(x, by_column, tuple(biases)), expected)
    assert torch.equal(
        ops.invariant_linears(x, [weights[0], weights[0]]), ops.invariant_linear(x, weights[0]).repeat(1, 2)
    )


@pytest.mark.parametrize("rows", [1, 40])
def test_threads_do_not_matter(isa: str, rows: int) -> None:
    x, weights, _ = made((rows, 600, (333, 96, 200)))
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            outs.append(ops.invariant_linears(x, weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_gradients_are_those_of_each_layer() -> None:
    x, weights, biases = made((5, 30, (8, 4)))
    leaves = [t.requires_grad_() for t in (x, *weights, *biases)]
    grad = torch.randn(5, 12)
    actual = torch.autograd.grad(ops.invariant_linears(x, weights, biases), leaves, grad)
    for a, e in zip(actual, torch.autograd.grad(one_by_one(x, weights, biases), leaves, grad), strict=True):
        assert torch.equal(a, e)
    tangents = tuple(torch.randn_like(t) for t in leaves)
    apply: Callable[..., Tensor] = lambda x, v, w, b, c: ops.invariant_linears(x, [v, w], [b, c])  # noqa: E731
    out, tangent = torch.func.jvp(apply, tuple(t.detach() for t in leaves), tangents)
    by_one: Callable[..., Tensor] = lambda x, v, w, b, c: one_by_one(x, [v, w], [b, c])  # noqa: E731
    expected, expected_tangent = torch.func.jvp(by_one, tuple(t.detach() for t in leaves), tangents)
    assert torch.equal(out, expected) and torch.equal(tangent, expected_tangent)
    double = [t.detach().double().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(apply, double)
    with torch.no_grad():
        assert not ops.invariant_linears(x, weights, biases).requires_grad
    with torch.inference_mode():
        assert torch.equal(ops.invariant_linears(x, weights, biases), one_by_one(x, weights, biases))


def _float(given: Any) -> Any:
    return [y.float() for y in given] if isinstance(given, list) else given.float()


def test_transforms() -> None:
    x, weights, biases = made((5, 30, (8, 4)))
    torch.library.opcheck(kernel, (x, weights, []))
    torch.library.opcheck(kernel, (x, [w.requires_grad_() for w in weights], biases))
    weights = [w.detach() for w in weights]
    batch = torch.randn(3, 5, 30)
    assert torch.equal(
        torch.vmap(lambda x: ops.invariant_linears(x, weights, biases))(batch), one_by_one(batch, weights, biases)
    )
    more = torch.randn(3, 8, 30)
    each = torch.stack([one_by_one(a, [w, weights[1]]) for a, w in zip(batch, more, strict=True)])
    assert torch.equal(torch.vmap(lambda x, w: ops.invariant_linears(x, [w, weights[1]]))(batch, more), each)
    gradient = torch.func.grad(lambda x: ops.invariant_linears(x, weights).sum())
    assert torch.equal(torch.vmap(gradient)(batch), torch.stack([gradient(a) for a in batch]))
    halves = x.bfloat16(), [w.bfloat16() for w in weights], [b.bfloat16() for b in biases]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.invariant_linears(*halves)
    assert out.dtype == torch.float32 and torch.equal(out, one_by_one(*(_float(y) for y in halves)))
    several = torch.randn(3, 4)
    each = torch.stack([one_by_one(x, weights, [biases[0], b]) for b in several])
    assert torch.equal(torch.vmap(lambda b: ops.invariant_linears(x, weights, [biases[0], b]))(several), each)
    with pytest.raises(ValueError, match="^invariant_linears: x has 29 features"):
        torch.vmap(lambda x: ops.invariant_linears(x, weights))(batch[..., :29])
    meta = ops.invariant_linears(x.to("meta"), [w.to("meta") for w in weights])
    assert meta.is_meta and meta.shape == (5, 12)


def test_native() -> None:
    x, weights, biases = made((5, 30, (8, 4)))
    expected = one_by_one(x, weights, biases)
    arrays = [t.numpy() for t in weights], [t.numpy() for t in biases]
    for threads in (1, 2):
        assert torch.equal(torch.from_numpy(native.invariant_linears(x.numpy(), *arrays, threads=threads)), expected)
    out = torch.empty(5, 12)
    assert native.invariant_linears(x, tuple(weights), biases, out=out) is out and torch.equal(out, expected)
    for call, error, sentence in (
        (lambda: native.invariant_linears(x, []), ValueError, "weights is empty and must have at least one weight"),
        (
            lambda: native.invariant_linears(x, weights, biases[:1]),
            ValueError,
            "biases has 1 tensors and must have one",
        ),
        (lambda: native.invariant_linears(x, weights, out=out[:, :8]), ValueError, r"out has shape \[5, 8\]"),
        (lambda: native.invariant_linears(x, [3]), TypeError, "invariant_linears: weight"),
        (lambda: native.invariant_linears(x, weights, 3), TypeError, "invariant_linears: biases must be a sequence"),
        (lambda: native.invariant_linears(x, weights, []), ValueError, "biases has 0 tensors and must have one"),
    ):
        before = out.clone()
        with pytest.raises(error, match=sentence):
            call()
        assert torch.equal(out, before)


X, V, W = torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda f: f(1.0, [V]), TypeError, "x is a float and must be a Tensor"),
        (lambda f: f(X, V), TypeError, "weights is a Tensor and must be a list of tensors"),
        (lambda f: f(X, [V, 3]), TypeError, "weights is a int and must be a Tensor"),
        (lambda f: f(X, [V], V[:, 0]), TypeError, "biases is a Tensor and must be a list of tensors"),
        (lambda f: f(X, [V], [None]), TypeError, "biases is a NoneType and must be a Tensor"),
        (lambda f: f(X, []), ValueError, "weights is empty and must have at least one weight"),
        (lambda f: f(X, [V, W], [V[:, 0]]), ValueError, "biases has 1 tensors and must have one for each of the 2 we"),
        (lambda f: f(X, [V], []), ValueError, "biases has 0 tensors and must have one for each of the 1 weights"),
        (lambda f: f(X, [V, W[:, :5]]), ValueError, "x has 6 features in its last dimension and must have weight's 5"),
        (lambda f: f(X, [V, W.double()]), ValueError, "weight has dtype float64 and must have x's float32"),
        (lambda f: f(X, [V, W[0]]), ValueError, r"weight has shape \[6\] and must be \[out_features, in_fe"),
        (lambda f: f(X, [V], [V[:4, 0]]), ValueError, r"bias has shape \[4\] and must have \[5\]"),
        (lambda f: f(X, [V, W.to("meta")]), ValueError, "weight is on meta and must be on cpu, where x is"),
        (lambda f: f(X, [V], [V[:, 0].to("meta")]), ValueError, "bias is on meta and must be on cpu, where x is"),
        (lambda f: f(X.long(), [V]), ValueError, "x has dtype int64 and must have float32"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[Callable[..., Tensor]], Tensor], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match="^invariant_linears: " + sentence):
        call(ops.invariant_linears)
    if error is ValueError and "dtype int64" not in sentence:  # recorded, which goes by way of each layer
        with pytest.raises(error, match="^invariant_linears: " + sentence):
            call(lambda x, *rest: ops.invariant_linears(x.clone().requires_grad_(), *rest))
