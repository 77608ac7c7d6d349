# SPDX-License-Identifier: Apache-2.0
"""rotary_tables, rotate, softcap and the norm whose weight counts from one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pycore
from pycore import native, ops
from pycore.reference import linear as reference
from tests.support.tolerance import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
parametrize_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def tables(batch: int, length: int, pairs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    positions = torch.randint(0, 5000, (batch, length))
    frequencies = torch.rand(pairs, dtype=torch.float64)
    return ops.rotary_tables(positions, frequencies, dtype == torch.float64)


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_tables_are_rounded_once() -> None:
    """Angles in every quadrant, far ones too; the C library's float64 is the judge."""
    positions = torch.cat([torch.arange(-300, 3000), torch.tensor([2**28, -(2**28), 131071, 2**20 + 3])])
    frequencies = torch.tensor([1.0, 0.5, math.pi / 2, math.pi / 4, 1e-3, 0.7071067811865476], dtype=torch.float64)
    cos, sin = ops.rotary_tables(positions, frequencies, True)
    angle = positions[:, None] * frequencies
    near = angle.abs() < 2**29
    for ours, theirs in ((cos, angle.cos()), (sin, angle.sin())):
        assert ours.dtype == torch.float64 and (ours - theirs).abs()[near].max() < 5e-16
    narrow = ops.rotary_tables(positions, frequencies)
    assert torch.equal(narrow[0], cos.float()) and torch.equal(narrow[1], sin.float())
    assert (cos.square() + sin.square() - 1).abs().max() < 1e-15


def test_extreme_angles() -> None:
    """Nothing is undefined, and the circle is not left."""
    frequencies = torch.tensor([0.0, math.inf, math.nan, 1e300, -1.0, 2.0**52], dtype=torch.float64)
    cos, sin = ops.rotary_tables(torch.tensor([[0], [3], [2**62]]), frequencies)
    assert cos.shape == (3, 1, 6) and (cos[..., 0] == 1).all() and (sin[..., 0] == 0).all()
    assert cos[..., 2].isnan().all() and cos[1:, :, 1].isnan().all()
    finite = cos.isfinite()
    assert (cos.square() + sin.square())[finite].max() < 3 and (cos[finite].abs() <= 1.7).all()


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("pairs", [0, 1, 5])
def test_table_shapes(shape: tuple[int, ...], pairs: int) -> None:
    cos, sin = ops.rotary_tables(torch.zeros(shape, dtype=torch.int64), torch.ones(pairs, dtype=torch.float64))
    assert cos.shape == sin.shape == (*shape, pairs) and (cos == 1).all() and (sin == 0).all()


# ---- rotation --------------------------------------------------------------------------------------------------------


@parametrize_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 34), (1, 2, 70, 64), (2, 0, 3, 8), (2, 2, 40, 111)], ids=str)
@pytest.mark.parametrize("rest", [0, 5])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotate(isa: str, dtype: torch.dtype, shape: tuple[int, ...], rest: int, inverse: bool) -> None:
    batch, _, length, channels = shape
    pairs = max(channels - rest, 0) // 2
    x = torch.randn(shape).to(dtype)
    for rows in {1, batch}:
        cos, sin = tables(rows, length, pairs)
        out = ops.rotate(x, cos, sin, inverse)
        exact = reference.rotate(x.double(), cos.double(), sin.double(), inverse)
        assert out.shape == shape and out.dtype == dtype and out.is_contiguous()
        if out.numel():
            assert_as_accurate(out, exact, reference.rotate(x, cos.to(dtype), sin.to(dtype), inverse))
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(ops.rotate(strided, cos, sin, inverse), out)
        for row in range(length):
            alone = ops.rotate(x[:, :, row : row + 1], cos[:, row : row + 1], sin[:, row : row + 1], inverse)
            assert torch.equal(alone, out[:, :, row : row + 1])


def test_rotate_has_gradients() -> None:
    cos, sin = tables(2, 3, 4, torch.float64)
    x = torch.randn(2, 2, 3, 9, dtype=torch.float64, requires_grad=True)
    for inverse in (False, True):
        assert torch.autograd.gradcheck(lambda x: ops.rotate(x, cos, sin, inverse), (x,))  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda x: ops.rotate(x, cos, sin, inverse), (x,))  # noqa: B023
    _, tangent = torch.func.jvp(lambda x: ops.rotate(x, cos, sin), (x.detach(),), (torch.ones_like(x),))
    assert torch.equal(tangent, ops.rotate(torch.ones_like(x), cos, sin).detach())
    assert torch.equal(torch.vmap(lambda x: ops.rotate(x, cos, sin))(torch.stack([x, x]).detach())[1],
                       ops.rotate(x, cos, sin).detach())  # fmt: skip
    with pytest.raises(NotImplementedError, match="^rotate: gradients of cos and sin are not available$"):
        ops.rotate(x, cos.requires_grad_(), sin).sum().backward()


# ---- softcap ---------------------------------------------------------------------------------------------------------


@parametrize_dtype
@pytest.mark.parametrize("shape", [(0, 3), (1,), (3, 17), (2, 3, 33), (5, 7001)], ids=str)
def test_softcap(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape) * 20).to(dtype)
    for cap in (30.0, 0.7):
        out, exact = ops.softcap(x, cap), reference.softcap(x.double(), cap)
        assert out.dtype == dtype and out.is_contiguous()
        if out.numel():
            assert_as_accurate(out, exact, reference.softcap(x, cap))
        for column in range(min(shape[-1], 20)):
            assert torch.equal(ops.softcap(x[..., column : column + 1], cap), out[..., column : column + 1])
        grad = torch.randn(shape).to(dtype)
        wide = x.double().requires_grad_()
        (exact_grad,) = torch.autograd.grad(reference.softcap(wide, cap), wide, grad.double())
        narrow = x.clone().requires_grad_()
        (plain,) = torch.autograd.grad(reference.softcap(narrow, cap), narrow, grad)
        if out.numel():
            assert_as_accurate(torch.ops.pycore.softcap_backward(grad, x, cap), exact_grad, plain)


def test_softcap_has_gradients() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.softcap(x, 1.5), (x,))
    with pytest.raises(NotImplementedError, match="^softcap: second derivatives are not available$"):
        torch.autograd.gradgradcheck(lambda x: ops.softcap(x, 1.5), (x,))
    assert torch.equal(torch.vmap(lambda x: ops.softcap(x, 1.5))(x.detach()), ops.softcap(x, 1.5).detach())


# ---- the norm whose weight counts from one ---------------------------------------------------------------------------


@parametrize_dtype
def test_plus_one(isa: str, dtype: torch.dtype) -> None:
    x, weight, grad = torch.randn(7, 70).to(dtype), (torch.randn(70) / 50).to(dtype), torch.randn(7, 70).to(dtype)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    wide = [x.double().requires_grad_(), weight.double().requires_grad_()]
    plain = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    out, exact = ops.rms_norm(*leaves, 1e-5, True), reference.rms_norm(*wide, 1e-5, True)
    theirs = torch.nn.functional.rms_norm(plain[0].float(), (70,), 1 + plain[1].float(), 1e-5).to(dtype)
    assert_as_accurate(out.detach(), exact.detach(), theirs.detach())
    found = torch.autograd.grad(out, leaves, grad)
    expected, other = torch.autograd.grad(exact, wide, grad.double()), torch.autograd.grad(theirs, plain, grad)
    for each in zip(found, expected, other, strict=True):
        assert_as_accurate(*each)
    if dtype == torch.float32:
        assert torch.equal(out, ops.rms_norm(x, 1 + weight, 1e-5))


def test_plus_one_has_gradients() -> None:
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-3, True), (x, weight), check_forward_ad=True)


# ---- all of them -----------------------------------------------------------------------------------------------------


def test_instruction_sets_agree() -> None:
    wide = [isa for isa in native.available_isas() if isa != "scalar"]
    x = torch.randint(-4096, 4096, (2, 3, 37, 75)) / 512
    positions, frequencies = torch.arange(37)[None] * 1001, torch.tensor([1 / (i + 1) for i in range(33)]).double()
    before, found = native.cpu_isa(), []
    try:
        for isa in wide:
            native.set_cpu_isa(isa)
            cos, sin = ops.rotary_tables(positions, frequencies)
            for dtype in DTYPES:
                y = x.to(dtype)
                found.append(
                    [cos, sin, ops.rotate(y, cos, sin), ops.softcap(y, 3.0), ops.rms_norm(y, y[0, 0, 0], 1e-6, True)]
                )
    finally:
        native.set_cpu_isa(before)
    for a, b in zip(found[: len(DTYPES)], found[-len(DTYPES) :], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_under_transforms_of_torch() -> None:
    positions, frequencies = torch.arange(6)[None], torch.rand(4, dtype=torch.float64)
    cos, sin = ops.rotary_tables(positions, frequencies)
    x = torch.randn(2, 3, 6, 8)
    torch.library.opcheck(torch.ops.pycore.rotary_tables, (positions, frequencies))
    torch.library.opcheck(torch.ops.pycore.rotate, (x, cos, sin))
    torch.library.opcheck(torch.ops.pycore.softcap, (x, 2.0))
    torch.library.opcheck(torch.ops.pycore.rms_norm, (x, x[0, 0, 0], 1e-6, None, True))

    def function(x: Tensor, positions: Tensor, cap: float) -> Tensor:
        return ops.softcap(ops.rotate(x, *ops.rotary_tables(positions, frequencies)), cap)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for length, cap in ((6, 2.0), (5, 3.5), (3, 0.1)):
        part, at = x[:, :, :length], positions[:, :length]
        assert torch.equal(compiled(part, at, cap), function(part, at, cap))


def test_native() -> None:
    positions, frequencies = torch.arange(6)[None], torch.rand(4, dtype=torch.float64)
    cos, sin = native.rotary_tables(positions.numpy(), frequencies.numpy(), threads=1)
    x = torch.randn(2, 3, 6, 9)
    expected = ops.rotary_tables(positions, frequencies)
    assert torch.equal(torch.from_numpy(cos), expected[0]) and torch.equal(torch.from_numpy(sin), expected[1])
    rotated = native.rotate(x.numpy(), cos, sin)
    assert torch.equal(torch.from_numpy(rotated), ops.rotate(x, *expected))
    assert torch.equal(torch.from_numpy(native.rotate(x.numpy(), cos, sin, True)), ops.rotate(x, *expected, True))
    assert torch.equal(torch.from_numpy(native.softcap(x.numpy(), 2.0)), ops.softcap(x, 2.0))
    grad = native.softcap_backward(x.numpy(), x.numpy(), 2.0)
    assert torch.equal(torch.from_numpy(grad), torch.ops.pycore.softcap_backward(x, x, 2.0))
    norm = native.rms_norm(x.numpy(), x[0, 0, 0].numpy(), plus_one=True)
    assert torch.equal(torch.from_numpy(norm), ops.rms_norm(x, x[0, 0, 0], plus_one=True))
    with pytest.raises(ValueError, match="^rotate: out overlaps x"):
        native.rotate(rotated, cos, sin, out=rotated)


LONG, WIDE, X = torch.arange(3), torch.ones(2, dtype=torch.float64), torch.ones(2, 1, 3, 6)
TABLE = torch.ones(1, 3, 2)
REFUSED = {
    "positions": (lambda: ops.rotary_tables(LONG.int(), WIDE),
                  "rotary_tables: positions has dtype int32 and must have int64"),
    "frequencies": (lambda: ops.rotary_tables(LONG, WIDE.float()),
                    "rotary_tables: frequencies has dtype float32 and must have float64"),
    "matrix": (lambda: ops.rotary_tables(LONG, WIDE[None]),
               r"rotary_tables: frequencies has shape \[1, 2\] and must be \[pairs\]"),
    "x": (lambda: ops.rotate(X[0], TABLE, TABLE),
          r"rotate: x has shape \[1, 3, 6\] and must be \[batch, heads, length, channels\]"),
    "integers": (lambda: ops.rotate(X.int(), TABLE, TABLE),
                 "rotate: x has dtype int32 and must have float32, bfloat16, float16 or float64"),
    "wide tables": (lambda: ops.rotate(X, TABLE.double(), TABLE),
                    "rotate: cos has dtype float64 and must have float32 where x has float32"),
    "long tables": (lambda: ops.rotate(X, TABLE, TABLE[:, :2]),
                    r"rotate: sin has shape \[1, 2, 2\] and must be \[2 or 1, 3, at most 3\], as x is"),
    "unlike tables": (lambda: ops.rotate(X, TABLE, TABLE[..., :1]),
                      r"rotate: sin has shape \[1, 3, 1\] and must have cos's \[1, 3, 2\]"),
    "cap": (lambda: ops.softcap(X, 0.0), "softcap: cap is 0 and must be positive and finite"),
    "no cap": (lambda: ops.softcap(X, math.nan), "softcap: cap is nan and must be positive and finite"),
    "scalar": (lambda: ops.softcap(X[0, 0, 0, 0], 1.0),
               r"softcap: x is a scalar and must have shape \[..., channels\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        call()


def test_wrong_types() -> None:
    for call in (lambda: ops.rotary_tables([1], WIDE), lambda: ops.rotate(X, 1, TABLE), lambda: ops.softcap(3.0, 1.0),
                 lambda: ops.rotate(X, TABLE, TABLE, 1), lambda: ops.rms_norm(X, None, 1e-6, 1)):  # fmt: skip
        with pytest.raises(TypeError):
            call()


def test_tables_of_positions() -> None:
    """rope_tables has these very cosines."""
    cos, sin = pycore.positions.rope_tables(50, 16)
    frequencies = torch.tensor([10000.0 ** (-i / 8) for i in range(8)]).double()
    expected = ops.rotary_tables(torch.arange(50), frequencies)
    assert torch.equal(cos, expected[0]) and torch.equal(sin, expected[1])
