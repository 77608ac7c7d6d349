# SPDX-License-Identifier: Apache-2.0
"""Xiao et al., "RetroMAE v2: Duplex Masked Auto-Encoder For Pre-Training Retrieval-Oriented Language Models"
(arXiv 2211.08769).

An encoder is pretrained on text alone: one vector has to be enough for a small decoder to write the text again
(RetroMAE), and the words' own states for the bag of its words too (the duplex). Then the two are put together and
finetuned to retrieve (`pycore.ops.contrastive_loss`).
"""

import torch
from paper import Figures, Paper, Run, main
from retrieval import documented, reciprocal_rank
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer
from pycore.nn.linear import Projection
from pycore.schedules import Full

PAPER = Paper(
    4,
    "RetroMAE v2: Duplex Masked Auto-Encoder For Pre-Training Retrieval-Oriented Language Models",
    "pretraining both the text's vector and its words' states by reconstruction makes a better retriever than the"
    " vector's reconstruction alone, and than no pretraining",
    "docstrings of the standard library to the functions they stand in, one of 500; an encoder of 2 blocks of width 64,"
    " a decoder of one; 400 steps on texts, 150 of finetuning on 600 pairs; mean reciprocal rank",
)
LENGTH, COUNT, PAIRS = 24, 48, 600


def shape(layers: int) -> BytelmConfig:
    """Blocks of width 64."""
    return BytelmConfig(layers=layers, dim=64, heads=4, kv_heads=4, max_distance=256)


class Retriever(nn.Module):
    """The first state for the whole text, and the strongest of the words' for each of some channels."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.encoder = Transformer(shape(2), vocabulary=vocabulary + 2)
        self.whole, self.own = Projection(64, 32), Projection(64, 32)
        self.mask, self.first = vocabulary, vocabulary + 1

    def states(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[n, 1 + length, dim]: the whole text's, then the words'."""
        tokens = torch.cat([torch.full((len(tokens), 1), self.first), tokens], 1)
        return self.encoder(tokens, schedule=Full(), lengths=lengths + 1)

    def strongest(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """The largest value of each channel among the words that count."""
        past = torch.arange(rows.shape[1]) >= lengths[:, None]
        return rows.masked_fill(past[..., None], float("-inf")).amax(1)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[n, 64] of length 1."""
        states = self.states(tokens, lengths)
        both = torch.cat([self.whole(states[:, 0]), self.strongest(self.own(states[:, 1:]), lengths)], 1)
        return functional.normalize(both, dim=-1)


def pretrain(run: Run, name: str, model: Retriever, texts: tuple[Tensor, Tensor]) -> None:
    """Masked words, the text from its vector, and for the duplex its bag of words from the words' states."""
    decoder = Transformer(shape(1), inputs=64, absolute=LENGTH + 1)
    bag = Projection(64, 64)

    def loss(step: int) -> Tensor:
        chosen = run.integers(len(texts[0]), COUNT)
        tokens, lengths = texts[0][chosen], texts[1][chosen]
        counts = torch.arange(LENGTH) < lengths[:, None]
        hidden = (run.uniform(COUNT, LENGTH) < 0.3) & counts
        states = model.states(tokens.masked_fill(hidden, model.mask), lengths)
        total = model.encoder.loss(states[:, 1:], tokens.masked_fill(~hidden, -100))
        # The decoder sees the vector and half of the words.
        words = functional.embedding(
            tokens.masked_fill(run.uniform(COUNT, LENGTH) < 0.5, model.mask), model.encoder.embedding
        )
        again = decoder(torch.cat([states[:, :1], words], 1), schedule=Full(), lengths=lengths + 1)[:, 1:]
        total = total + model.encoder.loss(again, tokens.masked_fill(~counts, -100))
        if name == "duplex":
            summary = bag(model.strongest(states[:, 1:], lengths))
            rows = summary[:, None].expand(-1, LENGTH, -1)
            total = total + model.encoder.loss(rows, tokens.masked_fill(~counts, -100))
        return total

    run.fit(f"{name}, texts", [*model.parameters(), *decoder.parameters(), *bag.parameters()], loss, 400)


def experiment(run: Run) -> dict[str, float]:
    """Three encoders with the same finetuning."""
    data = documented(run)
    texts = data.words.tokens(data.left + data.right, LENGTH)
    sides = [data.words.tokens(side[:PAIRS], LENGTH) for side in (data.left, data.right)]
    tests = [data.words.tokens(side, LENGTH) for side in (data.test_left, data.test_right)]
    figures: dict[str, float] = {}
    for name in ("duplex", "vector alone", "none"):
        torch.manual_seed(run.seed)
        model = Retriever(data.words.size)
        if name != "none":
            pretrain(run, name, model, texts)

        def loss(step: int, model: Retriever = model) -> Tensor:
            chosen = run.integers(len(sides[0][0]), COUNT)
            return ops.contrastive_loss(*(model(side[chosen], sizes[chosen]) for side, sizes in sides), scale=15.0)

        run.fit(f"{name}, finetuning", model, loss, 150)
        with torch.no_grad():
            figures[name] = reciprocal_rank(*(model(*test) for test in tests))
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The paper compares on MS MARCO and BEIR."""
    return [
        (
            f.above("duplex", "none"),
            f"mean reciprocal rank {f['duplex']:.3f} after duplex pretraining, {f['none']:.3f} without any",
        ),
        (f.above("duplex", "vector alone"), f"after reconstruction from the vector alone {f['vector alone']:.3f}"),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
