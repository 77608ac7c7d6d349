# SPDX-License-Identifier: Apache-2.0
"""Linear layer, norms, gated activations, rotation and softcap in plain torch; run them in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Takes x [..., K], weight [N, K], bias [N]; gives [..., N]."""
    out = x @ weight.T
    return out if bias is None else out + bias


def invariant_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Tensor:
    """Takes x [..., K], weights [N_i, K], biases [N_i]; gives [..., N_1 + N_2 + ...]."""
    return invariant_linear(x, torch.cat(list(weights)), None if biases is None else torch.cat(list(biases)))


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, plus_one: bool = False) -> Tensor:
    """Takes x [..., C], weight [C]; gives [..., C]."""
    out = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return out if weight is None else out * (weight + 1 if plus_one else weight)


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


def rotary_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Takes positions [...], frequencies [P]; gives two of [..., P]."""
    angle = positions[..., None] * frequencies
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Takes x [B, H, L, C], cos and sin [B or 1, L, P]; gives [B, H, L, C]."""
    pairs = cos.shape[-1]
    cos, sin = cos[:, None], -sin[:, None] if inverse else sin[:, None]
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def softcap(x: Tensor, cap: float) -> Tensor:
    """Takes x of any shape."""
    return cap * torch.tanh(x / cap)
