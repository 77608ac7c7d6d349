# SPDX-License-Identifier: Apache-2.0
"""Read 200,000 bytes token by token: constant memory, constant time per token, and no loss of quality.

The model of ``length_extrapolation.py``, trained on texts of 128 bytes, reads a stream as a server would: one token in,
one distribution out, on caches (``pycore.LambdaKVCache``) that keep the first 4 tokens and the newest 128. Whatever
the position, a step does the same work on the same memory, and since the caches give the bits of attention over
everything, the last step is as exact as the first.

    python examples/streaming.py            # table, plot and JSON under examples/out/
    python examples/streaming.py --quick    # the same path in seconds, figures without meaning

It exits with 0 if memory, time and bits per byte stayed level, with 1 if not, and with 2 after an error.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import Parser, Progress, UserError, facts, figure_class, make_folder, read_corpus, run_main, write
from length_extrapolation import SINK_SIZE, TRAIN_LENGTH, Training, trained_model

from pycore.models.bytelm import BOS, Bytelm
from pycore.schedules import Lambda

NAME = "streaming"
PARTS = 20


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def stream(model: Bytelm, text: bytes) -> list[dict[str, Any]]:
    """Reads the text a token at a time; one row for each twentieth of it."""
    caches = model.caches(Lambda(SINK_SIZE, TRAIN_LENGTH))
    token = torch.tensor([[BOS]])
    rows: list[dict[str, Any]] = []
    progress = Progress("stream", PARTS)
    size = len(text) // PARTS
    for part in range(PARTS):
        loss = 0.0
        times = []
        for byte in text[part * size : (part + 1) * size]:
            started = time.perf_counter()
            logits = model(token, caches=caches)[0, 0]
            times.append(time.perf_counter() - started)
            loss -= torch.log_softmax(logits, 0)[byte].item()
            token.fill_(byte)
        rows.append(
            {
                "tokens": (part + 1) * size,
                "microseconds": 1e6 * sorted(times)[size // 2],
                "cache_bytes": sum(cache.nbytes for cache in caches),
                "resident_bytes": resident_bytes(),
                "bits_per_byte": loss / math.log(2) / size,
            }
        )
        progress.update(part + 1, f"{rows[-1]['microseconds']:.0f} us a token")
    return rows


def conclusions(rows: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """What is claimed, each with its figures. The first twentieth, which fills the caches, is left out."""
    caches = {row["cache_bytes"] for row in rows}
    grown = rows[-1]["resident_bytes"] - rows[1]["resident_bytes"]
    early, late = (sum(row["microseconds"] for row in half) / len(half) for half in (rows[1:5], rows[-4:]))
    first, last = (sum(row["bits_per_byte"] for row in half) / len(half) for half in (rows[:10], rows[10:]))
    return [
        (len(caches) == 1, f"the caches hold {rows[-1]['cache_bytes']:,} bytes at every point"),
        (grown < 4 << 20, f"the process grows by {grown / 2**20:.1f} MiB from the second twentieth to the last"),
        (late < 1.15 * early, f"a token takes {early:.0f} us early and {late:.0f} us late"),
        (last < 1.1 * first, f"bits per byte are {first:.3f} in the first half and {last:.3f} in the second"),
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Every fourth row as text."""
    lines = [f"{'tokens read':>12}{'us a token':>12}{'cache KiB':>12}{'process MiB':>13}{'bits per byte':>15}"]
    for row in rows[3::4]:
        lines.append(
            f"{row['tokens']:>12,}{row['microseconds']:>12.0f}{row['cache_bytes'] / 1024:>12.0f}"
            f"{row['resident_bytes'] / 2**20:>13.0f}{row['bits_per_byte']:>15.3f}"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time, memory and bits per byte against tokens read, one below the other."""
    figure = figure_class()(figsize=(7.5, 6.5), layout="constrained")
    panels = figure.subplots(3, sharex=True)
    tokens = [row["tokens"] / 1000 for row in rows]
    for axes, label, values, color in (
        (panels[0], "µs a token", [row["microseconds"] for row in rows], "#1b4f8a"),
        (panels[1], "process, MiB", [row["resident_bytes"] / 2**20 for row in rows], "#b2182b"),
        (panels[2], "bits per byte", [row["bits_per_byte"] for row in rows], "#2f7d4f"),
    ):
        axes.plot(tokens, values, color=color, marker="o", linewidth=2)
        axes.set_ylim(0, 1.25 * max(values))
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_title("A byte model trained on 128 bytes reads a stream through LambdaKVCache")
    panels[2].set_xlabel("thousand tokens read")
    figure.savefig(path, dpi=150)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    out = Path(__file__).resolve().parent / "out"
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="folder for the plot and the JSON (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="tokens to read (default: 200000)")
    parser.add_argument("--quick", action="store_true", help="a hardly trained model and 1000 tokens")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    options = parser.parse_args(argv)
    options.tokens = (1000 if options.quick else 200_000) if options.tokens is None else options.tokens
    if options.tokens < PARTS:
        parser.error(f"--tokens is {options.tokens} and must be at least {PARTS}")
    return options


def run(options: argparse.Namespace) -> int:
    """The whole experiment; returns the exit status."""
    if not options.no_plot:
        figure_class()
    make_folder(options.out)
    text, held_out, fingerprint = read_corpus()
    unseen = b"".join(held_out)
    if options.tokens > len(unseen):
        raise UserError(f"--tokens is {options.tokens} and must be at most {len(unseen)}, what was not trained on")
    checkpoint = options.out / ("bytelm_quick.pt" if options.quick else "bytelm.pt")
    training = Training(steps=4 if options.quick else 1500, seed=0)
    model, _ = trained_model(checkpoint, text, fingerprint, training)
    rows = stream(model.eval(), unseen[: options.tokens])
    checks = conclusions(rows)
    held = all(holds for holds, _ in checks)
    result = {
        "name": NAME,
        "quick": options.quick,
        **facts(),
        "tokens": options.tokens,
        "sink_size": SINK_SIZE,
        "window_size": TRAIN_LENGTH,
        "rows": rows,
        "checks": [{"holds": holds, "claim": claim} for holds, claim in checks],
        "level": held,
    }
    print(table(rows))
    stem = options.out / (f"{NAME}_quick" if options.quick else NAME)
    write(result, stem, None if options.no_plot else lambda path: plot(rows, path))
    for holds, claim in checks:
        print(f"{'yes' if holds else 'NO':>4}  {claim}")
    if options.quick:
        print("--quick: the model is hardly trained, so these figures mean nothing")
        return 0
    print("memory, time and quality " + ("stayed level" if held else "did NOT stay level"))
    return 0 if held else 1


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_main(NAME, lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
