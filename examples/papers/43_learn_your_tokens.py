# SPDX-License-Identifier: Apache-2.0
"""Thawani et al., "Learn Your Tokens: Word-Pooled Tokenization for Language Modeling" (arXiv 2310.11628).

Bytes of a word see each other (`pycore.schedules.Segments`) and become one vector; a decoder goes from word to word;
and the bytes of all next words are decoded side by side. Against a byte model on the same text.
"""

import re

import torch
from paper import Figures, Paper, Run, corpus, main
from torch import Tensor, nn

from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer
from pycore.nn.linear import Projection
from pycore.schedules import Segments

PAPER = Paper(
    43,
    "Learn Your Tokens: Word-Pooled Tokenization for Language Modeling",
    "pooling bytes by word, modelling words and decoding their bytes in parallel predicts next words better than a"
    " byte model, rare words above all",
    "24 words of the standard library's sources, cut at 8 bytes; encoder, decoder of words and decoder of bytes of 1, 2"
    " and 1 blocks of width 64, against 4 blocks on the same bytes; 1,000 steps of 12; whole next words right, of all"
    " and of those that come less than 1,000 times in the 3 MB",
)
WORDS, CANVAS, PAD, POOL, COUNT, STEPS, RARE = 24, 8, 256, 257, 12, 1000, 1000


def shape(layers: int) -> BytelmConfig:
    """Blocks of width 64."""
    return BytelmConfig(layers=layers, dim=64, heads=4, kv_heads=4, max_distance=1024)


class Words:
    """A text cut into words, each padded to CANVAS bytes."""

    def __init__(self, data: bytes) -> None:
        found = [word[:CANVAS] for word in re.findall(rb" +|\n\s*|\w+|[^\w\s]", data)]
        joined = bytearray(b"".join(word.ljust(CANVAS, b"\0") for word in found))
        self.bytes = torch.frombuffer(joined, dtype=torch.uint8).view(-1, CANVAS).long()
        self.lengths = torch.tensor([len(word) for word in found])
        self.bytes[torch.arange(CANVAS) >= self.lengths[:, None]] = PAD

    def draw(self, run: Run, count: int) -> tuple[Tensor, Tensor]:
        """[count, WORDS, CANVAS] bytes and [count, WORDS] lengths."""
        chosen = run.integers(len(self.lengths) - WORDS + 1, count, 1) + torch.arange(WORDS)
        return self.bytes[chosen], self.lengths[chosen]


class WordModel(nn.Module):
    """Encoder of a word, decoder of words, decoder of a word's bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Transformer(shape(1), vocabulary=258, absolute=CANVAS + 1)
        self.words = Transformer(shape(2), inputs=64)
        self.decoder = Transformer(shape(1), vocabulary=258, absolute=CANVAS)
        self.hand = Projection(64, 64)

    def forward(self, text: Tensor) -> Tensor:
        """States that predict the bytes of words 1, 2, ...: [count, WORDS - 1, CANVAS, dim]."""
        n = len(text)
        pooled = torch.cat([torch.full((n, WORDS, 1), POOL), text], 2).flatten(1)
        place = torch.arange(CANVAS + 1).repeat(WORDS).expand(n, -1)
        edges = torch.arange(0, WORDS * (CANVAS + 1) + 1, CANVAS + 1)
        states = self.encoder(pooled, schedule=Segments(edges, causal=False), positions=place)
        vectors = self.words(states[:, :: CANVAS + 1])[:, :-1]
        given = torch.cat([torch.full((n, WORDS - 1, 1), POOL), text[:, 1:, :-1]], 2)
        place = torch.arange(CANVAS).repeat(WORDS - 1).expand(n, -1)
        x = self.decoder.embed(given.flatten(1), place).unflatten(1, (WORDS - 1, CANVAS))
        x = x + self.hand(vectors)[:, :, None]
        edges = torch.arange(0, (WORDS - 1) * CANVAS + 1, CANVAS)
        return self.decoder(x.flatten(1, 2), schedule=Segments(edges), embedded=True).unflatten(1, (WORDS - 1, CANVAS))


def of_bytes(net: Transformer, text: Tensor, lengths: Tensor) -> Tensor:
    """The byte model's states for the same places: its words stand one behind the other, without padding."""
    n = len(text)
    real = torch.arange(CANVAS) < lengths[..., None]
    order = (~real).flatten(1).to(torch.int8).argsort(dim=1, stable=True)
    packed = text.flatten(1).gather(1, order)
    counts = lengths.sum(1)
    longest = int(counts.max())
    states = net(packed[:, :longest], lengths=counts)
    row = real.flatten(1).long().cumsum(1) - 2  # the byte before each byte
    row = row.clamp(0, longest - 1)[..., None].expand(-1, -1, 64)
    return states.gather(1, row).unflatten(1, (WORDS, CANVAS))[:, 1:].reshape(n, WORDS - 1, CANVAS, 64)


@torch.no_grad()
def accuracy(states: Tensor, net: Transformer, text: Tensor, lengths: Tensor, rare: Tensor) -> tuple[float, float]:
    """Next words whose every byte is right after the right ones: of all words, and of rare ones."""
    target, counts = text[:, 1:], torch.arange(CANVAS) < lengths[:, 1:, None]
    right = ((net.logits(states)[..., :PAD].argmax(-1) == target) | ~counts).all(-1).double()
    return right.mean().item(), right[rare[:, 1:]].mean().item()


def experiment(run: Run) -> dict[str, float]:
    """Both models on the same words of held-out text."""
    learned, files = corpus()
    train, held_out = Words(learned[: run.pick(3_000_000, 300_000)]), Words(b"".join(files)[:400_000])
    keys, times = train.bytes.unique(dim=0, return_counts=True)
    common = {tuple(key) for key, n in zip(keys.tolist(), times.tolist(), strict=True) if n >= RARE}
    text, lengths = held_out.draw(run, run.pick(300, 10))
    rare = torch.tensor([[tuple(word) not in common for word in row] for row in text.tolist()])
    words, plain = WordModel(), Transformer(shape(4), vocabulary=257)

    def word_loss(step: int) -> Tensor:
        batch, sizes = train.draw(run, COUNT)
        # A word ends with padding, which is predicted once.
        target = batch[:, 1:].masked_fill(torch.arange(CANVAS) > sizes[:, 1:, None], -100)
        return words.decoder.loss(words(batch), target)

    def byte_loss(step: int) -> Tensor:
        batch, sizes = train.draw(run, COUNT)
        target = batch[:, 1:].masked_fill(torch.arange(CANVAS) >= sizes[:, 1:, None], -100)
        return plain.loss(of_bytes(plain, batch, sizes), target)

    run.fit("words", words, word_loss, STEPS, learning_rate=4e-3)
    run.fit("bytes", plain, byte_loss, STEPS, learning_rate=4e-3)
    with torch.no_grad():
        found = {
            "words": accuracy(words(text), words.decoder, text, lengths, rare),
            "bytes": accuracy(of_bytes(plain, text, lengths), plain, text, lengths, rare),
        }
    return {
        f"{name}, {which}": value
        for name, pair in found.items()
        for which, value in zip(("all", "rare"), pair, strict=True)
    }


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The paper has three times as many next words right, and thirty times as many rare ones."""
    return [
        (
            f.above("words, all", "bytes, all"),
            f"next words right: {f['words, all']:.3f} word-pooled, {f['bytes, all']:.3f} by bytes",
        ),
        (
            f.above("words, rare", "bytes, rare"),
            f"of words that come less than {RARE:,} times: {f['words, rare']:.3f} and {f['bytes, rare']:.3f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
