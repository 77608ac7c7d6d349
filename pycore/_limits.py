# SPDX-License-Identifier: Apache-2.0
"""Numbers that the kernels fix, once for Python: those of key_tile.h and attention/tile_schedule.h in csrc/include.

A test compares the two. Loads no torch.
"""

from __future__ import annotations

__all__ = ["FAR", "KEY_TILE"]

# Positions in a tile of keys, and bits in a word of a bitmap over positions. Attention rotates relative to a tile, so a
# rotary table reaches the largest distance and a tile more.
KEY_TILE = 64

FAR = 2**61 - 1  # no position is beyond it
