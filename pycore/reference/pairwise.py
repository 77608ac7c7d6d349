# SPDX-License-Identifier: Apache-2.0
"""Reductions of pairwise scores in plain torch, with the matrix, for tests and readers; run them in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def scores(x: Tensor, y: Tensor, score: str = "dot") -> Tensor:
    """Takes x [..., N, D] and y [..., M, D]; gives [..., N, M]."""
    if score == "euclidean":
        return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    if score == "cosine":
        x, y = (torch.nn.functional.normalize(rows, dim=-1, eps=0.0).nan_to_num() for rows in (x, y))
    return x @ y.mT


def pairwise_logsumexp(
    x: Tensor, y: Tensor, scale: float = 1.0, x_bias: Tensor | None = None, y_bias: Tensor | None = None,
    score: str = "dot",
) -> Tensor:  # fmt: skip
    """Gives [..., N]."""
    logits = scale * scores(x, y, score)
    logits = logits if x_bias is None else logits + x_bias.unsqueeze(-1)
    logits = logits if y_bias is None else logits + y_bias.unsqueeze(-2)
    return logits.logsumexp(-1)


def pairwise_topk(x: Tensor, y: Tensor, k: int, score: str = "dot") -> tuple[Tensor, Tensor]:
    """Gives scores and indices [..., N, k]: the best first, of equal ones the lowest index."""
    ordered = scores(x, y, score).sort(dim=-1, descending=score != "euclidean", stable=True)
    return ordered.values[..., :k], ordered.indices[..., :k]


def pairwise_min(x: Tensor, y: Tensor, score: str = "euclidean") -> tuple[Tensor, Tensor]:
    """Gives the least score of each row of x [..., N] and of y [..., M]."""
    matrix = scores(x, y, score)
    return matrix.amin(-1), matrix.amin(-2)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Takes x [N, D], weight [V, D], target [N]; z_loss times the squared log-sum-exp joins each row's loss."""
    logits = torch.nn.functional.linear(x, weight, bias)
    logits = softcap * (logits / softcap).tanh() if softcap else logits
    losses = torch.nn.functional.cross_entropy(
        logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    kept = target != ignore_index
    losses = losses + kept * z_loss * logits.logsumexp(-1).square()
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / kept.sum()


def contrastive_loss(a: Tensor, b: Tensor, scale: float, symmetric: bool = True) -> Tensor:
    """Row i of a belongs to row i of b."""
    logits, rows = scale * a @ b.T, torch.arange(a.shape[0])
    forth = torch.nn.functional.cross_entropy(logits, rows)
    return (forth + torch.nn.functional.cross_entropy(logits.T, rows)) / 2 if symmetric else forth


def maxsim(query: Tensor, document: Tensor) -> Tensor:
    """Takes query [Q, L, D] and document [P, M, D]; gives [Q, P]."""
    return torch.einsum("qld,pmd->qplm", query, document).amax(-1).sum(-1)


def sinkhorn(x: Tensor, y: Tensor, epsilon: float, iterations: int, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Takes x [N, D], y [M, D] and their weights; gives the cost and both potentials."""
    cost = scores(x, y, "euclidean")
    g = torch.zeros_like(b)

    def row(g: Tensor) -> Tensor:
        return -epsilon * ((g - cost) / epsilon + b.log()).logsumexp(1)

    for _ in range(iterations):
        f = row(g)
        g = -epsilon * ((f.unsqueeze(1) - cost) / epsilon + a.log().unsqueeze(1)).logsumexp(0)
    f = row(g)
    return a @ f + b @ g, f, g
