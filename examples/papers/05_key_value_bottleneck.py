# SPDX-License-Identifier: Apache-2.0
"""Träuble et al., "Discrete Key-Value Bottleneck" (arXiv 2207.11240).

Classes come two at a time and never again. `pycore.nn.DiscreteKeyValueBottleneck` changes the values of the keys that
an image hits and no others; a linear layer and a network change everything.
"""

import torch
from paper import Figures, Paper, Run, main, split_digits
from torch import Tensor, nn

from pycore import ops
from pycore.nn import DiscreteKeyValueBottleneck
from pycore.nn.linear import Projection

PAPER = Paper(
    5,
    "Discrete Key-Value Bottleneck",
    "where classes come one after another and no task boundaries are known, learning sparse values behind frozen keys"
    " forgets much less than layers that share their weights",
    "scikit-learn's digits, five times two classes, each 100 steps of 64 images; 64 codebooks of 128 keys in 8 random"
    " projections, keys learned without labels; against a linear layer and a network of 128 hidden units,"
    " each at the best of three learning rates",
)
BOOKS, KEYS, KEY_DIM, LABELS = 64, 128, 8, 10
RATES = (0.3, 0.03, 0.003)


class Bottleneck(nn.Module):
    """Keys that are learned first, and values that are logits."""

    def __init__(self, x: Tensor, rounds: int) -> None:
        super().__init__()
        self.memory = DiscreteKeyValueBottleneck(
            KEY_DIM, num_memories=KEYS, dim_embed=64, num_memory_codebooks=BOOKS, dim_memory=LABELS, decay=0.9,
            kmeans_init=True, threshold_ema_dead_code=1,
        )  # fmt: skip
        for _ in range(rounds):
            self.memory(x[None])
        self.memory.freeze_keys()

    def forward(self, x: Tensor) -> Tensor:
        return self.memory(x[None])[0]


class Layers(nn.Module):
    """A linear layer, or one after hidden units."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = Projection(64, hidden, bias=True) if hidden else None
        self.out = Projection(hidden or 64, LABELS, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x if self.hidden is None else self.hidden(x).relu())


def learn(run: Run, model: nn.Module, x: Tensor, labels: Tensor, rate: float) -> None:
    """Two classes at a time, by plain gradient descent."""
    identity = torch.eye(LABELS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for task in range(5):
        own = ((labels == 2 * task) | (labels == 2 * task + 1)).nonzero()[:, 0]
        for _ in range(run.pick(100, 2)):
            chosen = own[run.integers(len(own), 64)]
            # The logits are ten numbers; their cross entropy is the op's, whose "classes" are then the unit vectors.
            loss = ops.linear_cross_entropy(model(x[chosen]), identity, labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def experiment(run: Run) -> dict[str, float]:
    """Accuracy on all ten classes after the last two."""
    x, labels, test, test_labels = split_digits(run)
    figures: dict[str, float] = {}
    for name, make, rates in (
        ("bottleneck", lambda: Bottleneck(x, run.pick(20, 1)), (10.0,)),
        ("linear", lambda: Layers(0), RATES),
        ("network", lambda: Layers(128), RATES),
    ):
        best = 0.0  # of the baselines' rates, the one that is best in the end
        for rate in rates:
            model = make()
            learn(run, model, x, labels, rate)
            model.eval()
            with torch.no_grad():
                guess = model(test).argmax(-1)
            best = max(best, (guess == test_labels).double().mean().item())
        figures[name] = best
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Both baselines have seen the same images in the same order."""
    return [
        (
            f["bottleneck"] > 0.9 and f.above("bottleneck", "linear", 0.1) and f.above("bottleneck", "network", 0.1),
            f"accuracy over all ten classes at the end {f['bottleneck']:.3f}; a linear layer {f['linear']:.3f}, a "
            f"network {f['network']:.3f}",
        )
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
