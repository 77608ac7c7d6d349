# SPDX-License-Identifier: Apache-2.0
"""What the kernels read in place of a mask: the words of a key subset, and the nodes of a tree.

Plain torch, a fixed number of operations, so that both trace (csrc/host/attention_bitmaps_args.h has the
layouts).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pycore._limits import KEY_TILE
from pycore._tensors import as_index, check_tensor, short_name
from pycore.schedules.kinds import KeySubset, Tree

__all__ = ["key_mask", "key_words", "tree_ancestors", "tree_nodes"]


def _words(mask: Tensor) -> Tensor:
    """Bool [..., n] as int64 [..., ceil(n / 64)], a word a tile: bit i % 64 of word i // 64 is entry i."""
    n = mask.shape[-1]
    words = (n + KEY_TILE - 1) // KEY_TILE
    bits = pad(mask, (0, KEY_TILE * words - n)).unflatten(-1, (words, KEY_TILE)).long()
    return (bits << torch.arange(KEY_TILE, device=mask.device)).sum(-1)


def _check(op: str, name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], shapes: str) -> Tensor:
    """A tensor [n] or [B, n] as [1 or B, n]."""
    check_tensor(op, name, value)
    value = as_index(value)
    if value.dtype not in dtypes:
        wanted = " or ".join(short_name(dtype) for dtype in dtypes)
        raise ValueError(f"{op}: {name} is {short_name(value.dtype)} and must be {wanted}")
    if value.dim() not in (1, 2):
        raise ValueError(f"{op}: {name} has {value.dim()} dimensions and must have 1 or 2: {shapes}")
    return value if value.dim() == 2 else value[None]


def _refuse_negative(op: str, keys: Tensor) -> None:
    """At once where values can be read; compiled code raises a RuntimeError when it runs. Elsewhere: no keys."""
    if keys.device.type != "cpu":
        return
    if torch.compiler.is_compiling():
        torch._assert_async((keys >= 0).all(), f"{op}: keys has a negative position, where all must be at least 0")
    elif not torch._C._functorch.is_functorch_wrapped_tensor(keys) and keys.numel() and int(keys.min()) < 0:
        raise ValueError(f"{op}: keys has position {int(keys.min())}, where all must be at least 0")


def key_mask(op: str, schedule: KeySubset, key_length: int, shifted: bool = False) -> Tensor:
    """Bool [1 or B, n]: whether the key at a position takes part; those from n on do not.

    Args:
        key_length: rows of key; no position lies beyond, unless
        shifted: a key_offset moves positions past them.
    """
    keys = _check(op, "keys", schedule.keys, (torch.bool, torch.int64), "[n] or [batch, n]")
    if keys.dtype == torch.bool:
        return keys
    _refuse_negative(op, keys)
    n = key_length
    if shifted and keys.numel():
        if keys.is_meta or torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(keys):
            raise ValueError(f"{op}: keys is a list of positions and must be a mask where a graph has a key_offset")
        n = int(keys.max()) + 1
    places = keys.masked_fill((keys < 0) | (keys > n), n)
    mask = torch.zeros(keys.shape[0], n + 1, dtype=torch.bool, device=keys.device)
    return mask.scatter(1, places, True)[:, :n]


def key_words(op: str, schedule: KeySubset, key_length: int, shifted: bool = False) -> Tensor:
    """`key_mask` as int64 [1 or B, words], a word a tile of 64 positions."""
    return _words(key_mask(op, schedule, key_length, shifted))


def tree_ancestors(op: str, schedule: Tree) -> Tensor:
    """Bool [1 or B, T, T]: whether node t is node s or descends from it.

    With M[t, s] = 1 where s is the parent of t, that is I + M + M^2 + ..., the inverse of I - M: a triangular solve,
    exact because no entry is ever anything but 0 or 1.
    """
    parents = _check(op, "parents", schedule.parents, (torch.int64,), "[T] or [batch, T]")
    nodes = torch.arange(parents.shape[1], device=parents.device)
    is_parent = (parents[:, :, None] == nodes).float()
    identity = (nodes[:, None] == nodes).float()
    inverse = torch.linalg.solve_triangular(identity - is_parent, identity, upper=False, unitriangular=True)
    return inverse > 0.5


def tree_nodes(op: str, schedule: Tree) -> Tensor:
    """int64 [1 or B, T, 2 + words]: of each node its parent, its depth, and the words of `tree_ancestors`."""
    ancestors = tree_ancestors(op, schedule)
    depth = ancestors.sum(-1, keepdim=True) - 1
    parents = as_index(schedule.parents if schedule.parents.dim() == 2 else schedule.parents[None])
    return torch.cat([parents[..., None], depth, _words(ancestors)], dim=-1)
