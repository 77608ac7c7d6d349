# SPDX-License-Identifier: Apache-2.0
"""What fewer bits for older keys and values cost a language model: bytes, perplexity, and how far its predictions move.

A model of transformers reads held-out text on a full cache and on staircase caches side by side. Each token reads what
it would have read alone, a token at a time, so the figures are those of decoding. Rotations are learned from other
text.

    python examples/kv_staircase.py --model FOLDER     # table, plot and JSON under examples/out/
    python examples/kv_staircase.py --quick            # a random model in seconds, figures without meaning

FOLDER holds a causal model and its tokenizer as `save_pretrained` writes them. It exits with 0 if a staircase that
quantizes nothing predicts what the full cache does, with 1 if not, and with 2 after an error.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from common import Parser, Progress, UserError, facts, figure_class, make_folder, read_corpus, run_main, write

from pycore import Staircase, ops
from pycore.integrations.transformers import StaircaseCache, register

NAME = "kv_staircase"
CHUNK = 256
SAME_KL = 0.01  # nats a token: bfloat16's rounding moves predictions that far at most, quantizing nothing


def ladders(rotations: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Staircase | list[Staircase]]:
    """What is compared, by name."""
    return {
        "16": Staircase((16,)),
        "8": Staircase((16, 8)),
        "4": Staircase((16, 4)),
        "16/8/4": Staircase((16, 8, 4)),
        "16/8/4, rotated": [Staircase((16, 8, 4), key_rotation=k, value_rotation=v) for k, v in rotations],
        "16/8/4/2": Staircase((16, 8, 4, 2)),
        "16/8/4/2, rotated": [Staircase((16, 8, 4, 2), key_rotation=k, value_rotation=v) for k, v in rotations],
        "KIVI 4": Staircase((16, 4), sink_size=0, grid="minmax"),
        "KIVI 2": Staircase((16, 2), sink_size=0, grid="minmax"),
    }


def loaded(folder: Path | None) -> tuple[Any, Any]:
    """The model in bfloat16 and what makes tokens of bytes; without a folder, a random one."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError("it needs transformers; pip install pycore-kernels[transformers]") from error
    if folder is None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2,
        )  # fmt: skip
        return LlamaForCausalLM(config).bfloat16().eval(), lambda text: list(text)
    if not folder.is_dir():
        raise UserError(f"--model is {folder} and must be a folder with a model and its tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder} is not a causal model and its tokenizer: {error}".split("\n")[0]) from error
    return model, lambda text: tokenizer(text.decode("utf-8", "replace"), verbose=False)["input_ids"]


@torch.no_grad()
def learned(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rotations of each layer's keys and values."""
    cache = StaircaseCache(model.config, Staircase((16,)))
    for at in range(0, ids.shape[1], CHUNK):
        model(ids[:, at : at + CHUNK], past_key_values=cache, logits_to_keep=1)
    held = [(layer.store.keys(), layer.store.values()) for layer in cache.layers]
    return [(_axes(keys), _axes(values)) for keys, values in held]


def _axes(x: torch.Tensor) -> torch.Tensor:
    return ops.staircase_rotation(x.float(), method="pca_hadamard")


@torch.no_grad()
def compare(model: Any, ids: torch.Tensor, chosen: dict[str, Any], skipped: int) -> list[dict[str, Any]]:
    """A row for the full cache and each staircase: means over the tokens after the first `skipped`."""
    from transformers import DynamicCache

    full: Any = DynamicCache(config=model.config)
    caches = {"full": full} | {
        name: StaircaseCache(model.config, stairs, capacity=ids.shape[1]) for name, stairs in chosen.items()
    }
    sums = {name: {"nll": 0.0, "kl": 0.0, "same_top": 0.0} for name in caches}
    chunks = range(0, ids.shape[1] - 1, CHUNK)
    progress, counted = Progress("read", len(chunks)), 0
    for number, at in enumerate(chunks):
        inputs, targets = ids[:, at : at + CHUNK], ids[0, at + 1 : at + CHUNK + 1]
        exact = None
        for name, cache in caches.items():
            logits = model(inputs, past_key_values=cache).logits[0, : len(targets)]
            if at < skipped:
                continue
            log_probs = torch.log_softmax(logits.float(), -1)
            exact = log_probs if exact is None else exact
            sums[name]["nll"] -= log_probs.gather(1, targets[:, None]).sum().item()
            sums[name]["kl"] += (exact.exp() * (exact - log_probs)).sum().item()
            sums[name]["same_top"] += (exact.argmax(-1) == log_probs.argmax(-1)).sum().item()
        counted += len(targets) if at >= skipped else 0
        progress.update(number + 1)
    full_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    return [
        {
            "name": name,
            "bytes": full_bytes if name == "full" else cache.nbytes,
            "share": 1.0 if name == "full" else cache.nbytes / full_bytes,
            "perplexity": math.exp(sums[name]["nll"] / counted),
            "kl": sums[name]["kl"] / counted,
            "same_top": sums[name]["same_top"] / counted,
        }
        for name, cache in caches.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    head = f"{'cache':<20}{'MiB':>8}{'of bfloat16':>13}{'perplexity':>12}{'change':>9}"
    lines = [head + f"{'KL, nats':>10}{'same top':>10}"]
    for row in rows:
        change = row["perplexity"] / rows[0]["perplexity"] - 1
        size = f"{row['bytes'] / 2**20:>8.2f}{row['share']:>13.1%}"
        moved = f"{row['kl']:>10.5f}{row['same_top']:>10.2%}"
        lines.append(f"{row['name']:<20}{size}{row['perplexity']:>12.3f}{change:>9.2%}{moved}")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """How far predictions move against the bytes of the cache."""
    figure = figure_class()(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows[1:]:
        point = (100 * row["share"], max(row["kl"], 1e-7))
        axes.plot(*point, "o", color="#b2182b" if row["name"].startswith("KIVI") else "#1b4f8a")
        axes.annotate(row["name"], point, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("bytes of the cache, % of bfloat16")
    axes.set_ylabel("KL divergence of the next token, nats")
    axes.set_title("Fewer bits for older tokens")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    out = Path(__file__).resolve().parent / "out"
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal model and its tokenizer")
    parser.add_argument("--out", type=Path, default=out, help="folder for the plot and the JSON (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="tokens to read (default: 6144); the first quarter is not scored")
    parser.add_argument("--quick", action="store_true", help="a random model and 1024 tokens")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    options = parser.parse_args(argv)
    options.tokens = (1024 if options.quick else 6144) if options.tokens is None else options.tokens
    if options.tokens < 4 * CHUNK:
        parser.error(f"--tokens is {options.tokens} and must be at least {4 * CHUNK}")
    if options.model is None and not options.quick:
        parser.error("--model is missing and must be a folder, unless --quick is given")
    return options


def run(options: argparse.Namespace) -> int:
    """The whole experiment; returns the exit status."""
    if not options.no_plot:
        figure_class()
    make_folder(options.out)
    train, held_out, fingerprint = read_corpus()
    model, tokenize = loaded(options.model)
    register(NAME, window_size=None)
    model.set_attn_implementation(NAME)
    texts = []
    for text, count in ((train, 4 * CHUNK), (b"".join(held_out), options.tokens)):
        ids = tokenize(text[: 16 * count])[:count]
        if len(ids) < count:
            raise UserError(f"--tokens is {options.tokens} and must be at most {len(ids)}, what the text has")
        texts.append(torch.tensor([ids]))
    skipped = options.tokens // 4
    rows = compare(model, texts[1], ladders(learned(model, texts[0])), skipped)
    same = next(row for row in rows if row["name"] == "16")
    held = same["kl"] < SAME_KL
    result = {
        "name": NAME, "quick": options.quick, **facts(), "model": options.model and options.model.name,
        "tokens": options.tokens, "skipped": skipped, "text": fingerprint, "rows": rows, "held": held,
    }  # fmt: skip
    print(table(rows))
    stem = options.out / (f"{NAME}_quick" if options.quick else NAME)
    write(result, stem, None if options.no_plot else lambda path: plot(rows, path))
    print(
        f"{'yes' if held else 'NO':>4}  a staircase that quantizes nothing moves predictions by {same['kl']:.2g} nats"
    )
    if options.quick:
        print("--quick: the model is random, so these figures mean nothing")
    return 0 if held else 1


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_main(NAME, lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
