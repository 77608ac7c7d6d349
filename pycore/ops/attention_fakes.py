# SPDX-License-Identifier: Apache-2.0
"""What attention and its backward pass return, in shapes and dtypes alone, for tensors without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycore._schema import Schema
from pycore._tensors import check_devices

__all__: list[str] = []

_FORWARD, _BACKWARD = Schema("attention"), Schema("attention_backward")


def _sum_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _check(call: dict[str, Any]) -> None:
    """Of either op; `numbers` are on the CPU whatever the device."""
    op = call["op"]
    for name in ("query", "key", "value"):
        tiles = name == "key" and call.get("key_layout") == "tiles"
        dims, form = (5, "[batch, kv_heads, tiles, head_dim, 64]") if tiles else (4, "[batch, heads, length, head_dim]")
        if call[name].dim() != dims:
            raise ValueError(f"{op}: {name} has {call[name].dim()} dimensions and must have {dims}: {form}")
    names = [name for name in _FORWARD.tensors if name != "numbers"]
    names += [name for name in _BACKWARD.tensors if name not in _FORWARD.places]
    check_devices(op, **{name: call[name] for name in names if name in call})


@torch.library.register_fake("pycore::attention")
def _attention_fake(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    call = _FORWARD.named(args) | options
    _check(call)
    query = call["query"]
    batch, heads, length, _ = query.shape
    pair = (2,) if call["lse_pair"] else ()
    return (
        query.new_empty(batch, heads, length, call["value"].shape[3]),
        query.new_empty(*pair, batch, heads, length, dtype=_sum_dtype(query)),
    )


@torch.library.register_fake("pycore::attention_backward")
def _attention_backward_fake(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    call = _BACKWARD.named(args) | options
    _check(call)
    query = call["query"]
    bias = call["distance_bias"].shape if call["bias_gradient"] else (0, 0)
    sink = call["sink_logits"].shape if call["sink_gradient"] else (0,)
    slopes = call["alibi_slopes"].shape if call["slopes_gradient"] else (0,)
    shapes = (query.shape, call["key"].shape, call["value"].shape, bias, sink, slopes)
    grads = (query.new_empty(shape, dtype=_sum_dtype(query)) for shape in shapes)
    return *grads, query.new_empty(3 if call["numbers_gradient"] else 0, dtype=torch.float64)
