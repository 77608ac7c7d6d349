# SPDX-License-Identifier: Apache-2.0
"""Schwartz et al., "Discriminative Class Tokens for Text-to-Image Diffusion Models" (arXiv 2303.17155).

A generator of digits is given a text that says only of what kind one is. The embedding of one more word is searched
with a classifier's gradient through the generator; what came out is judged by the nearest real picture
(`pycore.ops.pairwise_topk`).
"""

import torch
from paper import Figures, Paper, Run, main
from pictures import DIM, PIXELS, SHAPE, Generator, Pictures, Stack
from torch import Tensor, nn

from pycore import ops
from pycore.models.transformer import Transformer, mean_pool
from pycore.schedules import Full

PAPER = Paper(
    46,
    "Discriminative Class Tokens for Text-to-Image Diffusion Models",
    "changing the embedding of one input token by a classifier's signal makes a generator's ambiguous text give the"
    " wanted class, with images as varied as before and nothing of the generator retrained",
    "handwritten digits of 8 by 8; captions say even or odd, small or large, and half of them the digit's name; a"
    " rectified flow of 3 layers is given a text without the name; the token behind it is searched for 120 steps for"
    " each class; judged by the nearest of 597 held-out digits",
)
EVEN, SMALL, PICTURE, NAME = 0, 2, 4, 5  # odd is 1, large 3; ten names
COUNT = 64


def caption(labels: Tensor, named: Tensor | bool = False) -> Tensor:
    """[n, 3]: two words, which two or three digits share, and the name or a word that says nothing."""
    third = torch.where(torch.as_tensor(named), NAME + labels, PICTURE)
    return torch.stack([EVEN + labels % 2, SMALL + (labels > 4).long(), third], 1)


class Model(nn.Module):
    """Words to a condition, and from there to a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.paint = Transformer(SHAPE, vocabulary=NAME + 10), Generator()

    def condition(self, words: Tensor, token: Tensor | None = None) -> Tensor:
        """[n, DIM]; a token's embedding stands in the last word's place."""
        states = self.text.embed(words)
        if token is not None:
            states = torch.cat([states[:, :-1], token.expand(len(words), 1, DIM)], 1)
        return mean_pool(self.text(states, schedule=Full(), embedded=True)) * DIM**0.5


def spread(images: Tensor) -> float:
    """Mean distance of an image from the mean of all."""
    return (images - images.mean(0)).square().sum(1).sqrt().mean().item()


def experiment(run: Run) -> dict[str, float]:
    """Every digit once as the wanted one."""
    pictures, model, guide = Pictures(run), Model(), Stack(PIXELS, 96, 32)
    centers = nn.Parameter(run.normal(10, 32) * 0.1)

    def paint(step: int) -> Tensor:
        images, labels = pictures.batch(128)
        return model.paint.loss(images, model.condition(caption(labels, run.uniform(128) < 0.5)), run)

    def classify(step: int) -> Tensor:
        images, labels = pictures.batch(128)
        noisy = images + 0.2 * run.normal(*images.shape)
        return ops.linear_cross_entropy(guide(noisy), centers, labels)

    run.fit("generator", model, paint, 2500)
    run.fit("classifier", [*guide.parameters(), centers], classify, 300)
    model.requires_grad_(False)
    guide.requires_grad_(False)
    right: dict[str, list[float]] = {"text alone": [], "with the token": []}
    varied: dict[str, list[float]] = {"text alone": [], "with the token": [], "real": []}
    for digit in range(10):
        words = caption(torch.full((COUNT,), digit))
        token = nn.Parameter(model.text.embedding[PICTURE].clone())

        def search(step: int, words: Tensor = words, token: Tensor = token, digit: int = digit) -> Tensor:
            made = model.paint(run.normal(COUNT, PIXELS), model.condition(words, token))
            return ops.linear_cross_entropy(guide(made), centers.detach(), torch.full((COUNT,), digit))

        run.fit(f"a token for {digit}", [token], search, 120, learning_rate=1e-2, weight_decay=0.0)
        noise = run.normal(COUNT, PIXELS)
        with torch.no_grad():
            for name, given in (("text alone", None), ("with the token", token)):
                made = model.paint(noise, model.condition(words, given))
                right[name].append((pictures.judge(made) == digit).double().mean().item())
                varied[name].append(spread(made))
        varied["real"].append(spread(pictures.held_images[pictures.held_labels == digit]))
    figures = {f"right, {name}": sum(row) / 10 for name, row in right.items()}
    return figures | {f"spread, {name}": sum(row) / 10 for name, row in varied.items()}


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The wanted class, and not one picture of it."""
    return [
        (
            f.above("right, with the token", "right, text alone", 0.2),
            f"pictures of the wanted digit: {f['right, with the token']:.2f} with its token, "
            f"{f['right, text alone']:.2f} by the text alone",
        ),
        (
            f["spread, with the token"] > 0.8 * f["spread, real"],
            f"spread {f['spread, with the token']:.2f} with the token, {f['spread, real']:.2f} of real pictures of one "
            f"digit, {f['spread, text alone']:.2f} by the text alone",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
