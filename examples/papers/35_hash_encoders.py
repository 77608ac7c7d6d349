# SPDX-License-Identifier: Apache-2.0
"""He et al., "Neural networks behave as hash encoders: An empirical study" (arXiv 2101.05490).

Which ReLUs of a network are on is a code of a few bits (`pycore.ops.pack_bits`); neighbours are counted in bits that
differ (`pycore.ops.hamming_topk`) and clusters found by `pycore.ops.kmeans`.
"""

import torch
from paper import Figures, Paper, Run, main, split_digits
from torch import Tensor, nn

from pycore import ops
from pycore.nn.linear import Projection

PAPER = Paper(
    35,
    "Neural networks behave as hash encoders: An empirical study",
    "which ReLUs are on is a code that tells almost every training example from the others, and from which k-nearest"
    " neighbours and k-means find the classes; training makes it so",
    "scikit-learn's digits; a network of 64, 128, 128 and 10 units, so codes of 256 bits; before and after training",
)


class Network(nn.Module):
    """Two layers of ReLUs and the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Projection(64, 128, bias=True), Projection(128, 128, bias=True)
        self.classes = nn.Parameter(torch.zeros(10, 128))

    def layers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What both layers give."""
        first = self.first(x).relu()
        return first, self.second(first).relu()

    @torch.no_grad()
    def code(self, x: Tensor) -> Tensor:
        """Bool [n, 256]."""
        return torch.cat([layer > 0 for layer in self.layers(x)], dim=1)


def judge(network: Network, x: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """How many training codes are unique, and what two simple algorithms make of the codes."""
    codes, test_codes = network.code(x), network.code(test)
    packed, test_packed = ops.pack_bits(codes), ops.pack_bits(test_codes)
    near = labels[ops.hamming_topk(test_packed, packed, 5)[1]]
    guess = near.mode(1).values
    centroids, clusters, _ = ops.kmeans(codes.float(), 30, iterations=20)
    members = torch.zeros(30, 10).index_put_((clusters, labels), torch.ones(len(labels)), accumulate=True)
    own = ops.vq_encode(test_codes.float(), centroids)[:, 0]
    return {
        "unique": len(packed.unique(dim=0)) / len(packed),
        "5 nearest neighbours": (guess == test_labels).double().mean().item(),
        "30 means": (members.argmax(1)[own] == test_labels).double().mean().item(),
    }


def experiment(run: Run) -> dict[str, float]:
    """The code of a network as it starts, and as it ends."""
    x, labels, test, test_labels = split_digits(run)
    network = Network()
    figures = {f"untrained, {name}": value for name, value in judge(network, x, labels, test, test_labels).items()}

    def loss(step: int) -> Tensor:
        chosen = run.integers(len(x), 64)
        return ops.linear_cross_entropy(network.layers(x[chosen])[1], network.classes, labels[chosen])

    run.fit("classes", network, loss, 1500)
    figures.update({f"trained, {name}": value for name, value in judge(network, x, labels, test, test_labels).items()})
    with torch.no_grad():
        guess = ops.pairwise_topk(network.layers(test)[1], network.classes, 1)[1][:, 0]
    figures["the network itself"] = (guess == test_labels).double().mean().item()
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Determinism and categorisation, as the paper calls them."""
    both = ("5 nearest neighbours", "30 means")
    neighbours, means = ([f[f"{when}, {name}"] for when in ("trained", "untrained")] for name in both)
    return [
        (f["trained, unique"] > 0.99, f"{f['trained, unique']:.1%} of training codes belong to one example"),
        (
            neighbours[0] > f["the network itself"] - 0.05 and means[0] > 0.8,
            f"accuracy on test codes: neighbours {neighbours[0]:.3f}, k-means {means[0]:.3f}, the network itself "
            f"{f['the network itself']:.3f}",
        ),
        (
            all(f.above(f"trained, {name}", f"untrained, {name}") for name in both),
            f"training helps: untrained, neighbours have {neighbours[1]:.3f} and k-means {means[1]:.3f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
