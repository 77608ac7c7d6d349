# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel of attention once on small odd shapes, beside the CPU's results: what compute-sanitizer runs.

compute-sanitizer --tool memcheck python -m tools.sanitize_cuda
python -m tools.sanitize_cuda --device cpu      a rehearsal: the CPU beside itself

Inputs are made on the CPU and results compared there, so that nearly all kernels under the sanitizer are pycore's.
Whether they are accurate is for tests/ops/attention/test_attention_cuda.py; the tolerances here only catch what is
plainly wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pycore import LambdaKVCache
from pycore.ops import attention
from pycore.positions import rope_tables
from pycore.schedules import Causal, Full, Harmonic, KeySubset, Lambda, Prefix, Probabilistic, Segments, Tree

# Of the largest entry. Half precision: eight rounding units; weights, rotations and gradients are each rounded.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 8 * 2.0**-11, torch.bfloat16: 8 * 2.0**-8}
ALL = (64, 128, 40, 96, 256)
Shape = tuple[int, int, int, int, int]  # batch, heads, key heads, queries, keys


def _rope(dim: int) -> dict[str, Any]:
    return {"schedule": Lambda(3, 20), "rope": rope_tables(20 + 64, dim), "distance_limit": 20}


# Name, shape, head_dims, the options for a head_dim; what matters most comes first, for runs with little time.
PROBLEMS: list[tuple[str, Shape, tuple[int, ...], Callable[[int], dict[str, Any]]]] = [
    ("causal", (1, 2, 2, 70, 70), ALL, lambda dim: {"schedule": Causal()}),
    ("Λ, rope with limit", (1, 2, 1, 97, 203), ALL, _rope),
    ("decode", (2, 8, 2, 1, 2300), ALL, lambda dim: {"schedule": Causal()}),
    ("causal, several tiles", (1, 2, 1, 333, 333), (128, 64), lambda dim: {"schedule": Causal()}),
    ("Λ", (2, 2, 1, 130, 130), (64, 128), lambda dim: {"schedule": Lambda(3, 20)}),
    ("full", (1, 4, 2, 65, 113), (64, 128), lambda dim: {"schedule": Full()}),
    ("two segments of keys", (1, 1, 1, 33, 1100), (64, 128), lambda dim: {"schedule": Causal()}),
    (
        "probabilistic",
        (2, 2, 2, 130, 130),
        (64, 128),
        lambda dim: {"schedule": Probabilistic(Harmonic(1.0), 7, 2, 16, 1, correction="importance")},
    ),
    (
        "probabilistic, blocks a row",
        (1, 2, 2, 130, 130),
        (64,),
        lambda dim: {"schedule": Probabilistic(Harmonic(1.0), 7, block_size=16, blocks_per_row=3)},
    ),
    ("key subset", (1, 2, 1, 65, 200), (64, 128), lambda dim: {"schedule": KeySubset(torch.arange(200) % 7 < 2)}),
    ("tree", (1, 2, 1, 7, 100), (64,), lambda dim: {"schedule": Tree(torch.tensor([-1, 0, 0, 1, 1, -1, 5]))}),
    (
        "distance bias",
        (1, 2, 2, 70, 90),
        (64, 128),
        lambda dim: {"schedule": Lambda(5, 30), "distance_bias": torch.linspace(-2, 1, 100).reshape(2, 50)},
    ),
    ("sink logits", (1, 2, 2, 70, 90), (64, 128), lambda dim: {"sink_logits": torch.tensor([0.3, -2.0])}),
    ("softcap", (1, 2, 2, 70, 90), (64,), lambda dim: {"softcap": 3.0}),
    ("dropout", (1, 2, 2, 70, 90), (64,), lambda dim: {"dropout_p": 0.25}),
    ("ALiBi", (1, 2, 2, 70, 90), (64,), lambda dim: {"alibi_slopes": torch.tensor([0.5, 0.25])}),
    ("prefix", (2, 2, 2, 70, 90), (64,), lambda dim: {"schedule": Prefix(torch.tensor([5, 80]))}),
    ("packed", (1, 2, 2, 90, 90), (64,), lambda dim: {"schedule": Segments(torch.tensor([0, 30, 90]))}),
    (
        "packed by rows, windows",
        (2, 2, 2, 90, 200),
        (64,),
        lambda dim: {"schedule": Segments(torch.tensor([[0, 130, 130, 200], [9, 140, 200, 200]]), False, 40, 3, 20)},
    ),
    (
        "both sides, ALiBi of rows",
        (2, 2, 2, 90, 130),
        (64,),
        lambda dim: {
            "schedule": Lambda(3, 40, right=20),
            "alibi_slopes": torch.tensor([[0.5, 0.25], [0.1, 0.0]]),
            "symmetric_bias": True,
        },
    ),
    (
        "distance bias on both sides",
        (1, 2, 2, 130, 130),
        (64,),
        lambda dim: {
            "schedule": Full(),
            "distance_bias": torch.linspace(-2, 1, 100).reshape(2, 50),
            "symmetric_bias": True,
        },
    ),
]


def moved(value: Any, device: str) -> Any:
    """A copy on the device, also of the tensors in a pair of tables or a schedule."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, tuple):
        return tuple(moved(x, device) for x in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if any(isinstance(x, torch.Tensor) for x in fields.values()):
            return dataclasses.replace(value, **{name: moved(x, device) for name, x in fields.items()})
    return value


def run(tensors: list[torch.Tensor], options: dict[str, Any], device: str) -> list[torch.Tensor]:
    """Output, lse, and the gradients of all that has one, through both; on the CPU."""
    options = {name: moved(x, device) for name, x in options.items()}
    query, key, value, grad, grad_lse = (moved(x, device) for x in tensors)
    learned = [query, key, value, *(options[name] for name in ("distance_bias", "sink_logits") if name in options)]
    for x in learned:
        x.requires_grad_()
    seed = torch.tensor([20240607])  # of dropout, which each device's generator would draw another of
    with unittest.mock.patch.object(torch, "randint", lambda *_, device, **__: seed.to(device)):
        out, lse = attention(query, key, value, return_lse=True, **options)
    return [x.detach().cpu() for x in (out, lse, *torch.autograd.grad((out, lse), learned, (grad, grad_lse)))]


def step_on_a_cache(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """A prompt longer than the ring, and single tokens behind it."""
    generator = torch.Generator().manual_seed(3)
    cache, outs = LambdaKVCache(3, 64), []
    for tokens in (150, 1, 1):
        query, key, value = (torch.randn(2, h, tokens, 64, generator=generator).to(dtype) for h in (4, 2, 2))
        cache.append(key.to(device), value.to(device))
        outs.append(cache.attend(query.to(device)).cpu())
    return outs


def programs(reduced: bool) -> Iterator[tuple[str, torch.dtype, Callable[[str], list[torch.Tensor]]]]:
    """(name, dtype, the function from a device to its results), what matters most first."""
    for name, (batch, heads, kv_heads, queries, keys), dims, options in PROBLEMS:
        for dtype in TOLERANCES:
            few = {torch.float32: 1 if dims == ALL else 0, torch.float16: 0, torch.bfloat16: 2}[dtype]
            for dim in dims[:few] if reduced else dims:
                generator = torch.Generator().manual_seed(dim)
                shapes = ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, dim), (heads, queries, dim))
                tensors = [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]
                tensors.append(torch.randn(batch, heads, queries, generator=generator))
                given = options(dim)
                yield f"{name}, D {dim}", dtype, lambda device, t=tensors, o=given: run(t, o, device)
    for dtype in (torch.bfloat16,) if reduced else TOLERANCES:
        yield "step on a cache", dtype, lambda device, d=dtype: step_on_a_cache(d, device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--reduced", action="store_true", help="a third of it, for racecheck")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after so long")
    chosen = parser.parse_args()
    start, done, wrong = time.monotonic(), 0, 0
    everything = list(programs(chosen.reduced))
    for name, dtype, program in everything:
        if time.monotonic() - start > chosen.seconds:
            break
        worst = 0.0
        for ours, expected in zip(program(chosen.device), program("cpu"), strict=True):
            error = (ours.double() - expected.double()).abs().max() / expected.double().abs().max()
            worst = max(worst, error.item() if error.isfinite() else float("inf"))
        fine = worst <= TOLERANCES[dtype]
        done, wrong = done + 1, wrong + (not fine)
        print(f"{name}, {str(dtype)[6:]}: {worst:.1e}" + ("" if fine else "  WRONG"), flush=True)
    seconds = time.monotonic() - start
    print(f"sanitize: {done} of {len(everything)} done in {seconds:.0f} s, {wrong} wrong", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
