# SPDX-License-Identifier: Apache-2.0
"""Wu et al., "CoRe: Context-Regularized Text Embedding Learning for Text-to-Image Personalization" (arXiv 2408.15914).

A new word is learned from pictures; the encoder's outputs for the words around it, in texts without pictures, are held
to those that they have around known words.
"""

import torch
from concepts import NAME, SETTING, STYLES, Studio
from paper import Figures, Paper, Run, main
from torch import Tensor

PAPER = Paper(
    9,
    "CoRe: Context-Regularized Text Embedding Learning for Text-to-Image Personalization",
    "holding the text encoder's outputs for the context of a new word to what they are around known ones keeps pictures"
    " true to the text, and the new concept recognisable",
    SETTING,
)


def experiment(run: Run) -> dict[str, float]:
    """Textual inversion with the regularization and without."""
    studio, figures = Studio(run), {}
    model = studio.model

    def context(words: Tensor, name: Tensor) -> Tensor:
        """Squared distance of the outputs beside the name, over random styles, from their mean over known names."""
        texts = studio.texts(run.integers(len(STYLES), 16), torch.full((16,), studio.new))
        with torch.no_grad():
            known = model.outputs(texts.repeat(len(studio.known), 1)[:, :1].new_tensor(
                [[*row[:1], NAME + digit, *row[2:]] for digit in studio.known.tolist() for row in texts.tolist()]
            )).unflatten(0, (len(studio.known), 16)).mean(0)  # fmt: skip
        keep = [0, 2, 3, 4]
        return (model.outputs(texts, name)[:, keep] - known[:, keep]).square().mean()

    for label, more in (("inversion", None), ("with context", context)):
        name = studio.learn(label, more)
        judged = studio.judge(lambda words, name=name: model.outputs(words, name))
        figures.update({f"{label}, {what}": value for what, value in judged.items()})
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The style that was asked for, and the digit."""
    return [
        (
            f["with context, style"] > f["inversion, style"] + 0.02,
            f"pictures in the wanted style {f['with context, style']:.2f} with the regularization, "
            f"{f['inversion, style']:.2f} without",
        ),
        (
            f["with context, both"] > f["inversion, both"],
            f"the new digit in it {f['with context, both']:.2f} and {f['inversion, both']:.2f}; the digit in any style "
            f"{f['with context, digit']:.2f} and {f['inversion, digit']:.2f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
