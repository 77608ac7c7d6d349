# SPDX-License-Identifier: Apache-2.0
"""Schedules: which keys each query of an attention op attends to.

A query stands at position p, a key at position j, and d = p - j. A schedule is a small frozen value; the kernels see
its `kind`, its numbers and its tensor (csrc/include/pycore/tile_schedule.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

__all__ = ["Causal", "Full", "Lambda", "Prefix", "Schedule", "Segments"]


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
        """The int64 tensor of this schedule, on the device of the query."""
        return None


@dataclass(frozen=True)
class Full(Schedule):
    """Every query attends to every key."""

    kind: ClassVar[str] = "full"


@dataclass(frozen=True)
class Causal(Schedule):
    """d >= 0: a query attends to its own position and everything before it."""

    kind: ClassVar[str] = "causal"


@dataclass(frozen=True)
class Lambda(Schedule):
    """d >= 0 and (d < window_size or j < sink_size): the Λ mask of LM-Infinite.

    Args:
        sink_size: tokens kept from the start of the sequence, at least 0.
        window_size: newest tokens kept, the query's own among them, at least 1.

    Source: Han et al., "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models", section 3.
    """

    sink_size: int
    window_size: int

    kind: ClassVar[str] = "lambda"

    @property
    def args(self) -> list[int]:
        return [self.sink_size, self.window_size]


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
        boundaries: int64 [S + 1], ascending positions; segment s is boundaries[s] <= j < boundaries[s + 1], as in the
            cu_seqlens of variable-length attention. Positions outside all segments keep nothing.
        causal: d >= 0 as well.
    """

    boundaries: Tensor
    causal: bool = True

    kind: ClassVar[str] = "segments"

    @property
    def args(self) -> list[int]:
        return [int(self.causal)]

    @property
    def tensor(self) -> Tensor | None:
        return self.boundaries
