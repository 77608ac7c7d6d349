# SPDX-License-Identifier: Apache-2.0
"""A step like the one before it goes to the op at once; one that differs in anything does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pycore import KVCache, LambdaKVCache

CACHES: dict[str, Callable[[], Any]] = {
    "lambda": lambda: LambdaKVCache(3, 40, rollback=4), "all": KVCache, "given capacity": lambda: KVCache(200),
}  # fmt: skip


def step(batch: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(batch, heads, 1, 16, dtype=dtype) for heads in (4, 2, 2)]


def apart(cache: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    cache.append(key, value)
    return cache.attend(query, **options)


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_steps_and_options_that_change(make: Callable[[], Any]) -> None:
    """Every option is looked at; tables are the same where they are the same objects."""
    tables = [(torch.randn(256, 8), torch.randn(256, 8)) for _ in range(2)]
    options: list[dict[str, Any]] = [
        {}, {"softcap": 2.0}, {"softcap": 2.5}, {"scale": 0.3}, {"rope": tables[0]}, {"rope": tables[1]},
        {"rope": tables[1], "distance_limit": 41}, {"rope": tables[1], "distance_limit": 50},
        {"sink_logits": torch.randn(4)}, {"sink_logits": torch.randn(4)}, {"rope": tables[0], "interleaved": True},
    ]  # fmt: skip
    cache, other = make(), make()
    for given in options:
        for _ in range(4):
            tokens = step()
            assert torch.equal(cache.append_and_attend(*tokens, **given), apart(other, *tokens, **given))
    out = cache.append_and_attend(*step(), return_lse=True)
    assert len(cache.append_and_attend(*step(), return_lse=True)) == len(out) == 2


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_rows_and_tokens_that_change(make: Callable[[], Any]) -> None:
    cache, other = make(), make()
    for change in (
        lambda x: x.crop(3), lambda x: x.reorder(torch.tensor([1, 0])), lambda x: x.repeat_interleave(2),
        lambda x: x.select(torch.tensor([3])), copy.deepcopy, lambda x: x.reset(), lambda x: None,
    ):  # fmt: skip
        batch = 2 if cache._lengths is None else len(cache.lengths)
        for _ in range(70):  # a cache that grows does so between them
            tokens = step(batch)
            assert torch.equal(cache.append_and_attend(*tokens), apart(other, *tokens))
        if cache.nbytes and getattr(cache, "capacity", None) is not None:
            for each in (cache, other):
                each.crop(60)
        cache, other = change(cache) or cache, change(other) or other


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_what_is_refused(make: Callable[[], Any]) -> None:
    """With the sentences of a first call, and nothing is taken."""
    cache = make()
    for _ in range(3):
        cache.append_and_attend(*step())
    query, key, value = step()
    with pytest.raises(ValueError, match=r"key has shape \[3, 2, 1, 16\] and must be \[2, 2, tokens, 16\]"):
        cache.append_and_attend(query, *step(3)[1:])
    with pytest.raises(ValueError, match="key is torch.float64 on cpu and must be torch.float32 on cpu"):
        cache.append_and_attend(query, *step(dtype=torch.float64)[1:])
    with pytest.raises(TypeError, match="query"):
        cache.append_and_attend(None, key, value)
    with pytest.raises(ValueError, match="scale is nan"):
        cache.append_and_attend(query, key, value, scale=float("nan"))
    assert cache.lengths.tolist() == [3, 3]


def test_a_full_cache() -> None:
    cache = KVCache(5)
    for _ in range(5):
        cache.append_and_attend(*step())
    with pytest.raises(ValueError, match="must leave it with at most 5"):
        cache.append_and_attend(*step())
    assert cache.lengths.tolist() == [5, 5]
