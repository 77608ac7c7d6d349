# SPDX-License-Identifier: Apache-2.0
"""Attention on a staircase cache that stays packed.

csrc/include/pycore/staircase/attention.h has the sums and their order, csrc/cpu/staircase/loader.inl.h the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pycore._load import load_ops
from pycore._tensors import check_devices, check_tensor

load_ops()

__all__ = ["attend_packed", "staircase_attention"]


def staircase_attention(query: Tensor, packed: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Causal or Λ attention of queries on a `StaircaseKVCache`, whose keys and values are never unpacked as a whole.

    The cache's scales go into the query and the weights, a tile of 64 tokens is unpacked once for all query heads that
    share a key head, and every step of the ladder is read at its own width. Source: the staircase adaptive quantization
    of arXiv 2410.18441, on the framework of KIVI (arXiv 2402.02750).

    Args:
        query: [batch, heads, n, head_dim], after RoPE; the last query is the newest token's.
        packed: a `StaircaseKVCache`.
        options: those of `StaircaseKVCache.attend`: schedule, prefill, distance_bias, sink_logits, softcap, scale,
            return_lse.

    Returns:
        [batch, heads, n, value_dim] in query's dtype, and the log-sum-exp, float32 [batch, heads, n], if asked for.

    Raises:
        TypeError: query is not a tensor, or packed has no `attend`.
        ValueError: something does not fit; see `StaircaseKVCache.attend`.
    """
    check_tensor("staircase_attention", "query", query)
    attend = getattr(packed, "attend", None)
    if attend is None:
        raise TypeError(f"staircase_attention: packed is a {type(packed).__name__} and must be a StaircaseKVCache")
    result: Tensor | tuple[Tensor, Tensor] = attend(query, **options)
    return result


def attend_packed(
    query: Tensor,
    storage: Sequence[Sequence[Tensor]],
    ends: Tensor,
    ladders: Sequence[Sequence[int]],
    sizes: tuple[int, int, int, str],
    schedule: tuple[str, Sequence[int]],
    distance_bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of float32 queries that stand in one step of the ladder.

    storage and ladders: of keys and of values. ends: tokens that each row's last query reads. sizes: sink_size, step,
    group_size and the grid. schedule: its kind and numbers.
    """
    result: tuple[Tensor, Tensor] = torch.ops.pycore.staircase_attention(
        query, *map(list, storage), ends, distance_bias, sink_logits, *map(list, ladders), *sizes, schedule[0],
        list(schedule[1]), query.shape[-1] ** -0.5 if scale is None else scale, softcap,
    )  # fmt: skip
    return result


@torch.library.register_fake("pycore::staircase_attention")
def _fake(
    query: Tensor, key_storage: list[Tensor], value_storage: list[Tensor], ends: Tensor, distance_bias: Tensor | None,
    sink_logits: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    full = value_storage[0]
    check_devices(
        "staircase_attention", query=query, ends=ends, distance_bias=distance_bias, sink_logits=sink_logits,
        storage=full,
    )  # fmt: skip
    return query.new_empty((*query.shape[:3], full.shape[3])), query.new_empty(query.shape[:3])
