# SPDX-License-Identifier: Apache-2.0
"""A `StaircaseKVCache` as a dict, and back: what the dict must be for a cache to take it over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor

from pycore._checks import is_bool
from pycore._tensors import check_tensor
from pycore.cache.staircase import Staircase
from pycore.cache.staircase_prefix import trimmed
from pycore.cache.staircase_storage import Side, allocate, whole_groups

__all__ = ["loaded", "state_of"]


class Held(Protocol):
    """What is read of a `StaircaseKVCache`."""

    staircase: Staircase
    kv_heads: int
    capacity: int | None
    dtype: torch.dtype
    _lengths: Tensor
    _peak: Tensor
    _rows: int
    _storage: list[list[Tensor]]
    _sides: tuple[Side, ...]


def _settings(cache: Held) -> dict[str, Any]:
    """What two caches must have alike for one's tensors to mean the same in the other."""
    stairs = cache.staircase
    plain = {f.name: getattr(stairs, f.name) for f in fields(stairs) if not f.name.endswith("rotation")}
    plain |= dict(zip(("key_bits", "value_bits"), stairs.ladders, strict=True))
    del plain["bits"]
    return plain | {name: getattr(cache, name) for name in ("kv_heads", "head_dim", "value_dim", "capacity", "dtype")}


def state_of(cache: Held) -> dict[str, Any]:
    """Everything needed to go on elsewhere; the tensors are the cache's own."""
    rotations = dict(zip(("key_rotation", "value_rotation"), (side.rotation for side in cache._sides), strict=True))
    tiles = cache._rows // cache.staircase.group_size
    key, value = (trimmed(x, side.rings(), tiles) for x, side in zip(cache._storage, cache._sides, strict=True))
    tensors = {"key": key, "value": value, "lengths": cache._lengths, "peak": cache._peak}
    return _settings(cache) | rotations | tensors


def loaded(cache: Held, state: Any) -> tuple[Tensor, Tensor, list[list[Tensor]], int]:
    """Lengths, peak, storage and its rows: copies of a state's, once all of it fits the cache's settings."""
    op = "StaircaseKVCache.load_state_dict"
    if not isinstance(state, Mapping):
        raise TypeError(f"{op}: state is a {type(state).__name__} and must be a dict")
    settings = _settings(cache)
    for name in (*settings, "key_rotation", "value_rotation", "key", "value", "lengths", "peak"):
        if name not in state:
            raise ValueError(f"{op}: {name} is missing")
    for name, mine in settings.items():
        given = tuple(state[name]) if isinstance(mine, tuple) else state[name]
        if is_bool(given) or given != mine:
            raise ValueError(f"{op}: {name} is {given!r} and must be {mine!r}")
    for name, side in zip(("key_rotation", "value_rotation"), cache._sides, strict=True):
        given = state[name]
        if (given is None) != (side.rotation is None) or (
            side.rotation is not None and not (isinstance(given, Tensor) and torch.equal(given, side.rotation))
        ):
            raise ValueError(f"{op}: {name} is another than the cache's and must be equal to it")
    counts = []
    for name in ("lengths", "peak"):
        check_tensor(op, name, state[name])
        if state[name].dtype != torch.int64 or state[name].dim() != 1 or state[name].device.type != "cpu":
            raise ValueError(f"{op}: {name} is {state[name].dtype} {list(state[name].shape)} and must be int64 [batch]")
        counts.append(state[name].detach().clone())
    lengths, peak = counts
    if lengths.shape != peak.shape or bool((lengths < 0).any()) or bool((peak < lengths).any()):
        raise ValueError(f"{op}: peak is {peak.tolist()} and must be at least lengths, {lengths.tolist()}")
    if bool((peak - lengths > cache.staircase.rollback).any()):
        raise ValueError(f"{op}: peak is {peak.tolist()}, more than rollback, {cache.staircase.rollback}, past lengths")
    rows = whole_groups(cache.staircase, int(peak.max()) if peak.numel() else 0)
    if cache.capacity is None:
        # What the state has room for, which may be more than it has tokens.
        for name, side in zip(("key", "value"), cache._sides, strict=True):
            given = state[name]
            if isinstance(given, Sequence) and len(given) == 9 and all(isinstance(x, Tensor) for x in given):
                if side.full_rows is None and given[0].dim() == 4:
                    rows = max(rows, given[0].shape[2] - cache.staircase.sink_size)
                elif given[1].dim() == 4 and given[1].shape[2] > 1:
                    rows = max(rows, given[1].shape[2] * cache.staircase.group_size)
    elif rows > whole_groups(cache.staircase, cache.capacity):
        raise ValueError(f"{op}: peak is {peak.tolist()} and must be at most capacity, {cache.capacity}")
    else:
        rows = whole_groups(cache.staircase, cache.capacity)
    storage = []
    for name, side in zip(("key", "value"), cache._sides, strict=True):
        given = state[name]
        if not isinstance(given, Sequence) or len(given) != 9:
            raise ValueError(f"{op}: {name} must be a list of 9 tensors")
        wanted = allocate(side, cache.staircase, rows, len(lengths), cache.kv_heads, cache.dtype)
        for i, (x, like) in enumerate(zip(given, wanted, strict=True)):
            check_tensor(op, f"{name}[{i}]", x)
            if x.shape != like.shape or x.dtype != like.dtype or x.device.type != "cpu":
                raise ValueError(
                    f"{op}: {name}[{i}] is {str(x.dtype)[6:]} {list(x.shape)} and must be {str(like.dtype)[6:]} "
                    f"{list(like.shape)}"
                )
            like.copy_(x)
        storage.append(wanted)
    return lengths, peak, storage, rows
