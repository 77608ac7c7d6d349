# SPDX-License-Identifier: Apache-2.0
"""Schedules: which keys each query of an attention op attends to.

A query stands at position p, a key at position j, and d = p - j. A schedule is a small frozen value; the kernels see
its `kind`, its numbers and its tensor (csrc/include/pycore/attention/tile_schedule.h).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pycore._checks import check_int
from pycore._distances import (
    Constant,
    DistanceFamily,
    Gaussian,
    Geometric,
    Harmonic,
    PowerLaw,
    expected_density,
)
from pycore._tensors import as_index

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = [
    "Causal", "Constant", "DistanceFamily", "Full", "Gaussian", "Geometric", "Harmonic", "KeySubset", "Lambda",
    "PowerLaw", "Prefix", "Probabilistic", "Schedule", "Segments", "Tree", "expected_density", "to_flex_block_mask",
]  # fmt: skip


@dataclass(frozen=True, eq=False)  # else Prefix and Segments would inherit an equality that looks at no field
class Schedule:
    """The base of all schedules."""

    kind: ClassVar[str] = ""

    @property
    def args(self) -> list[int]:
        """The numbers of this schedule, in the order the kernels take them."""
        return []

    @property
    def tensor(self) -> Tensor | None:
        """The int64 tensor of this schedule that the kernels take as it is, on the device of the query."""
        return None


@dataclass(frozen=True)
class Full(Schedule):
    """Every query attends to every key."""

    kind: ClassVar[str] = "full"


@dataclass(frozen=True)
class Causal(Schedule):
    """d >= 0: a query attends to its own position and everything before it."""

    kind: ClassVar[str] = "causal"


_NO_BOUND = 2**62  # of a window


def _bound(size: int | None) -> int:
    return _NO_BOUND if size is None else size


@dataclass(frozen=True)
class Lambda(Schedule):
    """d >= -right and (d < window_size or j < sink_size): a window and sinks, the Λ mask of LM-Infinite.

    Args:
        sink_size: tokens kept from the start of the sequence, at least 0.
        window_size: newest tokens kept, the query's own among them, at least 1.
        right: tokens kept after the query's own, for encoders: 0 for none, None for all. FlashAttention's window
            (left, right) is window_size = left + 1 and right.

    Source: Han et al., "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models", section 3.
    """

    sink_size: int
    window_size: int
    right: int | None = 0

    kind: ClassVar[str] = "lambda"

    @property
    def args(self) -> list[int]:
        sizes = [self.sink_size, self.window_size]
        return sizes if self.right == 0 else [*sizes, _bound(self.right)]


@dataclass(frozen=True, eq=False)
class Prefix(Schedule):
    """d >= 0 or j < prefix_lengths[b]: a prefix that everything sees, and causal after it (prefix-LM, UniLM).

    Args:
        prefix_lengths: int64 [B], the length of each batch row's prefix.
    """

    prefix_lengths: Tensor

    kind: ClassVar[str] = "prefix"

    @property
    def tensor(self) -> Tensor | None:
        return self.prefix_lengths


@dataclass(frozen=True, eq=False)
class Segments(Schedule):
    """Positions fall into segments, and a query attends to its own segment (packed sequences, block-diagonal).

    Args:
        boundaries: int64 [S + 1], or [B, S + 1] for each batch row its own: ascending positions; segment s is
            boundaries[s] <= j < boundaries[s + 1], as in the cu_seqlens of variable-length attention. A segment may be
            empty, so rows with fewer segments repeat their last boundary. Positions outside all segments keep nothing.
        causal: d >= 0 as well.
        window_size: newest tokens of the segment kept, the query's own among them, at least 1; None for all.
        sink_size: tokens kept from the start of the segment whatever the window, at least 0.
        right: without causal, tokens kept after the query's own, at least 0; None for all.
    """

    boundaries: Tensor
    causal: bool = True
    window_size: int | None = None
    sink_size: int = 0
    right: int | None = None

    kind: ClassVar[str] = "segments"

    @property
    def args(self) -> list[int]:
        causal = int(self.causal)
        if self.window_size is None and self.right is None and self.sink_size == 0:
            return [causal]
        right = 0 if causal and self.right is None else _bound(self.right)
        return [causal, _bound(self.window_size), self.sink_size, right]

    @property
    def tensor(self) -> Tensor | None:
        return self.boundaries


@dataclass(frozen=True, eq=False)
class KeySubset(Schedule):
    """Position j takes part, and d >= 0: queries attend to some of the keys only (position prediction, token pruning).

    Args:
        keys: which positions take part, on the device of the query. Either bool [n] or [B, n] by position, positions
            from n on taking no part; or int64 [k] or [B, k], positions in any order, some perhaps more than once, none
            below 0. With a key_offset, compiled code and vmap take a mask alone.
        causal: d >= 0 as well. Without it every query attends to the same keys.

    Time follows the share of tiles of 64 positions that have a key; the others are never read.

    Source: Zhai et al., "Position Prediction as an Effective Pretraining Strategy" (arXiv 2207.07611): there without
        the causal bound.
    """

    keys: Tensor
    causal: bool = True

    kind: ClassVar[str] = "key_subset"

    @property
    def args(self) -> list[int]:
        return [int(self.causal)]


@dataclass(frozen=True, eq=False)
class Tree(Schedule):
    """The last T positions are the nodes of a tree of drafts: each keeps its ancestors and what came before the tree.

    One call then scores all branches: the row of a node is that of plain causal attention on the context followed by
    the path from the root to the node; with a window, that of Λ attention. For this, distances, windows and sinks go by
    depth: a node of depth t stands t positions behind the first that follows the context. Positions before the tree are
    causal, also where they are queries.

    Args:
        parents: int64 [T] or [B, T], the parent of each node, which comes before it: -1 <= parents[t] < t, with -1 for
            a root. Roots hang on the last token of the context, and there may be several. Rows with fewer nodes than T
            begin with a chain (-1, 0, 1, ...) of the last tokens of their context. On the device of the query.
        sink_size: tokens kept from the start whatever the window, at least 0.
        window_size: newest tokens kept, the query's own among them, at least 1; None for all.

    Source: Miao et al., "SpecInfer" (arXiv 2305.09781); Cai et al., "Medusa" (arXiv 2401.10774): tree attention.
    """

    parents: Tensor
    sink_size: int = 0
    window_size: int | None = None

    kind: ClassVar[str] = "tree"

    @property
    def args(self) -> list[int]:
        return [] if self.window_size is None else [self.sink_size, self.window_size]


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


def to_flex_block_mask(
    schedule: Schedule,
    *,
    batch: int,
    heads: int,
    query_length: int,
    key_length: int,
    block_size: int = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The pairs that a schedule keeps, as FlexAttention takes them: for comparing with it, or for moving from it.

    Query row i stands at position key_length - query_length + i (bottom-right alignment), key row j at j. FlexAttention
    has no place for the rest of `attention`: the distances of a tree and the correction of a round are its score_mod's.

    Args:
        schedule: any of this module. Its tensors are moved to `device`.
        batch, heads: those of the query. The mask has one row, or one head, where all are the same.
        query_length, key_length: at least 1.
        block_size: FlexAttention's, in both directions.

    Returns:
        torch.nn.attention.flex_attention.BlockMask, whose mask_mod may be asked for single pairs. Building it takes
        memory for every pair.

    Raises:
        ValueError: what `attention` refuses of the schedule.
        TypeError: schedule is none.
    """
    from pycore.ops.attention_flex import flex_block_mask

    return flex_block_mask(schedule, (batch, heads, query_length, key_length), block_size, torch.device(device))
