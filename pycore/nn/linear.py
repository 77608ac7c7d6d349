# SPDX-License-Identifier: Apache-2.0
"""The layers between attention: a projection and a norm whose rows have the same bits in any batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pycore import ops


class Projection(nn.Module):
    """``x W^T`` and, if asked for, a bias, row by row the same bits: ``[..., inputs]`` to ``[..., outputs]``."""

    def __init__(self, inputs: int, outputs: int, *, gain: float = 1.0, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * (gain / math.sqrt(inputs)))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.invariant_linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Division by the root mean square of the last dimension, times a learned weight."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)
