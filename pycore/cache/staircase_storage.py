# SPDX-License-Identifier: Apache-2.0
"""The tensors that a `StaircaseKVCache` keeps its keys, or its values, in: how many rows each has, and for what.

docs/ops/staircase.md writes the format down.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pycore.cache.staircase import Staircase
from pycore.ops.staircase import hadamard

__all__ = ["Side", "allocate", "side_of", "whole_groups"]


class Side(NamedTuple):
    """What the storage of keys, or of values, looks like. Rows of None are as many as the cache holds."""

    bits: tuple[int, ...]
    by_token: bool
    channels: int
    rotation: Tensor | None
    full_rows: int | None
    plane_rows: tuple[int | None, int | None, int | None]  # 0: no such plane
    centers: tuple[bool, bool, bool]

    def rings(self) -> list[int]:
        """Which tensors of the storage tokens leave."""
        rows = [self.full_rows, *self.plane_rows, None, None, *self.plane_rows]
        return [i for i, count in enumerate(rows) if count]

    def steps_of(self, least: int) -> int:
        """Steps of the ladder with at least so many bits."""
        return sum(width >= least for width in self.bits)

    def served_from(self, query: int, step: int, age: int) -> int:
        """The first token that a query reads at an age below `age`."""
        return max(0, (query // step - age + 1) * step)


def whole_groups(staircase: Staircase, tokens: int) -> int:
    """So many tokens, or the few more that make whole groups."""
    group = staircase.group_size
    return -(-tokens // group) * group


def side_of(staircase: Staircase, by_token: bool, channels: int, kv_heads: int, capacity: int | None) -> Side:
    """The storage of keys (`by_token` False) or values on a ladder whose step is in tokens."""
    bits = staircase.ladders[by_token]
    rotation = staircase.value_rotation if by_token else staircase.key_rotation
    name = "value_rotation" if by_token else "key_rotation"
    if isinstance(rotation, str):
        rotation = hadamard(channels).float().expand(kv_heads, -1, -1).contiguous()
    if rotation is not None and rotation.shape != (kv_heads, channels, channels):
        raise ValueError(
            f"StaircaseKVCache: {name} has shape {list(rotation.shape)} and must be [{kv_heads}, {channels}, "
            f"{channels}]"
        )
    quantized = [width for width in bits if width < 16]
    limit = None if capacity is None else whole_groups(staircase, capacity)

    def rows(least: int) -> int | None:
        """Of what holds every token that is read with at least so many bits."""
        if max(quantized, default=0) < least and least < 16:
            return 0
        if bits[-1] >= least:
            return None
        served = sum(width >= least for width in bits) * int(staircase.step)
        ring = whole_groups(
            staircase, max(served, staircase.group_size) + staircase.rollback
        )  # the newest group is always full
        return ring if limit is None else min(ring, limit)

    embedded = staircase.grid == "embedded"
    return Side(
        bits, by_token, channels, rotation, rows(16), (rows(2), rows(4), rows(8)),
        (embedded and 2 in bits, embedded and 4 in bits, embedded and 8 in bits),
    )  # fmt: skip


def allocate(
    side: Side, staircase: Staircase, rows: int, batch: int, kv_heads: int, dtype: torch.dtype
) -> list[Tensor]:
    """Storage for `rows` tokens: full, three planes, lo, hi, and the centers of the widths 2, 4 and 8."""
    group = staircase.group_size
    groups = group * -(-side.channels // group) if side.by_token else side.channels
    quarters = -(-group // 4) * (side.channels // group) + -(-(side.channels % group) // 4)
    packed = group * quarters if side.by_token else side.channels * -(-group // 4)

    def make(count: int | None, tile: int, of: torch.dtype) -> Tensor:
        tokens = rows if count is None else count
        if count == 0:
            return torch.zeros(0, dtype=of)
        return torch.zeros(batch, kv_heads, max(tokens // group, 1), tile, dtype=of)

    full = rows if side.full_rows is None else side.full_rows
    two, four, eight = side.plane_rows
    return [
        torch.zeros(batch, kv_heads, staircase.sink_size + full, side.channels, dtype=dtype),
        make(two, packed, torch.uint8),
        make(four, packed, torch.uint8),
        make(eight, 2 * packed, torch.uint8),
        make(two, groups, dtype),
        make(two, groups, dtype),
        make(two if side.centers[0] else 0, groups, torch.uint8),
        make(four if side.centers[1] else 0, groups, torch.uint8),
        make(eight if side.centers[2] else 0, groups, torch.uint8),
    ]
