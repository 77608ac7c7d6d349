# SPDX-License-Identifier: Apache-2.0
"""What a model's position ids must be for attention by distance: those of a text follow one another."""

from __future__ import annotations

import torch
from torch import Tensor

from pycore.integrations.transformers._cache import TokensLayer
from pycore.integrations.transformers._mask import Spans, require, text_boundaries

_FOLLOWING = "_pycore_following"


def check_positions(
    name: str, position_ids: Tensor | None, query: Tensor, key: Tensor, spans: Spans | None, cached: bool
) -> Spans | None:
    """The spans, with the boundaries of texts where the position ids of several follow one another.

    Those of a text are consecutive. The mask function has looked already in most models; compiled code cannot choose,
    and refuses.
    """
    if position_ids is None:
        return spans
    if position_ids.dim() != 2:
        raise ValueError(f"{name}: position_ids has {position_ids.dim()} dimensions and must have 2, [batch, length]")
    batch, _, queries, _ = query.shape
    if queries == 1:
        return spans
    step = position_ids.diff(dim=-1)
    allowed = step == 1
    if spans is not None:  # padding may have any
        row = torch.arange(1, queries, device=position_ids.device)[None]
        allowed = allowed | (row <= spans.new_starts[:, None]) | (row >= spans.query_lengths[:, None])
    if not torch.compiler.is_compiling() and not cached and key.shape[2] == queries and step.device.type == "cpu":
        cut = ~allowed & (step <= 0)
        if bool(cut.any()):
            if spans is None:
                none = torch.zeros(batch, dtype=torch.int64, device=key.device)
                spans = Spans(none, none + queries, none + queries, none)
            spans = spans._replace(boundaries=text_boundaries(cut, spans))
            allowed = allowed | cut
    require(
        allowed.all(),
        f"{name}: position_ids jump within a row and must be consecutive: packed sequences are not available",
    )
    return spans


def position_offset(
    name: str, layer: TokensLayer, position_ids: Tensor, query: Tensor, starts: Tensor | None
) -> tuple[Tensor, list[int] | None]:
    """What a token's position id exceeds its number by, [batch], and each row's next id, where that is known.

    The first new token must follow the last one held. In a step of decoding the ids as numbers say so, which are the
    same for all layers; else those of each layer are counted.
    """
    batch, _, new, _ = query.shape
    following = None
    if not torch.compiler.is_compiling() and position_ids.device.type == "cpu":
        following = _following(position_ids)
        if starts is None and layer.position_offset is not None and layer.next_ids is not None:
            if following == [x + new for x in layer.next_ids]:
                return layer.position_offset, following
    last = position_ids[:, -1] - (new - 1 if starts is None else new - 1 - starts)
    if layer.get_seq_length() == 0:
        return last.expand(batch), following
    assert layer.store is not None
    held = layer.store.lengths
    offset = last - held
    if layer.position_offset is not None:
        require(
            ((offset == layer.position_offset) | (held == 0)).all(),
            f"{name}: position_ids do not go on where past_key_values ends and must be consecutive",
        )
    return offset, following


def _following(position_ids: Tensor) -> list[int]:
    """The id after each row's last one; all layers of a pass are given the same tensor, so the first leaves it."""
    if position_ids.is_inference():  # nothing tells whether it was changed
        return [x + 1 for x in position_ids[:, -1].tolist()]
    version, ids = getattr(position_ids, _FOLLOWING, (None, []))
    if version != position_ids._version:
        ids = [x + 1 for x in position_ids[:, -1].tolist()]
        setattr(position_ids, _FOLLOWING, (position_ids._version, ids))
    return ids
