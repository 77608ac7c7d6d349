# SPDX-License-Identifier: Apache-2.0
"""He et al., "ConES: Concept Embedding Search for Parameter Efficient Tuning Large Vision Language Models"
(arXiv 2305.18993).

A dual encoder of digits and words (`pycore.ops.contrastive_loss`) has not seen three of the digits. A few images of
each teach it them: by an embedding searched among its outputs, or by a new word in front of its text encoder.
"""

import time

import torch
from paper import Figures, Paper, Run, main
from pictures import DIM, DualEncoder, Pictures
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops

PAPER = Paper(
    24,
    "ConES: Concept Embedding Search for Parameter Efficient Tuning Large Vision Language Models",
    "searching a concept's embedding directly, without the text encoder, learns as well as prompt tuning or textual"
    " inversion through it, or better, and several times faster",
    "handwritten digits and texts of 6 words (a digit's name among five of 20 others); a dual encoder that has learned"
    " 7 of 10 digits; 8 images of each; 150 steps for all ten embeddings; accuracy over all ten on 597 held-out images",
)
SEEN, FILLERS, SHOTS = torch.arange(7), 20, 8
WORDS = 10 + FILLERS


def texts(run: Run, labels: Tensor) -> Tensor:
    """[n, 6]: the digit's name anywhere among other words."""
    words = torch.cat([labels[:, None], run.integers(WORDS, len(labels), 5, low=10)], 1)
    return words.gather(1, run.uniform(len(labels), 6).argsort(1))


def experiment(run: Run) -> dict[str, float]:
    """Accuracy and the time of a step, one way after the other."""
    pictures, model = Pictures(run), DualEncoder(WORDS)

    def pair(step: int) -> Tensor:
        images, labels = pictures.batch(96, SEEN)
        return model.loss(images, texts(run, labels))

    run.fit("dual encoder", model, pair, 500)
    model.requires_grad_(False)
    few = torch.cat([(pictures.labels == digit).nonzero()[:SHOTS, 0] for digit in range(10)])
    shown, names = model.see(pictures.images[few]), pictures.labels[few]
    fillers = texts(run, torch.arange(10))
    others = model.text.embed(torch.where(fillers < 10, 10, fillers))[:, 1:]  # five words around each new one
    with torch.no_grad():
        start = model.read(texts(run, torch.arange(10)))
    asked = model.see(pictures.held_images)

    def accuracy(concepts: Tensor) -> float:
        guess = ops.pairwise_topk(asked, functional.normalize(concepts, dim=-1), 1)[1][:, 0]
        return (guess == pictures.held_labels).double().mean().item()

    figures = {"not tuned, accuracy": accuracy(start)}
    word = nn.Parameter(model.text.embedding[:10].clone())
    prompt = nn.Parameter(others.mean(0).clone())
    direct = nn.Parameter(start.clone())

    def through(context: Tensor) -> Tensor:
        return model.read(torch.cat([word[:, None], context], 1), embedded=True)

    ways = {
        "embedding search": ([direct], lambda: functional.normalize(direct, dim=-1)),
        "textual inversion": ([word], lambda: through(others)),
        "prompt tuning": ([prompt], lambda: through(prompt.expand(10, 5, DIM))),
    }
    for name, (learned, concepts) in ways.items():
        if name == "prompt tuning":
            word = nn.Parameter(model.text.embedding[:10].clone(), requires_grad=False)

        def loss(step: int, concepts=concepts) -> Tensor:
            return ops.linear_cross_entropy(shown * model.scale, concepts(), names)

        began = time.perf_counter()
        run.fit(name, learned, loss, 150, learning_rate=1e-2, weight_decay=0.0)
        figures[f"{name}, ms a step"] = 1000 * (time.perf_counter() - began) / run.pick(150, 2)
        with torch.no_grad():
            figures[f"{name}, accuracy"] = accuracy(concepts())
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """As good, and faster."""
    best = max(f["textual inversion, accuracy"], f["prompt tuning, accuracy"])
    return [
        (
            f["embedding search, accuracy"] > best - 0.01
            and f.above("embedding search, accuracy", "not tuned, accuracy"),
            f"accuracy {f['embedding search, accuracy']:.3f} by searched embeddings, "
            f"{f['textual inversion, accuracy']:.3f} by new words, {f['prompt tuning, accuracy']:.3f} by a new prompt, "
            f"{f['not tuned, accuracy']:.3f} before",
        ),
        (
            f.above("textual inversion, ms a step", "embedding search, ms a step"),
            f"{f['textual inversion, ms a step'] / f['embedding search, ms a step']:.1f} times as fast a step as "
            "through the text encoder",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
