# SPDX-License-Identifier: Apache-2.0
"""Digits told apart by their distances from prototypes, which a decoder shows (Li et al., AAAI 2018).

An autoencoder gives a digit a code, `PrototypeLayer` classes by the code's distances from learned prototypes. R1 draws
every prototype to some code, R2 every code to some prototype, so that what the decoder makes of a prototype is a digit.
Without them the accuracy is the same and the pictures show nothing.

    python examples/prototypes.py            # accuracy with and without R1 and R2, pictures
    python examples/prototypes.py --quick
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from common import Parser, Progress, UserError, facts, figure_class, make_folder, run_main, write
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.nn import PrototypeLayer

ROOT = Path(__file__).resolve().parents[1]
CHANNELS, PROTOTYPES = 10, 15
SHADES = " .:-=+*#%@"


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 64] of 0 to 1 and labels, to train on and held out (every fifth)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits are scikit-learn's; pip install pycore-kernels[examples]") from error
    data = load_digits()
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    held = torch.arange(len(labels)) % 5 == 0
    return images[~held], labels[~held], images[held], labels[held]


class Network(nn.Module):
    """An autoencoder with a prototype layer on its codes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CHANNELS))
        self.decoder = nn.Sequential(nn.Linear(CHANNELS, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
        self.layer = PrototypeLayer(CHANNELS, PROTOTYPES, 10)


def train(images: Tensor, labels: Tensor, steps: int, weight: float, seed: int) -> Network:
    """Trains with R1 and R2 of this weight."""
    torch.manual_seed(seed)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    progress = Progress(f"weight {weight:g}", steps)
    for step in range(steps):
        rows = torch.randint(len(labels), (128,), generator=generator)
        codes = network.encoder(images[rows])
        r1, r2 = network.layer.losses(codes)
        loss = functional.cross_entropy(network.layer(codes), labels[rows])
        loss = loss + functional.mse_loss(network.decoder(codes), images[rows]) * 5 + weight * (r1 + r2)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress.update(step + 1, f"loss {loss.item():.3f}")
    return network


@torch.no_grad()
def measure(network: Network, images: Tensor, labels: Tensor, seen: Tensor) -> dict[str, Any]:
    """Accuracy; how far a prototype's picture is from the nearest image; the pictures."""
    right = (network.layer(network.encoder(images)).argmax(-1) == labels).double().mean().item()
    pictures = network.decoder(network.layer.prototypes)
    distances, _ = ops.pairwise_min(pictures, seen)
    return {
        "accuracy": right, "distance_to_nearest_image": distances.mean().item(), "prototypes": pictures.tolist(),
    }  # fmt: skip


def as_text(pictures: list[list[float]]) -> str:
    """Rows of pictures in characters, five beside each other."""
    lines = []
    for first in range(0, len(pictures), 5):
        for row in range(8):
            parts = [picture[8 * row : 8 * row + 8] for picture in pictures[first : first + 5]]
            lines.append("   ".join("".join(2 * SHADES[min(9, int(10 * x))] for x in part) for part in parts).rstrip())
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A row of pictures for each weight."""
    figure = figure_class()(figsize=(PROTOTYPES * 0.7, len(rows)))
    axes = figure.subplots(len(rows), PROTOTYPES, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, picture in zip(line, row["prototypes"], strict=True):
            axis.imshow(torch.tensor(picture).reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
            axis.set_axis_off()
        line[0].set_title(row["name"], fontsize=8, loc="left")
    figure.savefig(path, dpi=150)


def run(options: argparse.Namespace) -> int:
    """Trains both, prints accuracy and pictures, stores them."""
    make_folder(options.out)
    if not options.no_plot:
        figure_class()
    images, labels, held_images, held_labels = digits()
    steps = options.steps or (30 if options.quick else 4000)
    rows = []
    for name, weight in (("with R1 and R2", 0.05), ("without", 0.0)):
        network = train(images, labels, steps, weight, options.seed)
        rows.append({"name": name, "weight": weight, **measure(network, held_images, held_labels, images)})
    for row in rows:
        print(
            f"{row['name']}: accuracy {row['accuracy']:.3f}, a prototype's picture is "
            f"{row['distance_to_nearest_image']:.2f} from the nearest image\n\n{as_text(row['prototypes'])}"
        )
    stem = options.out / ("prototypes_quick" if options.quick else "prototypes")
    result = {"quick": options.quick, **facts(), "steps": steps, "rows": rows}
    write(result, stem, None if options.no_plot else lambda path: plot(rows, path))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = Parser(prog="prototypes", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--steps", type=int, help="4000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "out", help="folder for results")
    options = parser.parse_args(arguments)
    return run_main("prototypes", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
