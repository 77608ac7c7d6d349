# SPDX-License-Identifier: Apache-2.0
"""Schedules by rule: which keys each query of an attention op attends to.

A query stands at position p, a key at position j, and d = p - j. A schedule is a small frozen value; the kernels see
its `kind`, its numbers and its tensor (csrc/include/pycore/attention/tile_schedule.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

__all__ = ["Causal", "Full", "KeySubset", "Lambda", "Prefix", "Schedule", "Segments", "Tree"]


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
