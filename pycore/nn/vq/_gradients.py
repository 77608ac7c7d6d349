# SPDX-License-Identifier: Apache-2.0
"""How a gradient gets past a code: the rotation trick, straight through, along a noisy direction.

The forward value of the first two is the code itself, to the bit; only the gradient is made up.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["directional", "partial_gradient", "rotate_to", "straight_through"]

_LEAST = 1e-6  # a length below this is none, as in vector-quantize-pytorch


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, code: Tensor) -> Tensor:
        return code.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _RotateTo(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, code: Tensor) -> Tensor:
        return code.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, code = (saved.detach() for saved in ctx.saved_tensors)
        x_norm, code_norm = (t.norm(dim=-1, keepdim=True) for t in (x, code))
        # With u and q of length one along x and the code and w halfway between, g - 2 (g w) w + 2 (g q) u, as sums of
        # whole rows times numbers.
        x_scale, code_scale = x_norm.clamp(min=_LEAST).reciprocal(), code_norm.clamp(min=_LEAST).reciprocal()
        halfway = torch.addcmul(x * x_scale, code, code_scale)
        square = halfway.norm(dim=-1, keepdim=True).clamp(min=_LEAST).square()
        ratio = code_norm * x_scale
        along_half = (grad * halfway).sum(-1, keepdim=True) * (-2 * ratio) / square
        along_x = (grad * code).sum(-1, keepdim=True) * (2 * ratio) * code_scale * x_scale
        return torch.addcmul(torch.addcmul(grad * ratio, halfway, along_half), x, along_x), None


def straight_through(x: Tensor, code: Tensor) -> Tensor:
    """The code, with the gradient of x."""
    result: Tensor = _StraightThrough.apply(x, code.detach())
    return result


def rotate_to(x: Tensor, code: Tensor) -> Tensor:
    """The code, with the gradient of x turned and scaled onto it (Fifty et al., arXiv 2410.06424, section 4.2)."""
    code = code.detach()
    if torch.compiler.is_compiling():  # which does not follow the function's saved tensors everywhere
        rotated = _rotated(x, code)
        return code + (rotated - rotated.detach())
    result: Tensor = _RotateTo.apply(x, code)
    return result


def _rotated(x: Tensor, code: Tensor) -> Tensor:
    """The code within rounding, as a linear map of x whose numbers are fixed."""
    x_norm, code_norm = (t.detach().norm(dim=-1, keepdim=True) for t in (x, code))
    u, q = x.detach() / x_norm.clamp(min=_LEAST), code / code_norm.clamp(min=_LEAST)
    w = F.normalize(u + q, dim=-1, eps=_LEAST)
    turned = x - 2 * (x * w).sum(-1, keepdim=True) * w + 2 * (x * u).sum(-1, keepdim=True) * q
    return turned * (code_norm / x_norm.clamp(min=_LEAST))


def directional(x: Tensor, code: Tensor, variance: float) -> Tensor:
    """X moved by its distance to the code, in the code's direction with noise (DiVeQ); the codebook learns from it."""
    error = code - x
    noisy = error + math.sqrt(variance) * torch.randn_like(error)
    direction = F.normalize(noisy, dim=-1, eps=_LEAST).detach()
    return x + direction * error.norm(dim=-1, keepdim=True)


def partial_gradient(x: Tensor, fraction: float) -> Tensor:
    """The value of x with that fraction of its gradient."""
    if fraction == 0.0 or not x.requires_grad:
        return x.detach()
    return x if fraction == 1.0 else x.detach() + fraction * (x - x.detach())
