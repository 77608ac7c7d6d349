# SPDX-License-Identifier: Apache-2.0
"""A frozen encoder's features looked up as keys, and only the values learned: the discrete key-value bottleneck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pycore import ops
from pycore.nn.vq._arguments import check_floating
from pycore.nn.vq.quantize import VectorQuantize

__all__ = ["DiscreteKeyValueBottleneck"]


class DiscreteKeyValueBottleneck(nn.Module):
    """Random projections of x, each to its nearest key, each key to its value; values are averaged.

    Learning a class moves the values of the keys that its inputs hit, and leaves the others as they are: what was
    learned before stays. Arguments are those of discrete-key-value-bottleneck-pytorch.

    Args:
        dim: channels of a key.
        num_memories: keys, and values, of a codebook.
        dim_embed: channels of the input; default dim.
        num_memory_codebooks: how many codebooks.
        encoder: applied to the input first, without gradients.
        dim_memory: channels of a value; default dim.
        average_pool_memories: the mean over codebooks; else [b, n, num_memory_codebooks, dim_memory].
        **kwargs: what `VectorQuantize` takes, for the keys: they learn by moving averages in training mode, until
            `freeze_keys()`.

    Source: Träuble et al., "Discrete Key-Value Bottleneck". Values start at zero, as there.
    """

    def __init__(
        self, dim: int, *, num_memories: int, dim_embed: int | None = None, num_memory_codebooks: int = 1,
        encoder: nn.Module | Callable[[Tensor], Tensor] | None = None, dim_memory: int | None = None,
        average_pool_memories: bool = True, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = encoder
        self.dim_embed, self.num_memory_codebooks = dim if dim_embed is None else dim_embed, num_memory_codebooks
        self.average_pool_memories = average_pool_memories
        self.vq = VectorQuantize(
            dim * num_memory_codebooks, num_memories, codebook_dim=dim, heads=num_memory_codebooks,
            separate_codebook_per_head=True, **kwargs,
        )  # fmt: skip
        projections = torch.empty(num_memory_codebooks, self.dim_embed, dim)
        for projection in projections:
            nn.init.xavier_normal_(projection)
        self.register_buffer("rand_proj", projections)
        self.values = nn.Parameter(
            torch.zeros(num_memory_codebooks, num_memories, dim if dim_memory is None else dim_memory)
        )

    def freeze_keys(self, frozen: bool = True) -> None:
        """Keys learn no more, or again."""
        self.vq.freeze_codebook = frozen

    def forward(
        self, x: Tensor, return_intermediates: bool = False, average_pool_memories: bool | None = None, **kwargs: Any
    ) -> Any:
        """X [b, n, dim_embed] gives [b, n, dim_memory]; with return_intermediates, also what `VectorQuantize` gave."""
        if self.encoder is not None:
            with torch.no_grad():
                x = self.encoder(x).detach()
        check_floating("DiscreteKeyValueBottleneck", x)
        if x.dim() != 3 or x.shape[-1] != self.dim_embed:
            raise ValueError(
                f"DiscreteKeyValueBottleneck: x has shape {list(x.shape)} and must have [batch, length, "
                f"{self.dim_embed}]"
            )
        projections = self.get_buffer("rand_proj").to(x.dtype)
        keys = torch.einsum("bnd,cde->bnce", x, projections).flatten(2)
        result = self.vq(keys, **kwargs)
        codes = result[1] if self.num_memory_codebooks > 1 else result[1].unsqueeze(-1)
        pooled = self.average_pool_memories if average_pool_memories is None else average_pool_memories
        if pooled:
            memories = ops.rvq_decode(codes, self.values) / self.num_memory_codebooks
        else:
            each = [
                ops.rvq_decode(codes[..., c, None], self.values[c : c + 1]) for c in range(self.num_memory_codebooks)
            ]
            memories = torch.stack(each, dim=-2)
        return (memories, result) if return_intermediates else memories
