# SPDX-License-Identifier: Apache-2.0
"""Which way to tell positions generalises in length? Train on short strings, test on longer ones, five ways.

The task is to copy: a string of letters, ``=``, and the string again. A ``pycore.models.bytelm`` with each position
scheme (none, ALiBi, T5's buckets, RoPE, and RoPE with a harmonic penalty) is trained from the same seed on strings of
up to 20 letters and asked for strings of up to 60; counted is the share of letters it gets right after ``=``, given the
right ones before. The same weights of RoPE are also read with distances limited to those seen in training, which is
the limit of LM-Infinite without its mask.

    python examples/positions.py            # table, plot and JSON under examples/out/
    python examples/positions.py --quick    # the same path in seconds, figures without meaning

After Kazemnejad et al., "The Impact of Positional Encoding on Length Generalization in Transformers" (arXiv
2305.19466), who find on tasks of this kind that no position encoding at all often generalises best.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import Parser, Progress, facts, figure_class, make_folder, run_main, write
from torch import Tensor

from pycore.models.bytelm import BOS, Bytelm, BytelmConfig

NAME = "positions"
SCHEMES = ("none", "alibi", "t5", "rope", "harmonic")
TRAIN_LENGTH = 20
LENGTHS = (5, 10, 15, 20, 25, 30, 40, 50, 60)
BATCH = 64
LIMITED = "rope, limited"


def strings(length: int, count: int, generator: torch.Generator) -> Tensor:
    """BOS, random letters, =, the same letters: int64 [count, 2 length + 2]."""
    letters = torch.randint(ord("a"), ord("z") + 1, (count, length), generator=generator)
    column = torch.full((count, 1), BOS)
    return torch.cat([column, letters, torch.full_like(column, ord("=")), letters], dim=1)


def train(scheme: str, steps: int, seed: int) -> Bytelm:
    """A model that has seen `steps` batches, each of strings of one length up to TRAIN_LENGTH."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Bytelm(BytelmConfig(layers=2, dim=96, heads=6, kv_heads=6, position=scheme, max_distance=256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    progress = Progress(scheme, steps)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        length = int(torch.randint(1, TRAIN_LENGTH + 1, (), generator=generator))
        tokens = strings(length, BATCH, generator)
        targets = tokens[:, 1:].clone()
        targets[:, :-length] = -100  # only the copy is learned
        loss = model.loss(tokens[:, :-1], targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress.update(step + 1, f"loss {loss.item():.3f}")
    return model.eval()


@torch.no_grad()
def accuracy(model: Bytelm, length: int, count: int, limit: int | None) -> float:
    """The share of letters after = that the model finds most likely, given the right ones before."""
    tokens = strings(length, count, torch.Generator().manual_seed(length))
    logits = model(tokens[:, :-1], distance_limit=limit)[:, -length:]
    return (logits.argmax(-1) == tokens[:, -length:]).double().mean().item()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'letters copied':<16}" + "".join(f"{length:>7}" for length in LENGTHS)]
    lines += [f"{row['name']:<16}" + "".join(f"{share:>7.0%}" for share in row["accuracy"]) for row in rows]
    return "\n".join(lines)


def checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the paper says of lengths beyond training, and whether it holds of these rows (of one seed)."""
    found = {row["name"]: row["accuracy"] for row in rows}
    longer = [i for i, length in enumerate(LENGTHS) if length > TRAIN_LENGTH]
    trained, last = LENGTHS.index(TRAIN_LENGTH), f"{LENGTHS[-1]} letters"

    def above(name: str) -> bool:
        return all(found["none"][i] > found[name][i] for i in longer)

    others = ", ".join(f"{name} {found[name][-1]:.2f}" for name in SCHEMES[1:])
    rope = found["rope"]
    return [
        {
            "claim": f"no positions at all generalise best: {found['none'][-1]:.2f} of {last} are right (one seed), "
            f"with {others}",
            "holds": all(map(above, SCHEMES[1:])),
        },
        {
            "claim": f"they are better than RoPE at every longer length: {found['none'][longer[0]]:.2f} and "
            f"{rope[longer[0]]:.2f} of {LENGTHS[longer[0]]} letters, {found['none'][-1]:.2f} and "
            f"{rope[-1]:.2f} of {last}",
            "holds": above("rope"),
        },
        {
            "claim": f"RoPE keeps less than half: {rope[trained]:.2f} of {TRAIN_LENGTH} letters, {rope[-1]:.2f} of "
            f"{last}",
            "holds": rope[-1] < rope[trained] / 2,
        },
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against length, one line a scheme."""
    figure = figure_class()(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    colors = {
        "none": "#7f7f7f", "alibi": "#d6813a", "t5": "#2f7d4f", "rope": "#b2182b", LIMITED: "#d98a94",
        "harmonic": "#1b4f8a",
    }  # fmt: skip
    for row in rows:
        line = "--" if row["name"] == LIMITED else "-"
        axes.plot(LENGTHS, row["accuracy"], marker="o", color=colors[row["name"]], linestyle=line, label=row["name"])
    axes.axvline(TRAIN_LENGTH, color="black", linewidth=0.8, linestyle=":")
    axes.text(TRAIN_LENGTH, 0.01, " trained up to here", transform=axes.get_xaxis_transform(), va="bottom", fontsize=9)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("letters to copy")
    axes.set_ylabel("share of letters right")
    axes.set_title("Copying strings longer than those of training")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(title="positions", frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=150)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    out = Path(__file__).resolve().parent / "out"
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="folder for the plot and the JSON (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps for each scheme (default: 2500)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the training strings")
    parser.add_argument("--quick", action="store_true", help="a few steps: only to see that it runs")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    options = parser.parse_args(argv)
    options.steps = (3 if options.quick else 2500) if options.steps is None else options.steps
    if options.steps < 1:
        parser.error(f"--steps is {options.steps} and must be at least 1")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed is {options.seed} and must be in 0..2^63-1")
    return options


def run(options: argparse.Namespace) -> int:
    """The whole experiment; returns the exit status."""
    if not options.no_plot:
        figure_class()
    make_folder(options.out)
    count = 8 if options.quick else 256
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    for scheme in SCHEMES:
        model = train(scheme, options.steps, options.seed)
        readings = {scheme: None} | ({LIMITED: 2 * TRAIN_LENGTH} if scheme == "rope" else {})
        for name, limit in readings.items():
            rows.append({"name": name, "accuracy": [accuracy(model, length, count, limit) for length in LENGTHS]})
    result = {
        "name": NAME,
        "quick": options.quick,
        **facts(),
        "train_length": TRAIN_LENGTH,
        "steps": options.steps,
        "seed": options.seed,
        "strings": count,
        "lengths": LENGTHS,
        "rows": rows,
        "checks": checks(rows),
        "seconds": time.monotonic() - started,
    }
    print(table(rows))
    stem = options.out / (f"{NAME}_quick" if options.quick else NAME)
    write(result, stem, None if options.no_plot else lambda path: plot(rows, path))
    if options.quick:
        print("--quick: the models are hardly trained, so these figures mean nothing")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_main(NAME, lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
