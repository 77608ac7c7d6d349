# SPDX-License-Identifier: Apache-2.0
"""Train a byte-level model on texts of 128 bytes and read it texts of 2048: what Λ attention is for.

A rotary model meets, beyond its training length, distances it has never seen and more keys than it has ever shared its
attention among, and falls apart. LM-Infinite (arXiv 2308.16137) repairs it at test time, without training: every query
keeps the first few tokens and a window of the newest, and no distance counts as longer than the window. This script
trains ``pycore.models.bytelm`` on the standard library's source text in a few minutes on two cores and measures
bits per byte by position, five ways:

  vanilla              every earlier byte, true distances
  window only          the newest 128 bytes
  Λ mask, no limit     the first 4 tokens and the newest 128, true distances
  limit only           every earlier byte, distances cut off at 128
  Λ                    the first 4 tokens and the newest 128, distances cut off at 128

    python examples/length_extrapolation.py            # table, plot and JSON under examples/out/
    python examples/length_extrapolation.py --quick    # the same path in seconds, figures without meaning

It exits with 0 if the paper's finding was reproduced, with 1 if not, and with 2 after an error.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import Parser, Progress, UserError, facts, figure_class, make_folder, read_corpus, run_main, write
from torch import Tensor
from torch.nn import functional

from pycore.models.bytelm import BOS, Bytelm, BytelmConfig
from pycore.schedules import Causal, Lambda

NAME = "length_extrapolation"
TRAIN_LENGTH = 128
EVAL_LENGTH = 2048
BUCKETS = ((0, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048))
SINK_SIZE = 4
# Name, schedule, distance limit. EVAL_LENGTH is longer than any distance here, so it limits nothing.
READINGS: tuple[tuple[str, Any, int], ...] = (
    ("vanilla", Causal(), EVAL_LENGTH),
    ("window only", Lambda(0, TRAIN_LENGTH), EVAL_LENGTH),
    ("Λ mask, no limit", Lambda(SINK_SIZE, TRAIN_LENGTH), EVAL_LENGTH),
    ("limit only", Causal(), TRAIN_LENGTH),
    ("Λ", Lambda(SINK_SIZE, TRAIN_LENGTH), TRAIN_LENGTH),
)


@dataclass(frozen=True)
class Training:
    """What the trained weights depend on beside the model's shape and the text."""

    steps: int
    seed: int
    batch: int = 16
    length: int = TRAIN_LENGTH
    learning_rate: float = 3e-3
    warmup: int = 50


def train(model: Bytelm, text: bytes, training: Training) -> float:
    """Trains in place on samples that start with BOS, which makes the first token the sink. Returns the last loss."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.98))
    reach = torch.arange(training.length)
    bos = torch.full((training.batch, 1), BOS)
    progress = Progress("training", training.steps)
    average = 0.0
    for step in range(training.steps):
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / training.steps))
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * min(1.0, (step + 1) / training.warmup) * cosine
        starts = torch.randint(len(data) - training.length + 1, (training.batch, 1), generator=generator)
        target = data[starts + reach].long()
        loss = model.loss(torch.cat([bos, target[:, :-1]], dim=1), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        bits = loss.item() / math.log(2)
        if not math.isfinite(bits):
            raise UserError(f"training diverged at step {step}; try another --seed")
        average = bits if step == 0 else 0.98 * average + 0.02 * bits
        progress.update(step + 1, f"{average:.3f} bits/byte")
    return average


def trained_model(path: Path, text: bytes, fingerprint: str, training: Training) -> tuple[Bytelm, dict[str, Any]]:
    """The model of the checkpoint if it was trained as asked, else a newly trained one, which is then kept there."""
    torch.manual_seed(training.seed)
    model = Bytelm(BytelmConfig())
    wanted = {"model": asdict(model.config), "training": asdict(training), "text": fingerprint}
    if path.exists():
        try:
            kept = torch.load(path, weights_only=True)
            settings, facts, state = kept["settings"], kept["facts"], kept["state"]
        except Exception as error:
            raise UserError(f"{path} is not a checkpoint of this example; remove it or name another file") from error
        if settings == wanted:
            model.load_state_dict(state)
            print(f"checkpoint {path} reused (trained in {facts['seconds']:.0f} s)")
            return model, facts
        print(f"checkpoint {path} was trained with other settings; training anew")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()  # what cannot be written should say so before minutes of training, not after
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be written: {error.strerror}") from error
    started = time.monotonic()
    last = train(model, text, training)
    facts = {"seconds": time.monotonic() - started, "bits_per_byte": last, "parameters": model.parameter_count}
    torch.save({"settings": wanted, "facts": facts, "state": model.state_dict()}, part)
    os.replace(part, path)  # an interrupted save leaves the old checkpoint whole
    return model, facts


def evaluation_windows(held_out: list[bytes], count: int) -> Tensor:
    """`count` windows of EVAL_LENGTH bytes, spread evenly over the held-out files: int64 [count, EVAL_LENGTH]."""
    windows = [
        data[start : start + EVAL_LENGTH]
        for data in held_out
        for start in range(0, len(data) - EVAL_LENGTH + 1, EVAL_LENGTH)
    ]
    if count > len(windows):
        raise UserError(f"--windows is {count} and must be at most {len(windows)}, what the held-out files have")
    chosen = [windows[i * len(windows) // count] for i in range(count)]
    return torch.frombuffer(bytearray(b"".join(chosen)), dtype=torch.uint8).view(count, EVAL_LENGTH).long()


@torch.no_grad()
def evaluate(model: Bytelm, windows: Tensor) -> list[dict[str, Any]]:
    """Bits per byte by position, one row for each of READINGS, all on the same text."""
    rows: list[dict[str, Any]] = []
    batches = windows.split(4)
    progress = Progress("evaluation", len(READINGS) * len(batches))
    for name, schedule, limit in READINGS:
        bits = torch.zeros(EVAL_LENGTH, dtype=torch.float64)
        for done, target in enumerate(batches, start=len(rows) * len(batches) + 1):
            tokens = torch.cat([torch.full((len(target), 1), BOS), target[:, :-1]], dim=1)
            logits = model(tokens, schedule=schedule, distance_limit=limit)
            loss = functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
            bits += loss.double().sum(0) / math.log(2)
            progress.update(done, name)
        means = [(bits[low:high].mean() / len(windows)).item() for low, high in BUCKETS]
        rows.append({"name": name, "bits_per_byte": means})
    return rows


def conclusions(rows: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """What LM-Infinite claims, as three comparisons of the first bucket with the last."""
    bits = {row["name"]: row["bits_per_byte"] for row in rows}
    vanilla, lam = bits["vanilla"], bits["Λ"]
    worse = bits["window only"][-1] - lam[-1]
    return [
        (vanilla[-1] > 2 * vanilla[0], f"vanilla more than doubles: {vanilla[0]:.3f} to {vanilla[-1]:.3f}"),
        (lam[-1] <= lam[0], f"Λ does not rise: {lam[0]:.3f} to {lam[-1]:.3f}"),
        (worse > 0.4, f"at the end a window without sinks is more than 0.4 worse than Λ: {worse:.3f}"),
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, bits per byte by position."""
    heads = "".join(f"{low}-{high}".rjust(11) for low, high in BUCKETS)
    lines = [f"{'bits per byte at':<18}{heads}"]
    for row in rows:
        numbers = "".join(f"{value:>11.3f}" for value in row["bits_per_byte"])
        lines.append(f"{row['name']:<18}{numbers}")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte against position, one line for each reading."""
    figure = figure_class()(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = {
        "vanilla": ("#b2182b", "o", "-"),
        "Λ mask, no limit": ("#d6813a", "^", "--"),
        "window only": ("#7f7f7f", "s", "--"),
        "limit only": ("#5aa0c8", "v", "--"),
        "Λ": ("#1b4f8a", "D", "-"),
    }
    middles = [high / math.sqrt(2) for _, high in BUCKETS]  # even steps on the logarithmic axis
    for row in sorted(rows, key=lambda row: -row["bits_per_byte"][-1]):  # the legend in the order of the line ends
        color, marker, line = styles[row["name"]]
        label = f"{row['name']} ({row['bits_per_byte'][-1]:.2f})"
        axes.plot(middles, row["bits_per_byte"], color=color, marker=marker, linestyle=line, linewidth=2, label=label)
    axes.axvline(TRAIN_LENGTH, color="black", linewidth=0.8, linestyle=":")
    axes.text(TRAIN_LENGTH, 0.01, " trained up to here", transform=axes.get_xaxis_transform(), va="bottom", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(middles, [f"{low}–{high}" for low, high in BUCKETS])
    axes.minorticks_off()
    axes.set_ylim(0, 1.1 * max(max(row["bits_per_byte"]) for row in rows))
    axes.set_xlabel("position in the text (bytes)")
    axes.set_ylabel("bits per byte, lower is better")
    axes.set_title("A byte model trained on 128 bytes, reading 2048")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(title="attention (at the end)", frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=150)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    out = Path(__file__).resolve().parent / "out"
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="folder for the plot and the JSON (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="trained weights, reused if they fit (default: OUT/bytelm.pt)")
    parser.add_argument("--steps", type=int, help="training steps (default: 1500)")
    parser.add_argument("--windows", type=int, help="texts of 2048 bytes to evaluate on (default: 96)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the training samples")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: torch's)")
    parser.add_argument("--quick", action="store_true", help="a few steps, one text: only to see that it runs")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    options = parser.parse_args(argv)
    options.steps = (4 if options.quick else 1500) if options.steps is None else options.steps
    options.windows = (1 if options.quick else 96) if options.windows is None else options.windows
    for name in ("steps", "windows", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value} and must be at least 1")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed is {options.seed} and must be in 0..2^63-1")
    if options.checkpoint is None:
        options.checkpoint = options.out / ("bytelm_quick.pt" if options.quick else "bytelm.pt")
    return options


def run(options: argparse.Namespace) -> int:
    """The whole experiment; returns the exit status."""
    if not options.no_plot:
        figure_class()  # a missing matplotlib should be known before minutes of training
    make_folder(options.out)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    text, held_out, fingerprint = read_corpus()
    windows = evaluation_windows(held_out, options.windows)
    training = Training(steps=options.steps, seed=options.seed)
    model, trained = trained_model(options.checkpoint, text, fingerprint, training)
    rows = evaluate(model, windows)
    checks = conclusions(rows)
    reproduced = all(holds for holds, _ in checks)
    result = {
        "name": NAME,
        "quick": options.quick,
        **facts(),
        "text": {"train_bytes": len(text), "held_out_bytes": sum(map(len, held_out)), "sha256": fingerprint},
        "training": {**asdict(training), **trained},
        "windows": options.windows,
        "buckets": BUCKETS,
        "rows": rows,
        "checks": [{"holds": holds, "claim": claim} for holds, claim in checks],
        "reproduced": reproduced,
    }
    stem = options.out / (f"{NAME}_quick" if options.quick else NAME)
    print(table(rows))
    write(result, stem, None if options.no_plot else lambda path: plot(rows, path))
    for holds, claim in checks:
        print(f"{'yes' if holds else 'NO':>4}  {claim}")
    if options.quick:
        print("--quick: the model is hardly trained, so these figures mean nothing")
        return 0
    print("LM-Infinite's finding was " + ("reproduced" if reproduced else "NOT reproduced"))
    return 0 if reproduced else 1


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_main(NAME, lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
