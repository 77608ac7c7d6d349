# SPDX-License-Identifier: Apache-2.0
"""Liu and Koide, "DefSent+: Improving sentence embeddings of language models by projecting definition sentences into a
quasi-isotropic or isotropic vector space of unlimited dictionary entries" (arXiv 2405.16153).

Docstrings are definitions, functions' names the entries of a dictionary. A sentence is projected onto its entry by a
softmax over all of them (`pycore.ops.linear_cross_entropy`).
"""

import collections

import torch
from paper import Figures, Paper, Run, Words, functions, main, words_of
from retrieval import SHAPE
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.models.transformer import Transformer, mean_pool
from pycore.schedules import Full

PAPER = Paper(
    7,
    "DefSent+: Improving sentence embeddings of language models",
    "projecting definitions onto entries of any number of words makes better and more isotropic sentence embeddings"
    " than onto the embeddings of single words",
    "docstrings of the standard library, named by their functions: all names, or those that are one word of the"
    " vocabulary; 2 blocks of width 64; asked is which docstring belongs to another function of the same name, of"
    " names that training has not seen",
)
LENGTH, COUNT = 20, 48


def split(run: Run) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Names and sentences to learn from; and two of each of 150 names, which come at least twice."""
    rows = [(name.strip("_").lower(), sentence) for name, sentence, _ in functions()]
    counts = collections.Counter(name for name, _ in rows)
    twice = sorted(name for name, n in counts.items() if n >= 2)
    held_out = {twice[i] for i in run.permutation(len(twice))[: run.pick(150, 20)].tolist()}
    test = [[row for row in rows if row[0] == name][:2] for name in sorted(held_out)]
    return [row for row in rows if row[0] not in held_out], [row for pair in test for row in pair]


class Encoder(nn.Module):
    """Sentences to vectors."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.net = Transformer(SHAPE, vocabulary=vocabulary)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return mean_pool(self.net(tokens, schedule=Full(), lengths=lengths), lengths)


@torch.no_grad()
def judge(model: Encoder, tokens: Tensor, lengths: Tensor) -> tuple[float, float]:
    """How often a sentence's nearest is the other of its name; and the mean cosine of sentences of different names."""
    vectors = model(tokens, lengths)
    near = ops.pairwise_topk(vectors, vectors, 2)[1][:, 1]  # the first is the sentence itself
    partner = torch.arange(len(vectors)) ^ 1
    n = len(vectors)
    total = vectors.sum(0).square().sum() - n  # the sum of all cosines but a sentence's with itself
    return (near == partner).double().mean().item(), (total / (n * (n - 1))).item()


def experiment(run: Run) -> dict[str, float]:
    """Untrained, with single words, and with all entries."""
    train, test = split(run)
    words = Words([sentence + " " + name for name, sentence in train])
    tests = words.tokens([sentence for _, sentence in test], LENGTH)
    single = [row for row in train if words_of(row[0]) == [row[0]] and row[0] in words.index]
    figures: dict[str, float] = {}
    for name, rows in (("untrained", []), ("single words", single), ("all entries", train)):
        torch.manual_seed(run.seed)
        model = Encoder(words.size)
        if rows:
            tokens, lengths = words.tokens([sentence for _, sentence in rows], LENGTH)
            names = sorted({entry for entry, _ in rows})
            if name == "all entries":
                number = {entry: i for i, entry in enumerate(names)}
                entries = nn.Parameter(torch.randn(len(names), 64) * 0.1)
            else:  # the model's own word embeddings, as in DefSent
                number, entries = words.index, model.net.embedding
            own = torch.tensor([number[entry] for entry, _ in rows])

            def loss(
                step: int, model: Encoder = model, rows=(tokens, lengths, own), entries: Tensor = entries
            ) -> Tensor:
                tokens, lengths, own = rows
                chosen = run.integers(len(own), COUNT)
                vectors = 10 * model(tokens[chosen], lengths[chosen])
                return ops.linear_cross_entropy(vectors, functional.normalize(entries, dim=-1), own[chosen])

            run.fit(name, list(dict.fromkeys([*model.parameters(), entries])), loss, 400, learning_rate=3e-3)
        figures[f"{name}, found"], figures[f"{name}, mean cosine"] = judge(model, *tests)
    figures["definitions, single words"], figures["definitions, all"] = float(len(single)), float(len(train))
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """300 sentences, so chance is 0.003."""
    return [
        (
            f.above("all entries, found", "single words, found"),
            f"sentences whose nearest has their name {f['all entries, found']:.3f} with all entries, "
            f"{f['single words, found']:.3f} with single words, {f['untrained, found']:.3f} untrained",
        ),
        (
            f.above("single words, mean cosine", "all entries, mean cosine"),
            f"mean cosine of two sentences {f['all entries, mean cosine']:.2f} with all entries, "
            f"{f['single words, mean cosine']:.2f} with single words",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
