# SPDX-License-Identifier: Apache-2.0
"""Λ attention as a user of FlashAttention has it: a sliding-window call and one over the sinks, merged by log-sum-exp.

The window's call keeps d < window. The sinks' call has to keep the pairs j < sink with d >= window, those and no
others: from query window + sink - 1 on these are all sinks, so it needs no mask there. The queries before, at most
sink - 1 of them, see some sinks through the window; they are so few that plain torch does them.

Gradients: with the output and lse of the whole, exp(s - lse) and <grad_out, out> are those of the whole, so each part's
backward pass is given the merged ones, and what the parts return adds up.

Layout here is FlashAttention's: query, key, value, out [B, L, H, D]; lse [B, H, L], float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def flash_pair(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink: int, window: int
) -> Callable[[], torch.Tensor]:
    """Λ attention of [B, H, L, D] tensors by two FlashAttention-2 calls, forward and backward."""
    return lambda: _Pair.apply(query, key, value, sink, window)


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        query, key, value = (x.transpose(1, 2) for x in arguments[:3])
        ctx.window = window = arguments[4]
        ctx.sink = sink = min(arguments[3], query.shape[1])
        out, lse, ctx.near_state = flash(query, key, value, window)
        sinks = key[:, :sink], value[:, :sink]
        between, far = _split(query.shape[1], sink, window)
        if between.stop > between.start:
            _merge(out, lse, between, *_plain(query[:, between], *sinks, _sinks_kept(between, sink, window, query)))
        if far.stop > far.start:
            far_out, far_lse, ctx.far_state = flash(query[:, far], *sinks, None)
            _merge(out, lse, far, far_out, far_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        sink, window = ctx.sink, ctx.window
        grad = grads[0].transpose(1, 2).contiguous()
        found = flash_backward(grad, query, key, value, out, lse, window, ctx.near_state)
        sinks = key[:, :sink], value[:, :sink]
        between, far = _split(query.shape[1], sink, window)

        def rows(some: slice) -> tuple[torch.Tensor, ...]:
            return grad[:, some], query[:, some], *sinks, out[:, some], lse[:, :, some].contiguous()

        if between.stop > between.start:
            kept = _sinks_kept(between, sink, window, query)
            _add(found, between, sink, _plain_backward(*rows(between), kept))
        if far.stop > far.start:
            _add(found, far, sink, flash_backward(*rows(far), None, ctx.far_state))
        return (*(x.transpose(1, 2) for x in found), None, None)


def _split(length: int, sink: int, window: int) -> tuple[slice, slice]:
    """The queries that see some of the sinks outside of the window, and those that see all of them there."""
    if sink == 0:
        return slice(0, 0), slice(0, 0)
    middle = min(window + sink - 1, length)
    return slice(min(window, length), middle), slice(middle, length)


def _sinks_kept(rows: slice, sink: int, window: int, like: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(rows.start, rows.stop, device=like.device)
    return positions[:, None] - torch.arange(sink, device=like.device) >= window


def _merge(out: torch.Tensor, lse: torch.Tensor, rows: slice, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Some rows of out and lse, in place, joined with those of a call over other keys."""
    held = lse[:, :, rows]
    share = torch.sigmoid(other_lse - held).transpose(1, 2)[..., None]
    out[:, rows].lerp_(other, share.to(out.dtype))
    torch.logaddexp(held, other_lse, out=held)


def _add(found: Parts, rows: slice, sink: int, part: Parts) -> None:
    found[0][:, rows] += part[0]
    found[1][:, :sink] += part[1]
    found[2][:, :sink] += part[2]


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """FlashAttention-2, causal within a window or, without one, of all keys: out, lse, and what its backward takes."""
    if query.device.type == "cpu":  # which has no such op: the same in plain torch, so that merging can be tested
        return *_plain(query, key, value, _window_kept(query, key, window)), None
    sizes = query.shape[1], key.shape[1]
    out, lse, *state, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, None, None, *sizes, 0.0, window is not None, False, **_sides(window)
    )
    return out, lse, state


def flash_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, window: int | None, state: Any,
) -> Parts:  # fmt: skip
    """The gradients of query, key and value for the output and lse of a whole, of which `flash` did these keys."""
    if query.device.type == "cpu":
        return _plain_backward(grad, query, key, value, out, lse, _window_kept(query, key, window))
    sizes = query.shape[1], key.shape[1]
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, lse, None, None, *sizes, 0.0, window is not None, *state, **_sides(window)
    )


def _sides(window: int | None) -> dict[str, int]:
    """FlashAttention counts the keys before the query's own, and -1 is no bound."""
    left, right = (-1, -1) if window is None else (window - 1, 0)
    return {"window_size_left": left, "window_size_right": right}


def _window_kept(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    if window is None:
        return torch.ones(query.shape[1], key.shape[1], dtype=torch.bool)
    distance = torch.arange(query.shape[1])[:, None] - torch.arange(key.shape[1])
    return (distance >= 0) & (distance < window)


def _scores(query: torch.Tensor, key: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) * query.shape[3] ** -0.5
    return scores.masked_fill(~kept, -torch.inf)


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of few queries; kept [Lq, Lk]."""
    scores = _scores(query, key, kept)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value.float())
    return out.to(query.dtype), scores.logsumexp(dim=-1)


def _plain_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, kept: torch.Tensor,
) -> Parts:  # fmt: skip
    weights = torch.exp(_scores(query, key, kept) - lse[..., None])
    grad, out = grad.float(), out.float()
    grad_weights = torch.einsum("bqhd,bkhd->bhqk", grad, value.float())
    delta = (grad * out).sum(dim=-1).transpose(1, 2)[..., None]
    grad_scores = weights * (grad_weights - delta) * query.shape[3] ** -0.5
    found = (
        torch.einsum("bhqk,bkhd->bqhd", grad_scores, key.float()),
        torch.einsum("bhqk,bqhd->bkhd", grad_scores, query.float()),
        torch.einsum("bhqk,bqhd->bkhd", weights, grad),
    )
    return tuple(x.to(query.dtype) for x in found)  # type: ignore[return-value]
