# SPDX-License-Identifier: Apache-2.0
"""Linear layer and RMS norm in plain torch, for tests and readers; run them in float64."""

from __future__ import annotations

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
