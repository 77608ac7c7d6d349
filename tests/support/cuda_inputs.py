# SPDX-License-Identifier: Apache-2.0
"""What the CUDA tests share: dtypes, schedules, and the way to the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pycore.schedules import Causal, Full, KeySubset, Lambda, Prefix, Schedule, Segments, Tree
from tests.support.attention_inputs import lengths, random_tree

__all__ = ["DTYPES", "HALVES", "SCHEDULES", "doubled", "fitting", "narrowed", "on_device"]

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]

SCHEDULES = [
    pytest.param(Causal(), id="causal"),
    pytest.param(Full(), id="full"),
    pytest.param(Lambda(4, 40), id="lambda"),
    pytest.param(Lambda(70, 10), id="lambda-sink-tile"),
    pytest.param(Prefix(lengths(5, 90)), id="prefix"),
    pytest.param(Segments(lengths(0, 30, 100, 1100)), id="segments"),
    pytest.param(Segments(lengths(0, 30, 1100), window_size=70, sink_size=3), id="segments-window"),
    pytest.param(Segments(lengths(0, 30, 1100), False, window_size=70, right=20), id="segments-both-sides"),
    pytest.param(Lambda(4, 40, right=30), id="lambda-both-sides"),
    pytest.param(KeySubset(torch.arange(1100) % 7 == 2), id="keys"),
    pytest.param(KeySubset(torch.arange(0, 1100, 9), causal=False), id="keys-not-causal"),
    pytest.param(Tree(random_tree(17)), id="tree"),
    pytest.param(Tree(lengths(-1)), id="tree-of-one"),
]


def on_device(value: Any) -> Any:
    """Tensors, also those of a schedule or a pair of tables, on the GPU."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, tuple):
        return tuple(on_device(x) for x in value)
    if isinstance(value, Prefix):
        return Prefix(value.prefix_lengths.cuda())
    if isinstance(value, Segments):
        return replace(value, boundaries=value.boundaries.cuda())
    if isinstance(value, KeySubset):
        return KeySubset(value.keys.cuda(), value.causal)
    if isinstance(value, Tree):
        return Tree(value.parents.cuda())
    return value


def doubled(options: dict[str, Any]) -> dict[str, Any]:
    """Tables in float64."""

    def wide(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(wide(y) for y in x)
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return {name: wide(value) for name, value in options.items()}


def narrowed(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Biases and sinks in the dtype of query, for plain torch, which mixes none; rotations stay as they are."""
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }


def fitting(schedule: Schedule, keys: int) -> Schedule:
    """The same with no more nodes in a tree than there are keys: the first nodes of a tree are one."""
    return Tree(schedule.parents[:keys]) if isinstance(schedule, Tree) else schedule
