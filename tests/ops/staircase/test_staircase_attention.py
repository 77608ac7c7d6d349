# SPDX-License-Identifier: Apache-2.0
"""Attention on the packed cache: values against unpacking, the same bits in any company, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pycore
from pycore import Staircase, StaircaseKVCache, _load, ops
from pycore.reference import attention as reference
from pycore.schedules import Causal, Lambda
from tests.support.tolerance import assert_as_accurate

_load.load_ops()
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LADDERS = [(16, 8, 4), (16, 8, 4, 2), (16, 4, 2), (16, 2), (16, 8), (16,)]


def filled(
    tokens: int, bits: Any = (16, 8, 4), batch: int = 2, kv_heads: int = 2, head_dim: int = 64, value_dim: int = 64,
    dtype: torch.dtype = F32, chunk: int = 0, **options: Any,
) -> StaircaseKVCache:  # fmt: skip
    generator = torch.Generator().manual_seed(tokens + head_dim)
    key = torch.randn(batch, kv_heads, tokens, head_dim, generator=generator).add(0.5).to(dtype)
    value = torch.randn(batch, kv_heads, tokens, value_dim, generator=generator).to(dtype)
    cache = StaircaseKVCache(
        Staircase(bits, **options), batch=batch, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, dtype=dtype
    )
    for begin in range(0, tokens, chunk or tokens):
        part = slice(begin, begin + (chunk or tokens))
        cache.append(key[:, :, part], value[:, :, part])
    return cache


def queries(cache: StaircaseKVCache, n: int, heads: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(cache.batch, heads, n, cache.head_dim, generator=generator)


def read(cache: StaircaseKVCache) -> tuple[Tensor, Tensor]:
    """What the newest query reads, without rounding to the cache's dtype."""
    sides = (cache._read(which, cache._lengths - 1, cache._lengths, True) for which in (0, 1))
    key, value = sides
    return key, value


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (128, 128), (40, 96), (7, 33), (80, 200)])
@pytest.mark.parametrize("bits", LADDERS, ids=str)
def test_as_accurate_as_unpacking(bits: Any, head_dim: int, value_dim: int, dtype: torch.dtype, isa: str) -> None:
    cache = filled(901, bits, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    key, value = read(cache)
    for schedule in (Causal(), Lambda(3, 500)):
        query = queries(cache, 1)
        out, lse = cache.attend(query, schedule=schedule, return_lse=True)
        exact = reference.attention(query.double(), key.double(), value.double(), schedule=schedule)
        plain = reference.attention(query, key, value, schedule=schedule)
        assert_as_accurate(out, exact[0], plain[0])
        assert_as_accurate(lse, exact[1], plain[1])


@pytest.mark.parametrize("tokens", [1, 5, 63, 64, 65, 128, 300, 1500])
def test_every_length(tokens: int, isa: str) -> None:
    """Sinks alone, tiles that are not finished, rings that have moved on."""
    cache = filled(tokens, (16, 8, 4, 2), chunk=50, sink_size=70)
    key, value = read(cache)
    query = queries(cache, 1)
    exact = reference.attention(query.double(), key.double(), value.double())[0]
    assert_as_accurate(cache.attend(query), exact, reference.attention(query, key, value)[0])


def test_options(isa: str) -> None:
    cache = filled(700, (16, 4, 2), grid="embedded")
    key, value = read(cache)
    query = queries(cache, 1)
    options = {"distance_bias": torch.randn(8, 90), "sink_logits": torch.randn(8), "softcap": 4.0, "scale": 0.3}
    exact = reference.attention(
        query.double(), key.double(), value.double(),
        **{n: x.double() if isinstance(x, Tensor) else x for n, x in options.items()},
    )  # fmt: skip
    assert_as_accurate(cache.attend(query, **options), exact[0], reference.attention(query, key, value, **options)[0])


def test_minmax_grid(isa: str) -> None:
    cache = filled(700, (16, 4), grid="minmax")
    key, value = read(cache)
    query = queries(cache, 1)
    exact = reference.attention(query.double(), key.double(), value.double())[0]
    assert_as_accurate(cache.attend(query), exact, reference.attention(query, key, value)[0])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_chunk_is_its_queries_one_by_one(dtype: torch.dtype, isa: str) -> None:
    """To the bit, over the borders of steps too."""
    whole, single = (filled(500, (16, 8, 4), dtype=dtype, step=64) for _ in range(2))
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
    assert torch.equal(cache.attend(query[:, [0, 4]]), together[:, [0, 4]])


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
    key, value = read(cache)
    query = queries(cache, 1)
    exact = reference.attention(query.double(), key.double(), value.double())[0]
    assert_as_accurate(cache.attend(query), exact, reference.attention(query, key, value)[0])


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
        (0, lambda x: x.expand(2, 8, 200, 64), "must stand in one step of 128 tokens"),
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
