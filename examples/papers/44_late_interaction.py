# SPDX-License-Identifier: Apache-2.0
"""Wang et al., "Utilizing BERT for Information Retrieval: Survey, Applications, Resources, and Challenges".

Of the survey's many methods one is tried: balancing effectiveness and efficiency. A document is one vector, or a vector
for every token that meets the query's late (`pycore.ops.maxsim`, ColBERT).
"""

import torch
from paper import Figures, Paper, Run, main
from retrieval import DualEncoder, documented, reciprocal_rank
from torch import Tensor
from torch.nn import functional

from pycore import ops
from pycore.schedules import Full

PAPER = Paper(
    44,
    "Utilizing BERT for Information Retrieval: Survey, Applications, Resources, and Challenges",
    "late interaction of all tokens finds better than one vector a text, and pays with a larger index; both beat"
    " counting words",
    "docstrings of the standard library to the functions they stand in, one of 500; 2 blocks of width 64, trained for"
    " either; against weighted bags of words; mean reciprocal rank",
)
LENGTH = 24


def tokens_of(model: DualEncoder, tokens: Tensor, lengths: Tensor) -> Tensor:
    """A vector of length 1 for every token, [texts, LENGTH, dim]."""
    return functional.normalize(model.encoder(tokens, schedule=Full(), lengths=lengths), dim=-1)


def late(model: DualEncoder, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """Every text of the left with every one of the right, a mean over the left's tokens: [left, right]."""
    scores = ops.maxsim(
        tokens_of(model, *left), tokens_of(model, *right), query_lengths=left[1], document_lengths=right[1]
    )
    return scores / left[1][:, None]


def experiment(run: Run) -> dict[str, float]:
    """The same encoder trained and asked in two ways."""
    data = documented(run)
    sides = [data.words.tokens(texts, LENGTH) for texts in (data.left, data.right)]
    tests = [data.words.tokens(texts, LENGTH) for texts in (data.test_left, data.test_right)]
    figures = {"bags of words": reciprocal_rank(data.words.bags(data.test_left), data.words.bags(data.test_right))}
    for name in ("one vector", "late interaction"):
        torch.manual_seed(run.seed)
        model = DualEncoder(data.words.size)

        def loss(step: int, name: str = name, model: DualEncoder = model) -> Tensor:
            chosen = run.integers(len(sides[0][0]), 64)
            left, right = ((tokens[chosen], lengths[chosen]) for tokens, lengths in sides)
            if name == "one vector":
                return model.loss(model(*left), model(*right))
            # The scores are a matrix already; unit vectors make it the one that the contrastive loss would see.
            return model.loss(late(model, left, right), torch.eye(len(chosen)))

        run.fit(name, model, loss, 220, learning_rate=3e-3)
        if name == "one vector":
            figures[name] = reciprocal_rank(*(model.embed(*test) for test in tests))
        else:
            with torch.no_grad():
                figures[name] = reciprocal_rank(late(model, *tests), torch.eye(len(tests[0][0])))
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The index is larger by the number of tokens, which is known without a measurement."""
    return [
        (
            f.above("late interaction", "one vector"),
            f"mean reciprocal rank {f['late interaction']:.3f} with late interaction, {f['one vector']:.3f} with one "
            f"vector, whose index is {LENGTH} times smaller",
        ),
        (f.above("one vector", "bags of words"), f"bags of words {f['bags of words']:.3f}"),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
