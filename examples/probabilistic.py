# SPDX-License-Identifier: Apache-2.0
"""How much text quality does a share of the attention blocks keep? And how much does a window of the same cost?

A ``pycore.models.bytelm`` is trained on the standard library's source with dense causal attention over 512 bytes. Then
held-out text is read with probabilistic attention (``pycore.schedules.Probabilistic``), where each block of 16 keys
takes part with some probability, anew in every layer and round, with one sink token and without; and, at the same
number of kept pairs, with a window of the newest bytes, with the sink and without.

    python examples/probabilistic.py            # table, plot and JSON under examples/out/
    python examples/probabilistic.py --quick    # the same path in seconds, figures without meaning

What it shows, said plainly: a model that was trained densely loses quality with every block that is left out, more
without a sink than with one, and the more the fewer are drawn. Where the useful context is near, as in source text, a
window of the same cost is far better.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import Parser, Progress, UserError, facts, figure_class, make_folder, read_corpus, run_main, write
from length_extrapolation import Training, trained_model
from torch import Tensor
from torch.nn import functional

from pycore.models.bytelm import BOS, Bytelm
from pycore.schedules import Causal, Constant, Lambda, Probabilistic, Schedule, expected_density

NAME = "probabilistic"
LENGTH, BLOCK_SIZE = 512, 16
PROBABILITIES = (0.9, 0.75, 0.5, 0.25, 0.1)
ROUNDS = 3
READINGS = ("drawn, sink", "drawn", "window, sink", "window")


def kept_share(window: int) -> float:
    """The share of the causal pairs of LENGTH tokens that a window keeps."""
    return sum(min(i + 1, window) for i in range(LENGTH)) / (LENGTH * (LENGTH + 1) / 2)


def window_of(share: float) -> int:
    """The smallest window that keeps at least this share of the pairs."""
    return next(window for window in range(1, LENGTH + 1) if kept_share(window) >= share)


def schedules(reading: str, probability: float, share: float) -> list[Schedule]:
    """What is averaged for one point: rounds of drawn blocks, or one window."""
    sink = 1 if reading.endswith("sink") else 0
    if reading.startswith("window"):
        return [Lambda(sink, window_of(share))]
    probs = Constant(probability)
    return [Probabilistic(probs, 0, round, block_size=BLOCK_SIZE, sink_size=sink) for round in range(ROUNDS)]


@torch.no_grad()
def bits_per_byte(model: Bytelm, windows: Tensor, schedule: Schedule) -> float:
    """Of held-out windows [n, LENGTH], true distances throughout."""
    total = 0.0
    for target in windows.split(8):
        tokens = torch.cat([torch.full((len(target), 1), BOS), target[:, :-1]], dim=1)
        logits = model(tokens, schedule=schedule, distance_limit=LENGTH)
        total += functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
    return total / math.log(2) / windows.numel()


def evaluate(model: Bytelm, windows: Tensor) -> tuple[float, list[dict[str, Any]]]:
    """Dense bits per byte, and a row for each reading with a point for each of PROBABILITIES."""
    dense = bits_per_byte(model, windows, Causal())
    shares = [expected_density(Constant(p), blocks=LENGTH // BLOCK_SIZE) for p in PROBABILITIES]
    progress = Progress("evaluation", len(READINGS) * len(PROBABILITIES))
    rows: list[dict[str, Any]] = []
    for reading in READINGS:
        bits = []
        for probability, share in zip(PROBABILITIES, shares, strict=True):
            every = [bits_per_byte(model, windows, x) for x in schedules(reading, probability, share)]
            bits.append(sum(every) / len(every))
            progress.update(len(rows) * len(PROBABILITIES) + len(bits), reading)
        rows.append({"name": reading, "density": shares, "bits_per_byte": bits})
    return dense, rows


def conclusions(dense: float, rows: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """What is claimed, at every density; the figures are those of the middle one."""
    bits = {row["name"]: row["bits_per_byte"] for row in rows}
    drawn, bare, window = bits["drawn, sink"], bits["drawn"], bits["window, sink"]
    at = PROBABILITIES.index(0.5)
    return [
        (drawn[at] < 1.15 * dense, f"half the blocks and a sink cost less than 15 %: {dense:.3f} to {drawn[at]:.3f}"),
        (all(a > b for a, b in zip(bare, drawn, strict=True)), f"without the sink they cost more: {bare[at]:.3f}"),
        (
            all(a < b for a, b in zip(window, drawn, strict=True)),
            f"a window of the same cost is better: {window[at]:.3f}",
        ),
    ]


def table(dense: float, rows: list[dict[str, Any]]) -> str:
    """The rows as text, bits per byte by density."""
    heads = "".join(f"{share:>9.0%}" for share in rows[0]["density"])
    lines = [f"{'share of blocks':<16}{heads}   (all: {dense:.3f} bits per byte)"]
    lines += [f"{row['name']:<16}" + "".join(f"{bits:>9.3f}" for bits in row["bits_per_byte"]) for row in rows]
    return "\n".join(lines)


def plot(dense: float, rows: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte against density, one line for each reading."""
    figure = figure_class()(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = {
        "drawn, sink": ("#1b4f8a", "D", "-"),
        "drawn": ("#b2182b", "o", "-"),
        "window, sink": ("#2f7d4f", "^", "--"),
        "window": ("#7f7f7f", "s", "--"),
    }
    for row in rows:
        color, marker, line = styles[row["name"]]
        axes.plot(row["density"], row["bits_per_byte"], color=color, marker=marker, linestyle=line, label=row["name"])
    axes.axhline(dense, color="black", linewidth=0.8, linestyle=":")
    axes.text(0.0, dense, " dense", transform=axes.get_yaxis_transform(), va="bottom", fontsize=9)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.1 * max(max(row["bits_per_byte"]) for row in rows))
    axes.set_xlabel("share of the causal pairs that takes part")
    axes.set_ylabel("bits per byte, lower is better")
    axes.set_title("Reading held-out source text with part of the attention")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    out = Path(__file__).resolve().parent / "out"
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="folder for the plot and the JSON (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps (default: 1500)")
    parser.add_argument("--windows", type=int, help="texts of 512 bytes to evaluate on (default: 64)")
    parser.add_argument("--quick", action="store_true", help="a few steps, one text: only to see that it runs")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    options = parser.parse_args(argv)
    options.steps = (2 if options.quick else 1500) if options.steps is None else options.steps
    options.windows = (1 if options.quick else 64) if options.windows is None else options.windows
    for name in ("steps", "windows"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)} and must be at least 1")
    return options


def run(options: argparse.Namespace) -> int:
    """The whole experiment; returns the exit status."""
    if not options.no_plot:
        figure_class()
    make_folder(options.out)
    text, held_out, fingerprint = read_corpus()
    unseen = b"".join(held_out)
    if options.windows > len(unseen) // LENGTH:
        raise UserError(f"--windows is {options.windows} and must be at most {len(unseen) // LENGTH}")
    stride = len(unseen) // options.windows
    pieces = b"".join(unseen[i * stride : i * stride + LENGTH] for i in range(options.windows))
    windows = torch.frombuffer(bytearray(pieces), dtype=torch.uint8).view(-1, LENGTH).long()
    training = Training(steps=options.steps, seed=0, batch=4, length=LENGTH)
    checkpoint = options.out / ("bytelm_512_quick.pt" if options.quick else "bytelm_512.pt")
    model, trained = trained_model(checkpoint, text, fingerprint, training)
    dense, rows = evaluate(model.eval(), windows)
    checks = conclusions(dense, rows)
    held = all(holds for holds, _ in checks)
    result = {
        "name": NAME,
        "quick": options.quick,
        **facts(),
        "training": {**asdict(training), **trained},
        "length": LENGTH,
        "block_size": BLOCK_SIZE,
        "rounds": ROUNDS,
        "windows": options.windows,
        "dense": dense,
        "rows": rows,
        "checks": [{"holds": holds, "claim": claim} for holds, claim in checks],
    }
    print(table(dense, rows))
    stem = options.out / (f"{NAME}_quick" if options.quick else NAME)
    write(result, stem, None if options.no_plot else lambda path: plot(dense, rows, path))
    for holds, claim in checks:
        print(f"{'yes' if holds else 'NO':>4}  {claim}")
    if options.quick:
        print("--quick: the model is hardly trained, so these figures mean nothing")
        return 0
    return 0 if held else 1


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_main(NAME, lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
