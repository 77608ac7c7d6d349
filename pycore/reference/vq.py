# SPDX-License-Identifier: Apache-2.0
"""Nearest codes, residual quantization and its statistics in plain torch, for tests and readers; run them in float64.

Here the distances of all rows to all codes do exist.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """Rows of length one; a row of zeros stays."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, x / norm, torch.zeros_like(x))


def distances(x: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
    """Squared distances [..., K] of x [..., D] to codebook [K, D]; for cosine those of the unit vectors."""
    if metric == "cosine":
        x, codebook = unit(x), unit(codebook)
    return (x.unsqueeze(-2) - codebook).square().sum(-1)


def vq_encode(x: Tensor, codebook: Tensor, *, metric: str = "euclidean", topk: int = 1) -> Tensor:
    """The nearest codes, the nearest first, ties to the lowest index.

    Takes x [..., D] and codebook [K, D], or x [..., C, D] and codebook [C, K, D]; gives [..., topk] or [..., C, topk].
    """
    return distances(x, codebook, metric).sort(dim=-1, stable=True).indices[..., :topk]


def rvq_encode(
    x: Tensor, codebooks: Sequence[Tensor], *, metric: str = "euclidean", beam_size: int = 1,
    channel_masks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Codes [..., Q] of x [..., D] in codebooks of [K, D] each: every stage quantizes what the stages before it left.

    The first stages, one for each row of channel_masks [M, D], quantize x times their mask. The others keep the
    beam_size partial reconstructions nearest to x; ties go to the better one so far, then to the lowest code.
    """
    rows = x.reshape(-1, x.shape[-1])
    return torch.stack([_encode_row(row, codebooks, metric, beam_size, channel_masks) for row in rows]).reshape(
        *x.shape[:-1], len(codebooks)
    )


def _encode_row(
    x: Tensor, codebooks: Sequence[Tensor], metric: str, beam_size: int, channel_masks: Tensor | None
) -> Tensor:
    masks = [] if channel_masks is None else list(channel_masks.to(x.dtype))[: len(codebooks)]
    residual, codes = x, []
    for mask, codebook in zip(masks, codebooks, strict=False):
        codes.append(int(vq_encode(x * mask, codebook, metric=metric)))
        residual = residual - codebook[codes[-1]]
    beams = [(residual, codes)]
    for codebook in codebooks[len(masks) :]:
        scores = torch.cat([distances(left, codebook, metric) for left, _ in beams])
        order = scores.sort(stable=True).indices[:beam_size].tolist()
        pairs = [divmod(flat, len(codebook)) for flat in order]
        beams = [(beams[beam][0] - codebook[code], [*beams[beam][1], code]) for beam, code in pairs]
    return torch.tensor(beams[0][1], dtype=torch.int64)


def rvq_decode(codes: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """The sum of the codes' vectors: codes [..., n], n <= Q, give [..., D]. Code -1 stands for zeros."""
    out = codebooks[0].new_zeros(*codes.shape[:-1], codebooks[0].shape[-1])
    for stage, codebook in zip(codes.unbind(-1), codebooks, strict=False):
        out = out + torch.where(stage.unsqueeze(-1) < 0, 0.0, codebook[stage.clamp(min=0)])
    return out


def vq_statistics(x: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many rows of x [..., D] have each code, [K], and their sums, [K, D]. Code -1 counts nowhere."""
    rows, codes = x.reshape(-1, x.shape[-1]), codes.reshape(-1)
    one_hot = (codes.unsqueeze(-1) == torch.arange(codebook_size)).to(x.dtype)
    return one_hot.sum(0), one_hot.T @ rows


def vq_rotate(v: Tensor, x: Tensor, code: Tensor, *, transpose: bool = False) -> Tensor:
    """V [..., D] turned and scaled as x is onto code: the rotation trick's linear map, with its matrix written out."""
    least = 1e-6
    u = (x / x.norm(dim=-1, keepdim=True).clamp(min=least)).unsqueeze(-1)
    q = (code / code.norm(dim=-1, keepdim=True).clamp(min=least)).unsqueeze(-1)
    w = (u + q) / (u + q).norm(dim=-2, keepdim=True).clamp(min=least)
    ratio = code.norm(dim=-1) / x.norm(dim=-1).clamp(min=least)
    matrix = torch.eye(x.shape[-1], dtype=x.dtype) - 2 * w @ w.mT + 2 * q @ u.mT
    return ratio.unsqueeze(-1) * ((matrix.mT if transpose else matrix) @ v.unsqueeze(-1)).squeeze(-1)
