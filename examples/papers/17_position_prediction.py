# SPDX-License-Identifier: Apache-2.0
"""Zhai et al., "Position Prediction as an Effective Pretraining Strategy" (arXiv 2207.07611).

A transformer without positions sees the sixteen patches of a digit, a random part of which serve as keys
(`pycore.schedules.KeySubset`), and says of every patch where it was. Then it learns from a few labels.
"""

import torch
from paper import Figures, Paper, Run, digits, main
from torch import Tensor, nn

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer
from pycore.schedules import Full, KeySubset

PAPER = Paper(
    17,
    "Position Prediction as an Effective Pretraining Strategy",
    "saying where each part of the input was, from content alone, prepares a transformer: it beats training from"
    " scratch, and even a model that is told the positions",
    "scikit-learn's digits as 16 patches of 2 x 2; 3 blocks of width 64; 100 labels; test on 597",
)
PATCHES, LABELLED, KEYS = 16, 100, 10
SHAPE = BytelmConfig(layers=3, dim=64, heads=4, kv_heads=4, position="none")


def patches(images: Tensor) -> Tensor:
    """[n, 64] images to [n, 16, 4] patches of 2 x 2 pixels."""
    return images.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, PATCHES, 4)


class Classifier(nn.Module):
    """The mean of the encoder's states, and what it says of the class."""

    def __init__(self, encoder: Transformer) -> None:
        super().__init__()
        self.encoder = encoder
        self.classes = nn.Parameter(torch.zeros(10, SHAPE.dim))

    def states(self, x: Tensor) -> Tensor:
        """[n, dim]."""
        return self.encoder(x, schedule=Full()).mean(1)

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """The share of right answers."""
        with torch.no_grad():
            guess = ops.pairwise_topk(self.states(x), self.classes, 1)[1][:, 0]
        return (guess == labels).double().mean().item()


def pretrain(run: Run, encoder: Transformer, images: Tensor) -> float:
    """Learns to say where patches were; returns how often it is right, in a new order with all keys."""
    where = nn.Parameter(torch.randn(PATCHES, SHAPE.dim) * 0.02)

    def loss(step: int) -> Tensor:
        batch = images[run.integers(len(images), 64)]
        order = run.uniform(64, PATCHES).argsort(1)
        shuffled = batch.gather(1, order[..., None].expand(-1, -1, 4))
        keys = torch.zeros(64, PATCHES, dtype=torch.bool).scatter_(1, run.uniform(64, PATCHES).argsort(1)[:, :KEYS], 1)
        states = encoder(shuffled, schedule=KeySubset(keys, causal=False))
        return ops.linear_cross_entropy(states, where, order)

    run.fit("positions", [*encoder.parameters(), where], loss, 900)
    with torch.no_grad():
        order = run.permutation(PATCHES)
        states = encoder(images[:500, order], schedule=Full())
        guess = ops.pairwise_topk(states.flatten(0, 1), where, 1)[1].view(-1, PATCHES)
    return (guess == order).double().mean().item()


def finetune(run: Run, label: str, encoder: Transformer, x: Tensor, labels: Tensor) -> Classifier:
    """Learns classes from a few labelled images."""
    model = Classifier(encoder)

    def loss(step: int) -> Tensor:
        chosen = run.integers(len(x), 50)
        return ops.linear_cross_entropy(model.states(x[chosen]), model.classes, labels[chosen])

    run.fit(label, model, loss, 200)
    return model


def experiment(run: Run) -> dict[str, float]:
    """Accuracy from 100 labels: pretrained, from scratch, and from scratch with positions."""
    images, labels = digits()
    order = run.permutation(len(images))
    x, labels = patches(images[order]), labels[order]
    test, pool = slice(0, 597), slice(597, None)
    few, few_labels = x[597 : 597 + LABELLED], labels[597 : 597 + LABELLED]
    pretrained = Transformer(SHAPE, inputs=4)
    figures = {"position accuracy": pretrain(run, pretrained, x[pool])}
    for name, encoder in (
        ("pretrained", pretrained),
        ("from scratch", Transformer(SHAPE, inputs=4)),
        ("from scratch, positions", Transformer(SHAPE, inputs=4, absolute=PATCHES)),
    ):
        figures[name] = finetune(run, name, encoder, few, few_labels).accuracy(x[test], labels[test])
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Against chance, 1/16, and against both baselines."""
    return [
        (f["position accuracy"] > 0.4, f"{f['position accuracy']:.0%} of patches put right, chance is 6 %"),
        (
            f.above("pretrained", "from scratch"),
            f"accuracy from {LABELLED} labels {f['pretrained']:.3f}, from scratch {f['from scratch']:.3f}",
        ),
        (
            f.above("pretrained", "from scratch, positions"),
            f"and from scratch with learned positions {f['from scratch, positions']:.3f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
