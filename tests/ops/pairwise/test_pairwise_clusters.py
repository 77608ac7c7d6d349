# SPDX-License-Identifier: Apache-2.0
"""Optimal transport, k-means, and codes of bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pycore import ops
from pycore.reference import pairwise as reference


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# ---- sinkhorn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 1, 20])
def test_sinkhorn(isa: str, iterations: int) -> None:
    x, y = rows(30, 5), rows(41, 5) + 1
    a, b = torch.rand(30).softmax(0), torch.rand(41).softmax(0)
    actual = ops.sinkhorn(x, y, epsilon=0.5, iterations=iterations, a=a, b=b)
    exact = reference.sinkhorn(*(part.double() for part in (x, y)), 0.5, iterations, a.double(), b.double())
    for mine, theirs in zip(actual, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    even = ops.sinkhorn(x, y, epsilon=0.5, iterations=iterations)[0]
    uniform = torch.full((30,), 1 / 30).double(), torch.full((41,), 1 / 41).double()
    exact = reference.sinkhorn(x.double(), y.double(), 0.5, iterations, *uniform)[0]
    torch.testing.assert_close(even.double(), exact, rtol=1e-5, atol=1e-5)


def test_sinkhorn_of_two_points_each() -> None:
    """With little entropy, the cost is that of the best assignment: 1 and 4, halved."""
    x, y = torch.tensor([[0.0], [10.0]]), torch.tensor([[12.0], [1.0]])
    cost, _, _ = ops.sinkhorn(x, y, epsilon=1e-3, iterations=5)
    assert cost.item() == pytest.approx(2.5, abs=1e-3)


def test_sinkhorn_gradient_is_that_of_the_converged_cost() -> None:
    x, y = rows(6, 2).double().requires_grad_(), rows(7, 2).double().requires_grad_()
    a, b = (torch.rand(n, dtype=torch.float64).softmax(0) for n in (6, 7))
    cost, *_ = ops.sinkhorn(x, y, epsilon=1.0, iterations=300, a=a, b=b)
    mine = torch.autograd.grad(cost, (x, y))
    cost, *_ = reference.sinkhorn(x, y, 1.0, 300, a, b)
    for one, other in zip(mine, torch.autograd.grad(cost, (x, y)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_sinkhorn_gradient_of_weights() -> None:
    """Up to a constant, which moves no mass, it is the potentials."""
    x, y = rows(5, 2).double(), rows(6, 2).double()
    a, b = (torch.rand(n, dtype=torch.float64).softmax(0).requires_grad_() for n in (5, 6))
    cost, f, g = ops.sinkhorn(x, y, epsilon=1.0, iterations=300, a=a, b=b)
    of_a, of_b = torch.autograd.grad(cost, (a, b))
    torch.testing.assert_close(of_a, f)
    torch.testing.assert_close(of_b, g)


def test_sinkhorn_goes_on_where_it_ended() -> None:
    x, y = rows(20, 4), rows(23, 4) + 1
    whole = ops.sinkhorn(x, y, epsilon=0.7, iterations=12)
    _, f, g = ops.sinkhorn(x, y, epsilon=0.7, iterations=5)
    assert all(map(torch.equal, ops.sinkhorn(x, y, epsilon=0.7, iterations=7, g=g), whole))
    # f is one step further than the g it came with.
    assert all(map(torch.equal, ops.sinkhorn(x, y, epsilon=0.7, iterations=6, f=f), whole))
    # A cloud that has moved little is there sooner.
    moved = x + 0.01
    _, f, g = ops.sinkhorn(x, y, epsilon=0.7, iterations=300)
    exact = ops.sinkhorn(moved, y, epsilon=0.7, iterations=300)[0]
    cold, warm = (ops.sinkhorn(moved, y, epsilon=0.7, iterations=2, g=start)[0] for start in (None, g))
    assert (warm - exact).abs() < 0.1 * (cold - exact).abs()
    with pytest.raises(ValueError, match=r"sinkhorn: g has shape \[20\] and must be \[\.\.\., 23\]"):
        ops.sinkhorn(x, y, epsilon=0.7, iterations=1, g=f)
    with pytest.raises(TypeError, match="sinkhorn: f is a list and must be a Tensor or None"):
        ops.sinkhorn(x, y, epsilon=0.7, iterations=1, f=[0.0])


def test_sinkhorn_stops_at_its_tolerance_and_takes_batches() -> None:
    x, y = rows(2, 20, 3), rows(2, 25, 3)
    long = ops.sinkhorn(x, y, epsilon=1.0, iterations=500)
    short = ops.sinkhorn(x, y, epsilon=1.0, iterations=10**9, tolerance=1e-5)
    for one, other in zip(long, short, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert torch.equal(long[0][1], ops.sinkhorn(x[1], y[1], epsilon=1.0, iterations=500)[0])
    weights = torch.tensor([0.5, 0.5, 0.0])
    held = ops.sinkhorn(x[0, :3], y[0], epsilon=1.0, iterations=50, a=weights)[0]
    torch.testing.assert_close(held, ops.sinkhorn(x[0, :2], y[0], epsilon=1.0, iterations=50, a=weights[:2])[0])


# ---- kmeans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kmeans_from_given_centroids(isa: str, dtype: torch.dtype) -> None:
    x = rows(500, 7).to(dtype)
    centroids, codes, inertia = ops.kmeans(x, 9, iterations=4, init=x[:9])
    means = x[:9].double()
    for _ in range(4):
        near = reference.scores(x.double(), means, "euclidean").argmin(1)
        means = torch.stack([x[near == j].double().mean(0) for j in range(9)])
    distances = reference.scores(x.double(), means, "euclidean")
    torch.testing.assert_close(centroids.double(), means, rtol=1e-5, atol=1e-5)
    assert torch.equal(codes, distances.argmin(1))
    assert inertia.item() == pytest.approx(distances.amin(1).sum().item(), rel=1e-5)


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_kmeans_finds_clusters_and_repeats_itself(init: str) -> None:
    middles = rows(5, 3) * 100
    x = (middles[:, None] + rows(5, 40, 3)).reshape(200, 3)
    first = ops.kmeans(x, 5, seed=3, init=init, iterations=20)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = ops.kmeans(x, 5, seed=3, init=init, iterations=20)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, first, again))
    if init == "kmeans++":
        assert all(len(set(part.tolist())) == 1 for part in first[1].reshape(5, 40))
        assert first[2].item() == pytest.approx(((x.reshape(5, 40, 3) - x.reshape(5, 40, 3).mean(1, True)) ** 2).sum())


def test_kmeans_of_few_and_of_equal_rows() -> None:
    x = rows(4, 3)
    centroids, codes, inertia = ops.kmeans(x, 4)
    assert sorted(codes.tolist()) == [0, 1, 2, 3] and inertia == 0 and torch.equal(centroids[codes], x)
    centroids, codes, inertia = ops.kmeans(torch.ones(6, 2), 3, iterations=2)
    assert codes.tolist() == [0] * 6 and inertia == 0 and torch.equal(centroids, torch.ones(3, 2))
    assert ops.kmeans(x, 2, iterations=0, init=x[2:])[0].tolist() == x[2:].tolist()


def test_kmeans_moves_a_centroid_that_has_no_rows() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0]])
    centroids, codes, _ = ops.kmeans(x, 2, init=torch.tensor([[3.0], [1e6]]))
    assert sorted(centroids.flatten().tolist()) == [0.5, 10.0] and codes[0] == codes[1] != codes[2]


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0, 1, 7, 8, 9, 64, 130])
def test_pack_bits(width: int) -> None:
    x = rows(3, 5, width)
    assert np.array_equal(ops.pack_bits(x).numpy(), np.packbits(x.numpy() > 0, axis=-1))
    assert torch.equal(ops.pack_bits(x > 0), ops.pack_bits(x))
    assert torch.equal(ops.pack_bits((x > 0).to(torch.int8) * 2 - 1), ops.pack_bits(x))


@pytest.mark.parametrize("n, m, width, k", [(1, 1, 1, 1), (9, 300, 3, 300), (50, 700, 16, 10), (3, 40, 0, 2)])
def test_hamming_topk(isa: str, n: int, m: int, width: int, k: int) -> None:
    x, y = (torch.randint(0, 256, (2, rows_, width), dtype=torch.uint8) for rows_ in (n, m))
    bits = [torch.from_numpy(np.unpackbits(part.numpy(), axis=-1)).float() for part in (x, y)]
    matrix = (bits[0].unsqueeze(2) != bits[1].unsqueeze(1)).sum(-1)
    expected = matrix.sort(dim=-1, stable=True)
    distances, indices = ops.hamming_topk(x, y, k)
    assert torch.equal(distances, expected.values[..., :k]) and torch.equal(indices, expected.indices[..., :k])
    assert torch.equal(ops.hamming_topk(x[0], y, k)[0][1], ops.hamming_topk(x[0], y[1], k)[0])
