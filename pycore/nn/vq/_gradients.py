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

from pycore import ops

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
        return ops.vq_rotate(grad, x, code, transpose=True), None


def straight_through(x: Tensor, code: Tensor) -> Tensor:
    """The code, with the gradient of x."""
    result: Tensor = _StraightThrough.apply(x, code.detach())
    return result


def rotate_to(x: Tensor, code: Tensor) -> Tensor:
    """The code, with the gradient of x turned and scaled onto it (Fifty et al., arXiv 2410.06424, section 4.2)."""
    code = code.detach()
    if torch.compiler.is_compiling():  # which does not follow the function's saved tensors everywhere
        rotated = ops.vq_rotate(x, x.detach(), code)
        return code + (rotated - rotated.detach())
    result: Tensor = _RotateTo.apply(x, code)
    return result


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
