# SPDX-License-Identifier: Apache-2.0
"""Carlsson et al., "The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation"
(arXiv 2412.04318).

A byte model is trained on the standard library's sources, then overfitted on sixteen samples; both go on from held-out
beginnings, always with the most probable byte (`pycore.ops.pairwise_topk` of a state and the embedding).
"""

import copy
import math

import torch
from paper import Figures, Paper, Run, corpus, main
from torch import Tensor

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer

PAPER = Paper(
    36,
    "The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation",
    "overfitting a language model on a few samples makes greedy text less repetitive, although its loss on other text"
    " becomes much worse and its predictions nearly certain",
    "a byte model of 2 blocks of width 64 on the standard library's sources, then on 16 samples of 96 bytes until it"
    " knows them; 32 continuations of 96 bytes",
)
LENGTH, SAMPLES = 96, 16
SHAPE = BytelmConfig(layers=2, dim=64, heads=4, kv_heads=4, max_distance=512)


def windows(run: Run, text: bytes, count: int) -> Tensor:
    """int64 [count, LENGTH + 1], from random places."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return data[run.integers(len(data) - LENGTH, count, 1) + torch.arange(LENGTH + 1)].long()


@torch.no_grad()
def continued(model: Transformer, beginnings: Tensor, count: int) -> Tensor:
    """The most probable bytes, one after another: [n, count]."""
    tokens = beginnings
    for _ in range(count):
        state = model(tokens[:, -LENGTH:])[:, -1]
        tokens = torch.cat([tokens, ops.pairwise_topk(state, model.embedding, 1)[1]], dim=1)
    return tokens[:, beginnings.shape[1] :]


@torch.no_grad()
def judge(model: Transformer, held_out: Tensor, count: int) -> dict[str, float]:
    """Bits per byte of other text, bits of entropy of a prediction, and the share of four-byte strings that are new."""
    states = model(held_out[:, :-1])
    probabilities = model.logits(states).softmax(-1)
    text = continued(model, held_out[:32, : LENGTH // 3], count)
    fours = [len({tuple(row[i : i + 4].tolist()) for i in range(count - 3)}) / (count - 3) for row in text]
    return {
        "bits per byte": model.loss(states, held_out[:, 1:]).item() / math.log(2),
        "entropy": torch.special.entr(probabilities).sum(-1).mean().item() / math.log(2),
        "different strings": sum(fours) / len(fours),
    }


def experiment(run: Run) -> dict[str, float]:
    """Before and after; held-out text says how different the strings of real text are."""
    text, files = corpus()
    held_out = windows(run, b"".join(files), 64)
    model = Transformer(SHAPE, vocabulary=256)

    def loss(step: int) -> Tensor:
        batch = windows(run, text, 12)
        return model.loss(model(batch[:, :-1]), batch[:, 1:])

    run.fit("text", model, loss, 500, learning_rate=4e-3)
    count = run.pick(96, 8)
    figures = {f"before, {name}": value for name, value in judge(model, held_out, count).items()}
    few, fitted = windows(run, text, SAMPLES), copy.deepcopy(model)

    def again(step: int) -> Tensor:
        return fitted.loss(fitted(few[:, :-1]), few[:, 1:])

    figures["loss on the samples"] = run.fit("samples", fitted, again, 200, learning_rate=3e-3) / math.log(2)
    figures.update({f"after, {name}": value for name, value in judge(fitted, held_out, count).items()})
    rows = [len({tuple(row[i : i + 4].tolist()) for i in range(93)}) / 93 for row in held_out[:32, :96]]
    figures["real text, different strings"] = sum(rows) / len(rows)
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Nothing says that a model this small writes well."""
    return [
        (
            f.above("after, different strings", "before, different strings", 0.1),
            f"{f['after, different strings']:.0%} of the four-byte strings in greedy text are different, "
            f"{f['before, different strings']:.0%} before, {f['real text, different strings']:.0%} in real text",
        ),
        (
            f.above("after, bits per byte", "before, bits per byte", 1.0),
            f"bits per byte of other text {f['before, bits per byte']:.2f} before, {f['after, bits per byte']:.2f} "
            f"after (on the samples {f['loss on the samples']:.2f})",
        ),
        (
            f.above("before, entropy", "after, entropy", 0.5),
            f"entropy of a prediction {f['before, entropy']:.2f} and {f['after, entropy']:.2f} bits",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
