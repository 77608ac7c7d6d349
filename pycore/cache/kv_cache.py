# SPDX-License-Identifier: Apache-2.0
"""KVCache: every token's key and value, and causal attention over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_int
from pycore._limits import KEY_TILE
from pycore._tangents import refuse_tangents
from pycore._tensors import check_tensor
from pycore.cache.checks import STATE_VERSION, check_starts, check_state, check_tokens
from pycore.cache.held_tokens import HeldTokens, to_layout
from pycore.ops.attention_append import Again, append_and_attend, check_rotated, fuses, turned_back
from pycore.ops.attention_cache import lambda_cache_append
from pycore.ops.attention_call import AttentionOptions, call_attention
from pycore.schedules import Causal, Schedule, Tree

__all__ = ["KVCache"]


_OPTIONS = AttentionOptions().for_cache()  # the names that `attend` shares with the op


def _tiles(tokens: int) -> int:
    """Rows of whole tiles for so many tokens."""
    return -(-tokens // KEY_TILE) * KEY_TILE


class KVCache(HeldTokens):
    """The keys and values of every token: causal attention with the bits of `attention` over all of them at once.

    The interface is that of `LambdaKVCache`, without eviction: any number of queries is served at any time, and all
    tokens may be taken back. Keys are appended un-rotated; `attend` rotates by distance where it is given `rope`, or
    they come rotated and it is not.

    Args:
        capacity: tokens that a row may have; room for them is allocated with the first. None: the cache grows by half
            of what it holds whenever it is full, so that a token costs the same however many there are.
        rollback: tokens that `crop` may take back, at least 0; None: all.

    Attributes:
        schedule: what `attend` reads without a tree, `Causal()`; a `Lambda` may take its place at any time.

    Batch, heads, channels, dtype and device are those of the first tokens appended. The cache carries no gradient.

    Example:
        >>> cache = KVCache()
        >>> cache.append(key, value)                                           # the prompt
        >>> out = cache.attend(query)
        >>> out = cache.append_and_attend(query, key, value)                   # a token more, in one call
    """

    _name = "KVCache"

    def __init__(self, capacity: int | None = None, rollback: int | None = None) -> None:
        if capacity is not None:
            check_int("KVCache", "capacity", capacity, 1)
        if rollback is not None:
            check_int("KVCache", "rollback", rollback, 0)
        self.capacity = capacity
        self.rollback = rollback
        self.schedule: Schedule = Causal()
        self.reset()

    def reset(self) -> None:
        """Forgets everything; the next tokens may have another shape, dtype or device."""
        super().reset()
        self._longest = 0  # no row has more tokens

    # ---- tokens in, attention out -----------------------------------------------------------------------------------

    def append(self, key: Tensor, value: Tensor, *, starts: Tensor | None = None) -> None:
        """Takes new tokens at the end of every row.

        Args:
            key: [batch, kv_heads, tokens, head_dim]; any strides with a contiguous last dimension.
            value: [batch, kv_heads, tokens, value_dim].
            starts: int64 [batch], the tokens at the front of this chunk that are padding and are left out.

        Raises:
            ValueError, TypeError: something does not fit what the cache holds, or a row would have more tokens than
                `capacity`; nothing is appended.
            MemoryError: no room for more.
        """
        op = "KVCache.append"
        key, value, starts, held, most = self._room(op, key, value, starts)
        lambda_cache_append(*held, key, value, starts, 0, most, op)
        self._taken(key.shape[2], starts, held)

    def attend(
        self,
        query: Tensor,
        *,
        tree: Tree | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        interleaved: bool = False,
        distance_limit: int | None = None,
        distance_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        sink_logits: Tensor | None = None,
        softcap: float | Tensor = 0.0,
        scale: float | Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Causal attention of the newest tokens' queries over the cache; the last query belongs to the newest token.

        Args:
            query: [batch, heads, n, head_dim], any n.
            tree: the newest tokens are the nodes of a tree of drafts, see `pycore.schedules.Tree`: each attends as it
                would if the cache had been given the branch that ends with it. Then `accept` keeps a branch.

        The other arguments, the return value and the errors are those of `pycore.ops.attention`.
        """
        op = "KVCache.attend"
        key, value, lengths = self._held("attend")
        check_tensor(op, "query", query)
        schedule = self.schedule
        if tree is not None:
            if not isinstance(tree, Tree):
                raise TypeError(f"{op}: tree is a {type(tree).__name__} and must be a pycore.schedules.Tree")
            schedule = tree
        options = AttentionOptions(
            rope, interleaved, distance_limit, distance_bias, alibi_slopes, False, sink_logits, softcap, 0.0, scale,
            None, lengths, None, None, return_lse,
        )  # fmt: skip
        return call_attention(op, query, key, value, schedule, options, key_layout=self._layout)

    def append_and_attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        starts: Tensor | None = None,
        rotated: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`append`, then `attend` with as many queries; what either refuses leaves the cache as it was.

        On the CPU it is one native call, unless a query learns.

        Args:
            query: [batch, heads, tokens, head_dim].
            key, value, starts: as for `append`.
            rotated: as for `LambdaKVCache.append_and_attend`.
            options: as for `attend`.
        """
        op = "KVCache.attend"
        again = None if torch.compiler.is_compiling() else self._again
        if again is not None and starts is None and again.fits(query, key, value, options, self.schedule):
            room = self._held("append")
            if self.capacity is not None or self._longest + key.shape[2] <= room[1].shape[2]:
                out = again.call(query, key, value, room, check_rotated(op, rotated))
                self._taken(key.shape[2], None, room)
                return out
        check_tensor(op, "query", query)
        given = AttentionOptions(**options) if options.keys() <= _OPTIONS.keys() else None
        if given is not None and fuses(query, key, given):
            key, value, starts, held, most = self._room("KVCache.append", key, value, starts)
            out, args = append_and_attend(
                "KVCache.append", op, query, key, value, held, starts, self.schedule, given, most=most,
                rotated=rotated,
            )  # fmt: skip
            self._taken(key.shape[2], starts, held)
            if not torch.compiler.is_compiling():
                self._again = None if args is None else Again(query, key, value, options, self.schedule, args)
            return out
        tokens = key.shape[2] if isinstance(key, Tensor) and key.dim() == 4 else 0
        if query.dim() == 4 and query.shape[2] != tokens:
            raise ValueError(f"{op}: query has {query.shape[2]} rows and must have {tokens}, one a token")
        query, key = turned_back(op, rotated, query, key)
        before = {name: x for name, x in vars(self).items() if name != "_lengths"}
        lengths = None if self._lengths is None else self._lengths.clone()
        try:
            self.append(key, value, starts=starts)
            return self.attend(query, **options)
        except Exception:
            # What was written lies behind every row's end.
            vars(self).update(before)
            self._lengths = lengths
            raise

    def append_and_attend_again(
        self, query: Tensor, key: Tensor, value: Tensor, rotated: tuple[Tensor, Tensor] | None
    ) -> Any:
        """As `LambdaKVCache.append_and_attend_again`, which also looks where there is no room."""
        again = self._again
        if again is None or not again.fits_tensors(query, key, value):
            return None
        room: Any = (self._key, self._value, self._lengths)  # there are some: they were appended to
        if self.capacity is None and self._longest + key.shape[2] > room[1].shape[2]:
            return None
        out = again.call(query, key, value, room, rotated or ())
        self._longest += key.shape[2]
        if self._cropped:
            self._catch_up(key.shape[2], None)
        return out

    # ---- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on elsewhere; the tensors are the cache's own."""
        state: dict[str, Any] = {"version": STATE_VERSION, "capacity": self.capacity, "rollback": self.rollback}
        if self._lengths is not None:
            cropped = self._cropped if self._behind is None else self._behind
            state |= {"key": self._key, "value": self._value, "lengths": self._lengths, "cropped": cropped}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a `state_dict` of a cache with the same capacity and rollback; the tensors are copied.

        Raises:
            ValueError: the sizes differ, or an entry is missing or does not fit the others.
            TypeError: an entry is of another type.
            The cache is then as before.
        """
        op = "KVCache.load_state_dict"
        rows = None if self.capacity is None else _tiles(self.capacity)
        found = check_state(op, state, {"capacity": self.capacity, "rollback": self.rollback}, rows)
        if found is None:
            self.reset()
            return
        key, value, lengths, cropped = found
        most = value.shape[2] if self.capacity is None else self.capacity
        longest = int(lengths.max()) if lengths.numel() else 0
        if longest > most:
            raise ValueError(f"{op}: lengths has {longest} and must be at most {most}, the tokens there is room for")
        with torch.inference_mode(False):
            key, value, lengths = to_layout(key).detach(), value.detach(), lengths.detach().clone()
            key, value = (x.clone(memory_format=torch.contiguous_format) for x in (key, value))
            behind = cropped.detach().clone() if isinstance(cropped, Tensor) else None
        cropped = cropped if behind is None else int(behind.max()) if behind.numel() else 0
        self.reset()
        self._key, self._value, self._lengths, self._longest = key, value, lengths, longest
        self._cropped, self._behind = int(cropped), behind if cropped else None

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _room(
        self, op: str, key: Tensor, value: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor], int]:
        """Checked tokens, the tensors that they go to, which are not the cache's own yet, and how many may be there."""
        refuse_tangents(op, key=key, value=value)
        check_tokens(op, key, value, self._like_held())
        starts = check_starts(op, starts, key, values=False)
        key, value = key.detach(), value.detach()
        needed, on_cpu = self._longest + key.shape[2], key.device.type == "cpu"
        if self.capacity is not None and needed > self.capacity and not on_cpu:  # there the op looks, row by row
            raise ValueError(
                f"{op}: key has {key.shape[2]} tokens, with which a row would have {needed}, and must leave it with at "
                f"most {self.capacity}"
            )
        held = self._key, self._value, self._lengths
        if self._lengths is None:
            held = self._grown(key, value, needed)
        elif self.capacity is None and self._value is not None and needed > self._value.shape[2]:
            held = self._grown(key, value, needed)
        room: Any = held
        most = room[1].shape[2] if self.capacity is None else self.capacity
        return key, value, starts, room, most if on_cpu else -1

    def _grown(self, key: Tensor, value: Tensor, needed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tensors with room for `needed` tokens, and by half more than there was, with what is held in them."""
        if self.capacity is not None:
            rows = _tiles(self.capacity)
        else:
            before = 0 if self._value is None else self._value.shape[2]
            rows = max(_tiles(max(needed, 1)), _tiles(before * 3 // 2))
        what = f"capacity is {self.capacity}" if self.capacity is not None else f"room for {rows} tokens is asked for"
        new_key, new_value = self._allocate_rows(key, value, rows, what)
        self._again = None  # it knew how many tokens there was room for
        if self._key is None or self._value is None or self._lengths is None:
            with torch.inference_mode(False):
                return new_key, new_value, torch.zeros(key.shape[0], dtype=torch.int64, device=key.device)
        with torch.inference_mode(False):
            for new, held in ((new_key, self._key), (new_value, self._value)):
                new[:, :, : held.shape[2]] = held
        return new_key, new_value, self._lengths

    def _taken(self, tokens: int, starts: Tensor | None, held: tuple[Tensor, Tensor, Tensor]) -> None:
        """Counts what was appended to `held`, which is the cache's from now on."""
        self._key, self._value, self._lengths = held
        self._longest += tokens
        if starts is not None and not torch.compiler.is_compiling():
            self._longest = int(held[2].max()) if held[2].numel() else 0
        self._catch_up(tokens, starts)

    def _taken_back(self, tokens: int) -> None:
        self._longest -= tokens

    def _chosen(self) -> None:
        if self._lengths is not None and not torch.compiler.is_compiling():
            self._longest = int(self._lengths.max()) if self._lengths.numel() else 0

    def _newest(self, method: str, held: Tensor) -> Tensor:
        lengths = self._held(method)[2]
        longest = int(lengths.max()) if lengths.numel() else 0
        place = torch.arange(longest, device=lengths.device)
        missing = (place >= lengths[:, None])[:, None, :, None]
        return self._gather(held, place.expand(len(lengths), -1)).masked_fill(missing, 0)
