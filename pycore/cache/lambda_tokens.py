# SPDX-License-Identifier: Apache-2.0
"""The tokens that a `LambdaKVCache` holds: where they lie, and how rows are chosen, taken back, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycore._checks import check_int
from pycore._limits import KEY_TILE
from pycore.cache.checks import STATE_VERSION, check_state
from pycore.cache.held_tokens import HeldTokens, to_layout

__all__ = ["Chunk", "LambdaTokens"]


class Chunk(NamedTuple):
    """What a chunk too long for the ring attends to."""

    tokens: int
    key: Tensor
    value: Tensor
    key_starts: Tensor | None
    key_lengths: Tensor | None
    key_offset: Tensor | None


class LambdaTokens(HeldTokens):
    """Sinks and a ring of rows, see `LambdaKVCache`.

    A token's row follows from its position alone. A ring is a whole number of tiles, so that a tile of positions is a
    run of rows.
    """

    _name = "LambdaKVCache"
    rollback: int

    def __init__(self, sink_size: int, window_size: int, rollback: int = 0) -> None:
        for name, number, least in (("sink_size", sink_size, 0), ("window_size", window_size, 1),
                                    ("rollback", rollback, 0)):  # fmt: skip
            check_int("LambdaKVCache", name, number, least)
        self.sink_size = sink_size
        self.window_size = window_size
        self.rollback = rollback
        self._ring = -(-(window_size + rollback) // KEY_TILE) * KEY_TILE
        self.reset()

    def reset(self) -> None:
        """Forgets everything; the next tokens may have another shape, dtype or device."""
        super().reset()
        self._own = 0  # tokens of the newest chunk, if the ring has all that its queries see
        self._chunk: Chunk | None = None
        self._rehearsed: tuple[Any, ...] | None = None  # what `append_and_attend` was called with when it last worked

    # ---- what it holds ----------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        tensors = [] if self._chunk is None else [self._chunk.key, self._chunk.value]
        return super().nbytes + sum(x.numel() * x.element_size() for x in tensors)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on elsewhere; the tensors are the cache's own."""
        sizes = ("sink_size", "window_size", "rollback")
        state: dict[str, Any] = {"version": STATE_VERSION, **{name: getattr(self, name) for name in sizes}}
        if self._lengths is not None:
            cropped = self._cropped if self._behind is None else self._behind
            state |= {"key": self._key, "value": self._value, "lengths": self._lengths, "cropped": cropped}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a `state_dict` of a cache with the same sizes; the tensors are copied.

        A state of version 1, which has keys in rows, is taken too.

        Raises:
            ValueError: the sizes differ, or an entry is missing or does not fit the others.
            TypeError: an entry is of another type.
            The cache is then as before.
        """
        op = "LambdaKVCache.load_state_dict"
        sizes = {name: getattr(self, name) for name in ("sink_size", "window_size", "rollback")}
        found = check_state(op, state, sizes, self._before_ring + self._ring, self.sink_size + self._ring)
        if found is None:
            self.reset()
            return
        with torch.inference_mode(False):
            key, value = found[:2] if "version" in state else (self._from_version_1(x) for x in found[:2])
            key = to_layout(key)
            key, value, lengths = (
                x.detach().clone(memory_format=torch.contiguous_format) for x in (key, value, found[2])
            )
            behind = found[3].detach().clone() if isinstance(found[3], Tensor) else None
        cropped = found[3] if behind is None else int(behind.max()) if behind.numel() else 0
        self.reset()
        self._key, self._value, self._lengths = key, value, lengths
        self._cropped, self._behind = int(cropped), behind if cropped else None

    # ---- inside -----------------------------------------------------------------------------------------------------

    @property
    def _servable(self) -> int:
        """Queries whose windows the ring holds."""
        return self._ring - self.window_size + 1

    def _allocate(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        what = f"sink_size, window_size and rollback are {self.sink_size}, {self.window_size} and {self.rollback}"
        held_key, held_value = self._allocate_rows(key, value, self._before_ring + self._ring, what)
        with torch.inference_mode(False):
            return held_key, held_value, torch.zeros(key.shape[0], dtype=torch.int64, device=key.device)

    def _taken_back(self, tokens: int) -> None:
        self._own, self._chunk = 0, None

    def _chosen(self) -> None:
        self._chunk = None

    def _long_chunk(self, first: bool, key: Tensor, value: Tensor, starts: Tensor | None) -> Chunk:
        """The keys a chunk's queries need, before the chunk is written over what the first of them still read."""
        if first:
            return Chunk(key.shape[2], key, value, None if starts is None else starts.clone(), None, None)
        held_key, held_value, lengths = self._held("append")
        before = self.window_size - 1
        device = lengths.device
        # A row's sinks, the tokens before the chunk, and the chunk, without the gaps that short rows leave.
        sinks = lengths.clamp(max=self.sink_size)
        tail = (lengths - sinks).clamp(max=before)
        kept = sinks + tail
        new = key.shape[2] - (torch.zeros_like(lengths) if starts is None else starts)
        place = torch.arange(int((kept + new).max()), device=device)[None, :]
        evicted = (lengths - kept)[:, None]
        held_position = torch.where(place < sinks[:, None], place, place + evicted)
        in_chunk = place - kept[:, None] + (key.shape[2] - new)[:, None]
        from_chunk = place >= kept[:, None]

        def joined(held: Tensor, chunk: Tensor) -> Tensor:
            last = lengths.clamp(min=1)[:, None] - 1
            before = self._gather(held, torch.minimum(held_position, last))
            index = in_chunk.clamp(min=0, max=key.shape[2] - 1)[:, None, :, None]
            new = chunk.gather(2, index.expand(-1, chunk.shape[1], -1, chunk.shape[3]))
            return torch.where(from_chunk[:, None, :, None], new, before)

        return Chunk(key.shape[2], joined(held_key, key), joined(held_value, value), None, kept + new, lengths - kept)

    @property
    def _before_ring(self) -> int:
        """Rows that keep their tokens: the sinks, and what fills their last tile."""
        return -(-self.sink_size // KEY_TILE) * KEY_TILE

    def _rows(self, position: Tensor) -> Tensor:
        kept = self._before_ring
        return torch.where(position < kept, position, kept + position % self._ring)

    def _newest(self, method: str, held: Tensor) -> Tensor:
        lengths = self._held(method)[2]
        sinks = lengths.clamp(max=self.sink_size)
        kept = sinks + (lengths - sinks).clamp(max=self.window_size)
        place = torch.arange(int(kept.max()) if kept.numel() else 0, device=lengths.device)[None, :]
        position = torch.where(place < sinks[:, None], place, place + (lengths - kept)[:, None])
        missing = (place >= kept[:, None])[:, None, :, None]
        return self._gather(held, position).masked_fill(missing, 0)

    def _from_version_1(self, held: Tensor) -> Tensor:
        """Rows of a state whose sinks are all that stands before its ring."""
        between = torch.arange(self.sink_size, self._before_ring, device=held.device) % self._ring
        ring = torch.arange(self._ring, device=held.device)
        sinks = torch.arange(self.sink_size, device=held.device)
        return held.index_select(2, torch.cat([sinks, self.sink_size + between, self.sink_size + ring]))
