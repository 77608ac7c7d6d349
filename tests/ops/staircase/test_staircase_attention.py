# SPDX-License-Identifier: Apache-2.0
"""Attention on the packed cache: values against unpacking, the same bits in any company, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pycore
from pycore import Staircase, StaircaseKVCache, _load, ops
from pycore.reference import attention as reference
from pycore.reference import staircase as reference_grid
from pycore.schedules import Causal, Lambda
from tests.support.tolerance import assert_as_accurate

_load.load_ops()
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LADDERS = [(16, 8, 4), (16, 8, 4, 2), (16, 4, 2), (16, 2), (16, 8), (16,), (8, 4, 2), (4,)]


def filled(
    tokens: int, bits: Any = (16, 8, 4), batch: int = 2, kv_heads: int = 2, head_dim: int = 64, value_dim: int = 64,
    dtype: torch.dtype = F32, chunk: int = 0, **options: Any,
) -> StaircaseKVCache:  # fmt: skip
    cache = StaircaseKVCache(
        Staircase(bits, **options), batch=batch, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, dtype=dtype
    )
    key, value = tokens_of(cache, tokens)
    for begin in range(0, tokens, chunk or tokens):
        part = slice(begin, begin + (chunk or tokens))
        cache.append(key[:, :, part], value[:, :, part])
    return cache


def queries(cache: StaircaseKVCache, n: int, heads: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(cache.batch, heads, n, cache.head_dim, generator=generator)


def tokens_of(cache: StaircaseKVCache, tokens: int) -> tuple[Tensor, Tensor]:
    """What `filled` put into the cache."""
    generator = torch.Generator().manual_seed(tokens + cache.head_dim)
    shape = (cache.batch, cache.kv_heads, tokens)
    key = torch.randn(*shape, cache.head_dim, generator=generator).to(cache.dtype)
    return key, torch.randn(*shape, cache.value_dim, generator=generator).to(cache.dtype)


def assert_attends(cache: StaircaseKVCache, tokens: int, query: Tensor, **options: Any) -> None:
    """The newest token's query, against plain torch that dequantizes and attends in float64, and in float32."""
    stairs, results = cache.staircase, []
    for dtype in (torch.float64, F32):
        sides = [
            reference_grid.read(
                x, tokens - 1, by_token=bool(which), bits=cache._sides[which].bits, step=cache._step,
                sink_size=stairs.sink_size, group_size=stairs.group_size, grid=stairs.grid, dtype=dtype,
            )
            for which, x in enumerate(tokens_of(cache, tokens))
        ]  # fmt: skip
        given = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in options.items()}
        results.append(reference.attention(query.to(dtype), *sides, **given))
    actual = cache.attend(query, return_lse=True, **options)
    for part, exact, plain in zip(actual, *results, strict=True):
        assert_as_accurate(part, exact, plain)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (128, 128), (40, 96), (111, 33), (80, 200)])
@pytest.mark.parametrize("bits", LADDERS, ids=str)
def test_as_accurate_as_unpacking(bits: Any, head_dim: int, value_dim: int, dtype: torch.dtype, isa: str) -> None:
    cache = filled(901, bits, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    for schedule in (Causal(), Lambda(3, 500)):
        assert_attends(cache, 901, queries(cache, 1), schedule=schedule)


def test_what_lay_in_scratch_does_not_matter(isa: str) -> None:
    """40 channels are padded to whole vectors, and the memory that pads them had NaN in it before."""
    cache = filled(901, (16, 8, 4, 2), head_dim=40, value_dim=96)
    query = queries(cache, 1)
    expected = cache.attend(query)
    for channels in (40, 48, 64, 128, 256):
        nothing = torch.full((2, 32, 192, channels), math.nan)
        ops.attention(nothing, nothing, nothing)
        assert torch.equal(cache.attend(query), expected) and expected.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 5, 63, 64, 65, 128, 300, 1500])
def test_every_length(tokens: int, isa: str) -> None:
    """Sinks alone, tiles that are not finished, rings that have moved on."""
    cache = filled(tokens, (16, 8, 4, 2), chunk=50, sink_size=70)
    assert_attends(cache, tokens, queries(cache, 1))


def test_options(isa: str) -> None:
    cache = filled(700, (16, 4, 2))
    options = {"distance_bias": torch.randn(32, 90), "sink_logits": torch.randn(32), "softcap": 4.0, "scale": 0.3}
    assert_attends(cache, 700, queries(cache, 1), **options)


def test_minmax_grid(isa: str) -> None:
    cache = filled(700, (16, 4), grid="minmax")
    assert_attends(cache, 700, queries(cache, 1))


@pytest.mark.parametrize("dtype, bits", [(F32, (16, 8, 4)), (BF16, (16, 8, 4)), (BF16, (8, 4))], ids=str)
def test_a_chunk_is_its_queries_one_by_one(dtype: torch.dtype, bits: tuple[int, ...], isa: str) -> None:
    """To the bit, over the borders of steps too."""
    step = 64 if bits[0] == 16 else 128
    whole, single = (filled(500, bits, dtype=dtype, step=step) for _ in range(2))
    generator = torch.Generator().manual_seed(9)
    key, value = torch.randn(2, 2, 2, 100, 64, generator=generator).to(dtype).unbind()
    query = torch.randn(2, 8, 100, 64, generator=generator)
    whole.append(key, value)
    together = whole.attend(query)
    for i in range(100):
        single.append(key[:, :, i : i + 1], value[:, :, i : i + 1])
        assert torch.equal(single.attend(query[:, :, i : i + 1]), together[:, :, i : i + 1])


def test_rows_alone_heads_alone_and_threads(isa: str, threads: None) -> None:
    cache = filled(1200, (16, 8, 4, 2), batch=3)
    query = queries(cache, 4)
    together = cache.attend(query)
    torch.set_num_threads(1)
    assert torch.equal(cache.attend(query), together)
    for b in range(3):
        alone = filled(1200, (16, 8, 4, 2), batch=3)
        alone.select(torch.tensor([b]))
        assert torch.equal(alone.attend(query[b : b + 1]), together[b : b + 1])
    assert torch.equal(cache.attend(query[:, [0, 16]]), together[:, [0, 16]])


def test_instruction_sets_agree() -> None:
    wide = [isa for isa in pycore.native.available_isas() if isa != "scalar"]
    before, results = pycore.native.cpu_isa(), []
    try:
        for isa in wide:
            pycore.native.set_cpu_isa(isa)
            cache = filled(1200, (16, 8, 4, 2), head_dim=72, value_dim=100, dtype=BF16)
            results.append(cache.attend(queries(cache, 3), return_lse=True))
    finally:
        pycore.native.set_cpu_isa(before)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_other_groups_are_unpacked(isa: str) -> None:
    cache = filled(700, (16, 8, 4), group_size=32, step=64)
    assert_attends(cache, 700, queries(cache, 1))


def arguments(cache: StaircaseKVCache, query: Tensor) -> list[Any]:
    stairs, ladders = cache.staircase, [list(side.bits) for side in cache._sides]
    sizes = [stairs.sink_size, cache._step, stairs.group_size, stairs.grid]
    return [query, *cache._storage, cache._lengths, None, None, *ladders, *sizes, "causal", [], 0.125, 0.0]


def test_opcheck_and_faces() -> None:
    cache = filled(700, (16, 8, 4), dtype=BF16)
    given = arguments(cache, queries(cache, 2))
    torch.library.opcheck(torch.ops.pycore.staircase_attention.default, given)
    out, lse = torch.ops.pycore.staircase_attention(*given)
    again = pycore.native.staircase_attention(
        given[0], *cache._storage, cache._lengths, key_bits=[16, 8, 4], value_bits=[16, 8, 4], sink_size=4, step=128,
        scale=0.125,
    )  # fmt: skip
    assert torch.equal(torch.from_dlpack(again[0]), out) and torch.equal(torch.from_dlpack(again[1]), lse)


def test_the_function_is_the_method() -> None:
    cache = filled(300)
    query = queries(cache, 1)
    assert torch.equal(ops.staircase_attention(query, cache), cache.attend(query))
    with pytest.raises(TypeError, match="staircase_attention: packed is a Tensor and must be a StaircaseKVCache"):
        ops.staircase_attention(query, query)
    with pytest.raises(TypeError, match="staircase_attention: query"):
        ops.staircase_attention([1.0], cache)


@pytest.mark.parametrize(
    "place, wrong, message",
    [
        (0, lambda x: x.double(), "query is float64 and must be float32"),
        (0, lambda x: x[..., :60], "key has head_dim 64 and query has 60; they must be equal"),
        (0, lambda x: x[:, :3], "key has 2 heads, which does not divide query's 3"),
        (0, lambda x: x.expand(2, 32, 200, 64), "must stand in one step of 128 tokens"),
        (3, lambda x: x + 10**6, "key_lengths[0] is 1000700 and must be between"),
        (10, lambda x: 32, "group_size is 32 and must be 64, a tile of keys"),
        (12, lambda x: "full", 'schedule is "full" and must be "causal" or "lambda"'),
    ],
)
def test_errors(place: int, wrong: Any, message: str) -> None:
    cache = filled(700, (16, 8, 4))
    given = arguments(cache, queries(cache, 1))
    before = [x.clone() for storage in cache._storage for x in storage]
    given[place] = wrong(given[place])
    with pytest.raises(ValueError) as error:
        torch.ops.pycore.staircase_attention(*given)
    assert str(error.value).startswith("staircase_attention: ") and message in str(error.value)
    after = [x for storage in cache._storage for x in storage]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
