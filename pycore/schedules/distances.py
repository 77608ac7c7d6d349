# SPDX-License-Identifier: Apache-2.0
"""Probabilities over block distances, for `pycore.schedules.Probabilistic`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from pycore._checks import check_int, check_number
from pycore._tensors import check_tensor

__all__ = [
    "Constant", "DistanceFamily", "Gaussian", "Geometric", "Harmonic", "PowerLaw", "expected_density", "no_distances",
]  # fmt: skip


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
        check_number(type(self).__name__, name, value)
        if not 0 <= value <= self.most or value == math.inf:
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


def no_distances(op: str, given: Any) -> TypeError:
    """The error for what is neither a table of probabilities nor a family."""
    return TypeError(
        f"{op}: distance_probs is a {type(given).__name__} and must be a Tensor or a family of pycore.schedules"
    )


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
        ValueError: blocks < 1, window_blocks < 0, blocks_per_row less than window_blocks or 1, a probability outside
            [0, 1] or NaN.
        TypeError: distance_probs that is neither a tensor nor a family, a count that is no int.
    """
    op = "expected_density"
    check_int(op, "blocks", blocks, 1)
    check_int(op, "window_blocks", window_blocks, 0)
    if blocks_per_row is not None:
        check_int(op, "blocks_per_row", blocks_per_row, max(1, window_blocks))
    if isinstance(distance_probs, DistanceFamily):
        table = torch.tensor(
            [[distance_probs.probability(distance) for distance in range(blocks)]], dtype=torch.float64
        )
    elif not isinstance(distance_probs, Tensor):
        raise no_distances(op, distance_probs)
    else:
        check_tensor(op, "distance_probs", distance_probs)
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
