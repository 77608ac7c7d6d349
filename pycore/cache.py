# SPDX-License-Identifier: Apache-2.0
"""Key-value caches whose attention gives the same bits as attention over everything that was ever appended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycore._checks import check_int
from pycore._tangents import refuse_tangents
from pycore._tensors import as_index, check_devices, check_tensor
from pycore.ops.attention import call_attention, lambda_attention
from pycore.schedules import Lambda

__all__ = ["LambdaKVCache"]

_TILE = 64  # of keys; a ring is a whole number of them, so that a tile of positions is a run of rows


@torch.library.register_fake("pycore::lambda_cache_append")
def _append_fake(
    key_cache: Tensor, value_cache: Tensor, lengths: Tensor, key: Tensor, value: Tensor, starts: Tensor | None,
    sink_size: int,
) -> None:  # fmt: skip
    check_devices(
        "lambda_cache_append", key=key, key_cache=key_cache, value_cache=value_cache, lengths=lengths, value=value,
        starts=starts,
    )  # fmt: skip


class _Chunk(NamedTuple):
    """What a chunk too long for the ring attends to."""

    tokens: int
    key: Tensor
    value: Tensor
    key_starts: Tensor | None
    key_lengths: Tensor | None
    key_offset: Tensor | None


class LambdaKVCache:
    """The keys and values that Λ attention still needs: the sinks and a window, at a constant size.

    Keys are appended un-rotated; `attend` rotates by distance where it is given `rope`. What `attend` returns has the
    bits of `lambda_attention` over all tokens ever appended, in whatever chunks they came.

    A token's row follows from its position (a row per sink, then a ring), so that nothing is moved when tokens leave,
    and a step of decoding is two calls of fixed shape, which torch.compile takes without a second compilation. A
    chunk too long for the ring is attended to from the tensors that were appended, which the cache lets go of with the
    next call of `attend`, `append`, `crop` or one of the others.

    Args:
        sink_size: tokens kept from the start of each row, at least 0.
        window_size: newest tokens kept, the query's own among them, at least 1.
        rollback: tokens that `crop` may take back, at least 0.

    Batch, heads, channels, dtype and device are those of the first tokens appended. The cache carries no gradient.

    Example:
        >>> cache = LambdaKVCache(sink_size=4, window_size=512)
        >>> cache.append(key, value)                              # the prompt, [batch, kv_heads, tokens, head_dim]
        >>> out = cache.attend(query, rope=(cos, sin))            # [batch, heads, tokens, head_dim]

    Source: Han et al., "LM-Infinite", section 3.
    """

    def __init__(self, sink_size: int, window_size: int, rollback: int = 0) -> None:
        for name, number, least in (("sink_size", sink_size, 0), ("window_size", window_size, 1),
                                    ("rollback", rollback, 0)):  # fmt: skip
            check_int("LambdaKVCache", name, number, least)
        self.sink_size = sink_size
        self.window_size = window_size
        self.rollback = rollback
        self._ring = -(-(window_size + rollback) // _TILE) * _TILE
        self.reset()

    def reset(self) -> None:
        """Forgets everything; the next tokens may have another shape, dtype or device."""
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self._lengths: Tensor | None = None
        self._cropped = 0  # tokens taken back and not appended anew: an upper bound
        self._chunk: _Chunk | None = None

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

    # ---- tokens in, attention out -----------------------------------------------------------------------------------

    def append(self, key: Tensor, value: Tensor, *, starts: Tensor | None = None) -> None:
        """Takes new tokens at the end of every row.

        Args:
            key: [batch, kv_heads, tokens, head_dim], not rotated; any strides with a contiguous last dimension.
            value: [batch, kv_heads, tokens, value_dim].
            starts: int64 [batch], the tokens at the front of this chunk that are padding and are left out.

        Raises:
            ValueError, TypeError: something does not fit what the cache holds; nothing is appended.
        """
        for name, tensor in (("key", key), ("value", value)):
            check_tensor("LambdaKVCache.append", name, tensor)
            if tensor.dim() != 4:
                raise ValueError(
                    f"LambdaKVCache.append: {name} has {tensor.dim()} dimensions and must have 4: "
                    "[batch, kv_heads, tokens, head_dim]"
                )
        refuse_tangents("LambdaKVCache.append", key=key, value=value)
        if starts is not None:
            check_tensor("LambdaKVCache.append", "starts", starts)
            starts = as_index(starts)
        key, value = key.detach(), value.detach()
        first = self._lengths is None
        if first:
            held_key, held_value, lengths = self._allocate(key, value)
        else:
            held_key, held_value, lengths = self._held("append")
            self._check_like("key", key, held_key)
            self._check_like("value", value, held_value)
        tokens = key.shape[2]
        chunk = None
        if tokens > self._servable:
            chunk = self._long_chunk(first, key, value, starts)
        torch.ops.pycore.lambda_cache_append(held_key, held_value, lengths, key, value, starts, self.sink_size)
        self._key, self._value, self._lengths = held_key, held_value, lengths
        self._chunk = chunk
        if self._cropped > 0 and starts is None:
            self._cropped = max(0, self._cropped - tokens)

    def attend(
        self,
        query: Tensor,
        *,
        alibi_slopes: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        interleaved: bool = False,
        distance_limit: int | None = None,
        distance_bias: Tensor | None = None,
        sink_logits: Tensor | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        middle_topk: int = 0,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Λ attention of the newest tokens' queries over the cache; the last query belongs to the newest token.

        Args:
            query: [batch, heads, n, head_dim]. n is at most the size of the last chunk or what the ring serves,
                whichever is more. A chunk longer than that can be attended to once.
            middle_topk: see `lambda_attention`; possible while no token has left.

        The other arguments, the return value and the errors are those of `pycore.ops.lambda_attention`.
        """
        op = "LambdaKVCache.attend"
        held_key, held_value, lengths = self._held("attend")
        check_tensor(op, "query", query)
        check_int(op, "middle_topk", middle_topk, 0)
        chunk, self._chunk = self._chunk, None
        limit = self.window_size if distance_limit is None else distance_limit
        options = (interleaved, limit, distance_bias, alibi_slopes, sink_logits, softcap, 0.0, scale)
        schedule = Lambda(self.sink_size, self.window_size)
        if middle_topk:
            longest = int(lengths.max()) if lengths.numel() else 0
            left = longest + self._cropped - self.sink_size - self._ring
            if left > 0:
                raise ValueError(f"{op}: middle_topk needs the middle tokens, and {left} have left the cache")
            everything = torch.arange(longest, device=lengths.device).expand(len(lengths), -1)
            return lambda_attention(
                query,
                self._gather(held_key, everything),
                self._gather(held_value, everything),
                sink_size=self.sink_size,
                window_size=self.window_size,
                alibi_slopes=alibi_slopes,
                rope=rope,
                interleaved=interleaved,
                distance_limit=distance_limit,
                distance_bias=distance_bias,
                sink_logits=sink_logits,
                softcap=softcap,
                scale=scale,
                key_lengths=lengths,
                middle_topk=middle_topk,
                return_lse=return_lse,
            )
        queries = query.shape[2] if query.dim() == 4 else 0
        if chunk is not None and queries > self._servable:
            if queries > chunk.tokens:
                raise ValueError(
                    f"{op}: query has {queries} rows and may have {chunk.tokens}, one for each token appended last"
                )
            rows = (chunk.key_starts, chunk.key_lengths, chunk.key_offset, None)
            return call_attention(op, query, chunk.key, chunk.value, schedule, rope, *options, rows, return_lse)
        if queries > self._servable:
            raise ValueError(
                f"{op}: query has {queries} rows and may have {self._servable}: a longer chunk can be attended to "
                "once, right after it was appended"
            )
        return call_attention(
            op, query, held_key, held_value, schedule, rope, *options, (None, lengths, None, None), return_lse,
            key_ring=self._ring,
        )  # fmt: skip

    # ---- rows and tokens taken back, chosen or repeated -------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Takes the newest `tokens` of every row back, as if they had never been appended.

        Raises:
            ValueError: more than `rollback` since the longest the cache has been, or more than a row has.
        """
        check_int("LambdaKVCache.crop", "tokens", tokens, 0)
        lengths = self._held("crop")[2]
        if self._cropped + tokens > self.rollback:
            already = f" with {self._cropped} taken back before" if self._cropped else ""
            raise ValueError(
                f"LambdaKVCache.crop: tokens is {tokens}{already} and must be at most rollback, {self.rollback}"
            )
        shortest = int(lengths.min()) if lengths.numel() else tokens
        if tokens > shortest:
            raise ValueError(f"LambdaKVCache.crop: tokens is {tokens} and must be at most {shortest}, a row's length")
        lengths -= tokens
        self._cropped += tokens
        self._chunk = None

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was, as in beam search; int64 [batch]."""
        batch = self._held("reorder")[0].shape[0]
        if isinstance(index, Tensor) and index.dim() == 1 and len(index) != batch:
            raise ValueError(f"LambdaKVCache.reorder: index has {len(index)} entries and must have {batch}")
        self._choose("reorder", index)

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
            state |= {"key": self._key, "value": self._value, "lengths": self._lengths, "cropped": self._cropped}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a `state_dict` of a cache with the same sizes; the tensors are copied.

        Raises:
            ValueError: the sizes differ, or entries are missing.
        """
        for name in ("sink_size", "window_size", "rollback"):
            if state.get(name) != getattr(self, name):
                raise ValueError(
                    f"LambdaKVCache.load_state_dict: {name} is {state.get(name)} and must be {getattr(self, name)}"
                )
        missing = {"key", "value", "lengths", "cropped"} - state.keys()
        if 0 < len(missing) < 4:
            raise ValueError(f"LambdaKVCache.load_state_dict: {sorted(missing)[0]} is missing")
        self.reset()
        if not missing:
            self._key, self._value, self._lengths = (state[name].clone() for name in ("key", "value", "lengths"))
            self._cropped = state["cropped"]

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
        return (
            key.new_zeros(batch, heads, rows, key.shape[3]),
            value.new_zeros(batch, heads, rows, value.shape[3]),
            torch.zeros(batch, dtype=torch.int64, device=key.device),
        )

    @staticmethod
    def _check_like(name: str, given: Tensor, held: Tensor) -> None:
        if (given.shape[0], given.shape[1], given.shape[3]) != (held.shape[0], held.shape[1], held.shape[3]):
            raise ValueError(
                f"LambdaKVCache.append: {name} has shape {list(given.shape)} and must be "
                f"[{held.shape[0]}, {held.shape[1]}, tokens, {held.shape[3]}]"
            )
        if given.dtype != held.dtype or given.device != held.device:
            raise ValueError(
                f"LambdaKVCache.append: {name} is {given.dtype} on {given.device} and must be {held.dtype} on "
                f"{held.device}"
            )

    def _long_chunk(self, first: bool, key: Tensor, value: Tensor, starts: Tensor | None) -> _Chunk:
        """The keys a chunk's queries need, before the chunk is written over what the first of them still read."""
        if first:
            return _Chunk(key.shape[2], key, value, starts, None, None)
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

        return _Chunk(key.shape[2], joined(held_key, key), joined(held_value, value), None, kept + new, lengths - kept)

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

    def _choose(self, method: str, index: Tensor) -> None:
        held_key, held_value, lengths = self._held(method)
        if not isinstance(index, Tensor):
            raise TypeError(f"LambdaKVCache.{method}: index is a {type(index).__name__} and must be a Tensor")
        if index.dim() != 1 or index.dtype != torch.int64:
            raise ValueError(
                f"LambdaKVCache.{method}: index is {index.dtype} {list(index.shape)} and must be int64 of one dimension"
            )
        if index.device.type == "cpu" and not ((index >= 0) & (index < len(lengths))).all():
            raise IndexError(f"LambdaKVCache.{method}: index must be between 0 and {len(lengths) - 1}")
        index = index.to(lengths.device)
        self._key, self._value, self._lengths = (x.index_select(0, index) for x in (held_key, held_value, lengths))
        self._chunk = None
