# SPDX-License-Identifier: Apache-2.0
"""Wei et al., "Arctic-SnowCoder: Demystifying High-Quality Data in Code Pretraining" (arXiv 2409.02326).

A byte model is trained on all of the standard library, then goes on with what an annotator picked from the same text:
an encoder (`pycore.schedules.Full`) that tells good examples from random text.
"""

import functools
import sysconfig
from pathlib import Path

import torch
from bytes_text import SHAPE, bits, model
from paper import Figures, Paper, Run, corpus, main
from torch import Tensor, nn

from pycore import ops
from pycore.models.transformer import Transformer
from pycore.schedules import Full

PAPER = Paper(
    12,
    "Arctic-SnowCoder: Demystifying High-Quality Data in Code Pretraining",
    "going on with the tenth of the same text that an annotator finds most like good examples beats going on with"
    " random text, because it is nearer to what the model is asked for",
    "bytes of the standard library's sources, 64 at a time; good examples are half of the files of asyncio, email and"
    " json, the others are asked for and in no training text; 400 steps on all, then 200 on picked or random windows",
)
LENGTH, COUNT = 64, 16
GOOD = ("asyncio", "email", "json")


@functools.cache
def texts() -> tuple[bytes, bytes, bytes]:
    """Every other file of the packages in GOOD, for the annotator; the others, to be asked for; all the rest."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path.read_bytes() for name in GOOD for path in sorted((root / name).glob("*.py"))]
    rest = corpus()[0]
    for data in files[1::2]:
        rest = rest.replace(data, b"")
    return b"".join(files[::2]), b"".join(files[1::2]), rest


def cut(run: Run, data: bytes, count: int) -> Tensor:
    """Windows from random places: int64 [count, LENGTH]."""
    row = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return row[run.integers(len(row) - LENGTH + 1, count, 1) + torch.arange(LENGTH)].long()


class Annotator(nn.Module):
    """Says whether a window is a good example or random text."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Transformer(SHAPE, vocabulary=256)
        self.classes = nn.Parameter(torch.zeros(2, SHAPE.dim))

    def forward(self, text: Tensor) -> Tensor:
        return self.encoder(text, schedule=Full()).mean(1)

    @torch.no_grad()
    def score(self, text: Tensor) -> Tensor:
        """How much better a window fits the good examples: [n]."""
        both = [ops.invariant_linear(self(part), self.classes) for part in text.split(256)]
        return torch.cat([part[:, 1] - part[:, 0] for part in both])


def annotated(run: Run, examples: bytes, rest: bytes) -> Annotator:
    """An annotator that has seen good examples and random text."""
    judge = Annotator()
    labels = torch.arange(2 * COUNT) // COUNT

    def loss(step: int) -> Tensor:
        text = torch.cat([cut(run, rest, COUNT), cut(run, examples, COUNT)])
        return ops.linear_cross_entropy(judge(text), judge.classes, labels)

    run.fit("annotator", judge, loss, 200)
    return judge


def experiment(run: Run) -> dict[str, float]:
    """Bits per byte of the files that are asked for."""
    examples, wanted, rest = texts()
    test = cut(run, wanted, run.pick(384, 16))
    net = model()

    def go_on(label: str, text: Tensor | None, steps: int, rate: float) -> float:
        def loss(step: int) -> Tensor:
            batch = cut(run, rest, COUNT) if text is None else text[run.integers(len(text), COUNT)]
            return net.loss(net(batch[:, :-1]), batch[:, 1:])

        run.fit(label, net, loss, steps, learning_rate=rate)
        with torch.no_grad():
            return bits(net.loss(net(test[:, :-1]), test[:, 1:]))

    figures = {"after all text": go_on("all text", None, 400, 4e-3)}
    first = {name: value.clone() for name, value in net.state_dict().items()}
    pool = cut(run, rest, run.pick(8000, 100))
    scores = annotated(run, examples, rest).score(pool)
    picked = pool[scores.argsort(descending=True)[: len(pool) // 10]]
    for name, text in (("random text", pool[: len(picked)]), ("picked text", picked)):
        net.load_state_dict(first)
        figures[name] = go_on(name, text, 200, 2e-3)
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Both go on from the same weights with as much text."""
    return [
        (
            f.above("random text", "picked text"),
            f"bits per byte of what is asked for {f['picked text']:.3f} after the annotator's choice, "
            f"{f['random text']:.3f} after random text, {f['after all text']:.3f} before either",
        )
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
