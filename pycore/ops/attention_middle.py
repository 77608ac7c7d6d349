# SPDX-License-Identifier: Apache-2.0
"""LM-Infinite's middle tokens: the keys between the sinks and the window that a decoding query scores highest.

They stand at the window's end: a query sees all of them at distance `window_size`, as it sees the far sinks. So one
product of the query, rotated once, with the keys as they are cached gives their scores.

Source: Han et al., "LM-Infinite", section 3, "re-introducing middle tokens".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_bool
from pycore._tensors import as_table
from pycore.ops.attention_call import AttentionOptions, autocast, call_attention
from pycore.ops.linear import invariant_linear
from pycore.schedules import Full, Lambda
from pycore.schedules.attention_blocks import Lengths

__all__ = ["with_middle"]


def with_middle(
    op: str, query: Tensor, key: Tensor, value: Tensor, schedule: Lambda, options: AttentionOptions, topk: int
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over what the schedule keeps and the `topk` middle tokens: two calls whose results are merged."""
    check_bool(op, "return_lse", options.return_lse)
    window_size, distance_limit = schedule.window_size, options.distance_limit
    bias, slopes = options.distance_bias, options.alibi_slopes
    if isinstance(query, Tensor):
        if query.dim() == 4 and query.shape[2] != 1:
            raise ValueError(
                f"{op}: query has length {query.shape[2]} and must have 1 for middle_topk, a decoding step"
            )
        placed = options.rope is not None or bias is not None or slopes is not None
        if placed and distance_limit != window_size:
            raise ValueError(
                f"{op}: distance_limit is {distance_limit} and must be window_size, {window_size}, where middle_topk "
                "puts its tokens"
            )
    if isinstance(query, Tensor) and isinstance(key, Tensor):
        bias, slopes = (x if not isinstance(x, Tensor) else as_table(x, autocast(query)[0]) for x in (bias, slopes))
    kept = call_attention(
        op, query, key, value, schedule, options._replace(distance_bias=bias, alibi_slopes=slopes, return_lse=True)
    )
    query, key, value = autocast(query, key, value)
    seen = rotated(query, options.rope, options.interleaved, window_size)
    with torch.no_grad():
        index, count = middle_tokens(seen, key, options.lengths, schedule.sink_size, window_size, topk)
    if bias is not None:
        bias = bias[:, min(window_size, bias.shape[1] - 1), None].contiguous()
    elif slopes is not None and slopes.dim() == 1:
        bias = -slopes.to(seen.dtype)[:, None] * window_size
    middle_key, middle_value = (gathered(x, index).to(seen.dtype) for x in (key, value))
    at_the_end = AttentionOptions(
        distance_bias=bias, softcap=options.softcap, dropout_p=options.dropout_p, scale=options.scale,
        key_lengths=count, query_lengths=options.query_lengths, return_lse=True,
    )  # fmt: skip
    middle = call_attention(op, seen, middle_key, middle_value, Full(), at_the_end)
    assert isinstance(kept, tuple) and isinstance(middle, tuple)
    if slopes is not None and slopes.dim() == 2:  # one number for all keys of a row moves its lse alone
        middle = (middle[0], middle[1] - (slopes.to(seen.dtype) * window_size)[..., None])
    out, lse = merged(kept, middle)
    return (out, lse) if options.return_lse else out


def middle_tokens(
    query: Tensor, key: Tensor, lengths: Lengths, sink_size: int, window_size: int, topk: int
) -> tuple[Tensor, Tensor]:
    """The middle keys with the largest scores, of equal ones those that come first.

    Args:
        query: [B, H, 1, D], rotated by the window's size, in the dtype of the scores.
        key: [B, Hkv, Lk, D], not rotated.
        lengths: key_starts, key_lengths, key_offset and query_lengths of `attention`.
        sink_size: keys before it are no middle tokens.
        window_size: nor are those at a smaller distance.
        topk: how many to choose.

    Returns:
        Rows of key, int64 [B, H, k] with k = min(topk, Lk), the chosen ones first, and how many those are, int64 [B].
    """
    batch, heads, _, dim = query.shape
    kv_heads, rows = key.shape[1:3]
    starts, ends, offsets, _ = lengths
    row = torch.arange(rows, device=key.device)[None, :]
    zero = torch.zeros(batch, dtype=torch.int64, device=key.device)
    start, offset = (zero if x is None else x for x in (starts, offsets))
    end = zero + rows if ends is None else ends
    position = row - start[:, None]
    position = torch.where(position < sink_size, position, position + offset[:, None])
    newest = (end - start + offset - 1)[:, None]
    middle = (row >= start[:, None]) & (row < end[:, None])
    middle &= (position >= sink_size) & (position <= newest - window_size)

    # A product per key head: each score is one chain of FMAs, whatever else is in the batch.
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, dim)
    products = [
        invariant_linear(grouped[b, h], key[b, h].to(query.dtype)) for b in range(batch) for h in range(kv_heads)
    ]
    scores = torch.stack(products) if products else query.new_zeros(0)
    scores = scores.view(batch, heads, rows)
    # A NaN is the highest of all, so that it shows in the output; a middle key's -inf is more than none.
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo(scores.dtype).min)
    scores = scores.masked_fill(~middle[:, None], -torch.inf)
    count = min(topk, rows)
    least = scores.topk(count).values[..., -1:]
    above, equal = scores > least, scores == least
    chosen = above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    # Middle tokens first, each group by row: no two of these numbers are equal.
    order = (chosen & middle[:, None]) * rows + chosen * (rows - row)
    return order.topk(count).indices, middle.sum(1).clamp(max=count)


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """Rows index [B, H, k] of x [B, Hkv, L, D], for every query head: [B, H, k, D]."""
    batch, heads, count = index.shape
    grouped = index.view(batch, x.shape[1], heads // max(1, x.shape[1]) * count)
    return x.gather(2, grouped[..., None].expand(-1, -1, -1, x.shape[3])).view(batch, heads, count, x.shape[3])


def rotated(query: Tensor, rope: tuple[Tensor, Tensor] | None, interleaved: bool, distance: int) -> Tensor:
    """The query as it stands `distance` after a key, in the dtype of the tables."""
    query = query.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    if rope is None:
        return query
    cos, sin = (table[min(distance, len(table) - 1)] for table in rope)
    pairs = cos.shape[0]
    turned, rest = query[..., : 2 * pairs], query[..., 2 * pairs :]
    x, y = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :pairs], turned[..., pairs:])
    both = (x * cos - y * sin, y * cos + x * sin)
    joined = torch.stack(both, dim=-1).flatten(-2) if interleaved else torch.cat(both, dim=-1)
    return torch.cat([joined, rest], dim=-1)


def merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over two disjoint sets of keys. Without a second set, the first to the bit."""
    # Rows with no weight in either: finite numbers go through the formulas, whose gradients would be NaN.
    none = (first[1] == -torch.inf) & (second[1] == -torch.inf)
    at = torch.logaddexp(*(x.masked_fill(none, 0.0) for _, x in (first, second))).masked_fill(none, 0.0)
    lse = at.masked_fill(none, -torch.inf)
    out: Any = sum(x.to(lse.dtype) * (part - at).exp()[..., None] for x, part in (first, second))
    return out.to(first[0].dtype), lse
