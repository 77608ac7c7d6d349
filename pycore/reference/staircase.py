# SPDX-License-Identifier: Apache-2.0
"""Staircase quantization in plain torch, for tests and readers: the grid, the planes, and which bits a query reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _groups(x: Tensor, group_size: int, dim: int) -> list[Tensor]:
    return list(x.split(group_size, dim)) if x.shape[dim] else []


def quantize(
    x: Tensor, *, bits: int, group_size: int, dim: int, grid: str = "embedded"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes like x, and of each group lo, hi and the centre of its elements within their cells, in 256ths."""
    parts: list[tuple[Tensor, ...]] = []
    for group in _groups(x, group_size, dim):
        lo, hi = group.amin(dim, keepdim=True) + 0.0, group.amax(dim, keepdim=True) + 0.0
        offset, span = group.float() - lo.float(), hi.float() - lo.float()
        if grid == "minmax":
            most = 2**bits - 1
            codes = (offset / (span / most)).nan_to_num(0.0).clamp(0, most).round()
            parts.append((codes.to(torch.uint8), lo, hi, torch.full_like(lo, 128, dtype=torch.uint8)))
            continue
        place = (offset / span * 65536).nan_to_num(0.0).floor().clamp(0, 65535).to(torch.int64)
        rest, cell, count = place % 2 ** (16 - bits), 2 ** (16 - bits), group.shape[dim]
        centre = (256 * (2 * rest.sum(dim, keepdim=True) + count) + count * cell) // (2 * count * cell)
        centre = torch.where(span == 0, 128, centre.clamp(max=255))
        parts.append(((place >> (16 - bits)).to(torch.uint8), lo, hi, centre.to(torch.uint8)))
    if not parts:
        return x.to(torch.uint8), x, x, x.to(torch.uint8)
    codes, lo, hi, centers = (torch.cat(each, dim) for each in zip(*parts, strict=True))
    return codes, lo, hi, centers


def dequantize(
    codes: Tensor, lo: Tensor, hi: Tensor, centers: Tensor | None = None, *, bits: int, group_size: int, dim: int,
    grid: str = "embedded", dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Gives lo + (code + centre / 256) (hi - lo) / 2^bits, computed in `dtype`: float32 is what the kernels do."""
    work = dtype or torch.float32
    index = torch.arange(codes.shape[dim], device=codes.device) // group_size
    low, high = (each.to(work).index_select(dim, index) for each in (lo, hi))
    if grid == "minmax":
        value = low + codes * ((high - low) / (2**bits - 1))
    else:
        centre = 0.5 if centers is None else centers.to(work).index_select(dim, index) / 256
        value = low + (codes + centre) * ((high - low) / 2**bits)
    return value.to(dtype or lo.dtype)


def pack_plane(codes: Tensor, bits: int) -> Tensor:
    """A plane of codes of 2 or 4 bits, groups along the last dimension: uint8 [..., ceil(n / 4) * bits / 2]."""
    n, size = codes.shape[-1], -(-codes.shape[-1] // 4) * bits // 2
    plane = torch.zeros(*codes.shape[:-1], size, dtype=torch.uint8)
    for t in range(n):
        plane[..., t % size] |= codes[..., t] << (bits * (t // size))
    return plane


def unpack_plane(plane: Tensor, n: int, bits: int) -> Tensor:
    """The codes of `pack_plane`: uint8 [..., n]."""
    size = plane.shape[-1]
    codes = [(plane[..., t % size] >> (bits * (t // size))) & (2**bits - 1) for t in range(n)]
    return torch.stack(codes, -1) if codes else plane[..., :0]


def bits_read(query: int, key: int, *, bits: Sequence[int], step: int, sink_size: int, group_size: int) -> int:
    """How many bits a query at one position reads of the token at another, not later, one."""
    if key < sink_size or key // group_size == query // group_size:
        return 16
    return bits[min(query // step - key // step, len(bits) - 1)]


def read(
    x: Tensor, query: int, *, by_token: bool, bits: Sequence[int], step: int, sink_size: int, group_size: int,
    grid: str = "embedded", dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """What a query at position `query` reads of keys (groups of tokens) or values (groups of a token's channels).

    Args:
        x: [..., tokens, channels], of positions from 0.

    Returns:
        [..., query + 1, channels]; with dtype float64, exactly what the codes stand for.
    """
    out = x[..., : query + 1, :].to(dtype or x.dtype).clone()
    for first in range(0, query + 1, group_size):
        how_old = {"bits": bits, "step": step, "sink_size": 0, "group_size": group_size}
        width = bits_read(query, first, **how_old)  # type: ignore[arg-type]
        start = max(first, sink_size)
        group = x[..., start : first + group_size, :]
        if width == 16 or group.shape[-2] == 0:
            continue
        how = {"bits": width, "dim": -1 if by_token else -2, "grid": grid}
        size = group_size if by_token else group.shape[-2]
        codes, lo, hi, centers = quantize(group, group_size=size, **how)  # type: ignore[arg-type]
        value = dequantize(codes, lo, hi, centers, group_size=size, dtype=dtype, **how)  # type: ignore[arg-type]
        out[..., start : first + group_size, :] = value
    return out


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, key_bits: Sequence[int], value_bits: Sequence[int], step: int,
    sink_size: int, group_size: int, grid: str = "embedded", scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one row's newest queries [heads, n, D] over its whole keys and values [kv_heads, tokens, …]."""
    heads, n, channels = query.shape
    tokens, share = key.shape[-2], heads // key.shape[0]
    how = {"step": step, "sink_size": sink_size, "group_size": group_size, "grid": grid, "dtype": torch.float64}
    out = []
    for i in range(n):
        p = tokens - n + i
        keys = read(key, p, by_token=False, bits=key_bits, **how).repeat_interleave(share, 0)  # type: ignore[arg-type]
        values = read(value, p, by_token=True, bits=value_bits, **how).repeat_interleave(share, 0)  # type: ignore[arg-type]
        logits = keys @ query[:, i].double()[..., None] * (channels**-0.5 if scale is None else scale)
        out.append((logits.softmax(-2) * values).sum(-2))
    return torch.stack(out, 1)
