# SPDX-License-Identifier: Apache-2.0
"""What the papers on word vectors share: tokens of Python sources, which words stand beside which, and a probe."""

from __future__ import annotations

import collections
import functools
import keyword
import re
from dataclasses import dataclass

import torch
from paper import Run, corpus
from torch import Tensor, nn

from pycore import ops

KINDS = ("keyword", "function or class", "attribute", "called", "assigned or argument", "other")
WINDOW = 3


@dataclass(frozen=True)
class Text:
    """A text as numbers of its most frequent tokens, and what kind of word each name mostly is.

    Attributes:
        tokens: int64 [n], -1 where a token is rare.
        counts: float [words, words, 2]: how often a word stands up to WINDOW places before, or after, another.
        words: the words that have a kind.
        kinds: their kinds.
    """

    tokens: Tensor
    counts: Tensor
    words: Tensor
    kinds: Tensor


@functools.cache
def text(size: int, characters: int) -> Text:
    """Of so many characters of the standard library's sources, with comments and strings left out."""
    source = corpus()[0][:characters].decode("utf-8", errors="replace")
    source = re.sub(r'"""[\s\S]*?"""|#.*|"[^"\n]*"|\'[^\'\n]*\'', " ", source)
    found = re.findall(r"[A-Za-z_]\w*|[^\w\s]", source)
    index = {word: i for i, (word, _) in enumerate(collections.Counter(found).most_common(size))}
    kinds: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for before, word, after in zip(found, found[1:], found[2:], strict=False):
        if word in index and (word[0].isalpha() or word[0] == "_"):
            kinds[index[word]][_kind(before, word, after)] += 1
    tokens = torch.tensor([index.get(word, -1) for word in found])
    counts = torch.zeros(size, size, 2)
    for distance in range(1, WINDOW + 1):
        left, right = tokens[:-distance], tokens[distance:]
        both = (left >= 0) & (right >= 0)
        pairs, ones = (left[both], right[both]), torch.ones(int(both.sum()))
        counts[..., 1].index_put_(pairs, ones, accumulate=True)
        counts[..., 0].index_put_(pairs[::-1], ones, accumulate=True)
    words = sorted(kinds)
    return Text(tokens, counts, torch.tensor(words), torch.tensor([kinds[word].most_common(1)[0][0] for word in words]))


def _kind(before: str, word: str, after: str) -> int:
    if keyword.iskeyword(word):
        return 0
    if before in ("def", "class"):
        return 1
    if before == ".":
        return 2
    if after == "(":
        return 3
    return 4 if after in "=,)" else 5


def skip_gram(run: Run, data: Text, dim: int, steps: int) -> tuple[Tensor, Tensor]:
    """Vectors of words and of contexts, by a softmax over all words (`pycore.ops.linear_cross_entropy`)."""
    size = len(data.counts)
    vectors, contexts = (nn.Parameter(torch.randn(size, dim) * 0.1) for _ in range(2))
    left, right = data.counts.sum(-1).nonzero(as_tuple=True)
    weights = data.counts.sum(-1)[left, right].double().cumsum(0)

    def loss(step: int) -> Tensor:
        drawn = torch.searchsorted(weights, run.uniform(2048).double() * weights[-1])
        return ops.linear_cross_entropy(vectors[left[drawn]], contexts, right[drawn])

    run.fit("skip-gram", [vectors, contexts], loss, steps, learning_rate=0.02, weight_decay=0.0)
    return vectors.detach(), contexts.detach()


def probe(run: Run, label: str, data: Text, vectors: Tensor) -> float:
    """How often a linear layer on a word's vector says what kind of word it is, of words that it has not seen."""
    x = vectors[data.words]
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(run.seed))  # the same for every vector
    test, rest = order[: len(x) // 4], order[len(x) // 4 :]
    classes, bias = nn.Parameter(torch.zeros(len(KINDS), x.shape[1])), nn.Parameter(torch.zeros(len(KINDS)))
    run.fit(
        label, [classes, bias],
        lambda step: ops.linear_cross_entropy(x[rest], classes, data.kinds[rest], bias=bias), 150,
        learning_rate=0.05, weight_decay=0.3,
    )  # fmt: skip
    with torch.no_grad():
        guess = (ops.invariant_linear(x[test], classes) + bias).argmax(-1)
    return (guess == data.kinds[test]).double().mean().item()
