# SPDX-License-Identifier: Apache-2.0
"""Decode: one query row against a long cache, where reading keys and values is the limit, not the arithmetic.

A query goes through the keys and values of several layers (`bench.case.through_layers` says why).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import captured
from bench.case import Case, Options, Outputs, Prepare, largest_error, layers_of, through_layers
from bench.inputs import RANDOM

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# Of the largest output: twenty rounding units of float32, three of the rounded bfloat16 result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}

LAYERS_BYTES = 256 * 2**20  # of keys and values of all layers

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _inputs(batch: int, length: int, dtype: torch.dtype, device: str, source: str = RANDOM) -> Inputs:
    if source == captured.NAME:
        query, key, value = (x[:, :, :length].to(dtype) for x in captured.attention_inputs())
        return query[:, :, -1:].contiguous(), key.contiguous(), value.contiguous()
    generator = torch.Generator(device).manual_seed(length)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, HEAD_DIM, generator=generator, device=device).to(dtype)

    return draw(HEADS, 1), draw(KV_HEADS, length), draw(KV_HEADS, length)


def _folded(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The heads of a group as rows of one head: what a user does by hand, since all see the same keys."""
    batch, kv_heads, _, head_dim = key.shape
    return query.view(batch, kv_heads, -1, head_dim)


def _pycore(tensors: Inputs) -> Callable[[], Outputs]:
    from pycore import ops

    return lambda: (ops.attention(*tensors),)


def _pycore_tiles(tensors: Inputs) -> Callable[[], Outputs]:
    """Over the cache that keeps keys as they are read."""
    from pycore import KVCache

    query, key, value = tensors
    cache = KVCache(key.shape[2])
    cache.append(key, value)

    def attend() -> Outputs:
        out = cache.attend(query)
        assert isinstance(out, torch.Tensor)
        return (out,)

    return attend


def _folded_sdpa(tensors: Inputs) -> Callable[[], Outputs]:
    query, key, value = tensors
    return lambda: (scaled_dot_product_attention(_folded(query, key), key, value).view_as(query),)


def _grouped_sdpa(tensors: Inputs) -> Callable[[], Outputs]:
    query, key, value = tensors
    return lambda: (scaled_dot_product_attention(query, key, value, enable_gqa=True),)


def _own(one: Prepare) -> Prepare:
    """On keys and values of its own."""
    return lambda tensors: one((tensors[0], *(x.clone() for x in tensors[1:])))


def _check(tensors: Inputs) -> Callable[[Outputs], float]:
    query, key, value = (tensor.double() for tensor in tensors)
    reference = scaled_dot_product_attention(_folded(query, key), key, value).view_as(query)
    return lambda outputs: largest_error(outputs, [reference] * len(outputs))


def decode_case(
    name: str,
    group: str,
    length: int,
    dtype: torch.dtype,
    peer_names: Iterable[str],
    batch: int = 1,
    device: str = "cpu",
    cached: bool = False,
    source: str = RANDOM,
    layers: int = 1,
) -> Case:
    """One query a batch row against `length` keys in each layer; `cached`: those of a KVCache."""
    channels = batch * (captured.KV_HEADS * captured.HEAD_DIM if source == captured.NAME else KV_HEADS * HEAD_DIM)
    contenders: dict[str, Prepare] = {
        "pycore": _pycore_tiles if cached else _pycore,
        "pycore, keys in rows": _pycore,
        "SDPA, heads folded": _folded_sdpa,
        "SDPA, enable_gqa": _grouped_sdpa,
    }
    return Case(
        name=name,
        group=group,
        inputs=lambda: _inputs(batch, length, dtype, device, source),
        contenders={name: through_layers(layers, _own(contenders[name])) for name in ("pycore", *peer_names)},
        check=_check,
        tolerance=TOLERANCE[dtype],
        bytes=2.0 * layers * channels * length * dtype.itemsize,
        device=device,
    )


def cases(options: Options) -> Iterable[Case]:
    """One query, 32 heads over 8, head_dim 128, float32 and bfloat16."""
    if options.device != "cpu":
        return
    peers = ("SDPA, heads folded",) if options.quick else ("SDPA, heads folded", "SDPA, enable_gqa")
    for cached in (False, True):
        what = "decode on a KVCache" if cached else "decode"
        for dtype in (torch.float32, torch.bfloat16):
            for length in (4096, 32768):
                layers = layers_of(LAYERS_BYTES, 2 * KV_HEADS * HEAD_DIM * length * dtype.itemsize)
                yield decode_case(
                    f"{what}, {layers} layers of {length} keys, {str(dtype).removeprefix('torch.')}",
                    f"{what} (1 query, 32 heads over 8, D 128)",
                    length,
                    dtype,
                    ("pycore, keys in rows", *peers) if cached else peers,
                    cached=cached,
                    layers=layers,
                )
    if captured.present():
        batch = len(captured.LAYERS)
        channels = batch * captured.KV_HEADS * captured.HEAD_DIM
        for dtype in (torch.float32, torch.bfloat16):
            layers = layers_of(LAYERS_BYTES, 2 * channels * captured.TOKENS * dtype.itemsize)
            yield decode_case(
                f"decode on a KVCache, {layers} times {captured.NAME}, {str(dtype).removeprefix('torch.')}",
                f"decode on a KVCache ({captured.NAME}: B{batch}, 9 heads over 3, D 64, {captured.TOKENS} keys)",
                captured.TOKENS,
                dtype,
                ("pycore, keys in rows", *peers),
                batch,
                cached=True,
                source=captured.NAME,
                layers=layers,
            )


def bench_attention_decode(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
