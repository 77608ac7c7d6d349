# SPDX-License-Identifier: Apache-2.0
"""invariant_linear and rms_norm in bfloat16 and float16: float32 sums in the one order, rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pycore
from pycore import ops
from pycore.reference import linear as reference
from tests.support.tolerance import assert_as_accurate

kernels = torch.ops.pycore
HALVES = [torch.bfloat16, torch.float16]

# (rows, K, N): every number of rows that reads the weight where it lies, and around the vector widths, the squares
# (16 and 32 channels), a line, the panel, the block and the depth up to which x becomes float32 once.
SHAPES = [
    (0, 17, 5), (1, 1, 1), (1, 33, 97), (1, 256, 128), (1, 2049, 65), (2, 300, 40), (3, 2700, 33), (4, 97, 113),
    (5, 31, 7), (6, 515, 129), (7, 257, 65), (25, 300, 63), (97, 512, 130), (200, 111, 256), (401, 64, 97), (4, 0, 9),
    (9, 8, 0),
]  # fmt: skip

parametrize_dtype = pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
parametrize_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def inputs(rows: int, k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)


@parametrize_dtype
@parametrize_shape
def test_forward_is_float32_rounded_once(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """16 bits are exact in float32, whose order is tested elsewhere; so these are its results, rounded."""
    x, weight, bias = inputs(*shape, dtype)
    for chosen in (bias, None):
        wide = ops.invariant_linear(x.float(), weight.float(), None if chosen is None else chosen.float())
        out = ops.invariant_linear(x, weight, chosen)
        assert out.dtype == dtype and torch.equal(out, wide.to(dtype))
        exact = reference.invariant_linear(x.double(), weight.double(), None if chosen is None else chosen.double())
        assert_as_accurate(out, exact, F.linear(x, weight, chosen))


@parametrize_dtype
@parametrize_shape
def test_backward_is_float32_rounded_once(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x, weight, _ = inputs(*shape, dtype)
    grad = torch.randn(shape[0], shape[2]).to(dtype)
    grads = kernels.invariant_linear_backward(grad, x, weight, True, True, True)
    wide = kernels.invariant_linear_backward(grad.float(), x.float(), weight.float(), True, True, True)
    for actual, expected in zip(grads, wide, strict=True):
        assert actual.dtype == dtype and torch.equal(actual, expected.to(dtype))


@parametrize_dtype
@pytest.mark.parametrize("shape", [(0, 8), (1, 17), (3, 64), (17, 63), (97, 128), (129, 339)], ids=str)
def test_norm_is_float32_rounded_once(isa: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight, grad = (torch.randn(s).to(dtype) for s in (shape, shape[1:], shape))
    for chosen in (weight, None):
        wide = None if chosen is None else chosen.float()
        assert torch.equal(ops.rms_norm(x, chosen), ops.rms_norm(x.float(), wide).to(dtype))
        grads = kernels.rms_norm_backward(grad, x, chosen, 1e-6, True, chosen is not None)
        expected = kernels.rms_norm_backward(grad.float(), x.float(), wide, 1e-6, True, chosen is not None)
        assert all(torch.equal(a, e.to(dtype)) for a, e in zip(grads, expected, strict=True))


@parametrize_dtype
def test_a_row_has_the_same_bits_in_any_company(isa: str, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(230, 300, 130, dtype)
    grad = torch.randn(230, 130).to(dtype)
    whole = ops.invariant_linear(x, weight, bias)
    whole_x = kernels.invariant_linear_backward(grad, x, weight, True, False, False)[0]
    for count in (1, 2, 3, 4, 5, 6, 7, 13, 25, 97, 193, 197):
        for start in (0, 1, 32):
            rows = slice(start, start + count)
            assert torch.equal(ops.invariant_linear(x[rows], weight, bias), whole[rows]), f"{count} rows from {start}"
            part = kernels.invariant_linear_backward(grad[rows], x[rows], weight, True, False, False)[0]
            assert torch.equal(part, whole_x[rows]), f"{count} rows from {start}"


@parametrize_dtype
@pytest.mark.parametrize("rows", [1, 5, 700])
def test_threads_do_not_matter(isa: str, threads: None, dtype: torch.dtype, rows: int) -> None:
    x, weight, bias = inputs(rows, 429, 300, dtype)
    grad = torch.randn(rows, 300).to(dtype)

    def everything() -> list[Tensor]:
        grads = kernels.invariant_linear_backward(grad, x, weight, True, True, True)
        return [ops.invariant_linear(x, weight, bias), *grads]

    torch.set_num_threads(1)
    alone = everything()
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert all(torch.equal(one, many) for one, many in zip(alone, everything(), strict=True)), f"{count} threads"


@parametrize_dtype
def test_strides(isa: str, dtype: torch.dtype) -> None:
    x, weight, _ = inputs(24, 70, 33, dtype)
    x = x.view(6, 4, 70)
    wide = torch.randn(6, 4, 143).to(dtype)
    wide[..., 3:73] = x
    versions = [wide[..., 3:73], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT]
    for strided in versions:
        assert torch.equal(ops.invariant_linear(strided, weight.mT.contiguous().mT), ops.invariant_linear(x, weight))
        for few in (strided[:1], strided[:2, :2], strided[:3, :1]):  # two dimensions that do not merge
            assert torch.equal(ops.invariant_linear(few, weight), ops.invariant_linear(few.contiguous(), weight))
        assert torch.equal(ops.rms_norm(strided), ops.rms_norm(x))


@parametrize_dtype
def test_nan_and_infinity_stay_in_their_row(isa: str, dtype: torch.dtype) -> None:
    for rows in (4, 9):
        x, weight, _ = inputs(rows, 70, 33, dtype)
        clean = ops.invariant_linear(x, weight)
        x[1, 3], x[2, 3] = float("nan"), float("inf")
        result = ops.invariant_linear(x, weight)
        assert not result[1:3].isfinite().any()
        assert torch.equal(result[3:], clean[3:]) and torch.equal(result[:1], clean[:1])


def test_subnormal_numbers_are_zero_in_bfloat16(isa: str) -> None:
    """On every instruction set and whatever torch's threads have set, as machines that multiply pairs do it."""
    tiny = 2.0**-100
    x = torch.tensor([[tiny, tiny, 1.0, 2.0**-130]]).bfloat16().expand(9, 4)
    weight = torch.tensor([[2.0**-20, 2.0**-27, 0.0, 1.0], [-(2.0**-27), 0.0, 0.0, 0.0]]).bfloat16()
    for rows in (1, 9):
        out = ops.invariant_linear(x[:rows], weight)
        assert out[0, 0] == 2.0**-120 + 2.0**-127 and out[0, 1] == 0  # a term is not rounded, its sum is
        grad_x = kernels.invariant_linear_backward(x[:rows, :2], x[:rows], weight, True, False, False)[0]
        assert grad_x[0, 0] == 2.0**-120 - 2.0**-127 and grad_x[0, 1] == 0


@pytest.mark.parametrize("k", [1, 7, 255, 257, 333])
def test_an_odd_number_of_channels_in_bfloat16(isa: str, k: int) -> None:
    """Where pairs are multiplied, the last channel has no partner: not even the sign of a zero may change."""
    x, weight = torch.zeros(9, k).bfloat16(), torch.zeros(5, k).bfloat16()
    x[:, 0], weight[:, 0] = 2.0**-100, -(2.0**-100)  # their product underflows to -0
    for rows in (1, 9):
        assert ops.invariant_linear(x[:rows], weight).signbit().tolist() == [[k == 1] * 5] * rows
    x[:, -1], weight[:, -1] = float("inf"), 1.0
    for rows in (1, 9):
        assert bool((ops.invariant_linear(x[:rows], weight) == float("inf")).all())


def test_what_is_too_large_for_float16_becomes_infinity(isa: str) -> None:
    """Sums are float32: only their rounding overflows."""
    x = torch.tensor([[60000.0, 60000.0, -60000.0]]).half()
    weight = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]).half()
    assert ops.invariant_linear(x, weight).tolist() == [[60000.0, float("inf")]]


@parametrize_dtype
def test_autograd_compile_and_opcheck(dtype: torch.dtype) -> None:
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs(4, 6, 5, dtype))
    torch.library.opcheck(kernels.invariant_linear, (x, weight, bias))
    out = ops.invariant_linear(x, weight, bias)
    grads = torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))
    expected = kernels.invariant_linear_backward(torch.ones_like(out), x, weight, True, True, True)
    assert all(torch.equal(a, e) for a, e in zip(grads, expected, strict=True))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: ops.rms_norm(ops.invariant_linear(x, weight, bias)), fullgraph=True, dynamic=True
    )
    for rows in (3, 8):
        x = torch.randn(rows, 6).to(dtype)
        assert torch.equal(compiled(x), ops.rms_norm(ops.invariant_linear(x, weight, bias)))
    many = torch.randn(3, 4, 6).to(dtype)
    batched = torch.vmap(ops.invariant_linear, (0, None, None))(many, weight, bias)
    assert torch.equal(batched, ops.invariant_linear(many, weight, bias))


@parametrize_dtype
def test_native_is_the_same_kernel(dtype: torch.dtype) -> None:
    x, weight, bias = inputs(9, 70, 33, dtype)
    out = torch.empty(9, 33, dtype=dtype)
    assert pycore.native.invariant_linear(x, weight, bias, out=out, threads=2) is out
    assert torch.equal(out, ops.invariant_linear(x, weight, bias))
