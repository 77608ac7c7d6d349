# SPDX-License-Identifier: Apache-2.0
"""The channels in groups, each with residual quantization of its own: vector-quantize-pytorch's GroupedResidualVQ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pycore.nn.vq._arguments import check_floating
from pycore.nn.vq.residual import ResidualVQ, synchronized_seed

__all__ = ["GroupedResidualVQ"]


class GroupedResidualVQ(nn.Module):
    """`groups` times `ResidualVQ`, each for its part of the channels.

    Args:
        dim: channels of the input, a multiple of groups.
        groups: how many.
        accept_image_fmap: inputs [b, d, h, w].
        **kwargs: what `ResidualVQ` takes.

    Source: Yang et al., "HiFi-Codec".
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"GroupedResidualVQ: groups is {groups} and must divide dim, {dim}")
        self.dim, self.groups, self.accept_image_fmap = dim, groups, accept_image_fmap
        each = dim // groups
        self.rvqs = nn.ModuleList(
            ResidualVQ(dim=each, accept_image_fmap=accept_image_fmap, **kwargs) for _ in range(groups)
        )

    @property
    def _groups(self) -> list[ResidualVQ]:
        return list(self.rvqs)  # type: ignore[arg-type]

    @property
    def codebooks(self) -> Tensor:
        """[groups, Q, K, codebook_dim]."""
        return torch.stack([rvq.codebooks for rvq in self._groups])  # type: ignore[misc]

    @property
    def split_dim(self) -> int:
        """Where the channels are."""
        return 1 if self.accept_image_fmap else -1

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The vectors of each stage, [groups, Q, ..., codebook_dim]."""
        self._check_groups(indices)
        return torch.stack([rvq.get_codes_from_indices(i) for rvq, i in zip(self._groups, indices, strict=True)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What forward gives in eval mode for these codes, [groups, ..., Q]; channels come last."""
        self._check_groups(indices)
        return torch.cat([rvq.get_output_from_indices(i) for rvq, i in zip(self._groups, indices, strict=True)], dim=-1)

    def _check_groups(self, indices: Tensor) -> None:
        if len(indices) != self.groups:
            raise ValueError(f"GroupedResidualVQ: indices has {len(indices)} groups and must have {self.groups}")

    def forward(
        self, x: Tensor, indices: None = None, return_all_codes: bool = False, sample_codebook_temp: None = None,
        freeze_codebook: bool | None = None, mask: Tensor | None = None, lens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """As `ResidualVQ`: the quantized x, codes [groups, b, n, Q], losses [groups, Q]."""
        check_floating("GroupedResidualVQ", x)
        wanted = 4 if self.accept_image_fmap else 3
        if x.dim() != wanted:
            raise ValueError(f"GroupedResidualVQ: x has shape {list(x.shape)} and must have {wanted} dimensions")
        if x.shape[self.split_dim] != self.dim:
            raise ValueError(f"GroupedResidualVQ: x has {x.shape[self.split_dim]} channels and must have {self.dim}")
        seed = synchronized_seed(x.device) if self.training else None
        results = [
            rvq(part, mask=mask, lens=lens, indices=indices, return_all_codes=return_all_codes,
                freeze_codebook=freeze_codebook, sample_codebook_temp=sample_codebook_temp,
                rand_quantize_dropout_fixed_seed=seed)
            for rvq, part in zip(self._groups, x.chunk(self.groups, dim=self.split_dim), strict=True)
        ]  # fmt: skip
        quantized, *others = zip(*results, strict=True)
        return (torch.cat(quantized, dim=self.split_dim), *(torch.stack(other) for other in others))
