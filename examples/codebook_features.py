# SPDX-License-Identifier: Apache-2.0
"""What does it cost a language model to speak in codes, and what do the codes say?

A trained ``pycore.models.bytelm`` gets a codebook of 512 codes for every head, before heads are joined
(``pycore.models.memory.with_codebooks``): what a head gives at a position becomes the mean of its k nearest codes.
Codes start as the k-means of activations, and a short training makes up for what they leave out. Then

  cost     bits per byte on held-out source, before that training and after it, for k of 8 and of 1, over three seeds
  reading  for the codes of k = 1, the bytes that come next where the code is active
  writing  one code switched on at every position (``CodebookFeatures.force``): the text goes on differently

    python examples/codebook_features.py            # tables, plot and JSON under examples/out/
    python examples/codebook_features.py --quick    # the same path in seconds, figures without meaning
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import Parser, Progress, UserError, facts, figure_class, make_folder, read_corpus, run_main, write
from length_extrapolation import Training, trained_model
from torch import Tensor, nn
from torch.nn import functional

from pycore.models.bytelm import BOS, Bytelm, tokens_from_bytes
from pycore.models.memory import codebook_loss, codebooks, learn_codebooks, with_codebooks

NAME = "codebook_features"
LENGTH, BATCH, CODES = 128, 16, 512
CHOICES = (8, 1)
PROMPT = b"import os\n\n\ndef main("


def with_bos(target: Tensor) -> Tensor:
    """What the model reads to predict `target` [n, LENGTH]."""
    return torch.cat([torch.full((len(target), 1), BOS), target[:, :-1]], dim=1)


def samples(text: Tensor, count: int, seed: int) -> Tensor:
    """Windows [count, BATCH, LENGTH] of the training text."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - LENGTH + 1, (count, BATCH, 1), generator=generator)
    return text[starts + torch.arange(LENGTH)].long()


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor) -> float:
    """Of held-out windows [n, LENGTH]."""
    total = 0.0
    for target in windows.split(BATCH):
        logits = model(with_bos(target))
        total += functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
    return total / math.log(2) / windows.numel()


def tune(model: nn.Module, batches: Tensor, progress: Progress, done: int) -> None:
    """Trains the model with its codebooks in it, codebook loss included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    for step, target in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1.0 + math.cos(math.pi * step / len(batches)))
        logits = model(with_bos(target))
        loss = functional.cross_entropy(logits.flatten(0, 1), target.flatten()) + codebook_loss(model)
        if not math.isfinite(loss.item()):
            raise UserError(f"training diverged at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress.update(done + step + 1)


def measure(bare: Bytelm, text: Tensor, windows: Tensor, options: argparse.Namespace) -> tuple[list[Any], nn.Module]:
    """Bits per byte of the model, of the model trained on as long, and of the model in codes; the last coded one."""
    names = ["no codes", *(f"k = {k}" for k in CHOICES)]
    rows: dict[str, Any] = {name: {"name": name, "before": [], "after": []} for name in names}
    progress = Progress("training", options.seeds * len(names) * options.steps)
    coded: nn.Module = bare
    for seed in range(options.seeds):
        batches = samples(text, options.steps, seed)
        for number, (name, k) in enumerate(zip(names, (0, *CHOICES), strict=True)):
            torch.manual_seed(seed)
            coded = with_codebooks(bare, CODES, k=max(k, 1), loss="aeloss" if k else "base")
            if k:
                seen = samples(text, options.kmeans, 1000 + seed)
                learn_codebooks(coded, [with_bos(batch) for batch in seen], seed=seed)
            else:  # the control has the same training, without codes
                for layer in codebooks(coded):
                    layer.features = Plain()  # type: ignore[assignment]
            rows[name]["before"].append(bits_per_byte(coded, windows))
            tune(coded, batches, progress, (seed * len(names) + number) * options.steps)
            rows[name]["after"].append(bits_per_byte(coded, windows))
    return list(rows.values()), coded


class Plain(nn.Module):
    """In place of codebooks: passes on what it gets."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, torch.empty(0), torch.zeros(())


@torch.no_grad()
def readings(model: nn.Module, windows: Tensor, most: int) -> list[dict[str, Any]]:
    """The codes whose next byte is the surest, among those active at one position in 1000 at least."""
    model(with_bos(windows))
    found = []
    for number, layer in enumerate(codebooks(model)):
        assert layer.codes is not None
        for head in range(layer.features.heads):
            codes = layer.codes[:, :, head, 0].flatten()
            joint = torch.zeros(CODES, 256).index_put_(
                (codes, windows.flatten()), torch.ones(codes.numel()), accumulate=True
            )
            count = joint.sum(1)
            share, byte = (joint / count.clamp(min=1).unsqueeze(1)).max(1)
            for code in torch.where(count >= windows.numel() / 1000, share, 0.0).topk(3).indices.tolist():
                found.append(
                    {
                        "layer": number,
                        "head": head,
                        "code": code,
                        "positions": int(count[code]),
                        "next": repr(chr(int(byte[code]))),
                        "share": float(share[code]),
                    }
                )
    return sorted(found, key=lambda row: -row["share"])[:most]


@torch.no_grad()
def continuation(model: nn.Module, length: int) -> str:
    """PROMPT and the most likely bytes behind it."""
    tokens = tokens_from_bytes(PROMPT)[None]
    for _ in range(length):
        logits = model(tokens[:, -LENGTH:])[:, -1, :256]
        tokens = torch.cat([tokens, logits.max(1, keepdim=True).indices], dim=1)
    return bytes(tokens[0, 1:].tolist()).decode("latin-1")


def writings(model: nn.Module, found: list[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """The continuation as it is, and with each of some codes switched on everywhere."""
    result = [{"switched_on": None, "text": continuation(model, length)}]
    for row in found:
        features = codebooks(model)[row["layer"]].features
        features.force(row["code"], head=row["head"])
        name = f"layer {row['layer']}, head {row['head']}, code {row['code']} (before {row['next']})"
        result.append({"switched_on": name, "text": continuation(model, length)})
        features.reset()
    return result


def conclusions(rows: list[dict[str, Any]], texts: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """What is claimed; costs are against the model that was trained on as long without codes."""
    plain, eight, one = (mean(row["after"]) for row in rows)
    changed = [text for text in texts[1:] if text["text"] != texts[0]["text"]]
    return [
        (eight - plain < 0.15, f"eight codes a head cost less than 0.15 bits per byte: {eight - plain:+.3f}"),
        (one - plain < 0.15, f"and so does one, which k-means fits: {one - plain:+.3f}"),
        (all(mean(row["after"]) < mean(row["before"]) for row in rows[1:]), "training makes up for part of the cost"),
        (len(changed) > 0, f"one code switched on changes the text: {len(changed)} of {len(texts) - 1} tried"),
    ]


def table(rows: list[dict[str, Any]], found: list[dict[str, Any]], texts: list[dict[str, Any]]) -> str:
    """Everything as text."""
    lines = [f"{'bits per byte':<14}{'before training':>18}{'after':>18}"]
    for row in rows:
        cells = []
        for values in (row["before"], row["after"]):
            cells.append(f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0.0:.3f}")
        lines.append(f"{row['name']:<14}{cells[0]:>18}{cells[1]:>18}")
    lines += ["", f"{'layer':>5}{'head':>6}{'code':>6}{'positions':>11}{'next':>8}{'share':>8}"]
    lines += [
        f"{row['layer']:>5}{row['head']:>6}{row['code']:>6}{row['positions']:>11}{row['next']:>8}{row['share']:>8.2f}"
        for row in found
    ]
    for text in texts:
        lines += ["", f"--- {text['switched_on'] or 'no code switched on'}", text["text"]]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte, before and after."""
    figure = figure_class()(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for offset, (when, color) in enumerate((("before", "#9bb7d4"), ("after", "#1b4f8a"))):
        places = [index + 0.36 * offset for index in range(len(rows))]
        heights = [mean(row[when]) for row in rows]
        axes.bar(places, heights, width=0.34, color=color, label=f"{when} training")
        for place, height in zip(places, heights, strict=True):
            axes.text(place, height, f"{height:.2f}", ha="center", va="bottom", fontsize=9)
    axes.set_xticks([index + 0.18 for index in range(len(rows))], [row["name"] for row in rows])
    axes.set_ylabel("bits per byte, lower is better")
    axes.set_title(f"A byte model whose heads give {CODES} codes")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    out = Path(__file__).resolve().parent / "out"
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="folder for the plot and the JSON (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="length_extrapolation.py's weights (default: OUT/bytelm.pt)")
    parser.add_argument("--steps", type=int, help="training steps with codes (default: 250)")
    parser.add_argument("--windows", type=int, help="texts of 128 bytes to evaluate on (default: 512)")
    parser.add_argument("--seeds", type=int, help="how often everything is repeated (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a few steps: only to see that it runs")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    options = parser.parse_args(argv)
    options.steps = (2 if options.quick else 250) if options.steps is None else options.steps
    options.windows = (16 if options.quick else 512) if options.windows is None else options.windows
    options.seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    options.kmeans, options.letters = (1, 8) if options.quick else (8, 100)
    for name in ("steps", "windows", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)} and must be at least 1")
    if options.checkpoint is None:
        options.checkpoint = options.out / ("bytelm_quick.pt" if options.quick else "bytelm.pt")
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
    training = Training(steps=4 if options.quick else 1500, seed=0)
    bare, _ = trained_model(options.checkpoint, text, fingerprint, training)
    rows, coded = measure(bare, torch.frombuffer(bytearray(text), dtype=torch.uint8), windows, options)
    found = readings(coded, windows, 8)
    texts = writings(coded, found[:5], options.letters)
    checks = conclusions(rows, texts)
    result = {
        "name": NAME,
        "quick": options.quick,
        **facts(),
        "steps": options.steps,
        "seeds": options.seeds,
        "windows": options.windows,
        "codes": CODES,
        "rows": rows,
        "readings": found,
        "writings": texts,
        "checks": [{"holds": holds, "claim": claim} for holds, claim in checks],
    }
    print(table(rows, found, texts))
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
