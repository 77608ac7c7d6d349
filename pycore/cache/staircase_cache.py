# SPDX-License-Identifier: Apache-2.0
"""A key-value cache with fewer bits for older tokens, on an embedded grid, so that ageing moves and rounds nothing.

docs/ops/staircase.md writes the format down; csrc/include/pycore/staircase/cache.h is the kernels' side of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_int, check_str
from pycore._tangents import refuse_tangents
from pycore._tensors import check_devices, check_tensor
from pycore.cache.checks import check_index, check_starts, check_tokens
from pycore.cache.staircase import DTYPES, Staircase
from pycore.cache.staircase_attend import Chunk, attend_full, attend_steps, replay, rotate
from pycore.cache.staircase_prefix import StaircasePrefix, held_bytes
from pycore.cache.staircase_state import loaded, state_of
from pycore.cache.staircase_storage import Side, allocate, side_of, whole_groups
from pycore.ops import staircase_cache as _rules  # noqa: F401 - registers the rules of its ops
from pycore.schedules import Causal, Lambda, Schedule

__all__ = ["Staircase", "StaircaseKVCache"]


class StaircaseKVCache:
    """Keys and values of all tokens, with fewer bits the older they are.

    The codes are on a grid on which dropping low bits is quantizing coarsely, and stored as bit planes: the top two
    bits of every token, the next two and the low four in rings that cover the steps which read them, and full precision
    in a ring of its own. Tokens age as the rings move on: nothing is copied, quantized anew or kept twice, and
    appending a token takes the same time at every length. What lies in the cache does not depend on the chunks that
    tokens came in.

    Rows keep their own lengths and are stored without padding. On the CPU. What is appended gets no gradient; a query
    does.

    Args:
        staircase: the ladder.
        batch, kv_heads, head_dim: of what is appended.
        capacity: tokens of a row that the storage is made for, and no more; None lets it grow.
        value_dim: channels of the values, where they differ from head_dim.
        dtype: float32, float16 or bfloat16.
        device: the CPU.

    Example:
        >>> cache = StaircaseKVCache(Staircase((16, 8, 4)), batch=1, kv_heads=8, head_dim=64, dtype=torch.bfloat16)
        >>> cache.append(key, value)                    # [1, 8, tokens, 64], after RoPE
        >>> out = cache.attend(query)                   # [1, heads, tokens, 64]
    """

    def __init__(
        self,
        staircase: Staircase,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int | None = None,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        op = "StaircaseKVCache"
        if not isinstance(staircase, Staircase):
            raise TypeError(f"{op}: staircase is a {type(staircase).__name__} and must be a Staircase")
        for name, number, least in (("batch", batch, 0), ("kv_heads", kv_heads, 1), ("head_dim", head_dim, 1)):
            check_int(op, name, number, least)
        if value_dim is not None:
            check_int(op, "value_dim", value_dim, 1)
        if capacity is not None:
            check_int(op, "capacity", capacity, 1)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{op}: dtype is a {type(dtype).__name__} and must be a torch.dtype")
        if dtype not in DTYPES:
            raise ValueError(f"{op}: dtype is {str(dtype)[6:]} and must be float32, float16 or bfloat16")
        self.device = torch.device(device)
        if self.device.type != "cpu":
            raise ValueError(
                f"{op}: device is {self.device} and must be the CPU, which is where this cache has kernels"
            )
        step = staircase.step
        if isinstance(step, float):
            if capacity is None:
                raise ValueError(f"{op}: step is {step}, a fraction of capacity, which must be given")
            group = staircase.group_size
            staircase = replace(staircase, step=max(group, int(step * capacity) // group * group))
        self.staircase = staircase
        self.batch, self.kv_heads, self.head_dim = batch, kv_heads, head_dim
        self.value_dim = head_dim if value_dim is None else value_dim
        self.capacity, self.dtype = capacity, dtype
        self._sides = tuple(
            side_of(staircase, by_token, channels, kv_heads, capacity)
            for by_token, channels in ((False, head_dim), (True, self.value_dim))
        )
        self.reset()

    def _up(self, tokens: int) -> int:
        return whole_groups(self.staircase, tokens)

    def _allocate(self, side: Side, rows: int) -> list[Tensor]:
        return allocate(side, self.staircase, rows, self.batch, self.kv_heads, self.dtype)

    @property
    def _step(self) -> int:
        return int(self.staircase.step)

    @property
    def _alike(self) -> int:
        """Queries p with the same p // _alike read the same bits."""
        full = all(side.bits[0] == 16 for side in self._sides)
        return self._step if full else self.staircase.group_size

    def reset(self) -> None:
        """Forgets all tokens."""
        rows = self._up(self.capacity or 0)
        try:
            with torch.inference_mode(False):
                self._storage = [self._allocate(side, rows) for side in self._sides]
        except RuntimeError as error:
            raise MemoryError(
                f"StaircaseKVCache: capacity is {self.capacity} and must fit the memory, where that many tokens could "
                "not be allocated"
            ) from error
        with torch.inference_mode(False):
            self._lengths = torch.zeros(self.batch, dtype=torch.int64)
            self._peak = torch.zeros(self.batch, dtype=torch.int64)
        self._rows = rows
        self._chunk: Chunk | None = None

    # ---- what it holds ----------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> Tensor:
        """int64 [batch]: tokens of each row, padding and cropped tokens not counted."""
        return self._lengths.clone()

    @property
    def nbytes(self) -> int:
        """Bytes of all that the cache keeps: planes, full tokens, lo, hi and centers, room for tokens to come included.

        Also those of a chunk that is too long for the rings, until `attend` or another call lets go of it. Of a
        prefix's planes, which continuations share, the pages that this cache has written to.
        """
        tensors = [x for storage in self._storage for x in storage]
        if self._chunk is not None:
            tensors += [self._chunk.key, self._chunk.value, *(x for side in self._chunk.rings for x in side.values())]
        return sum(held_bytes(x) for x in tensors)

    @property
    def bits_per_value(self) -> float:
        """Bits of storage for each number appended, room for tokens to come included; NaN where there is none."""
        values = int(self._lengths.sum()) * self.kv_heads * (self.head_dim + self.value_dim)
        stored = sum(x.numel() * x.element_size() for storage in self._storage for x in storage)
        return 8 * stored / values if values else math.nan

    def keys(self) -> Tensor:
        """The keys that the newest token's query reads, by position: [batch, kv_heads, tokens, head_dim].

        In the cache's dtype, and rotated back where they are kept rotated. Rows with fewer tokens than the longest are
        filled up with zeros.
        """
        return self._as_read_at(0, self._lengths - 1)

    def values(self) -> Tensor:
        """The values beside `keys`: [batch, kv_heads, tokens, value_dim]."""
        return self._as_read_at(1, self._lengths - 1)

    def read_next(self) -> tuple[Tensor, Tensor]:
        """`keys` and `values` as the query of a token still to come reads them; older, so with fewer bits."""
        return self._as_read_at(0, self._lengths), self._as_read_at(1, self._lengths)

    def _as_read_at(self, which: int, positions: Tensor) -> Tensor:
        rotation = self._sides[which].rotation
        x = self._read(which, positions, self._lengths, rotation is not None)
        return x if rotation is None else rotate(x, rotation, back=True).to(self.dtype)

    def _read(self, which: int, positions: Tensor, ends: Tensor, wide: bool) -> Tensor:
        """What queries at `positions` read of the first `ends` tokens, as it is kept: rotated."""
        stairs, side = self.staircase, self._sides[which]
        tokens = int(ends.max()) if ends.numel() else 0
        result: Tensor = torch.ops.pycore.staircase_cache_read(
            self._storage[which], positions, ends, side.bits, side.by_token, stairs.sink_size, self._step,
            stairs.group_size, stairs.grid, tokens, wide,
        )  # fmt: skip
        return result

    # ---- tokens in --------------------------------------------------------------------------------------------------

    def append(self, key: Tensor, value: Tensor, *, starts: Tensor | None = None) -> None:
        """Takes new tokens at the end of every row.

        Args:
            key: [batch, kv_heads, tokens, head_dim], after RoPE; any strides with a contiguous last dimension.
            value: [batch, kv_heads, tokens, value_dim].
            starts: int64 [batch], the tokens at the front of this chunk that are padding and are left out.

        Raises:
            ValueError: something does not fit what the cache holds, an element is NaN or infinite, a group's range is
                not finite, or a row would be longer than capacity; nothing is appended.
            TypeError: an argument of another type.
        """
        op = "StaircaseKVCache.append"
        refuse_tangents(op, key=key, value=value)
        like = tuple(torch.empty(self.batch, self.kv_heads, 0, side.channels, dtype=self.dtype) for side in self._sides)
        check_tokens(op, key, value, like)  # type: ignore[arg-type]
        starts = check_starts(op, starts, key, values=True)
        tokens = key.shape[2]
        fresh = torch.full_like(self._lengths, tokens) if starts is None else tokens - starts
        lengths = self._lengths + fresh
        longest = int(lengths.max()) if lengths.numel() else 0
        if self.capacity is not None and longest > self.capacity:
            row = int(lengths.argmax())
            raise ValueError(
                f"{op}: row {row} would have {longest} tokens, {int(fresh[row])} of them new, and capacity is "
                f"{self.capacity}, which they must fit"
            )
        key, value = (
            x.detach() if side.rotation is None else rotate(x.detach(), side.rotation).to(self.dtype)
            for x, side in zip((key, value), self._sides, strict=True)
        )
        peak = torch.maximum(self._peak, lengths)
        chunk = None
        if not self._served(self._lengths.tolist(), peak.tolist()):
            rings = tuple(
                {i: storage[i].clone() for i in side.rings()}
                for side, storage in zip(self._sides, self._storage, strict=True)
            )
            chunk = Chunk(key, value, starts, self._lengths.clone(), self._peak.clone(), rings)  # type: ignore[arg-type]
        storage, rows = self._grown(longest)
        self._write(storage, key, value, starts)
        self._storage, self._rows, self._peak, self._chunk = storage, rows, peak, chunk

    def _write(self, storage: list[list[Tensor]], key: Tensor, value: Tensor, starts: Tensor | None) -> None:
        stairs = self.staircase
        torch.ops.pycore.staircase_cache_append(
            *storage, self._lengths, key, value, starts, *(side.bits for side in self._sides), stairs.sink_size,
            self._step, stairs.group_size, stairs.grid,
        )  # fmt: skip

    def _grown(self, tokens: int) -> tuple[list[list[Tensor]], int]:
        """Storage for so many tokens: what there is, or a copy with a fourth more room than is needed."""
        if tokens <= self._rows:
            return self._storage, self._rows
        rows = self._up(tokens if self._rows == 0 else max(tokens, self._rows + self._rows // 4))
        try:
            with torch.inference_mode(False):
                wider = [self._allocate(side, rows) for side in self._sides]
        except RuntimeError as error:
            raise MemoryError(
                f"StaircaseKVCache.append: {rows} tokens of a row must fit the memory, and could not be allocated"
            ) from error
        for new, old in zip(wider, self._storage, strict=True):
            for i, (to, of) in enumerate(zip(new, old, strict=True)):
                if to.shape == of.shape:
                    new[i] = of
                else:
                    kept = min(to.shape[2], of.shape[2])  # a prefix's pages may have more
                    to[:, :, :kept] = of[:, :, :kept]
        return wider, rows

    # ---- attention --------------------------------------------------------------------------------------------------

    def attend(
        self,
        query: Tensor,
        *,
        schedule: Schedule = Causal(),  # noqa: B008 - a frozen value
        prefill: str = "staircase",
        distance_bias: Tensor | None = None,
        sink_logits: Tensor | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Causal attention of the newest tokens' queries over the cache; the last query belongs to the newest token.

        The cache stays packed, where group_size is 64 and prefill "staircase"; otherwise what each query reads is
        unpacked, which takes time and memory as a cache in float32 does.

        Args:
            query: [batch, heads, n, head_dim], after RoPE. n is at most the size of the last chunk, or what the rings
                still hold for. A chunk too long for the rings can be attended to once, right after it was appended.
            schedule: Causal, or Lambda: sinks and a window over the quantized cache.
            prefill: "staircase": each query reads what it would have read alone, the same bits. "full": all of them
                read the first query's widths, and their own tokens in full.
            distance_bias, sink_logits, softcap, scale, return_lse: as for `pycore.ops.attention`.

        Returns:
            [batch, heads, n, value_dim] in query's dtype, and the log-sum-exp if asked for. Queries of a row that has
            fewer tokens than n give zeros.

        Raises:
            ValueError: something does not fit, or the rings have moved past what the first query reads.
        """
        op = "StaircaseKVCache.attend"
        check_tensor(op, "query", query)
        refuse_tangents(op, query=query)
        check_str(op, "prefill", prefill)
        if prefill not in ("staircase", "full"):
            raise ValueError(f"{op}: prefill is {prefill!r} and must be 'staircase' or 'full'")
        if not isinstance(schedule, Causal | Lambda):
            raise ValueError(f"{op}: schedule is {schedule!r} and must be Causal or Lambda")
        if query.dim() != 4 or query.shape[0] != self.batch or query.shape[3] != self.head_dim:
            raise ValueError(
                f"{op}: query has shape {list(query.shape)} and must be [{self.batch}, heads, n, {self.head_dim}]"
            )
        if query.shape[1] % self.kv_heads:
            raise ValueError(
                f"{op}: query has {query.shape[1]} heads and must have a multiple of the cache's {self.kv_heads}"
            )
        if query.dtype not in DTYPES:
            raise ValueError(f"{op}: query has dtype {str(query.dtype)[6:]} and must have float32, float16 or bfloat16")
        check_devices(op, cache=self._lengths, query=query)
        options = {
            "schedule": schedule, "distance_bias": distance_bias, "sink_logits": sink_logits, "softcap": softcap,
            "scale": scale,
        }  # fmt: skip
        queries, chunk = query.shape[2], self._chunk
        first = [max(length - queries, 0) for length in self._lengths.tolist()]
        rotated = query.float()
        if self._sides[0].rotation is not None:
            rotated = rotate(rotated, self._sides[0].rotation)
        if self._served(first, self._peak.tolist()):
            results = attend_full(self, rotated, options) if prefill == "full" else attend_steps(self, rotated, options)
        elif chunk is None:
            raise ValueError(
                f"{op}: query has {queries} rows, the first of which reads tokens that have left the rings, and must "
                "have fewer: a longer chunk can be attended to once, right after it was appended"
            )
        elif queries != chunk.key.shape[2]:
            raise ValueError(
                f"{op}: query has {queries} rows and must have {chunk.key.shape[2]}, one for each token appended last, "
                "or few enough for the rings"
            )
        elif prefill == "full":
            results = attend_full(self, rotated, options, chunk)
        else:
            results = replay(self, chunk, rotated, options)
        self._chunk = None
        out, lse = results
        if self._sides[1].rotation is not None:
            out = rotate(out, self._sides[1].rotation, back=True)
        out = out.to(query.dtype)
        return (out, lse) if return_lse else out

    def _served(self, first: Sequence[int], peak: Sequence[int]) -> bool:
        """Whether rings that have seen `peak` tokens of each row hold what queries from `first` on read."""
        group, step = self.staircase.group_size, self._step
        for side in self._sides:
            rings = [
                (rows, side.steps_of(least)) for least, rows in zip((2, 4, 8), side.plane_rows, strict=True) if rows
            ]
            full = side.steps_of(16)
            for query, most in zip(first, peak, strict=True):
                if side.full_rows is not None:
                    first_full = side.served_from(query, step, full) if full else query // group * group
                    if first_full < most - side.full_rows:
                        return False
                groups = most // group * group
                if any(side.served_from(query, step, steps) < groups - rows for rows, steps in rings):
                    return False
        return True

    # ---- rows and tokens taken back, chosen or repeated -------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Takes the newest `tokens` of every row back, as if they had never been appended.

        Raises:
            ValueError: a row would be more than `rollback` shorter than the longest it has been, or has fewer tokens.
        """
        op = "StaircaseKVCache.crop"
        check_int(op, "tokens", tokens, 0)
        for b, (length, peak) in enumerate(zip(self._lengths.tolist(), self._peak.tolist(), strict=True)):
            if tokens > length:
                raise ValueError(f"{op}: tokens is {tokens} and must be at most {length}, the length of row {b}")
            if tokens > 0 and peak - (length - tokens) > self.staircase.rollback:
                already = f" with {peak - length} taken back before" if peak > length else ""
                raise ValueError(
                    f"{op}: tokens is {tokens}{already} and must be at most rollback, {self.staircase.rollback}"
                )
        with torch.inference_mode(False):
            self._lengths = self._lengths - tokens
        self._chunk = None

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was, as in beam search; int64 [batch]."""
        self._choose("reorder", index, self.batch)

    def select(self, index: Tensor) -> None:
        """Keeps rows index, in that order; int64, of any length."""
        self._choose("select", index)

    def repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side, as for parallel samples of one prompt."""
        check_int("StaircaseKVCache.repeat_interleave", "repeats", repeats, 1)
        self._choose("repeat_interleave", torch.arange(self.batch).repeat_interleave(repeats))

    def _choose(self, method: str, index: Tensor, count: int | None = None) -> None:
        index = check_index(f"StaircaseKVCache.{method}", index, self.batch, count).to("cpu")
        with torch.inference_mode(False):
            self._storage = [[x.index_select(0, index) if x.dim() == 4 else x for x in each] for each in self._storage]
            self._lengths, self._peak = self._lengths.index_select(0, index), self._peak.index_select(0, index)
        self.batch, self._chunk = len(index), None

    def freeze(self, room: int | None = None) -> StaircasePrefix:
        """The tokens held now as a prefix, which any number of continuations share: `freeze().fork()` is one.

        The planes of the last width, lo, hi and their centers are in memory once; a continuation has for itself the
        rings and the pages it writes to. This cache is as before, and need not be kept.

        Args:
            room: tokens that a continuation may add before it takes a copy of everything to grow; a fourth of the
                longest row by default. Where capacity is given, it is the room.

        Raises:
            ValueError: room is negative, or given beside capacity.
            TypeError: room is not an int.
        """
        op = "StaircaseKVCache.freeze"
        if room is not None:
            check_int(op, "room", room, 0)
            if self.capacity is not None:
                raise ValueError(f"{op}: room is {room} and must be None, since capacity is {self.capacity}")
        longest = int(self._peak.max()) if self.batch else 0
        return StaircasePrefix(self, max(longest // 4, 1) if room is None else room)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on elsewhere; the tensors are the cache's own."""
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a `state_dict` of a cache with the same settings, of any batch; the tensors are copied.

        Raises:
            ValueError: the settings differ, or an entry is missing or does not fit the others.
            TypeError: an entry is of another type.
            The cache is then as before.
        """
        lengths, peak, storage, rows = loaded(self, state)
        self.batch, self._storage, self._rows, self._lengths, self._peak = len(lengths), storage, rows, lengths, peak
        self._chunk = None
