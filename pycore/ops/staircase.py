# SPDX-License-Identifier: Apache-2.0
"""Group quantization on an embedded grid: the codes of fewer bits are the leading bits of those of more.

`torch.ops.pycore` has the ops (csrc/torch/staircase.cpp), which run csrc/cpu/staircase/dispatch.cpp. The grid is
written down in csrc/include/pycore/staircase/grid.h, and docs/ops/staircase.md says how good it is.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from pycore._checks import check_bool, check_int, check_str
from pycore._load import load_ops
from pycore._tensors import check_devices, check_tensor

load_ops()

__all__ = ["staircase_dequantize", "staircase_quantize", "staircase_rotation"]


@overload
def staircase_quantize(
    x: Tensor, *, bits: int, group_size: int, dim: int, grid: str = ..., return_centers: Literal[False] = ...
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def staircase_quantize(
    x: Tensor, *, bits: int, group_size: int, dim: int, grid: str = ..., return_centers: bool
) -> tuple[Tensor, ...]: ...
def staircase_quantize(
    x: Tensor, *, bits: int, group_size: int, dim: int, grid: str = "embedded", return_centers: bool = False
) -> tuple[Tensor, ...]:
    """Quantizes every group of `group_size` neighbours along `dim` between its least and its greatest element.

    The embedded grid: with place = (x - lo) / (hi - lo), the code of 8 bits is clamp(floor(256 place), 0, 255), and
    that of b bits its first b bits, ``codes >> (8 - b)``: quantizing coarsely and dropping bits are the same.

    Args:
        x: float32, float16 or bfloat16, on the CPU. Any strides; a contiguous last dimension is read in place.
        bits: 1 to 8, of a code.
        group_size: at least 1. The last group of a row may be shorter.
        dim: along which the groups run.
        grid: "embedded", or "minmax", KIVI's: code = round((x - lo) / ((hi - lo) / (2^bits - 1))).
        return_centers: whether the centers come too.

    Returns:
        codes: uint8, x's shape, contiguous.
        lo, hi: elements of x, in its dtype, one for each group: x's shape with ceil(length / group_size) along `dim`.
        centers: uint8 like lo, if asked for: where in its cell of width (hi - lo) / 2^bits a group's elements lie on
            average, in 256ths. 128 is the middle. They make lo + (code + center / 256) (hi - lo) / 2^bits right on
            average, where an outlier leaves most elements at one end of their cells.

    A group whose elements are all equal has codes 0 and is kept exactly. A minus zero comes back as zero. No gradient
    passes through.

    Raises:
        ValueError: an element is NaN or infinite, or hi - lo is infinite in float32; the sentence names the group. Or
            an argument that does not fit.
        IndexError: a dim that x does not have.
        TypeError: an argument of another type.

    Example:
        >>> x = torch.randn(2, 130, 64)
        >>> codes, lo, hi = pycore.ops.staircase_quantize(x, bits=8, group_size=64, dim=1)   # lo: [2, 3, 64]
        >>> four, _, _ = pycore.ops.staircase_quantize(x, bits=4, group_size=64, dim=1)
        >>> torch.equal(codes >> 4, four)
        True

    Source: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI", and
    Liu et al., "KIVI".
    """
    op = "staircase_quantize"
    check_tensor(op, "x", x)
    _check_numbers(op, bits, group_size, dim, grid)
    check_bool(op, "return_centers", return_centers)
    results: tuple[Tensor, ...] = torch.ops.pycore.staircase_quantize(x.detach(), bits, group_size, dim, grid)
    return results if return_centers else results[:3]


def staircase_dequantize(
    codes: Tensor,
    lo: Tensor,
    hi: Tensor,
    centers: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    dim: int,
    grid: str = "embedded",
) -> Tensor:
    """What the codes of `staircase_quantize` stand for: lo + (code + center / 256) (hi - lo) / 2^bits.

    Args:
        codes: uint8, each below 2^bits.
        lo, hi: float32, float16 or bfloat16, one element for each group of codes.
        centers: uint8 like lo, or None for 128, the middle of a cell. Those of the same width: each width has its own.
        bits, group_size, dim, grid: as for `staircase_quantize`. The min-max grid, lo + code (hi - lo) / (2^bits - 1),
            takes no notice of centers.

    Returns:
        codes' shape, in lo's dtype, computed in float32.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a code past 2^bits - 1; the sentence names it.
        IndexError: a dim that codes does not have.
        TypeError: an argument of another type.
    """
    op = "staircase_dequantize"
    for name, tensor in (("codes", codes), ("lo", lo), ("hi", hi)):
        check_tensor(op, name, tensor)
    check_tensor(op, "centers", centers, optional=True)
    _check_numbers(op, bits, group_size, dim, grid)
    result: Tensor = torch.ops.pycore.staircase_dequantize(
        codes, lo.detach(), hi.detach(), centers, bits, group_size, dim, grid
    )
    return result


def _check_numbers(op: str, bits: Any, group_size: Any, dim: Any, grid: Any) -> None:
    check_int(op, "bits", bits)
    check_int(op, "group_size", group_size)
    check_int(op, "dim", dim)
    check_str(op, "grid", grid)


def hadamard(channels: int) -> Tensor:
    """float64 [channels, channels], orthogonal: Sylvester's matrix, in blocks of channels' largest power of two."""
    block = channels & -channels
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / block**0.5] * (channels // block))


def staircase_rotation(x: Tensor, *, method: str = "pca_hadamard") -> Tensor:
    """An orthogonal matrix for each KV head, learned from captured keys or values, for `Staircase`'s rotations.

    Args:
        x: [batch, kv_heads, tokens, head_dim], floating point; keys as they are cached, after RoPE.
        method: "pca_hadamard": the principal axes of each head's tokens, spread evenly over all channels; for either
            side. "pca": the axes alone, the largest first: channels are uncorrelated, which helps some keys and makes
            values worse, whose channels share a range. "hadamard": spread, with no look at x.

    Returns:
        float32 [kv_heads, head_dim, head_dim]; a token is rotated as x[b, h] @ rotation[h].

    Raises:
        ValueError: x has another shape or dtype, no token, or an element that is not finite; or an unknown method.
        TypeError: an argument of another type.
    """
    op = "staircase_rotation"
    check_tensor(op, "x", x)
    check_str(op, "method", method)
    if method not in ("pca", "pca_hadamard", "hadamard"):
        raise ValueError(f"{op}: method is {method!r} and must be 'pca', 'pca_hadamard' or 'hadamard'")
    if x.dim() != 4 or x.shape[1] == 0 or x.shape[3] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)} and must be [batch, kv_heads, tokens, head_dim]")
    if not x.is_floating_point():
        raise ValueError(f"{op}: x has dtype {str(x.dtype)[6:]} and must be floating point")
    heads, channels = x.shape[1], x.shape[3]
    spread = hadamard(channels).to(x.device)
    if method == "hadamard":
        return spread.float().expand(heads, -1, -1).clone()
    rows = x.detach().double().transpose(0, 1).reshape(heads, -1, channels)
    if rows.shape[1] == 0:
        raise ValueError(f"{op}: x has shape {list(x.shape)} and must have a token to learn from")
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{op}: x has an element that is not finite and must have none")
    rows = rows - rows.mean(1, keepdim=True)
    largest = rows.abs().amax((1, 2), keepdim=True)
    rows = rows / torch.where(largest > 0, largest, 1.0)  # whose squares neither overflow nor vanish
    axes = torch.linalg.eigh(rows.transpose(1, 2) @ rows).eigenvectors.flip(-1)
    # An axis has no sign of its own: the largest component is made positive.
    peak = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * torch.where(peak < 0, -1.0, 1.0)
    return (axes if method == "pca" else axes @ spread).float()


# ---- fake kernels and vmap -------------------------------------------------------------------------------------------


@torch.library.register_fake("pycore::staircase_quantize")
def _quantize_fake(x: Tensor, bits: int, group_size: int, dim: int, grid: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"staircase_quantize: dim is {dim} and must be between {-x.dim()} and {x.dim() - 1}")
    groups = list(x.shape)
    groups[dim] = (groups[dim] + group_size - 1) // group_size
    codes, lo, hi = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(groups), x.new_empty(groups)
    return codes, lo, hi, x.new_empty(groups, dtype=torch.uint8)


@torch.library.register_fake("pycore::staircase_dequantize")
def _dequantize_fake(
    codes: Tensor, lo: Tensor, hi: Tensor, centers: Tensor | None, bits: int, group_size: int, dim: int, grid: str
) -> Tensor:
    check_devices("staircase_dequantize", codes=codes, lo=lo, hi=hi, centers=centers)
    return lo.new_empty(codes.shape)


def _quantize_vmap(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, bits: int, group_size: int, dim: int, grid: str
) -> tuple[Any, Any]:
    """A batch is one more dimension, in front."""
    assert in_dims[0] is not None
    moved = x.movedim(in_dims[0], 0)
    if not 1 - moved.dim() <= dim < moved.dim() - 1:  # of the sample, whose own error it is
        return torch.ops.pycore.staircase_quantize(moved[0], bits, group_size, dim, grid), (None,) * 4
    return torch.ops.pycore.staircase_quantize(moved, bits, group_size, dim if dim < 0 else dim + 1, grid), (0,) * 4


def _dequantize_vmap(
    info: Any, in_dims: tuple[int | None, ...], codes: Tensor, lo: Tensor, hi: Tensor, centers: Tensor | None,
    bits: int, group_size: int, dim: int, grid: str,
) -> tuple[Any, Any]:  # fmt: skip
    def front(x: Tensor | None, at: int | None) -> Tensor | None:
        if x is None:
            return None
        return x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)

    codes, lo, hi, centers = (front(*each) for each in zip((codes, lo, hi, centers), in_dims, strict=False))  # type: ignore[assignment]
    if not 1 - codes.dim() <= dim < codes.dim() - 1:
        sample = (codes[0], lo[0], hi[0], None if centers is None else centers[0])
        return torch.ops.pycore.staircase_dequantize(*sample, bits, group_size, dim, grid), None
    shifted = dim if dim < 0 else dim + 1
    return torch.ops.pycore.staircase_dequantize(codes, lo, hi, centers, bits, group_size, shifted, grid), 0


torch.library.register_vmap("pycore::staircase_quantize", _quantize_vmap)
torch.library.register_vmap("pycore::staircase_dequantize", _dequantize_vmap)
