# SPDX-License-Identifier: Apache-2.0
"""Saito et al., "Prefix Conditioning Unifies Language and Label Supervision" (arXiv 2206.01125).

A dual encoder learns from captions of many scenes and from labels of a few classes (`pycore.ops.contrastive_loss`);
a token in front of the text says which of the two it is.
"""

import math

import torch
from paper import Figures, Paper, Run, main
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer, mean_pool
from pycore.nn.linear import Projection
from pycore.schedules import Full

PAPER = Paper(
    33,
    "Prefix Conditioning Unifies Language and Label Supervision",
    "where labelled images and captioned ones are learned together, a prefix token that says which it is keeps the"
    " labels' bias out, and the captions' prefix gives better zero-shot recognition",
    "made-up images: a vector of a class (40, of which labels have 10 in one style) plus styles and things around it;"
    " captions are the class's word among four words for those; accuracy over all classes on captioned images",
)
CLASSES, LABELLED, AROUND, DIM = 40, 10, 24, 32
WORDS = CLASSES + AROUND + 2  # and the two prefixes
CAPTION, LABEL = WORDS - 2, WORDS - 1
SHAPE = BytelmConfig(layers=1, dim=48, heads=4, kv_heads=4, position="none")


class World:
    """What classes and things look like."""

    def __init__(self, run: Run) -> None:
        self.run, self.looks = run, run.normal(CLASSES + AROUND, DIM)

    def captioned(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images, captions [count, 5] in a random order, and classes."""
        own = self.run.integers(CLASSES, count)
        around = self.run.integers(CLASSES + AROUND, count, 4, low=CLASSES)
        words = torch.cat([own[:, None], around], 1)
        image = self.looks[own] + 0.5 * self.looks[around].sum(1) + 0.5 * self.run.normal(count, DIM)
        order = self.run.uniform(count, 5).argsort(1)
        return image, words.gather(1, order), own

    def labelled(self, count: int) -> tuple[Tensor, Tensor]:
        """Images of the first classes, all around the same thing, and their labels [count, 1]."""
        own = self.run.integers(LABELLED, count)
        return self.looks[own] + self.looks[CLASSES] + 0.2 * self.run.normal(count, DIM), own[:, None]


class Model(nn.Module):
    """An encoder of images and one of words, which may be told where the words come from."""

    def __init__(self, prefix: bool) -> None:
        super().__init__()
        self.prefix = prefix
        self.image = nn.ModuleList([Projection(DIM, 96, bias=True), Projection(96, SHAPE.dim)])
        self.text = Transformer(SHAPE, vocabulary=WORDS)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def see(self, images: Tensor) -> Tensor:
        """[n, dim] of length 1."""
        return functional.normalize(self.image[1](self.image[0](images).relu()), dim=-1)

    def read(self, words: Tensor, source: int) -> Tensor:
        """[n, dim] of length 1."""
        if self.prefix:
            words = torch.cat([torch.full((len(words), 1), source), words], 1)
        return mean_pool(self.text(words, schedule=Full()))

    def loss(self, images: Tensor, words: Tensor, source: int) -> Tensor:
        """In a batch of one source, the right text of each image; equal labels are one text."""
        texts, own = words.unique(dim=0, return_inverse=True)
        scale = self.log_scale.exp().clamp(max=100.0)
        return ops.contrastive_loss(
            self.see(images), self.read(texts, source), scale=scale, symmetric=False, positives=own
        )


def experiment(run: Run) -> dict[str, float]:
    """Accuracy by class words alone, behind either prefix or none."""
    world, figures = World(run), {}
    images, _, own = world.captioned(run.pick(4000, 100))
    names = torch.arange(CLASSES)[:, None]
    for name in ("prefix", "no prefix", "captions alone"):
        model = Model(name == "prefix")

        def loss(step: int, name: str = name, model: Model = model) -> Tensor:
            if step % 2 == 0 or name == "captions alone":
                seen, words, _ = world.captioned(64)
                return model.loss(seen, words, CAPTION)
            return model.loss(*world.labelled(64), LABEL)

        run.fit(name, model, loss, 350, learning_rate=3e-3)
        for source in (CAPTION, LABEL) if name == "prefix" else (CAPTION,):
            with torch.no_grad():
                guess = ops.pairwise_topk(model.see(images), model.read(names, source), 1)[1][:, 0]
            figures[name + ", as a label" * (source == LABEL)] = (guess == own).double().mean().item()
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Zero-shot in the paper's sense: no labelled image of 30 of the classes."""
    return [
        (
            f.above("prefix", "no prefix"),
            f"accuracy {f['prefix']:.3f} with the captions' prefix, {f['no prefix']:.3f} trained without prefixes, "
            f"{f['captions alone']:.3f} on captions alone",
        ),
        (f.above("prefix", "prefix, as a label"), f"asked behind the labels' prefix {f['prefix, as a label']:.3f}"),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
