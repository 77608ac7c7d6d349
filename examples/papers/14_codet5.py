# SPDX-License-Identifier: Apache-2.0
"""Wang et al., "CodeT5: Identifier-aware Unified Pre-trained Encoder-Decoder Models for Code Understanding and
Generation" (arXiv 2109.00859).

An encoder-decoder with T5's positions is pretrained on functions: masked words as they come, or identifiers, every
occurrence at once, and which words are identifiers. Then it learns to describe functions.
"""

import keyword

import torch
from code_pairs import CODE, COUNT, EncoderDecoder, Task
from paper import Figures, Paper, Run, main
from torch import Tensor, nn

from pycore import ops

PAPER = Paper(
    14,
    "CodeT5: Identifier-aware Unified Pre-trained Encoder-Decoder Models for Code Understanding and Generation",
    "pretraining on code helps to describe it, and pretraining that knows identifiers helps more than masking any"
    " words",
    "functions of the standard library in words; encoder and decoder of a block of width 64 with T5's bias; 300 steps"
    " of pretraining, 150 of finetuning on 800 functions; bits per word of the docstrings of 500 others",
)
MASKED, PAIRS = 6, 800
KEYWORDS = {word.lower() for word in keyword.kwlist} | {"self"}


def any_words(run: Run, model: EncoderDecoder, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Random words are masked, and the decoder writes them in order."""
    order = run.uniform(COUNT, CODE).masked_fill(torch.arange(CODE) >= lengths[:, None], 2.0)
    places = order.argsort(1)[:, :MASKED].sort(1).values
    masked = tokens.scatter(1, places, model.mask)
    sizes = lengths.clamp(max=MASKED)
    return model.write(model.read(masked, lengths), lengths, tokens.gather(1, places), sizes)


def identifiers(
    run: Run, model: EncoderDecoder, tokens: Tensor, lengths: Tensor, names: Tensor, tags: Tensor
) -> Tensor:
    """One identifier of each function is masked wherever it stands and written once; every word is tagged."""
    real = (torch.arange(CODE) < lengths[:, None]) & names[tokens]
    chosen = run.uniform(COUNT, CODE).masked_fill(~real, 2.0).argmin(1, keepdim=True)
    wanted = tokens.gather(1, chosen)
    masked = tokens.masked_fill((tokens == wanted) & real, model.mask)
    loss = model.write(model.read(masked, lengths), lengths, wanted, real.any(1).long())
    kinds = names[tokens].long().masked_fill(torch.arange(CODE) >= lengths[:, None], -100)
    return loss + ops.linear_cross_entropy(model.read(tokens, lengths), tags, kinds)


def experiment(run: Run) -> dict[str, float]:
    """Bits per word without pretraining, with masked words, and with both kinds."""
    task = Task(run)
    index = task.data.words.index
    names = torch.tensor([False] * 2 + [word not in KEYWORDS for word in index] + [False] * 2)
    figures: dict[str, float] = {}
    for name in ("none", "any words", "identifiers too"):
        torch.manual_seed(run.seed)
        model, tags = EncoderDecoder(task.data.words.size), nn.Parameter(torch.zeros(2, 64))

        def pretraining(step: int, name: str = name, model: EncoderDecoder = model, tags: Tensor = tags) -> Tensor:
            code, _ = task.draw()
            if name == "identifiers too" and step % 2:
                return identifiers(run, model, *code, names, tags)
            return any_words(run, model, *code)

        def finetuning(step: int, model: EncoderDecoder = model) -> Tensor:
            return task.describe(model, *task.draw(PAIRS))

        if name != "none":
            run.fit(f"{name}, pretraining", [*model.parameters(), tags], pretraining, 300)
        run.fit(f"{name}, finetuning", model, finetuning, 150)
        figures[name] = task.bits(model)
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """As many steps with either pretraining."""
    return [
        (
            f.above("none", "any words"),
            f"bits per word {f['any words']:.2f} after pretraining on masked words, {f['none']:.2f} without",
        ),
        (
            f.above("any words", "identifiers too"),
            f"{f['identifiers too']:.2f} where every other step masks an identifier and tags them all",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
