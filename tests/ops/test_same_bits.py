# SPDX-License-Identifier: Apache-2.0
"""The same bits on every x86-64 machine with vectors: AVX2 and AVX-512 add sixteen lanes in one order.

tests/golden/same_bits.json holds a digest of each case, so that a machine with one instruction set checks the other.
The plain loops of machines without FMA have bits of their own, but for integers. Inputs come from integers and
divisions, which every machine rounds alike; torch's own normal numbers, sines and cosines are not bound to.

`python tests/ops/test_same_bits.py --update` rewrites the file, after a change that is meant to move bits.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pycore
from pycore import native, ops
from pycore.schedules import Causal, Full, Geometric, KeySubset, Lambda, Prefix, Probabilistic, Segments

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "same_bits.json"
WIDE = [isa for isa in native.available_isas() if isa != "scalar"]


class Numbers:
    """Numbers in (-4, 4), the same everywhere."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randint(-4096, 4096, shape, generator=self.generator) / 1024).to(dtype)


def rotations(rows: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Points on the unit circle by rational numbers: ((1 - t^2) / (1 + t^2), 2 t / (1 + t^2))."""
    t = torch.arange(rows, dtype=torch.float64)[:, None] % 13 / (2 + torch.arange(pairs, dtype=torch.float64))
    return ((1 - t * t) / (1 + t * t)).float(), (2 * t / (1 + t * t)).float()


def attention_case(
    seed: int,
    schedule: Any,
    shape: tuple[int, int, int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    rope: int = 0,
    interleaved: bool = False,
    tables: str = "",
    **options: Any,
) -> list[Tensor]:
    """Forward and backward of (batch, heads, kv_heads, queries, keys, head_dim, value_dim)."""
    draw = Numbers(seed)
    batch, heads, kv_heads, queries, keys, head_dim, value_dim = shape
    query = draw(batch, heads, queries, head_dim, dtype=dtype)
    key = draw(batch, kv_heads, keys, head_dim, dtype=dtype)
    value = draw(batch, kv_heads, keys, value_dim, dtype=dtype)
    leaves = [query, key, value]
    if rope:
        options |= {"rope": rotations(keys + queries + 64, rope // 2), "interleaved": interleaved}
    if tables == "bias":
        options["distance_bias"] = draw(heads, 90)
        leaves.append(options["distance_bias"])
    if tables == "slopes":
        options["alibi_slopes"] = draw(heads).abs() / 8
        leaves.append(options["alibi_slopes"])
    if tables:
        options["sink_logits"] = draw(heads)
        leaves.append(options["sink_logits"])
    for leaf in leaves:
        leaf.requires_grad_()
    out, lse = ops.attention(query, key, value, schedule=schedule, return_lse=True, **options)
    weights = draw(*out.shape, dtype=dtype), draw(*lse.shape)
    seen = torch.isfinite(lse)
    gradients = torch.autograd.grad([out, lse[seen]], leaves, [weights[0], weights[1][seen]], materialize_grads=True)
    return [out, lse, *gradients]


def tiles_case(seed: int, queries: int, dtype: torch.dtype, rope: int = 0, interleaved: bool = False) -> list[Tensor]:
    """Keys by channel: of a cache of all tokens, and of one that evicts."""
    draw = Numbers(seed)
    query, key = draw(2, 8, queries, 48, dtype=dtype), draw(2, 2, 203, 48, dtype=dtype)
    value = draw(2, 2, 203, 40, dtype=dtype)
    options: dict[str, Any] = {"rope": rotations(300, rope // 2), "interleaved": interleaved} if rope else {}
    full, window = pycore.KVCache(), pycore.LambdaKVCache(5, 70)
    outs = []
    for cache in (full, window):
        cache.append(key[:, :, : 203 - queries], value[:, :, : 203 - queries])
        tokens = key[:, :, 203 - queries :], value[:, :, 203 - queries :]
        outs.append(cache.append_and_attend(query, *tokens, **options))
    return [x for x in outs if isinstance(x, Tensor)]


def linear_case(seed: int, rows: int, ins: int, outs: int) -> list[Tensor]:
    draw = Numbers(seed)
    leaves = [draw(rows, ins).requires_grad_(), draw(outs, ins).requires_grad_(), draw(outs).requires_grad_()]
    out = ops.invariant_linear(*leaves)
    return [out, *torch.autograd.grad(out, leaves, draw(rows, outs))]


def norm_case(seed: int, rows: int, channels: int) -> list[Tensor]:
    draw = Numbers(seed)
    leaves = [draw(rows, channels).requires_grad_(), draw(channels).requires_grad_()]
    out = ops.rms_norm(*leaves, 1e-5)
    return [out, *torch.autograd.grad(out, leaves, draw(rows, channels))]


def half_case(seed: int, rows: int, ins: int, outs: int, dtype: torch.dtype) -> list[Tensor]:
    """Linear layer and norms in 16 bits."""
    draw = Numbers(seed)
    x, weight, bias = draw(rows, ins, dtype=dtype), draw(outs, ins, dtype=dtype), draw(outs, dtype=dtype)
    scale, shift = draw(ins, dtype=dtype), draw(ins, dtype=dtype)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias, scale, shift)]
    results = [ops.invariant_linear(x, weight, bias), ops.rms_norm(x, scale, 1e-5), ops.layer_norm(x, scale, shift)]
    weights = [draw(*result.shape, dtype=dtype) for result in results]
    return [*results, *torch.autograd.grad(results, leaves, weights)]


def layer_norm_case(seed: int, rows: int, channels: int) -> list[Tensor]:
    draw = Numbers(seed)
    leaves = [draw(rows, channels).requires_grad_(), draw(channels).requires_grad_(), draw(channels).requires_grad_()]
    out = ops.layer_norm(*leaves, 1e-5)
    return [out, *torch.autograd.grad(out, leaves, draw(rows, channels))]


def gated_case(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """From both tails through zero, with lanes left over."""
    draw = Numbers(seed)
    gate = torch.cat([draw(3, 333), draw(3, 333) * 30, draw(3, 333) / 4096]).to(dtype).requires_grad_()
    up = draw(9, 333, dtype=dtype).requires_grad_()
    results = [ops.silu_mul(gate, up), ops.gelu_mul(gate, up), ops.gelu_mul(gate, up, "tanh")]
    weights = [draw(*result.shape, dtype=dtype) for result in results]
    each = zip(results, weights, strict=True)
    return [*results, *(grad for result, by in each for grad in torch.autograd.grad(result, (gate, up), by))]


def pairwise_case(seed: int, rows: int, columns: int, channels: int, score: str) -> list[Tensor]:
    """Log-sum-exp with its gradients, and the best three."""
    draw = Numbers(seed)
    leaves = [draw(rows, channels).requires_grad_(), draw(columns, channels).requires_grad_(), draw(columns)]
    leaves[2].requires_grad_()
    lse = ops.pairwise_logsumexp(leaves[0], leaves[1], scale=-1 / channels, y_bias=leaves[2], score=score)
    best = ops.pairwise_topk(leaves[0].detach(), leaves[1].detach(), 3, score=score)
    return [lse, *torch.autograd.grad(lse, leaves, draw(rows)), *best]


def cases() -> dict[str, Callable[[], list[Tensor]]]:
    made: dict[str, Callable[[], list[Tensor]]] = {}

    def add(name: str, function: Callable[..., list[Tensor]], *arguments: Any, **options: Any) -> None:
        made[name] = lambda: function(len(name), *arguments, **options)

    schedules = {
        "full": Full(),
        "causal": Causal(),
        "lambda": Lambda(5, 70),
        "lambda, right": Lambda(3, 50, right=9),
        "prefix": Prefix(torch.tensor([40, 0])),
        "segments": Segments(torch.tensor([0, 33, 100, 203]), causal=True),
        "segments, window": Segments(torch.tensor([0, 90, 203]), causal=False, window_size=30, right=20),
        "probabilistic": Probabilistic(Geometric(0.5), seed=3, block_size=16, sink_size=2, correction="importance"),
        "key subset": KeySubset(torch.arange(203) % 3 != 1),
    }
    limits = {"causal", "lambda", "prefix", "segments"}
    for name, schedule in schedules.items():
        limit = {"distance_limit": 80} if name in limits else {}
        add(name, attention_case, schedule, (2, 4, 2, 97, 203, 40, 33))
        add(f"{name}, few", attention_case, schedule, (2, 6, 2, 2, 203, 64, 48))
        add(f"{name}, rope", attention_case, schedule, (2, 4, 2, 97, 203, 64, 40), rope=56, **limit)
        add(
            f"{name}, rope few", attention_case, schedule, (2, 6, 2, 1, 203, 32, 32), rope=24, interleaved=True, **limit
        )
        add(f"{name}, bias", attention_case, schedule, (2, 4, 2, 97, 203, 32, 16), tables="bias", softcap=3.0)
        add(f"{name}, slopes", attention_case, schedule, (2, 4, 4, 97, 203, 32, 16), tables="slopes")
    for dtype in (torch.bfloat16, torch.float16):
        add(f"{dtype}", attention_case, Lambda(5, 70), (1, 4, 2, 130, 203, 64, 64), dtype, rope=64)
        add(f"{dtype}, few", attention_case, Causal(), (1, 8, 2, 1, 1300, 64, 64), dtype)
    for head_dim, value_dim in ((7, 3), (80, 80), (111, 33), (256, 128)):
        add(f"{head_dim} and {value_dim}", attention_case, Causal(), (1, 2, 1, 70, 150, head_dim, value_dim))
    add("segments of keys", attention_case, Causal(), (1, 2, 1, 40, 3100, 32, 32))
    add("negative scale", attention_case, Causal(), (1, 2, 2, 77, 77, 64, 64), scale=-0.25)
    add("dropout", attention_case, Causal(), (1, 2, 2, 77, 77, 64, 64), dropout_p=0.25)
    ragged = {"key_starts": torch.tensor([0, 70]), "key_lengths": torch.tensor([203, 180])}
    add("ragged", attention_case, Causal(), (2, 2, 1, 60, 203, 32, 32), query_lengths=torch.tensor([60, 11]), **ragged)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for queries in (1, 3, 20):
            add(f"tiles, {dtype}, {queries}", tiles_case, queries, dtype)
        add(f"tiles, {dtype}, rope", tiles_case, 1, dtype, rope=40)
        add(f"tiles, {dtype}, interleaved", tiles_case, 1, dtype, rope=48, interleaved=True)
    for rows in (1, 5, 40):
        add(f"linear, {rows}", linear_case, rows, 333, 77)
        add(f"norm, {rows}", norm_case, rows, 333)
        add(f"layer norm, {rows}", layer_norm_case, rows, 333)
        for dtype in (torch.bfloat16, torch.float16):
            add(f"linear {dtype}, {rows}", half_case, rows, 333, 77, dtype)
        for score in ("dot", "cosine", "euclidean"):
            add(f"pairwise, {score}, {rows}", pairwise_case, rows, 1101, 333, score)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        add(f"gated {dtype}", gated_case, dtype)
    return made


def digest(name: str) -> str:
    """Of the bits of all results; dropout draws under torch's seed."""
    torch.manual_seed(0)
    hashed = hashlib.sha256()
    for result in cases()[name]():
        hashed.update(result.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:32]


@pytest.mark.parametrize("name", cases())
def test_every_instruction_set_has_the_bits_of_the_file(name: str) -> None:
    if not WIDE:
        pytest.skip("this machine has no AVX2")
    expected = json.loads(GOLDEN.read_text())[name]
    before = native.cpu_isa()
    try:
        for isa in WIDE:
            native.set_cpu_isa(isa)
            assert digest(name) == expected, f"other bits on {isa}"
    finally:
        native.set_cpu_isa(before)


def test_the_file_has_these_cases() -> None:
    assert set(json.loads(GOLDEN.read_text())) == set(cases())


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/ops/test_same_bits.py --update")
    found = {isa: {} for isa in WIDE}
    for isa in WIDE:
        native.set_cpu_isa(isa)
        found[isa] = {name: digest(name) for name in cases()}
    assert len({json.dumps(digests) for digests in found.values()}) == 1, "the instruction sets differ"
    GOLDEN.write_text(json.dumps(found[WIDE[0]], indent=1) + "\n")
    print(f"{len(found[WIDE[0]])} digests of {', '.join(WIDE)} by pycore {pycore.__version__}")
