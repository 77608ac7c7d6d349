# SPDX-License-Identifier: Apache-2.0
"""Attention ops: one kernel family behind every schedule.

`attention` and `lambda_attention` call `torch.ops.pycore.attention` (csrc/torch/attention.cpp), which runs
csrc/cpu/attention.*.cpp or csrc/cuda/attention.cu.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from pycore._load import load_ops
from pycore.schedules import Causal, Lambda, Schedule

load_ops()

__all__ = ["attention", "lambda_attention"]

_NO_LIMIT = -1


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    schedule: Schedule = Causal(),  # noqa: B008 - a frozen value
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    distance_limit: int | None = None,
    distance_bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    scale: float | None = None,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_offset: Tensor | None = None,
    query_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query key^T, over the keys the schedule keeps) value, without ever forming the scores.

    A row's result has the same bits whatever it is computed with: whole sequence, chunk or single query, alone or in
    a batch, on one thread or many.

    Positions: of batch row b the keys are rows key_starts[b] <= r < key_lengths[b]; key r has position
    r - key_starts[b] (plus key_offset[b] past the sinks); the last valid query stands at the last key's position
    (bottom-right alignment). Other rows are never read. A query that keeps no key gives zeros and lse = -inf.

    Args:
        query: [B, H, Lq, D], float32 (float64 on the CPU too).
        key: [B, Hkv, Lk, D], H a multiple of Hkv (grouped-query attention).
        value: [B, Hkv, Lk, Dv].
        schedule: which keys a query keeps, from `pycore.schedules`.
        rope: (cos, sin), each [n, R/2], float32 (float64 for float64 queries), R <= D. Query and key come in
            un-rotated; the pair is rotated by d' = min(d, distance_limit). n must reach the largest distance, or the
            limit and a tile of 64. The tables take no gradient.
        interleaved: rotate the channel pairs (2i, 2i+1) instead of (i, i + R/2).
        distance_limit: the largest distance a rotation sees; None for no limit.
        distance_bias, sink_logits, softcap, dropout_p: not available yet; anything but the default is refused.
        scale: factor of the scores, D ** -0.5 by default.
        key_starts, key_lengths, key_offset, query_lengths: int64 [B], contiguous, see Positions.
        return_lse: also return the log of the softmax's denominator, [B, H, Lq], float32 (float64 for float64).

    Returns:
        [B, H, Lq, Dv] in query's dtype, and lse if asked for. Differentiable in query, key and value (through both).

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; the sentence names it.
        TypeError: an argument that is no tensor, or no schedule.
        NotImplementedError: an option this version does not have.

    Source: Dao et al., "FlashAttention"; positions and distance limit after Han et al., "LM-Infinite", section 3.
    """
    unavailable = {"distance_bias": distance_bias, "sink_logits": sink_logits}
    _check_available("attention", unavailable, softcap, dropout_p)
    return _call(
        "attention", query, key, value, schedule, rope, interleaved, distance_limit, scale,
        (key_starts, key_lengths, key_offset, query_lengths), return_lse,
    )  # fmt: skip


def lambda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sink_size: int,
    window_size: int,
    alibi_slopes: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    distance_limit: int | None = None,
    distance_bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    scale: float | None = None,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_offset: Tensor | None = None,
    query_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Λ-masked attention: the first `sink_size` tokens and the newest `window_size`, at a cost linear in length.

    keep(i, j) = d >= 0 and (d < window_size or j < sink_size), with d the query's position minus the key's. With
    `rope` the pair is rotated by min(d, distance_limit), so that every far sink stands at the same distance.

    Args:
        sink_size: tokens kept from the start, at least 0.
        window_size: newest tokens kept, the query's own among them (FlashAttention's window (left, 0) is left + 1).
        alibi_slopes: not available yet.
        distance_limit: `window_size` by default, as in LM-Infinite; must be at least that. 2**62 for no limit.

    The other arguments, the return value and the errors are those of `attention`.

    Source: Han et al., "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models", section 3.
    """
    unavailable = {"alibi_slopes": alibi_slopes, "distance_bias": distance_bias, "sink_logits": sink_logits}
    _check_available("lambda_attention", unavailable, softcap, dropout_p)
    limit = window_size if distance_limit is None else distance_limit
    return _call(
        "lambda_attention", query, key, value, Lambda(sink_size, window_size), rope, interleaved, limit, scale,
        (key_starts, key_lengths, key_offset, query_lengths), return_lse,
    )  # fmt: skip


def _check_available(op: str, unavailable: dict[str, Tensor | None], softcap: float, dropout_p: float) -> None:
    for name, argument in unavailable.items():
        if argument is not None:
            raise NotImplementedError(f"{op}: {name} is not available in this version and must be None")
    for name, number in (("softcap", softcap), ("dropout_p", dropout_p)):
        if number != 0.0:
            raise NotImplementedError(f"{op}: {name} is {number}, is not available in this version and must be 0")


def _call(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    schedule: Schedule,
    rope: tuple[Tensor, Tensor] | None,
    interleaved: bool,
    distance_limit: int | None,
    scale: float | None,
    lengths: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is a {type(tensor).__name__} and must be a Tensor")
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{op}: schedule is a {type(schedule).__name__} and must be one of pycore.schedules")
    if isinstance(schedule, Lambda):
        _check_int(op, "sink_size", schedule.sink_size)
        _check_int(op, "window_size", schedule.window_size)
    for name, rows in zip(("key_starts", "key_lengths", "key_offset", "query_lengths"), lengths, strict=True):
        if rows is not None and not isinstance(rows, Tensor):
            raise TypeError(f"{op}: {name} is a {type(rows).__name__} and must be a Tensor")
    cos, sin = _rope_tables(op, rope)
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.dim() and query.shape[-1] else 1.0
    elif isinstance(scale, (str, bytes)) or not hasattr(scale, "__float__"):
        raise TypeError(f"{op}: scale is a {type(scale).__name__} and must be a number")
    limit = _NO_LIMIT
    if distance_limit is not None:
        _check_int(op, "distance_limit", distance_limit)
        if distance_limit < 0:
            raise ValueError(f"{op}: distance_limit is {distance_limit} and must be at least 0")
        limit = distance_limit
    out, lse = torch.ops.pycore.attention(
        query, key, value, cos, sin, *lengths, op, schedule.kind, schedule.args, interleaved, limit, scale
    )
    return (out, lse) if return_lse else out


def _check_int(op: str, name: str, value: Any) -> None:
    if not isinstance(value, (int, torch.SymInt)) and not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} is a {type(value).__name__} and must be an int")
    if value >= 2**63:
        raise ValueError(f"{op}: {name} is {value} and must be less than 2**63")


def _rope_tables(op: str, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if rope is None:
        return None, None
    if not isinstance(rope, (tuple, list)) or len(rope) != 2 or not all(isinstance(t, Tensor) for t in rope):
        raise TypeError(f"{op}: rope must be a pair of Tensors, (cos, sin)")
    return rope[0], rope[1]


@torch.library.register_fake("pycore::attention")
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        query.new_empty(batch, heads, length, value.shape[3]),
        query.new_empty(batch, heads, length, dtype=lse_dtype),
    )


@torch.library.register_fake("pycore::attention_backward")
def _attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    tensors, ctx.options = inputs[:9], inputs[9:]
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    none = (None,) * (len(tensors) - 3 + len(ctx.options))
    if grad_out is None and grad_lse is None:
        return (None, None, None, *none)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.pycore.attention_backward(grad_out, grad_lse, out, lse, *tensors, *ctx.options)
    return (*grads, *none)


torch.library.register_autograd("pycore::attention", _backward, setup_context=_setup_context)


def _second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(f"{ctx.op}: second derivatives are not available")


def _setup_second_derivative(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.op = inputs[13]


# Without this, torch would only warn and leave the term out.
torch.library.register_autograd(
    "pycore::attention_backward", _second_derivative, setup_context=_setup_second_derivative
)
