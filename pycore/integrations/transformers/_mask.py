# SPDX-License-Identifier: Apache-2.0
"""What transformers' 2-D padding mask and position ids say, as the numbers that the op takes.

transformers asks the mask function of an attention implementation once a forward pass (and kind of layer) and hands
what it returns to every layer, untouched. Here that is None where every row of the keys counts and makes one text, else
a tensor int64 `[batch, 1, queries + 5, 1]` of `Spans`: a tag, and per batch row key_starts, key_lengths, query_lengths,
and how many of the new tokens are padding on the left. `[batch, 1, queries + 6, 1]` says that rows hold several texts,
whose boundaries follow. Four dimensions, because transformers passes a mask of four on as it is when it meets it again,
which happens in `generate` with a static cache; and no mask of queries by keys can have these, so that a user's own is
told from ours by its shape alone, also in compiled code, and after copies that leave no attribute.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_TAG = 0x7079636F_7265
_HEADER = 5  # the tag, and four numbers


class Spans(NamedTuple):
    """int64 [batch] each: the keys and queries that count, and how many of the new tokens are padding on the left."""

    key_starts: Tensor
    key_lengths: Tensor
    query_lengths: Tensor
    new_starts: Tensor
    boundaries: Tensor | None = None  # int64 [batch, texts + 1], ascending positions, where rows hold several texts


def require(condition: Tensor, message: str) -> None:
    """ValueError(message) unless the 0-d condition holds.

    Compiled code checks when it runs (a RuntimeError). On CUDA, where reading a value would stall the stream, only
    PYCORE_CHECK=1 checks, as in the ops.
    """
    if torch.compiler.is_compiling():
        if condition.device.type == "cpu":
            torch._assert_async(condition, message)
    elif (condition.device.type == "cpu" or os.environ.get("PYCORE_CHECK") == "1") and not bool(condition):
        raise ValueError(message)


def read_spans(name: str, mask: Tensor | None, batch: int, queries: int) -> Spans | None:
    """What `spans_function` made of the model's mask; None where every row counts."""
    if mask is None:
        return None
    wanted = "must be the 2-D mask of padding, given to the model: masks of queries by keys are not available"
    sizes = (queries + _HEADER, queries + _HEADER + 1)
    ours = mask.dtype == torch.int64 and mask.dim() == 4 and mask.shape[2] in sizes
    if not ours or (mask.shape[0], mask.shape[1], mask.shape[3]) != (batch, 1, 1):
        raise ValueError(f"{name}: attention_mask is a {mask.dtype} tensor of shape {list(mask.shape)} and {wanted}")
    rows = mask[:, 0, :, 0]
    require((rows[:, 0] == _TAG).all(), f"{name}: attention_mask is another's and {wanted}")
    starts, lengths, query_lengths, new_starts = (x.contiguous() for x in rows[:, 1:_HEADER].unbind(-1))
    boundaries = rows[:, _HEADER:].contiguous() if mask.shape[2] == sizes[1] else None
    return Spans(starts, lengths, query_lengths, new_starts, boundaries)


def _packed(spans: Spans, queries: int) -> Tensor:
    """As `read_spans` reads it."""
    batch = spans.key_starts.shape[0]
    numbers = torch.stack([torch.full_like(spans.key_starts, _TAG), *spans[:4]], -1)
    rest = spans.boundaries
    if rest is None:
        rest = numbers.new_zeros(batch, queries)
    return torch.cat([numbers, rest], -1)[:, None, :, None]


def text_boundaries(cut: Tensor, spans: Spans) -> Tensor:
    """Where the texts of each row begin, and the last one ends.

    Args:
        cut: bool [1 or batch, queries - 1], whether a text begins with the query after this one. In padding it may not.

    Returns:
        int64 [batch, queries + 1], by position; what is left over repeats the end.
    """
    queries = cut.shape[1] + 1
    row = torch.arange(1, queries, device=cut.device)[None]
    begins = cut & (row > spans.new_starts[:, None]) & (row < spans.query_lengths[:, None])
    start = torch.where(begins, row - spans.new_starts[:, None], queries).sort(-1).values
    edge = start.new_zeros(start.shape[0], 1)
    return torch.cat([edge, start, edge + queries], -1)


def spans_function(name: str) -> Callable[..., Tensor | None]:
    """The mask function to register under `name`."""

    def spans(
        batch_size: int,
        q_length: int | None = None,
        kv_length: int = 0,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *,
        cache_position: Tensor | None = None,
        allow_is_causal_skip: bool = True,
        use_vmap: bool = False,
        config: Any = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        # transformers 4 says where the queries stand by a tensor, transformers 5 by a length and an offset.
        if cache_position is not None:
            q_length, device = cache_position.shape[0], cache_position.device
            q_offset = cache_position[0]
            if device.type == "cpu" and not torch.compiler.is_compiling():
                q_offset = int(q_offset)
            elif allow_is_causal_skip:  # no static cache, so the keys end with the queries
                q_offset = kv_offset + kv_length - q_length
        assert q_length is not None
        if attention_mask is not None:
            device = attention_mask.device
        if getattr(config, "attention_chunk_size", None) is not None:
            raise ValueError(
                f"{name}: config.attention_chunk_size is {config.attention_chunk_size} and must be None: chunked "
                "attention is not available"
            )
        if use_vmap:
            raise ValueError(f"{name}: the model's mask is causal with a function of its own and must be causal alone")
        fresh = kv_length == q_length and kv_offset == 0  # or a static cache's first tokens
        cut = None
        # Plain masks may be skipped; what may not is a static cache, or a mask with more in it.
        if mask_function is not None and not allow_is_causal_skip and q_length > 1:
            cut = _cuts(name, mask_function, batch_size, q_length, q_offset, device)
            if not fresh:
                cut = None
        if not torch.compiler.is_compiling():
            cut = _told(name, cut, attention_mask, q_length, q_offset, kv_offset)
        known = _spans(name, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device)
        if cut is None:
            return None if known is None else _packed(known, q_length)
        if known is None:
            none = torch.zeros(batch_size, dtype=torch.int64, device=device)
            known = Spans(none, none + kv_length, none + q_length, none)
        return _packed(known._replace(boundaries=text_boundaries(cut, known)), q_length)

    return spans


_MIXED = "_pycore_packed"  # the attribute of a cache that was filled with several texts a row


def _told(
    name: str, cut: Tensor | None, mask: Tensor | None, queries: int, offset: int | Tensor, kv_offset: int
) -> Tensor | None:
    """`cut`, with what the model's position ids say where transformers does not ask them: with a mask or a cache.

    Not every model hands its position ids to its attention, so they are looked for in the frames of the running call.
    There a text begins where position ids do not rise; where they jump ahead, transformers sees none.
    """
    position, cache = _in_frames(queries)
    if cut is None and position is not None and queries > 1:
        cut = position.diff(dim=-1) <= 0
        if not bool(cut.any()):
            cut = None
        elif mask is not None:  # padding may have any
            valid = mask[:, -queries:].to(torch.bool)
            cut = cut.to(valid.device) & valid[:, 1:] & valid[:, :-1]
    if cut is not None and not bool(cut.any()):
        cut = None
    if cut is None and not hasattr(cache, _MIXED):
        return None
    past = int(offset) > 0 or kv_offset > 0
    if cut is not None and past:
        raise ValueError(
            f"{name}: position_ids begin again within a row while past_key_values holds tokens and must go on: packed "
            "sequences need an empty cache"
        )
    if past and getattr(cache, _MIXED, False):
        raise ValueError(
            f"{name}: past_key_values holds several texts a row, of packed position_ids, and must hold one to go on"
        )
    if cache is not None and not past:
        setattr(cache, _MIXED, cut is not None)
    return cut


def _in_frames(queries: int) -> tuple[Tensor | None, Any]:
    """Position ids [1 or batch, queries] and the cache of the forward pass that is asking for a mask."""
    frame, cache = sys._getframe(2), None
    while frame is not None:
        asking = frame.f_globals.get("__name__") == "transformers.masking_utils"
        if asking or isinstance(frame.f_locals.get("self"), nn.Module):
            cache = frame.f_locals.get("past_key_values") if cache is None else cache
            position = frame.f_locals.get("position_ids")
            if isinstance(position, Tensor) and position.dim() == 2 and position.shape[1] == queries:
                return position, cache
        frame = frame.f_back  # type: ignore[assignment]
    return None, cache


def _cuts(
    name: str,
    mask_function: Callable[..., Tensor],
    batch: int,
    length: int,
    offset: int | Tensor,
    device: torch.device | str | None,
) -> Tensor:
    """Where a mask separates texts, bool [batch, length - 1]; others than causal and sliding ones it refuses.

    Seen by the pairs next to the diagonal, in linear time: whatever looks ahead (bidirectional attention, prefixes,
    blocks of an image) keeps the pair above the diagonal somewhere; packed texts drop the pair below it where one
    begins, and every pair with the last token of the text before.
    """
    row = torch.arange(batch, device=device)[:, None]
    head = torch.zeros_like(row)
    place = torch.arange(length, device=device)[None, :]
    first = place[:, :-1] + offset
    looks_ahead = mask_function(row, head, first, first + 1)
    cut = ~mask_function(row, head, first + 1, first).expand(batch, -1)
    require(~looks_ahead.any(), f"{name}: the model's mask lets a token see a later one and must be causal")
    begins = torch.nn.functional.pad(cut, (1, 0)) * place
    before = begins.cummax(-1).values - 1
    seen = mask_function(row, head, place + offset, before.clamp(min=0) + offset) & (before >= 0)
    require(
        ~seen.any(),
        f"{name}: the model's mask leaves out the token before and must be causal, or that of packed position_ids",
    )
    return cut


def _spans(
    name: str,
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask: Tensor | None,
    device: torch.device | str | None,
) -> Spans | None:
    filled = q_offset + q_length - kv_offset  # rows of the keys that hold a token; a static cache has more
    known = isinstance(filled, int)
    if mask is None and known and filled >= kv_length:
        return None
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(f"{name}: attention_mask has {mask.dim()} dimensions and must have 2")
        if known and mask.shape[1] < filled + kv_offset:
            raise ValueError(
                f"{name}: attention_mask has {mask.shape[1]} columns and must have {filled + kv_offset}, one for each "
                "token so far"
            )
    row = torch.arange(kv_length, device=device)
    valid = (row < filled).expand(batch, kv_length)
    if mask is not None:
        window = mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        valid = valid & torch.nn.functional.pad(window, (0, kv_length - window.shape[1]))
        if not torch.compiler.is_compiling() and valid.device.type == "cpu" and bool(valid.all()):
            return None
    count = valid.sum(-1)
    ones = valid.to(torch.int64)
    first, end = ones.argmax(-1), kv_length - ones.flip(-1).argmax(-1)
    require(
        ((end - first == count) | (count == 0)).all(),
        f"{name}: attention_mask has a hole and must keep one run of tokens in each row, with padding "
        "on its left or right",
    )
    # A row without a token ends, empty, where the keys end: its queries come before its first token and give zeros.
    first, end = torch.where(count > 0, first, filled), torch.where(count > 0, end, filled)
    before = filled - q_length  # tokens of earlier forward passes
    new_starts, queries = (first - before).clamp(0, q_length), (end - before).clamp(0, q_length)
    return Spans(first, end, queries, new_starts)
