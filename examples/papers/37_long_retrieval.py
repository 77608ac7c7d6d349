# SPDX-License-Identifier: Apache-2.0
"""Saad-Falcon et al., "Benchmarking and Building Long-Context Retrieval Models with LoCo and M2-BERT"
(arXiv 2402.07440).

Not with Monarch matrices, which are another op, but with a window of attention to both sides (`pycore.schedules.Lambda`
with `right`), whose cost is as linear: a document whose facts stand anywhere is read whole, or from its start.
"""

import math

import torch
from paper import Figures, Paper, Run, main
from torch import Tensor, nn

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer, mean_pool, nearest_accuracy
from pycore.schedules import Full, Lambda

PAPER = Paper(
    37,
    "Benchmarking and Building Long-Context Retrieval Models with LoCo and M2-BERT",
    "where what identifies a document is spread over all of it, an encoder that reads it whole retrieves it and one"
    " that reads the start does not, nor one that takes the best of its chunks",
    "documents of 192 made-up words, 6 of them facts (one of 200) in random places; a question names 3 of the facts;"
    " one block of width 64 with a window of 16 to either side; one of 300 documents",
)
LENGTH, START, FACTS, ASKED, NAMES, FILLER, COUNT = 192, 64, 6, 3, 200, 60, 24
SHAPE = BytelmConfig(layers=1, dim=64, heads=4, kv_heads=4, max_distance=256)


def documents(run: Run, count: int) -> tuple[Tensor, Tensor]:
    """Documents [count, LENGTH] and questions [count, ASKED]."""
    text = NAMES + run.integers(FILLER, count, LENGTH)
    facts = run.uniform(count, NAMES).argsort(1)[:, :FACTS]
    places = run.uniform(count, LENGTH).argsort(1)[:, :FACTS]
    chosen = run.uniform(count, FACTS).argsort(1)[:, :ASKED]
    return text.scatter(1, places, facts), facts.gather(1, chosen)


class Model(nn.Module):
    """One encoder for documents and questions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Transformer(SHAPE, vocabulary=NAMES + FILLER)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def read(self, text: Tensor) -> Tensor:
        """Documents of any length."""
        return mean_pool(self.encoder(text, schedule=Lambda(0, 17, 16)))

    def ask(self, question: Tensor) -> Tensor:
        """Questions."""
        return mean_pool(self.encoder(question, schedule=Full()))


def experiment(run: Run) -> dict[str, float]:
    """How often the right document is the first, read whole, from its start, or in chunks."""
    text, question = documents(run, run.pick(300, 30))
    figures: dict[str, float] = {}
    for name, length in (("whole", LENGTH), ("start", START)):
        torch.manual_seed(run.seed)
        model = Model()

        def loss(step: int, model: Model = model, length: int = length) -> Tensor:
            batch, asked = documents(run, COUNT)
            scale = model.log_scale.exp().clamp(max=100.0)
            return ops.contrastive_loss(model.ask(asked), model.read(batch[:, :length]), scale=scale)

        run.fit(name, model, loss, 500, learning_rate=4e-3)
        with torch.no_grad():
            asked = model.ask(question)
            figures[name] = nearest_accuracy(asked, model.read(text[:, :length]))
            if name == "start":  # the encoder of short texts, on every chunk; the best chunk speaks for its document
                chunks = model.read(text.reshape(-1, START)).unflatten(0, (len(text), -1))
                scores = ops.maxsim(asked[:, None], chunks)
                figures["best chunk"] = nearest_accuracy(scores, torch.eye(len(text)))
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """A third of the document has two of six facts on average."""
    return [
        (
            f.above("whole", "start", 0.1),
            f"the right document first: {f['whole']:.3f} read whole, {f['start']:.3f} from the first {START} words",
        ),
        (f.above("whole", "best chunk"), f"by the best of three chunks {f['best chunk']:.3f}"),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
