# SPDX-License-Identifier: Apache-2.0
"""How a `StaircaseKVCache` attends: on the packed cache, a step of the ladder at a time, or by unpacking it.

Unpacking says what the bits of the packed cache mean: what a query reads becomes float32, for all queries between two
steps at once, and goes to `pycore.ops.attention`; time and memory are those of a cache in float32. It serves groups
that are not the kernels' tiles of keys, and `prefill="full"`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pycore._limits import KEY_TILE
from pycore.cache.staircase import Staircase
from pycore.ops.attention import attention
from pycore.ops.linear import invariant_linear
from pycore.ops.staircase_attention import attend_packed

__all__ = ["Chunk", "attend_full", "attend_steps", "replay", "rotate"]


class Held(Protocol):
    """What attention needs of a `StaircaseKVCache`."""

    staircase: Staircase
    kv_heads: int
    _lengths: Tensor
    _peak: Tensor
    _storage: list[list[Tensor]]
    _sides: Any

    @property
    def _step(self) -> int: ...
    @property
    def _alike(self) -> int: ...
    def _read(self, which: int, positions: Tensor, ends: Tensor, wide: bool) -> Tensor: ...
    def _write(self, storage: list[list[Tensor]], key: Tensor, value: Tensor, starts: Tensor | None) -> None: ...


class Chunk(NamedTuple):
    """A chunk too long for the rings, and what they were before it."""

    key: Tensor  # rotated
    value: Tensor
    starts: Tensor | None
    lengths: Tensor
    peak: Tensor
    rings: tuple[dict[int, Tensor], dict[int, Tensor]]


def attend_steps(cache: Held, query: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Queries that the rings serve: those between two steps read alike, and are attended to together.

    On the packed cache, where its groups are the kernels' tiles of keys.
    """
    queries = query.shape[2]
    packed = cache.staircase.group_size == KEY_TILE
    cuts = {0, queries}
    for length in cache._lengths.tolist():
        cuts.update(range((queries - length) % cache._alike, queries, cache._alike))
    ordered = sorted(cuts)
    parts = []
    for begin, end in zip(ordered[:-1], ordered[1:], strict=True):
        newest = cache._lengths if end == queries else (cache._lengths - (queries - end)).clamp(min=0)
        if packed:
            parts.append(_attend_packed(cache, query[:, :, begin:end], newest, options))
            continue
        key, value = (cache._read(which, newest - 1, newest, True) for which in (0, 1))
        parts.append(_call(query[:, :, begin:end], key, value, newest, options))
    if not parts:
        key, value = (cache._read(which, cache._lengths - 1, cache._lengths, True) for which in (0, 1))
        parts = [_call(query, key, value, cache._lengths, options)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _attend_packed(cache: Held, query: Tensor, ends: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    stairs, rest = cache.staircase, dict(options)
    schedule = rest.pop("schedule")
    ladders = [side.bits for side in cache._sides]
    sizes = (stairs.sink_size, cache._step, stairs.group_size, stairs.grid)
    return attend_packed(query, cache._storage, ends, ladders, sizes, (schedule.kind, schedule.args), **rest)


def _call(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    results = attention(query, key, value, key_lengths=lengths, return_lse=True, **options)
    assert isinstance(results, tuple)
    return results


def attend_full(
    cache: Held, query: Tensor, options: dict[str, Any], chunk: Chunk | None = None
) -> tuple[Tensor, Tensor]:
    """All queries read what the first one does, and the newer tokens in full."""
    if chunk is None:
        first = (cache._lengths - query.shape[2]).clamp(min=0)
        key, value = (cache._read(which, first, cache._lengths, True) for which in (0, 1))
        return _call(query, key, value, cache._lengths, options)
    now = [list(storage) for storage in cache._storage]
    before, tokens = chunk.lengths, chunk.key.shape[2]
    sides = []
    for which, fresh in enumerate((chunk.key, chunk.value)):
        for i, ring in chunk.rings[which].items():
            cache._storage[which][i] = ring
        held = cache._read(which, before, before, True)
        cache._storage[which] = now[which]
        # A row's own tokens end where its chunk begins, behind the padding.
        start = torch.zeros_like(before) if chunk.starts is None else chunk.starts
        place = torch.arange(int(cache._lengths.max()))[None, :]
        old = place < before[:, None]
        index = torch.where(
            old, place, held.shape[2] + (place - before[:, None] + start[:, None]).clamp(max=tokens - 1)
        )
        both = torch.cat([held, fresh.float()], 2)
        sides.append(both.gather(2, index[:, None, :, None].expand(-1, cache.kv_heads, -1, both.shape[3])))
    return _call(query, sides[0], sides[1], cache._lengths, options)


def replay(cache: Held, chunk: Chunk, query: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Goes back to before the chunk and takes it in again, from step to step, attending as it goes.

    What is not a ring is written over with what is there, and the cache ends as it was: its bytes do not depend on
    chunks.
    """
    tokens = chunk.key.shape[2]
    for storage, rings in zip(cache._storage, chunk.rings, strict=True):
        for i, ring in rings.items():
            storage[i].copy_(ring)
    peak, cache._peak = cache._peak, chunk.peak
    cache._lengths.copy_(chunk.lengths)
    starts = torch.zeros_like(cache._lengths) if chunk.starts is None else chunk.starts
    outs, lses, done, error = [], [], 0, None
    while done < tokens:
        rooms = [cache._alike - length % cache._alike for length in cache._lengths.tolist()]
        end = min(tokens, done + min(rooms, default=tokens))
        part = slice(done, end)
        padding = (starts - done).clamp(0, end - done)
        cache._write(cache._storage, chunk.key[:, :, part], chunk.value[:, :, part], padding)
        cache._peak = torch.maximum(cache._peak, cache._lengths)
        if error is None:
            try:
                out, lse = attend_steps(cache, query[:, :, part], options)
                outs.append(out)
                lses.append(lse)
            except Exception as failure:  # the cache first becomes what it was
                error = failure
        done = end
    cache._peak = peak
    if error is not None:
        raise error
    return torch.cat(outs, 2), torch.cat(lses, 2)


def rotate(x: Tensor, rotation: Tensor, back: bool = False) -> Tensor:
    """Multiplies by the rotation of each KV head, or its transpose, in float32: a row's bits are its own."""
    share = x.shape[1] // rotation.shape[0]
    heads = [
        invariant_linear(part.float().contiguous(), turn if back else turn.mT.contiguous())
        for part, turn in zip(x.split(share, 1), rotation, strict=True)
    ]
    return torch.cat(heads, 1)
