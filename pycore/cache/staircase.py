# SPDX-License-Identifier: Apache-2.0
"""The ladder of a staircase cache: how many bits a token has at which age, and how it is rotated before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_int, check_number, check_str
from pycore._tensors import check_tensor

__all__ = ["DTYPES", "Staircase"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of a cache
_WIDTHS = (16, 8, 4, 2)
_MOST_GROUP, _MOST_STEPS = 256, 32  # csrc/host/staircase_cache_args.h, csrc/include/pycore/staircase/cache.h


@dataclass(frozen=True, eq=False)
class Staircase:
    """How many bits a token of a `StaircaseKVCache` has at which age.

    A query at position p reads key and value j at bits[min(p // step - j // step, last)], and in full the first
    `sink_size` tokens and those of its own group, j // group_size == p // group_size, which has no grid until it is
    whole. 16 stands for the cache's own dtype, whatever it is.

    Args:
        bits: of the newest step of tokens, of the step before it, and so on; the last of all that are older: 16, 8, 4
            or 2, never rising. (16, 2) is KIVI's; (8,) has everything but the newest group at 8 bits; (16,) quantizes
            nothing.
        step: tokens, a multiple of group_size; or a fraction of the cache's given capacity, above 0 and below 1, which
            is rounded down to such a multiple.
        sink_size: first tokens, which stay in full.
        group_size: 1 to 256: tokens of a channel (keys) or channels of a token (values) that share lo and hi.
        rollback: tokens that `crop` may take back.
        key_rotation, value_rotation: "hadamard", or orthogonal [kv_heads, head_dim, head_dim], such as
            `pycore.ops.staircase_rotation` learns: tokens are rotated before they are quantized, and the query and the
            output beside them, so that the cache need not be rotated back.
        key_bits, value_bits: ladders of their own, where keys and values differ.
        grid: "embedded"; or "minmax", KIVI's, for a ladder with one quantized width.

    Source: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI".
    """

    bits: Sequence[int] = (16, 8, 4)
    step: int | float = 128
    sink_size: int = 4
    group_size: int = 64
    rollback: int = 64
    key_rotation: str | Tensor | None = None
    value_rotation: str | Tensor | None = None
    key_bits: Sequence[int] | None = field(default=None, kw_only=True)
    value_bits: Sequence[int] | None = field(default=None, kw_only=True)
    grid: str = field(default="embedded", kw_only=True)

    def __post_init__(self) -> None:
        op = "Staircase"
        check_int(op, "sink_size", self.sink_size, 0)
        check_int(op, "group_size", self.group_size, 1, _MOST_GROUP)
        check_int(op, "rollback", self.rollback, 0)
        if isinstance(self.step, float):
            check_number(op, "step", self.step)
            if not 0 < self.step < 1:
                raise ValueError(
                    f"{op}: step is {self.step} and must be above 0 and below 1, or a whole number of tokens"
                )
        else:
            check_int(op, "step", self.step, 1)
            if self.step % self.group_size:
                raise ValueError(f"{op}: step is {self.step} and must be a multiple of group_size, {self.group_size}")
        check_str(op, "grid", self.grid)
        if self.grid not in ("embedded", "minmax"):
            raise ValueError(f"{op}: grid is {self.grid!r} and must be 'embedded' or 'minmax'")
        for name in ("bits", "key_bits", "value_bits"):
            ladder = getattr(self, name)
            if ladder is not None:
                object.__setattr__(self, name, self._ladder(name, ladder))
        for name in ("key_rotation", "value_rotation"):
            rotation = getattr(self, name)
            if isinstance(rotation, str):
                if rotation != "hadamard":
                    raise ValueError(f"{op}: {name} is {rotation!r} and must be 'hadamard', a Tensor or None")
            elif rotation is not None:
                object.__setattr__(self, name, _orthogonal(op, name, rotation))

    def _ladder(self, name: str, ladder: Any) -> tuple[int, ...]:
        op = "Staircase"
        if not isinstance(ladder, Sequence) or isinstance(ladder, str | bytes):
            raise TypeError(f"{op}: {name} is a {type(ladder).__name__} and must be a sequence of ints")
        if not 1 <= len(ladder) <= _MOST_STEPS:
            raise ValueError(f"{op}: {name} has {len(ladder)} entries and must have between 1 and {_MOST_STEPS}")
        for i, width in enumerate(ladder):
            check_int(op, f"{name}[{i}]", width)
            if width not in _WIDTHS:
                raise ValueError(f"{op}: {name}[{i}] is {width} and must be 16, 8, 4 or 2")
            if i > 0 and width > ladder[i - 1]:
                raise ValueError(f"{op}: {name}[{i}] is {width} and must be at most {ladder[i - 1]}, the step before")
        if self.grid == "minmax" and len({*ladder} - {16}) > 1:
            raise ValueError(f"{op}: {name} is {tuple(ladder)} and must have one quantized width with grid='minmax'")
        return tuple(int(width) for width in ladder)

    @property
    def ladders(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bits of keys, and of values."""
        return tuple(self.key_bits or self.bits), tuple(self.value_bits or self.bits)


def _orthogonal(op: str, name: str, rotation: Any) -> Tensor:
    if not isinstance(rotation, Tensor):
        raise TypeError(f"{op}: {name} is a {type(rotation).__name__} and must be 'hadamard', a Tensor or None")
    check_tensor(op, name, rotation)
    if rotation.dim() != 3 or rotation.shape[1] != rotation.shape[2] or not rotation.is_floating_point():
        raise ValueError(
            f"{op}: {name} is {str(rotation.dtype)[6:]} {list(rotation.shape)} and must be floating point [kv_heads, "
            "head_dim, head_dim]"
        )
    exact = rotation.detach().double()
    off = (exact @ exact.mT - torch.eye(exact.shape[1], dtype=exact.dtype, device=exact.device)).abs()
    if not bool((off < 1e-3).all()):
        raise ValueError(f"{op}: {name} is off by {float(off.max()):.3g} and must be orthogonal to within 0.001")
    return rotation.detach().float().contiguous().clone()
