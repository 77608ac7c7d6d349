# SPDX-License-Identifier: Apache-2.0
"""What several processes of torch.distributed compute together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_reduce_statistics", "is_distributed"]


def is_distributed() -> bool:
    """Whether there is more than one process to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_statistics(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums over all ranks, in one collective, of tensors whose shapes are the same on every rank.

    Every rank has to call it as often as the others do, one that has nothing to add with zeros: shapes never depend on
    how many rows a rank has, so that uneven batches and empty ones cannot make it wait. In a single process the tensors
    come back as they are.
    """
    if not is_distributed():
        return tensors
    flat = torch.cat([tensor.detach().reshape(-1).to(torch.float64) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return tuple(part.reshape(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True))
