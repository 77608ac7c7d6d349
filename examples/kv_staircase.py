# SPDX-License-Identifier: Apache-2.0
"""What fewer bits for older keys and values cost a language model: bytes, perplexity, and how far its predictions move.

Two models read held-out text: a byte model trained here, with several seeds, and a model of transformers from a folder
of yours. The first part of the text is read on a full cache, as a prompt is; then a full cache and each staircase go on
from there, side by side, and each token reads what it would have read alone, so the figures are those of decoding.
Rotations are learned from other text.

    python examples/kv_staircase.py --model FOLDER     # table, plot and JSON under examples/out/
    python examples/kv_staircase.py --quick            # models without training in seconds, figures without meaning

FOLDER holds a causal model and its tokenizer as `save_pretrained` writes them; without --model, the byte model alone is
read. It exits with 0 if a staircase that quantizes nothing predicts what the full cache does, with 1 if not, and with 2
after an error.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import Parser, facts, figure_class, make_folder, read_corpus, run_main, write
from kv_staircase_models import CHUNK, Captured, Ladders, Reading, byte_reading, transformers_reading
from kv_staircase_peers import Kept
from length_extrapolation import Training
from torch import Tensor

from pycore import Staircase, ops

NAME = "kv_staircase"
SAME_KL = 0.01  # nats a token: bfloat16's rounding moves predictions that far at most, quantizing nothing
BYTE_STEP = 64  # of the byte model's ladders, whose text is short


def ladders(learn: list[Captured], step: int) -> dict[str, Ladders]:
    """What is compared, by name: a staircase for each layer."""
    turns = [tuple(ops.staircase_rotation(x.float(), method="pca_hadamard") for x in layer[1:]) for layer in learn]

    def plain(bits: tuple[int, ...], **how: Any) -> Ladders:
        return [Staircase(bits, **({"step": step} | how))] * len(learn)

    def rotated(bits: tuple[int, ...], **how: Any) -> Ladders:
        how = {"step": step} | how
        return [Staircase(bits, key_rotation=key, value_rotation=value, **how) for key, value in turns]

    wide = {"sink_size": 64, "step": 2 * step}
    slow = (16, *(8,) * 12, 4)  # a ladder that stays at 8 bits for twelve steps
    return {
        "16": plain((16,)),
        "8": plain((8,)),
        "4": plain((4,)),
        "16/8/4": plain((16, 8, 4)),
        "16/8/4, rotated": rotated((16, 8, 4)),
        f"16/8/4, 64 sinks, step {2 * step}": plain((16, 8, 4), **wide),
        "16/8/4/2": plain((16, 8, 4, 2)),
        "16/8/4/2, rotated": rotated((16, 8, 4, 2)),
        f"16/8/4/2, rotated, 64 sinks, step {2 * step}": rotated((16, 8, 4, 2), **wide),
        f"keys 16/8/4, values to 2, rotated, 64 sinks, step {2 * step}": rotated(
            (16, 8, 4), value_bits=(16, 8, 4, 2), **wide
        ),
        "keys 16/8x12/4, values 16/8/4, rotated": rotated(slow, value_bits=(16, 8, 4)),
        "keys 16/8/4, values 16/8/4x8/2, rotated": rotated((16, 8, 4), value_bits=(16, 8, *(4,) * 8, 2)),
        "keys 16/8x12/4, values 16/8/4x8/2, rotated": rotated(slow, value_bits=(16, 8, *(4,) * 8, 2)),
        "KIVI 4": plain((16, 4), sink_size=0, grid="minmax"),
        "KIVI 2": plain((16, 2), sink_size=0, grid="minmax"),
    }


def measured(reading: Reading, name: str, kept: Kept, exact: Tensor | None) -> tuple[dict[str, Any], Tensor]:
    """A row of the table, and the predictions it comes from. `exact`: those of the full cache."""
    log_probs = kept.log_probs
    exact = log_probs if exact is None else exact
    loss = -log_probs.gather(1, reading.scored[:, None])[:, 0]
    moved = loss + exact.gather(1, reading.scored[:, None])[:, 0]
    full = sum(2 * layer.key.nbytes for layer in reading.held)
    return {
        "name": name,
        "bytes": kept.nbytes,
        "share": kept.nbytes / full,
        "nll": loss.mean().item(),
        "perplexity": math.exp(loss.mean()),
        "change": math.expm1(moved.mean()),
        "change_error": (moved.std() / len(moved) ** 0.5).item(),
        "kl": (exact.exp() * (exact - log_probs)).sum(1).mean().item(),
        "same_top": (exact.argmax(1) == log_probs.argmax(1)).float().mean().item(),
        "attention_error": kept.attention_error,
    }, log_probs


def read_all(reading: Reading, step: int) -> list[dict[str, Any]]:
    """A row for the full cache and each staircase."""
    row, exact = measured(reading, "full", reading.kept(None), None)
    rows = [row]
    ways = {name: partial(reading.kept, chosen) for name, chosen in ladders(reading.learn, step).items()}
    for name, way in {**ways, **reading.others}.items():
        rows.append(measured(reading, name, way(), exact)[0])
        print(f"{name}: {rows[-1]['change']:+.2%}", file=sys.stderr, flush=True)
    return rows


def averaged(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several seeds: the mean of each figure, and in `spread` half the range of it."""
    rows = []
    for each in zip(*runs, strict=True):
        figures = [name for name in each[0] if name != "name"]
        row = {"name": each[0]["name"]} | {name: sum(run[name] for run in each) / len(each) for name in figures}
        row["spread"] = {
            name: (max(run[name] for run in each) - min(run[name] for run in each)) / 2 for name in figures
        }
        rows.append(row)
    return rows


def table(model: dict[str, Any]) -> str:
    """A model's rows as text."""
    head = f"{model['name']}: {model['tokens']} tokens, the first {model['prefix']} read in full"
    lines = [head, f"{'cache':<56}{'MiB':>8}{'share':>8}{'perplexity':>12}{'change':>18}"]
    lines[1] += f"{'KL, nats':>18}{'same top':>18}{'attention':>11}"
    for row in model["rows"]:
        spread = row.get("spread", {"change": row["change_error"]})

        def figure(name: str, style: str, row: Any = row, spread: Any = spread) -> str:
            return f"{row[name]:{style}}" + (f" ±{spread[name]:{style.lstrip('+')}}" if name in spread else "")

        lines.append(
            f"{row['name']:<56}{row['bytes'] / 2**20:>8.2f}{row['share']:>8.1%}{row['perplexity']:>12.3f}"
            f"{figure('change', '+.2%'):>18}{figure('kl', '.5f'):>18}{figure('same_top', '.2%'):>18}"
            f"{row['attention_error']:>11.2%}"
        )
    return "\n".join(lines)


def plot(models: list[dict[str, Any]], path: Path) -> None:
    """How far predictions move against the bytes of the cache."""
    figure = figure_class()(figsize=(7.5 * len(models), 5.4), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        for row in model["rows"][2:]:
            ours = not row["name"].startswith(("KIVI", "quanto"))
            axes.plot(100 * row["share"], row["kl"], "o", markersize=5, color="#1b4f8a" if ours else "#b2182b")
        axes.set_yscale("log")
        axes.margins(x=0.1, y=0.1)
        axes.set_xlabel("bytes of the cache, % of 16 or 32 bits for each value")
        axes.set_ylabel("KL divergence of the next token, nats")
        axes.set_title(model["name"])
        axes.grid(alpha=0.3)
    figure.draw_without_rendering()  # from here on it is known where on the figure a point lies
    for axes, model in zip(panels, models, strict=True):
        label(axes, {row["name"]: (100 * row["share"], row["kl"]) for row in model["rows"][2:]})
    figure.savefig(path, dpi=150)


def label(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """Names beside their points, each at the nearest height where it covers no point and no other name."""
    marks = [axes.transData.transform(point) for point in points.values()]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in marks]
    for name, point in sorted(points.items(), key=lambda each: -each[1][1]):
        text = axes.annotate(
            name, point, xytext=(8, 0), textcoords="offset points", fontsize=7, va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#888888", "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        text.set_in_layout(False)
        heights = sorted((step * 4 for step in range(-40, 41)), key=abs)
        for side, height in ((side, height) for height in heights for side in ("left", "right")):
            text.set_horizontalalignment(side)
            text.set_position((8 if side == "left" else -8, height))
            text.get_window_extent()  # puts it there; but what that returns has the arrow in it
            box = super(type(text), text).get_window_extent()
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(
                box.x0 < x1 and x0 < box.x1 and box.y0 < y1 and y0 < box.y1 for x0, y0, x1, y1 in taken
            ):
                break
        taken.append((box.x0, box.y0, box.x1, box.y1))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    out = Path(__file__).resolve().parent / "out"
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal model and its tokenizer")
    parser.add_argument("--out", type=Path, default=out, help="folder for the plot and the JSON (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="tokens to read (default: 6144); the last third is scored")
    parser.add_argument("--seeds", type=int, help="byte models to train (default: 3)")
    parser.add_argument("--steps", type=int, help="their training steps (default: 300)")
    parser.add_argument("--quick", action="store_true", help="a random model, 768 tokens and one byte model, untrained")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    options = parser.parse_args(argv)
    options.tokens = (3 * CHUNK if options.quick else 6144) if options.tokens is None else options.tokens
    options.steps = (1 if options.quick else 300) if options.steps is None else options.steps
    options.seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    for name, least in (("tokens", 3 * CHUNK), ("seeds", 1), ("steps", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)} and must be at least {least}")
    return options


def byte_model(options: argparse.Namespace) -> dict[str, Any]:
    """The byte models' part of the result."""
    train, held_out, fingerprint = read_corpus()
    runs = []
    for seed in range(options.seeds):
        training = Training(steps=options.steps, seed=seed, batch=8, length=512)
        path = options.out / f"{NAME}{'_quick' if options.quick else ''}_bytelm_{seed}.pt"
        reading = byte_reading(path, train, held_out, fingerprint, training, windows=8, prefix=384)
        runs.append(read_all(reading, BYTE_STEP))
    return described("bytelm, 2 layers", reading, averaged(runs)) | {"seeds": options.seeds, "steps": options.steps}


def described(name: str, reading: Reading, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A model's part of the result."""
    return {
        "name": name,
        "tokens": reading.tokens,
        "prefix": reading.prefix,
        "scored": len(reading.scored),
        "rows": rows,
    }


def whole(options: argparse.Namespace, models: list[dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """What is written, and whether quantizing nothing changed nothing."""
    same = [next(row for row in model["rows"] if row["name"] == "16") for model in models]
    held = all(row["kl"] < SAME_KL for row in same)
    result = {"name": NAME, "quick": options.quick, **facts(), "text": read_corpus()[2], "models": models, "held": held}
    return result, held


def finish(options: argparse.Namespace, models: list[dict[str, Any]]) -> int:
    """Prints and writes; returns the exit status."""
    for model in models:
        print(table(model), end="\n\n")
    result, held = whole(options, models)
    stem = options.out / (f"{NAME}_quick" if options.quick else NAME)
    draw: Callable[[Path], None] = lambda path: plot(models, path)  # noqa: E731
    write(result, stem, None if options.no_plot else draw)
    print(f"{'yes' if held else 'NO':>4}  a staircase that quantizes nothing moves predictions by under {SAME_KL} nats")
    if options.quick:
        print("--quick: the models are random, so these figures mean nothing")
    return 0 if held else 1


def run(options: argparse.Namespace) -> int:
    """The whole experiment; returns the exit status."""
    if not options.no_plot:
        figure_class()
    make_folder(options.out)
    models = []
    if options.model is not None or options.quick:
        train, held_out, _ = read_corpus()
        prefix = options.tokens * 2 // 3
        reading = transformers_reading(options.model, b"".join(held_out), train, options.tokens, prefix)
        name = "a random model" if options.model is None else options.model.resolve().name
        models.append(described(name, reading, read_all(reading, Staircase().step)))  # type: ignore[arg-type]
    return finish(options, [byte_model(options), *models])


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_main(NAME, lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
