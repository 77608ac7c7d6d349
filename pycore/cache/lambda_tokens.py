# SPDX-License-Identifier: Apache-2.0
"""The tokens that a `LambdaKVCache` holds: where they lie, and how rows are chosen, taken back, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycore._checks import check_int
from pycore._limits import KEY_TILE
from pycore.cache.checks import check_index, check_state

__all__ = ["Chunk", "LambdaTokens"]


class Chunk(NamedTuple):
    """What a chunk too long for the ring attends to."""

    tokens: int
    key: Tensor
    value: Tensor
    key_starts: Tensor | None
    key_lengths: Tensor | None
    key_offset: Tensor | None


class LambdaTokens:
    """Sinks and a ring of rows, see `LambdaKVCache`.

    A token's row follows from its position alone. A ring is a whole number of tiles, so that a tile of positions is a
    run of rows.
    """

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
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self._lengths: Tensor | None = None
        self._cropped = 0  # tokens taken back and not appended anew, the most of any row
        self._behind: Tensor | None = None  # int64 [batch], the same of each row, where they may differ
        self._own = 0  # tokens of the newest chunk, if the ring has all that its queries see
        self._chunk: Chunk | None = None
        self._rehearsed: tuple[Any, ...] | None = None  # what `append_and_attend` was called with when it last worked

    # ---- what it holds ----------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> Tensor:
        """int64 [batch]: tokens seen by each row, padding and cropped tokens not counted."""
        return self._held("lengths")[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        tensors = [] if self._key is None or self._value is None else [self._key, self._value]
        tensors += [] if self._chunk is None else [self._chunk.key, self._chunk.value]
        return sum(x.numel() * x.element_size() for x in tensors)

    def keys(self) -> Tensor:
        """The keys that the newest token's query reads, by position: [batch, kv_heads, tokens, head_dim].

        Rows with fewer tokens than the longest are filled up with zeros.
        """
        return self._newest("keys", self._held("keys")[0])

    def values(self) -> Tensor:
        """The values beside `keys`: [batch, kv_heads, tokens, value_dim]."""
        return self._newest("values", self._held("values")[1])

    # ---- tokens taken back, rows chosen or repeated -------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Takes the newest `tokens` of every row back, as if they had never been appended.

        Raises:
            ValueError: more than `rollback` since the longest the cache has been, or more than a row has.
        """
        self._check_crop("LambdaKVCache.crop", tokens)
        lengths = self._held("crop")[2]
        with torch.inference_mode(False):
            self._lengths = lengths - tokens
            if self._behind is not None:
                self._behind = self._behind + tokens
        self._cropped += tokens
        self._own, self._chunk = 0, None

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was, as in beam search; int64 [batch]."""
        batch = self._held("reorder")[0].shape[0]
        self._choose("reorder", index, batch)

    def select(self, index: Tensor) -> None:
        """Keeps rows index, in that order; int64, of any length."""
        self._choose("select", index)

    def repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side, as for parallel samples of one prompt."""
        check_int("LambdaKVCache.repeat_interleave", "repeats", repeats, 1)
        lengths = self._held("repeat_interleave")[2]
        self._choose("repeat_interleave", torch.arange(len(lengths), device=lengths.device).repeat_interleave(repeats))

    # ---- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on elsewhere; the tensors are the cache's own."""
        state: dict[str, Any] = {name: getattr(self, name) for name in ("sink_size", "window_size", "rollback")}
        if self._lengths is not None:
            cropped = self._cropped if self._behind is None else self._behind
            state |= {"key": self._key, "value": self._value, "lengths": self._lengths, "cropped": cropped}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a `state_dict` of a cache with the same sizes; the tensors are copied.

        Raises:
            ValueError: the sizes differ, or an entry is missing or does not fit the others.
            TypeError: an entry is of another type.
            The cache is then as before.
        """
        op = "LambdaKVCache.load_state_dict"
        sizes = {name: getattr(self, name) for name in ("sink_size", "window_size", "rollback")}
        found = check_state(op, state, sizes, self.sink_size + self._ring)
        if found is None:
            self.reset()
            return
        with torch.inference_mode(False):
            key, value, lengths = (x.detach().clone(memory_format=torch.contiguous_format) for x in found[:3])
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

    def _held(self, method: str) -> tuple[Tensor, Tensor, Tensor]:
        if self._key is None or self._value is None or self._lengths is None:
            raise ValueError(f"LambdaKVCache.{method}: the cache is empty; append tokens first")
        return self._key, self._value, self._lengths

    def _allocate(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads = key.shape[:2]
        rows = self.sink_size + self._ring
        try:
            with torch.inference_mode(False):  # else nothing outside could take tokens back
                return (
                    key.new_zeros(batch, heads, rows, key.shape[3]),
                    value.new_zeros(batch, heads, rows, value.shape[3]),
                    torch.zeros(batch, dtype=torch.int64, device=key.device),
                )
        except (RuntimeError, TypeError, OverflowError) as error:
            if key.device.type != "cpu":
                raise
            size = batch * heads * rows * (key.shape[3] + value.shape[3]) * key.element_size()
            raise MemoryError(
                f"LambdaKVCache.append: sink_size, window_size and rollback are {self.sink_size}, {self.window_size} "
                f"and {self.rollback} and must fit the memory: {size} bytes cannot be allocated"
            ) from error

    def _catch_up(self, tokens: int, starts: Tensor | None) -> None:
        """Counts tokens that were appended anew."""
        if self._cropped == 0:
            return
        if starts is None and self._behind is None:
            self._cropped = max(0, self._cropped - tokens)
            return
        assert self._lengths is not None
        with torch.inference_mode(False):
            behind = torch.full_like(self._lengths, self._cropped) if self._behind is None else self._behind
            self._behind = (behind - (tokens if starts is None else tokens - starts)).clamp(min=0)
        self._settle()

    def _settle(self) -> None:
        """The most of any row, again. Compiled code, which cannot look, keeps what is more."""
        if self._behind is None or torch.compiler.is_compiling():
            return
        self._cropped = int(self._behind.max()) if self._behind.numel() else 0
        if self._cropped == 0:
            self._behind = None

    def _check_crop(self, op: str, tokens: int) -> None:
        check_int(op, "tokens", tokens)
        if tokens < 0:
            raise ValueError(f"{op}: tokens is {tokens} and must be at least 0")
        lengths = self._held(op.split(".")[1])[2]
        if self._cropped + tokens > self.rollback:
            already = f" with {self._cropped} taken back before" if self._cropped else ""
            raise ValueError(f"{op}: tokens is {tokens}{already} and must be at most rollback, {self.rollback}")
        shortest = int(lengths.min()) if lengths.numel() else tokens
        if tokens > shortest:
            raise ValueError(f"{op}: tokens is {tokens} and must be at most {shortest}, a row's length")

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
            rows = self._rows(held_position).clamp(max=held.shape[2] - 1)
            index = torch.where(from_chunk, held.shape[2] + in_chunk.clamp(max=key.shape[2] - 1), rows)
            both = torch.cat([held, chunk], dim=2)
            return both.gather(2, index[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3]))

        return Chunk(key.shape[2], joined(held_key, key), joined(held_value, value), None, kept + new, lengths - kept)

    def _rows(self, position: Tensor) -> Tensor:
        """Where the tokens at these positions lie."""
        return torch.where(position < self.sink_size, position, self.sink_size + position % self._ring)

    def _gather(self, held: Tensor, position: Tensor) -> Tensor:
        """What lies at int64 positions [batch, n]: [batch, kv_heads, n, channels]."""
        return held.gather(2, self._rows(position)[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3]))

    def _newest(self, method: str, held: Tensor) -> Tensor:
        lengths = self._held(method)[2]
        sinks = lengths.clamp(max=self.sink_size)
        kept = sinks + (lengths - sinks).clamp(max=self.window_size)
        place = torch.arange(int(kept.max()) if kept.numel() else 0, device=lengths.device)[None, :]
        position = torch.where(place < sinks[:, None], place, place + (lengths - kept)[:, None])
        missing = (place >= kept[:, None])[:, None, :, None]
        return self._gather(held, position).masked_fill(missing, 0)

    def _choose(self, method: str, index: Tensor, count: int | None = None) -> None:
        held_key, held_value, lengths = self._held(method)
        index = check_index(f"LambdaKVCache.{method}", index, len(lengths), count).to(lengths.device)
        with torch.inference_mode(False):
            key, value, lengths = (x.index_select(0, index) for x in (held_key, held_value, lengths))
            behind = None if self._behind is None else self._behind.index_select(0, index)
        self._key, self._value, self._lengths, self._behind = key, value, lengths, behind
        self._chunk = None
        self._settle()
