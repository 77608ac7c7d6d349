# SPDX-License-Identifier: Apache-2.0
"""Learn ten digits two at a time, and see what is left of the first when the last are learned.

scikit-learn's digits (1797 images of 8 x 8) come in five tasks, 0 and 1, then 2 and 3, up to 8 and 9. Each task is
trained by itself, with no example of another, and after the last one all ten classes are tested at once. Three learn:

  bottleneck   ``pycore.models.memory.BottleneckClassifier``: keys learned from images without classes, then values only
  linear       one linear layer on the pixels
  MLP          two layers

Each is also trained on all classes mixed (i.i.d.), which is what forgetting costs nothing in.

    python examples/class_incremental.py            # table, plot and JSON under examples/out/
    python examples/class_incremental.py --quick    # the same path in seconds, figures without meaning

It needs scikit-learn, whose wheel has the images in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import Parser, Progress, UserError, facts, figure_class, make_folder, run_main, write
from torch import Tensor, nn
from torch.nn import functional

from pycore.models.memory import BottleneckClassifier

NAME = "class_incremental"
CLASSES, PER_TASK, PIXELS = 10, 2, 64
LEARNERS = ("bottleneck", "linear", "MLP")
BATCH_SIZE, LEARNING_RATE, SMOOTHING = 64, 0.3, 0.1  # the paper's, but for batches of 256


def digits() -> tuple[Tensor, Tensor]:
    """The images [1797, 64] from 0 to 1, and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits are scikit-learn's; pip install pycore-kernels[examples]") from error
    pixels, classes = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(classes, dtype=torch.int64)


def split(classes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and a quarter to test on."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    return order[len(order) // 4 :], order[: len(order) // 4]


def learner(name: str, pixels: Tensor, epochs: int) -> nn.Module:
    """An untrained classifier; the bottleneck has seen images by then, but no class."""
    if name == "linear":
        return nn.Linear(PIXELS, CLASSES)
    if name == "MLP":
        return nn.Sequential(nn.Linear(PIXELS, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    model = BottleneckClassifier(PIXELS, CLASSES)
    model.learn_keys(pixels, epochs=epochs)
    return model.eval()


def fit(model: nn.Module, pixels: Tensor, classes: Tensor, epochs: int) -> None:
    """Trains on what is given and nothing else."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(BATCH_SIZE):
            loss = functional.cross_entropy(model(pixels[rows]), classes[rows], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, classes: Tensor) -> float:
    """The share of rows whose largest logit is their class's."""
    return float((model(pixels).max(1).indices == classes).float().mean())


def tasks(classes: Tensor) -> Iterable[Tensor]:
    """Rows of the first two classes, of the next two, and so on."""
    for first in range(0, CLASSES, PER_TASK):
        yield ((classes >= first) & (classes < first + PER_TASK)).nonzero()[:, 0]


def one_seed(seed: int, epochs: int, progress: Progress) -> list[dict[str, Any]]:
    """For each learner: accuracy on the classes seen so far after every task, and of training on all at once."""
    pixels, classes = digits()
    train, test = split(classes, seed)
    x, y, held_x, held_y = pixels[train], classes[train], pixels[test], classes[test]
    rows = []
    for number, name in enumerate(LEARNERS):
        torch.manual_seed(seed)
        model = learner(name, x, epochs)
        so_far = []
        for done, task in enumerate(tasks(y), start=1):
            fit(model, x[task], y[task], epochs)
            seen = held_y < done * PER_TASK
            so_far.append(accuracy(model, held_x[seen], held_y[seen]))
        torch.manual_seed(seed)
        mixed = learner(name, x, epochs)
        fit(mixed, x, y, epochs)
        rows.append({"name": name, "so_far": so_far, "mixed": accuracy(mixed, held_x, held_y)})
        progress.update(len(LEARNERS) * seed + number + 1, name)
    return rows


def summary(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds."""
    result = []
    for rows in zip(*runs, strict=True):
        last, mixed = [row["so_far"][-1] for row in rows], [row["mixed"] for row in rows]
        result.append(
            {
                "name": rows[0]["name"],
                "incremental": mean(last),
                "incremental_spread": stdev(last) if len(last) > 1 else 0.0,
                "mixed": mean(mixed),
                "so_far": [mean(values) for values in zip(*(row["so_far"] for row in rows), strict=True)],
                "each_seed": last,
            }
        )
    return result


def conclusions(rows: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """What the paper claims: values of separate keys are not forgotten, shared weights are."""
    bottleneck, linear, mlp = rows
    drop = bottleneck["mixed"] - bottleneck["incremental"]
    return [
        (abs(drop) < 0.02, f"the bottleneck loses less than 0.02 to training on all at once: {drop:+.3f}"),
        (
            max(linear["incremental"], mlp["incremental"]) < bottleneck["incremental"] / 2,
            f"shared weights keep less than half of it: {linear['incremental']:.3f} linear, "
            f"{mlp['incremental']:.3f} MLP",
        ),
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracies on all ten classes."""
    lines = [f"{'learner':<12}{'two classes at a time':>24}{'all at once':>14}"]
    for row in rows:
        both = f"{row['incremental']:.3f} ± {row['incremental_spread']:.3f}"
        lines.append(f"{row['name']:<12}{both:>24}{row['mixed']:>14.3f}")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy on the classes seen so far, task by task."""
    figure = figure_class()(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = {"bottleneck": ("#1b4f8a", "D"), "linear": ("#d6813a", "o"), "MLP": ("#b2182b", "s")}
    for row in rows:
        color, marker = styles[row["name"]]
        axes.plot(range(1, 6), row["so_far"], color=color, marker=marker, label=f"{row['name']}")
        axes.axhline(row["mixed"], color=color, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(1, 6), ["0–1", "2–3", "4–5", "6–7", "8–9"])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("the task just trained (dotted: trained on all classes at once)")
    axes.set_ylabel("accuracy on all classes seen so far")
    axes.set_title("Digits learned two classes at a time")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    out = Path(__file__).resolve().parent / "out"
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="folder for the plot and the JSON (default: %(default)s)")
    parser.add_argument("--seeds", type=int, help="how often everything is repeated (default: 5)")
    parser.add_argument("--epochs", type=int, help="passes over a task, and over the images for keys (default: 20)")
    parser.add_argument("--quick", action="store_true", help="one short run: only to see that it works")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    options = parser.parse_args(argv)
    options.seeds = (1 if options.quick else 5) if options.seeds is None else options.seeds
    options.epochs = (1 if options.quick else 20) if options.epochs is None else options.epochs
    for name in ("seeds", "epochs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)} and must be at least 1")
    return options


def run(options: argparse.Namespace) -> int:
    """The whole experiment; returns the exit status."""
    if not options.no_plot:
        figure_class()
    make_folder(options.out)
    progress = Progress("training", options.seeds * len(LEARNERS))
    rows = summary([one_seed(seed, options.epochs, progress) for seed in range(options.seeds)])
    checks = conclusions(rows)
    result = {
        "name": NAME,
        "quick": options.quick,
        **facts(),
        "seeds": options.seeds,
        "epochs": options.epochs,
        "rows": rows,
        "checks": [{"holds": holds, "claim": claim} for holds, claim in checks],
    }
    print(table(rows))
    stem = options.out / (f"{NAME}_quick" if options.quick else NAME)
    write(result, stem, None if options.no_plot else lambda path: plot(rows, path))
    for holds, claim in checks:
        print(f"{'yes' if holds else 'NO':>4}  {claim}")
    if options.quick:
        print("--quick: hardly trained, so these figures mean nothing")
        return 0
    return 0 if all(holds for holds, _ in checks) else 1


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_main(NAME, lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
