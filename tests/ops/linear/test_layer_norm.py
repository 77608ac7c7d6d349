# SPDX-License-Identifier: Apache-2.0
"""layer_norm: values, gradients, the same bits, torch's transforms, and what bad input gets."""

from __future__ import annotations

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
SHAPES = [(0, 8), (1, 1), (1, 2), (1, 17), (3, 64), (17, 63), (65, 65), (97, 128), (129, 339), (1023, 111), (2, 1025)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

parametrize_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
parametrize_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the gradient of the result."""
    x = torch.randn(shape) * 3 + 5
    return tuple(t.to(dtype) for t in (x, torch.randn(shape[1]), torch.randn(shape[1]), torch.randn(shape)))


@parametrize_dtype
@parametrize_shape
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_values(isa: str, dtype: torch.dtype, shape: tuple[int, int], affine: tuple[bool, bool]) -> None:
    x, weight, bias, grad = inputs(shape, dtype)
    given = [t if wanted else None for t, wanted in zip((weight, bias), affine, strict=True)]
    leaves = [x, *(t for t in given if t is not None)]
    doubles = [leaf.double().requires_grad_() for leaf in leaves]
    plain_leaves = [leaf.clone().requires_grad_() for leaf in leaves]

    def arguments(tensors: list[Tensor]) -> list[Tensor | None]:
        rest = iter(tensors[1:])
        return [tensors[0], *(next(rest) if wanted else None for wanted in affine)]

    exact = reference.layer_norm(*arguments(doubles))
    plain_x, plain_weight, plain_bias = arguments(plain_leaves)
    plain = F.layer_norm(plain_x, shape[1:], plain_weight, plain_bias)
    out = ops.layer_norm(x, *given)
    assert out.dtype == dtype
    assert_as_accurate(out, exact.detach(), plain.detach())

    actual = kernels.layer_norm_backward(grad, x, given[0], 1e-5, True, *affine)
    wanted = iter(torch.autograd.grad(exact, doubles, grad.double()))
    plain_grads = iter(torch.autograd.grad(plain, plain_leaves, grad))
    for name, result, needed in zip(("x", "weight", "bias"), actual, (True, *affine), strict=True):
        if needed:
            assert_as_accurate(result, next(wanted), next(plain_grads), name)
        else:
            assert result.numel() == 0


def test_a_large_mean_costs_no_digits(isa: str) -> None:
    """The deviations of whole numbers are exact; a mean that is rounded would shift all of them."""
    x = torch.arange(333.0)[None] * 3
    for offset in (0.0, 1e6):
        exact = reference.layer_norm(x.double())
        assert float((ops.layer_norm(x + offset).double() - exact).abs().max()) < 4e-7


@parametrize_dtype
def test_a_row_has_the_same_bits_in_any_company(isa: str, dtype: torch.dtype) -> None:
    x, weight, bias, grad = inputs((97, 130), dtype)
    whole = ops.layer_norm(x, weight, bias)
    whole_x = kernels.layer_norm_backward(grad, x, weight, 1e-5, True, False, False)[0]
    for count in (1, 2, 5, 6, 7, 64, 65):
        for start in (0, 1, 13):
            rows = slice(start, start + count)
            assert torch.equal(ops.layer_norm(x[rows], weight, bias), whole[rows])
            part = kernels.layer_norm_backward(grad[rows], x[rows], weight, 1e-5, True, False, False)[0]
            assert torch.equal(part, whole_x[rows])


@parametrize_dtype
def test_threads_and_instruction_sets_do_not_matter(threads: None, dtype: torch.dtype) -> None:
    x, weight, bias, grad = inputs((1030, 339), dtype)
    before, results = pycore.native.cpu_isa(), []
    for name in pycore.native.available_isas():
        pycore.native.set_cpu_isa(name)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            backward = kernels.layer_norm_backward(grad, x, weight, 1e-5, True, True, True)
            results.append([ops.layer_norm(x, weight, bias), *backward])
    pycore.native.set_cpu_isa(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@parametrize_dtype
def test_strides(isa: str, dtype: torch.dtype) -> None:
    x, weight, bias, grad = inputs((24, 70), dtype)
    x, grad = x.view(6, 4, 70), grad.view(6, 4, 70)
    wide = torch.randn(6, 4, 143).to(dtype)
    wide[..., 3:73] = x
    expected = kernels.layer_norm_backward(grad, x, weight, 1e-5, True, True, True)
    for strided in (wide[..., 3:73], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        assert torch.equal(ops.layer_norm(strided, weight, bias), ops.layer_norm(x, weight, bias))
        actual = kernels.layer_norm_backward(grad, strided, weight, 1e-5, True, True, True)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    row = x[:1, :1]
    assert torch.equal(ops.layer_norm(row.expand(3, 5, 70)), ops.layer_norm(row).expand(3, 5, 70))
    assert torch.equal(ops.layer_norm(x[0, 0], weight), ops.layer_norm(x, weight)[0, 0])


def test_gradcheck_and_opcheck() -> None:
    double = {"dtype": torch.float64, "requires_grad": True}
    x, weight, bias = torch.randn(2, 3, 5, **double), torch.randn(5, **double), torch.randn(5, **double)
    for arguments in ((x, weight, bias), (x, None, bias), (x, weight), (x,)):
        assert torch.autograd.gradcheck(ops.layer_norm, arguments)
    for dtype in DTYPES:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight, bias)]
        torch.library.opcheck(kernels.layer_norm, (*leaves, 1e-5))
        x_only, scale = leaves[0].detach(), leaves[1].detach()
        torch.library.opcheck(kernels.layer_norm_backward, (x_only, x_only, scale, 1e-5, True, True, True))
        torch.library.opcheck(kernels.layer_norm_backward, (x_only, x_only, None, 1e-5, False, False, True))


def test_transforms() -> None:
    x, weight, bias = torch.randn(3, 4, 6), torch.randn(3, 6), torch.randn(6)
    assert torch.equal(torch.vmap(ops.layer_norm)(x), ops.layer_norm(x))
    each = torch.stack([ops.layer_norm(a, b, bias) for a, b in zip(x, weight, strict=True)])
    assert torch.equal(torch.vmap(ops.layer_norm, (0, 0, None))(x, weight, bias), each)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.layer_norm(x.bfloat16()).dtype == torch.float32
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.layer_norm(x, bias, bias), fullgraph=True, dynamic=True)
    for rows in (4, 7):
        x = torch.randn(rows, 6)
        assert torch.equal(compiled(x), ops.layer_norm(x, bias, bias))


def test_native_is_the_same_kernel() -> None:
    x, weight, bias, grad = inputs((9, 70), torch.float32)
    native = pycore.native
    out = native.layer_norm(x.numpy(), weight.numpy(), bias.numpy(), threads=2)
    assert torch.equal(torch.from_numpy(out), ops.layer_norm(x, weight, bias))
    wanted = kernels.layer_norm_backward(grad, x, weight, 1e-5, True, True, True)
    for a, w in zip(native.layer_norm_backward(grad, x, weight), wanted, strict=True):
        assert torch.equal(torch.from_numpy(a), w)
    assert native.layer_norm_backward(grad, x, weight, need_weight=False)[1] is None


X, C, D = torch.zeros(4, 6), torch.zeros(6), torch.zeros(5)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: ops.layer_norm([1.0]), TypeError, "layer_norm: x is a list and must be a Tensor"),
        (lambda: ops.layer_norm(X, 2), TypeError, "weight is a int and must be a Tensor or None"),
        (lambda: ops.layer_norm(X, C, 2), TypeError, "bias is a int and must be a Tensor or None"),
        (lambda: ops.layer_norm(torch.tensor(1.0)), ValueError, "x is a scalar and must have shape"),
        (lambda: ops.layer_norm(X, D), ValueError, r"weight has shape \[5\] and must have \[6\], x's last dimension"),
        (lambda: ops.layer_norm(X, C, D), ValueError, r"bias has shape \[5\] and must have \[6\], x's last dimension"),
        (lambda: ops.layer_norm(X, C.double()), ValueError, "weight has dtype float64 and must have x's float32"),
        (lambda: ops.layer_norm(X.half(), C.half(), C), ValueError, "bias has dtype float32 and must have x's float16"),
        (lambda: ops.layer_norm(X.int()), ValueError, "x has dtype int32 and must have float32, bfloat16, float16 or"),
        (lambda: ops.layer_norm(X, eps=-1.0), ValueError, "eps is -1 and must be finite and not negative"),
        (lambda: ops.layer_norm(X, eps=float("inf")), ValueError, "eps is inf"),
        (
            lambda: kernels.layer_norm_backward(X[:, :5], X, C, 1e-5, True, True, True), ValueError,
            r"layer_norm_backward: grad_out has shape \[4, 5\] and must have \[4, 6\]",
        ),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], Tensor], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()
