# SPDX-License-Identifier: Apache-2.0
"""Akyürek et al., "What learning algorithm is in-context learning? Investigations with linear models"
(arXiv 2211.15661).

A decoder reads x₁ y₁ x₂ y₂ … of a new linear function and predicts each y. Whose predictions are its own nearest to?
"""

import torch
from paper import Figures, Paper, Run, main
from torch import Tensor

from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer
from pycore.nn.linear import Projection

PAPER = Paper(
    28,
    "What learning algorithm is in-context learning? Investigations with linear models",
    "a trained in-context learner predicts as least squares does, and where targets are noisy as ridge regression,"
    " the Bayesian estimator; not as a step of gradient descent or the nearest neighbour",
    "3 dimensions, 8 pairs, weights of variance 1, noise 0 or 0.7; a decoder of 2 blocks of width 64 for each",
)
DIM, PAIRS, BATCH, NOISE = 3, 8, 64, 0.7
SHAPE = BytelmConfig(layers=2, dim=64, heads=4, kv_heads=4, position="none")


def problems(run: Run, count: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [count, PAIRS, DIM], noisy targets [count, PAIRS], and the sequences that show both in turn."""
    x = run.normal(count, PAIRS, DIM)
    y = (x * run.normal(count, 1, DIM)).sum(-1) + noise * run.normal(count, PAIRS)
    sequence = torch.zeros(count, 2 * PAIRS, DIM + 1)
    sequence[:, ::2, :DIM] = x
    sequence[:, 1::2, DIM] = y
    return x, y, sequence


def learner(run: Run, noise: float) -> tuple[Transformer, Projection]:
    """A model that has seen many problems, and never the same twice."""
    model, read = Transformer(SHAPE, inputs=DIM + 1, absolute=2 * PAIRS), Projection(SHAPE.dim, 1)

    def loss(step: int) -> Tensor:
        _, y, sequence = problems(run, BATCH, noise)
        return (read(model(sequence)[:, ::2])[..., 0] - y).square().mean()

    run.fit(f"noise {noise}", [*model.parameters(), *read.parameters()], loss, 2200, learning_rate=3e-3)
    return model, read


def rule(name: str, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """What an algorithm says of the query [n, DIM] after pairs x [n, k, DIM], y [n, k]."""
    if name == "nearest neighbour":
        nearest = (x - query[:, None]).square().sum(-1).argmin(1, keepdim=True)
        return y.gather(1, nearest)[:, 0]
    if name == "gradient step":  # from zero, by the rate that is best on average
        weights = (x * y[..., None]).sum(1) / (x.shape[1] + DIM + 1)
    elif name == "ridge":
        gram = x.transpose(1, 2) @ x + NOISE**2 * torch.eye(DIM)
        weights = torch.linalg.solve(gram, (x * y[..., None]).sum(1))
    else:
        weights = (torch.linalg.pinv(x) @ y[..., None])[..., 0]
    return (weights * query).sum(-1)


@torch.no_grad()
def distances(run: Run, model: Transformer, read: Projection, noise: float) -> dict[str, float]:
    """Mean squared difference of predictions, after 2 to 7 pairs."""
    x, y, sequence = problems(run, run.pick(2000, 50), noise)
    own = read(model(sequence)[:, ::2])[..., 0]
    found: dict[str, float] = {}
    for name in ("least squares", "ridge", "gradient step", "nearest neighbour"):
        total = 0.0
        for k in range(DIM + 2, PAIRS):  # least squares is wild where there are as many pairs as dimensions
            total += (own[:, k] - rule(name, x[:, :k], y[:, :k], x[:, k])).square().mean().item()
        found[name] = total / (PAIRS - DIM - 2)
    return found


def experiment(run: Run) -> dict[str, float]:
    """How far the learner's predictions are from those of four algorithms, without noise and with it."""
    figures: dict[str, float] = {}
    for noise in (0.0, NOISE):
        for name, value in distances(run, *learner(run, noise), noise).items():
            figures[f"{'noise' if noise else 'no noise'}, {name}"] = value
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The nearest algorithm is the one that the theory names."""
    others = ("gradient step", "nearest neighbour")
    return [
        (
            all(f.above(f"no noise, {name}", "no noise, least squares") for name in others),
            "squared difference from least squares without noise "
            f"{f['no noise, least squares']:.3f}; from a gradient step {f['no noise, gradient step']:.3f}, from the "
            f"nearest neighbour {f['no noise, nearest neighbour']:.3f}",
        ),
        (
            all(f.above(f"noise, {name}", "noise, ridge") for name in (*others, "least squares")),
            f"with noise from ridge {f['noise, ridge']:.3f}, from least squares {f['noise, least squares']:.3f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
