# SPDX-License-Identifier: Apache-2.0
"""Zhao et al., "Decoder Pre-Training with only Text for Scene Text Recognition" (arXiv 2408.05706).

A decoder that reads strips of handwritten digits is pretrained on a text encoder's states in place of an image's. The
two encoders have learned from pairs to agree (`pycore.ops.contrastive_loss`); few labelled strips finetune the decoder.
"""

import copy
import math

import torch
from paper import Figures, Paper, Run, main
from pictures import PIXELS, Pictures
from torch import Tensor, nn

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer, mean_pool
from pycore.schedules import Full

PAPER = Paper(
    6,
    "Decoder Pre-Training with only Text for Scene Text Recognition",
    "text embeddings stand in for an image's where the encoders agree, so a decoder pretrained on text alone reads"
    " images better after finetuning; perturbing them with embeddings of images helps more",
    "strips of 4 handwritten digits on noise; a dual encoder of 1 block of width 48 learns 500 steps from pairs; the"
    " decoder is pretrained 300 steps on the states of random numbers' texts and finetuned 100 on 60 labelled strips;"
    " digits read right in 400 others",
)
LENGTH, LABELLED, BEGIN = 4, 60, 10
SHAPE = BytelmConfig(layers=1, dim=48, heads=4, kv_heads=4, max_distance=16)


class Strips:
    """Numbers written by hand."""

    def __init__(self, run: Run) -> None:
        self.run, self.pictures = run, Pictures(run)

    def draw(self, count: int, held: bool = False) -> tuple[Tensor, Tensor]:
        """Strips [count, 4, 64], a piece a digit, and numbers int64 [count, 4]."""
        images = self.pictures.held_images if held else self.pictures.images
        labels = self.pictures.held_labels if held else self.pictures.labels
        rows = self.run.integers(len(images), count, LENGTH)
        return images[rows] + 0.25 * self.run.normal(count, LENGTH, PIXELS), labels[rows]


class Reader(nn.Module):
    """Writes digits while it looks at an encoder's states."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Transformer(SHAPE, vocabulary=BEGIN + 1, cross=True)

    def states(self, memory: Tensor, number: Tensor) -> Tensor:
        """The states that predict a number's digits."""
        before = torch.cat([torch.full((len(number), 1), BEGIN), number[:, :-1]], 1)
        return self.decoder(before, memory=memory)

    def loss(self, memory: Tensor, number: Tensor) -> Tensor:
        """Mean over digits."""
        return self.decoder.loss(self.states(memory, number), number)


def experiment(run: Run) -> dict[str, float]:
    """Three starts of the same finetuning."""
    strips, scale = Strips(run), nn.Parameter(torch.tensor(math.log(10.0)))
    see, read = Transformer(SHAPE, inputs=PIXELS), Transformer(SHAPE, vocabulary=10)

    def agree(step: int) -> Tensor:
        images, numbers = strips.draw(96)
        left, right = (mean_pool(encode(x, schedule=Full())) for encode, x in ((see, images), (read, numbers)))
        return ops.contrastive_loss(left, right, scale=scale.exp().clamp(max=100.0))

    run.fit("dual encoder", [*see.parameters(), *read.parameters(), scale], agree, 500)
    few = strips.draw(LABELLED)
    asked, numbers = strips.draw(run.pick(400, 20), held=True)
    figures = {}
    for name in ("from nothing", "text", "text, perturbed"):
        torch.manual_seed(run.seed)
        reader, encoder = Reader(), copy.deepcopy(see)

        def pretrain(step: int, name: str = name, reader: Reader = reader) -> Tensor:
            target = run.integers(10, 64, LENGTH)
            with torch.no_grad():
                memory = read(target, schedule=Full())
                if name == "text, perturbed":  # states of unrelated images, a little of each
                    memory = memory + 0.3 * see(strips.draw(64)[0], schedule=Full())
            return reader.loss(memory, target)

        def finetune(step: int, reader: Reader = reader, encoder: Transformer = encoder) -> Tensor:
            rows = run.integers(LABELLED, 32)
            return reader.loss(encoder(few[0][rows], schedule=Full()), few[1][rows])

        if name != "from nothing":
            run.fit(f"{name}, pretraining", reader, pretrain, 300)
        run.fit(f"{name}, finetuning", [*reader.parameters(), *encoder.parameters()], finetune, 100, learning_rate=1e-3)
        with torch.no_grad():
            states = reader.states(encoder(asked, schedule=Full()), numbers)
            figures[name] = (reader.decoder.logits(states).argmax(-1) == numbers).double().mean().item()
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Two gains."""
    return [
        (
            f.above("text", "from nothing"),
            f"digits read right {f['text']:.3f} after pretraining on text, {f['from nothing']:.3f} without",
        ),
        (f["text, perturbed"] > f["text"], f"with perturbed embeddings {f['text, perturbed']:.3f}"),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
