# SPDX-License-Identifier: Apache-2.0
"""Key-value caches whose attention gives the same bits as attention over everything that was ever appended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycore._cache_checks import check_index, check_path, check_starts, check_state, check_tokens
from pycore._checks import check_int
from pycore._tangents import refuse_tangents
from pycore._tensors import check_devices, check_tensor
from pycore.ops.attention import call_attention, lambda_attention
from pycore.schedules import Lambda, Schedule, Tree

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


def _like(x: Any) -> Any:
    """What checks see of an argument."""
    if isinstance(x, Tensor):
        shape = x.shape if x.dim() != 4 else (x.shape[0], x.shape[1], x.shape[3])  # queries and keys of any length
        return shape, x.stride(-1) if x.dim() else 0, x.dtype, x.device
    return tuple(map(_like, x)) if isinstance(x, tuple | list) else x


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
        self._cropped = 0  # tokens taken back and not appended anew, the most of any row
        self._behind: Tensor | None = None  # int64 [batch], the same of each row, where they may differ
        self._own = 0  # tokens of the newest chunk, if the ring has all that its queries see
        self._chunk: _Chunk | None = None
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
        op = "LambdaKVCache.append"
        refuse_tangents(op, key=key, value=value)
        first = self._lengths is None
        held = None if first else self._held("append")
        check_tokens(op, key, value, held and held[:2])
        long = key.shape[2] > self._servable
        starts = check_starts(op, starts, key, values=long and not torch.compiler.is_compiling())
        key, value = key.detach(), value.detach()
        held_key, held_value, lengths = self._allocate(key, value) if held is None else held
        chunk = self._long_chunk(first, key, value, starts) if long else None
        torch.ops.pycore.lambda_cache_append(held_key, held_value, lengths, key, value, starts, self.sink_size)
        if not torch.compiler.is_compiling() and not lengths.is_inference():
            # The op does not: autograd would read rows that were written over, for queries that are still to learn.
            torch.autograd.graph.increment_version((held_key, held_value, lengths))
        self._key, self._value, self._lengths = held_key, held_value, lengths
        self._chunk, self._own = chunk, 0 if long else key.shape[2]
        self._catch_up(key.shape[2], starts)

    def attend(
        self,
        query: Tensor,
        *,
        tree: Tree | None = None,
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
                whichever is more; what the ring serves shrinks by the tokens that were taken back and not appended
                anew. A chunk longer than that can be attended to once.
            tree: the newest tokens are the nodes of a tree of drafts, see `pycore.schedules.Tree`: each attends as it
                would if the cache had been given the branch that ends with it. As many nodes as queries may be served.
                The window and the sinks are the cache's. Then `accept` keeps a branch.
            middle_topk: see `lambda_attention`; possible while no token has left.

        The other arguments, the return value and the errors are those of `pycore.ops.lambda_attention`.
        """
        op = "LambdaKVCache.attend"
        held_key, held_value, lengths = self._held("attend")
        check_tensor(op, "query", query)
        check_int(op, "middle_topk", middle_topk, 0)
        limit = self.window_size if distance_limit is None else distance_limit
        options = (interleaved, limit, distance_bias, alibi_slopes, sink_logits, softcap, 0.0, scale)
        if middle_topk:
            if tree is not None:
                raise ValueError(f"{op}: middle_topk is {middle_topk} and must be 0 with a tree")
            longest = int(lengths.max()) if lengths.numel() else 0
            most = lengths + (self._cropped if self._behind is None else self._behind)
            left = (int(most.max()) if most.numel() else 0) - self.sink_size - self._ring
            if left > 0:
                raise ValueError(f"{op}: middle_topk needs the middle tokens, and {left} have left the cache")
            everything = torch.arange(longest, device=lengths.device).expand(len(lengths), -1)
            out = lambda_attention(
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
            self._chunk = None
            return out
        queries = query.shape[2] if query.dim() == 4 else 0
        schedule: Schedule = Lambda(self.sink_size, self.window_size)
        nodes = 0
        if tree is not None:
            schedule, nodes = self._tree(tree)
        # A chunk's own queries see what the ring has, whatever was taken back before it: rows of padding mean nothing.
        if max(queries, nodes) <= self._servable - self._cropped or (queries == self._own and tree is None):
            rows, ring = (None, lengths, None, None), self._ring
        else:
            chunk = self._chunk
            self._check_served(queries, nodes, chunk)
            assert chunk is not None
            held_key, held_value, ring = chunk.key, chunk.value, 0
            rows = (chunk.key_starts, chunk.key_lengths, chunk.key_offset, None)  # type: ignore[assignment]
        out = call_attention(op, query, held_key, held_value, schedule, rope, *options, rows, return_lse, key_ring=ring)
        self._chunk = None
        return out

    def append_and_attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, starts: Tensor | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`append`, then `attend` with as many queries; what either refuses leaves the cache as it was.

        Args:
            query: [batch, heads, tokens, head_dim].
            key, value, starts: as for `append`.
            options: as for `attend`; neither tree nor middle_topk.
        """
        op = "LambdaKVCache.attend"
        held = None if self._lengths is None else self._held("append")
        check_tokens("LambdaKVCache.append", key, value, held and held[:2])
        if not torch.compiler.is_compiling():
            on_cpu = isinstance(starts, Tensor) and starts.device.type == "cpu"
            starts = check_starts("LambdaKVCache.append", starts, key, values=on_cpu)
            lengths = (starts, None, None if held is None else held[2])
            self._rehearse(op, query, key, value, lengths, options)
        self.append(key, value, starts=starts)
        return self.attend(query, **options)

    # ---- rows and tokens taken back, chosen or repeated -------------------------------------------------------------

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

    def accept(self, path: Tensor, tokens: int) -> None:
        """Of the newest `tokens` of every row keeps those at `path`, one after another, and takes the others back.

        So a branch of a tree that `attend` has verified stays, as if it alone had been appended. It needs `rollback`:
        the tokens are taken back, as by `crop`, and those of the branch appended anew.

        Args:
            path: int64 [n], or [batch, n], the tokens that stay, ascending, 0 being the first of the newest `tokens`;
                rows that keep fewer end with -1.
            tokens: the nodes of the tree.

        Raises:
            IndexError: a place that the newest `tokens` do not have.
            ValueError: as for `crop`, or path is of another shape or does not ascend.
        """
        op = "LambdaKVCache.accept"
        held_key, held_value, lengths = self._held("accept")
        self._check_crop(op, tokens)
        path = check_path(op, path, len(lengths), tokens).to(lengths.device)
        count = (path >= 0).sum(1)
        starts = path.shape[1] - count
        # Padding stands on the left.
        place = torch.arange(path.shape[1], device=path.device) - starts[:, None]
        position = (lengths[:, None] - tokens + path.gather(1, place.clamp(min=0))).clamp(min=0)
        key, value = (self._gather(x, position) for x in (held_key, held_value))
        self.crop(tokens)
        self.append(key, value, starts=starts)
        self._own = 0

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

    def _rehearse(
        self,
        op: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[Tensor | None, Tensor | None, Tensor | None],
        options: dict[str, Any],
    ) -> None:
        """Attention of no query over the new tokens, at their positions: it refuses what `attend` would.

        Not done again for arguments like those of the last call.
        """
        if isinstance(query, Tensor) and query.dim() == 4 and query.shape[2] != key.shape[2]:
            raise ValueError(f"{op}: query has {query.shape[2]} rows and must have {key.shape[2]}, one a token")
        device = key.device.type
        autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        like = (_like(query), _like(key), _like(value), autocast, *((name, _like(x)) for name, x in options.items()))
        if like == self._rehearsed:
            return
        given = {"rope": None, "interleaved": False, "distance_bias": None, "alibi_slopes": None, "sink_logits": None,
                 "softcap": 0.0, "scale": None, "distance_limit": None, "return_lse": False} | options  # fmt: skip
        limit = self.window_size if given["distance_limit"] is None else given["distance_limit"]
        none = torch.zeros(key.shape[0], dtype=torch.int64, device=key.device)
        rows = query[:, :, :1] if isinstance(query, Tensor) and query.dim() == 4 else query
        call_attention(
            op, rows, key.detach(), value.detach(), Lambda(self.sink_size, self.window_size), given["rope"],
            given["interleaved"], limit, given["distance_bias"], given["alibi_slopes"], given["sink_logits"],
            given["softcap"], 0.0, given["scale"], (*lengths, none), given["return_lse"],
        )  # fmt: skip
        # A table that does not reach the limit may be too short later.
        rope = given["rope"]
        self._rehearsed = like if rope is None or rope[0].shape[0] >= limit + _TILE else None

    def _tree(self, tree: Any) -> tuple[Tree, int]:
        """The tree with the cache's window, and its nodes."""
        op = "LambdaKVCache.attend"
        if not isinstance(tree, Tree):
            raise TypeError(f"{op}: tree is a {type(tree).__name__} and must be a pycore.schedules.Tree")
        if tree.window_size is not None or tree.sink_size != 0:
            raise ValueError(f"{op}: tree has a window or sinks of its own and must leave them to the cache")
        nodes = tree.parents.shape[-1] if isinstance(tree.parents, Tensor) and tree.parents.dim() else 0
        return Tree(tree.parents, self.sink_size, self.window_size), nodes

    def _check_served(self, queries: int, nodes: int, chunk: _Chunk | None) -> None:
        """Refuses more queries, or nodes, than the ring serves, unless `chunk` has them."""
        op = "LambdaKVCache.attend"
        name, count = (f"query has {queries} rows", queries) if queries >= nodes else (f"tree has {nodes} nodes", nodes)
        if chunk is not None and count > chunk.tokens:
            raise ValueError(f"{op}: {name} and may have {chunk.tokens}, one for each token appended last")
        if chunk is None:
            back = f", {self._cropped} tokens having been taken back" if self._cropped else ""
            raise ValueError(
                f"{op}: {name} and may have {self._servable - self._cropped}{back}: a longer chunk can be attended to "
                "once, right after it was appended"
            )

    def _long_chunk(self, first: bool, key: Tensor, value: Tensor, starts: Tensor | None) -> _Chunk:
        """The keys a chunk's queries need, before the chunk is written over what the first of them still read."""
        if first:
            return _Chunk(key.shape[2], key, value, None if starts is None else starts.clone(), None, None)
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

    def _choose(self, method: str, index: Tensor, count: int | None = None) -> None:
        held_key, held_value, lengths = self._held(method)
        index = check_index(f"LambdaKVCache.{method}", index, len(lengths), count).to(lengths.device)
        with torch.inference_mode(False):
            key, value, lengths = (x.index_select(0, index) for x in (held_key, held_value, lengths))
            behind = None if self._behind is None else self._behind.index_select(0, index)
        self._key, self._value, self._lengths, self._behind = key, value, lengths, behind
        self._chunk = None
        self._settle()
