"""Inputs shared by benchmarks: random ones, and those of a language model reading real text."""

from __future__ import annotations

import torch

SEED = 20240


def real_sources() -> list[str]:
    """Sources besides "random" that this installation can make."""
    return []


def attention_inputs(source: str, heads: int, length: int, head_dim: int, gradient: bool) -> tuple[torch.Tensor, ...]:
    """query, key, value and, on request, an output gradient: float32 [1, heads, length, head_dim]."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (1, heads, length, head_dim)
    return tuple(torch.randn(shape, generator=generator) for _ in range(4 if gradient else 3))
