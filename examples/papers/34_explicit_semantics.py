# SPDX-License-Identifier: Apache-2.0
"""Bogdanova and Yazdani, "SESA: Supervised Explicit Semantic Analysis" (arXiv 1708.03246).

Texts are embedded in a space whose dimensions have names: the words that functions of the standard library are made of
stand for the paper's skills. Ranking by `pycore.ops.contrastive_loss`.
"""

import torch
from paper import Figures, Paper, Run, main
from retrieval import DualEncoder, documented, reciprocal_rank
from torch import Tensor
from torch.nn import functional

from pycore.nn.linear import Projection

PAPER = Paper(
    34,
    "SESA: Supervised Explicit Semantic Analysis",
    "comparing texts in a space whose dimensions are known concepts ranks as well as a latent space, and says why",
    "docstrings of the standard library to the functions they stand in, one of 500; 128 dimensions, which are either"
    " the 128 most frequent words of functions or nothing in particular; 2 blocks of width 64; mean reciprocal rank",
)
LENGTH, CONCEPTS, COUNT = 24, 128, 48


class Explicit(DualEncoder):
    """Weights of the concepts, none below zero; compared at length 1."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary)
        self.out = Projection(64, CONCEPTS, bias=True)

    def scores(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[texts, CONCEPTS], a logit for each concept."""
        return self.out(super().forward(tokens, lengths) * 8.0)

    def compared(self, scores: Tensor) -> Tensor:
        """What products are taken of."""
        return functional.normalize(functional.softplus(scores), dim=-1)


def concepts_of(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Which of the most frequent words (tokens 2 to CONCEPTS + 1) a function has: float [texts, CONCEPTS]."""
    counted = torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)
    rows = torch.zeros(len(tokens), CONCEPTS + 2)
    return rows.scatter_(1, counted.where(counted < CONCEPTS + 2, 0), 1.0)[:, 2:]


def experiment(run: Run) -> dict[str, float]:
    """With the concepts as targets, and without."""
    data = documented(run)
    sides = [data.words.tokens(texts, LENGTH) for texts in (data.left, data.right)]
    tests = [data.words.tokens(texts, LENGTH) for texts in (data.test_left, data.test_right)]
    named, test_named = (concepts_of(*data.words.tokens(texts, 200)) for texts in (data.right, data.test_right))
    figures: dict[str, float] = {}
    for name in ("explicit", "latent"):
        torch.manual_seed(run.seed)
        model = Explicit(data.words.size)

        def loss(step: int, name: str = name, model: Explicit = model) -> Tensor:
            chosen = run.integers(len(named), COUNT)
            scores = [model.scores(tokens[chosen], lengths[chosen]) for tokens, lengths in sides]
            total = model.loss(*(model.compared(part) for part in scores))
            if name == "explicit":  # what a docstring speaks of is what its function has
                wanted = named[chosen]
                total = total + 3 * sum(functional.binary_cross_entropy_with_logits(part, wanted) for part in scores)
            return total

        run.fit(name, model, loss, 280, learning_rate=3e-3)
        with torch.no_grad():
            query, answer = (model.scores(*test) for test in tests)
        figures[f"{name}, rank"] = reciprocal_rank(model.compared(query), model.compared(answer))
        best = query.argsort(1, descending=True)[:, :3]
        figures[f"{name}, top 3 true"] = test_named.gather(1, best).mean().item()
    usual = named.mean(0).argsort(descending=True)[:3]
    figures["most frequent 3 true"] = test_named[:, usual].mean().item()
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Interpretable: a docstring's largest dimensions are words that its function has, which it has not seen."""
    return [
        (
            f["explicit, rank"] > f["latent, rank"] - 0.02,
            f"mean reciprocal rank {f['explicit, rank']:.3f} in the explicit space, {f['latent, rank']:.3f} in a "
            "latent one",
        ),
        (
            f.above("explicit, top 3 true", "most frequent 3 true")
            and f.above("explicit, top 3 true", "latent, top 3 true"),
            f"of a docstring's three largest dimensions {f['explicit, top 3 true']:.0%} are words of its function; of "
            f"the three most frequent words {f['most frequent 3 true']:.0%}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
