# SPDX-License-Identifier: Apache-2.0
"""Group quantization: codes equal to the reference's, bits dropped, both grids, every layout, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pycore import native, ops
from pycore.reference import staircase as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [((7, 130, 33), 64, 1), ((3, 2, 17), 5, -1), ((128,), 64, 0), ((2, 3, 97, 40), 32, 2), ((65, 4, 3), 64, 0),
          ((2, 113), 128, 1), ((1, 1), 1, 0), ((4, 200, 1), 64, 1), ((2, 5000), 4999, 1)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", ["embedded", "minmax"])
@pytest.mark.parametrize("shape, group_size, dim", SHAPES, ids=str)
def test_codes_are_the_reference(
    shape: tuple[int, ...], group_size: int, dim: int, grid: str, dtype: torch.dtype, isa: str
) -> None:
    x = (torch.randn(shape) * 3 + torch.randn(shape[:-1] + (1,))).to(dtype)
    for bits in (8, 4, 3, 2, 1):
        how: dict[str, Any] = {"bits": bits, "group_size": group_size, "dim": dim, "grid": grid}
        got = ops.staircase_quantize(x, return_centers=True, **how)
        expected = reference.quantize(x, **how)
        for name, a, b in zip(("codes", "lo", "hi", "centers"), got, expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), (name, bits)
        for centers in (None, got[3]):
            back = ops.staircase_dequantize(*got[:3], centers, **how)
            assert torch.equal(back, reference.dequantize(*got[:3], centers, **how))
            assert back.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropping_bits_is_quantizing_directly(dtype: torch.dtype, isa: str) -> None:
    x = torch.randn(3, 130, 50).to(dtype)
    codes, lo, hi = ops.staircase_quantize(x, bits=8, group_size=64, dim=1)
    for bits in range(1, 9):
        direct = ops.staircase_quantize(x, bits=bits, group_size=64, dim=1)
        assert torch.equal(codes >> (8 - bits), direct[0])
        assert torch.equal(direct[1], lo) and torch.equal(direct[2], hi)


def test_cells_hold_their_elements() -> None:
    """A code's cell is where its element lies, and halving the cells once a bit bounds the error."""
    x = torch.randn(4, 256, 16, dtype=torch.float32)
    for bits in (8, 4, 2):
        codes, lo, hi = ops.staircase_quantize(x, bits=bits, group_size=64, dim=1)
        step = ((hi - lo) / 2**bits).repeat_interleave(64, 1)
        error = ops.staircase_dequantize(codes, lo, hi, bits=bits, group_size=64, dim=1) - x
        assert (error.abs() <= step * 0.5 + 1e-5).all()
        assert lo.equal(x.view(4, 4, 64, 16).amin(2)) and hi.equal(x.view(4, 4, 64, 16).amax(2))


def test_centers_make_groups_right_on_average() -> None:
    """One outlier leaves the others at one end of a cell; the center knows, to 1/256 of a cell."""
    x = torch.randn(64, 200)
    x[5] = 100.0
    for bits in (8, 4, 2):
        codes, lo, hi, centers = ops.staircase_quantize(x, bits=bits, group_size=64, dim=0, return_centers=True)
        back = ops.staircase_dequantize(codes, lo, hi, centers, bits=bits, group_size=64, dim=0)
        assert ((back - x).mean(0).abs() <= (hi - lo)[0] / 2**bits / 256 + 1e-4).all()
    plain = ops.staircase_dequantize(codes, lo, hi, bits=2, group_size=64, dim=0)
    assert (back - x).square().mean() < 0.1 * (plain - x).square().mean()


def test_equal_elements_are_exact() -> None:
    for value in (0.0, -0.0, 3.1415, -1e30, 1e-40):
        for grid in ("embedded", "minmax"):
            x = torch.full((2, 70), value)
            codes, lo, hi, centers = ops.staircase_quantize(
                x, bits=4, group_size=64, dim=1, grid=grid, return_centers=True
            )
            assert not codes.any()
            back = ops.staircase_dequantize(codes, lo, hi, centers, bits=4, group_size=64, dim=1, grid=grid)
            assert torch.equal(back, x)


def test_extremes() -> None:
    """The widest range that is finite, subnormal numbers, and both zeros."""
    wide = torch.tensor([-1.7e38, 0.0, 1.7e38])
    assert ops.staircase_quantize(wide, bits=8, group_size=3, dim=0)[0].tolist() == [0, 128, 255]
    tiny = torch.tensor([0.0, 1e-45, 2e-45, 3e-45, 4e-45])
    expected = reference.quantize(tiny, bits=8, group_size=5, dim=0)[0]
    assert torch.equal(ops.staircase_quantize(tiny, bits=8, group_size=5, dim=0)[0], expected)
    zeros = torch.tensor([[-0.0, 0.0, 1.0], [0.0, -0.0, 1.0]])
    lo = ops.staircase_quantize(zeros, bits=8, group_size=3, dim=1)[1]
    assert not lo.signbit().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype) -> None:
    base = torch.randn(4, 90, 3, 66).to(dtype)
    for x in (base.transpose(1, 2), base[:, ::2], base[..., 1:-1], base.movedim(3, 0), base[:1].expand(5, -1, -1, -1),
              base[..., ::3], base.transpose(0, 2)):  # fmt: skip
        for dim in range(4):
            how = {"bits": 4, "group_size": 32, "dim": dim}
            got, expected = (ops.staircase_quantize(each, **how) for each in (x, x.contiguous()))
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a, b) and a.is_contiguous()
            assert torch.equal(
                ops.staircase_dequantize(got[0].transpose(0, 1).contiguous().transpose(0, 1), *got[1:], **how),
                ops.staircase_dequantize(*expected, **how),
            )


@pytest.mark.parametrize("shape, dim", [((0, 5), 0), ((0, 5), 1), ((5, 0), 0), ((5, 0), 1), ((3, 0, 4), 1), ((0,), 0)])
def test_empty(shape: tuple[int, ...], dim: int) -> None:
    codes, lo, hi = ops.staircase_quantize(torch.zeros(shape), bits=4, group_size=2, dim=dim)
    assert codes.shape == shape and codes.dtype == torch.uint8
    groups = list(shape)
    groups[dim] = -(-shape[dim] // 2)
    assert list(lo.shape) == list(hi.shape) == groups
    assert ops.staircase_dequantize(codes, lo, hi, bits=4, group_size=2, dim=dim).shape == shape


def test_threads(threads: None) -> None:
    x = torch.randn(9, 700, 65)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append([ops.staircase_quantize(x, bits=8, group_size=64, dim=d, return_centers=True) for d in (1, 2)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for one, two in zip(results[0], other, strict=True) for a, b in zip(one, two))  # noqa: B905


@pytest.mark.parametrize("dim", [1, 2])
def test_a_group_is_alone(dim: int, isa: str) -> None:
    x = torch.randn(3, 100, 37)
    whole = ops.staircase_quantize(x, bits=8, group_size=16, dim=dim, return_centers=True)
    part = ops.staircase_quantize(x.narrow(dim, 16, 16)[1:2], bits=8, group_size=16, dim=dim, return_centers=True)
    assert torch.equal(whole[0].narrow(dim, 16, 16)[1:2], part[0])
    for a, b in zip(whole[1:], part[1:], strict=True):
        assert torch.equal(a.narrow(dim, 1, 1)[1:2], b)


def test_opcheck_compile_and_vmap() -> None:
    x = torch.randn(3, 70, 5)
    torch.library.opcheck(torch.ops.pycore.staircase_quantize.default, (x, 4, 32, 1, "embedded"))
    results = torch.ops.pycore.staircase_quantize(x, 4, 32, 1, "embedded")
    torch.library.opcheck(torch.ops.pycore.staircase_dequantize.default, (*results, 4, 32, 1, "embedded"))

    def both(x: Tensor, dim: int = 0) -> Tensor:
        how: dict[str, Any] = {"bits": 4, "group_size": 32, "dim": dim}
        return ops.staircase_dequantize(*ops.staircase_quantize(x, return_centers=True, **how), **how)

    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for length in (70, 71, 128):
        y = torch.randn(length, 5)
        assert torch.equal(compiled(y), both(y))
    for at in range(3):
        for dim in (0, 1, -1, -2):
            got = torch.vmap(lambda y, dim=dim: both(y, dim), in_dims=at)(x)
            assert torch.equal(got, torch.stack([both(y, dim) for y in x.unbind(at)]))
    shared = torch.vmap(
        lambda codes: ops.staircase_dequantize(codes, results[1][0], results[2][0], bits=4, group_size=32, dim=0)
    )
    assert torch.equal(shared(results[0])[0], ops.staircase_dequantize(
        results[0][0], results[1][0], results[2][0], bits=4, group_size=32, dim=0))  # fmt: skip


def test_native_face_gives_the_same() -> None:
    x = torch.randn(3, 70, 20)
    for dim in (0, 1, 2):
        how: dict[str, Any] = {"bits": 4, "group_size": 32, "dim": dim}
        ours = native.staircase_quantize(x.numpy(), **how, threads=2)
        theirs = ops.staircase_quantize(x, return_centers=True, **how)
        assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(ours, theirs, strict=True))
        back = native.staircase_dequantize(*ours, **how)
        assert torch.equal(torch.from_numpy(back), ops.staircase_dequantize(*theirs, **how))


def test_requires_grad_is_no_obstacle() -> None:
    x = torch.randn(64, 3, requires_grad=True)
    codes, lo, _ = ops.staircase_quantize(x, bits=4, group_size=64, dim=0)
    assert not lo.requires_grad and codes.shape == x.shape


# ---- errors ----------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 130, 3)


@pytest.mark.parametrize("value, name", [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_names_its_group(value: float, name: str, dtype: torch.dtype, isa: str) -> None:
    x = torch.randn(2, 130, 3).to(dtype)
    x[1, 129, 2] = value
    x[1, 70, 1] = value
    with pytest.raises(ValueError) as error:
        ops.staircase_quantize(x, bits=4, group_size=64, dim=1)
    sentence = f"staircase_quantize: x[1, 70, 1], in group 1 along dim 1, is {name} and must be finite"
    assert str(error.value) == sentence
    with pytest.raises(ValueError, match=r"x\[1, 70, 1\], in group 0 along dim 2, is -?\w+ and must be finite$"):
        ops.staircase_quantize(x, bits=4, group_size=64, dim=-1, grid="minmax")


def test_a_range_that_overflows_names_its_group(isa: str) -> None:
    x = torch.zeros(2, 130, 3)
    x[0, 64, 1], x[0, 100, 1] = 3e38, -3e38
    with pytest.raises(ValueError) as error:
        ops.staircase_quantize(x, bits=4, group_size=64, dim=1)
    assert str(error.value) == (
        "staircase_quantize: x[0, 64:128, 1], group 1 along dim 1, is between -3e+38 and 3e+38, whose difference must "
        "be finite in float32"
    )


@pytest.mark.parametrize(
    "how, kind, sentence",
    [
        ({"bits": 9}, ValueError, "bits is 9 and must be between 1 and 8"),
        ({"bits": 0}, ValueError, "bits is 0 and must be between 1 and 8"),
        ({"group_size": 0}, ValueError, "group_size is 0 and must be at least 1"),
        ({"dim": 3}, IndexError, "dim is 3 and must be between -3 and 2, as x has 3 dimensions"),
        ({"grid": "log"}, ValueError, "grid is 'log' and must be 'embedded' or 'minmax'"),
        ({"grid": 3}, TypeError, "grid is a int and must be a str"),
        ({"bits": True}, TypeError, "bits is a bool and must be an int"),
        ({"group_size": 2.0}, TypeError, "group_size is a float and must be an int"),
        ({"x": X.double()}, ValueError, "x has dtype float64 and must have float32, float16 or bfloat16"),
        ({"x": X.long()}, ValueError, "x has dtype int64 and must have float32, float16 or bfloat16"),
        ({"x": torch.zeros(()), "dim": 0}, ValueError, "x is a scalar and must have a dimension"),
        ({"x": [1.0]}, TypeError, "x is a list and must be a Tensor"),
    ],
)
def test_quantize_refuses(how: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind) as error:
        ops.staircase_quantize(**({"x": X, "bits": 4, "group_size": 64, "dim": 1} | how))  # type: ignore[call-overload]
    assert str(error.value) == f"staircase_quantize: {sentence}"


CODES, LO = torch.zeros(2, 130, dtype=torch.uint8), torch.zeros(2, 3)


@pytest.mark.parametrize(
    "how, sentence",
    [
        ({"codes": CODES.int()}, "codes has dtype int32 and must have uint8"),
        ({"codes": CODES + 16}, "codes holds 16 and must hold no more than 15 with 4 bits"),
        ({"lo": LO[:, :2]}, "lo has shape [2, 2] and must have [2, 3], one for each group of 64"),
        ({"hi": LO.half()}, "hi has dtype float16 and must have float32"),
        ({"hi": LO[0]}, "hi has shape [3] and must have [2, 3], one for each group of 64"),
        ({"centers": LO}, "centers has dtype float32 and must have uint8"),
        ({"lo": LO.double()}, "lo has dtype float64 and must have float32, float16 or bfloat16"),
    ],
)
def test_dequantize_refuses(how: dict[str, Any], sentence: str) -> None:
    given = {"codes": CODES, "lo": LO, "hi": LO, "bits": 4, "group_size": 64, "dim": 1} | how
    with pytest.raises(ValueError) as error:
        ops.staircase_dequantize(**given)
    assert str(error.value) == f"staircase_dequantize: {sentence}"


# ---- rotations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pca", "pca_hadamard", "hadamard"])
@pytest.mark.parametrize("channels", [1, 32, 80, 111])
def test_rotations_are_orthogonal(method: str, channels: int) -> None:
    x = torch.randn(2, 3, 50, channels) @ torch.randn(channels, channels)
    rotation = ops.staircase_rotation(x, method=method)
    assert rotation.shape == (3, channels, channels) and rotation.dtype == torch.float32
    identity = torch.eye(channels, dtype=torch.float64)
    assert (rotation.double() @ rotation.double().mT - identity).abs().max() < 1e-5


def test_pca_finds_the_axes() -> None:
    """Channels become uncorrelated, the largest first, for each head on its own."""
    x = torch.randn(1, 2, 4000, 8, dtype=torch.float64) @ torch.randn(2, 8, 8, dtype=torch.float64)
    rotated = x[0] @ ops.staircase_rotation(x, method="pca").double()
    rotated = rotated - rotated.mean(1, keepdim=True)
    covariance = rotated.mT @ rotated
    variances = covariance.diagonal(dim1=1, dim2=2)
    assert ((covariance - torch.diag_embed(variances)).abs().amax((1, 2)) < 1e-4 * variances[:, 0]).all()
    assert (variances.diff(dim=1) <= 0).all()


@pytest.mark.parametrize(
    "x, method, sentence",
    [
        (torch.randn(2, 3, 4), "pca", "x has shape [2, 3, 4] and must be [batch, kv_heads, tokens, head_dim]"),
        (torch.randn(1, 2, 0, 4), "pca", "x has shape [1, 2, 0, 4] and must have a token to learn from"),
        (torch.full((1, 1, 2, 2), float("nan")), "pca", "x has an element that is not finite and must have none"),
        (torch.zeros(1, 1, 2, 2).long(), "pca", "x has dtype int64 and must be floating point"),
        (torch.zeros(1, 1, 2, 2), "svd", "method is 'svd' and must be 'pca', 'pca_hadamard' or 'hadamard'"),
    ],
)
def test_rotation_refuses(x: Tensor, method: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        ops.staircase_rotation(x, method=method)
    assert str(error.value) == f"staircase_rotation: {sentence}"
