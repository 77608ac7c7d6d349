# SPDX-License-Identifier: Apache-2.0
"""Linear layer, norms and gated activations in plain torch, for tests and readers; run them in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Takes x [..., K], weight [N, K], bias [N]; gives [..., N]."""
    out = x @ weight.T
    return out if bias is None else out + bias


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Takes x [..., C], weight [C]; gives [..., C]."""
    out = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return out if weight is None else out * weight


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Takes x [..., C], weight [C], bias [C]; gives [..., C]."""
    deviation = x - x.mean(dim=-1, keepdim=True)
    out = deviation * torch.rsqrt(deviation.square().mean(dim=-1, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Takes gate and up of one shape."""
    return gate * torch.sigmoid(gate) * up


def gelu_mul(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """Takes gate and up of one shape. 1 + erf(-x) is erfc(x), which keeps what is left of it far out."""
    if approximate == "tanh":
        return gate * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)) * up
    return gate * torch.special.erfc(gate * -math.sqrt(0.5)) / 2 * up
