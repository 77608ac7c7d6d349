# SPDX-License-Identifier: Apache-2.0
"""What other parts of pycore do on SmolLM2-135M: four short experiments, each with a table.

`token`: where the time of a decoded token goes, with transformers' SDPA, with Λ attention and with all tokens on our
caches.
`training`: some steps of fine-tuning with torch's cross entropy and with `linear_cross_entropy`, which never makes the
logits: the losses of both, and the memory that a step needs.
`probabilistic`: the loss of a prompt whose attention reads a random share of its blocks, with and without sinks.
`codebook`: the loss where what attention's heads say is one of a few codes each, in some layers or in all.

    python examples/smollm2.py                   # fetches the model, once
    python examples/real_model_parts.py          # all four, a JSON under examples/out/; eight minutes on two cores
    python examples/real_model_parts.py --part token
    python examples/real_model_parts.py --quick  # a random model in seconds, figures without meaning

Parts run one at a time are joined in the JSON. It exits with 0 if the two loss curves agree to 1e-4 nats, with 1 if
not, and with 2 after an error.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import smollm2
import torch
from common import Parser, Progress, UserError, facts, make_folder, run_main, write
from torch.nn.functional import cross_entropy, linear

from pycore import ops
from pycore.integrations.transformers import KVCache, LambdaCache, register, register_probabilistic
from pycore.nn import CodebookFeatures
from pycore.schedules import Harmonic

NAME = "real_model_parts"
PARTS = ("token", "training", "probabilistic", "codebook")
SINKS, WINDOW = 4, 1024
AGREE = 1e-4  # nats


class Inputs:
    """A model and texts, made once."""

    def __init__(self, quick: bool) -> None:
        """Loads the model, or makes a random one."""
        self.quick = quick
        self.contexts = (64,) if quick else (256, 4096)
        self.steps, self.piece = (3, 64) if quick else (10, 1024)
        self.prompt = 256 if quick else 4096
        if quick:
            self.model, _ = smollm2.quick_model()
            torch.manual_seed(1)
            self.ids = torch.randint(256, (1, 512))
        else:
            self.model, tokenizer = smollm2.load()
            self.ids = smollm2.texts(smollm2.encoder(tokenizer), 1, self.steps * self.piece)[0]


# ---- where a token's time goes ---------------------------------------------------------------------------------------


class Clock:
    """Seconds inside the linear layers of a model, its attention function and its cache's `update`."""

    def __init__(self, model: Any, attention: str, cache: Any) -> None:
        """`attention`: the name of the attention in use."""
        from transformers import AttentionInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.seconds = {"weights": 0.0, "attention": 0.0, "cache": 0.0}
        self.linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        self.name, self.function, self.cache = attention, ALL_ATTENTION_FUNCTIONS[attention], cache
        self.register = AttentionInterface.register

    def _timed(self, kind: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[kind] += time.perf_counter() - began
            return result

        return timed

    def __enter__(self) -> Clock:
        for linear_layer in self.linears:
            linear_layer.forward = self._timed("weights", linear_layer.forward)
        self.register(self.name, self._timed("attention", self.function))
        self.cache.update = self._timed("cache", self.cache.update)
        return self

    def __exit__(self, *error: object) -> None:
        for linear_layer in self.linears:
            del linear_layer.forward
        self.register(self.name, self.function)
        del self.cache.update


@torch.no_grad()
def token(inputs: Inputs) -> list[dict[str, Any]]:
    """Milliseconds of a step (the median), and of that the parts; the rest is norms, rotation, activations and Python.

    A step is timed as it is and, next, with a clock in its parts, whose own time is thereby left out of the whole.
    """
    from transformers import DynamicCache

    model, rows = inputs.model, []
    register(NAME, sink_size=SINKS, window_size=WINDOW)
    register(f"{NAME}_all", window_size=None)
    names = {"sdpa": "SDPA, DynamicCache", NAME: f"Λ({SINKS}, {WINDOW}), LambdaCache", f"{NAME}_all": "KVCache"}
    for context in inputs.contexts:
        caches: dict[str, Any] = {}
        for way, cache in (("sdpa", DynamicCache(config=model.config)), (NAME, LambdaCache(SINKS, WINDOW)),
                           (f"{NAME}_all", KVCache())):  # fmt: skip
            model.set_attn_implementation(way)
            for at in range(0, context, 512):
                model(inputs.ids[:, at : min(at + 512, context)], past_key_values=cache, logits_to_keep=1)
            caches[way] = cache
        new = inputs.ids[:, context : context + 1]
        seconds: dict[str, list[float]] = {way: [] for way in caches}
        parts: dict[str, dict[str, list[float]]] = {way: {} for way in caches}
        for _ in range(5 if inputs.quick else 25):  # by turns, so that noise hits all
            for way, cache in caches.items():
                model.set_attn_implementation(way)
                began = time.perf_counter()
                model(new, past_key_values=cache)
                seconds[way].append(time.perf_counter() - began)
                with Clock(model, way, cache) as clock:
                    model(new, past_key_values=cache)
                for kind, spent in clock.seconds.items():
                    parts[way].setdefault(kind, []).append(spent)
        for way in caches:
            whole, *kinds = (statistics.median(x) * 1e3 for x in (seconds[way], *parts[way].values()))
            found = dict(zip(parts[way], kinds, strict=True))
            found["the rest"] = whole - sum(kinds)
            rows.append({"name": names[way], "context": context, "ms": round(whole, 4),
                         "parts": {kind: round(x, 4) for kind, x in found.items()}})  # fmt: skip
    return rows


def token_table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    kinds = list(rows[0]["parts"])
    head = ["ms a token", "context", "all", *kinds]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in rows:
        figures = [f"{row['context']:,}", f"{row['ms']:.1f}", *(f"{row['parts'][kind]:.1f}" for kind in kinds)]
        lines.append("| " + " | ".join([row["name"], *figures]) + " |")
    return "\n".join(lines)


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def training(inputs: Inputs) -> list[dict[str, Any]]:
    """The losses of a few steps of AdamW from the same weights, and a step's time and memory."""
    rows = []
    for name in ("torch's cross_entropy", "linear_cross_entropy"):
        model = copy.deepcopy(inputs.model).train()
        model.set_attn_implementation("sdpa")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        losses, seconds, most = [], [], 0
        progress = Progress(name, inputs.steps)
        for step in range(inputs.steps):
            ids = inputs.ids[:, step * inputs.piece % inputs.ids.shape[1] :][:, : inputs.piece]
            with smollm2.Peak() as peak:
                began = time.perf_counter()
                hidden, target = model.model(ids, use_cache=False).last_hidden_state[0, :-1], ids[0, 1:]
                if name == "linear_cross_entropy":
                    loss = ops.linear_cross_entropy(hidden, model.lm_head.weight, target)
                else:
                    loss = cross_entropy(linear(hidden, model.lm_head.weight), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(time.perf_counter() - began)
            losses.append(round(loss.item(), 6))
            del hidden, loss
            most = max(most, peak.bytes if step else 0)  # the first step makes the optimizer's state too
            progress.update(step + 1)
        rows.append({"name": name, "losses": losses, "seconds": round(sorted(seconds)[len(seconds) // 2], 3),
                     "peak_bytes": most})  # fmt: skip
        del model, optimizer
    return rows


def training_table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| loss | first step | last step | seconds a step | MiB a step, at most |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        first, last = row["losses"][0], row["losses"][-1]
        size = row["peak_bytes"] / 2**20
        lines.append(f"| {row['name']} | {first:.5f} | {last:.5f} | {row['seconds']:.2f} | {size:.0f} |")
    return "\n".join(lines)


# ---- probabilistic prefill -------------------------------------------------------------------------------------------


@torch.no_grad()
def probabilistic(inputs: Inputs) -> list[dict[str, Any]]:
    """The loss of the second half of a prompt, the time of the pass, and the share of blocks that attention read."""
    model, length = inputs.model, inputs.prompt
    ids, block = inputs.ids[:, :length], 64
    blocks = length // block
    rows = []
    settings: list[tuple[str, float | None, int]] = [("SDPA", None, 0)]
    settings += [(f"Harmonic({c:g}), {sinks} sinks", c, sinks) for c in (1.0, 4.0) for sinks in (4, 0)]
    progress = Progress("probabilistic", len(settings))
    for number, (name, c, sinks) in enumerate(settings):
        density = 1.0
        if c is None:
            model.set_attn_implementation("sdpa")
        else:
            register_probabilistic(NAME, distance_probs=Harmonic(c), seed=0, block_size=block, sink_size=sinks)
            model.set_attn_implementation(NAME)
            heads = model.config.num_attention_heads
            drawn = ops.pr_block_mask(batch=1, heads=heads, query_blocks=blocks, key_blocks=blocks,
                                      distance_probs=Harmonic(c), seed=0)  # fmt: skip
            density = drawn.sum().item() / (heads * blocks * (blocks + 1) / 2)
        began = time.perf_counter()
        hidden = model.model(ids, use_cache=False).last_hidden_state[0]
        seconds = time.perf_counter() - began
        loss = ops.linear_cross_entropy(hidden[length // 2 : -1], model.lm_head.weight, ids[0, length // 2 + 1 :])
        rows.append({"name": name, "sinks": sinks, "density": round(density, 4), "nll": round(loss.item(), 4),
                     "seconds": round(seconds, 2)})  # fmt: skip
        progress.update(number + 1)
    return rows


def probabilistic_table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| attention | blocks read | nats a token | seconds |", "|---|---:|---:|---:|"]
    for row in rows:
        lines.append(f"| {row['name']} | {row['density']:.0%} | {row['nll']:.3f} | {row['seconds']:.1f} |")
    return "\n".join(lines)


# ---- codebook features -----------------------------------------------------------------------------------------------


class Coded:
    """What each layer's attention heads say, kept while `states` is set, and replaced by codes in layers of `books`."""

    def __init__(self, model: Any) -> None:
        """Stands before the projection of every layer's attention, where heads are still apart."""
        self.states: dict[int, list[torch.Tensor]] | None = None
        self.books: dict[int, CodebookFeatures] = {}
        self.hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, i=i: self._heads(i, args[0]))
            for i, layer in enumerate(model.model.layers)
        ]

    def _heads(self, layer: int, said: torch.Tensor) -> tuple[torch.Tensor] | None:
        if self.states is not None:
            self.states.setdefault(layer, []).append(said[0])
        if layer not in self.books:
            return None
        coded = self.books[layer](said)
        return (coded[0] if isinstance(coded, tuple) else coded,)

    def close(self) -> None:
        """Leaves the model as it was."""
        for hook in self.hooks:
            hook.remove()


def nearest_codes(said: torch.Tensor, heads: int, codes: int) -> CodebookFeatures:
    """Codes of each head: the means of clusters of what it said, [tokens, heads * channels]."""
    book = CodebookFeatures(said.shape[1], codes, num_codebooks=heads, layer_norm=False, metric="euclidean")
    parts = said.unflatten(1, (heads, -1))
    centers = [ops.kmeans(parts[:, head].contiguous(), codes, init="random")[0] for head in range(heads)]
    book.codebook.data.copy_(torch.stack(centers))
    return book.eval()


@torch.no_grad()
def codebook(inputs: Inputs) -> list[dict[str, Any]]:
    """The loss of the last fifth of the text, with codes from what the heads say in the rest of it."""
    model, heads, count = inputs.model, inputs.model.config.num_attention_heads, len(inputs.model.model.layers)
    model.set_attn_implementation("sdpa")
    pieces = inputs.ids[0].split(inputs.piece)
    held = max(1, len(pieces) // 5)
    coded = Coded(model)

    def loss() -> float:
        total = 0.0
        for piece in pieces[-held:]:
            hidden = model.model(piece.unsqueeze(0), use_cache=False).last_hidden_state[0]
            total += ops.linear_cross_entropy(hidden[:-1], model.lm_head.weight, piece[1:]).item()
        return round(total / held, 4)

    rows = [{"layers": 0, "codes": 0, "nll": loss()}]
    coded.states = {}
    for piece in pieces[:-held]:
        model.model(piece.unsqueeze(0), use_cache=False)
    said, coded.states = {layer: torch.cat(parts) for layer, parts in coded.states.items()}, None
    sizes = (16,) if inputs.quick else (32, 256)
    progress = Progress("codebook", len(sizes) * count)
    for number, codes in enumerate(sizes):
        books = {}
        for layer, states in said.items():
            books[layer] = nearest_codes(states, heads, codes)
            progress.update(number * count + layer + 1)
        for layers in ([count // 2], list(range(0, count, 3)), list(range(count))):
            coded.books = {layer: books[layer] for layer in layers}
            rows.append({"layers": len(layers), "codes": codes, "nll": loss()})
    coded.close()
    return rows


def codebook_table(rows: list[dict[str, Any]]) -> str:
    """As Markdown: a row for each number of codes."""
    plain, *rest = rows
    layers = sorted({row["layers"] for row in rest})
    head = ["nats a token, codes a head", *(f"in {n} layer{'s' * (n > 1)}" for n in layers)]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * len(layers) + "|"]
    for codes in sorted({row["codes"] for row in rest}):
        found = {row["layers"]: row["nll"] for row in rest if row["codes"] == codes}
        lines.append(f"| {codes:,} | " + " | ".join(f"{found[n]:.3f}" for n in layers) + " |")
    return "\n".join([*lines, "| what they say itself | " + " | ".join([f"{plain['nll']:.3f}"] * len(layers)) + " |"])


# ---- all of it -------------------------------------------------------------------------------------------------------

TABLES = {"token": token_table, "training": training_table, "probabilistic": probabilistic_table,
          "codebook": codebook_table}  # fmt: skip


EXPERIMENTS = {"token": token, "training": training, "probabilistic": probabilistic, "codebook": codebook}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    out = Path(__file__).resolve().parent / "out"
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="one of them (default: all)")
    parser.add_argument("--out", type=Path, default=out, help="folder for the JSON (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a random model")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> int:
    """The chosen parts; returns the exit status."""
    if not options.quick and not smollm2.present():
        raise UserError(smollm2.missing())
    make_folder(options.out)
    stem = options.out / (f"{NAME}_quick" if options.quick else NAME)
    kept = stem.with_suffix(".json")
    result: dict[str, Any] = {"name": NAME, "quick": options.quick}
    if options.part and kept.is_file():
        result = json.loads(kept.read_text(encoding="utf-8"))
    inputs = Inputs(options.quick)
    for part in [options.part] if options.part else PARTS:
        rows = EXPERIMENTS[part](inputs)
        result[part] = {**facts(), "rows": rows}
        print(TABLES[part](rows) + "\n")
    write(result, stem, None)
    if "training" not in result:
        return 0
    theirs, ours = (row["losses"] for row in result["training"]["rows"])
    apart = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    print(f"the loss curves are at most {apart:.1g} nats apart")
    return 0 if apart <= AGREE else 1


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_main(NAME, lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
