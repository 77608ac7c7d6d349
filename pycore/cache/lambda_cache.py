# SPDX-License-Identifier: Apache-2.0
"""Key-value caches whose attention gives the same bits as attention over everything that was ever appended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_int
from pycore._limits import KEY_TILE
from pycore._tangents import refuse_tangents
from pycore._tensors import check_tensor
from pycore.cache.checks import check_starts, check_tokens
from pycore.cache.lambda_tokens import Chunk, LambdaTokens
from pycore.ops.attention_append import Again, append_and_attend, check_rotated, fuses, turned_back
from pycore.ops.attention_cache import lambda_cache_append
from pycore.ops.attention_call import AttentionOptions, call_attention
from pycore.ops.attention_middle import with_middle
from pycore.schedules import Lambda, Schedule, Tree

__all__ = ["LambdaKVCache"]

_OPTIONS = AttentionOptions().for_cache()  # the names that `attend` shares with the op


def _like(x: Any) -> Any:
    """What checks see of an argument."""
    if isinstance(x, Tensor):
        shape = x.shape if x.dim() != 4 else (x.shape[0], x.shape[1], x.shape[3])  # queries and keys of any length
        return shape, x.stride(-1) if x.dim() else 0, x.dtype, x.device
    return tuple(map(_like, x)) if isinstance(x, tuple | list) else x


class LambdaKVCache(LambdaTokens):
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
        check_tokens(op, key, value, self._like_held())
        long = key.shape[2] > self._servable
        starts = check_starts(op, starts, key, values=long and not torch.compiler.is_compiling())
        key, value = key.detach(), value.detach()
        held_key, held_value, lengths = self._allocate(key, value) if held is None else held
        chunk = self._long_chunk(first, key, value, starts) if long else None
        lambda_cache_append(held_key, held_value, lengths, key, value, starts, self._before_ring)
        self._key, self._value, self._lengths = held_key, held_value, lengths
        self._chunk, self._own = chunk, 0 if long else key.shape[2]
        self._catch_up(key.shape[2], starts)

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
        window = Lambda(self.sink_size, self.window_size)
        schedule: Schedule = window
        rows, ring, layout = (None, lengths, None), self._ring, self._layout
        if middle_topk and tree is not None:
            raise ValueError(f"{op}: middle_topk is {middle_topk} and must be 0 with a tree")
        if not middle_topk:
            queries = query.shape[2] if query.dim() == 4 else 0
            nodes = 0
            if tree is not None:
                schedule, nodes = self._tree(tree)
            # A chunk's own queries see what the ring has, whatever was taken back before it: padding means nothing.
            most = self._servable - self._cropped
            if max(queries, nodes) > most and (queries != self._own or tree is not None):
                chunk = self._chunk
                self._check_served(queries, nodes, chunk)
                assert chunk is not None
                held_key, held_value, ring, layout = chunk.key, chunk.value, 0, "rows"
                rows = (chunk.key_starts, chunk.key_lengths, chunk.key_offset)  # type: ignore[assignment]
        limit = self.window_size if distance_limit is None else distance_limit
        options = AttentionOptions(
            rope, interleaved, limit, distance_bias, alibi_slopes, False, sink_logits, softcap, 0.0, scale, *rows, None,
            return_lse,
        )  # fmt: skip
        if middle_topk:
            held_key, held_value = self._everything(op)
            out = with_middle("lambda_attention", query, held_key, held_value, window, options, middle_topk)
        else:
            out = call_attention(op, query, held_key, held_value, schedule, options, ring, layout)
        self._chunk = None
        return out

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

        On the CPU it is one native call where the ring serves the queries, unless something learns.

        Args:
            query: [batch, heads, tokens, head_dim].
            key, value, starts: as for `append`.
            rotated: (cos, sin), [batch or 1, tokens, pairs], by which query and key come turned already, as
                `pycore.ops.rotate` turns: they are turned back first, in the same call on the CPU, which is where it is
                possible. For models that rotate by themselves what `rope` is to rotate by distance.
            options: as for `attend`; neither tree nor middle_topk.
        """
        again = None if torch.compiler.is_compiling() else self._again
        if again is not None and starts is None and again.fits(query, key, value, options):
            turned = check_rotated("LambdaKVCache.attend", rotated)
            out = again.call(query, key, value, self._held("append"), turned)
            self._chunk, self._own = None, key.shape[2]
            self._catch_up(key.shape[2], None)
            return out
        op, append_op = "LambdaKVCache.attend", "LambdaKVCache.append"
        held = None if self._lengths is None else self._held("append")
        check_tokens(append_op, key, value, self._like_held())
        check_tensor(op, "query", query)
        given = AttentionOptions(**options) if options.keys() <= _OPTIONS.keys() else None
        if given is not None and key.shape[2] <= self._servable and fuses(query, key, given):
            refuse_tangents(append_op, key=key, value=value)
            starts = check_starts(append_op, starts, key, values=False)
            key, value = key.detach(), value.detach()
            tensors = self._allocate(key, value) if held is None else held
            limit = self.window_size if given.distance_limit is None else given.distance_limit
            schedule = Lambda(self.sink_size, self.window_size)
            out, args = append_and_attend(
                append_op, op, query, key, value, tensors, starts, schedule,
                given._replace(distance_limit=limit), self._before_ring, self._ring, rotated=rotated,
            )  # fmt: skip
            self._key, self._value, self._lengths = tensors
            self._chunk, self._own = None, key.shape[2]
            self._catch_up(key.shape[2], starts)
            if not torch.compiler.is_compiling():
                self._again = None if args is None else Again(query, key, value, options, schedule, args)
            return out
        query, key = turned_back(op, rotated, query, key)
        if not torch.compiler.is_compiling():
            on_cpu = isinstance(starts, Tensor) and starts.device.type == "cpu"
            starts = check_starts(append_op, starts, key, values=on_cpu)
            lengths = (starts, None, None if held is None else held[2])
            self._rehearse(op, query, key, value, lengths, options)
        self.append(key, value, starts=starts)
        return self.attend(query, **options)

    def append_and_attend_again(
        self, query: Tensor, key: Tensor, value: Tensor, rotated: tuple[Tensor, Tensor] | None
    ) -> Any:
        """The newest call of `append_and_attend` for other tokens; None, and nothing done, where it has to look.

        That the options are the same, and `rotated` tables if there were any, the caller knows.
        """
        again = self._again
        if again is None or not again.fits_tensors(query, key, value):
            return None
        held: Any = (self._key, self._value, self._lengths)  # there are some: they were appended to
        out = again.call(query, key, value, held, rotated or ())
        self._chunk, self._own = None, key.shape[2]
        if self._cropped:
            self._catch_up(key.shape[2], None)
        return out

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _accepted(self) -> None:
        self._own = 0

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
        given = AttentionOptions(**{name: x for name, x in options.items() if name in _OPTIONS})
        limit = self.window_size if given.distance_limit is None else given.distance_limit
        starts, ends, offsets = lengths
        given = given._replace(
            distance_limit=limit, key_starts=starts, key_lengths=ends, key_offset=offsets,
            query_lengths=torch.zeros(key.shape[0], dtype=torch.int64, device=key.device),
        )  # fmt: skip
        rows = query[:, :, :1] if isinstance(query, Tensor) and query.dim() == 4 else query
        call_attention(op, rows, key.detach(), value.detach(), Lambda(self.sink_size, self.window_size), given)
        # A table that does not reach the limit may be too short later.
        self._rehearsed = like if given.rope is None or given.rope[0].shape[0] >= limit + KEY_TILE else None

    def _everything(self, op: str) -> tuple[Tensor, Tensor]:
        """Key and value of every token, by position; all must still be there."""
        held_key, held_value, lengths = self._held("attend")
        longest = int(lengths.max()) if lengths.numel() else 0
        most = lengths + (self._cropped if self._behind is None else self._behind)
        left = (int(most.max()) if most.numel() else 0) - self.sink_size - self._ring
        if left > 0:
            raise ValueError(f"{op}: middle_topk needs the middle tokens, and {left} have left the cache")
        everything = torch.arange(longest, device=lengths.device).expand(len(lengths), -1)
        return self._gather(held_key, everything), self._gather(held_value, everything)

    def _tree(self, tree: Any) -> tuple[Tree, int]:
        """The tree with the cache's window, and its nodes."""
        op = "LambdaKVCache.attend"
        if not isinstance(tree, Tree):
            raise TypeError(f"{op}: tree is a {type(tree).__name__} and must be a pycore.schedules.Tree")
        if tree.window_size is not None or tree.sink_size != 0:
            raise ValueError(f"{op}: tree has a window or sinks of its own and must leave them to the cache")
        nodes = tree.parents.shape[-1] if isinstance(tree.parents, Tensor) and tree.parents.dim() else 0
        return Tree(tree.parents, self.sink_size, self.window_size), nodes

    def _check_served(self, queries: int, nodes: int, chunk: Chunk | None) -> None:
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
