# SPDX-License-Identifier: Apache-2.0
"""Mueller et al., "Meta-training with Demonstration Retrieval for Efficient Few-shot Learning" (arXiv 2307.00119).

A small model reads a question with four labelled demonstrations of the same task, found by `pycore.ops.pairwise_topk`
in a bank, and is trained on many tasks to answer. Then it is asked about tasks that it has never seen.
"""

import torch
from paper import Figures, Paper, Run, main
from torch import Tensor, nn

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer
from pycore.schedules import Full

PAPER = Paper(
    16,
    "Meta-training with Demonstration Retrieval for Efficient Few-shot Learning",
    "demonstrations that are retrieved for the question help a meta-trained model more than random ones, and far more"
    " than none, on tasks that it has not seen",
    "tasks of 8 random clusters with random labels out of 4, in 8 dimensions; banks of 64 examples; 4 demonstrations;"
    " an encoder of 2 blocks of width 64",
)
DIM, LABELS, CLUSTERS, BANK, SHOTS = 8, 4, 8, 64, 4
SHAPE = BytelmConfig(layers=2, dim=64, heads=4, kv_heads=4, position="none")


def tasks(run: Run, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Banks [count, BANK, DIM] with labels, and a question with its label of each task."""
    centres = run.normal(count, CLUSTERS, DIM)
    names = run.integers(LABELS, count, CLUSTERS)
    cluster = run.integers(CLUSTERS, count, BANK + 1)
    x = centres.gather(1, cluster[..., None].expand(-1, -1, DIM)) + 0.4 * run.normal(count, BANK + 1, DIM)
    labels = names.gather(1, cluster)
    return x[:, 1:], labels[:, 1:], x[:, :1], labels[:, 0]


def prompts(run: Run, how: str, count: int) -> tuple[Tensor, Tensor]:
    """Questions and their demonstrations [count, 1 + SHOTS, DIM + LABELS + 1], and the answers."""
    bank, labels, question, answer = tasks(run, count)
    if how == "retrieved":
        chosen = ops.pairwise_topk(question, bank, SHOTS, score="euclidean")[1][:, 0]
    else:
        chosen = run.uniform(count, BANK).argsort(1)[:, :SHOTS]
    shown = bank.gather(1, chosen[..., None].expand(-1, -1, DIM))
    named = nn.functional.one_hot(labels.gather(1, chosen), LABELS).float()
    if how == "none":
        shown, named = torch.zeros_like(shown), torch.zeros_like(named)
    rows = torch.zeros(count, 1 + SHOTS, DIM + LABELS + 1)
    rows[:, :1, :DIM], rows[:, 0, -1] = question, 1.0
    rows[:, 1:, :DIM], rows[:, 1:, DIM:-1] = shown, named
    return rows, answer


def experiment(run: Run) -> dict[str, float]:
    """Accuracy on new tasks, of a model trained for each kind of demonstrations."""
    figures: dict[str, float] = {}
    for how in ("retrieved", "random", "none"):
        model = Transformer(SHAPE, inputs=DIM + LABELS + 1)
        classes = nn.Parameter(torch.zeros(LABELS, SHAPE.dim))

        def loss(step: int, how: str = how, model: Transformer = model, classes: Tensor = classes) -> Tensor:
            rows, answer = prompts(run, how, 64)
            return ops.linear_cross_entropy(model(rows, schedule=Full())[:, 0], classes, answer)

        run.fit(how, [*model.parameters(), classes], loss, 900)
        with torch.no_grad():
            rows, answer = prompts(run, how, run.pick(4000, 50))
            guess = ops.pairwise_topk(model(rows, schedule=Full())[:, 0], classes, 1)[1][:, 0]
        figures[how] = (guess == answer).double().mean().item()
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Chance is one in four."""
    return [
        (
            f.above("retrieved", "random", 0.1),
            f"accuracy on new tasks {f['retrieved']:.3f} with retrieved demonstrations, {f['random']:.3f} with random "
            f"ones, {f['none']:.3f} with none",
        ),
        (f.above("random", "none", 0.02), "random demonstrations are better than none"),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
