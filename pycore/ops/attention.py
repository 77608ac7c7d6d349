# SPDX-License-Identifier: Apache-2.0
"""Attention ops: one kernel family behind every schedule.

`attention` and `lambda_attention` call `torch.ops.pycore.attention` (csrc/torch/attention.cpp), which runs
csrc/cpu/attention/dispatch.cpp or csrc/cuda/attention/dispatch.cu.
"""

from __future__ import annotations

from torch import Tensor

from pycore._checks import check_bool, check_int
from pycore.ops.attention_call import AttentionOptions, call_attention
from pycore.ops.attention_middle import with_middle
from pycore.schedules import Causal, Lambda, Schedule

__all__ = ["attention", "lambda_attention"]


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
    alibi_slopes: Tensor | None = None,
    symmetric_bias: bool = False,
    sink_logits: Tensor | None = None,
    softcap: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    scale: float | Tensor | None = None,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_offset: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_layout: str = "rows",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query key^T, over the keys the schedule keeps) value, without ever forming the scores.

    A row's result has the same bits whatever it is computed with: whole sequence, chunk or single query, alone or in
    a batch, on one thread or many.

    Positions: of batch row b the keys are rows key_starts[b] <= r < key_lengths[b]; key r has position
    r - key_starts[b] (plus key_offset[b] past the sinks); the last valid query stands at the last key's position
    (bottom-right alignment). Other rows are never read. A query that keeps no key gives zeros and lse = -inf.
    Under `Tree` the bits of a row may depend on what else is in the call, and distances are those of the branches.

    Args:
        query: [B, H, Lq, D], float32, float16 or bfloat16 (accumulated in float32), or float64 (on the CPU). Under
            autocast query, key and value are cast to its dtype, and nothing else is.
        key: [B, Hkv, Lk, D], H a multiple of Hkv (grouped-query attention).
        value: [B, Hkv, Lk, Dv].
        schedule: which keys a query keeps, from `pycore.schedules`.
        rope: (cos, sin), each [n, R/2], float32 (float64 for float64 queries), R <= D. Query and key come in
            un-rotated; the pair is rotated by d' = min(d, distance_limit). n must reach the largest distance, or the
            limit and a tile of 64. The tables take no gradient.
        interleaved: rotate the channel pairs (2i, 2i+1) instead of (i, i + R/2).
        distance_limit: the largest distance a rotation sees; None for no limit.
        distance_bias: [H, n], float32 (float64 for float64 queries): bias[h, min(d', n - 1)] is added to a logit, with
            d' = min(max(d, 0), distance_limit). T5 buckets and clipped relative positions are such tables.
        alibi_slopes: [H], or [B, H] for each batch row its own, float32 (float64): -slope * d' is added to a logit, as
            distance_bias is, at any distance.
        symmetric_bias: for encoders: distance_bias and alibi_slopes see d' = min(|d|, distance_limit), so that a key
            after the query has the bias of one as far before it. Without it such keys have that of distance 0.
        sink_logits: [H], float32 (float64): a logit per head that joins the softmax and carries no value.
        softcap: logits become softcap * tanh(logit / softcap) before the bias is added; 0 for none. A number, or a
            floating-point tensor without dimensions, which gets a gradient.
        dropout_p: the share of weights set to zero, in [0, 1); the others grow by 1 / (1 - dropout_p). Drawn anew at
            each call from torch's generator, the same in the backward pass; under vmap as its randomness says.
        scale: factor of the scores, D ** -0.5 by default; a number or a tensor, as softcap.
        key_starts, key_lengths, key_offset, query_lengths: int64 [B] or smaller integers, see Positions.
        key_layout: "tiles": on the CPU, key is [B, Hkv, ceil(Lk / 64), D, 64], by channel within tiles of 64 keys, as
            `KVCache` keeps it; decoding then transposes nothing. Lk is value's, and the result has the same bits.
            Neither key_starts nor key_offset goes with it.
        return_lse: also return the log of the softmax's denominator, [B, H, Lq], float32 (float64 for float64).

    Any strides: query, key and value are read where they lie if their last dimension is contiguous; all else is copied
    where it has gaps. Tables in float16 or bfloat16 are widened where query has half precision, autocast or not.

    Returns:
        [B, H, Lq, Dv] in query's dtype, and lse if asked for. Differentiable in query, key, value,
        distance_bias, alibi_slopes, sink_logits, and in scale and softcap where they are tensors (through both).

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; the sentence names it.
        TypeError: an argument that is no tensor, or no schedule.

    Source: Dao et al., "FlashAttention"; positions and distance limit after Han et al., "LM-Infinite", section 3.
    """
    options = AttentionOptions(
        rope, interleaved, distance_limit, distance_bias, alibi_slopes, symmetric_bias, sink_logits, softcap, dropout_p,
        scale, key_starts, key_lengths, key_offset, query_lengths, return_lse,
    )  # fmt: skip
    return call_attention("attention", query, key, value, schedule, options, key_layout=key_layout)


def lambda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sink_size: int,
    window_size: int,
    right: int | None = 0,
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    distance_limit: int | None = None,
    distance_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    symmetric_bias: bool = False,
    sink_logits: Tensor | None = None,
    softcap: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    scale: float | Tensor | None = None,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_offset: Tensor | None = None,
    query_lengths: Tensor | None = None,
    middle_topk: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Λ-masked attention: the first `sink_size` tokens and the newest `window_size`, at a cost linear in length.

    keep(i, j) = d >= -right and (d < window_size or j < sink_size), with d the query's position minus the key's. With
    `rope` the pair is rotated by min(d, distance_limit), so that every far sink stands at the same distance.

    Args:
        sink_size: tokens kept from the start, at least 0.
        window_size: newest tokens kept, the query's own among them (FlashAttention's window (left, 0) is left + 1).
        right: tokens kept after the query's own, for encoders (FlashAttention's window (left, right)); None for all.
        distance_limit: `window_size` by default, as in LM-Infinite, or `right` where that is more; must be at least
            both. 2**62 for no limit.
        middle_topk: for decoding, a query of length 1: each head also attends to the so many keys between sinks and
            window that it scores highest (of equal ones the first), all of them at distance `window_size`, which must
            then be the distance_limit. This reads every key, and holds a score for each. The choice has no gradient.

    The other arguments, the return value and the errors are those of `attention`.

    Source: Han et al., "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models", section 3.
    """
    op = "lambda_attention"
    check_int(op, "window_size", window_size)
    if right is not None:
        check_int(op, "right", right)
    if distance_limit is None:
        distance_limit = window_size if right is None or right <= 0 else max(window_size, right)
    check_int(op, "middle_topk", middle_topk, 0)
    check_bool(op, "return_lse", return_lse)
    options = AttentionOptions(
        rope, interleaved, distance_limit, distance_bias, alibi_slopes, symmetric_bias, sink_logits, softcap, dropout_p,
        scale, key_starts, key_lengths, key_offset, query_lengths, return_lse,
    )  # fmt: skip
    schedule = Lambda(sink_size, window_size, right)
    if middle_topk:
        return with_middle(op, query, key, value, schedule, options, middle_topk)
    return call_attention(op, query, key, value, schedule, options)
