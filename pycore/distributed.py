# SPDX-License-Identifier: Apache-2.0
"""What several processes of torch.distributed compute together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather_rows", "all_reduce_statistics", "is_distributed"]


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


class _AllGatherRows(torch.autograd.Function):
    """The rows of all ranks; a row's gradient is the sum of what every rank makes of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        first = dist.get_rank() * ctx.count
        return grad[first : first + ctx.count]


def all_gather_rows(rows: Tensor) -> Tensor:
    """The rows of every rank, one rank's after the other's, with their gradients.

    Every rank has to call it with rows of the same shape, and to go back through it too. In a single process the rows
    come back as they are.
    """
    gathered: Tensor = _AllGatherRows.apply(rows.contiguous()) if is_distributed() else rows  # type: ignore[no-untyped-call]
    return gathered
