# SPDX-License-Identifier: Apache-2.0
"""silu_mul and gelu_mul: values also in the tails, gradients, the same bits, torch's transforms, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pycore
from pycore import ops
from pycore.reference import linear as reference
from tests.support.tolerance import assert_as_accurate

kernels = torch.ops.pycore
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan

# name: (the op, the reference, plain torch, the backward kernel)
Function = Callable[..., Tensor]
OPS: dict[str, tuple[Function, Function, Function, Function]] = {
    "silu": (
        ops.silu_mul, reference.silu_mul, lambda g, u: F.silu(g) * u,
        lambda grad, g, u, *need: kernels.silu_mul_backward(grad, g, u, *need),
    ),
    "gelu": (
        ops.gelu_mul, reference.gelu_mul, lambda g, u: F.gelu(g) * u,
        lambda grad, g, u, *need: kernels.gelu_mul_backward(grad, g, u, "none", *need),
    ),
    "gelu_tanh": (
        lambda g, u: ops.gelu_mul(g, u, "tanh"), lambda g, u: reference.gelu_mul(g, u, "tanh"),
        lambda g, u: F.gelu(g, approximate="tanh") * u,
        lambda grad, g, u, *need: kernels.gelu_mul_backward(grad, g, u, "tanh", *need),
    ),
}  # fmt: skip

parametrize_op = pytest.mark.parametrize("name", OPS)
parametrize_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@parametrize_op
@parametrize_dtype
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 17), (2, 3, 33), (5, 64), (1, 70001), (333, 97)], ids=str)
def test_values(isa: str, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    op, exact_op, plain_op, backward = OPS[name]
    gate, up, grad = ((torch.randn(shape) * scale).to(dtype) for scale in (3, 1, 1))
    exact_inputs = [x.double().requires_grad_() for x in (gate, up)]
    plain_inputs = [x.clone().requires_grad_() for x in (gate, up)]
    exact, plain = exact_op(*exact_inputs), plain_op(*plain_inputs)
    out = op(gate, up)
    assert out.dtype == dtype and out.is_contiguous()
    assert_as_accurate(out, exact.detach(), plain.detach())
    wanted = torch.autograd.grad(exact, exact_inputs, grad.double())
    plain_grads = torch.autograd.grad(plain, plain_inputs, grad)
    for each in zip(backward(grad, gate, up, True, True), wanted, plain_grads, strict=True):
        assert_as_accurate(*each)


@parametrize_op
def test_the_tails_are_accurate_too(isa: str, name: str) -> None:
    """Relative to the result, also where it is tiny: 1 + erf(x), as it is often written, has lost all of it by -6."""
    gate = torch.cat([torch.linspace(-12.5, 12.5, 20001), torch.randn(1001) / 4096])
    if name == "silu":
        gate *= 6
    expected = OPS[name][1](gate.double(), torch.ones_like(gate).double())
    error = (OPS[name][0](gate, torch.ones_like(gate)).double() - expected).abs() / expected.abs()
    # The tanh form rounds its cubic, whose error grows with the exponent.
    bound = {"silu": 4, "gelu": 6, "gelu_tanh": 128}[name] * 2.0**-23
    kept = expected.abs() > 1e-36  # what is smaller may be zero
    assert kept.sum() > 18000 and float(error[kept].max()) < bound
    assert float(error[kept & (gate.abs() < 2)].max()) < 6 * 2.0**-23


def test_numbers_at_the_ends(isa: str) -> None:
    gate = torch.tensor([INF, -INF, NAN, 0.0, 1e30, -1e30, 200.0, -200.0, 1e-40])
    one = torch.ones_like(gate)
    for op, _, _, backward in OPS.values():
        out = op(gate, one)
        assert torch.equal(out[[0, 3, 4, 6]], torch.tensor([INF, 0.0, 1e30, 200.0]))
        assert out[2].isnan() and float(out[5]) == float(out[7]) == 0
        assert float(out[8]) == pytest.approx(5e-41, rel=1e-3)
        slope = backward(one, gate, one, True, False)[0]
        assert slope[[0, 4, 6]].tolist() == [1.0] * 3 and slope[[5, 7]].tolist() == [0.0] * 2 and slope[2].isnan()


@parametrize_op
@parametrize_dtype
def test_instruction_sets_threads_and_places_do_not_matter(threads: None, name: str, dtype: torch.dtype) -> None:
    op, _, _, backward = OPS[name]
    gate, up, grad = ((torch.randn(301, 333) * scale).to(dtype) for scale in (4, 1, 1))
    before, results = pycore.native.cpu_isa(), []
    for isa in pycore.native.available_isas():
        pycore.native.set_cpu_isa(isa)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([op(gate, up), *backward(grad, gate, up, True, True)])
        for rows, columns in ((slice(7, 8), slice(0, 333)), (slice(5, 9), slice(3, 20)), (slice(0, 301), slice(1, 2))):
            part = op(gate[rows, columns], up[rows, columns])
            assert torch.equal(part, results[0][0][rows, columns])
            for a, e in zip(
                backward(grad[rows, columns], gate[rows, columns], up[rows, columns], True, True),
                results[0][1:],
                strict=True,
            ):
                assert torch.equal(a, e[rows, columns])
    pycore.native.set_cpu_isa(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@parametrize_op
def test_strides(isa: str, name: str) -> None:
    op, _, _, backward = OPS[name]
    both, grad = torch.randn(4, 6, 70), torch.randn(4, 6, 35)
    gate, up = both.chunk(2, dim=-1)  # the halves of one projection
    expected = op(gate.contiguous(), up.contiguous())
    grads = backward(grad, gate.contiguous(), up.contiguous(), True, True)
    turned = up.mT.contiguous().mT
    for other in (up, turned, up.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(op(gate, other), expected)
        assert all(torch.equal(a, e) for a, e in zip(backward(grad, gate, other, True, True), grads, strict=True))
    assert torch.equal(op(gate[0, 0], up[0, 0]), expected[0, 0])
    row = up[:1, :1].expand(4, 6, 35)
    assert torch.equal(op(gate, row), op(gate, row.contiguous()))


@parametrize_op
def test_gradcheck(name: str) -> None:
    gate, up = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(OPS[name][0], (gate, up))
    assert torch.autograd.gradcheck(OPS[name][0], (gate * 4, up.detach()))


@parametrize_dtype
def test_opcheck(dtype: torch.dtype) -> None:
    gate, up = (torch.randn(4, 6).to(dtype).requires_grad_() for _ in range(2))
    torch.library.opcheck(kernels.silu_mul, (gate, up))
    gate_only, up_only = gate.detach(), up.detach()
    torch.library.opcheck(kernels.silu_mul_backward, (up_only, gate_only, up_only, True, False))
    for approximate in ("none", "tanh"):
        torch.library.opcheck(kernels.gelu_mul, (gate, up, approximate))
        torch.library.opcheck(kernels.gelu_mul_backward, (up_only, gate_only, up_only, approximate, True, True))


@parametrize_op
def test_transforms(name: str) -> None:
    op = OPS[name][0]
    gate, up = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    assert torch.equal(torch.vmap(op)(gate, up), op(gate, up))
    assert torch.equal(
        torch.vmap(op, (1, None))(gate, up[:, 0]), torch.stack([op(g, up[:, 0]) for g in gate.unbind(1)])
    )
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    out, grads = op(*leaves), torch.randn(2, 3, 4, 6)
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        each = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        assert all(torch.equal(a[i], e) for a, e in zip(batched, each, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(gate.bfloat16(), up.bfloat16()).dtype == torch.float32
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        gate, up = torch.randn(rows, 6), torch.randn(rows, 6)
        assert torch.equal(compiled(gate, up), op(gate, up))


def test_native_is_the_same_kernel() -> None:
    native = pycore.native
    gate, up, grad = torch.randn(9, 70), torch.randn(9, 70), torch.randn(9, 70)
    arrays = gate.numpy(), up.numpy()
    assert torch.equal(torch.from_numpy(native.silu_mul(*arrays, threads=2)), ops.silu_mul(gate, up))
    assert torch.equal(torch.from_numpy(native.gelu_mul(*arrays, "tanh")), ops.gelu_mul(gate, up, "tanh"))
    out = torch.empty(9, 70, dtype=torch.bfloat16)
    assert native.gelu_mul(gate.bfloat16(), up.bfloat16(), out=out) is out
    assert torch.equal(out, ops.gelu_mul(gate.bfloat16(), up.bfloat16()))
    for actual, wanted in (
        (native.silu_mul_backward(grad, gate, up), kernels.silu_mul_backward(grad, gate, up, True, True)),
        (native.gelu_mul_backward(grad, gate, up), kernels.gelu_mul_backward(grad, gate, up, "none", True, True)),
    ):
        assert all(torch.equal(torch.from_numpy(a), w) for a, w in zip(actual, wanted, strict=True))
    assert native.silu_mul_backward(grad, gate, up, need_gate=False)[0] is None


X = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: ops.silu_mul([1.0], X), TypeError, "silu_mul: gate is a list and must be a Tensor"),
        (lambda: ops.gelu_mul(X, None), TypeError, "gelu_mul: up is a NoneType and must be a Tensor"),
        (lambda: ops.gelu_mul(X, X, None), TypeError, "approximate is a NoneType and must be 'none' or 'tanh'"),
        (lambda: ops.gelu_mul(X, X, "erf"), ValueError, "gelu_mul: approximate is 'erf' and must be 'none' or 'tanh'"),
        (lambda: ops.silu_mul(X, X[:, :5]), ValueError, r"up has shape \[4, 5\] and must have gate's \[4, 6\]"),
        (lambda: ops.silu_mul(X, X[0]), ValueError, r"up has shape \[6\] and must have gate's \[4, 6\]"),
        (lambda: ops.gelu_mul(X, X.half()), ValueError, "up has dtype float16 and must have gate's float32"),
        (lambda: ops.silu_mul(X.long(), X), ValueError, "gate has dtype int64 and must have float32, bfloat16"),
        (lambda: ops.silu_mul(torch.tensor(1.0), X), ValueError, "gate is a scalar and must have shape"),
        (
            lambda: kernels.silu_mul_backward(X[:3], X, X, True, True), ValueError,
            r"silu_mul_backward: grad_out has shape \[3, 6\] and must have \[4, 6\]",
        ),
        (
            lambda: kernels.gelu_mul_backward(X.double(), X, X, "tanh", True, True), ValueError,
            "gelu_mul_backward: grad_out has dtype float64 and must have gate's float32",
        ),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], Tensor], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()
