# SPDX-License-Identifier: Apache-2.0
"""A model reads twice as far as it was trained for: SmolLM2-135M over 16,384 tokens of Python sources.

It was trained on texts of up to 8192 tokens. Measured are the negative log-likelihood by position, the time of the pass
and the memory it needs, for the model as it is (SDPA and transformers' DynamicCache), for a window alone, and for Λ
attention with 4 sinks, with and without its limit of distances; and, to compare with, for the model as it is when it
begins anew in the middle, so that it never reads past its length. Then what sinks and a window cannot do: numbers named
early in the text are asked for at its end, of the whole cache, of sinks and window, and of these with the 8 middle
tokens a step that score highest (`middle_topk`).

    python examples/smollm2.py                  # fetches the model, once
    python examples/past_its_length.py          # table, plot and JSON under examples/out/; half an hour on two cores
    python examples/past_its_length.py --quick  # a random model in seconds, figures without meaning

Each part runs in a process of its own and is kept in past_its_length_parts.json, so that a run that was stopped goes on
where it was; `--only TEXT` runs the parts whose name holds the text, and `--only needle` puts what it finds into a
result that is there. Past its length means the last quarter, and a rise
is against the model that began anew. It exits with 0 if the model's own loss rises there by more than 0.8 nats and that
of Λ by 0.1 at most more than a window costs before, with 1 if not, and with 2 after an error.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import smollm2
import torch
from common import Parser, Progress, UserError, facts, figure_class, make_folder, run_main, write

from pycore.integrations.transformers import LambdaCache, register

NAME = "past_its_length"
SINKS = 4
TOPK = 8
TEXTS = 2
RISE, LEVEL = 0.8, 0.1  # nats


class Size:
    """How much is read: the real model's figures, and those of --quick."""

    def __init__(self, quick: bool) -> None:
        self.trained, self.tokens, self.chunk = (256, 512, 64) if quick else (8192, 16384, 512)
        self.windows = (32, 64) if quick else (1024, 4096)
        self.bucket = self.tokens // 16
        self.needle_lengths = (256,) if quick else (2048, 6144)
        self.needles = 4 if quick else 12

    def methods(self) -> dict[str, dict[str, Any] | None]:
        """What reads the text, by name: the arguments of `register`, None for the model's own attention."""
        small, large = self.windows
        return {
            "plain": None,
            f"window {small}": {"sink_size": 0, "window_size": small, "limit_distances": False},
            f"Λ {small}": {"sink_size": SINKS, "window_size": small},
            f"Λ {large}": {"sink_size": SINKS, "window_size": large},
            f"Λ {small}, no limit": {"sink_size": SINKS, "window_size": small, "limit_distances": False},
        }

    def parts(self) -> list[str]:
        """The names of all pieces of work, those whose time counts first."""
        read = [f"read/{method}/{text}" for text in range(TEXTS) for method in (*self.methods(), "anew")]
        return read + [f"needle/{length}" for length in self.needle_lengths]


def cache_for(model: Any, method: dict[str, Any] | None) -> Any:
    """Chooses the model's attention and returns the cache that goes with it."""
    from transformers import DynamicCache

    if method is None:
        model.set_attn_implementation("sdpa")
        return DynamicCache(config=model.config)
    register(NAME, **method)
    model.set_attn_implementation(NAME)
    return LambdaCache(method["sink_size"], method["window_size"])


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, method: dict[str, Any] | None, size: Size, label: str) -> dict[str, Any]:
    """The mean loss of each bucket of positions, the seconds of the pass, and what it held."""
    model(ids[:, : size.chunk], use_cache=False)  # what the first call makes belongs to no pass
    cache = cache_for(model, method)
    nll = torch.empty(ids.shape[1] - 1)
    starts = range(0, ids.shape[1], size.chunk)
    progress = Progress(label, len(starts))
    with smollm2.Peak() as peak:
        began = time.perf_counter()
        for number, at in enumerate(starts):
            logits = model(ids[:, at : at + size.chunk], past_key_values=cache).logits[0]
            targets = ids[0, at + 1 : at + size.chunk + 1]
            nll[at : at + len(targets)] = torch.nn.functional.cross_entropy(
                logits[: len(targets)], targets, reduction="none"
            )
            progress.update(number + 1)
        seconds = time.perf_counter() - began
    return {
        "nll": [round(x.mean().item(), 4) for x in nll.split(size.bucket)],
        "seconds": round(seconds, 2),
        "peak_bytes": peak.bytes,
        "cache_bytes": smollm2.cache_bytes(cache),
    }


@torch.no_grad()
def needles(model: Any, encode: Callable[[str], list[int]], length: int, size: Size, quick: bool) -> dict[str, Any]:
    """How many of the numbers that stand in a text of `length` tokens are found again, by each way of reading.

    All stand in one text, evenly spread, each under a name of its own; the cache after the text serves every question,
    because what a question adds is taken back. A number counts if each of its tokens is the most likely one.
    """
    chance = random.Random(length)
    ids = smollm2.texts(encode, TEXTS, size.tokens)[0][0].tolist() if not quick else list(range(256)) * 8
    names = ["Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Delhi", "Rome", "Seoul", "Minsk", "Dakar", "Hanoi", "Paris"]
    numbers = {name: str(chance.randrange(10_000, 100_000)) for name in names[: size.needles]}
    piece = length // len(numbers)
    text: list[int] = []
    place = {}
    for i, (name, number) in enumerate(numbers.items()):
        needle = encode(f"\n# The secret number of {name} is {number}.\n")
        half = (piece - len(needle)) // 2
        place[name] = len(text) + half
        text += ids[i * piece : i * piece + half] + needle + ids[i * piece + half : (i + 1) * piece - len(needle)]
    from transformers import DynamicCache

    window = size.windows[0]
    found: dict[str, Any] = {}
    for way, topk in (("plain", None), (f"Λ {window}", 0), (f"Λ {window}, middle {TOPK}", TOPK)):
        if topk is None:
            model.set_attn_implementation("sdpa")
        else:
            register(NAME, sink_size=SINKS, window_size=window, middle_topk=topk)
            model.set_attn_implementation(NAME)
        if not topk:  # a prompt is read in the same way with and without middle tokens
            cache = DynamicCache(config=model.config)
            progress = Progress(f"{length} tokens, {way}", len(text))
            for at in range(0, len(text), size.chunk):
                model(torch.tensor([text[at : at + size.chunk]]), past_key_values=cache, logits_to_keep=1)
                progress.update(min(at + size.chunk, len(text)))
        found[way] = {}
        for name, number in numbers.items():
            question = encode(f"\n# The secret number of {name} is")
            answer = encode(f" {number}")
            right = True
            asked = question + answer
            # A token at a time, as in decoding: every one of the question looks for its middle tokens.
            for i, token in enumerate(asked[:-1]):
                logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
                if i + 1 >= len(question) and logits.argmax().item() != asked[i + 1]:
                    right = False
                    break
            cache.crop(len(text) - cache.get_seq_length())  # as if it had not been asked
            found[way][name] = right
    return {"tokens": len(text), "depth": place, "found": found}


def run_part(part: str, quick: bool) -> dict[str, Any]:
    """One piece of work."""
    size = Size(quick)
    if quick:
        model, encode = smollm2.quick_model()
    else:
        model, tokenizer = smollm2.load()
        encode = smollm2.encoder(tokenizer)
    kind, _, rest = part.partition("/")
    if kind == "needle":
        result = needles(model, encode, int(rest), size, quick)
    else:
        method, _, number = rest.rpartition("/")
        if quick:
            torch.manual_seed(int(number))
            ids = torch.randint(256, (1, size.tokens))
        else:
            ids = smollm2.texts(encode, TEXTS, size.tokens)[int(number)]
        ids = ids[:, size.tokens // 2 :] if method == "anew" else ids
        result = read(model, ids, size.methods().get(method), size, f"{method}, text {number}")
    return {**facts(), **result}


def rows(parts: dict[str, Any], size: Size) -> list[dict[str, Any]]:
    """A row for each method: means over the texts, and the time and memory of the first."""
    quarter = size.tokens // 4 // size.bucket
    half: list[float | None] = [None] * (2 * quarter)
    anew = [half + parts[f"read/anew/{text}"]["nll"] for text in range(TEXTS)]
    plain = [parts[f"read/plain/{text}"]["nll"] for text in range(TEXTS)]
    made = []
    for method in (*size.methods(), "anew"):
        texts = [parts[f"read/{method}/{text}"] for text in range(TEXTS)]
        losses = anew if method == "anew" else [text["nll"] for text in texts]
        made.append({
            "name": f"plain, begun at {size.tokens // 2:,}" if method == "anew" else method,
            "nll": [None if None in x else round(statistics.fmean(x), 4) for x in zip(*losses, strict=True)],
            "spread": [None if None in x else round(statistics.stdev(x), 4) for x in zip(*losses, strict=True)],
            # Text by text: what the method loses to the plain model within its length, and past it.
            "before": [] if method == "anew" else _apart(losses, plain, quarter, 2 * quarter),
            "behind": [] if method == "anew" else _apart(losses, anew, 3 * quarter, 4 * quarter),
            **{key: texts[0][key] for key in ("seconds", "peak_bytes", "cache_bytes")},
        })  # fmt: skip
    return made


def _apart(losses: list[Any], others: list[Any], start: int, stop: int) -> list[float]:
    means = ([statistics.fmean(x[start:stop]) for x in each] for each in (losses, others))
    return [round(a - b, 4) for a, b in zip(*means, strict=True)]


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown, two buckets a column."""
    edges = [2 * (i + 1) * result["bucket"] for i in range(len(result["rows"][0]["nll"]) // 2)]
    head = ["nats a token, to position", *(f"{edge:,}" for edge in edges), "seconds", "MiB at most", "MiB of cache"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in result["rows"]:
        pairs = zip(row["nll"][::2], row["nll"][1::2], strict=True)
        loss = ["" if a is None else f"{(a + b) / 2:.2f}" for a, b in pairs]
        rest = [f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 2**20:.0f}", f"{row['cache_bytes'] / 2**20:.0f}"]
        whole = row["nll"][0] is not None
        lines.append("| " + " | ".join([row["name"], *loss, *(rest if whole else [""] * 3)]) + " |")
    return "\n".join(lines)


def needle_table(result: dict[str, Any]) -> str:
    """How many numbers were found, as Markdown."""
    lengths = [needle["tokens"] for needle in result["needles"]]
    head = ["numbers found, tokens read", *(f"{length:,}" for length in lengths)]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * len(lengths) + "|"]
    for way in result["needles"][0]["found"]:
        found = [f"{sum(n['found'][way].values())} of {len(n['found'][way])}" for n in result["needles"]]
        lines.append("| " + " | ".join([way, *found]) + " |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Loss against position; bands are a standard deviation over the texts."""
    figure = figure_class()(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colors = ["#b2182b", "#888888", "#1b4f8a", "#2a9d6f", "#c08a1e", "#b2182b"]
    for row, color in zip(result["rows"], colors, strict=True):
        known = [(i, x, s) for i, (x, s) in enumerate(zip(row["nll"], row["spread"], strict=True)) if x is not None]
        middle = [(i + 0.5) * result["bucket"] for i, _, _ in known]
        style = "o-" if len(known) == len(row["nll"]) else "o:"
        axes.plot(middle, [x for _, x, _ in known], style, markersize=3, color=color, label=row["name"])
        low, high = ([x + sign * s for _, x, s in known] for sign in (-1, 1))
        axes.fill_between(middle, low, high, color=color, alpha=0.1, linewidth=0)
    axes.axvline(result["trained"], color="black", linewidth=1, linestyle=":")
    axes.annotate("trained to here", (result["trained"], axes.get_ylim()[1]), xytext=(4, -12),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_xlabel("position, tokens")
    axes.set_ylabel("negative log-likelihood, nats a token")
    axes.set_title("SmolLM2-135M on Python sources")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    out = Path(__file__).resolve().parent / "out"
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="folder for the plot and the JSON (default: %(default)s)")
    parser.add_argument("--only", default="", help="run the parts whose name holds this")
    parser.add_argument("--anew", action="store_true", help="run also parts that have been run")
    parser.add_argument("--quick", action="store_true", help="a random model and 512 tokens")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of a result that was written")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # one part, in this process, its result on stdout
    return parser.parse_args(argv)


def run_parts(options: argparse.Namespace, kept: Path) -> dict[str, Any]:
    """Runs what has not been run, keeping each part as it comes."""
    parts: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for part in Size(options.quick).parts():
        if options.only not in part or (part in parts and not options.anew):
            continue
        if options.quick:  # so small that its memory means nothing, and a process of its own would be most of the time
            parts[part] = run_part(part, True)
        else:
            done = subprocess.run(
                [sys.executable, __file__, "--part", part], stdout=subprocess.PIPE, text=True, check=False
            )
            if done.returncode:
                raise UserError(f"part {part} ended with status {done.returncode}")
            parts[part] = json.loads(done.stdout)
        kept.write_text(json.dumps(parts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return parts


def needles_of(part: dict[str, Any]) -> dict[str, Any]:
    """What a result holds of such a part."""
    return {key: part[key] for key in ("tokens", "depth", "found")}


def join_needles(path: Path, parts: dict[str, Any]) -> bool:
    """Puts numbers that were looked for later into a whole result; whether there is one, and anything to put in."""
    new = [part for name, part in parts.items() if name.startswith("needle/")]
    if not new or not path.is_file():
        return False
    result = json.loads(path.read_text(encoding="utf-8"))
    found = {needle["tokens"]: needle for needle in result["needles"]}
    found |= {part["tokens"]: needles_of(part) for part in new}
    result["needles"] = [found[tokens] for tokens in sorted(found)]
    result["commits"] = sorted({*result["commits"], *(str(part["commit"]) for part in new)})
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return True


def run(options: argparse.Namespace) -> int:
    """The whole experiment; returns the exit status."""
    if options.part:
        print(json.dumps(run_part(options.part, options.quick)))
        return 0
    if options.show:
        try:
            kept_result = json.loads(options.show.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--show {options.show} is not a result of this example") from error
        print(table(kept_result) + "\n\n" + needle_table(kept_result))
        return 0
    if not options.quick and not smollm2.present():
        raise UserError(smollm2.missing())
    if not options.no_plot:
        figure_class()
    make_folder(options.out)
    size = Size(options.quick)
    stem = options.out / (f"{NAME}_quick" if options.quick else NAME)
    kept = stem.with_name(stem.name + "_parts.json")
    if options.quick:
        kept.unlink(missing_ok=True)
    parts = run_parts(options, kept)
    missing = [part for part in size.parts() if part not in parts]
    if missing:
        print(f"{len(missing)} parts are left: {', '.join(missing)}")
        if join_needles(stem.with_suffix(".json"), parts):
            print(f"the numbers found were put into {stem.with_suffix('.json')}")
        return 0
    made = rows(parts, size)
    result: dict[str, Any] = {
        "name": NAME, "quick": options.quick, "commits": sorted({str(part["commit"]) for part in parts.values()}),
        **{key: parts[size.parts()[0]][key] for key in ("date", "machine", "threads", "python", "torch")},
        "model": "random" if options.quick else smollm2.REQUIREMENT, "trained": size.trained, "tokens": size.tokens,
        "chunk": size.chunk, "texts": TEXTS, "bucket": size.bucket, "sinks": SINKS, "rows": made,
        "needles": [needles_of(parts[f"needle/{length}"]) for length in size.needle_lengths],
    }  # fmt: skip
    plain, lam = made[0]["behind"], made[2]
    more = [after - before for after, before in zip(lam["behind"], lam["before"], strict=True)]
    result["held"] = held = min(plain) > RISE and max(more) <= LEVEL
    print(table(result) + "\n\n" + needle_table(result))
    write(result, stem, None if options.no_plot else lambda path: plot(result, path))
    print(f"in the last quarter, text by text, the plain model's loss rises by {_signed(plain)}; what {lam['name']} "
          f"loses to it goes from {_signed(lam['before'])} to {_signed(lam['behind'])}")  # fmt: skip
    if options.quick:
        print("--quick: the model is random, so these figures mean nothing")
        return 0
    return 0 if held else 1


def _signed(values: list[float]) -> str:
    return ", ".join(f"{value:+.2f}" for value in values)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_main(NAME, lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
