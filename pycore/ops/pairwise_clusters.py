# SPDX-License-Identifier: Apache-2.0
"""What is made of pairwise reductions: optimal transport, clusters, and codes of bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_int, check_number, check_str
from pycore._tensors import check_tensor
from pycore.ops._pairwise import batched, lead_of, per_row, widened
from pycore.ops.pairwise import pairwise_logsumexp

__all__ = ["hamming_topk", "kmeans", "pack_bits", "sinkhorn"]


def sinkhorn(
    x: Tensor, y: Tensor, *, epsilon: float, iterations: int, a: Tensor | None = None, b: Tensor | None = None,
    tolerance: float = 0.0, f: Tensor | None = None, g: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Entropic optimal transport between two clouds of points, by Sinkhorn's iterations on logarithms.

    The cost of moving x_i to y_j is their squared distance C_ij. With P_ij = a_i b_j e^((f_i + g_j - C_ij) / epsilon),
    the least of sum P C + epsilon KL(P | a b) over the couplings P of a and b is sum a f + sum b g. An iteration makes
    f from g, then g from f, which begins at zero or where it is said to; f is made once more at the end.

    Args:
        x: [..., N, D], float32, bfloat16 or float16 (widened to float32); float64 runs plain loops.
        y: [..., M, D]. Leading dimensions broadcast.
        epsilon: more than 0, in units of the squared distance.
        iterations: at least 0, and at most as many.
        a: [..., N], the weights of x's points, not negative, of sum 1. None: all the same.
        b: [..., M], those of y's points.
        tolerance: stops where no f changes by more. 0: after all iterations.
        f: [..., N], or None: where to begin, an earlier call's, of points that have moved little. g is made from it.
        g: [..., M], or None: the same; f then plays no part. With an earlier call's g, iterations go on where it ended.

    Returns:
        cost [...], f [..., N] and g [..., M]. cost is differentiable once, in x, y, a and b, with f and g held fixed:
        what the envelope theorem says of converged ones, at the price of one more pass. f and g have no gradient.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
        TypeError: an argument of the wrong type.

    Source: Cuturi, "Sinkhorn Distances"; Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn
        Divergences".
    """
    op = "sinkhorn"
    epsilon, tolerance = check_number(op, "epsilon", epsilon), check_number(op, "tolerance", tolerance)
    check_int(op, "iterations", iterations, 0)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"{op}: epsilon is {epsilon} and must be finite and more than 0")
    if not tolerance >= 0:
        raise ValueError(f"{op}: tolerance is {tolerance} and must not be negative")
    check_tensor(op, "a", a, optional=True)
    check_tensor(op, "b", b, optional=True)
    check_tensor(op, "f", f, optional=True)
    check_tensor(op, "g", g, optional=True)
    x, y = widened(op, x=x, y=y)
    lead, n, m = lead_of(op, x, y), x.shape[-2], y.shape[-2]
    for name, count in (("x", n), ("y", m)):
        if count == 0:
            raise ValueError(f"{op}: {name} has no rows and must have one")
    for name, weights in (("a", a), ("b", b)):
        if weights is None or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            continue
        if bool((weights < 0).any()):
            raise ValueError(f"{op}: {name} has a negative weight and must have none")
    of_x = x.new_full((*lead, n), 1 / n) if a is None else per_row(op, "a", a.to(x.dtype), lead, n).reshape(*lead, n)
    of_y = y.new_full((*lead, m), 1 / m) if b is None else per_row(op, "b", b.to(y.dtype), lead, m).reshape(*lead, m)
    log_x, log_y = of_x.detach().log(), of_y.detach().log()

    def potential(from_: Tensor, to: Tensor, other: Tensor, log_weights: Tensor) -> Tensor:
        lse = pairwise_logsumexp(from_, to, scale=-1 / epsilon, y_bias=other / epsilon + log_weights, score="euclidean")
        return -epsilon * lse

    with torch.no_grad():
        if g is not None:
            g = per_row(op, "g", g.detach().to(y.dtype), lead, m).reshape(*lead, m)
        elif f is not None:
            f = per_row(op, "f", f.detach().to(x.dtype), lead, n).reshape(*lead, n)
            g = potential(y.detach(), x.detach(), f, log_x)
        else:
            g = torch.zeros_like(of_y)
        before = None
        for _ in range(iterations):
            f = potential(x.detach(), y.detach(), g, log_y)
            g = potential(y.detach(), x.detach(), f, log_x)
            if tolerance > 0:
                if before is not None and bool(((f - before).abs() <= tolerance).all()):
                    break
                before = f
    f = potential(x, y, g.detach(), log_y)
    cost = (of_x * f).sum(-1) + (of_y * g).sum(-1)
    return cost, f.detach(), g


def _nearest(x: Tensor, centroids: Tensor, op: str) -> tuple[Tensor, Tensor]:
    """Squared distances and indices, [N]."""
    distances, codes = torch.ops.pycore.pairwise_topk(x.unsqueeze(0), centroids.unsqueeze(0), 1, True, None, None, op)
    return distances.reshape(-1), codes.reshape(-1)


def _distances_to(x: Tensor, centroid: Tensor) -> Tensor:
    index = torch.zeros(1, x.shape[0], 1, dtype=torch.int64, device=x.device)
    return torch.ops.pycore.pairwise_distances_at(x.unsqueeze(0), centroid.reshape(1, 1, -1), index).reshape(-1)


def _plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Rows drawn with the probability of their squared distance from those drawn before."""
    draws = torch.rand(k, dtype=torch.float64, generator=generator).tolist()
    n = x.shape[0]
    chosen = [min(int(draws[0] * n), n - 1)]
    nearest = _distances_to(x, x[chosen[0]])
    for draw in draws[1:]:
        sums = nearest.double().cumsum(0)
        total = float(sums[-1])
        if total > 0 and math.isfinite(total):
            at = int(torch.searchsorted(sums, torch.tensor(draw * total, dtype=torch.float64), right=True))
        else:  # all rows are chosen ones
            at = int(draw * n)
        chosen.append(min(at, n - 1))
        nearest = torch.minimum(nearest, _distances_to(x, x[chosen[-1]]))
    return x[chosen]


def _first_centroids(x: Tensor, k: int, seed: int, init: str | Tensor) -> Tensor:
    op = "kmeans"
    if isinstance(init, Tensor):
        check_tensor(op, "init", init)
        if init.shape != (k, x.shape[1]):
            raise ValueError(f"{op}: init has shape {list(init.shape)} and must have {[k, x.shape[1]]}")
        if not bool(torch.isfinite(init).all()):
            raise ValueError(f"{op}: init has a NaN or an infinity and must have none")
        return init.detach().to(x.dtype).clone()
    check_str(op, "init", init)
    generator = torch.Generator().manual_seed(seed % 2**63)
    if init == "kmeans++":
        return _plus_plus(x, k, generator)
    if init == "random":
        return x[torch.randperm(x.shape[0], generator=generator)[:k]]
    raise ValueError(f"{op}: init is '{init}' and must be kmeans++ or random, or a tensor of centroids")


def kmeans(
    x: Tensor, k: int, *, iterations: int = 10, seed: int = 0, init: str | Tensor = "kmeans++"
) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's algorithm: k centroids, each the mean of the rows that are nearest to it.

    The same result on any number of threads: assignments are exact, as `vq_encode`'s, and sums are of float64, rows in
    order. A centroid that no row is nearest to moves to the row that is furthest from its own.

    Args:
        x: [N, D], float32, bfloat16 or float16 (widened to float32); float64 runs plain loops.
        k: 1 to N.
        iterations: at least 0; fewer are done where no code changes.
        seed: of what the initialisation draws.
        init: "kmeans++", "random" (k of the rows), or centroids [k, D].

    Returns:
        centroids [k, D]; codes int64 [N], the nearest of these centroids; inertia, the sum of squared distances.
        float32, or float64. Nothing to differentiate.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; NaN or an infinity in x.
        TypeError: an argument of the wrong type.

    Source: Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding".
    """
    op = "kmeans"
    check_int(op, "k", k)
    check_int(op, "iterations", iterations, 0)
    check_int(op, "seed", seed)
    (x,) = widened(op, x=x)
    if x.dim() != 2:
        raise ValueError(f"{op}: x has shape {list(x.shape)} and must be [rows, channels]")
    if not 1 <= k <= x.shape[0]:
        raise ValueError(f"{op}: k is {k} and must be 1 to x's {x.shape[0]} rows")
    with torch.no_grad():
        x = x.detach()
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{op}: x has a NaN or an infinity and must have none")
        centroids = _first_centroids(x, k, seed, init)
        distances, codes = _nearest(x, centroids, op)
        for _ in range(iterations):
            counts, sums = torch.ops.pycore.vq_statistics(x, codes, k)
            empty = torch.nonzero(counts == 0).reshape(-1)
            centroids = sums / counts.clamp(min=1).unsqueeze(-1)
            if empty.numel():
                furthest = distances.sort(descending=True, stable=True).indices[: empty.numel()]
                centroids[empty] = x[furthest]
            before = codes
            distances, codes = _nearest(x, centroids, op)
            if torch.equal(codes, before) and not empty.numel():
                break
        return centroids, codes, distances.double().sum().to(x.dtype)


def pack_bits(x: Tensor) -> Tensor:
    """Whether each number is more than 0 (or True), eight to a byte, as `numpy.packbits(x > 0, axis=-1)`.

    Args:
        x: [..., D], of any dtype. The first of eight is the highest bit; the last byte is filled up with zeros.

    Returns:
        uint8 [..., ceil(D / 8)].

    Raises:
        ValueError: x is a scalar, or complex.
        TypeError: x is no tensor.
    """
    op = "pack_bits"
    check_tensor(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x is a scalar and must have shape [..., D]")
    if x.dtype.is_complex:
        raise ValueError(f"{op}: x has dtype {str(x.dtype)[6:]} and must have real numbers")
    bits = (x if x.dtype == torch.bool else x > 0).to(torch.uint8)
    count = (x.shape[-1] + 7) // 8
    bits = torch.nn.functional.pad(bits, (0, count * 8 - x.shape[-1])).reshape(*x.shape[:-1], count, 8)
    powers = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=x.device)
    return (bits * powers).sum(-1, dtype=torch.uint8)


def hamming_topk(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of y that differ from each row of x in the fewest bits, the nearest first, ties to the lowest index.

    Args:
        x: [..., N, B], uint8, as `pack_bits` makes it.
        y: [..., M, B], uint8. Leading dimensions broadcast.
        k: 1 to M.

    Returns:
        distances and indices, int64 [..., N, k].

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
        TypeError: an argument of the wrong type.
    """
    op = "hamming_topk"
    check_int(op, "k", k)
    for name, rows in (("x", x), ("y", y)):
        check_tensor(op, name, rows)
        if rows.dim() < 2:
            raise ValueError(f"{op}: {name} has shape {list(rows.shape)} and must be [..., rows, bytes]")
    lead = lead_of(op, x, y)
    results: Any = torch.ops.pycore.hamming_topk(batched(x, lead, 2), batched(y, lead, 2), k)
    distances, indices = (result.reshape(*lead, x.shape[-2], k) for result in results)
    return distances, indices
