# SPDX-License-Identifier: Apache-2.0
"""Rotation and softcap: what is left of a transformer between attention and linear layers, number by number.

Each is one formula (csrc/include/pycore/linear/pointwise.h), so that a number has the same bits in any company, at any
place in a row, on AVX2 and AVX-512, and compiled or not: torch's cosines differ between instruction sets, and a
compiler that fuses element-wise code in 16 bits leaves roundings out. `torch.ops.pycore` has the ops
(csrc/torch/linear_pointwise.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_bool, check_number
from pycore._tensors import check_devices, check_tensor, graph_numbers
from pycore.ops._autograd import call, no_second_derivative, register_derivatives
from pycore.ops.linear import elementwise, one_by_one

__all__ = ["rotary_tables", "rotate", "softcap"]


def rotary_tables(positions: Tensor, frequencies: Tensor, wide: bool = False) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position times every frequency, with the same bits on every machine.

    Args:
        positions: int64 [...], on the CPU.
        frequencies: float64 [P], radians a position.
        wide: float64 tables in place of float32.

    Returns:
        (cos, sin), float32 [..., P]: the product and its functions are computed in float64, within two units in its
        last place up to angles of 2**29, and rounded once. Not differentiable.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the sentence names it.
        TypeError: an argument that is no tensor, or a `wide` that is no bool.

    Source: Su et al., RoFormer (arXiv 2104.09864).
    """
    check_tensor("rotary_tables", "positions", positions)
    check_tensor("rotary_tables", "frequencies", frequencies)
    check_bool("rotary_tables", "wide", wide)
    return torch.ops.pycore.rotary_tables(positions, frequencies, wide)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Turns channel pairs (i, i + P) of every row by its angle: x[i] cos - x[i + P] sin and x[i + P] cos + x[i] sin.

    Args:
        x: [batch, heads, length, channels], float32, bfloat16, float16 or float64, on the CPU. Any strides; a
            contiguous last dimension is read in place. Channels from 2 P on are left alone.
        cos, sin: [batch or 1, length, P], float32, or float64 where x is: `rotary_tables`.
        inverse: turns back.

    Returns:
        [batch, heads, length, channels], contiguous, of x's dtype; bfloat16 and float16 are computed in float32 and
        rounded once. Differentiable in x, any number of times.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the sentence names it.
        TypeError: an argument that is no tensor, or an `inverse` that is no bool.

    Source: Su et al., RoFormer (arXiv 2104.09864).
    """
    check_tensor("rotate", "x", x)
    check_tensor("rotate", "cos", cos)
    check_tensor("rotate", "sin", sin)
    check_bool("rotate", "inverse", inverse)
    return call(torch.ops.pycore.rotate.default, x, cos, sin, inverse)  # type: ignore[no-any-return]


def softcap(x: Tensor, cap: float) -> Tensor:
    """Caps logits: cap tanh(x / cap), which keeps logits within the cap.

    Args:
        x: [..., C], float32, bfloat16, float16 or float64, on the CPU. Any strides; a contiguous last dimension is read
            in place.
        cap: positive and finite.

    Returns:
        x's shape and dtype, contiguous; bfloat16 and float16 are computed in float32 and rounded once. Differentiable
        once.

    Raises:
        ValueError: a shape, dtype, device or cap that does not fit; the sentence names it.
        TypeError: an x that is no tensor.

    Source: Gemma 2 (arXiv 2408.00118), section 2.
    """
    check_tensor("softcap", "x", x)
    cap = check_number("softcap", "cap", cap)
    if torch.compiler.is_compiling():
        return torch.ops.pycore.softcap(x, 1.0, graph_numbers(cap))
    return call(torch.ops.pycore.softcap.default, x, cap)  # type: ignore[no-any-return]


# ---- fake kernels ----------------------------------------------------------------------------------------------------


@torch.library.register_fake("pycore::rotary_tables")
def _tables_fake(positions: Tensor, frequencies: Tensor, wide: bool = False) -> tuple[Tensor, Tensor]:
    check_devices("rotary_tables", positions=positions, frequencies=frequencies)
    shape = (*positions.shape, frequencies.shape[0])
    dtype = torch.float64 if wide else torch.float32
    return positions.new_empty(shape, dtype=dtype), positions.new_empty(shape, dtype=dtype)


@torch.library.register_fake("pycore::rotate")
def _rotate_fake(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    check_devices("rotate", x=x, cos=cos, sin=sin)
    return x.new_empty(x.shape)


@torch.library.register_fake("pycore::softcap")
def _softcap_fake(x: Tensor, cap: float, numbers: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("pycore::softcap_backward")
def _softcap_backward_fake(grad_out: Tensor, x: Tensor, cap: float, numbers: Tensor | None = None) -> Tensor:
    check_devices("softcap_backward", x=x, grad_out=grad_out)
    return x.new_empty(x.shape)


# ---- autograd and vmap -----------------------------------------------------------------------------------------------


def _rotate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise NotImplementedError("rotate: gradients of cos and sin are not available")
    return torch.ops.pycore.rotate(grad_out, cos, sin, not ctx.inverse), None, None, None


def _rotate_jvp(inputs: Sequence[Any], tangents: list[Tensor | None], output: Tensor) -> Tensor:
    _, cos, sin, inverse = inputs
    if tangents[1] is not None or tangents[2] is not None:
        raise NotImplementedError("rotate: tangents of cos and sin are not available")
    assert tangents[0] is not None
    return torch.ops.pycore.rotate(tangents[0], cos, sin, inverse)


def _softcap_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.cap, numbers = inputs
    ctx.save_for_backward(x, numbers)


def _softcap_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, numbers = ctx.saved_tensors
    return torch.ops.pycore.softcap_backward(grad_out, x, ctx.cap, numbers), None, None


def _softcap_jvp(inputs: Sequence[Any], tangents: list[Tensor | None], output: Tensor) -> Tensor:
    x, cap, numbers = inputs
    assert tangents[0] is not None
    return torch.ops.pycore.softcap_backward(tangents[0], x, cap, numbers)


register_derivatives("rotate", _rotate_backward, _rotate_setup, _rotate_jvp)
register_derivatives("softcap", _softcap_backward, _softcap_setup, _softcap_jvp)
no_second_derivative("softcap_backward", lambda inputs: "softcap")

_ops = torch.ops.pycore
torch.library.register_vmap("pycore::rotary_tables", one_by_one(_ops.rotary_tables))
torch.library.register_vmap("pycore::rotate", one_by_one(_ops.rotate))
torch.library.register_vmap("pycore::softcap", elementwise(_ops.softcap, 1))
torch.library.register_vmap("pycore::softcap_backward", one_by_one(_ops.softcap_backward))
