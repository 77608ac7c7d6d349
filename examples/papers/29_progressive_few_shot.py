# SPDX-License-Identifier: Apache-2.0
"""Souibgui et al., "Few Shots Are All You Need: A Progressive Few Shot Learning Approach for Low Resource Handwritten
Text Recognition" (arXiv 2107.10064).

Of the method's two halves, the progressive one: symbols are recognised by their likeness to a few shots
(`pycore.ops.pairwise_topk`), and the surest guesses become labels to learn from. Finding symbols in a line of text is
not tried.
"""

import torch
from paper import Figures, Paper, Run, digits, main
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.nn.linear import Projection

PAPER = Paper(
    29,
    "Few Shots Are All You Need: Few Shot Learning for Low Resource Handwritten Text Recognition",
    "a matcher trained on other symbols reads new ones from a few shots, and learning from its own surest guesses,"
    " round by round, brings it nearer to one that has all labels",
    "scikit-learn's digits: 0 to 4 are the other symbols, 5 to 9 the new ones with 3 shots each and 350 images"
    " without labels; 64, 128 and 32 units compared by cosine; accuracy on the rest",
)
KNOWN, SHOTS, ROUNDS, UNLABELLED = 5, 3, 4, 350


class Matcher(nn.Module):
    """Images to vectors of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = Projection(64, 128, bias=True), Projection(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(self.out(self.hidden(x).relu()), dim=-1)


def learn(run: Run, label: str, model: Matcher, x: Tensor, labels: Tensor, steps: int) -> None:
    """Images of a symbol become alike: a softmax over the cosines with every other image of the batch's classes."""

    def loss(step: int) -> Tensor:
        shots = torch.stack([pick(run, x[labels == symbol]) for symbol in labels.unique()])
        chosen = run.integers(len(x), 64)
        noise = 0.1 * run.normal(64, 64)
        own = torch.searchsorted(labels.unique(), labels[chosen])
        return ops.contrastive_loss(model(x[chosen] + noise), model(shots), scale=10.0, symmetric=False, positives=own)

    run.fit(label, model, loss, steps)


def pick(run: Run, rows: Tensor) -> Tensor:
    """One of the rows."""
    return rows[int(run.integers(len(rows)))]


@torch.no_grad()
def read(model: Matcher, x: Tensor, shots: Tensor, names: Tensor) -> tuple[Tensor, Tensor]:
    """The symbol of the nearest three shots together, and how much nearer it is than the next symbol."""
    symbols = names.unique()
    centres = torch.stack([model(shots[names == symbol]).mean(0) for symbol in symbols])
    scores, found = ops.pairwise_topk(model(x), functional.normalize(centres, dim=-1), 2)
    return symbols[found[:, 0]], scores[:, 0] - scores[:, 1]


def experiment(run: Run) -> dict[str, float]:
    """Accuracy from the shots alone, after the rounds, and with all labels."""
    x, labels = digits()
    order = run.permutation(len(x))
    x, labels = x[order], labels[order]
    new = labels >= KNOWN
    old, old_labels, x, labels = x[~new], labels[~new], x[new], labels[new]
    shown = torch.cat([(labels == symbol).nonzero()[:SHOTS, 0] for symbol in range(KNOWN, 10)])
    rest = torch.ones(len(x), dtype=torch.bool).index_fill_(0, shown, False)
    shots, names, others, hidden = x[shown], labels[shown], x[rest], labels[rest]
    pool, test, wanted = others[:UNLABELLED], others[UNLABELLED:], hidden[UNLABELLED:]

    def accuracy(model: Matcher) -> float:
        return (read(model, test, shots, names)[0] == wanted).double().mean().item()

    model = Matcher()
    learn(run, "other symbols", model, old, old_labels, 300)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    figures = {"other symbols alone": accuracy(model)}
    learn(run, "shots", model, shots, names, 100)
    figures["shots"] = accuracy(model)
    for step in range(1, ROUNDS + 1):
        guess, margin = read(model, pool, shots, names)
        sure = margin.argsort(descending=True)[: UNLABELLED * step // (ROUNDS + 1)]
        learn(run, f"round {step}", model, torch.cat([shots, pool[sure]]), torch.cat([names, guess[sure]]), 100)
    figures["progressive"] = accuracy(model)
    model.load_state_dict(first)
    learn(run, "all labels", model, torch.cat([shots, pool]), torch.cat([names, hidden[:UNLABELLED]]), 500)
    figures["all labels"] = accuracy(model)
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Chance is one in five."""
    return [
        (
            f.above("progressive", "shots"),
            f"accuracy {f['progressive']:.3f} after {ROUNDS} rounds, {f['shots']:.3f} from the shots, "
            f"{f['all labels']:.3f} with all labels",
        ),
        (f["other symbols alone"] > 0.5, f"without learning new symbols at all {f['other symbols alone']:.3f}"),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
