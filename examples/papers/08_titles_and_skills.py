# SPDX-License-Identifier: Apache-2.0
"""Bocharova et al., "VacancySBERT: the approach for representation of titles and skills for semantic similarity
search".

The title of a vacancy is here the name of a function, its skills the words that its body uses. A siamese encoder learns
which belong together from `pycore.ops.contrastive_loss` and is asked with `pycore.ops.pairwise_topk`.
"""

import torch
from paper import Figures, Paper, Run, functions, main, words_of
from retrieval import DualEncoder, Pairs
from torch import Tensor
from torch.nn import functional

from pycore.models.transformer import nearest_accuracy

PAPER = Paper(
    8,
    "VacancySBERT: the approach for representation of titles and skills for semantic similarity search in the"
    " recruitment domain",
    "an encoder trained on which titles and skills occur together finds titles better than general representations",
    "names of the standard library's functions as titles, the words of their bodies as skills; one of 500 names is"
    " to be found; against means of word vectors of the same text, and weighted bags of words",
)
TITLE, SKILLS = 8, 40


def pairs(run: Run) -> Pairs:
    """Names, and the bodies' words in alphabetical order, each once."""
    rows = [row for row in functions() if len(words_of(row[2])) >= 15]
    bodies = [row[2].partition("\n")[2] for row in rows]  # without the line that says the name
    return Pairs(run, [row[0] for row in rows], [" ".join(sorted(set(words_of(body)))) for body in bodies])


def word_vectors(data: Pairs, texts: list[str]) -> Tensor:
    """What knows words from the same text but not the task: means of 64 singular vectors of words' bags, whitened."""
    bags = data.words.bags(data.right)
    vectors = torch.svd_lowrank(bags, 64, niter=4)[2]
    usual, spread = (bags @ vectors).mean(0), (bags @ vectors).std(0) + 1e-6
    return functional.normalize((data.words.bags(texts) @ vectors - usual) / spread, dim=-1)


def experiment(run: Run) -> dict[str, float]:
    """Recall of the right name among the first 1, 5 and 10."""
    data = pairs(run)
    titles, skills = data.words.tokens(data.left, TITLE), data.words.tokens(data.right, SKILLS)
    test_titles, test_skills = data.words.tokens(data.test_left, TITLE), data.words.tokens(data.test_right, SKILLS)
    model = DualEncoder(data.words.size)

    def loss(step: int) -> Tensor:
        chosen = run.integers(len(titles[0]), 64)
        sides = [model(tokens[chosen], lengths[chosen]) for tokens, lengths in (titles, skills)]
        return model.loss(*sides)

    run.fit("titles", model, loss, 400, learning_rate=3e-3)
    found = {
        "trained": (model.embed(*test_skills), model.embed(*test_titles)),
        "word vectors": [word_vectors(data, texts) for texts in (data.test_right, data.test_left)],
        "bags of words": (data.words.bags(data.test_right), data.words.bags(data.test_left)),
    }
    return {f"{name}, recall@{k}": nearest_accuracy(*sides, k) for name, sides in found.items() for k in (1, 5, 10)}


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The paper has gains of 10 % and 21.5 % over the best other encoder."""
    rows = [
        f"{name} " + ", ".join(f"{f[f'{name}, recall@{k}']:.3f}" for k in (1, 5, 10))
        for name in ("trained", "word vectors", "bags of words")
    ]
    better = [
        all(f.above(f"trained, recall@{k}", f"{name}, recall@{k}") for k in (1, 5, 10))
        for name in ("word vectors", "bags of words")
    ]
    return [
        (better[0], f"recall among the first 1, 5, 10: {rows[0]}; {rows[1]}"),
        (better[1], f"better than {rows[2]} too, which the paper does not ask"),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
