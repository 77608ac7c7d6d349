# SPDX-License-Identifier: Apache-2.0
"""Inputs the attention tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pycore.schedules import Full, KeySubset, Lambda, Prefix, Schedule, Segments, Tree

__all__ = ["Case", "lengths", "qkv", "random_tree", "tables"]


def tables(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rotary tables (cos, sin), [rows, dim / 2]. The base is small, so that far rows differ in every channel."""
    frequency = 50.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / max(dim, 1))
    angle = torch.arange(rows, dtype=torch.float64)[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def lengths(*numbers: int) -> Tensor:
    """One of key_starts, key_lengths, key_offset and query_lengths."""
    return torch.tensor(numbers, dtype=torch.int64)


def random_tree(nodes: int, seed: int = 0) -> Tensor:
    """The parents of a tree of drafts: long branches, short ones, and a few roots."""
    generator = torch.Generator().manual_seed(seed)
    parents = []
    for node in range(nodes):
        kind, parent = torch.rand(2, generator=generator).tolist()
        parents.append(-1 if node == 0 or kind < 0.1 else node - 1 if kind < 0.6 else int(parent * node))
    return torch.tensor(parents, dtype=torch.int64)


def qkv(
    batch: int, heads: int, kv_heads: int, query_length: int, key_length: int, head_dim: int,
    value_dim: int | None = None, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Normal query, key and value. float64 ones hold float32 numbers."""
    value_dim = head_dim if value_dim is None else value_dim
    query = torch.randn(batch, heads, query_length, head_dim)
    key = torch.randn(batch, kv_heads, key_length, head_dim)
    value = torch.randn(batch, kv_heads, key_length, value_dim)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def ahead(schedule: Schedule) -> int | None:
    """By how much a key that a query keeps may stand after it; None for any number of positions."""
    if isinstance(schedule, Segments | KeySubset) and schedule.causal:
        return 0
    if isinstance(schedule, Lambda | Segments):
        return schedule.right
    return None if isinstance(schedule, Full | Prefix | KeySubset) else 0


@dataclass(frozen=True)
class Case:
    """One problem. Its inputs follow from its fields, so that results can be kept between tests."""

    query_length: int
    key_length: int
    schedule: Schedule
    head_dim: int = 32
    value_dim: int | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    rope_dim: int = 0
    interleaved: bool = False
    distance_limit: int | None = None
    scale: float | None = None
    key_starts: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    key_offset: tuple[int, ...] | None = None
    query_lengths: tuple[int, ...] | None = None
    bias: int | None = None  # entries a head of distance_bias
    alibi: bool | str = False  # "rows": slopes of each batch row
    symmetric: bool = False
    sinks: bool = False
    softcap: float = 0.0

    def __str__(self) -> str:
        """The test's id."""
        numbers = [] if self.schedule.tensor is None else self.schedule.tensor.flatten().tolist()
        text = self.schedule.kind + "".join(f"-{number}" for number in (*self.schedule.args, *numbers))
        if isinstance(self.schedule, KeySubset):
            text += f"-{int(self.schedule.keys.sum())}of{'x'.join(str(n) for n in self.schedule.keys.shape)}"
        if isinstance(self.schedule, Tree):
            text += f"-{'x'.join(str(n) for n in self.schedule.parents.shape)}"
        text += f"-L{self.query_length}x{self.key_length}-D{self.head_dim}"
        text += "" if self.value_dim is None else f"v{self.value_dim}"
        text += f"-B{self.batch}" if self.batch != 1 else ""
        text += f"-H{self.heads}over{self.kv_heads}"
        text += f"-rope{self.rope_dim}{'i' if self.interleaved else ''}" if self.rope_dim else ""
        text += "" if self.distance_limit is None else f"-limit{self.distance_limit}"
        text += "" if self.scale is None else f"-scale{self.scale}"
        text += "" if self.bias is None else f"-bias{self.bias}"
        text += "-of-rows" if self.alibi == "rows" else ""
        for name in (
            "alibi",
            "symmetric",
            "sinks",
            "softcap",
            "key_starts",
            "key_lengths",
            "key_offset",
            "query_lengths",
        ):
            text += f"-{name}" if getattr(self, name) else ""
        return text

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value: the same numbers in every dtype. Key and value rows that are not valid hold NaN."""
        with torch.random.fork_rng():
            torch.manual_seed(self.query_length * 4099 + self.key_length)
            q, k, v = qkv(
                self.batch, self.heads, self.kv_heads, self.query_length, self.key_length, self.head_dim, self.value_dim
            )  # fmt: skip
        for b in range(self.batch):
            start = self.key_starts[b] if self.key_starts else 0
            end = self.key_lengths[b] if self.key_lengths else self.key_length
            for x in (k, v):
                x[b, :, :start] = torch.nan
                x[b, :, end:] = torch.nan
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def options(self, dtype: torch.dtype, table_dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The keyword arguments of `attention`, for inputs of this dtype. Tables are rounded to `table_dtype` first."""
        options: dict[str, Any] = {
            "schedule": self.schedule,
            "distance_limit": self.distance_limit,
            "scale": self.scale,
        }
        if self.rope_dim:
            # A table reaches the largest distance, or the limit and a tile.
            rows = max(self.key_length + max(self.key_offset or [0]), self.query_length)
            s = self.schedule
            if self.distance_limit is not None and ahead(s) is not None:
                nodes = s.parents.shape[-1] if isinstance(s, Tree) else 0
                rows = min(rows, max(self.distance_limit + 64, nodes))
            cos, sin = tables(rows, self.rope_dim, table_dtype)
            options |= {"rope": (cos.to(dtype), sin.to(dtype)), "interleaved": self.interleaved}
        for name in ("key_starts", "key_lengths", "key_offset", "query_lengths"):
            numbers = getattr(self, name)
            if numbers is not None:
                options[name] = lengths(*numbers)
        generator = torch.Generator().manual_seed(self.heads)
        if self.bias is not None:
            options["distance_bias"] = torch.randn(self.heads, self.bias, generator=generator).to(dtype)
        if self.alibi:
            shape = (self.batch, self.heads) if self.alibi == "rows" else (self.heads,)
            options["alibi_slopes"] = (torch.rand(shape, generator=generator) / 16).to(dtype)
        if self.symmetric:
            options["symmetric_bias"] = True
        if self.sinks:
            options["sink_logits"] = (2 * torch.randn(self.heads, generator=generator)).to(dtype)
        if self.softcap:
            options["softcap"] = self.softcap
        return options
