# SPDX-License-Identifier: Apache-2.0
"""The rotation trick's linear map, beside its matrix."""

from __future__ import annotations

import hashlib

import pytest
import torch

import pycore
from pycore import ops
from pycore.reference import vq as reference
from tests.ops.vq.test_vq_golden import made
from tests.support.tolerance import assert_as_accurate


@pytest.mark.parametrize("channels", [2, 15, 16, 17, 97, 128, 339])  # in one, codes are along x or against it
@pytest.mark.parametrize("transpose", [False, True])
def test_values(isa: str, channels: int, transpose: bool) -> None:
    v, x, code = (torch.randn(3, 41, channels) for _ in range(3))
    exact = reference.vq_rotate(v.double(), x.double(), code.double(), transpose=transpose)
    plain = reference.vq_rotate(v, x, code, transpose=transpose)
    assert_as_accurate(ops.vq_rotate(v, x, code, transpose=transpose), exact, plain)
    wide = ops.vq_rotate(v.double(), x.double(), code.double(), transpose=transpose)
    torch.testing.assert_close(wide, exact)


def test_takes_a_vector_to_its_code() -> None:
    x, code = torch.randn(20, 33, dtype=torch.float64), torch.randn(20, 33, dtype=torch.float64)
    torch.testing.assert_close(ops.vq_rotate(x, x, code), code)
    torch.testing.assert_close(ops.vq_rotate(x, x, x), x)


def test_vectors_of_zeros_give_finite_numbers() -> None:
    v, zeros = torch.randn(4, 7), torch.zeros(4, 7)
    for x, code in ((zeros, v), (v, zeros), (zeros, zeros), (v, -v)):
        for transpose in (False, True):
            turned = ops.vq_rotate(v, x, code, transpose=transpose)
            expected = reference.vq_rotate(v.double(), x.double(), code.double(), transpose=transpose)
            torch.testing.assert_close(turned.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_row_has_its_own_bits(isa: str, threads: None) -> None:
    v, x, code = (torch.randn(700, 45) for _ in range(3))
    together = ops.vq_rotate(v, x, code, transpose=True)
    torch.set_num_threads(1)
    assert torch.equal(together, ops.vq_rotate(v, x, code, transpose=True))
    assert torch.equal(together[13:14], ops.vq_rotate(v[13:14], x[13:14], code[13:14], transpose=True))
    spread = (torch.randn(45, 700).mT, torch.randn(700, 90)[:, :45], torch.randn(1, 45).expand(700, 45))
    assert torch.equal(ops.vq_rotate(*spread), ops.vq_rotate(*(each.contiguous() for each in spread)))
    assert ops.vq_rotate(v[:0], x[:0], code[:0]).shape == (0, 45)
    assert ops.vq_rotate(v[:, :0], x[:, :0], code[:, :0]).shape == (700, 0)


def test_bits_are_those_written_down(isa: str) -> None:
    turned = ops.vq_rotate(made(1, 9, 37), made(2, 9, 37), made(3, 9, 37), transpose=True)
    assert hashlib.sha256(turned.numpy().tobytes()).hexdigest()[:16] == "d42b44c2717b1fdf"


def test_gradients() -> None:
    v, x, code = (torch.randn(3, 5, dtype=torch.float64) for _ in range(3))
    v.requires_grad_()
    for transpose in (False, True):
        assert torch.autograd.gradcheck(
            lambda v, t=transpose: ops.vq_rotate(v, x, code, transpose=t), v, check_forward_ad=True
        )
        assert torch.autograd.gradgradcheck(lambda v, t=transpose: ops.vq_rotate(v, x, code, transpose=t), v)
    x.requires_grad_()
    ops.vq_rotate(v, x, code).sum().backward()
    assert x.grad is None, "the map is fixed"


def test_under_torch() -> None:
    v, x, code = torch.randn(4, 6, 9), torch.randn(6, 9), torch.randn(9, 6, 4)
    for transpose in (False, True):
        torch.library.opcheck(torch.ops.pycore.vq_rotate.default, (v[0].requires_grad_(), x, code[..., 0].T, transpose))
    each = torch.vmap(ops.vq_rotate, in_dims=(0, None, 2))(v, x, code.transpose(0, 1))
    for i in range(4):
        assert torch.equal(each[i], ops.vq_rotate(v[i], x, code.transpose(0, 1)[..., i]))
    assert torch.vmap(ops.vq_rotate, in_dims=(0, None, None))(v[:0], x, x).shape == (0, 6, 9)


def test_native_face() -> None:
    v, x, code = (torch.randn(5, 11) for _ in range(3))
    for transpose in (False, True):
        turned = pycore.native.vq_rotate(v.numpy(), x.numpy(), code.numpy(), transpose=transpose)
        assert torch.equal(torch.from_numpy(turned), ops.vq_rotate(v, x, code, transpose=transpose))


X = torch.zeros(4, 6)


@pytest.mark.parametrize(
    "given, text",
    [
        ((X[0, 0], X, X), r"v is a scalar and must have shape \[..., D\]"),
        ((X.half(), X, X), "v has dtype float16 and must have float32 or float64"),
        ((X, X.double(), X), "x has dtype float64 and must have v's float32"),
        ((X, X[:3], X), r"x has shape \[3, 6\] and must have v's \[4, 6\]"),
        ((X, X, X[:, :5]), r"code has shape \[4, 5\] and must have v's \[4, 6\]"),
    ],
)
def test_refused(given: tuple, text: str) -> None:
    with pytest.raises(ValueError, match=f"^vq_rotate: {text}$"):
        ops.vq_rotate(*given)
    with pytest.raises(ValueError, match=f"^vq_rotate: {text}$"):
        pycore.native.vq_rotate(*(each.numpy() for each in given))


def test_refused_types() -> None:
    with pytest.raises(TypeError, match="^vq_rotate: code is a list and must be a Tensor"):
        ops.vq_rotate(X, X, [1.0])
    with pytest.raises(TypeError, match="^vq_rotate: transpose is"):
        ops.vq_rotate(X, X, X, transpose=1)
