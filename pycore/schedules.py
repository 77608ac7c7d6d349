# SPDX-License-Identifier: Apache-2.0
"""Schedules: which keys each query of an attention op attends to.

A query stands at position p, a key at position j, and d = p - j. A schedule is a small frozen value; the kernels see
its `kind`, its numbers and its tensor (csrc/include/pycore/tile_schedule.h).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

__all__ = [
    "Causal", "Constant", "DistanceFamily", "Full", "Gaussian", "Geometric", "Harmonic", "Lambda", "PowerLaw", "Prefix",
    "Probabilistic", "Schedule", "Segments", "expected_density",
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


@dataclass(frozen=True)
class DistanceFamily:
    """The base of the families of probabilities over block distances: p(D) for D = 0, 1, 2, ... from one parameter."""

    family: ClassVar[str] = ""
    most: ClassVar[float] = math.inf

    @property
    def parameter(self) -> float:
        """The number behind p."""
        raise NotImplementedError

    def probability(self, distance: int) -> float:
        """p(distance)."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        (name,) = (field.name for field in fields(self))
        value = self.parameter
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{type(self).__name__}: {name} is a {type(value).__name__} and must be a number")
        if not 0 <= value <= self.most or math.isinf(value):
            limit = "between 0 and 1" if self.most == 1 else "finite and at least 0"
            raise ValueError(f"{type(self).__name__}: {name} is {value} and must be {limit}")


@dataclass(frozen=True)
class Geometric(DistanceFamily):
    """p(D) = rho ** D, with rho in [0, 1]."""

    rho: float

    family: ClassVar[str] = "geometric"
    most: ClassVar[float] = 1.0

    @property
    def parameter(self) -> float:
        return self.rho

    def probability(self, distance: int) -> float:
        return float(self.rho) ** distance


@dataclass(frozen=True)
class PowerLaw(DistanceFamily):
    """p(D) = (1 + D) ** -alpha, with alpha at least 0."""

    alpha: float

    family: ClassVar[str] = "power_law"

    @property
    def parameter(self) -> float:
        return self.alpha

    def probability(self, distance: int) -> float:
        return float(1 + distance) ** -self.alpha


@dataclass(frozen=True)
class Harmonic(DistanceFamily):
    """p(D) = min(1, c / (1 + D)), with c at least 0: about c blocks for every time that the distance grows e-fold."""

    c: float

    family: ClassVar[str] = "harmonic"

    @property
    def parameter(self) -> float:
        return self.c

    def probability(self, distance: int) -> float:
        return min(1.0, self.c / (1 + distance))


@dataclass(frozen=True)
class Gaussian(DistanceFamily):
    """p(D) = exp(-D ** 2 / (2 sigma ** 2)), with sigma greater than 0."""

    sigma: float

    family: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma == 0:
            raise ValueError("Gaussian: sigma is 0 and must be greater than 0")

    @property
    def parameter(self) -> float:
        return self.sigma

    def probability(self, distance: int) -> float:
        return math.exp(-(float(distance) ** 2) / (2 * float(self.sigma) * self.sigma))


@dataclass(frozen=True)
class Constant(DistanceFamily):
    """p(D) = p, in [0, 1], at every distance."""

    p: float

    family: ClassVar[str] = "constant"
    most: ClassVar[float] = 1.0

    @property
    def parameter(self) -> float:
        return self.p

    def probability(self, distance: int) -> float:
        return float(self.p)


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
        """The same round with blocks of its own for a layer: the index is folded into the seed."""
        return replace(self, seed=(self.seed + layer * _LAYER_STEP) % 2**63)


def expected_density(
    distance_probs: DistanceFamily | Tensor,
    *,
    blocks: int,
    window_blocks: int = 1,
    blocks_per_row: int | None = None,
) -> float:
    """The expected share of block pairs J <= I that take part in a round, over a sequence of `blocks` blocks.

    It is what time follows: attention over a round takes about this share of the time of causal attention. Sinks come
    on top. Where probabilities differ by head, the mean over heads.

    Args:
        distance_probs, window_blocks, blocks_per_row: as in `Probabilistic`.
        blocks: length of the sequence in blocks, at least 1.

    Raises:
        ValueError: blocks < 1, a probability outside [0, 1] or NaN.
    """
    op = "expected_density"
    if blocks < 1:
        raise ValueError(f"{op}: blocks is {blocks} and must be at least 1")
    if isinstance(distance_probs, DistanceFamily):
        table = torch.tensor(
            [[distance_probs.probability(distance) for distance in range(blocks)]], dtype=torch.float64
        )
    else:
        if distance_probs.dim() not in (1, 2) or distance_probs.numel() == 0:
            raise ValueError(
                f"{op}: distance_probs has shape {list(distance_probs.shape)} and must be [n] or [heads, n]"
            )
        table = torch.atleast_2d(distance_probs.detach().to("cpu", torch.float64))
        table = table[:, torch.arange(blocks).clamp(max=table.shape[1] - 1)]
    if not bool(((table >= 0) & (table <= 1)).all()):
        raise ValueError(f"{op}: distance_probs has entries outside [0, 1], where all must be")
    drawn = torch.ceil(table * 2**24) / 2**24  # what the draws amount to
    drawn[:, :window_blocks] = 1.0
    rows = torch.arange(blocks, 0, -1, dtype=torch.float64)  # rows that have a block at this distance
    pairs = float(rows.sum())
    if blocks_per_row is None:
        return float((drawn * rows).sum(1).mean()) / pairs
    allowed = table > 0
    allowed[:, :window_blocks] = True
    return float(allowed.cumsum(1).clamp(max=blocks_per_row).sum(1).double().mean()) / pairs
