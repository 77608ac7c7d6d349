# SPDX-License-Identifier: Apache-2.0
"""Liu and Koide, "DefSent+: Improving sentence embeddings of language models by projecting definition sentences into a
quasi-isotropic or isotropic vector space of unlimited dictionary entries" (arXiv 2405.16153).

Docstrings are definitions, functions' names the entries of a dictionary. A sentence is projected onto its entry by a
softmax over all of them (`pycore.ops.linear_cross_entropy`); the last layer of a pretrained encoder learns it.
"""

import collections
import functools

import torch
from minilm import States, Upper, load
from paper import Figures, Paper, Run, functions, main, words_of
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops

PAPER = Paper(
    7,
    "DefSent+: Improving sentence embeddings of language models",
    "projecting definitions onto entries of any number of words makes better and more isotropic sentence embeddings"
    " than onto the embeddings of single words",
    "docstrings of the standard library, named by their functions: all names, or those that are one word;"
    " all-MiniLM-L6-v2 with its last layer trained in 40 steps of 48; an entry starts at the mean of its words'"
    " embeddings; asked is which docstring belongs to another function of the same name, of names that training has not"
    " seen",
)
LENGTH, COUNT, STEPS = 24, 48, 40


@functools.cache
def rows(quick: bool) -> list[tuple[str, str]]:
    """Names, in words, and sentences; the same for all seeds."""
    found = [(" ".join(words_of(name)), sentence) for name, sentence, _ in functions()]
    return [row for row in found if row[0]][: 300 if quick else None]


@functools.cache
def below(quick: bool) -> States:
    """What the layers that stay make of all sentences."""
    return States(Run(0, quick, torch.Generator()), [sentence for _, sentence in rows(quick)], LENGTH, 5)


def split(run: Run) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Names and sentences to learn from; and two of each of 150 names, which come at least twice."""
    counts = collections.Counter(name for name, _ in rows(run.quick))
    twice = sorted(name for name, n in counts.items() if n >= 2)
    held_out = {twice[i] for i in run.permutation(len(twice))[: run.pick(150, 20)].tolist()}
    test = [[row for row in rows(run.quick) if row[0] == name][:2] for name in sorted(held_out)]
    return [row for row in rows(run.quick) if row[0] not in held_out], [row for pair in test for row in pair]


@torch.no_grad()
def judge(model: Upper, tests: Tensor) -> tuple[float, float]:
    """How often a sentence's nearest is the other of its name; and the mean cosine of sentences of different names."""
    vectors = model.embed(tests)[-1]
    near = ops.pairwise_topk(vectors, vectors, 2)[1][:, 1]  # the first is the sentence itself
    partner = torch.arange(len(vectors)) ^ 1
    n = len(vectors)
    pairs = (vectors * vectors[partner]).sum()  # of sentences of one name
    total = vectors.sum(0).square().sum() - n - pairs
    return (near == partner).double().mean().item(), (total / (n * (n - 2))).item()


def entries_of(states: States, run: Run, names: list[str]) -> nn.Parameter:
    """Where entries start: the mean of their tokens' embeddings."""
    bert, tokenize = load(run.quick)
    with torch.no_grad():
        return nn.Parameter(torch.stack([bert.words(torch.tensor(tokenize(name, 16))).mean(0) for name in names]))


def experiment(run: Run) -> dict[str, float]:
    """As it comes, with single words, and with all entries."""
    train, test = split(run)
    states = below(run.quick)
    tests = states.of([sentence for _, sentence in test])
    single = [row for row in train if " " not in row[0]]
    figures: dict[str, float] = {}
    for name, chosen in (("as it comes", []), ("single words", single), ("all entries", train)):
        model = Upper(states)
        if chosen:
            names = sorted({entry for entry, _ in chosen})
            number = {entry: i for i, entry in enumerate(names)}
            entries = entries_of(states, run, names)
            sentences = states.of([sentence for _, sentence in chosen])
            own = torch.tensor([number[entry] for entry, _ in chosen])

            def loss(
                step: int, model: Upper = model, sides: tuple[Tensor, Tensor] = (sentences, own),
                entries: Tensor = entries,
            ) -> Tensor:  # fmt: skip
                picked = run.integers(len(sides[0]), COUNT)
                vectors = 20 * model(sides[0][picked])
                return ops.linear_cross_entropy(vectors, functional.normalize(entries, dim=-1), sides[1][picked])

            run.fit(name, [*model.parameters(), entries], loss, STEPS, learning_rate=2e-4)
        figures[f"{name}, found"], figures[f"{name}, mean cosine"] = judge(model, tests)
    figures["definitions, single words"], figures["definitions, all"] = float(len(single)), float(len(train))
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """300 sentences, so chance is 0.003."""
    return [
        (
            f.above("all entries, found", "single words, found"),
            f"sentences whose nearest has their name {f['all entries, found']:.3f} with all entries, "
            f"{f['single words, found']:.3f} with single words, {f['as it comes, found']:.3f} as it comes",
        ),
        (
            f.above("single words, mean cosine", "all entries, mean cosine"),
            f"mean cosine of two sentences {f['all entries, mean cosine']:.3f} with all entries, "
            f"{f['single words, mean cosine']:.3f} with single words, {f['as it comes, mean cosine']:.3f} as it comes",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
