# SPDX-License-Identifier: Apache-2.0
"""What a tensor among the arguments must be before an op sees it, and what fake kernels ask of several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["as_index", "as_table", "check_devices", "check_tensor", "graph_numbers", "short_name"]

_INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)
_STRIDED = torch.strided
_HALVES = (torch.float16, torch.bfloat16)


def check_tensor(op: str, name: str, x: Any, optional: bool = False) -> None:
    """Refuses what is no Tensor (TypeError), and one that is not plain memory with strides (ValueError)."""
    if isinstance(x, Tensor):
        if x.layout is not _STRIDED:
            raise ValueError(f"{op}: {name} has layout {short_name(x.layout)} and must be a dense tensor")
        if x.is_nested or x.is_quantized:
            raise ValueError(f"{op}: {name} is {'nested' if x.is_nested else 'quantized'} and must be a dense tensor")
    elif x is not None or not optional:
        raise TypeError(f"{op}: {name} is a {type(x).__name__} and must be a Tensor{' or None' * optional}")


def short_name(kind: torch.dtype | torch.layout) -> str:
    """As messages call it: float32, not torch.float32."""
    return str(kind).removeprefix("torch.")


def as_index(x: Tensor) -> Tensor:
    """Lengths, positions and seeds in int64, which holds every smaller integer. The op refuses what is none."""
    return x.to(torch.int64) if x.dtype in _INTEGERS else x


def as_table(x: Tensor, query: Tensor) -> Tensor:
    """A table in float32 where it has half precision beside a half-precision query: a model in one dtype holds both."""
    return x.float() if x.dtype in _HALVES and query.dtype in _HALVES else x


def check_devices(op: str, **tensors: Any) -> None:
    """For fake kernels, which torch also calls for real tensors beside meta ones: all are where the first one is."""
    first, *others = ((name, x) for name, x in tensors.items() if isinstance(x, Tensor))
    for name, x in others:
        if x.device != first[1].device:
            raise ValueError(f"{op}: {name} is on {x.device} and must be on {first[1].device}, where {first[0]} is")


def graph_numbers(*values: float | Tensor) -> Tensor:
    """Floats as a tensor, float64 on the CPU, for an op's `numbers`: a graph may compute them anew at every call.

    A float in an op's schema is part of the graph, and another one needs another graph. torch.compile keeps a product
    of a tensor with a changing float as it is; of what else could be written here, it makes constants. Tensors keep
    their gradients.
    """
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([value.to(one) if isinstance(value, Tensor) else one * value for value in values])
