# SPDX-License-Identifier: Apache-2.0
"""How many bytes a token of so many bits holds, and what a second model makes of such tokens.

"Training LLMs over Neurally Compressed Text" (arXiv 2404.03626) codes text with a small byte model and an arithmetic
coder, in windows of equal information, and trains a second model on the codewords. This script trains the small model
on the standard library's source text (or takes it from length_extrapolation.py's checkpoint) and measures, on files it
was not trained on:

  plain coding     one arithmetic code for each text, without windows: what the model's knowledge is worth
  greedy           the paper's windows, with the share of them that its own decoder gets wrong
  delay            the paper's lossless variant
  STOP             pycore.EqualInfoWindows
  table            pycore.EqualInfoTable, longest match and optimal parse, with no model at run time

and then trains two small models on equal compute, one on bytes and one on a table's tokens.

    python examples/equal_info.py            # tables, plot and JSON under examples/out/
    python examples/equal_info.py --quick    # the same path in seconds, figures without meaning

It exits with 0 if what is claimed of the codes was seen, with 1 if not, and with 2 after an error.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import Parser, Progress, UserError, facts, figure_class, make_folder, read_corpus, run_main, write
from length_extrapolation import Training, trained_model
from torch import Tensor, nn
from torch.nn import functional

import pycore
from pycore import ops
from pycore.models.bytelm import BOS, Block, Bytelm, BytelmConfig
from pycore.nn.attention import PositionScheme
from pycore.nn.linear import RMSNorm
from pycore.ops.attention_call import AttentionOptions
from pycore.schedules import Causal, Lambda

NAME = "equal_info"
PRECISION = 16  # of the cdf that greedy and delay share codewords out by
WIDTHS = (16, 24, 32, 62)
RULES = ("greedy", "delay", "STOP")
SECOND_LENGTH = 128


class WindowModel:
    """A Bytelm as what `EqualInfoWindows` and `EqualInfoTable` ask; its rows do not depend on the batch."""

    def __init__(self, model: Bytelm) -> None:
        self.model = model
        self.asked = 0

    @torch.no_grad()
    def next_probs(self, prefixes: list[bytes]) -> Tensor:
        self.asked += len(prefixes)
        order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))  # little padding
        probs = torch.empty(len(prefixes), 256)
        for begin in range(0, len(order), 512):
            part = order[begin : begin + 512]
            longest = len(prefixes[part[-1]])
            tokens = torch.tensor([[BOS, *prefixes[i], *([0] * (longest - len(prefixes[i])))] for i in part])
            last = torch.tensor([len(prefixes[i]) for i in part])
            schedule = Lambda(4, 128) if longest >= 128 else Causal()
            logits = self.model(tokens, schedule=schedule)[torch.arange(len(part)), last]
            probs[part] = logits[:, :256].softmax(-1)
        return probs


# ---- the paper's windows ---------------------------------------------------------------------------------------------


def codeword(low: int, width: int, scale: int, bits: int) -> int | None:
    """The shortest bit string whose dyadic interval lies in [low, low + width) of 2^scale, padded with zeros to `bits`;
    None if it has more bits than that.
    """
    for length in range(max(0, scale - width.bit_length()), bits + 1):
        step = scale - length
        code = -(-low >> step) if step >= 0 else low << -step
        if (code + 1) << max(step, 0) <= (low + width) << max(-step, 0):
            return code << bits - length
    return None


def paper_windows(texts: list[bytes], model: WindowModel, bits: int, rule: str) -> tuple[list[list[int]], int, int]:
    """Windows by one of the paper's rules: their lengths in each text, how many were judged, how many decode wrongly.

    The last window of a text, which ends because the text does, is not judged. Delay's windows decode by construction:
    no shorter text has their codeword.
    """
    lengths: list[list[int]] = [[] for _ in texts]
    start = [0] * len(texts)
    low, width, codes = [0] * len(texts), [1] * len(texts), [[] for _ in texts]  # type: ignore[var-annotated]
    windows, wrong = 0, 0
    active = [i for i, text in enumerate(texts) if text]
    while active:
        prefixes = [texts[i][start[i] : start[i] + len(codes[i])] for i in active]
        cdf = ops.quantize_cdf(model.next_probs(prefixes), precision=PRECISION).tolist()
        for i, row in zip(active, cdf, strict=True):
            n = len(codes[i])
            byte = texts[i][start[i] + n]
            # The interval is exact: [low, low + width) of 2^(PRECISION n).
            inside = (low[i] << PRECISION) + width[i] * row[byte], width[i] * (row[byte + 1] - row[byte])
            code = codeword(*inside, PRECISION * (n + 1), bits)
            if code is not None:
                low[i], width[i] = inside
                codes[i].append(code)
                if start[i] + len(codes[i]) < len(texts[i]):
                    continue
                kept = len(codes[i])
            else:
                kept = n
                windows += 1
                # The decoder takes the longest text with this codeword: one byte more is too many.
                point = codes[i][-1]
                scale, more = PRECISION * (n + 1), 0
                for more in range(256):
                    edge = (low[i] << PRECISION) + width[i] * row[more + 1]
                    if point << max(scale - bits, 0) < edge << max(bits - scale, 0):
                        break
                other = (low[i] << PRECISION) + width[i] * row[more], width[i] * (row[more + 1] - row[more])
                wrong += codeword(*other, scale, bits) == point
                if rule == "delay":  # the longest text whose codeword no shorter one has
                    kept = max(k for k in range(1, n + 1) if codes[i][k - 1] not in codes[i][: k - 1])
            lengths[i].append(kept)
            start[i] += kept
            low[i], width[i], codes[i] = 0, 1, []
        active = [i for i in active if start[i] < len(texts[i])]
    return lengths, windows, wrong if rule == "greedy" else 0


# ---- measurements ----------------------------------------------------------------------------------------------------


def pieces_of(held_out: list[bytes], count: int, size: int) -> list[bytes]:
    """`count` pieces of `size` bytes, spread evenly over the held-out files."""
    pieces = [data[at : at + size] for data in held_out for at in range(0, len(data) - size + 1, size)]
    if count > len(pieces):
        raise UserError(f"--pieces is {count} and must be at most {len(pieces)}, what the held-out files have")
    return [pieces[i * len(pieces) // count] for i in range(count)]


@torch.no_grad()
def plain_bits(model: Bytelm, texts: list[bytes]) -> float:
    """Bits a byte of one arithmetic code for each text, coded and decoded."""
    symbols = torch.tensor([list(text) for text in texts])
    tokens = torch.cat([torch.full((len(texts), 1), BOS), symbols[:, :-1]], dim=1)
    logits = model(tokens, schedule=Lambda(4, 128))[..., :256]
    streams = ops.ac_encode_logits(symbols, logits)
    if not torch.equal(ops.ac_decode_logits(streams, logits), symbols):
        raise AssertionError("a stream did not decode to what was coded")
    payload = streams.nbytes - 32 * len(texts)  # the frames are the same for a text of any length
    return 8 * payload / symbols.numel()


def code_rows(model: WindowModel, bits_per_byte: float, texts: list[bytes]) -> list[dict[str, Any]]:
    """Bytes a token for every rule and width."""
    total = sum(map(len, texts))
    rows = [{"rule": "plain coding", "bits": w, "bytes_per_token": w / bits_per_byte, "wrong": 0.0} for w in WIDTHS]
    progress = Progress("windows", len(RULES) * len(WIDTHS))
    for rule in RULES:
        for width in WIDTHS:
            if rule == "STOP":
                windows = pycore.EqualInfoWindows(width)
                tokens = windows.encode_batch(texts, model)
                count = sum(map(len, tokens))
                back = [windows.decode(each, model) for each in tokens]
                wrong = sum(a != b for a, b in zip(back, texts, strict=True)) / len(texts)
            else:
                lengths, judged, bad = paper_windows(texts, model, width, rule)
                count, wrong = sum(map(len, lengths)), bad / max(judged, 1)
            rows.append({"rule": rule, "bits": width, "bytes_per_token": total / count, "wrong": wrong})
            progress.update(len(rows) - len(WIDTHS), f"{rule} {width}")
    return rows


def table_rows(table: pycore.EqualInfoTable, texts: list[bytes]) -> list[dict[str, Any]]:
    """Bytes a token of both parses."""
    rows = []
    for parse in ("longest", "optimal"):
        tokens = [table.encode(text, parse=parse) for text in texts]
        wrong = sum(table.decode(each) != text for each, text in zip(tokens, texts, strict=True)) / len(texts)
        size = sum(map(len, texts)) / sum(map(len, tokens))
        rows.append({"rule": f"table, {parse}", "bits": table.bits, "bytes_per_token": size, "wrong": wrong})
    return rows


# ---- the second model ------------------------------------------------------------------------------------------------


class TokenModel(nn.Module):
    """Bytelm's blocks with a vocabulary of any size; the last token is the start of a text."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        config = BytelmConfig()
        self.vocabulary = vocabulary + 1
        self.embedding = nn.Parameter(torch.randn(self.vocabulary, config.dim) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.positions = PositionScheme("rope", config.heads, config.head_dim, max_distance=SECOND_LENGTH)

    @property
    def flops(self) -> int:
        """Of one token forward, without attention's scores: two for each weight of each product."""
        return 2 * sum(p.numel() for p in self.parameters())

    def loss(self, tokens: Tensor, target: Tensor) -> Tensor:
        options = AttentionOptions(**self.positions())
        x = functional.embedding(tokens, self.embedding)
        for block in self.blocks:
            x = block(x, options)
        return ops.linear_cross_entropy(self.norm(x), self.embedding, target)


def batches(tokens: Tensor, count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    reach = torch.arange(SECOND_LENGTH)
    for _ in range(count):
        yield tokens[torch.randint(len(tokens) - SECOND_LENGTH + 1, (size, 1), generator=generator) + reach]


def token_loss(model: TokenModel, target: Tensor) -> Tensor:
    start = torch.full((len(target), 1), model.vocabulary - 1)
    return model.loss(torch.cat([start, target[:, :-1]], dim=1), target)


def second_model(
    label: str, table: pycore.EqualInfoTable, text: bytes, unseen: bytes, compute: float, batch: int, seed: int
) -> dict[str, Any]:
    """Trains on a table's tokens with so many floating-point operations; bits a byte on text that was not seen."""
    torch.manual_seed(seed)
    model = TokenModel(len(table))
    steps = max(2, round(compute / (3 * model.flops * batch * SECOND_LENGTH)))
    tokens, held = table.encode(text), table.encode(unseen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    progress, started = Progress(f"second model on {label}", steps), time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    for step, target in enumerate(batches(tokens, steps, batch, generator)):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = token_loss(model, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress.update(step + 1, f"{loss.item() / math.log(2):.2f} bits/token")
    seconds = time.monotonic() - started
    windows = held[: len(held) // SECOND_LENGTH * SECOND_LENGTH].view(-1, SECOND_LENGTH)
    with torch.no_grad():
        losses = [token_loss(model, part).item() * part.numel() for part in windows.split(batch)]
    size = len(table.decode(windows.flatten()))
    return {
        "on": label, "vocabulary": len(table), "steps": steps, "seconds": seconds, "train_flops": compute,
        "bytes_per_token": len(unseen) / len(held), "bits_per_byte": sum(losses) / math.log(2) / size,
    }  # fmt: skip


# ---- the report ------------------------------------------------------------------------------------------------------


def conclusions(rows: list[dict[str, Any]], table_bits: int) -> list[tuple[bool, str]]:
    """What is claimed of the codes, each with its figures."""
    size = {(row["rule"], row["bits"]): row["bytes_per_token"] for row in rows}
    wrong = {(row["rule"], row["bits"]): row["wrong"] for row in rows}
    stop, greedy, delay = (size[rule, 16] for rule in ("STOP", "greedy", "delay"))
    table = size["table, longest", table_bits]
    lossless = [key for key in wrong if key[0] != "greedy"]
    return [
        (not any(wrong[key] for key in lossless), "every code but the greedy windows decodes to what was coded"),
        (
            wrong["greedy", 16] > 0.05,
            f"the greedy windows of 16 bits do not: {100 * wrong['greedy', 16]:.1f} % are wrong",
        ),
        (stop > greedy > delay, f"bytes a token at 16 bits: STOP {stop:.2f}, greedy {greedy:.2f}, delay {delay:.2f}"),
        (table > greedy, f"the table holds {table:.2f} bytes a token, without a model at run time"),
    ]


def report(rows: list[dict[str, Any]], second: list[dict[str, Any]]) -> str:
    """Both results as text."""
    lines = [
        f"{'bytes per token':<18}" + "".join(f"{f'{width} bits':>10}" for width in WIDTHS) + f"{'wrong at 16':>13}"
    ]
    for rule in ("plain coding", *RULES):
        mine = {row["bits"]: row for row in rows if row["rule"] == rule}
        sizes = "".join(f"{mine[width]['bytes_per_token']:>10.2f}" for width in WIDTHS)
        lines.append(f"{rule:<18}{sizes}{100 * mine[16]['wrong']:>11.1f} %")
    for row in rows:
        if row["rule"].startswith("table"):
            lines.append(f"{row['rule']:<18}{row['bytes_per_token']:>10.2f}  ({row['bits']} bits)")
    lines.append(f"\n{'second model on':<18}{'vocabulary':>11}{'steps':>8}{'bytes/token':>13}{'bits per byte':>15}")
    for row in second:
        lines.append(
            f"{row['on']:<18}{row['vocabulary']:>11,}{row['steps']:>8}{row['bytes_per_token']:>13.2f}"
            f"{row['bits_per_byte']:>15.3f}"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes a token against its bits, one line for each rule."""
    figure = figure_class()(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = {"plain coding": ("#7f7f7f", ":"), "greedy": ("#b2182b", "--"), "delay": ("#d6813a", "-"),
              "STOP": ("#1b4f8a", "-")}  # fmt: skip
    for rule, (color, line) in styles.items():
        sizes = [row["bytes_per_token"] for row in rows if row["rule"] == rule]
        label = f"{rule} (not decodable)" if rule == "greedy" else rule
        axes.plot(WIDTHS, sizes, color=color, linestyle=line, marker="o", linewidth=2, label=label)
    for row in rows:
        if row["rule"] == "table, longest":
            axes.plot([row["bits"]], [row["bytes_per_token"]], "D", color="#2f7d4f", label="table, longest match")
    axes.set_xticks(WIDTHS)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bits of a token")
    axes.set_ylabel("bytes of text a token holds")
    axes.set_title("Windows of equal information on the standard library's source")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    out = Path(__file__).resolve().parent / "out"
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="folder for the plot and the JSON (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps of the small model (default: 1500)")
    parser.add_argument("--pieces", type=int, help="texts to code (default: 32)")
    parser.add_argument("--second-steps", type=int, help="steps of the second model on bytes (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the second models")
    parser.add_argument("--quick", action="store_true", help="hardly trained models and two short texts")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    options = parser.parse_args(argv)
    options.steps = (4 if options.quick else 1500) if options.steps is None else options.steps
    options.pieces = (2 if options.quick else 32) if options.pieces is None else options.pieces
    options.second_steps = (2 if options.quick else 600) if options.second_steps is None else options.second_steps
    for name in ("steps", "pieces", "second_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)} and must be at least 1")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed is {options.seed} and must be in 0..2^63-1")
    return options


def run(options: argparse.Namespace) -> int:
    """The whole experiment; returns the exit status."""
    if not options.no_plot:
        figure_class()
    make_folder(options.out)
    text, held_out, fingerprint = read_corpus()
    texts = pieces_of(held_out, options.pieces, 64 if options.quick else 768)
    checkpoint = options.out / ("bytelm_quick.pt" if options.quick else "bytelm.pt")
    training = Training(steps=options.steps, seed=0)
    bytelm, trained = trained_model(checkpoint, text, fingerprint, training)
    model = WindowModel(bytelm)
    rows = code_rows(model, plain_bits(bytelm, texts), texts)
    table_bits = 9 if options.quick else 16
    started = time.monotonic()
    table = pycore.EqualInfoTable.build(model, table_bits, progress=True)
    build_seconds = time.monotonic() - started
    rows += table_rows(table, texts)
    small, alphabet = (pycore.EqualInfoTable.build(model, bits) for bits in (9 if options.quick else 12, 8))
    batch = 2 if options.quick else 16
    compute = 3.0 * TokenModel(256).flops * batch * SECOND_LENGTH * options.second_steps
    unseen = b"".join(held_out)[: 4096 if options.quick else 400_000]
    second = [
        second_model("bytes", alphabet, text, unseen, compute, batch, options.seed),
        second_model(f"{small.bits}-bit tokens", small, text, unseen, compute, batch, options.seed),
    ]
    checks = conclusions(rows, table_bits)
    result = {
        "name": NAME, "quick": options.quick, **facts(),
        "text": {"train_bytes": len(text), "coded_bytes": sum(map(len, texts)), "sha256": fingerprint},
        "training": {"steps": options.steps, **trained},
        "table": {"bits": table_bits, "seconds": build_seconds}, "rows": rows, "second": second,
        "checks": [{"holds": holds, "claim": claim} for holds, claim in checks],
    }  # fmt: skip
    stem = options.out / (f"{NAME}_quick" if options.quick else NAME)
    print(report(rows, second))
    write(result, stem, None if options.no_plot else lambda path: plot(rows, path))
    for holds, claim in checks:
        print(f"{'yes' if holds else 'NO':>4}  {claim}")
    if options.quick:
        print("--quick: the models are hardly trained, so these figures mean nothing")
        return 0
    return 0 if all(holds for holds, _ in checks) else 1


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_main(NAME, lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
