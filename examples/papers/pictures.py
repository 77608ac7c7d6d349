# SPDX-License-Identifier: Apache-2.0
"""Real pictures that words belong to: handwritten digits, a dual encoder for them, and a generator that words steer."""

from __future__ import annotations

import math

import torch
from paper import Run, split_digits
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer, mean_pool
from pycore.nn.linear import Projection
from pycore.schedules import Full

PIXELS, DIM = 64, 48
SHAPE = BytelmConfig(layers=1, dim=DIM, heads=4, kv_heads=4, position="none")


class Stack(nn.Module):
    """Layers with a rectifier between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Projection(a, b, bias=True) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class Pictures:
    """The digits in two parts: what is learned from, and what is asked or compared with."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.images, self.labels, self.held_images, self.held_labels = split_digits(run)

    def batch(self, count: int, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images [count, 64] to learn from and what they are; of some classes alone, if wanted."""
        of = torch.arange(len(self.labels)) if classes is None else torch.isin(self.labels, classes).nonzero()[:, 0]
        rows = of[self.run.integers(len(of), count)]
        return self.images[rows], self.labels[rows]

    def judge(self, images: Tensor) -> Tensor:
        """What images show, by the nearest held-out one: no network, so none that was trained to be pleased."""
        return self.held_labels[ops.pairwise_topk(images, self.held_images, 1, score="euclidean")[1][:, 0]]


class DualEncoder(nn.Module):
    """An encoder of images and one of words, compared by their angle."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.image, self.text = Stack(PIXELS, 96, DIM), Transformer(SHAPE, vocabulary=words)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied with."""
        return self.log_scale.exp().clamp(max=100.0)

    def see(self, images: Tensor) -> Tensor:
        """[n, DIM] of length 1."""
        return functional.normalize(self.image(images), dim=-1)

    def read(self, words: Tensor, embedded: bool = False) -> Tensor:
        """[n, length] of words, or their embeddings, to [n, DIM] of length 1."""
        return mean_pool(self.text(words, schedule=Full(), embedded=embedded))

    def loss(self, images: Tensor, words: Tensor) -> Tensor:
        """Each image's own text among the batch's; equal texts are one."""
        texts, own = words.unique(dim=0, return_inverse=True)
        return ops.contrastive_loss(
            self.see(images), self.read(texts), scale=self.scale, symmetric=False, positives=own
        )


class Generator(nn.Module):
    """Noise to images along straight lines (rectified flow), told by a vector where to."""

    def __init__(self, condition: int = DIM) -> None:
        super().__init__()
        self.velocity = Stack(PIXELS + condition + 1, 256, 256, PIXELS)

    def _of(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.velocity(torch.cat([x, condition, time], 1))

    def loss(self, images: Tensor, condition: Tensor, run: Run) -> Tensor:
        """Squared error of the direction from noise to the image, at a random point between them."""
        noise, time = run.normal(*images.shape), run.uniform(len(images), 1)
        return (self._of(noise + time * (images - noise), time, condition) - (images - noise)).square().mean()

    def forward(self, noise: Tensor, condition: Tensor, steps: int = 8) -> Tensor:
        """Images [n, 64] from noise [n, 64] and conditions [n, channels]; gradients reach both."""
        x = noise
        for step in range(steps):
            x = x + self._of(x, torch.full((len(x), 1), step / steps), condition) / steps
        return x
