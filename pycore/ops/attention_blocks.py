# SPDX-License-Identifier: Apache-2.0
"""`pr_block_mask`: the blocks that a round of probabilistic attention draws, as a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from pycore._checks import check_int
from pycore.schedules import DistanceFamily, Probabilistic
from pycore.schedules.attention_blocks import draw_blocks, unpacked

__all__ = ["pr_block_mask"]


def pr_block_mask(
    *,
    batch: int,
    heads: int,
    query_blocks: int,
    key_blocks: int,
    distance_probs: DistanceFamily | Tensor,
    seed: int | Tensor,
    round: int | Tensor = 0,
    window_blocks: int = 1,
    pattern: str = "independent",
    blocks_per_row: int | None = None,
) -> Tensor:
    """The blocks that take part in a round of `pr_flash_attention`: drawn ones and window blocks, not sinks.

    Args:
        query_blocks, key_blocks: lengths in blocks. The last query block is the last key block, so that row i stands
            for query block I = key_blocks - query_blocks + i (bottom-right alignment, as for positions).

    The other arguments and the errors are those of `pr_flash_attention`.

    Returns:
        bool [batch, heads, query_blocks, key_blocks], on the CPU. This is the only function of the family that makes a
        mask; attention itself reads 64 blocks a word.
    """
    op = "pr_block_mask"
    for name, value in (("batch", batch), ("heads", heads), ("query_blocks", query_blocks), ("key_blocks", key_blocks)):
        check_int(op, name, value, 0)
    schedule = Probabilistic(
        distance_probs, seed, round, block_size=1, window_blocks=window_blocks, pattern=pattern,
        blocks_per_row=blocks_per_row,
    )  # fmt: skip
    shape = (batch, heads, query_blocks, key_blocks)
    blocks, _ = draw_blocks(op, schedule, shape, (None,) * 4, torch.device("cpu"))
    return unpacked(blocks)[..., :key_blocks]
