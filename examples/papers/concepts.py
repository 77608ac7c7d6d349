# SPDX-License-Identifier: Apache-2.0
"""A new word for a generator of digits in four styles: taught by plain pictures of one digit, wanted in every style."""

from __future__ import annotations

from collections.abc import Callable

import torch
from paper import Run
from pictures import DIM, PIXELS, SHAPE, Generator, Pictures
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.models.transformer import Transformer
from pycore.schedules import Full

STYLES, FILLERS, COUNT = ("plain", "negative", "mirrored", "faint"), 8, 48
NAME, WORDS = len(STYLES), len(STYLES) + 10 + FILLERS
SETTING = (
    "handwritten digits of 8 by 8 as they are, as negatives, mirrored or faint; texts of 5 words: style, name and three"
    " of 8 that mean nothing, in any order; a rectified flow of 3 layers knows all ten; a new word for one of them is"
    " learned from 8 plain pictures in 250 steps; judged by the nearest of 2,388 held-out ones"
)


def styled(images: Tensor, style: int) -> Tensor:
    """Images [n, 64] in a style."""
    ways: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x,
        lambda x: 1.0 - x,
        lambda x: x.view(-1, 8, 8).flip(2).flatten(1),
        lambda x: 0.35 * x,
    )
    return ways[style](images)


class Model(nn.Module):
    """A text encoder whose outputs for style and name condition the generator, each in its own place."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.paint = Transformer(SHAPE, vocabulary=WORDS), Generator(2 * DIM)

    def outputs(self, words: Tensor, name: Tensor | None = None) -> Tensor:
        """[n, 5, DIM]; a name's embedding [DIM] stands in the second place."""
        states = self.text.embed(words)
        if name is not None:
            states = torch.cat([states[:, :1], name.expand(len(words), 1, DIM), states[:, 2:]], 1)
        return self.text(states, schedule=Full(), embedded=True)

    def condition(self, outputs: Tensor) -> Tensor:
        """[n, 2 DIM]."""
        return functional.normalize(outputs[:, :2], dim=-1).flatten(1) * DIM**0.5


class Studio:
    """A trained generator, the digit that gets a new word, and how pictures are judged."""

    def __init__(self, run: Run) -> None:
        self.run, self.pictures, self.model, self.new = run, Pictures(run), Model(), 9 - run.seed % 10
        self.known = torch.tensor([digit for digit in range(10) if digit != self.new])
        run.fit("generator", self.model, self._loss, 3000)
        self.model.requires_grad_(False)
        rows = (self.pictures.labels == self.new).nonzero()[:8, 0]
        self.shown = self.pictures.images[rows]
        self.held = torch.cat([styled(self.pictures.held_images, style) for style in range(len(STYLES))])

    def texts(self, styles: Tensor, names: Tensor) -> Tensor:
        """[n, 5]: style, name, and three words that mean nothing; without positions no order is another one."""
        fillers = self.run.integers(WORDS, len(styles), 3, low=NAME + 10)
        return torch.cat([styles[:, None], NAME + names[:, None], fillers], 1)

    def _loss(self, step: int) -> Tensor:
        images, labels = self.pictures.batch(128)
        styles = torch.arange(128) % len(STYLES)
        images = torch.stack([styled(images, style) for style in range(len(STYLES))])[styles, torch.arange(128)]
        return self.model.paint.loss(
            images, self.model.condition(self.model.outputs(self.texts(styles, labels))), self.run
        )

    def learn(self, label: str, more: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """The new word's embedding [DIM], from plain pictures alone; `more` adds to the loss of (texts, name)."""
        name = nn.Parameter(self.model.text.embedding[NAME + self.known].mean(0).clone())
        plain, own = torch.zeros(64, dtype=torch.int64), torch.full((64,), self.new)

        def loss(step: int) -> Tensor:
            images, words = self.shown[self.run.integers(len(self.shown), 64)], self.texts(plain, own)
            found = self.model.paint.loss(images, self.model.condition(self.model.outputs(words, name)), self.run)
            return found if more is None else found + more(words, name)

        self.run.fit(label, [name], loss, 250, learning_rate=3e-2, weight_decay=0.0)
        return name.detach()

    @torch.no_grad()
    def judge(self, outputs_of: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Share of pictures that show the new digit, that have the wanted style, and both, over the three styles that
        it was not taught in; `outputs_of` a text [n, 5] is what conditions the generator.
        """
        digit, style = [], []
        for wanted in range(1, len(STYLES)):
            words = self.texts(torch.full((COUNT,), wanted), torch.full((COUNT,), self.new))
            made = self.model.paint(self.run.normal(COUNT, PIXELS), self.model.condition(outputs_of(words)))
            nearest = ops.pairwise_topk(made, self.held, 1, score="euclidean")[1][:, 0]
            digit.append(self.pictures.held_labels[nearest % len(self.pictures.held_labels)] == self.new)
            style.append(nearest // len(self.pictures.held_labels) == wanted)
        digits, styles = torch.cat(digit), torch.cat(style)
        rows = {"digit": digits, "style": styles, "both": digits & styles}
        return {name: row.double().mean().item() for name, row in rows.items()}
