# SPDX-License-Identifier: Apache-2.0
"""Attention over any schedule in plain torch: every score is materialised. Meant for reading and for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from pycore.reference.attention_blocks import block_logits, block_mask
from pycore.schedules import Causal, Full, KeySubset, Lambda, Prefix, Probabilistic, Schedule, Segments, Tree

__all__ = ["attention", "keep_mask"]


def _row(x: Tensor, batch_row: int) -> Tensor:
    """The row of x [n] or [B, n] that a batch row uses."""
    return x if x.dim() == 1 else x[batch_row if len(x) > 1 else 0]


def places(schedule: Schedule, positions: Tensor, count: int, batch_row: int = 0) -> Tensor:
    """Where positions stand for distances, of `count` in all: a tree's node behind the context, at its depth."""
    if not isinstance(schedule, Tree):
        return positions
    parents = _row(schedule.parents, batch_row).tolist()
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    start = count - len(parents)
    table = torch.cat([torch.arange(start), start + torch.tensor(depths, dtype=torch.int64)])
    return torch.where(positions < start, positions, table[positions.clamp(min=0)])


def _branches(parents: list[int]) -> Tensor:
    """Bool [T, T]: whether node t is node s or descends from it."""
    same = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            same[node] |= same[parent]
    return same


def keep_mask(
    schedule: Schedule, p: Tensor, j: Tensor, batch_row: int = 0, head: int = 0, count: int | None = None
) -> Tensor:
    """Whether a query at position p [n, 1] attends to a key at position j [1, m]: bool [n, m].

    `count` is the number of positions in all, behind the last of j by default; only a tree asks for it.
    """
    d = p - j
    if isinstance(schedule, Full):
        return torch.ones_like(d, dtype=torch.bool)
    if isinstance(schedule, Causal):
        return d >= 0
    if isinstance(schedule, Lambda):
        ahead = torch.ones_like(d, dtype=torch.bool) if schedule.right is None else d >= -schedule.right
        return ahead & ((d < schedule.window_size) | (j < schedule.sink_size))
    if isinstance(schedule, Prefix):
        return (d >= 0) | (j < schedule.prefix_lengths[batch_row])
    if isinstance(schedule, Segments):
        boundaries = _row(schedule.boundaries, batch_row)
        segment_p, segment_j = (torch.searchsorted(boundaries, x.contiguous(), right=True) for x in (p, j))
        keep = (segment_p > 0) & (segment_p < len(boundaries)) & (segment_p == segment_j)
        if schedule.window_size is not None:
            first = boundaries[segment_j.clamp(1, len(boundaries)) - 1]
            keep = keep & ((d < schedule.window_size) | (j - first < schedule.sink_size))
        right = 0 if schedule.causal else schedule.right
        return keep if right is None else keep & (d >= -right)
    if isinstance(schedule, Probabilistic):
        i, i_row = (p // schedule.block_size).unique(return_inverse=True)
        k, k_column = (j // schedule.block_size).unique(return_inverse=True)
        taken = block_mask(schedule, i[:, None], k[None, :], batch_row, head)[i_row, k_column]
        return (d >= 0) & (taken | (j < schedule.sink_size))
    if isinstance(schedule, KeySubset):
        keys = _row(schedule.keys, batch_row)
        chosen = keys.nonzero().flatten() if keys.dtype == torch.bool else keys
        return torch.isin(j, chosen) & ((d >= 0) | (not schedule.causal))
    if isinstance(schedule, Tree):
        parents = _row(schedule.parents, batch_row).tolist()
        start = (int(j.max()) + 1 if count is None and j.numel() else count or 0) - len(parents)
        node_p, node_j = (p - start).clamp(min=0), (j - start).clamp(min=0)
        in_tree = _branches(parents)[node_p, node_j] if parents else torch.zeros_like(d, dtype=torch.bool)
        keep = (d >= 0) & ((p < start) | (j < start) | in_tree)
        if schedule.window_size is not None:
            place_p, place_j = (places(schedule, x, start + len(parents), batch_row) for x in (p, j))
            keep = keep & ((place_p - place_j < schedule.window_size) | (place_j < schedule.sink_size))
        return keep
    raise TypeError(f"schedule is {schedule!r} and must be one of pycore.schedules")


def _rotated_scores(q: Tensor, k: Tensor, d: Tensor, rope: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """<q rotated by d, k> for q [n, D], k [m, D] and distances d [n, m]."""
    cos, sin = (table.to(q.dtype) for table in rope)
    r = 2 * cos.shape[1]
    if interleaved:
        q1, q2, k1, k2 = q[:, 0:r:2], q[:, 1:r:2], k[:, 0:r:2], k[:, 1:r:2]
    else:
        q1, q2, k1, k2 = q[:, : r // 2], q[:, r // 2 : r], k[:, : r // 2], k[:, r // 2 : r]
    scores = q[:, r:] @ k[:, r:].T
    for pair in range(r // 2):
        same = torch.outer(q1[:, pair], k1[:, pair]) + torch.outer(q2[:, pair], k2[:, pair])
        crossed = torch.outer(q1[:, pair], k2[:, pair]) - torch.outer(q2[:, pair], k1[:, pair])
        scores = scores + cos[d.abs(), pair] * same + sin[d.abs(), pair] * d.sign() * crossed
    return scores


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    schedule: Schedule | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    distance_limit: int | None = None,
    distance_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    symmetric_bias: bool = False,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_offset: Tensor | None = None,
    query_lengths: Tensor | None = None,
    middle_topk: int = 0,
) -> tuple[Tensor, Tensor]:
    """`pycore.ops.attention` as formulas: softmax(softcap(scale * <rotated q, k>) + bias) v over the kept keys.

    Args and shapes are those of `pycore.ops.attention` and `lambda_attention`.

    Returns (out [B, H, Lq, Dv], lse [B, H, Lq]).
    """
    schedule = Causal() if schedule is None else schedule
    batch, heads, query_length, head_dim = query.shape
    group = heads // key.shape[1] if heads else 1
    scale = head_dim**-0.5 if scale is None else scale
    sinks = schedule.sink_size if isinstance(schedule, Lambda | Probabilistic | Tree) else 0
    out = query.new_zeros(batch, heads, query_length, value.shape[3])
    lse = query.new_full((batch, heads, query_length), -torch.inf)
    outs, lses = [], []
    for b in range(batch):
        start = 0 if key_starts is None else int(key_starts[b])
        end = key.shape[2] if key_lengths is None else int(key_lengths[b])
        offset = 0 if key_offset is None else int(key_offset[b])
        queries = query_length if query_lengths is None else int(query_lengths[b])
        rows = torch.arange(end - start)
        j = torch.where(rows < sinks, rows, rows + offset)[None, :]
        p = (end - start + offset - queries + torch.arange(queries))[:, None]
        count = end - start + offset
        d = places(schedule, p, count, b) - places(schedule, j, count, b)
        away = d.abs() if symmetric_bias else d.clamp(min=0)
        d, away = (x if distance_limit is None else x.clamp(max=distance_limit) for x in (d, away))
        for h in range(heads):
            if h == 0 or isinstance(schedule, Probabilistic):  # others are the same for all heads
                kept = keep_mask(schedule, p, j, b, h, count)
            q, k, v = query[b, h, :queries], key[b, h // group, start:end], value[b, h // group, start:end]
            middle = (p >= j) & ~kept & (middle_topk > 0)
            seen = d * (kept | middle)
            scores = scale * (q @ k.T if rope is None else _rotated_scores(q, k, seen, rope, interleaved))
            best = scores.masked_fill(~middle, -torch.inf).argsort(dim=1, descending=True, stable=True)
            keep = kept | (torch.zeros_like(kept).scatter(1, best[:, :middle_topk], True) & middle)
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            if distance_bias is not None:
                scores = scores + distance_bias[h, away.clamp(max=distance_bias.shape[1] - 1)]
            if alibi_slopes is not None:
                scores = scores - _row(alibi_slopes[..., h, None], b) * away
            if isinstance(schedule, Probabilistic):
                scores = scores + block_logits(schedule, p, j, h).to(scores.dtype)
            # Rows without weights go through the formulas with finite numbers and are replaced afterwards.
            empty = ~(keep & (scores != -torch.inf)).any(1)
            keep = keep & ~empty[:, None]
            kept_scores = scores.masked_fill(~keep, -torch.inf).masked_fill(empty[:, None], 0)
            row_lse = torch.where(empty, -torch.inf, kept_scores.logsumexp(dim=1))
            if sink_logits is not None:
                none = empty & (sink_logits[h] == -torch.inf)
                row_lse = torch.logaddexp(row_lse.masked_fill(none, 0), sink_logits[h]).masked_fill(none, -torch.inf)
            finite_lse = torch.where(empty, 0, row_lse)
            weights = torch.where(keep, (kept_scores - finite_lse[:, None]).exp(), 0)
            outs.append(torch.cat([weights @ v, out[b, h, queries:]]))
            lses.append(torch.cat([row_lse, lse[b, h, queries:]]))
    if not outs:
        return out, lse
    return torch.stack(outs).view_as(out), torch.stack(lses).view_as(lse)
