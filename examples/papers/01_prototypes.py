# SPDX-License-Identifier: Apache-2.0
"""Li et al., "Deep Learning for Case-Based Reasoning through Prototypes" (arXiv 1710.04806).

An autoencoder whose code is classified by its distances to fifteen learned prototypes. Two of the loss's four terms
are `pycore.ops.pairwise_min`: every prototype near an example, every example near a prototype.
"""

import torch
from paper import Figures, Paper, Run, main, split_digits
from torch import Tensor, nn

from pycore import ops
from pycore.nn.linear import Projection

PAPER = Paper(
    1,
    "Deep Learning for Case-Based Reasoning through Prototypes",
    "classifying by distances to prototypes costs hardly any accuracy, and the two terms that tie prototypes and"
    " examples together make prototypes that decode to something that looks like an example",
    "scikit-learn's digits; codes of 16 channels, 15 prototypes; against the same encoder with a linear layer",
)
PROTOTYPES, CODE = 15, 16


class Network(nn.Module):
    """Encoder, decoder, prototypes, and classes of distances to prototypes (or of codes, without)."""

    def __init__(self, prototypes: bool) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([Projection(64, 96, bias=True), Projection(96, CODE, bias=True)])
        self.decoder = nn.ModuleList([Projection(CODE, 96, bias=True), Projection(96, 64, bias=True)])
        self.prototypes = nn.Parameter(torch.rand(PROTOTYPES, CODE)) if prototypes else None
        self.classes = nn.Parameter(torch.randn(10, PROTOTYPES if prototypes else CODE) * 0.1)

    def encode(self, x: Tensor) -> Tensor:
        """[n, 64] to [n, CODE], from 0 to 1 as in the paper."""
        return self.encoder[1](self.encoder[0](x).relu()).sigmoid()

    def decode(self, code: Tensor) -> Tensor:
        """The other way."""
        return self.decoder[1](self.decoder[0](code).relu()).sigmoid()

    def features(self, code: Tensor) -> Tensor:
        """What the classes are scored by: here the matrix itself is wanted, of 15 columns."""
        return code if self.prototypes is None else (code[:, None] - self.prototypes).square().sum(-1)


def trained(run: Run, label: str, x: Tensor, labels: Tensor, prototypes: bool, ties: float) -> Network:
    """The paper's loss: 20 times cross entropy, reconstruction, and the two terms of weight `ties`."""
    network = Network(prototypes)

    def loss(step: int) -> Tensor:
        chosen = run.integers(len(x), 100)
        code = network.encode(x[chosen])
        total = 20 * ops.linear_cross_entropy(network.features(code), network.classes, labels[chosen])
        total = total + (network.decode(code) - x[chosen]).square().sum(1).mean()
        if network.prototypes is not None and ties:
            of_example, of_prototype = ops.pairwise_min(code, network.prototypes)
            total = total + ties * (of_example.mean() + of_prototype.mean())
        return total

    run.fit(label, network, loss, 2500, learning_rate=3e-3, weight_decay=0.0)
    return network


@torch.no_grad()
def judge(network: Network, x: Tensor, test: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy, and how far decoded prototypes are from the nearest training image (squared)."""
    guess = ops.pairwise_topk(network.features(network.encode(test)), network.classes, 1)[1][:, 0]
    accuracy = (guess == labels).double().mean().item()
    if network.prototypes is None:
        return accuracy, 0.0
    return accuracy, ops.pairwise_min(network.decode(network.prototypes), x)[0].mean().item()


def experiment(run: Run) -> dict[str, float]:
    """With prototypes, without the two terms, and without prototypes."""
    x, labels, test, test_labels = split_digits(run)
    figures: dict[str, float] = {}
    for name, prototypes, ties in (("prototypes", True, 1.0), ("untied", True, 0.0), ("linear", False, 0.0)):
        network = trained(run, name, x, labels, prototypes, ties)
        figures[f"{name}, accuracy"], distance = judge(network, x, test, test_labels)
        if prototypes:
            figures[f"{name}, distance"] = distance
    distances, _ = ops.pairwise_topk(test, x, 1, score="euclidean")
    figures["a new image, distance"] = distances.mean().item()
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The paper has 99.2 % with and without prototypes, on MNIST."""
    return [
        (
            f["prototypes, accuracy"] > f["linear, accuracy"] - 0.015,
            f"accuracy {f['prototypes, accuracy']:.3f}, with a linear layer instead {f['linear, accuracy']:.3f}",
        ),
        (
            f.above("untied, distance", "prototypes, distance"),
            f"squared distance of a decoded prototype to the nearest image {f['prototypes, distance']:.2f}, without "
            f"the two terms {f['untied, distance']:.2f}; of a new image {f['a new image, distance']:.2f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
