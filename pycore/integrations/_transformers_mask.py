# SPDX-License-Identifier: Apache-2.0
"""What transformers' 2-D padding mask says, as the numbers that the op takes.

transformers asks the mask function of an attention implementation once a forward pass (and kind of layer) and hands
what it returns to every layer, untouched. Here that is None where every row of the keys counts, else `spans`, int64
`[batch, 1, 1, 4]`: per batch row key_starts, key_lengths, query_lengths, and how many of the new tokens are padding on
the left. Four dimensions, because transformers passes a mask of four on as it is when it meets it again, which happens
in `generate` with a static cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """int64 [batch] each: the keys and queries that count, and how many of the new tokens are padding on the left."""

    key_starts: Tensor
    key_lengths: Tensor
    query_lengths: Tensor
    new_starts: Tensor


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


def read_spans(name: str, mask: Tensor | None, batch: int) -> Spans | None:
    """What `spans_function` made of the model's mask; None where every row counts."""
    if mask is None:
        return None
    if mask.dtype != torch.int64 or tuple(mask.shape) != (batch, 1, 1, len(Spans._fields)):
        raise ValueError(
            f"{name}: attention_mask is a {mask.dtype} tensor of shape {list(mask.shape)} and must be the 2-D mask of "
            "padding, given to the model: masks of queries by keys are not available"
        )
    return Spans(*(field.contiguous() for field in mask[:, 0, 0].unbind(-1)))


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
        # Plain masks may be skipped; what may not is a static cache, or a mask with more in it.
        if mask_function is not None and not allow_is_causal_skip and q_length > 1:
            _require_causal(name, mask_function, batch_size, q_length, q_offset, device)
        return _spans(name, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device)

    return spans


def _require_causal(
    name: str,
    mask_function: Callable[..., Tensor],
    batch: int,
    length: int,
    offset: int | Tensor,
    device: torch.device | str | None,
) -> None:
    """Tells causal and sliding masks from others by the pairs next to the diagonal, in linear time.

    Whatever looks ahead (bidirectional attention, prefixes, blocks of an image) keeps the pair above the diagonal
    somewhere; whatever cuts the sequence (packed texts, chunks) drops a pair below it.
    """
    row = torch.arange(batch, device=device)[:, None]
    head = torch.zeros_like(row)
    first = (torch.arange(length - 1, device=device) + offset)[None, :]
    looks_ahead = mask_function(row, head, first, first + 1)
    stays_whole = mask_function(row, head, first + 1, first)
    require(~looks_ahead.any(), f"{name}: the model's mask lets a token see a later one and must be causal")
    require(
        stays_whole.all(),
        f"{name}: position_ids or the model's mask cut a row into several texts and must leave it whole: packed "
        "sequences and chunked attention are not available",
    )


def _spans(
    name: str,
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask: Tensor | None,
    device: torch.device | str | None,
) -> Tensor | None:
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
    return torch.stack(Spans(first, end, queries, new_starts), -1)[:, None, None]
