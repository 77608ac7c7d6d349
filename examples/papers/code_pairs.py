# SPDX-License-Identifier: Apache-2.0
"""What the papers on CodeT5 share: an encoder and a decoder of words with T5's positions, and functions to describe."""

from __future__ import annotations

import math

import torch
from paper import Run
from retrieval import documented
from torch import Tensor, nn

from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer
from pycore.schedules import Full

CODE, SENTENCE, COUNT = 32, 14, 32
SHAPE = BytelmConfig(layers=1, dim=64, heads=4, kv_heads=4, position="t5")


class EncoderDecoder(nn.Module):
    """An encoder, and a decoder that looks at it; both know the same words, a mask, and a beginning."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.encoder = Transformer(SHAPE, vocabulary=vocabulary + 2)
        self.decoder = Transformer(SHAPE, vocabulary=vocabulary + 2, cross=True)
        self.mask, self.begin = vocabulary, vocabulary + 1

    def read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The encoder's states."""
        return self.encoder(tokens, schedule=Full(), lengths=lengths)

    def write(self, memory: Tensor, lengths: Tensor, wanted: Tensor, sizes: Tensor) -> Tensor:
        """The loss of writing `wanted` [n, words], of which `sizes` count."""
        tokens = torch.cat([torch.full((len(wanted), 1), self.begin), wanted[:, :-1]], 1)
        states = self.decoder(tokens, memory=memory, memory_lengths=lengths)
        return self.decoder.loss(states, wanted.masked_fill(torch.arange(wanted.shape[1]) >= sizes[:, None], -100))


class Task:
    """Functions and the sentences that describe them."""

    def __init__(self, run: Run) -> None:
        self.run, self.data = run, documented(run)
        words = self.data.words
        self.code, self.sentence = words.tokens(self.data.right, CODE), words.tokens(self.data.left, SENTENCE)
        self.tests = words.tokens(self.data.test_right, CODE), words.tokens(self.data.test_left, SENTENCE)

    def draw(self, among: int | None = None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A batch of both sides, of the first `among` functions."""
        chosen = self.run.integers(len(self.code[0]) if among is None else min(among, len(self.code[0])), COUNT)
        code, sentence = ((tokens[chosen], lengths[chosen]) for tokens, lengths in (self.code, self.sentence))
        return code, sentence

    def describe(self, model: EncoderDecoder, code: tuple[Tensor, Tensor], sentence: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of a sentence behind its function."""
        return model.write(model.read(*code), code[1], *sentence)

    @torch.no_grad()
    def bits(self, model: EncoderDecoder) -> float:
        """Bits per word of the test functions' sentences."""
        return self.describe(model, *self.tests).item() / math.log(2)
