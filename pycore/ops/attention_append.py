# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.pycore.attention_append`: a cache takes new tokens and their queries are attended to, in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_bool, check_int
from pycore._load import load_ops
from pycore._schema import Schema
from pycore._tangents import forward_mode
from pycore._tensors import as_table, check_devices, check_tensor, graph_numbers
from pycore.ops.attention_call import NO_LIMIT, AttentionOptions, factor, rope_tables
from pycore.schedules import Schedule

load_ops()

__all__ = ["append_and_attend", "fuses"]

_APPEND = Schema("attention_append")


def fuses(query: Any, key: Any, options: AttentionOptions) -> bool:
    """Whether one call will do: on the CPU, without autocast, and where nothing learns."""
    if not isinstance(query, Tensor) or not isinstance(key, Tensor) or forward_mode():
        return False
    if query.device.type != "cpu" or key.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if not torch.is_grad_enabled():
        return True
    learning = (query, options.distance_bias, options.alibi_slopes, options.sink_logits, options.scale, options.softcap)
    return not any(isinstance(x, Tensor) and x.requires_grad for x in learning)


def append_and_attend(
    append_op: str,
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    held: tuple[Tensor, Tensor, Tensor],
    starts: Tensor | None,
    schedule: Schedule,
    options: AttentionOptions,
    sink_size: int = 0,
    key_ring: int = 0,
    most: int = -1,
) -> Tensor | tuple[Tensor, Tensor]:
    """`lambda_cache_append` under the name `append_op`, then attention over `held` under the name `op`.

    Args:
        query: [B, H, n, D], a row for each token.
        key, value: [B, Hkv, n, channels].
        held: key, value and lengths of the cache, which are written to.
        sink_size: rows before the ring that tokens are appended to.
        key_ring: the ring that attention sees.
        most: tokens that a row of the batch may have, or -1.
    """
    for name, table in (("distance_bias", options.distance_bias), ("alibi_slopes", options.alibi_slopes),
                        ("sink_logits", options.sink_logits)):  # fmt: skip
        if table is not None:
            check_tensor(op, name, table)
    cos, sin = rope_tables(op, options.rope)
    check_bool(op, "interleaved", options.interleaved)
    check_bool(op, "return_lse", options.return_lse)
    scale = None if options.scale is None else factor(op, "scale", options.scale)
    softcap, limit, numbers = factor(op, "softcap", options.softcap), NO_LIMIT, None
    if options.distance_limit is not None:
        check_int(op, "distance_limit", options.distance_limit, 0)
        limit = options.distance_limit
    if isinstance(scale, Tensor) or isinstance(softcap, Tensor) or (
        torch.compiler.is_compiling() and (scale is not None or softcap != 0)
    ):  # fmt: skip
        numbers = graph_numbers(1.0 if scale is None else scale, softcap)
        scale, softcap = scale if scale is None else 1.0, 0.0
    tables = (cos, sin, options.distance_bias, options.alibi_slopes, options.sink_logits)
    out, lse = torch.ops.pycore.attention_append(
        query, key, value, *held, starts, *(x if x is None else as_table(x, query) for x in tables), append_op, op,
        schedule.kind, schedule.args, bool(options.interleaved), limit, scale, softcap, sink_size, key_ring, most,
        numbers,
    )  # fmt: skip
    if not torch.compiler.is_compiling() and not held[2].is_inference():
        # The op does not: autograd would read rows that were written over, for queries that are still to learn.
        torch.autograd.graph.increment_version(held)
    return (out, lse) if options.return_lse else out


@torch.library.register_fake("pycore::attention_append")
def _fake(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    call = _APPEND.named(args) | options
    query, value = call["query"], call["value_cache"]
    check_devices(call["op"], **{name: call[name] for name in _APPEND.tensors if name != "numbers"})
    batch, heads, length, _ = query.shape
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        query.new_empty(batch, heads, length, value.shape[3]),
        query.new_empty(batch, heads, length, dtype=sums),
    )
