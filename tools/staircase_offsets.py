# SPDX-License-Identifier: Apache-2.0
"""Measures where in its cell a code should stand: errors of attention outputs for candidates, widths and data.

    python -m tools.staircase_offsets [--smollm FOLDER] [--text FILE] [--out bench/results/staircase_offsets_cpu.json]
    python -m tools.staircase_offsets --docs docs/ops/staircase.md     rewrites the table from the committed file

Keys are quantized by channel in groups of 64 tokens, values by token in groups of 64 channels, all at one width but
the first four tokens, which stay as they are and are in no group; or those too, where a name says "no sinks".
Attention of the newest 64 queries is computed in float64 from what the codes stand for. The figure is the relative
error of its output, the root of the mean square, against unquantized keys and values.

Rotations are learned from the first half of the tokens, and one side alone is quantized, rotated and not.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pycore import ops

GROUP, WIDTHS = 64, (8, 4, 2)
TOKENS, QUERIES, CHANNELS, HEADS, SINKS = 1024, 64, 64, 4, 4
CANDIDATES = {
    "low": "lo: the low end of a cell",
    "middle": "lo + half a cell",
    "mean": "lo + the group's mean error, in 256ths of a cell (what pycore keeps)",
    "mean_dtype": "lo + the group's mean error, rounded to bfloat16",
    "minmax": "KIVI's grid, ends on lo and hi",
}
ROTATIONS = ("none", "hadamard", "pca", "pca_hadamard")
BEGIN, END = "<!-- offsets -->", "<!-- /offsets -->"
ROTATIONS_BEGIN, ROTATIONS_END = "<!-- rotations -->", "<!-- /rotations -->"


def dequantized(x: Tensor, bits: int, dim: int, candidate: str) -> Tensor:
    """What x [heads, tokens, channels] is after quantizing, as the candidate would have it, in float64."""
    how: dict[str, Any] = {"bits": bits, "group_size": GROUP, "dim": dim}
    if candidate == "minmax":
        return ops.staircase_dequantize(*ops.staircase_quantize(x, grid="minmax", **how), grid="minmax", **how).double()
    codes, lo, hi, centers = (each.double() for each in ops.staircase_quantize(x, return_centers=True, **how))
    step = (hi - lo) / 2**bits
    if candidate == "low":
        base = lo
    elif candidate == "middle":
        base = lo + step / 2
    else:
        base = lo + centers / 256 * step
        base = base.bfloat16().double() if candidate == "mean_dtype" else base

    def spread(each: Tensor) -> Tensor:
        return each.repeat_interleave(GROUP, dim).narrow(dim, 0, x.shape[dim])

    return spread(base) + codes * spread(step)


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of the newest queries [heads, n, D] in float64; key and value may have fewer heads."""
    share, n, tokens = query.shape[0] // key.shape[0], query.shape[1], key.shape[1]
    key, value = (x.double().repeat_interleave(share, 0) for x in (key, value))
    logits = query.double() @ key.mT / math.sqrt(query.shape[2])
    late = torch.arange(tokens)[None, :] > torch.arange(tokens - n, tokens)[:, None]
    return logits.masked_fill(late, -math.inf).softmax(-1) @ value


def cached(x: Tensor, bits: int, dim: int, candidate: str, sinks: int) -> Tensor:
    """What a cache without full tokens but its sinks would read."""
    first = dequantized(x[:, sinks:GROUP], bits, dim, candidate)
    rest = dequantized(x[:, GROUP:], bits, dim, candidate)
    return torch.cat([x[:, :sinks].double(), first, rest], 1)


def errors(query: Tensor, key: Tensor, value: Tensor, sinks: int = SINKS) -> dict[str, dict[str, float]]:
    """Relative error of the output by width and candidate."""
    key, value = key.bfloat16(), value.bfloat16()  # what a cache keeps
    exact = attended(query, key, value)
    table: dict[str, dict[str, float]] = {}
    for bits in WIDTHS:
        table[str(bits)] = {}
        for candidate in CANDIDATES:
            held = (cached(key, bits, 1, candidate, sinks), cached(value, bits, 2, candidate, sinks))
            got = attended(query, *held)
            table[str(bits)][candidate] = float(((got - exact).square().mean() / exact.square().mean()).sqrt())
    return table


def synthetic() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, query, key and value of what is drawn."""
    torch.manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(HEADS, TOKENS, CHANNELS)

    query = torch.randn(HEADS, QUERIES, CHANNELS)
    yield "Gaussian", query, normal(), normal()
    yield "uniform", query, 3.46 * torch.rand(HEADS, TOKENS, CHANNELS) - 1.73, torch.rand(HEADS, TOKENS, CHANNELS)
    turn = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS)).Q
    scales = torch.logspace(-1, 1, CHANNELS)
    yield "rotated (channels of 0.1 to 10, mixed)", query @ turn, normal() * scales @ turn / 4, normal() * scales @ turn
    yield "ReLU", query, normal().relu(), normal().relu()
    key, value = normal(), normal()
    key[..., ::16] *= 8
    value[..., ::16] *= 8
    yield "outlier channels (8x, 4 of 64)", query, key, value
    key, value = normal(), normal()
    key[..., ::16] += 20
    value[..., ::16] += 20
    yield "biased channels (+20, 4 of 64)", query, key, value
    key, value = normal(), normal()
    key[:, 5::64] *= 20
    value[:, 5::64] *= 20
    yield "outlier tokens (20x, 1 in 64)", query, key, value
    key, value = normal(), normal()
    key[torch.rand(key.shape) < 1 / 64] *= 20
    value[torch.rand(value.shape) < 1 / 64] *= 20
    yield "outlier elements (20x, 1 in 64)", query, key, value


def mean_of(layers: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The root of the mean square over layers."""
    return {
        name: {c: math.sqrt(sum(each[name][c] ** 2 for each in layers) / len(layers)) for c in row}
        for name, row in layers[0].items()
    }


def rotated_errors(query: Tensor, key: Tensor, value: Tensor) -> dict[str, dict[str, float]]:
    """Relative error of the output by side and width, and by rotation."""
    key, value = key.bfloat16(), value.bfloat16()
    exact = attended(query, key, value)
    found: dict[str, dict[str, float]] = {}
    for side, x, dim in (("keys", key, 1), ("values", value, 2)):
        for bits in WIDTHS[1:]:
            row = found[f"{side}, {bits} bits"] = {}
            for method in ROTATIONS:
                turn = torch.eye(x.shape[2]).expand(len(x), -1, -1)
                if method != "none":
                    turn = ops.staircase_rotation(x[None, :, : TOKENS // 2].float(), method=method)
                held = cached((x.float() @ turn).bfloat16(), bits, dim, "mean", SINKS) @ turn.mT.double()
                got = attended(query, held, value) if side == "keys" else attended(query, key, held)
                row[method] = float(((got - exact).square().mean() / exact.square().mean()).sqrt())
    return found


def text_of(path: Path | None, length: int) -> bytes:
    return (path.read_bytes() if path else inspect.getsource(argparse).encode())[20000 : 20000 + length]


def captured_bytelm(path: Path | None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of a byte model after a minute of training on the standard library."""
    from pycore.models import bytelm

    torch.manual_seed(0)
    model = bytelm.Bytelm(bytelm.BytelmConfig(layers=4))
    data = torch.tensor(list(b"".join(p.read_bytes() for p in sorted(Path(os.__file__).parent.glob("*.py"))[:120])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(200):
        at = torch.randint(len(data) - 257, (16,))
        tokens = torch.stack([data[i : i + 257] for i in at.tolist()])
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    captured: list[tuple[Tensor, Tensor, Tensor]] = []
    original = torch.ops.pycore.attention

    with torch.no_grad(), _captured_attention(captured):
        model(torch.tensor(list(text_of(path, TOKENS)))[None])
    assert original is torch.ops.pycore.attention and captured, "the model attends through pycore.ops.attention"
    return captured


class _captured_attention(torch.utils._python_dispatch.TorchDispatchMode):  # noqa: N801 - reads as a context
    """Keeps query, key and value of each attention; rotates what the op would have rotated."""

    def __init__(self, captured: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.captured = captured

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.pycore.attention.default:
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            query, key, value = (given[name][0].detach() for name in ("query", "key", "value"))
            if given.get("rope_cos") is not None:
                query, key = (_rotated(x, given["rope_cos"].detach(), given["rope_sin"].detach()) for x in (query, key))
            self.captured.append((query[:, -QUERIES:], key, value))
        return func(*args, **(kwargs or {}))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [heads, tokens, D] with tables [positions, D / 2 or D], halves paired."""
    half = x.shape[-1] // 2
    cos, sin = cos[: x.shape[1], :half], sin[: x.shape[1], :half]
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def captured_smollm(folder: Path, path: Path | None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Keys (after RoPE), values and queries of every layer of SmolLM2-135M over 1024 tokens of text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    captured: list[tuple[Tensor, Tensor, Tensor]] = []
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def kept(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        captured.append((query[0, :, -QUERIES:], key[0], value[0]))
        return plain(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("staircase_offsets", kept)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="staircase_offsets").eval()
    tokens = AutoTokenizer.from_pretrained(folder)(text_of(path, 8000).decode(), return_tensors="pt").input_ids
    with torch.no_grad():
        model(tokens[:, :TOKENS])
    return captured


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return {
        "machine": models[0].partition(":")[2].strip() if models else platform.machine(),
        "processors": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit,
        "group_size": GROUP, "tokens": TOKENS, "queries": QUERIES, "sinks": SINKS, "candidates": CANDIDATES,
    }  # fmt: skip


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Relative errors in per cent as a Markdown table."""
    lines = ["| data | bits | " + " | ".join(CANDIDATES) + " |", "|---|---|" + "---|" * len(CANDIDATES)]
    for name, widths in results.items():
        for bits, row in widths.items():
            best = min(row.values())
            cells = [f"**{100 * x:.3g}**" if x == best else f"{100 * x:.3g}" for x in row.values()]
            lines.append(f"| {name} | {bits} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rotation_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The same of rotations."""
    lines = [
        "| keys and values of | quantized | " + " | ".join(ROTATIONS) + " |",
        "|---|---|" + "---|" * len(ROTATIONS),
    ]
    for name, sides in results.items():
        for side, row in sides.items():
            best = min(row.values())
            cells = [f"**{100 * x:.3g}**" if x == best else f"{100 * x:.3g}" for x in row.values()]
            lines.append(f"| {name} | {side} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm", type=Path, help="folder of SmolLM2-135M as safetensors")
    parser.add_argument("--text", type=Path, help="text to read; the source of argparse if not given")
    parser.add_argument("--out", type=Path, default=Path("bench/results/staircase_offsets_cpu.json"))
    parser.add_argument("--docs", type=Path, help="only write the table of --out into this page")
    options = parser.parse_args()
    if options.docs:
        found = json.loads(options.out.read_text())
        write_between(options.docs, BEGIN, END, table(found["results"]))
        write_between(options.docs, ROTATIONS_BEGIN, ROTATIONS_END, rotation_table(found["rotations"]))
        return
    results = {name: errors(*each) for name, *each in synthetic()}
    models = {"bytelm, 4 layers": captured_bytelm(options.text)}
    if options.smollm:
        models["SmolLM2-135M, 30 layers"] = captured_smollm(options.smollm, options.text)
    for name, layers in models.items():
        results[name] = mean_of([errors(*each) for each in layers])
        results[f"{name}, no sinks"] = mean_of([errors(*each, sinks=0) for each in layers])
    turned = {name: mean_of([rotated_errors(*each) for each in layers[::4]]) for name, layers in models.items()}
    options.out.write_text(json.dumps(machine() | {"results": results, "rotations": turned}, indent=1) + "\n")
    print(table(results), rotation_table(turned), sep="\n\n")


if __name__ == "__main__":
    main()
