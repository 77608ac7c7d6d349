# SPDX-License-Identifier: Apache-2.0
"""Speech as codes and bytes: what each codebook adds, and what masking channels does to the first one.

espeak-ng, where it is installed, reads the standard library's docstrings in several voices; elsewhere synthetic vowels
have to do. ``pycore.models.codec.Codec`` learns its codebooks on a few minutes of it, twice: with masked channels
(Language-Codec's MCRVQ), and then its code model too, and without (plain residual quantization). On other sound:

  SNR        of the waveform after 1 to 8 codebooks
  share      how much of all that the eight codebooks explain the first explains; masking is meant to lower it
  perplexity how many of the 256 codes are in use, evenly counted
  bytes      a real stream of the arithmetic coder, beside eight bits a code

The first seed's codec is kept (``speech_codec.pt``, for ``python -m pycore.models.codec_command``), with a file.

    python examples/speech_codec.py            # table, plot, WAV files and JSON under examples/out/
    python examples/speech_codec.py --quick    # the same path in seconds, figures without meaning
"""

from __future__ import annotations

import argparse
import ast
import math
import re
import sys
import sysconfig
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import Parser, Progress, UserError, facts, figure_class, make_folder, run_main, write
from torch import Tensor
from torch.nn import functional

from pycore import ops
from pycore.models.codec import Codec, CodecConfig
from pycore.models.codec_audio import espeak, has_espeak, synthetic_vowels, write_wav
from pycore.models.codec_file import pack, save_codec, unpack

NAME = "speech_codec"
SAMPLE_RATE = 16000
VOICES = (("en-us", 40, 160), ("en-gb", 55, 175), ("en-gb-scotland", 30, 150), ("en-us+f2", 60, 170))
KINDS = ("MCRVQ", "RVQ")
FRAMES_PER_STEP, CODE_LENGTH, CODE_BATCH = 2048, 125, 8


def sentences() -> list[str]:
    """The docstrings of the standard library's modules, cut into sentences, in a fixed order."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            text = ast.get_docstring(ast.parse(path.read_bytes())) or ""
        except (SyntaxError, ValueError):
            continue
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
            if 30 <= len(sentence) <= 200 and sentence.isascii():
                found.append(sentence)
    return found


def sound(seconds: float, seed: int, speech: bool) -> Tensor:
    """Sound [n] of that length; another seed gives other sentences, or other vowels."""
    if not speech:
        return synthetic_vowels(seconds, sample_rate=SAMPLE_RATE, seed=seed)
    texts, parts, have = sentences(), [], 0
    wanted = int(seconds * SAMPLE_RATE)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = len(order) // 10  # the first tenth is for testing, and never trained on
    order = order[:held_out] if seed < 0 else order[held_out:]
    for turn in range(10000):
        voice, pitch, speed = VOICES[turn % len(VOICES)]
        text = texts[order[(turn + 101 * max(seed, 0)) % len(order)]]
        parts.append(espeak(text, voice=voice, pitch=pitch, speed=speed, sample_rate=SAMPLE_RATE))
        have += len(parts[-1])
        if have >= wanted:
            break
    return torch.cat(parts)[:wanted]


def learn_codebooks(codec: Codec, frames: Tensor, steps: int, seed: int) -> None:
    """Moving averages of all stages, on `steps` draws of the frames [n, hop]."""
    generator = torch.Generator().manual_seed(seed)
    codec.train()
    for _ in range(steps):
        rows = torch.randint(len(frames), (min(FRAMES_PER_STEP, len(frames)),), generator=generator)
        codec.quantizer(frames[rows].unsqueeze(0))
    codec.eval()


def learn_code_model(
    codec: Codec, codes: Tensor, steps: int, seed: int, progress: Progress, done: int, *, length: int = CODE_LENGTH,
    fewer: bool = False,
) -> None:  # fmt: skip
    """Cross-entropy on pieces of the codes [t, Q]; with `fewer`, every step sees a drawn number of stages."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(codec.code_model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1)
    length = min(length, len(codes))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        starts = torch.randint(len(codes) - length + 1, (CODE_BATCH, 1), generator=generator)
        piece = codes[starts + torch.arange(length)]
        if fewer:
            piece = piece[..., : int(torch.randint(codes.shape[1], (), generator=generator)) + 1]
        logits = codec.code_model(piece)
        loss = functional.cross_entropy(logits.flatten(0, 2), piece.flatten())
        if not math.isfinite(loss.item()):
            raise UserError(f"training diverged at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress.update(done + step + 1, f"{loss.item() / math.log(2):.2f} bits a code")


def perplexities(codes: Tensor, size: int) -> list[float]:
    """For each stage 2 to the entropy of its codes."""
    result = []
    for stage in codes.unbind(-1):
        counts, _ = ops.vq_statistics(torch.zeros(len(stage), 1), stage, size)
        share = counts / counts.sum()
        result.append(float(torch.exp(-torch.xlogy(share, share).sum())))
    return result


def measure(codec: Codec, test: Tensor) -> dict[str, Any]:
    """Everything about the codes of sound [n]; not the bytes."""
    codes, power = codec.encode(test), test.double().square().mean()
    errors = [
        float((test - codec.decode(codes[:, :n], length=len(test))).double().square().mean() / power)
        for n in range(1, codes.shape[1] + 1)
    ]
    return {
        "snr": [-10 * math.log10(error) for error in errors],
        "first_share": (1 - errors[0]) / (1 - errors[-1]),
        "perplexity": perplexities(codes, codec.config.codes),
    }


def one_seed(seed: int, options: argparse.Namespace, speech: bool, progress: Progress) -> dict[str, Any]:
    """Both kinds, trained on the same sound and tested on the same other sound."""
    train, test = sound(options.seconds, seed, speech), sound(options.seconds / 10, -1 if speech else 10**6, speech)
    result: dict[str, Any] = {}
    for kind in KINDS:
        torch.manual_seed(seed)
        codec = Codec(CodecConfig(masked=3 if kind == "MCRVQ" else 0))
        frames = codec.frames(train)
        learn_codebooks(codec, frames, options.vq_steps, seed)
        result[kind] = row = measure(codec, test)
        if kind == "RVQ":
            continue
        learn_code_model(codec, codec.encode(train), options.steps, seed, progress, seed * options.steps)
        held = codec.encode(test)
        data = codec.to_bytes(held)
        row["saved"] = 1 - len(data) / held.numel()
        row["bits_per_second"] = 8 * len(data) / (len(test) / SAMPLE_RATE)
        if seed == 0:
            clip = test[: 8 * SAMPLE_RATE]
            save_codec(codec, options.out / f"{NAME}.pt", {"seconds": options.seconds, "steps": options.steps})
            file = options.out / f"{NAME}.pccf"
            file.write_bytes(pack(codec, codec.encode(clip), samples=len(clip)))
            row["decodes"] = bool(torch.equal(unpack(codec, file.read_bytes()).codes, codec.encode(clip)))
            write_wav(options.out / f"{NAME}_original.wav", clip, SAMPLE_RATE)
            for n in (1, 4, 8):
                again = codec.decode(codec.encode(clip, quantizers=n), length=len(clip))
                write_wav(options.out / f"{NAME}_{n}_codebooks.wav", again, SAMPLE_RATE)
    return result


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and the spread of what is compared."""
    rows = []
    for kind in KINDS:
        each = [run[kind] for run in runs]
        shares, last = [row["first_share"] for row in each], [row["snr"][-1] for row in each]
        rows.append(
            {
                "name": kind,
                "snr": [mean(values) for values in zip(*(row["snr"] for row in each), strict=True)],
                "snr_spread": stdev(last) if len(last) > 1 else 0.0,
                "first_share": mean(shares),
                "first_share_spread": stdev(shares) if len(shares) > 1 else 0.0,
                "perplexity": [mean(values) for values in zip(*(row["perplexity"] for row in each), strict=True)],
            }
        )
    each = [run["MCRVQ"] for run in runs]
    rows[0]["saved_each_seed"] = [row["saved"] for row in each]
    rows[0]["saved"] = mean(rows[0]["saved_each_seed"])
    rows[0]["bits_per_second"] = mean(row["bits_per_second"] for row in each)
    rows[0]["decodes"] = each[0]["decodes"]
    return rows


def conclusions(rows: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """What the paper hopes for, and what has to hold of a codec."""
    masked, plain = rows
    difference = masked["snr"][-1] - plain["snr"][-1]
    return [
        (
            all(a < b for row in rows for a, b in zip(row["snr"], row["snr"][1:], strict=False)),
            "every codebook adds to the SNR",
        ),
        (
            masked["first_share"] < plain["first_share"],
            f"masking lowers the first codebook's share: {plain['first_share']:.2f} to {masked['first_share']:.2f}",
        ),
        (abs(difference) < 0.5, f"eight codebooks are within 0.5 dB with masks and without: {difference:+.2f} dB"),
        (masked["saved"] > 0, f"the code model saves {masked['saved']:.0%} of eight bits a code"),
        (masked["decodes"], "the bytes decode to the codes"),
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'dB after codebooks':<20}" + "".join(f"{n:>7}" for n in range(1, 9)) + f"{'first share':>17}"]
    for row in rows:
        numbers = "".join(f"{value:>7.2f}" for value in row["snr"])
        lines.append(f"{row['name']:<20}{numbers}{row['first_share']:>9.3f} ± {row['first_share_spread']:.3f}")
    lines.append(f"{'perplexity of codes':<20}")
    lines += [f"{row['name']:<20}" + "".join(f"{value:>7.0f}" for value in row["perplexity"]) for row in rows]
    saved, rate = rows[0]["saved"], rows[0]["bits_per_second"]
    lines.append(f"bytes of MCRVQ: {saved:.1%} fewer than eight bits a code, {rate:.0f} bits a second")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """SNR against the number of codebooks."""
    figure = figure_class()(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for row, (color, marker) in zip(rows, (("#1b4f8a", "D"), ("#d6813a", "o")), strict=True):
        label = f"{row['name']} (first codebook: {row['first_share']:.0%} of what eight explain)"
        axes.plot(range(1, len(row["snr"]) + 1), row["snr"], color=color, marker=marker, label=label)
    axes.set_xlabel("codebooks")
    axes.set_ylabel("SNR of unheard sound, dB")
    axes.set_title("Speech through residual quantization, channels masked and not")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    out = Path(__file__).resolve().parent / "out"
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="folder for all results (default: %(default)s)")
    parser.add_argument("--seconds", type=int, help="of sound to learn from (default: 300)")
    parser.add_argument("--steps", type=int, help="training steps of the code model (default: 120)")
    parser.add_argument("--seeds", type=int, help="how often everything is repeated (default: 3)")
    parser.add_argument("--vowels", action="store_true", help="synthetic vowels, even where espeak-ng is installed")
    parser.add_argument("--quick", action="store_true", help="a few steps: only to see that it runs")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    options = parser.parse_args(argv)
    options.seconds = (10 if options.quick else 300) if options.seconds is None else options.seconds
    options.steps = (2 if options.quick else 120) if options.steps is None else options.steps
    options.seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    options.vq_steps = 3 if options.quick else 150
    for name, least in (("seconds", 10), ("steps", 1), ("seeds", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)} and must be at least {least}")
    return options


def run(options: argparse.Namespace) -> int:
    """The whole experiment; returns the exit status."""
    if not options.no_plot:
        figure_class()
    make_folder(options.out)
    speech = has_espeak() and not options.vowels
    print(f"sound: {'espeak-ng' if speech else 'synthetic vowels'}")
    progress = Progress("code model", options.seeds * options.steps)
    rows = summary([one_seed(seed, options, speech, progress) for seed in range(options.seeds)])
    checks = conclusions(rows)
    result = {
        "name": NAME,
        "quick": options.quick,
        **facts(),
        "sound": "espeak-ng" if speech else "synthetic vowels",
        "seconds": options.seconds,
        "steps": options.steps,
        "seeds": options.seeds,
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
