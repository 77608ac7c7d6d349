# SPDX-License-Identifier: Apache-2.0
"""One call of `torch.ops.pycore.attention`, whoever makes it: its options as one value, checked in one place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycore._checks import check_bool, check_int, check_number
from pycore._tensors import as_index, as_table, check_tensor, graph_numbers
from pycore.ops import attention_autograd, attention_fakes, attention_vmap  # noqa: F401 - they register the op's rules
from pycore.ops._autograd import call
from pycore.schedules import KeySubset, Lambda, Probabilistic, Schedule, Segments, Tree
from pycore.schedules.attention_bitmaps import key_words, tree_nodes
from pycore.schedules.attention_blocks import LENGTHS, Lengths, draw_blocks

__all__ = ["NO_LIMIT", "AttentionOptions", "autocast", "call_attention", "factor", "rope_tables"]

NO_LIMIT = -1
_OPTIONAL = (*LENGTHS, "distance_bias", "alibi_slopes", "sink_logits")


class AttentionOptions(NamedTuple):
    """What every attention function and module takes beside query, key, value and a schedule.

    `pycore.ops.attention` says what each of them means; their order and defaults are those of its signature.
    """

    rope: tuple[Tensor, Tensor] | None = None
    interleaved: bool = False
    distance_limit: int | None = None
    distance_bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    symmetric_bias: bool = False
    sink_logits: Tensor | None = None
    softcap: float | Tensor = 0.0
    dropout_p: float = 0.0
    scale: float | Tensor | None = None
    key_starts: Tensor | None = None
    key_lengths: Tensor | None = None
    key_offset: Tensor | None = None
    query_lengths: Tensor | None = None
    return_lse: bool = False

    @property
    def lengths(self) -> Lengths:
        """key_starts, key_lengths, key_offset and query_lengths."""
        return self.key_starts, self.key_lengths, self.key_offset, self.query_lengths

    def for_cache(self) -> dict[str, Any]:
        """The keywords of a cache's `attend`, which knows its lengths and drops nothing."""
        return {
            "rope": self.rope,
            "interleaved": self.interleaved,
            "distance_limit": self.distance_limit,
            "distance_bias": self.distance_bias,
            "alibi_slopes": self.alibi_slopes,
            "sink_logits": self.sink_logits,
            "softcap": self.softcap,
            "scale": self.scale,
            "return_lse": self.return_lse,
        }


def call_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    schedule: Schedule,
    options: AttentionOptions,
    key_ring: int = 0,
    key_layout: str = "rows",
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` under the name `op`; key_ring and key_layout: how a cache keeps its keys (attention.h in csrc)."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, tensor)
    if not isinstance(key_layout, str):
        raise TypeError(f"{op}: key_layout is a {type(key_layout).__name__} and must be a str")
    _check_schedule(op, schedule)
    lengths, tables = options.lengths, (options.distance_bias, options.alibi_slopes, options.sink_logits)
    for name, option in zip(_OPTIONAL, lengths + tables, strict=True):
        if option is not None:
            check_tensor(op, name, option)
    schedule_tensor, block_bias = schedule.tensor, None
    if schedule_tensor is not None:
        check_tensor(op, "prefix_lengths" if schedule.kind == "prefix" else "boundaries", schedule_tensor)
        schedule_tensor = as_index(schedule_tensor)
    check_bool(op, "symmetric_bias", options.symmetric_bias)
    cos, sin = rope_tables(op, options.rope)
    check_bool(op, "interleaved", options.interleaved)
    check_bool(op, "return_lse", options.return_lse)
    scale = None if options.scale is None else factor(op, "scale", options.scale)
    softcap, dropout_p = factor(op, "softcap", options.softcap), check_number(op, "dropout_p", options.dropout_p)
    limit = NO_LIMIT
    if options.distance_limit is not None:
        check_int(op, "distance_limit", options.distance_limit, 0)
        limit = options.distance_limit
    query, key, value = autocast(query, key, value)
    cos, sin, bias, slopes, sinks = (x if x is None else as_table(x, query) for x in (cos, sin, *tables))
    starts, ends, offsets, queries = (x if x is None else as_index(x) for x in lengths)
    lengths = (starts, ends, offsets, queries)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    numbers = None
    given = isinstance(scale, Tensor) or isinstance(softcap, Tensor)
    if given or (torch.compiler.is_compiling() and (scale is not None or softcap != 0 or dropout_p != 0)):
        numbers = graph_numbers(1.0 if scale is None else scale, softcap, dropout_p)
        scale, softcap, dropout_p = scale if scale is None else 1.0, 0.0, 0.0
    fits = query.dim() == value.dim() == 4 and key.dim() == (5 if key_layout == "tiles" else 4)
    if isinstance(schedule, Probabilistic) and fits:
        shape = (query.shape[0], query.shape[1], query.shape[2], value.shape[2])
        wide = query.dtype == torch.float64
        schedule_tensor, block_bias = draw_blocks(op, schedule, shape, lengths, query.device, wide)
    elif isinstance(schedule, KeySubset) and fits:
        schedule_tensor = key_words(op, schedule, value.shape[2], shifted=offsets is not None)
    elif isinstance(schedule, Tree):
        schedule_tensor = tree_nodes(op, schedule)
    # For a gradient, lse comes with what rounding it left out.
    differentiable = (query, key, value, bias, slopes, sinks, numbers)
    pair = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
    out, lse = call(
        torch.ops.pycore.attention.default, query, key, value, cos, sin, bias, slopes, sinks, *lengths,
        schedule_tensor, seed, block_bias, op,
        schedule.kind, schedule.args, bool(options.interleaved), limit, scale, softcap, dropout_p, key_ring,
        bool(options.symmetric_bias), numbers, pair, key_layout,
    )  # fmt: skip
    if not options.return_lse:
        return out
    return out, lse[0] if pair else lse


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value in the dtype autocast asks for; float64 stays, and so does what is no floating point."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _check_schedule(op: str, schedule: Any) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{op}: schedule is a {type(schedule).__name__} and must be one of pycore.schedules")
    if isinstance(schedule, Lambda | Segments | Tree):
        check_int(op, "sink_size", schedule.sink_size, 0)
        right = None if isinstance(schedule, Tree) else schedule.right
        for name, size, least in (("window_size", schedule.window_size, 1), ("right", right, 0)):
            if size is not None or (isinstance(schedule, Lambda) and name == "window_size"):
                check_int(op, name, size, least)
    if isinstance(schedule, Segments | KeySubset):
        check_bool(op, "causal", schedule.causal)


def factor(op: str, name: str, value: Any) -> Any:
    """A number, or a tensor of one, which may want a gradient."""
    if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
        check_tensor(op, name, value)
        return value
    return check_number(op, name, value)


def rope_tables(op: str, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """Cos and sin of an option, or None of both."""
    if rope is None:
        return None, None
    if not isinstance(rope, (tuple, list)) or len(rope) != 2 or not all(isinstance(t, Tensor) for t in rope):
        raise TypeError(f"{op}: rope must be a pair of Tensors, (cos, sin)")
    check_tensor(op, "rope's cos", rope[0])
    check_tensor(op, "rope's sin", rope[1])
    return rope[0], rope[1]
