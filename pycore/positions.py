# SPDX-License-Identifier: Apache-2.0
"""Tables and biases by which attention learns where a key stands."""

from __future__ import annotations

import torch
from torch import Tensor


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
