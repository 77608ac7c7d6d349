# SPDX-License-Identifier: Apache-2.0
"""What a torch user would write today for causal and Λ attention, and a float64 reference that none of them shares.

Each peer is the fastest form of its idea found in plain torch: masks are built once and not timed, chunks reuse one
mask, outputs are written in place where no gradient is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
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


def causal_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: SDPBackend | None = None
) -> Callable:
    """scaled_dot_product_attention(is_causal=True), by one backend where the device has several."""
    plain = functools.partial(scaled_dot_product_attention, query, key, value, is_causal=True)
    if backend is None or not query.is_cuda:
        return plain

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return plain()

    return call


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


def rope_tables(length: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) in float64, [length, head_dim / 2]: the usual base of 10000, for pairs (i, i + head_dim / 2)."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency.float().double()
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rows of x [..., L, D], row i rotated by row i of the tables (or by their only row)."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def chunked_rope(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink: int, window: int) -> Callable:
    """Λ with rotary positions and the distance limit, as LM-Infinite computes it, in chunks of 256 queries.

    Window keys are rotated; sinks further away than the window all stand at distance `window`, which no mask or score
    function of SDPA or FlexAttention can say: a second product of the query, rotated to that distance, with the
    un-rotated sinks joins the same softmax.
    """
    length, head_dim = query.shape[2:]
    cos, sin = (table.to(query.dtype) for table in rope_tables(max(length, window + 1), head_dim, query.device))
    positions = torch.arange(length, device=query.device)
    scale = head_dim**-0.5
    masks: dict[tuple[int, ...], torch.Tensor] = {}

    def mask(start: int, stop: int, low: int) -> torch.Tensor:
        shape = (stop - start, stop - low, min(start, window + sink))  # what the distances in a chunk depend on
        if shape not in masks:
            near = positions[start:stop, None] - positions[None, low:stop]
            far = positions[start:stop, None] - positions[None, :sink]
            masks[shape] = torch.cat([(near < 0) | (near >= window), far < window], dim=1)
        return masks[shape]

    def call() -> torch.Tensor:
        near_query = rotate(query, cos[:length], sin[:length]) * scale
        far_query = rotate(query, cos[window], sin[window]) * scale
        near_key = rotate(key, cos[:length], sin[:length])
        output = torch.empty_like(query)
        for start in range(0, length, CHUNK):
            stop, low = min(start + CHUNK, length), max(start - window + 1, 0)
            near = near_query[:, :, start:stop] @ near_key[:, :, low:stop].transpose(-1, -2)
            far = far_query[:, :, start:stop] @ key[:, :, :sink].transpose(-1, -2)
            scores = torch.cat([near, far], dim=-1).masked_fill_(mask(start, stop, low), float("-inf"))
            probs = scores.softmax(dim=-1)
            width = stop - low
            output[:, :, start:stop] = (
                probs[..., :width] @ value[:, :, low:stop] + probs[..., width:] @ value[:, :, :sink]
            )
        return output

    for start in range(0, length, CHUNK):
        mask(start, min(start + CHUNK, length), max(start - window + 1, 0))
    return call


def compiled_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: int | None = None,
    window: int | None = None,
    score_mod: Callable | None = None,
) -> Callable:
    """torch.compile(flex_attention) with the same rule as mask_mod; causal when no window is given. No CPU backward."""
    from pycore.schedules import Causal, Lambda, to_flex_block_mask

    schedule = Causal() if sink is None or window is None else Lambda(sink, window)
    sizes = {"batch": 1, "heads": 1, "query_length": query.shape[2], "key_length": key.shape[2]}
    block_mask = to_flex_block_mask(schedule, **sizes, device=query.device)
    compiled = compile_flex()
    return lambda: compiled(query, key, value, score_mod=score_mod, block_mask=block_mask)


def compile_flex() -> Callable:
    """flex_attention compiled; every mask, dtype and shape is a compilation of its own.

    After recompile_limit of them dynamo would go on uncompiled without a word, with all scores in memory. The limit is
    raised, and fullgraph makes an error of passing it.
    """
    from torch.nn.attention.flex_attention import flex_attention

    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: int | None,
    window: int | None,
    starts: list[int],
    rope: bool = False,
) -> torch.Tensor:
    """Attention in float64 for the query rows [start, start + CHUNK) of each start, one after another.

    With rope, query and key are rotated by min(distance, window).

    Returns:
        [B, H, len(starts) * CHUNK (fewer at the end of the sequence), D], differentiable.
    """
    scale = query.shape[-1] ** -0.5
    positions = torch.arange(query.shape[2], device=query.device)
    if rope:
        cos, sin = rope_tables(max(query.shape[2], window + 1), query.shape[3], query.device)
    parts = []
    for start in starts:
        stop = min(start + CHUNK, query.shape[2])
        # The keys from 0 to `left` and from `low` on; slices, whose gradients are cheaper than an index's.
        left, low = (0, 0) if window is None or start - window + 1 <= sink else (sink, start - window + 1)
        keys, chosen, values = (
            torch.cat([x[..., :left, :], x[..., low:stop, :]], dim=-2) for x in (positions[:, None], key, value)
        )
        keys, chosen = keys[:, 0], chosen.double()
        if window is None:
            mask = positions[start:stop, None] >= keys[None, :]
        else:
            mask = lambda_mask(positions[start:stop], keys, sink, window)
        queries = query[:, :, start:stop].double()
        scores = queries @ chosen.transpose(-1, -2)
        if rope:
            far = rotate(queries, cos[window], sin[window]) @ chosen.transpose(-1, -2)
            near = rotate(queries, cos[start:stop], sin[start:stop]) @ rotate(chosen, cos[keys], sin[keys]).transpose(
                -1, -2
            )
            scores = torch.where(positions[start:stop, None] - keys[None, :] >= window, far, near)
        scores = scores * scale
        probs = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        parts.append(probs @ values.double())
    return torch.cat(parts, dim=2)
