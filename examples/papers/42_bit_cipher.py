# SPDX-License-Identifier: Apache-2.0
"""Zhao and Williams, "Bit Cipher: A Simple yet Powerful Word Representation System that Integrates Efficiently with
Language Models" (arXiv 2311.11012).

Word vectors without backpropagation: a word's cipher is a few bits chosen by its rank, its vector the sum of its
neighbours' ciphers. Probed beside skip-gram (`pycore.ops.linear_cross_entropy`).
"""

import itertools

import torch
from paper import Figures, Paper, Run, main
from torch import Tensor
from torch.nn import functional
from word_counts import probe, skip_gram, text

PAPER = Paper(
    42,
    "Bit Cipher: A Simple yet Powerful Word Representation System",
    "vectors summed from neighbours' bit ciphers, without backpropagation, serve a probe about as well as word2vec's,"
    " and more bits serve it better",
    "the 1200 most frequent tokens of 1.5 MB of the standard library's sources; a linear probe says which of six kinds"
    " a name is (keyword, function or class, attribute, called, assigned or argument, other), on a quarter of the"
    " words; 16 and 64 bits for each side; skip-gram with 128 channels",
)
WORDS = 1200


def ciphers(words: int, bits: int) -> Tensor:
    """Word i has the i-th set of bits: first those of one bit, then of two, ... at length 1."""
    rows = torch.zeros(words, bits)
    sets = (chosen for size in range(1, bits + 1) for chosen in itertools.combinations(range(bits), size))
    for row, chosen in zip(rows, sets, strict=False):
        row[list(chosen)] = 1.0
    return functional.normalize(rows, dim=-1)


def summed(counts: Tensor, codes: Tensor) -> Tensor:
    """Each word's neighbours' codes, before it beside after it, weighted by the logarithm of how often they come."""
    sides = functional.normalize(torch.log1p(counts), p=1, dim=1)
    return torch.cat([sides[..., 0] @ codes, sides[..., 1] @ codes], dim=1)


def experiment(run: Run) -> dict[str, float]:
    """The probe's accuracy on vectors of each kind."""
    data = text(WORDS, run.pick(1_500_000, 100_000))
    gaussian = functional.normalize(run.normal(WORDS, 64), dim=-1)
    vectors = {
        "16 bits": summed(data.counts, ciphers(WORDS, 16)),
        "64 bits": summed(data.counts, ciphers(WORDS, 64)),
        "64 random numbers": summed(data.counts, gaussian),
        "ciphers alone": ciphers(WORDS, 64),
        "skip-gram": skip_gram(run, data, 128, 600)[0],
    }
    return {name: probe(run, name, data, rows) for name, rows in vectors.items()}


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The probe's words are other words with each seed."""
    return [
        (
            f["64 bits"] > f["skip-gram"] - 0.03 and f.above("64 bits", "ciphers alone", 0.1),
            f"accuracy {f['64 bits']:.3f} with 64 bits, skip-gram {f['skip-gram']:.3f}, ciphers without neighbours "
            f"{f['ciphers alone']:.3f}; random numbers in place of bits {f['64 random numbers']:.3f}",
        ),
        (f.above("64 bits", "16 bits"), f"with 16 bits {f['16 bits']:.3f}"),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
