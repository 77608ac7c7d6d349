# SPDX-License-Identifier: Apache-2.0
"""Schedules as FlexAttention's block masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pycore._checks import check_bool, check_int
from pycore._tensors import as_index, check_tensor
from pycore.schedules.attention_bitmaps import key_mask, tree_ancestors
from pycore.schedules.kinds import Causal, Full, KeySubset, Lambda, Prefix, Schedule, Segments, Tree
from pycore.schedules.probabilistic import Probabilistic

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["to_flex_block_mask"]

_OP = "to_flex_block_mask"
Shape = tuple[int, int, int, int]
# Whether the query in row q of batch row b and head h keeps the key in row j: indices, and so the answer, are tensors.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def to_flex_block_mask(
    schedule: Schedule,
    *,
    batch: int,
    heads: int,
    query_length: int,
    key_length: int,
    block_size: int = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The pairs that a schedule keeps, as FlexAttention takes them: for comparing with it, or for moving from it.

    Query row i stands at position key_length - query_length + i (bottom-right alignment), key row j at j. FlexAttention
    has no place for the rest of `attention`: the distances of a tree and the correction of a round are its score_mod's.

    Args:
        schedule: any of this module. Its tensors are moved to `device`.
        batch, heads: those of the query. The mask has one row, or one head, where all are the same.
        query_length, key_length: at least 1.
        block_size: FlexAttention's, in both directions.

    Returns:
        torch.nn.attention.flex_attention.BlockMask, whose mask_mod may be asked for single pairs. Building it takes
        memory for every pair.

    Raises:
        ValueError: what `attention` refuses of the schedule.
        TypeError: schedule is none.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    shape, device = (batch, heads, query_length, key_length), torch.device(device)
    names = ("batch", "heads", "query_length", "key_length", "block_size")
    for name, value in zip(names, (*shape, block_size), strict=True):
        check_int(_OP, name, value, 1)
    rule, rows, columns = _rule(schedule, shape, device)
    return create_block_mask(
        rule, rows, columns, query_length, key_length, device=device.type if device.index is None else str(device),
        BLOCK_SIZE=block_size,
    )  # fmt: skip


def _rule(schedule: Schedule, shape: Shape, device: torch.device) -> tuple[Rule, int | None, int | None]:
    """The rule, and the batch and heads that it tells apart; None where all are the same."""
    batch, _, query_length, key_length = shape
    shift = key_length - query_length  # from a query's row to its position
    if isinstance(schedule, Full):
        return (lambda b, h, q, j: j >= 0), None, None
    if isinstance(schedule, Causal):
        return (lambda b, h, q, j: q + shift >= j), None, None
    if isinstance(schedule, Lambda):
        sinks, window = schedule.sink_size, schedule.window_size
        check_int(_OP, "sink_size", sinks, 0)
        check_int(_OP, "window_size", window, 1)
        right = key_length + query_length if schedule.right is None else schedule.right

        def in_window(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
            distance = q + shift - j
            return (distance >= -right) & ((distance < window) | (j < sinks))

        return in_window, None, None
    if isinstance(schedule, Prefix):
        check_tensor(_OP, "prefix_lengths", schedule.prefix_lengths)
        prefix = _of_rows("prefix_lengths", schedule.prefix_lengths, batch, False).to(device)
        return (lambda b, h, q, j: (q + shift >= j) | (j < prefix[b])), batch, None
    if isinstance(schedule, Segments):
        return _segments(schedule, shape, device)
    if isinstance(schedule, Probabilistic):
        return _blocks(schedule, shape, device), batch, shape[1]
    if isinstance(schedule, KeySubset):
        given = _of_rows("keys", key_mask(_OP, schedule, key_length).to(device), batch)
        mask = torch.zeros(len(given), key_length, dtype=torch.bool, device=device)
        mask[:, : given.shape[1]] = given[:, :key_length]
        check_bool(_OP, "causal", schedule.causal)
        several, causal = len(mask) > 1, schedule.causal

        def among_keys(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
            taken = mask[b if several else 0, j]
            return taken & (q + shift >= j) if causal else taken

        return among_keys, batch if several else None, None
    if isinstance(schedule, Tree):
        return _tree(schedule, shape, device)
    raise TypeError(f"{_OP}: schedule is a {type(schedule).__name__} and must be one of pycore.schedules")


def _of_rows(name: str, x: Tensor, batch: int, one: bool = True) -> Tensor:
    if len(x) != batch and not (one and len(x) == 1):
        wanted = "one, or one for each" if one else "one for each"
        raise ValueError(f"{_OP}: {name} has {len(x)} rows and must have {wanted} of {batch} batch rows")
    return x


def _segments(schedule: Segments, shape: Shape, device: torch.device) -> tuple[Rule, int | None, int | None]:
    batch, _, query_length, key_length = shape
    shift, most = key_length - query_length, key_length + query_length
    check_tensor(_OP, "boundaries", schedule.boundaries)
    check_bool(_OP, "causal", schedule.causal)
    boundaries = schedule.boundaries.to(device)
    boundaries = _of_rows("boundaries", boundaries if boundaries.dim() == 2 else boundaries[None], batch).contiguous()
    several, entries = len(boundaries) > 1, boundaries.shape[1]
    window = most if schedule.window_size is None else schedule.window_size
    right = 0 if schedule.causal else most if schedule.right is None else schedule.right
    positions = torch.arange(min(0, shift), key_length, device=device).expand(len(boundaries), -1).contiguous()
    segment = torch.searchsorted(boundaries, positions, right=True)
    in_sinks = positions - boundaries.gather(1, segment.clamp(1, entries) - 1) < schedule.sink_size
    segment = segment.masked_fill(segment == entries, 0)  # 0: in none
    before = positions.shape[1] - key_length  # positions before the first key

    def in_segment(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
        row, distance = b if several else torch.zeros_like(b), q + shift - j
        of_query, of_key = segment[row, q + shift + before], segment[row, j + before]
        near = (distance < window) | in_sinks[row, j + before]
        return (of_query > 0) & (of_query == of_key) & (distance >= -right) & near

    return in_segment, batch if several else None, None


def _blocks(schedule: Probabilistic, shape: Shape, device: torch.device) -> Rule:
    from pycore.schedules.attention_blocks import draw_blocks, unpacked

    _, _, query_length, key_length = shape
    words, _ = draw_blocks(_OP, replace(schedule, correction="none"), shape, (None,) * 4, device)
    taken = unpacked(words)
    shift, size, sinks = key_length - query_length, schedule.block_size, schedule.sink_size
    row = (torch.arange(query_length, device=device) + shift) // size - shift // size

    def in_blocks(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
        return (q + shift >= j) & (taken[b, h, row[q], j // size] | (j < sinks))

    return in_blocks


def _tree(schedule: Tree, shape: Shape, device: torch.device) -> tuple[Rule, int | None, int | None]:
    batch, _, query_length, key_length = shape
    ancestors = _of_rows("parents", tree_ancestors(_OP, schedule).to(device), batch)
    nodes = ancestors.shape[1]
    parents, node = as_index(schedule.parents).to(device), torch.arange(nodes, device=device)
    if not bool(((parents >= -1) & (parents < node)).all()):
        raise ValueError(f"{_OP}: parents has an entry that is less than -1 or not less than its own index")
    start, shift = key_length - nodes, key_length - query_length
    if start < 0:
        raise ValueError(f"{_OP}: parents has {nodes} nodes and there are {key_length} keys; the nodes are the last")
    several = len(ancestors) > 1
    depth = ancestors.sum(-1) - 1
    window = key_length + query_length if schedule.window_size is None else schedule.window_size

    def in_branch(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
        p, row = q + shift, b if several else 0
        if nodes == 0:
            return (p >= j) & ((p - j < window) | (j < schedule.sink_size))
        of_query, of_key = (p - start).clamp(min=0), (j - start).clamp(min=0)
        kept = (p >= j) & ((p < start) | (j < start) | ancestors[row, of_query, of_key])
        place_p = torch.where(p < start, p, start + depth[row, of_query])
        place_j = torch.where(j < start, j, start + depth[row, of_key])
        return kept & ((place_p - place_j < window) | (place_j < schedule.sink_size))

    return in_branch, batch if several else None, None
