# SPDX-License-Identifier: Apache-2.0
"""The blocks of a round of probabilistic attention in plain torch. Meant for reading and for tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycore.schedules import DistanceFamily, Probabilistic

__all__ = ["block_logits", "block_mask", "philox"]


def philox(counter: tuple[Tensor | int, ...], seed: int) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words for four words of counter, all of them int64 tensors."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(word) & 0xFFFFFFFF for word in counter))
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2**64, which keeps the bits that are read
        high0, high1 = product0 >> 32 & 0xFFFFFFFF, product1 >> 32 & 0xFFFFFFFF
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, product1 & 0xFFFFFFFF, high0 ^ c3 ^ key1, product0 & 0xFFFFFFFF
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def probabilities(schedule: Probabilistic, distance: Tensor, head: int) -> Tensor:
    """The probability of each distance in blocks (p(0) where it is negative), float64."""
    probs = schedule.distance_probs
    distance = distance.clamp(min=0)
    if isinstance(probs, DistanceFamily):
        entries = int(distance.max()) + 1 if distance.numel() else 1
        return torch.tensor([probs.probability(d) for d in range(entries)], dtype=torch.float64)[distance]
    table = probs.double() if probs.dim() == 1 else probs[head].double()
    return table[distance.clamp(max=len(table) - 1)]


def block_mask(schedule: Probabilistic, i: Tensor, j: Tensor, batch_row: int = 0, head: int = 0) -> Tensor:
    """Whether query blocks i [n, 1] and key blocks j [1, m] take part, drawn or in the window: bool [n, m]."""
    distance = i - j
    seeds = torch.as_tensor(schedule.seed).flatten()
    seed = int(seeds[batch_row if len(seeds) > 1 else 0])
    where = (distance, 0xFFFFFFFF) if schedule.pattern == "diagonal" else (j, i)
    bits = philox((*where, head, int(schedule.round)), seed)[0] >> 8
    p = probabilities(schedule, distance, head)
    window = (distance >= 0) & (distance < schedule.window_blocks)
    if schedule.blocks_per_row is None:
        return window | ((distance >= 0) & (bits < torch.ceil(p * 2**24)))
    # Gumbel top-k over all key blocks up to the query's, whichever of them were asked for.
    taken = window.clone()
    for row, query_block in enumerate(i.flatten().tolist()):
        others = range(query_block - schedule.window_blocks + 1)
        left = schedule.blocks_per_row - min(schedule.window_blocks, query_block + 1)
        scores = {}
        for key_block in others:
            place = (
                (query_block - key_block, 0xFFFFFFFF) if schedule.pattern == "diagonal" else (key_block, query_block)
            )
            u = (int(philox((*place, head, int(schedule.round)), seed)[0] >> 8) + 0.5) / 2**24
            chance = float(probabilities(schedule, torch.tensor(query_block - key_block), head))
            if chance > 0:
                scores[key_block] = math.log(chance) - math.log(-math.log(u))
        best = sorted(scores, key=lambda key_block: (-scores[key_block], key_block))[: max(left, 0)]
        taken[row] |= torch.isin(j.flatten(), torch.tensor(best, dtype=torch.int64))
    return taken


def block_logits(schedule: Probabilistic, p: Tensor, j: Tensor, head: int = 0) -> Tensor:
    """What correction adds to the logit of a query at position p [n, 1] and a kept key at position j [1, m]: [n, m]."""
    distance = p // schedule.block_size - j // schedule.block_size
    chance = probabilities(schedule, distance, head)
    drawn = (distance >= schedule.window_blocks) & (j >= schedule.sink_size) & (chance > 0)
    return torch.where(drawn & (schedule.correction == "importance"), -chance.log(), 0.0)
