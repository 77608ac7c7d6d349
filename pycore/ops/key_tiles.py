# SPDX-License-Identifier: Apache-2.0
"""Keys by channel within tiles of 64 tokens, the layout that decoding reads at the speed of memory."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from pycore._limits import KEY_TILE

__all__ = ["rows_of_tiles", "tiles_of_rows"]


def tiles_of_rows(key: Tensor) -> Tensor:
    """[B, Hkv, n, D] as [B, Hkv, ceil(n / 64), D, 64], filled up with zeros."""
    rows = pad(key, (0, 0, 0, -key.shape[2] % KEY_TILE))
    return rows.unflatten(2, (rows.shape[2] // KEY_TILE, KEY_TILE)).transpose(3, 4).contiguous()


def rows_of_tiles(key: Tensor, length: int) -> Tensor:
    """The reverse, of the first `length` rows."""
    return key.transpose(3, 4).flatten(2, 3)[:, :, :length]
