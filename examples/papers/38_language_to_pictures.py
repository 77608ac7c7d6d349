# SPDX-License-Identifier: Apache-2.0
"""Koh et al., "Generating Images with Multimodal Language Models" (arXiv 2305.17216).

A frozen language model of sums, which never saw a picture, and a frozen generator that knows digits by name are joined
by a small map from the one's states to the other's conditions.
"""

import torch
from paper import Figures, Paper, Run, main
from pictures import DIM, PIXELS, SHAPE, Generator, Pictures, Stack
from torch import Tensor, nn

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer, mean_pool
from pycore.schedules import Full

PAPER = Paper(
    38,
    "Generating Images with Multimodal Language Models",
    "mapping a frozen language model's states into a frozen generator's text space makes pictures from text, better"
    " than the generator's own text encoder where the language is more complex, and finds pictures too",
    "sums of three digits modulo ten as text, their value as a handwritten digit; a decoder of 2 blocks of width 64"
    " has read sums (2500 steps), the generator names of digits; 300 sums with a picture teach the map, or train on"
    " the generator's own text encoder; sums that neither has seen with a picture",
)
READER = BytelmConfig(layers=2, dim=64, heads=4, kv_heads=4, max_distance=16)
PLUS, EQUALS, PAIRS, ASKED = 10, 11, 300, 500


def sums(run: Run, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Texts `a + b + c =` of numbers 0 to 999, int64 [n, 6], and values [n]."""
    digits = torch.stack([rows // 100, rows // 10 % 10, rows % 10], 1)
    sign = torch.full((len(rows), 1), PLUS)
    parts = [digits[:, :1], sign, digits[:, 1:2], sign, digits[:, 2:], torch.full((len(rows), 1), EQUALS)]
    return torch.cat(parts, 1), digits.sum(1) % 10


class Painter(nn.Module):
    """Names of digits to conditions, and those to pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.paint = Transformer(SHAPE, vocabulary=EQUALS + 1), Generator()

    def condition(self, words: Tensor) -> Tensor:
        """[n, DIM]."""
        return mean_pool(self.text(words, schedule=Full())) * DIM**0.5


def experiment(run: Run) -> dict[str, float]:
    """The map, and the generator's own encoder on the same pairs."""
    pictures, language, painter = Pictures(run), Transformer(READER, vocabulary=EQUALS + 1), Painter()

    def read(step: int) -> Tensor:
        text, value = sums(run, run.integers(1000, 128))
        whole = torch.cat([text, value[:, None]], 1)
        return language.loss(language(whole[:, :-1])[:, -1], whole[:, -1])

    def draw(step: int) -> Tensor:
        images, labels = pictures.batch(128)
        return painter.paint.loss(images, painter.condition(labels[:, None]), run)

    run.fit("language model", language, read, 2500, learning_rate=4e-3)
    run.fit("generator", painter, draw, 2000)
    language.requires_grad_(False)
    painter.paint.requires_grad_(False)
    order = run.permutation(1000)
    text, value = sums(run, order[:PAIRS])
    asked, answers = sums(run, order[PAIRS : PAIRS + run.pick(ASKED, 20)])
    with torch.no_grad():
        names = painter.condition(torch.arange(10)[:, None])
        known = ops.pairwise_topk(language(asked)[:, -1], language.embedding, 1)[1][:, 0]
    figures = {"own answers": (known == answers).double().mean().item()}
    mapped = Stack(64, 96, DIM)
    shown = {digit: pictures.images[pictures.labels == digit] for digit in range(10)}

    def pictures_of(labels: Tensor) -> Tensor:
        rows = [shown[label][int(run.integers(len(shown[label]), 1))] for label in labels.tolist()]
        return torch.stack(rows)

    def join(step: int) -> Tensor:
        """The picture's loss, and the distance from the condition that the answer's name has, as the paper has both."""
        rows = run.integers(PAIRS, 96)
        made = mapped(language(text[rows])[:, -1])
        return painter.paint.loss(pictures_of(value[rows]), made, run) + (made - names[value[rows]]).square().mean()

    def own(step: int) -> Tensor:
        rows = run.integers(PAIRS, 96)
        made = painter.condition(text[rows])
        return painter.paint.loss(pictures_of(value[rows]), made, run) + (made - names[value[rows]]).square().mean()

    run.fit("map", mapped, join, 500)
    run.fit("own text encoder", painter.text, own, 500)
    with torch.no_grad():
        for label, condition in (("map", mapped(language(asked)[:, -1])), ("own encoder", painter.condition(asked))):
            made = painter.paint(run.normal(len(asked), PIXELS), condition)
            figures[f"{label}, drawn"] = (pictures.judge(made) == answers).double().mean().item()
            found = ops.pairwise_topk(condition, names, 1, score="cosine")[1][:, 0]
            figures[f"{label}, found"] = (found == answers).double().mean().item()
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Drawing and finding."""
    return [
        (
            f.above("map, drawn", "own encoder, drawn", 0.1),
            f"pictures that show the sum {f['map, drawn']:.2f} through the map, {f['own encoder, drawn']:.2f} through "
            f"the generator's own encoder (the language model answers {f['own answers']:.2f} right)",
        ),
        (
            f.above("map, found", "own encoder, found", 0.1),
            f"found by it {f['map, found']:.2f}, {f['own encoder, found']:.2f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
