# SPDX-License-Identifier: Apache-2.0
"""Agarwal et al., "AlignIT: Enhancing Prompt Alignment in Customization of Text-to-Image Models" (arXiv 2406.18893).

A new word is learned from pictures. When it is used, only its own output of the text encoder goes to the generator; all
others are those of the text with a known word in its place.
"""

import torch
from concepts import NAME, SETTING, Studio
from paper import Figures, Paper, Run, main
from torch import Tensor

PAPER = Paper(
    27,
    "AlignIT: Enhancing Prompt Alignment in Customization of Text-to-Image Models",
    "a customized word changes what the encoder makes of the words around it; taking those outputs from the text"
    " without it, and only the concept's own from the one with it, aligns pictures with the text and keeps the concept",
    SETTING,
)


def experiment(run: Run) -> dict[str, float]:
    """One learned word, read in two ways."""
    studio = Studio(run)
    model, name = studio.model, studio.learn("inversion")

    def infused(words: Tensor) -> Tensor:
        """The new word's own output, among those beside a known digit's name."""
        known = torch.cat([words[:, :1], NAME + studio.known[:1].expand(len(words), 1), words[:, 2:]], 1)
        return torch.cat(
            [model.outputs(known)[:, :1], model.outputs(words, name)[:, 1:2], model.outputs(known)[:, 2:]], 1
        )

    with torch.no_grad():
        texts = studio.texts(torch.zeros(64, dtype=torch.int64), torch.full((64,), studio.new))
        other = model.outputs(texts, model.text.embedding[NAME + studio.known[1]])
        with_new, with_known = model.outputs(texts, name), infused(texts)
        keep = [0, 2, 3, 4]
        moved = [(x[:, keep] - with_known[:, keep]).square().mean().sqrt().item() for x in (with_new, other)]
    figures = {"outputs moved by the new word": moved[0], "outputs moved by a known one": moved[1]}
    for label, way in (("inversion", lambda words: model.outputs(words, name)), ("aligned", infused)):
        figures.update({f"{label}, {what}": value for what, value in studio.judge(way).items()})
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The observation, and the remedy."""
    return [
        (
            f.above("outputs moved by the new word", "outputs moved by a known one"),
            f"the learned word moves its neighbours' outputs by {f['outputs moved by the new word']:.2f}, another "
            f"known one by {f['outputs moved by a known one']:.2f}",
        ),
        (
            f["aligned, style"] > f["inversion, style"] + 0.02,
            f"pictures in the wanted style {f['aligned, style']:.2f} aligned, {f['inversion, style']:.2f} as learned",
        ),
        (
            f["aligned, both"] > f["inversion, both"],
            f"the new digit in it {f['aligned, both']:.2f} and {f['inversion, both']:.2f}; the digit in any style "
            f"{f['aligned, digit']:.2f} and {f['inversion, digit']:.2f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
