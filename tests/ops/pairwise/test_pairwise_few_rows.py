# SPDX-License-Identifier: Apache-2.0
"""The best k for up to four rows, whose bounds say which rows of y are scored: what a batch of many rows gets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pycore import ops

COLUMNS = 5003  # segments of 1024, the last one in part


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_as_in_a_batch(x: Tensor, y: Tensor, k: int) -> None:
    """One to five of the many rows of x alone have the same scores and indices."""
    together = ops.pairwise_topk(x, y, k)
    for count in (1, 2, 3, 4, 5):
        alone = ops.pairwise_topk(x[:count], y, k)
        assert all(torch.equal(mine, whole[:count]) for mine, whole in zip(alone, together, strict=True)), count


@pytest.mark.parametrize("k", [1, 10, 700])
@pytest.mark.parametrize("dim", [1, 15, 16, 48, 300])
def test_few_rows(isa: str, dim: int, k: int) -> None:
    assert_as_in_a_batch(rows(30, dim), rows(COLUMNS, dim, seed=1), k)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e17, 1e25])
def test_numbers_whose_squares_are_none(isa: str, size: float) -> None:
    """Lengths overflow or vanish, scores do not."""
    x, y = rows(30, 40) * min(1.0, 1e-5 / size * 1e20), rows(COLUMNS, 40, seed=1) * size
    assert_as_in_a_batch(x, y, 10)


def test_every_row_is_better_than_the_ones_before(isa: str) -> None:
    x = rows(1, 24).repeat(30, 1)
    y = rows(COLUMNS, 24, seed=1)
    y = y[(y @ x[0]).argsort()]
    assert_as_in_a_batch(x, y, 10)
    close = x[0] * torch.linspace(1, 1 + 1e-4, COLUMNS).unsqueeze(1)  # scores a rounding apart
    assert_as_in_a_batch(x, close, 10)


def test_equal_scores(isa: str) -> None:
    x = rows(30, 33)
    assert_as_in_a_batch(x, rows(1, 33, seed=1).expand(COLUMNS, 33), 10)
    assert_as_in_a_batch(x, rows(7, 33, seed=1).repeat(700, 1), 10)
    assert ops.pairwise_topk(x[:1], rows(1, 33, seed=1).expand(COLUMNS, 33), 4)[1].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("at", [5, 3000, COLUMNS - 1])
def test_a_row_that_is_not_finite(isa: str, at: int, count: int, value: float) -> None:
    x, y = rows(count, 20), rows(COLUMNS, 20, seed=1)
    y[at, 13] = value
    with pytest.raises(ValueError, match=f"pairwise_topk: y has a NaN or an infinity in row {at} and must have none"):
        ops.pairwise_topk(x, y, 10)
    x[:, 13] = 0.0
    with pytest.raises(ValueError, match=f"in row {at} and must have none"):
        ops.pairwise_topk(x, y, 10)
    lengths = torch.tensor(at)  # what does not count is not read
    assert ops.pairwise_topk(x, y, 5, y_lengths=lengths)[1].max() < at


def test_batches_of_few_rows(isa: str) -> None:
    x, y = rows(3, 2, 20), rows(3, COLUMNS, 20, seed=1)
    together = ops.pairwise_topk(x, y, 6)
    for b in range(3):
        assert all(torch.equal(a, t[b]) for a, t in zip(ops.pairwise_topk(x[b], y[b], 6), together, strict=True))
