# SPDX-License-Identifier: Apache-2.0
"""Zhang et al., "Long-CLIP: Unlocking the Long-Text Capability of CLIP" (arXiv 2403.15378).

A dual encoder has learned from short texts; its table of positions is stretched and it is shown long ones for a while
(`pycore.ops.contrastive_loss`).
"""

import copy
import math

import torch
from paper import Figures, Paper, Run, main
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer, mean_pool, nearest_accuracy
from pycore.nn.linear import Projection
from pycore.schedules import Full

PAPER = Paper(
    23,
    "Long-CLIP: Unlocking the Long-Text Capability of CLIP",
    "keeping the first positions and stretching only the others before a short finetuning on long texts, with short"
    " ones beside them, unlocks long texts and keeps what short ones could do; stretching all positions loses some",
    "made-up images of 16 places with one of 12 things each; a text names things by place: where it stands says which"
    " place is meant; short texts name the first 5, long ones 16; a table of 8 rows becomes 17 (first 5 kept, others"
    " times 4); 64 of 500 images, retrieved by text",
)
PLACES, THINGS, SHORT, ROWS, KEPT = 16, 12, 5, 8, 5
SHAPE = BytelmConfig(layers=1, dim=64, heads=4, kv_heads=4, position="none")


class Model(nn.Module):
    """Encoders of images, a thing for each place, and of texts of things."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.ModuleList([Projection(PLACES * THINGS, 128, bias=True), Projection(128, SHAPE.dim)])
        self.text = Transformer(SHAPE, vocabulary=THINGS, absolute=ROWS)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def see(self, things: Tensor) -> Tensor:
        """[n, PLACES] to [n, dim] of length 1."""
        pixels = functional.one_hot(things, THINGS).float().flatten(1)
        return functional.normalize(self.image[1](self.image[0](pixels).relu()), dim=-1)

    def read(self, things: Tensor) -> Tensor:
        """Texts, as far as the table reaches."""
        return mean_pool(self.text(things[:, : len(self.text.absolute)], schedule=Full()))

    def loss(self, things: Tensor, length: int) -> Tensor:
        """Of texts of so many words."""
        scale = self.log_scale.exp().clamp(max=100.0)
        return ops.contrastive_loss(self.see(things), self.read(things[:, :length]), scale=scale)


def stretched(table: Tensor, kept: int, factor: int) -> Tensor:
    """The first `kept` rows, and `factor` for every later one, between their neighbours."""
    rest = table[kept:].T[None]
    longer = functional.interpolate(rest, size=rest.shape[-1] * factor, mode="linear", align_corners=True)
    return torch.cat([table[:kept], longer[0].T])


def judge(run: Run, model: Model) -> dict[str, float]:
    """How often the right one of 500 images is the first, by its short text and by its long one."""
    things = run.integers(THINGS, run.pick(500, 50), PLACES)
    with torch.no_grad():
        images = model.see(things)
        return {
            "short": nearest_accuracy(model.read(things[:, :SHORT]), images),
            "long": nearest_accuracy(model.read(things), images),
        }


def experiment(run: Run) -> dict[str, float]:
    """The model as it was, and after two ways of stretching with the same finetuning."""
    first = Model()
    run.fit("short texts", first, lambda step: first.loss(run.integers(THINGS, 96, PLACES), SHORT), 600)
    figures = {f"as trained, {name}": value for name, value in judge(run, first).items()}
    for label, kept, factor in (("first kept", KEPT, 4), ("all stretched", 0, 2)):
        model = copy.deepcopy(first)
        model.text.absolute = nn.Parameter(stretched(first.text.absolute.data, kept, factor))

        def loss(step: int, model: Model = model) -> Tensor:
            things = run.integers(THINGS, 96, PLACES)
            return model.loss(things, PLACES) + model.loss(things, SHORT)

        figures.update({f"{label}, not finetuned, {name}": value for name, value in judge(run, model).items()})
        run.fit(label, model, loss, 150, learning_rate=1e-3)
        figures.update({f"{label}, {name}": value for name, value in judge(run, model).items()})
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Two places, two ways."""
    untouched = "first kept, not finetuned, short"
    return [
        (
            f.above("first kept, long", "as trained, long") and f["first kept, short"] > f["as trained, short"] - 0.03,
            f"long texts find {f['first kept, long']:.3f} (as trained {f['as trained, long']:.3f}), short ones "
            f"{f['first kept, short']:.3f} (as trained {f['as trained, short']:.3f})",
        ),
        (
            f.above(untouched, "all stretched, not finetuned, short"),
            f"before finetuning, short texts find {f[untouched]:.3f} where the first positions are kept, "
            f"{f['all stretched, not finetuned, short']:.3f} where all are stretched",
        ),
        (
            f["first kept, short"] >= f["all stretched, short"] and f["first kept, long"] >= f["all stretched, long"],
            f"after it, all stretched: long {f['all stretched, long']:.3f}, short {f['all stretched, short']:.3f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
