# SPDX-License-Identifier: Apache-2.0
"""Lai, "Word and Document Embeddings based on Neural Network Approaches" (arXiv 1611.05962).

Of the thesis's many comparisons, the relation of its two most important models: skip-gram, as a softmax over all words
(`pycore.ops.linear_cross_entropy`), and GloVe, a least-squares fit of the logarithm of counts.
"""

import torch
from paper import Figures, Paper, Run, main
from torch import Tensor, nn
from torch.nn import functional
from word_counts import Text, probe, skip_gram, text

from pycore import ops

PAPER = Paper(
    48,
    "Word and Document Embeddings based on Neural Network Approaches",
    "skip-gram and GloVe fit the same thing: products of their vectors are logarithms of how often words stand"
    " together, so that they serve alike; and a larger text of the same kind makes better vectors",
    "the 1200 most frequent tokens of 1.5 MB, or a tenth, of the standard library's sources; 64 channels; a linear"
    " probe says which of six kinds a name is",
)
WORDS, DIM = 1200, 64


def glove(run: Run, data: Text, steps: int) -> Tensor:
    """Vectors whose products, and a bias of each word, fit log counts; frequent pairs weigh more, as in the paper."""
    counts = data.counts.sum(-1)
    left, right = counts.nonzero(as_tuple=True)
    logs, weights = counts[left, right].log(), (counts[left, right] / 100).clamp(max=1.0) ** 0.75
    tables = [nn.Parameter(torch.randn(WORDS, DIM) * 0.1) for _ in range(2)]
    biases = [nn.Parameter(torch.zeros(WORDS)) for _ in range(2)]

    def loss(step: int) -> Tensor:
        drawn = run.integers(len(left), 4096)
        i, j = left[drawn], right[drawn]
        fit = (tables[0][i] * tables[1][j]).sum(1) + biases[0][i] + biases[1][j]
        return (weights[drawn] * (fit - logs[drawn]).square()).mean()

    run.fit("GloVe", [*tables, *biases], loss, steps, learning_rate=0.02, weight_decay=0.0)
    return tables[0].detach()


def correlation(data: Text, vectors: Tensor, contexts: Tensor) -> float:
    """Of skip-gram's scores with log P(context | word), over pairs that come at least 10 times."""
    counts = data.counts.sum(-1)
    left, right = (counts >= 10).nonzero(as_tuple=True)
    logs = (counts[left, right] / counts.sum(1)[left]).log()
    scores = (vectors[left] * contexts[right]).sum(1) - ops.pairwise_logsumexp(vectors, contexts)[left]
    return torch.corrcoef(torch.stack([scores, logs]))[0, 1].item()


def shared(a: Tensor, b: Tensor) -> float:
    """How many of a word's ten nearest words are the same with both kinds of vectors."""
    near = [ops.pairwise_topk(rows, rows, 11, score="cosine")[1][:, 1:] for rows in (a, b)]
    return (near[0][:, :, None] == near[1][:, None]).any(-1).double().mean().item()


def experiment(run: Run) -> dict[str, float]:
    """Scores against counts, neighbours against neighbours, and the probe."""
    data, tenth = text(WORDS, run.pick(1_500_000, 100_000)), text(WORDS, run.pick(150_000, 90_000))
    vectors, contexts = skip_gram(run, data, DIM, 600)
    fitted, less = glove(run, data, 600), skip_gram(run, tenth, DIM, 600)[0]
    return {
        "correlation": correlation(data, vectors, contexts),
        "shared neighbours": shared(vectors, fitted),
        "shared by chance": shared(vectors, functional.normalize(run.normal(WORDS, DIM), dim=-1)),
        "skip-gram": probe(run, "skip-gram", data, vectors),
        "GloVe": probe(run, "GloVe", data, fitted),
        "skip-gram, a tenth": probe(run, "skip-gram, a tenth", tenth, less),
    }


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The probe of a tenth of the text asks about that text's words."""
    return [
        (f["correlation"] > 0.9, f"skip-gram's scores and log frequencies correlate by {f['correlation']:.2f}"),
        (
            f["shared neighbours"] > 10 * f["shared by chance"] and abs(f["skip-gram"] - f["GloVe"]) < 0.05,
            f"{f['shared neighbours']:.0%} of ten neighbours are GloVe's too ({f['shared by chance']:.0%} by chance); "
            f"the probe says {f['skip-gram']:.3f}, GloVe {f['GloVe']:.3f}",
        ),
        (
            f.above("skip-gram", "skip-gram, a tenth"),
            f"from a tenth of the text the probe says {f['skip-gram, a tenth']:.3f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
