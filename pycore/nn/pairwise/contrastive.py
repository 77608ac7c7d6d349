# SPDX-License-Identifier: Apache-2.0
"""A contrastive loss with a learned temperature, over the batch of one process or of all."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pycore._checks import check_bool, check_number
from pycore._tensors import check_tensor
from pycore.distributed import all_gather_rows, is_distributed
from pycore.ops import contrastive_loss
from pycore.ops._pairwise import unit_rows, widened

__all__ = ["ContrastiveLoss"]


class ContrastiveLoss(nn.Module):
    """InfoNCE between two views of a batch, as CLIP has it: cosines times a learned scale, in both directions.

    Nothing of size N x M exists, so the batch may be as large as its rows fit (:func:`pycore.ops.contrastive_loss`).

    Args:
        scale: what cosines are multiplied with in the beginning, the inverse of the temperature.
        learned: whether the scale is learned, by its logarithm (the parameter ``log_scale``; a buffer otherwise).
        largest: the scale never exceeds it, nor learns beyond it.
        normalize: whether rows are divided by their length first; otherwise they are taken as they are.
        symmetric: whether the rows of b are compared with all of a too.
        gather: whether rows are compared with those of all ranks of torch.distributed. The loss is then that of the
            rank's own rows, and its mean over ranks that of the whole batch; so are the gradients, averaged over ranks
            as DistributedDataParallel does. Every rank must have as many rows.

    Example:
        >>> loss = ContrastiveLoss()
        >>> loss(images, texts).backward()  # [batch, channels] each

    Raises:
        ValueError: a number that does not fit; in ``forward``, a shape, dtype or device.
        TypeError: an argument of the wrong type.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP).
    """

    log_scale: Tensor

    def __init__(
        self, *, scale: float = 1 / 0.07, learned: bool = True, largest: float = 100.0, normalize: bool = True,
        symmetric: bool = True, gather: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        op = "ContrastiveLoss"
        scale, largest = check_number(op, "scale", scale), check_number(op, "largest", largest)
        if not 0 < scale < math.inf:
            raise ValueError(f"{op}: scale is {scale} and must be finite and more than 0")
        if not scale <= largest:
            raise ValueError(f"{op}: largest is {largest} and must be at least scale's {scale}")
        for name, flag in (
            ("learned", learned), ("normalize", normalize), ("symmetric", symmetric), ("gather", gather),
        ):  # fmt: skip
            check_bool(op, name, flag)
        start = torch.tensor(math.log(scale))
        if learned:
            self.log_scale = nn.Parameter(start)
        else:
            self.register_buffer("log_scale", start)
        self.largest, self.normalize, self.symmetric, self.gather = largest, normalize, symmetric, gather

    def scale(self) -> Tensor:
        """What cosines are multiplied with now, a tensor of no dimensions."""
        log_scale = self.log_scale if self.log_scale.dtype == torch.float64 else self.log_scale.float()
        return log_scale.clamp(max=math.log(self.largest)).exp()

    def forward(self, a: Tensor, b: Tensor, *, positives: Tensor | None = None) -> Tensor:
        """The mean over the rows of a (and of b) that have a positive.

        Args:
            a: ``[..., N, D]``, float32, bfloat16 or float16; float64 runs plain loops.
            b: ``[..., M, D]``, with M = N unless positives are given.
            positives: int64 ``[..., N]``, the row of b that belongs to each row of a, -1 for none; None for the same
                row. Not with rows of other ranks.
        """
        op = "ContrastiveLoss"
        a, b = widened(op, a=a, b=b)
        check_tensor(op, "positives", positives, optional=True)
        if self.normalize:
            a, b = unit_rows(a), unit_rows(b)
        scale = self.scale().to(a.dtype)
        if not (self.gather and is_distributed()):
            return contrastive_loss(a, b, scale=scale, symmetric=self.symmetric, positives=positives)
        if positives is not None:
            raise ValueError(f"{op}: positives are given and must be None with rows of other ranks")
        if a.dim() != 2 or a.shape != b.shape:
            raise ValueError(f"{op}: b has shape {list(b.shape)} and must have a's {list(a.shape)}, [rows, channels]")
        own = torch.arange(a.shape[0], device=a.device) + dist.get_rank() * a.shape[0]
        loss = contrastive_loss(a, all_gather_rows(b), scale=scale, symmetric=False, positives=own)
        if self.symmetric:
            back = contrastive_loss(b, all_gather_rows(a), scale=scale, symmetric=False, positives=own)
            loss = (loss + back) / 2
        return loss

    def extra_repr(self) -> str:
        """What print shows of it."""
        return f"largest={self.largest:g}, normalize={self.normalize}, symmetric={self.symmetric}, gather={self.gather}"
