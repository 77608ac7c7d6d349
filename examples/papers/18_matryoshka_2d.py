# SPDX-License-Identifier: Apache-2.0
"""Li et al., "2D Matryoshka Sentence Embeddings" (arXiv 2402.14776).

The contrastive loss (`pycore.ops.contrastive_loss`) of a pretrained encoder's upper layers, also on the first channels
and after an earlier layer, so that sentence vectors can be cut off in both directions.
"""

import functools

import torch
from minilm import States, Upper
from paper import Figures, Paper, Run, functions, main, words_of
from retrieval import Pairs
from torch import Tensor
from torch.nn import functional

from pycore import ops
from pycore.models.transformer import nearest_accuracy

PAPER = Paper(
    18,
    "2D Matryoshka Sentence Embeddings",
    "a model whose earlier layers and first channels are trained too keeps its quality where the embedding is cut off"
    " in either direction; one trained on the full embedding alone does not",
    "docstrings of 2,000 of the standard library's functions to the first words of their sources, one of 500;"
    " all-MiniLM-L6-v2 with its last three layers trained in 40 steps of 32 pairs, cut off after layer 4 or 5 and at"
    " 96, 48 or 24 of 384 channels; recall among the first 5",
)
FUNCTIONS, LENGTH, COUNT, STEPS = 2000, 20, 32, 40
BELOW, LAYERS, CHANNELS = 3, 3, (24, 48, 96, 384)


@functools.cache
def rows(quick: bool) -> list[tuple[str, str]]:
    """Sentences and sources of some functions, the same for all seeds."""
    found = [(sentence, " ".join(words_of(source))) for _, sentence, source in functions()]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [found[i] for i in order[: 200 if quick else FUNCTIONS].tolist()]


@functools.cache
def below(quick: bool) -> States:
    """What the layers that stay make of all texts."""
    run = Run(0, quick, torch.Generator())
    return States(run, [text for row in rows(quick) for text in row], LENGTH, BELOW)


def cut(vectors: Tensor, channels: int) -> Tensor:
    """The first channels, at length 1."""
    return functional.normalize(vectors[:, :channels], dim=-1)


def place(layer: int, channels: int) -> str:
    """Where an embedding is cut off."""
    return f"layer {BELOW + layer + 1}, {channels} channels"


def experiment(run: Run) -> dict[str, float]:
    """Recall after every trained layer and at several widths: as it comes, with both losses, and with one."""
    data, states = Pairs(run, *map(list, zip(*rows(run.quick), strict=True))), below(run.quick)
    sides = states.of(data.left), states.of(data.right)
    tests = states.of(data.test_left), states.of(data.test_right)
    figures: dict[str, float] = {}
    for name in ("as it comes", "2D", "full only"):
        model = Upper(states)

        def loss(step: int, name: str = name, model: Upper = model) -> Tensor:
            chosen = run.integers(len(sides[0]), COUNT)
            left, right = (model.each(side[chosen]) for side in sides)
            layers, widths = [-1], [CHANNELS[-1]]
            if name == "2D":  # an earlier layer and a width drawn for each step, as in the paper
                layers, widths = [*layers, int(run.integers(LAYERS - 1))], [*widths, CHANNELS[int(run.integers(3))]]
            losses = [
                ops.contrastive_loss(cut(left[layer], width), cut(right[layer], width), scale=20.0)
                for layer in layers
                for width in widths
            ]
            return torch.stack(losses).mean()

        if name != "as it comes":
            run.fit(name, model, loss, STEPS, learning_rate=2e-4)
        queries, answers = (model.embed(test) for test in tests)
        for layer in range(LAYERS):
            for width in CHANNELS:
                recall = nearest_accuracy(cut(queries[layer], width), cut(answers[layer], width), 5)
                figures[f"{name}, {place(layer, width)}"] = recall
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Cut off in both directions, in either, and whole."""

    def row(where: str, by: float = 0.0) -> tuple[bool, str]:
        values = ", ".join(f"{name} {f[f'{name}, {where}']:.3f}" for name in ("2D", "full only", "as it comes"))
        return f.above(f"2D, {where}", f"full only, {where}", by), f"{where}: {values}"

    held, whole = row(place(2, 384), -0.02)
    return [
        *(row(where) for where in (place(0, 48), place(0, 384), place(2, 48))),
        (held, f"whole, less than 0.02 lower with every seed, {whole}"),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
