# SPDX-License-Identifier: Apache-2.0
"""Tables and biases by which attention learns where a key stands."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["alibi_slopes", "rope_tables", "t5_bias"]


def rope_tables(
    n: int, dim: int, *, theta: float = 10000.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotary tables: row d holds the cosines and sines of d * theta^(-2i/dim), i < dim/2.

    Attention rotates by distance, relative to a tile of keys, so the table has to reach the largest distance that
    is not cut off by ``distance_limit`` plus one tile of 64, however long the text is.

    The frequencies are computed in float64 and rounded to float32, as checkpoints of RoPE models expect. The angles
    are exact products of these, so a far row is as accurate as a near one, and a longer table begins with the
    shorter one.

    Args:
        n: rows, at least 0.
        dim: rotated channels of a head, even.
        theta: base of the frequencies.
        device: where the tables are put.

    Returns:
        ``(cos, sin)``, float32 ``[n, dim / 2]``, for pairs ``(i, i + dim / 2)`` or, interleaved, ``(2i, 2i + 1)``.

    Raises:
        ValueError: n is negative, dim is odd or not positive, or theta is not positive and finite.

    Source: Su et al., RoFormer (arXiv 2104.09864).
    """
    if n < 0:
        raise ValueError(f"rope_tables: n is {n} and must be at least 0")
    if dim <= 0 or dim % 2 != 0:
        raise ValueError(f"rope_tables: dim is {dim} and must be a positive even number")
    if not 0.0 < theta < float("inf"):
        raise ValueError(f"rope_tables: theta is {theta} and must be positive and finite")
    exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    frequency = torch.pow(torch.tensor(theta, dtype=torch.float64), -exponent).to(torch.float32)
    angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency.to(torch.float64)
    return angle.cos().to(device, torch.float32), angle.sin().to(device, torch.float32)


def alibi_slopes(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """The slopes of ALiBi: head h adds -slope[h] times the distance to its logits.

    For a power of two, 2^(-8/heads), its square, its cube, ...; for other numbers those of the power of two below,
    then every second one of the power of two above, as checkpoints of ALiBi models expect.

    Args:
        heads: at least 1.
        device: where the slopes are put.

    Returns:
        float32 ``[heads]``, the ``alibi_slopes`` of the attention ops.

    Raises:
        ValueError: heads is less than 1.

    Source: Press et al., "Train Short, Test Long" (arXiv 2108.12409), section 3.
    """
    if heads < 1:
        raise ValueError(f"alibi_slopes: heads is {heads} and must be at least 1")
    below = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / below) for h in range(below)]
    slopes += [2 ** (-8 * (2 * h + 1) / (2 * below)) for h in range(heads - below)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def t5_bias(weight: Tensor, n: int, *, max_distance: int = 128) -> Tensor:
    """The relative position bias of T5's decoder as a table by distance.

    Half of the buckets hold one distance each; the other half grow logarithmically up to ``max_distance``, from where
    on every distance is in the last one. So ``n = max_distance + 1`` rows serve any length.

    Args:
        weight: ``[buckets, heads]``, as in T5's ``relative_attention_bias.weight``; float32 or float64.
        n: distances, at least 1.
        max_distance: first distance of the last bucket, more than half the number of buckets.

    Returns:
        ``[heads, n]`` in weight's dtype, the ``distance_bias`` of the attention ops. Differentiable in weight. T5 does
        not scale its scores: pass ``scale=1.0`` for its checkpoints.

    Raises:
        ValueError: weight is no matrix with at least 2 buckets, n is less than 1, or max_distance too small.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning" (arXiv 1910.10683), section 2.1.
    """
    if weight.dim() != 2 or weight.shape[0] < 2:
        raise ValueError(f"t5_bias: weight has shape {list(weight.shape)} and must be [buckets >= 2, heads]")
    if n < 1:
        raise ValueError(f"t5_bias: n is {n} and must be at least 1")
    buckets = weight.shape[0]
    exact = buckets // 2
    if max_distance <= exact:
        raise ValueError(f"t5_bias: max_distance is {max_distance} and must be more than half of {buckets} buckets")
    distance = torch.arange(n, device=weight.device)
    # In float32, in this order: the border of a bucket lies where the checkpoints' own code puts it.
    grown = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    bucket = torch.where(distance < exact, distance, (exact + grown.clamp(min=0).long()).clamp(max=buckets - 1))
    return weight[bucket].t().contiguous()
