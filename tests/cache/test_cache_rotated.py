# SPDX-License-Identifier: Apache-2.0
"""Query and key that a model has rotated already go in turned back, with the bits of turning them back by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore import KVCache, LambdaKVCache
from pycore.ops import rotary_tables, rotate
from pycore.positions import rope_frequencies, rope_tables

HEADS, KV_HEADS, HEAD_DIM, LENGTH, PROMPT = 4, 2, 24, 110, 90
CACHES: dict[str, Callable[[], Any]] = {"lambda": lambda: LambdaKVCache(3, 40), "all": KVCache}


def tokens(dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(batch, heads, LENGTH, HEAD_DIM).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return query, key, value


def turns(dtype: torch.dtype, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Of a part of the channels."""
    return rotary_tables(positions, rope_frequencies(0, 16, 10000.0, {}), dtype == torch.float64)


@pytest.mark.parametrize("each_row", [False, True], ids=["one table", "a table a row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_bits(make: Callable[[], Any], dtype: torch.dtype, each_row: bool, isa: str) -> None:
    """A prompt longer than the ring, a chunk, and steps; each like the one before it or, in between, learning."""
    query, key, value = tokens(dtype)
    positions = torch.arange(LENGTH)[None] + (torch.tensor([[5], [0]]) if each_row else 0)
    cos, sin = turns(dtype, positions)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    rope = tuple(x.double() if dtype == torch.float64 else x for x in rope_tables(LENGTH + 64, 16))
    cache, by_hand = make(), make()
    for begin, end in ((0, PROMPT), (PROMPT, 95), *((i, i + 1) for i in range(95, LENGTH))):
        q, k, v = (x[:, :, begin:end] for x in (query, key, value))
        tables = cos[:, begin:end], sin[:, begin:end]
        plain = rotate(q, *tables, inverse=True), rotate(k, *tables, inverse=True)
        learns = begin == 100
        with torch.set_grad_enabled(learns):
            out = cache.append_and_attend(q.clone().requires_grad_(learns), k, v, rotated=tables, rope=rope)
        assert torch.equal(out, by_hand.append_and_attend(*plain, v, rope=rope))
        assert out.requires_grad == learns
    assert torch.equal(cache.keys(), by_hand.keys())


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_compiled(make: Callable[[], Any]) -> None:
    query, key, value = tokens(torch.float32)
    cos, sin = turns(torch.float32, torch.arange(LENGTH)[None])
    cache, other = make(), make()
    step = torch.compile(lambda q, k, v, c, s: cache.append_and_attend(q, k, v, rotated=(c, s)), fullgraph=True)
    with torch.no_grad():
        for each in (cache, other):
            each.append(key[:, :, :80], value[:, :, :80])
        for i in range(80, 84):
            new = [x[:, :, i : i + 1] for x in (query, key, value)]
            tables = cos[:, i : i + 1], sin[:, i : i + 1]
            assert torch.equal(step(*new, *tables), other.append_and_attend(*new, rotated=tables))


@torch.no_grad()
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_what_is_refused(make: Callable[[], Any]) -> None:
    """Before anything is written, at a first call and at one like it."""
    query, key, value = (x[:, :, :1] for x in tokens(torch.float32))
    cos, sin = turns(torch.float32, torch.zeros(1, 1, dtype=torch.int64))
    cache = make()
    for held in range(3):
        for rotated, kind, words in (
            (cos, TypeError, "rotated is a Tensor and must be a tuple of cos and sin"),
            ((cos,), TypeError, "rotated is a tuple and must be a tuple of cos and sin"),
            ((cos, None), TypeError, "rotated's sin is a NoneType and must be a Tensor"),
            ((cos.double(), sin.double()), ValueError, "rotated's cos has dtype float64 and must have float32"),
            ((cos[:, :, :4], sin), ValueError, r"rotated's sin has shape \[1, 1, 8\] and must have rotated's cos's"),
            ((cos.expand(3, -1, -1), sin.expand(3, -1, -1)), ValueError,
             r"rotated's cos has shape \[3, 1, 8\] and must be \[2 or 1, 1, at most 12\], as key is"),
        ):  # fmt: skip
            with pytest.raises(kind, match=rf"{type(cache).__name__}\.(attend|append): {words}"):
                cache.append_and_attend(query, key, value, rotated=rotated)
            assert cache._lengths is None if held == 0 else cache.lengths.tolist() == [held, held]
        cache.append_and_attend(query, key, value, rotated=(cos, sin))


def test_opcheck() -> None:
    cache = KVCache(64)
    query, key, value = (x[:, :, :2] for x in tokens(torch.float32))
    cache.append(key, value)
    state = cache.state_dict()
    arguments = (None, None, None, None, None, None, "append", "attend", "causal", [], False, -1, None, 0.0, 0, 0, -1)
    tables = turns(torch.float32, torch.arange(2)[None])
    held = state["key"], state["value"], state["lengths"]
    torch.library.opcheck(torch.ops.pycore.attention_append, (query, key, value, *held, *arguments, None, *tables))
