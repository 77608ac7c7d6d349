# SPDX-License-Identifier: Apache-2.0
"""Li et al., "2D Matryoshka Sentence Embeddings" (arXiv 2402.14776).

The contrastive loss (`pycore.ops.contrastive_loss`) also on the first channels of an earlier layer, so that sentence
vectors can be cut off in both directions.
"""

import torch
from paper import Figures, Paper, Run, main
from retrieval import DualEncoder, documented, reciprocal_rank
from torch import Tensor
from torch.nn import functional

from pycore.models.bytelm import BytelmConfig

PAPER = Paper(
    18,
    "2D Matryoshka Sentence Embeddings",
    "a model whose earlier layers and first channels are trained too keeps its quality where the embedding is cut off"
    " in either direction; one trained on the full embedding alone does not",
    "docstrings of the standard library to the functions they stand in, one of 500; 3 blocks of width 64, cut off"
    " after 1 or 2 and at 8 or 16 channels; mean reciprocal rank",
)
LENGTH, LAYERS, WIDTHS = 20, 3, (8, 16, 32, 64)
SHAPE = BytelmConfig(layers=LAYERS, dim=64, heads=4, kv_heads=4)


def cut(vectors: Tensor, width: int) -> Tensor:
    """The first channels, at length 1."""
    return functional.normalize(vectors[:, :width], dim=-1)


def experiment(run: Run) -> dict[str, float]:
    """Two models, each at several depths and widths."""
    data = documented(run)
    sides = [data.words.tokens(texts, LENGTH) for texts in (data.left, data.right)]
    tests = [data.words.tokens(texts, LENGTH) for texts in (data.test_left, data.test_right)]
    figures: dict[str, float] = {}
    for name in ("2D", "full only"):
        torch.manual_seed(run.seed)
        model = DualEncoder(data.words.size, SHAPE)

        def loss(step: int, name: str = name, model: DualEncoder = model) -> Tensor:
            chosen = run.integers(len(sides[0][0]), 48)
            total = model.loss(*(model(tokens[chosen], lengths[chosen]) for tokens, lengths in sides))
            if name == "2D":  # a layer and a width drawn for each step, as in the paper
                depth, width = int(run.integers(LAYERS, low=1)), WIDTHS[int(run.integers(3))]
                early = [model(tokens[chosen], lengths[chosen], depth) for tokens, lengths in sides]
                total = total + model.loss(*early) + model.loss(*(cut(part, width) for part in early))
            return total

        run.fit(name, model, loss, 200, learning_rate=3e-3)
        for depth in (1, 2, 3):
            queries, answers = (model.embed(*test, depth) for test in tests)
            for width in (8, 16, 64):
                rank = reciprocal_rank(cut(queries, width), cut(answers, width))
                figures[f"{name}, {depth} layers, {width} channels"] = rank
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Full and cut off."""

    def both(place: str) -> str:
        return f"{place}: 2D {f[f'2D, {place}']:.3f}, full only {f[f'full only, {place}']:.3f}"

    small, full = "1 layers, 16 channels", "3 layers, 64 channels"
    return [
        (f.above(f"2D, {small}", f"full only, {small}"), both(small)),
        (f[f"2D, {full}"] > 0.9 * f[f"full only, {full}"], both(full)),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
