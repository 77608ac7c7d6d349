# SPDX-License-Identifier: Apache-2.0
"""Wang et al., "CodeT5+: Open Code Large Language Models for Code Understanding and Generation" (arXiv 2305.07922).

One encoder-decoder is pretrained by span denoising alone, or by a mixture: denoising, causal modelling, contrast of
functions and docstrings (`pycore.ops.contrastive_loss`). Then its parts are used apart and together.
"""

import torch
from code_pairs import CODE, COUNT, EncoderDecoder, Task
from paper import Figures, Paper, Run, main
from retrieval import reciprocal_rank
from torch import Tensor

from pycore import ops
from pycore.models.transformer import mean_pool

PAPER = Paper(
    30,
    "CodeT5+: Open Code Large Language Models for Code Understanding and Generation",
    "a mixture of pretraining objectives serves retrieval, where denoising alone does not, and costs generation"
    " nothing",
    "functions of the standard library in words; encoder and decoder of a block of width 64 with T5's bias; 450 steps"
    " of pretraining; one of 500 functions by its docstring, without finetuning (mean reciprocal rank); bits per word"
    " of docstrings after 100 steps of finetuning on 800 functions",
)
SPAN, PAIRS = 6, 800


def denoising(run: Run, model: EncoderDecoder, tokens: Tensor, lengths: Tensor) -> Tensor:
    """A span becomes masks, and the decoder writes it."""
    start = (run.uniform(COUNT) * (lengths - SPAN).clamp(min=1)).long()[:, None]
    places = (start + torch.arange(SPAN)).clamp(max=CODE - 1)
    masked = tokens.scatter(1, places, model.mask)
    return model.write(
        model.read(masked, lengths), lengths, tokens.gather(1, places), (lengths - start[:, 0]).clamp(0, SPAN)
    )


def causal(run: Run, model: EncoderDecoder, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The decoder writes the second half behind the first."""
    half = CODE // 2
    return model.write(
        model.read(tokens[:, :half], lengths.clamp(max=half)), lengths.clamp(max=half), tokens[:, half:],
        (lengths - half).clamp(min=0),
    )  # fmt: skip


def vectors(model: EncoderDecoder, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The encoder alone, [n, dim]."""
    return mean_pool(model.read(tokens, lengths), lengths)


def experiment(run: Run) -> dict[str, float]:
    """Retrieval by the encoder, and generation by both."""
    task, figures = Task(run), {}
    for name in ("denoising", "mixture"):
        torch.manual_seed(run.seed)
        model = EncoderDecoder(task.data.words.size)

        def pretraining(step: int, name: str = name, model: EncoderDecoder = model) -> Tensor:
            code, sentence = task.draw()
            if name == "denoising" or step % 3 == 0:
                return denoising(run, model, *code)
            if step % 3 == 1:
                return causal(run, model, *code)
            return ops.contrastive_loss(vectors(model, *sentence), vectors(model, *code), scale=15.0)

        def finetuning(step: int, model: EncoderDecoder = model) -> Tensor:
            return task.describe(model, *task.draw(PAIRS))

        run.fit(f"{name}, pretraining", model, pretraining, 450)
        with torch.no_grad():
            code, sentence = (vectors(model, *side) for side in task.tests)
        figures[f"{name}, rank"] = reciprocal_rank(sentence, code)
        run.fit(f"{name}, finetuning", model, finetuning, 100)
        figures[f"{name}, bits"] = task.bits(model)
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """A third of the mixture's steps are denoising."""
    return [
        (
            f.above("mixture, rank", "denoising, rank", 0.02),
            f"mean reciprocal rank {f['mixture, rank']:.3f} after the mixture, {f['denoising, rank']:.3f} after "
            "denoising alone",
        ),
        (
            f["mixture, bits"] < f["denoising, bits"] + 0.05,
            f"bits per word {f['mixture, bits']:.2f} and {f['denoising, bits']:.2f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
