# SPDX-License-Identifier: Apache-2.0
"""Small staircase caches for tests, what they are fed, and all bytes they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pycore import Staircase, StaircaseKVCache

SMALL: dict[str, Any] = {"step": 32, "sink_size": 3, "group_size": 16, "rollback": 20}


def small(bits: Sequence[int] = (16, 8, 4, 2), **more: Any) -> Staircase:
    return Staircase(bits, **(SMALL | more))


def made(stairs: Staircase, batch: int = 2, heads: int = 2, dim: int = 20, **more: Any) -> StaircaseKVCache:
    return StaircaseKVCache(stairs, batch=batch, kv_heads=heads, head_dim=dim, **more)


def tokens(n: int, batch: int = 2, heads: int = 2, dim: int = 20, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, heads, n, dim).to(dtype)


def stored(cache: StaircaseKVCache) -> list[Tensor]:
    state = cache.state_dict()
    return [*state["key"], *state["value"], state["lengths"], state["peak"]]


def same(a: StaircaseKVCache, b: StaircaseKVCache) -> bool:
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(stored(a), stored(b), strict=True))


def fed(cache: StaircaseKVCache, key: Tensor, value: Tensor, chunks: Sequence[int]) -> StaircaseKVCache:
    at = 0
    for n in chunks:
        cache.append(key[:, :, at : at + n], value[:, :, at : at + n])
        at += n
    assert at == key.shape[2]
    return cache
