# SPDX-License-Identifier: Apache-2.0
"""How many bytes does an image need to be read, not looked at?

scikit-learn's digits go through ``pycore.models.codec.Codec`` as frames of 64 pixels: codes of the first 1 to 8
codebooks, bytes of the arithmetic coder, and back. The decoded test images are classified by their three nearest
neighbours among the undecoded training images. Bytes an image against accuracy is the rate-task curve of "Machine
Perceptual Quality"; the signal-to-noise ratio goes on rising where the accuracy has long been level.

    python examples/rate_task.py            # table, plot and JSON under examples/out/
    python examples/rate_task.py --quick    # the same path in seconds, figures without meaning
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from class_incremental import CLASSES, PIXELS, digits, split
from common import Parser, Progress, facts, figure_class, make_folder, run_main, write
from speech_codec import learn_code_model, learn_codebooks
from torch import Tensor

from pycore import ops
from pycore.models.codec import Codec, CodecConfig

NAME = "rate_task"
CODEBOOKS, CODES, NEIGHBOURS = 8, 16, 3
PIXEL_BITS = 5  # 17 levels, in a whole number of bits
CHECKED = 40  # images whose bytes are decoded
FRAME_BYTES = 32  # of a stream, however many images are in it


def nearest_classes(images: Tensor, known: Tensor, classes: Tensor) -> Tensor:
    """The class that most of the nearest known images have."""
    _, rows = ops.pairwise_topk(images, known, NEIGHBOURS, score="euclidean")
    votes = torch.zeros(len(images), CLASSES)
    weights = torch.tensor([1.0 + 0.1 / (place + 1) for place in range(NEIGHBOURS)])  # the nearest decides a tie
    votes.scatter_add_(1, classes[rows], weights.expand(len(images), -1))
    return votes.max(1).indices


def one_seed(seed: int, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Rates, accuracies and SNR for 1 to CODEBOOKS codebooks."""
    pixels, classes = digits()
    train, test = split(classes, seed)
    middle = pixels[train].mean(0)
    x, held = pixels[train] - middle, pixels[test] - middle
    torch.manual_seed(seed)
    codec = Codec(CodecConfig(hop=PIXELS, quantizers=CODEBOOKS, codes=CODES, masked=0, layers=1, dim=64))
    learn_codebooks(codec, x, options.vq_steps, seed)
    codes = codec.quantizer.encode(x.unsqueeze(0))[0]
    learn_code_model(codec, codes, options.steps, seed, progress, seed * options.steps, length=32, fewer=True)
    result: dict[str, Any] = {"bytes": [], "accuracy": [], "snr": [], "decodes": True}
    truth = classes[test]
    result["undecoded"] = float((nearest_classes(held, x, classes[train]) == truth).float().mean())
    for n in range(1, CODEBOOKS + 1):
        of_test = codec.quantizer.encode(held.unsqueeze(0), num_quantizers=n)[0]
        data = codec.to_bytes(of_test)
        some = of_test[:CHECKED]  # decoding goes code by code
        result["decodes"] &= bool(torch.equal(codec.from_bytes(codec.to_bytes(some), quantizers=n), some))
        decoded = codec.quantizer.decode(of_test)
        error = (decoded - held).square().sum() / held.square().sum()
        result["bytes"].append((len(data) - FRAME_BYTES) / len(held))
        result["snr"].append(-10 * math.log10(float(error)))
        result["accuracy"].append(float((nearest_classes(decoded, x, classes[train]) == truth).float().mean()))
    return result


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds."""
    means = {
        name: [mean(run[name][n] for run in runs) for n in range(CODEBOOKS)] for name in ("bytes", "accuracy", "snr")
    }
    spread = [stdev(run["accuracy"][n] for run in runs) if len(runs) > 1 else 0.0 for n in range(CODEBOOKS)]
    return {
        **means,
        "accuracy_spread": spread,
        "undecoded": mean(run["undecoded"] for run in runs),
        "decodes": all(run["decodes"] for run in runs),
    }


def conclusions(rates: dict[str, Any]) -> list[tuple[bool, str]]:
    """What the curve is supposed to look like."""
    lost = rates["undecoded"] - rates["accuracy"][-1]
    fixed = CODEBOOKS * math.log2(CODES) / 8
    early, late = (
        {name: rates[name][last] - rates[name][first] for name in ("accuracy", "snr")}
        for first, last in ((0, CODEBOOKS // 2 - 1), (CODEBOOKS // 2 - 1, CODEBOOKS - 1))
    )
    return [
        (lost < 0.05, f"eight codebooks lose less than 0.05 of the accuracy of the images themselves: {lost:+.3f}"),
        (
            late["accuracy"] / early["accuracy"] < late["snr"] / early["snr"],
            f"accuracy levels off before the SNR does: the last four codebooks bring {late['accuracy']:+.3f} after "
            f"{early['accuracy']:+.3f}, and {late['snr']:+.1f} dB after {early['snr']:+.1f} dB",
        ),
        (rates["bytes"][-1] < fixed, f"the code model saves {1 - rates['bytes'][-1] / fixed:.0%} of four bits a code"),
        (rates["decodes"], "the bytes decode to the codes"),
    ]


def table(rates: dict[str, Any]) -> str:
    """A line for each number of codebooks."""
    lines = [f"{'codebooks':<12}{'bytes an image':>16}{'SNR, dB':>10}{'accuracy':>18}"]
    for n in range(CODEBOOKS):
        accuracy = f"{rates['accuracy'][n]:.3f} ± {rates['accuracy_spread'][n]:.3f}"
        lines.append(f"{n + 1:<12}{rates['bytes'][n]:>16.2f}{rates['snr'][n]:>10.2f}{accuracy:>18}")
    lines.append(f"{'the images':<12}{PIXELS * PIXEL_BITS / 8:>16.2f}{'':>10}{rates['undecoded']:>10.3f}")
    return "\n".join(lines)


def plot(rates: dict[str, Any], path: Path) -> None:
    """Accuracy and SNR against bytes an image."""
    figure = figure_class()(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        rates["bytes"], rates["accuracy"], yerr=rates["accuracy_spread"], color="#1b4f8a", marker="D", capsize=3
    )
    axes.axhline(rates["undecoded"], color="#1b4f8a", linewidth=0.8, linestyle=":")
    axes.annotate("undecoded images", (rates["bytes"][0], rates["undecoded"]), va="bottom")
    axes.set_xlabel("bytes an image (1 to 8 codebooks)")
    axes.set_ylabel("accuracy of the nearest neighbours", color="#1b4f8a")
    axes.set_xlim(left=0)
    other = axes.twinx()
    other.plot(rates["bytes"], rates["snr"], color="#d6813a", marker="o", linestyle="--")
    other.set_ylabel("SNR, dB", color="#d6813a")
    axes.set_title("Digits through a codec: bytes against what can be read")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    out = Path(__file__).resolve().parent / "out"
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="folder for the plot and the JSON (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps of the code model (default: 60)")
    parser.add_argument("--seeds", type=int, help="how often everything is repeated (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a few steps: only to see that it runs")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    options = parser.parse_args(argv)
    options.steps = (2 if options.quick else 60) if options.steps is None else options.steps
    options.seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    options.vq_steps = 2 if options.quick else 100
    for name in ("steps", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)} and must be at least 1")
    return options


def run(options: argparse.Namespace) -> int:
    """The whole experiment; returns the exit status."""
    if not options.no_plot:
        figure_class()
    make_folder(options.out)
    progress = Progress("code model", options.seeds * options.steps)
    rates = summary([one_seed(seed, options, progress) for seed in range(options.seeds)])
    checks = conclusions(rates)
    result = {
        "name": NAME,
        "quick": options.quick,
        **facts(),
        "seeds": options.seeds,
        "steps": options.steps,
        "codes": CODES,
        **rates,
        "checks": [{"holds": holds, "claim": claim} for holds, claim in checks],
    }
    print(table(rates))
    stem = options.out / (f"{NAME}_quick" if options.quick else NAME)
    write(result, stem, None if options.no_plot else lambda path: plot(rates, path))
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
