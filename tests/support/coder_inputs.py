# SPDX-License-Identifier: Apache-2.0
"""What the coder's tests share: distributions of a wanted entropy, ideal sizes, and the reference for a whole batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycore import ops
from pycore.reference import arithmetic_coding as reference

# Two rows that are used by turns, and one for all; uint16 rows end in 2^16, which they hold as 0.
SYMBOL_DTYPES = [
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
]  # fmt: skip


def random_cdf(*shape: int, precision: int = 16, sharpness: float = 3.0) -> Tensor:
    """int32 [..., V + 1] for a shape [..., V], from random logits."""
    return ops.quantize_cdf(logits=torch.randn(shape) * sharpness, precision=precision)


def encode_all(symbols: Tensor, cdf: Tensor, model_id: int | None = None, lanes: int = 1) -> list[bytes]:
    """The reference's streams for symbols [streams, n] and a cdf that broadcasts to [streams, n, V + 1]."""
    rows = cdf.expand(*symbols.shape, cdf.shape[-1])
    return [
        reference.encode(stream.tolist(), row.tolist(), model_id, lanes)
        for stream, row in zip(symbols, rows, strict=True)
    ]


def ideal_bytes(symbols: Tensor, cdf: Tensor) -> float:
    """Sum of -log2 of the symbols' shares, in bytes, for one stream [n] and one row."""
    width = (cdf[1:] - cdf[:-1]).double() / int(cdf[-1])
    return float(-torch.bincount(symbols, minlength=len(width)).double() @ width.log2()) / 8


def two_symbols(entropy: float) -> list[float]:
    """Probabilities of a binary source of this entropy, in bits."""
    low, high = 0.0, 0.5
    for _ in range(80):
        p = (low + high) / 2
        bits = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
        low, high = (p, high) if bits < entropy else (low, p)
    return [1 - low, low]
