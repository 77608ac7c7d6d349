"""What a torch user would write today for causal and Λ attention, and a float64 reference that none of them shares.

Each peer is the fastest form of its idea found in plain torch: masks are built once and not timed, chunks reuse one
mask, outputs are written in place where no gradient is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

CHUNK = 256  # queries per chunk; with window 512 the best of 64 … 1024 on the machines tried


def lambda_mask(query_positions: torch.Tensor, key_positions: torch.Tensor, sink: int, window: int) -> torch.Tensor:
    """Bool [Lq, Lk]: True where key j takes part for query p, which is d = p - j >= 0 and (d < window or j < sink)."""
    distance = query_positions[:, None] - key_positions[None, :]
    return (distance >= 0) & ((distance < window) | (key_positions[None, :] < sink))


def kept_pairs(length: int, sink: int | None = None, window: int | None = None) -> int:
    """Query-key pairs that take part, per head; causal when no window is given."""
    rows = torch.arange(1, length + 1)  # row i sees i + 1 keys
    if window is None:
        return int(rows.sum())
    return int((rows.clamp(max=window) + (rows - window).clamp(0, sink)).sum())


def masked_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink: int, window: int) -> Callable:
    """scaled_dot_product_attention with the whole bool mask."""
    positions = torch.arange(query.shape[2], device=query.device)
    mask = lambda_mask(positions, positions, sink, window)
    return lambda: scaled_dot_product_attention(query, key, value, attn_mask=mask)


def causal_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable:
    """scaled_dot_product_attention(is_causal=True)."""
    return lambda: scaled_dot_product_attention(query, key, value, is_causal=True)


def chunked_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink: int, window: int) -> Callable:
    """Chunks of 256 queries against gathered sink and window keys: linear cost in plain torch."""
    length = query.shape[2]
    positions = torch.arange(length, device=query.device)
    # For each chunk: query range, first window key (all keys from 0 while sinks and window touch), and its mask.
    # Every chunk past the start has the same mask, as it depends on distances alone.
    chunks = []
    interior: dict[tuple[int, int], torch.Tensor] = {}
    for start in range(0, length, CHUNK):
        stop = min(start + CHUNK, length)
        low = start - window + 1
        if low <= sink:
            chunks.append((start, stop, 0, lambda_mask(positions[start:stop], positions[:stop], sink, window)))
            continue
        shape = (stop - start, sink + stop - low)
        if shape not in interior:
            keys = torch.cat([positions[:sink], positions[low:stop]])
            interior[shape] = lambda_mask(positions[start:stop], keys, sink, window)
        chunks.append((start, stop, low, interior[shape]))

    def attend(start: int, stop: int, low: int, mask: torch.Tensor) -> torch.Tensor:
        if low == 0:
            keys, values = key[:, :, :stop], value[:, :, :stop]
        else:
            keys = torch.cat([key[:, :, :sink], key[:, :, low:stop]], dim=2)
            values = torch.cat([value[:, :, :sink], value[:, :, low:stop]], dim=2)
        return scaled_dot_product_attention(query[:, :, start:stop], keys, values, attn_mask=mask)

    def call() -> torch.Tensor:
        if torch.is_grad_enabled() and query.requires_grad:
            return torch.cat([attend(*chunk) for chunk in chunks], dim=2)
        output = torch.empty_like(query)
        for chunk in chunks:
            output[:, :, chunk[0] : chunk[1]] = attend(*chunk)
        return output

    return call


def compiled_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink: int | None = None, window: int | None = None
) -> Callable:
    """torch.compile(flex_attention) with the same rule as mask_mod; causal when no window is given. No CPU backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal_rule(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return i >= j

    def lambda_rule(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i >= j) & ((i - j < window) | (j < sink))

    rule = causal_rule if window is None else lambda_rule
    block_mask = create_block_mask(rule, None, None, query.shape[2], key.shape[2], device=query.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=block_mask)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: int | None,
    window: int | None,
    starts: list[int],
    rows: int = CHUNK,
) -> torch.Tensor:
    """Attention in float64 for the query rows [start, start + rows) of each start, one after another.

    Returns:
        [B, H, len(starts) * rows (fewer at the end of the sequence), D], differentiable.
    """
    scale = query.shape[-1] ** -0.5
    positions = torch.arange(query.shape[2], device=query.device)
    parts = []
    for start in starts:
        stop = min(start + rows, query.shape[2])
        if window is None or start - window + 1 <= sink:
            keys = positions[:stop]
        else:
            keys = torch.cat([positions[:sink], positions[start - window + 1 : stop]])
        if window is None:
            mask = positions[start:stop, None] >= keys[None, :]
        else:
            mask = lambda_mask(positions[start:stop], keys, sink, window)
        scores = query[:, :, start:stop].double() @ key[:, :, keys].double().transpose(-1, -2) * scale
        probs = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        parts.append(probs @ value[:, :, keys].double())
    return torch.cat(parts, dim=2)
