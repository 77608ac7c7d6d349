# SPDX-License-Identifier: Apache-2.0
"""Decoding on a staircase cache that stays packed, and taking a token into it.

Every contender of a case attends to the same keys and values: those that the staircase holds, which the peers are given
unpacked. Bytes are what a query has to read of the packed cache, for the peers too: their share of the limit says how
far they are from a cache of that size, not how fast they read their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import captured, staircase_peers
from bench.case import Case, Options, Outputs, largest_error
from bench.inputs import RANDOM

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
STEP, SINK, GROUP_SIZE, NEW = 128, 4, 64, 64
TOLERANCE = 1.2e-2  # of the largest output: three rounding units of bfloat16, in which the unpacked keys are
DECODE = f"staircase decode (1 query, {HEADS} heads over {KV_HEADS}, D {HEAD_DIM})"
BINDS = f"staircase decode, what binds: the same cache, more query heads over {KV_HEADS}, D {HEAD_DIM}"
PEERS = f"quantized caches, each in its own way (1 query, {HEADS} heads over {KV_HEADS}, D {HEAD_DIM})"
OWN_WAY = {8: 0.03, 4: 0.4}  # of the largest output: what that many bits cost on drawn data, by each one's grid
APPEND = f"staircase, {NEW} tokens appended one at a time"

Inputs = tuple[Any, ...]  # a cache, and tensors


def _drawn(length: int, source: str = RANDOM) -> tuple[torch.Tensor, ...]:
    """A query, keys and values; those of a real model from three of its layers, its newest query last."""
    if source == captured.NAME:
        query, key, value = (x[:, :, :length] for x in captured.attention_inputs())
        return query[:, :, -1:], key, value
    generator = torch.Generator().manual_seed(length)

    def draw(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, HEAD_DIM, generator=generator).bfloat16()

    return draw(HEADS, 1), draw(KV_HEADS, length), draw(KV_HEADS, length)


def _filled(bits: Sequence[int], length: int, more: int = 0, source: str = RANDOM) -> tuple[Any, torch.Tensor]:
    """A cache with `length` tokens and room for more, and a query."""
    from pycore import Staircase, StaircaseKVCache

    query, key, value = _drawn(length, source)
    batch, kv_heads, _, head_dim = key.shape
    stairs = Staircase(bits, step=STEP, sink_size=SINK, group_size=GROUP_SIZE, rollback=NEW)
    cache = StaircaseKVCache(
        stairs, batch=batch, kv_heads=kv_heads, head_dim=head_dim, capacity=length + more, dtype=torch.bfloat16
    )
    for at in range(0, length, 1024):
        cache.append(key[:, :, at : at + 1024], value[:, :, at : at + 1024])
        cache.attend(query)  # lets go of what a long chunk keeps
    return cache, query


def packed_bytes(bits: Sequence[int], length: int, channels: int = KV_HEADS * HEAD_DIM) -> float:
    """What the newest token's query reads: sinks and the newest step in full, codes and their scales of the rest.

    `channels`: of all batch rows and heads.
    """
    newest, last = (length - 1) // STEP, len(bits) - 1
    total = 0.0
    for step in range(newest + 1):
        tokens = min(length - step * STEP, STEP)
        width = bits[min(newest - step, last)]
        sinks = SINK if step == 0 and width < 16 else 0
        scales = 0 if width == 16 else 8 * 5 / GROUP_SIZE  # lo and hi in bfloat16, and a center
        total += (tokens - sinks) * (width + scales) + 16 * sinks
    return 2 * channels * total / 8


# ---- decoding -------------------------------------------------------------------------------------------------------


def _decode_inputs(bits: Sequence[int], length: int, source: str = RANDOM) -> Inputs:
    cache, query = _filled(bits, length, source=source)
    return cache, query, cache.keys(), cache.values()


def _folded(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The heads of a group as rows of one head: what a user does by hand, since all see the same keys."""
    batch, kv_heads, _, head_dim = key.shape
    return query.view(batch, kv_heads, -1, head_dim)


def _packed(tensors: Inputs) -> Callable[[], Outputs]:
    cache, query = tensors[:2]
    return lambda: (cache.attend(query),)


def _pycore(tensors: Inputs) -> Callable[[], Outputs]:
    from pycore import ops

    return lambda: (ops.attention(*tensors[1:]),)


def _folded_sdpa(tensors: Inputs) -> Callable[[], Outputs]:
    query, key, value = tensors[1:]
    return lambda: (scaled_dot_product_attention(_folded(query, key), key, value).view_as(query),)


def _folded_float32(tensors: Inputs) -> Callable[[], Outputs]:
    query, key, value = (x.float() for x in tensors[1:])
    return lambda: (scaled_dot_product_attention(_folded(query, key), key, value).view_as(query),)


def _grouped_sdpa(tensors: Inputs) -> Callable[[], Outputs]:
    query, key, value = tensors[1:]
    return lambda: (scaled_dot_product_attention(query, key, value, enable_gqa=True),)


def _check_decode(tensors: Inputs) -> Callable[[Outputs], float]:
    query, key, value = (x.double() for x in tensors[1:])
    reference = scaled_dot_product_attention(_folded(query, key), key, value).view_as(query)
    return lambda outputs: largest_error(outputs, [reference])


def decode_case(bits: Sequence[int], length: int, quick: bool = False, source: str = RANDOM) -> Case:
    """One query against `length` tokens on a ladder."""
    real = source == captured.NAME
    channels = len(captured.LAYERS) * captured.KV_HEADS * captured.HEAD_DIM if real else KV_HEADS * HEAD_DIM
    group = f"staircase decode ({source}: B3, 9 heads over 3, D 64)" if real else DECODE
    contenders: dict[str, Callable[[Any], Callable[[], Outputs]]] = {
        "pycore, packed": _packed,
        "pycore, bfloat16": _pycore,
        "SDPA bfloat16, heads folded": _folded_sdpa,
    }
    if not quick:
        contenders["SDPA float32, heads folded"] = _folded_float32
        contenders["SDPA bfloat16, enable_gqa"] = _grouped_sdpa
    return Case(
        name=f"staircase decode, {'/'.join(map(str, bits))}, {length} keys" + (f", {source}" if real else ""),
        group=group,
        inputs=lambda: _decode_inputs(bits, length, source),
        contenders=contenders,
        check=_check_decode,
        tolerance=TOLERANCE,
        bytes=packed_bytes(bits, length, channels),
        memory=() if quick else ("pycore, packed", "SDPA float32, heads folded"),
    )


def binds_case(bits: Sequence[int], length: int, heads: int) -> Case:
    """The bytes and the unpacking are those of any number of heads; the products grow with them.

    So from times with 8 and 32 heads, the line through them says what is which.
    """

    def query_of(tensors: Inputs) -> Inputs:
        first = tensors[1][:, :heads]
        return tensors[0], first, *tensors[2:]

    def check(tensors: Inputs) -> Callable[[Outputs], float]:
        query, key, value = (x.double() for x in query_of(tensors)[1:])
        return lambda outputs: largest_error(
            outputs, [scaled_dot_product_attention(query, key, value, enable_gqa=True)]
        )

    return Case(
        name=f"staircase decode, {'/'.join(map(str, bits))}, {length} keys, {heads} heads",
        group=BINDS,
        inputs=lambda: _decode_inputs(bits, length),
        contenders={
            "pycore, packed": lambda x: _packed(query_of(x)),
            "pycore, bfloat16": lambda x: _pycore(query_of(x)),
        },
        check=check,
        tolerance=TOLERANCE,
        bytes=packed_bytes(bits, length),
    )


def _in_turn(prepare: Callable[[Any], Callable[[], Outputs]], tensors: Any, layers: int) -> Callable[[], Outputs]:
    """A step over that many layers, each with a cache of its own: what is read is not what was read just now."""
    steps = [prepare(tensors) for _ in range(layers)]

    def step() -> Outputs:
        for each in steps:
            outputs = each()
        return outputs

    return step


def peers_case(length: int, bits: int, layers: int) -> Case:
    """Beside other libraries' caches of as many bits, all against attention on what was given to them.

    With 4 bits, the ladder that stops at 8 stands beside the one that goes on to 4, which must not be slower. Several
    layers at the shorter length, as a model has them, so that no cache is still in the processor's, and what it takes
    to wake a pool's threads is paid once.
    """
    ladders = ((16, 8),) if bits == 8 else ((16, 8, 4), (16, 8))

    def packed(each: tuple[int, ...]) -> Callable[[Any], Callable[[], Outputs]]:
        def prepare(tensors: Any) -> Callable[[], Outputs]:
            cache = _filled(each, length)[0]
            return lambda: (cache.attend(tensors[0]),)

        return prepare

    found = {f"pycore, {'/'.join(map(str, each))}": packed(each) for each in ladders}
    found |= staircase_peers.available(bits)
    return Case(
        name=f"quantized decode, {bits} bits, {length} keys" + (f", {layers} layers" if layers > 1 else ""),
        group=PEERS,
        inputs=lambda: _drawn(length),
        contenders={name: lambda x, prepare=prepare: _in_turn(prepare, x, layers) for name, prepare in found.items()},
        check=lambda tensors: _check_decode((None, *tensors)),
        tolerance=OWN_WAY[bits],
        bytes=layers * packed_bytes(ladders[0], length),
    )


# ---- appending ------------------------------------------------------------------------------------------------------


def _append_inputs(length: int) -> Inputs:
    cache, _ = _filled((16, 8, 4), length, NEW)
    return cache, *_drawn(length)[1:], *(x[:, :, :NEW].contiguous() for x in _drawn(length)[1:])


def _append(tensors: Inputs) -> Callable[[], Outputs]:
    """One tile is finished and quantized; the tokens are taken back, so that every round does the same."""
    cache, (key, value) = tensors[0], tensors[3:]
    full = cache.state_dict()["key"][0]
    at = SINK + tensors[1].shape[2] % (full.shape[2] - SINK)

    def step() -> Outputs:
        for i in range(NEW):
            cache.append(key[:, :, i : i + 1], value[:, :, i : i + 1])
        cache.crop(NEW)
        return (full[:, :, at : at + NEW],)

    return step


def _concatenate(tensors: Inputs) -> Callable[[], Outputs]:
    """What transformers' DynamicCache does."""
    (keys, values), (key, value) = tensors[1:3], tensors[3:]

    def step() -> Outputs:
        held = keys, values
        for i in range(NEW):
            held = torch.cat([held[0], key[:, :, i : i + 1]], 2), torch.cat([held[1], value[:, :, i : i + 1]], 2)
        return (held[0][:, :, -NEW:],)

    return step


def _write_in_place(tensors: Inputs) -> Callable[[], Outputs]:
    """What its StaticCache does."""
    (key, value), length = tensors[3:], tensors[1].shape[2]
    held = [torch.cat([x, torch.zeros_like(new)], 2) for x, new in zip(tensors[1:3], (key, value), strict=True)]

    def step() -> Outputs:
        for i in range(NEW):
            for to, new in zip(held, (key, value), strict=True):
                to[:, :, length + i : length + i + 1] = new[:, :, i : i + 1]
        return (held[0][:, :, -NEW:],)

    return step


def _check_append(tensors: Inputs) -> Callable[[Outputs], float]:
    return lambda outputs: largest_error(outputs, [tensors[3].double()])


def append_case(length: int) -> Case:
    """Tokens one at a time after `length` others."""
    return Case(
        name=f"staircase append, 16/8/4, after {length} tokens",
        group=APPEND,
        inputs=lambda: _append_inputs(length),
        contenders={"pycore": _append, "torch.cat": _concatenate, "written in place": _write_in_place},
        check=_check_append,
        tolerance=0.0,
    )


def cases(options: Options) -> Iterable[Case]:
    """Ladders, what binds, other libraries and appending, at 4 k and 32 k tokens; less in a quick run."""
    if options.device != "cpu":
        return
    ladders = ((16, 8, 4), (16, 8, 4, 2)) if options.quick else ((16, 8), (16, 4), (16, 8, 4), (16, 8, 4, 2))
    for bits in ladders:
        for length in (4096, 32768):
            yield decode_case(bits, length, options.quick)
    if captured.present():
        yield decode_case((16, 8, 4), captured.TOKENS, options.quick, captured.NAME)
    if not options.quick:
        for heads in (KV_HEADS, HEADS):
            yield binds_case((16, 8, 4), 32768, heads)
    for length in (4096,) if options.quick else (4096, 32768):
        for width in (8, 4):
            yield peers_case(length, width, 8 if length == 4096 else 1)
    for length in (4096, 32768):
        yield append_case(length)


def bench_staircase(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
