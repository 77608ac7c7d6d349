# SPDX-License-Identifier: Apache-2.0
"""What the papers on retrieval share: documented functions of the standard library, and a dual encoder of words."""

from __future__ import annotations

import math

import torch
from paper import Run, Words, functions
from torch import Tensor, nn

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer, mean_pool
from pycore.schedules import Full

SHAPE = BytelmConfig(layers=2, dim=64, heads=4, kv_heads=4, position="rope", max_distance=1024)


class Pairs:
    """Texts in two languages, say sentences and functions, split into those to learn from and 500 to be asked."""

    def __init__(self, run: Run, left: list[str], right: list[str], test: int = 500) -> None:
        test = run.pick(test, 40)
        order = run.permutation(len(left)).tolist()[: run.pick(len(left), 200)]
        self.left, self.right = [left[i] for i in order[test:]], [right[i] for i in order[test:]]
        self.test_left, self.test_right = [left[i] for i in order[:test]], [right[i] for i in order[:test]]
        self.words = Words(self.left + self.right)


def documented(run: Run, longest: int = 10**9, shortest: int = 0) -> Pairs:
    """Docstrings' first sentences and the functions they stand in, of so many characters."""
    rows = [row for row in functions() if shortest <= len(row[2]) <= longest]
    return Pairs(run, [row[1] for row in rows], [row[2] for row in rows])


class DualEncoder(nn.Module):
    """One encoder for both sides, and the temperature of their products."""

    def __init__(self, vocabulary: int, shape: BytelmConfig = SHAPE) -> None:
        super().__init__()
        self.encoder = Transformer(shape, vocabulary=vocabulary)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, tokens: Tensor, lengths: Tensor, layers: int | None = None) -> Tensor:
        """Vectors of length 1, [texts, dim]."""
        return mean_pool(self.encoder(tokens, schedule=Full(), lengths=lengths, layers=layers), lengths)

    def loss(self, left: Tensor, right: Tensor) -> Tensor:
        """InfoNCE over the batch."""
        return ops.contrastive_loss(left, right, scale=self.log_scale.exp().clamp(max=100.0))

    @torch.no_grad()
    def embed(self, tokens: Tensor, lengths: Tensor, layers: int | None = None) -> Tensor:
        """Many texts, a few at a time."""
        parts = zip(tokens.split(128), lengths.split(128), strict=True)
        return torch.cat([self(part, counts, layers) for part, counts in parts])


def reciprocal_rank(queries: Tensor, answers: Tensor) -> float:
    """Mean of one over the rank at which row i of the answers comes for row i of the queries, 0 behind 100."""
    k = min(100, len(answers))
    found = ops.pairwise_topk(queries, answers, k)[1] == torch.arange(len(queries))[:, None]
    return (found / torch.arange(1, k + 1)).sum(1).mean().item()
