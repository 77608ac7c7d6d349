# SPDX-License-Identifier: Apache-2.0
"""Seth et al., "UNFUSED: UNsupervised Finetuning Using SElf supervised Distillation" (arXiv 2303.05668).

An encoder learns from images without labels that shifted copies belong together (`pycore.ops.contrastive_loss`); its
clusters (`pycore.ops.kmeans`) are what a smaller student learns first, before it is given a few labels.
"""

import torch
from paper import Figures, Paper, Run, main, split_digits
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.nn.linear import Projection

PAPER = Paper(
    50,
    "UNFUSED: UNsupervised Finetuning Using SElf supervised Distillation",
    "a smaller student that first learns a self-supervised encoder's clusters as labels is better after finetuning on"
    " few labels than the encoder finetuned directly, and than a student from scratch",
    "scikit-learn's digits, 50 labels; encoder of 64, 192 and 32 units, student with 96 in place of 192; 40 clusters",
)
CODE, CLUSTERS, LABELLED = 32, 40, 50


class Encoder(nn.Module):
    """Hidden units and a code, with as many classes as are asked for."""

    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.hidden, self.code = Projection(64, hidden, bias=True), Projection(hidden, CODE, bias=True)
        self.classes = nn.Parameter(torch.zeros(classes, CODE))

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self.hidden(x).relu())

    def fresh(self, classes: int) -> "Encoder":
        """The same weights with other classes."""
        self.classes = nn.Parameter(torch.zeros(classes, CODE))
        return self


def views(run: Run, x: Tensor) -> Tensor:
    """Copies that are shifted by up to a pixel, with noise and pixels that are missing."""
    images = functional.pad(x.view(-1, 8, 8), (1, 1, 1, 1))
    down, right = int(run.integers(3)), int(run.integers(3))
    shifted = images[:, down : down + 8, right : right + 8].reshape(-1, 64)
    return (shifted + 0.1 * run.normal(*x.shape)) * (run.uniform(*x.shape) > 0.15)


def supervised(run: Run, label: str, model: Encoder, x: Tensor, labels: Tensor, steps: int) -> Encoder:
    """Learns labels, real or not."""

    def loss(step: int) -> Tensor:
        chosen = run.integers(len(x), min(64, len(x)))
        return ops.linear_cross_entropy(model(x[chosen]), model.classes, labels[chosen])

    run.fit(label, model, loss, steps)
    return model


def self_supervised(run: Run, x: Tensor) -> Encoder:
    """An encoder to which two views of an image are alike."""
    model = Encoder(192, 10)

    def loss(step: int) -> Tensor:
        batch = x[run.integers(len(x), 128)]
        left, right = (functional.normalize(model(views(run, batch)), dim=-1) for _ in range(2))
        return ops.contrastive_loss(left, right, scale=10.0)

    run.fit("self-supervised", model, loss, 500)
    return model


def experiment(run: Run) -> dict[str, float]:
    """Accuracy after 50 labels: the student, the encoder, and a student from scratch."""
    x, labels, test, test_labels = split_digits(run)
    few, few_labels = x[:LABELLED], labels[:LABELLED]
    encoder = self_supervised(run, x)
    with torch.no_grad():
        codes = functional.normalize(encoder(x), dim=-1)
    clusters = ops.kmeans(codes, CLUSTERS, iterations=30, seed=run.seed)[1]
    student = supervised(run, "clusters", Encoder(96, CLUSTERS), x, clusters, 800)
    figures: dict[str, float] = {}
    for name, model in (
        ("distilled student", student.fresh(10)),
        ("encoder", encoder),
        ("student from scratch", Encoder(96, 10)),
    ):
        supervised(run, name, model, few, few_labels, 300)
        with torch.no_grad():
            guess = ops.pairwise_topk(model(test), model.classes, 1)[1][:, 0]
        figures[name] = (guess == test_labels).double().mean().item()
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Half the encoder's parameters; the paper saves 40 %."""
    return [
        (
            f.above("distilled student", "student from scratch"),
            f"accuracy from {LABELLED} labels {f['distilled student']:.3f}, from scratch "
            f"{f['student from scratch']:.3f}",
        ),
        (f["distilled student"] > f["encoder"], f"the encoder finetuned directly {f['encoder']:.3f}"),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
