# SPDX-License-Identifier: Apache-2.0
"""The schedule of probabilistic attention: which blocks of keys take part is drawn anew in every round."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pycore._checks import check_int
from pycore._tensors import as_index
from pycore.schedules.distances import DistanceFamily
from pycore.schedules.kinds import Schedule

__all__ = ["Probabilistic"]

_LAYER_STEP = 0x1E3779B97F4A7C15  # odd, so that no two layers below 2**63 share a seed


@dataclass(frozen=True, eq=False)
class Probabilistic(Schedule):
    """d >= 0 and (the key's block is drawn, or a window block, or j < sink_size): one round of drawn blocks.

    Query block I = p // block_size and key block J = j // block_size, at distance D = I - J, take part with probability
    distance_probs(D), decided by (seed, round, head, I, J) alone. Only the abstract of the paper is known: this is our
    reading of it.

    Args:
        distance_probs: a family, or a tensor of probabilities [n] or [H, n] by D, the last holding beyond n.
        seed: an int, or int64 [B], at least 0.
        round: an int, or an int64 tensor of no dimensions, at least 0; each has blocks of its own. A tensor under
            torch.compile, which would compile again for another int.
        block_size: positions a block, a power of two from 16 on.
        sink_size: tokens at the start that every query keeps. Without one the method fails on trained models.
        window_blocks: blocks that always take part, the query's own and those before it.
        pattern: "independent", or "diagonal" where all blocks at one distance share a decision.
        correction: "importance" adds -log p to the logits of drawn blocks (neither sinks nor window blocks), so that
            the softmax's numerator and denominator are unbiased over rounds. "none" adds nothing.
        blocks_per_row: exactly so many blocks a row (all, where it has fewer), window blocks counted in, drawn without
            replacement with probabilities in proportion to distance_probs; blocks whose probability is 0 never.

    Source: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI"
        (arXiv 2410.18441), the abstract.
    """

    distance_probs: DistanceFamily | Tensor
    seed: int | Tensor
    round: int | Tensor = 0
    block_size: int = 64
    sink_size: int = 0
    window_blocks: int = 1
    pattern: str = "independent"
    correction: str = "none"
    blocks_per_row: int | None = None

    kind: ClassVar[str] = "blocks"

    @property
    def args(self) -> list[int]:
        return [self.block_size, self.sink_size, self.window_blocks]

    def for_layer(self, layer: int) -> Probabilistic:
        """The same round with blocks of its own for a layer: the index is folded into the seed.

        A tensor of seeds gives what each of them would as an int. A negative one stays, for the op to refuse.

        Raises:
            ValueError, TypeError: layer or an int seed is no int or negative.
        """
        check_int("Probabilistic.for_layer", "layer", layer, 0)
        seed = self.seed
        if not isinstance(seed, Tensor):
            check_int("Probabilistic.for_layer", "seed", seed, 0)
            if not torch.compiler.is_compiling():
                return replace(self, seed=(seed + layer * _LAYER_STEP) % 2**63)
            seed = torch.full((1,), seed, dtype=torch.int64, device="cpu")  # a graph's ints end at 2**63
        # Sums and products of int64 wrap at 2**64, which leaves what is below 2**63 of them as it is.
        step = torch.full((), layer, dtype=torch.int64, device=seed.device) * _LAYER_STEP
        seed = as_index(seed)
        return replace(self, seed=torch.where(seed < 0, seed, (seed + step) & (2**63 - 1)))
