# SPDX-License-Identifier: Apache-2.0
"""Koh et al., "Generating Images with Multimodal Language Models" (arXiv 2305.17216).

A frozen language model of small questions, which never saw a picture, and a frozen generator of digits
are joined by a small map from the one's states to the other's conditions.
"""

import torch
from paper import Figures, Paper, Run, main
from pictures import DIM, PIXELS, Generator, Pictures, Stack
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
    "texts of three digits and which of them is asked for, the answer as a handwritten digit; a decoder of 2 blocks of"
    " width 64 has read such texts (900 steps), the generator names of digits; 60 texts with a picture teach the map,"
    " or train on the generator's own text encoder; texts that neither has seen with a picture",
)
READER = BytelmConfig(layers=2, dim=64, heads=4, kv_heads=4, max_distance=16)
OWN = BytelmConfig(layers=2, dim=DIM, heads=4, kv_heads=4, max_distance=16)
WHICH, TEXTS, PAIRS, ASKED = 10, 3000, 60, 500


def questions(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Texts `a b c which` by their number, 0 to 2999: int64 [n, 4]; and the digits asked for [n]."""
    digits = torch.stack([rows // 100 % 10, rows // 10 % 10, rows % 10], 1)
    which = rows[:, None] // 1000
    return torch.cat([digits, WHICH + which], 1), digits.gather(1, which)[:, 0]


class Painter(nn.Module):
    """Names of digits to conditions, and those to pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.paint = Transformer(OWN, vocabulary=WHICH + 3), Generator()

    def condition(self, words: Tensor) -> Tensor:
        """[n, DIM]."""
        return mean_pool(self.text(words, schedule=Full())) * DIM**0.5


def experiment(run: Run) -> dict[str, float]:
    """The map, and the generator's own encoder on the same pairs."""
    pictures, language, painter = Pictures(run), Transformer(READER, vocabulary=WHICH + 3), Painter()

    def read(step: int) -> Tensor:
        text, value = questions(run.integers(TEXTS, 128))
        whole = torch.cat([text, value[:, None]], 1)
        return language.loss(language(whole[:, :-1])[:, -1], whole[:, -1])

    def draw(step: int) -> Tensor:
        images, labels = pictures.batch(128)
        return painter.paint.loss(images, painter.condition(labels[:, None]), run)

    run.fit("language model", language, read, 900, learning_rate=4e-3)
    run.fit("generator", painter, draw, 2000)
    language.requires_grad_(False)
    painter.paint.requires_grad_(False)
    order = run.permutation(TEXTS)
    text, value = questions(order[:PAIRS])
    asked, answers = questions(order[PAIRS : PAIRS + run.pick(ASKED, 20)])
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
            f"pictures that show the answer {f['map, drawn']:.2f} through the map, {f['own encoder, drawn']:.2f} "
            f"through the generator's own encoder (the language model answers {f['own answers']:.2f} right)",
        ),
        (
            f.above("map, found", "own encoder, found", 0.1),
            f"found by it {f['map, found']:.2f}, {f['own encoder, found']:.2f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
