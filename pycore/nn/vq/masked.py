# SPDX-License-Identifier: Apache-2.0
"""Residual quantization whose first codebooks see a band of channels each: Language-Codec's MCRVQ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycore.nn.vq.residual import ResidualVQ

__all__ = ["MaskedChannelRVQ", "channel_bands"]


def channel_bands(dim: int, bands: int) -> Tensor:
    """Bool [bands, dim]: band i holds channels i * dim // bands to (i + 1) * dim // bands - 1."""
    channel, edges = torch.arange(dim), [i * dim // bands for i in range(bands + 1)]
    return torch.stack([(channel >= low) & (channel < high) for low, high in zip(edges, edges[1:], strict=False)])


class MaskedChannelRVQ(ResidualVQ):
    """`ResidualVQ` whose first `masked_quantizers` stages quantize x with all channels but their band set to zero.

    They see x and not each other, with codes of full width; what they leave of x together is quantized by the other
    stages as usual. So the first codebook carries less of the signal. `encode` gives the codes that forward gives.

    Args:
        dim: channels of the input.
        num_quantizers: how many stages, masked ones and others.
        codebook_size: codes of every stage, or a tuple with those of each.
        masked_quantizers: how many stages have a band; the bands are equal parts of the channels.
        channel_masks: bool or float [M, codebook_dim] instead, for the first M stages.
        **kwargs: what `ResidualVQ` takes. Quantizer dropout keeps the masked stages.

    Source: Ji et al., "Language-Codec".
    """

    def __init__(
        self, *, dim: int, num_quantizers: int | None = 8, codebook_size: int | tuple[int, ...] = 1024,
        masked_quantizers: int = 3, channel_masks: Tensor | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if isinstance(codebook_size, tuple):
            num_quantizers = len(codebook_size)
        inner = kwargs.get("codebook_dim") or dim
        if channel_masks is None:
            if not 1 <= masked_quantizers <= min(inner, num_quantizers or 1):
                raise ValueError(
                    f"MaskedChannelRVQ: masked_quantizers is {masked_quantizers} and must be 1 to "
                    f"{min(inner, num_quantizers or 1)}, the quantizers and channels there are"
                )
            channel_masks = channel_bands(inner, masked_quantizers)
        elif channel_masks.dim() != 2 or channel_masks.shape[1] != inner or len(channel_masks) > (num_quantizers or 0):
            raise ValueError(
                f"MaskedChannelRVQ: channel_masks has shape {list(channel_masks.shape)} and must have [at most "
                f"{num_quantizers}, {inner}]"
            )
        kwargs.setdefault("quantize_dropout_cutoff_index", max(len(channel_masks) - 1, 0))
        super().__init__(dim=dim, num_quantizers=num_quantizers, codebook_size=codebook_size, **kwargs)
        if self.quantize_dropout_cutoff_index < len(channel_masks) - 1:
            raise ValueError(
                f"MaskedChannelRVQ: quantize_dropout_cutoff_index is {self.quantize_dropout_cutoff_index} and must be "
                f"at least {len(channel_masks) - 1}, the last masked stage"
            )
        self.register_buffer("_masks", channel_masks.float(), persistent=False)

    @property
    def channel_masks(self) -> Tensor:
        """[M, codebook_dim]: what the first M stages see of x."""
        masks: Tensor = self.get_buffer("_masks")
        return masks.float()
