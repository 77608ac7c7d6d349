# SPDX-License-Identifier: Apache-2.0
"""Attention ops: one kernel family behind every schedule.

`attention` and `lambda_attention` call `torch.ops.pycore.attention` (csrc/torch/attention.cpp), which runs
csrc/cpu/attention/dispatch.cpp or csrc/cuda/attention/dispatch.cu.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_bool, check_int, check_number
from pycore._load import load_ops
from pycore._tensors import as_index, as_table, check_devices, check_tensor, graph_numbers
from pycore.ops._autograd import no_second_derivative, register_derivatives
from pycore.ops.attention_bitmaps import key_words, tree_nodes
from pycore.ops.attention_blocks import draw_blocks
from pycore.ops.attention_jvp import attention_jvp
from pycore.ops.attention_middle import check_middle, gathered, merged, middle_tokens, rotated
from pycore.schedules import Causal, Full, KeySubset, Lambda, Probabilistic, Schedule, Segments, Tree

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
    return call_attention(
        "attention", query, key, value, schedule, rope, interleaved, distance_limit, distance_bias, alibi_slopes,
        sink_logits,
        softcap, dropout_p, scale, (key_starts, key_lengths, key_offset, query_lengths), return_lse,
        symmetric_bias=symmetric_bias,
    )  # fmt: skip


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
    limit = distance_limit
    if limit is None:
        limit = window_size if right is None or right <= 0 else max(window_size, right)
    lengths = (key_starts, key_lengths, key_offset, query_lengths)
    check_int(op, "middle_topk", middle_topk, 0)
    check_bool(op, "return_lse", return_lse)
    if middle_topk and isinstance(query, Tensor):
        placed = rope is not None or distance_bias is not None or alibi_slopes is not None
        check_middle(op, middle_topk, query, placed, limit, window_size)
    if middle_topk and isinstance(query, Tensor) and isinstance(key, Tensor):
        distance_bias, alibi_slopes = (
            x if not isinstance(x, Tensor) else as_table(x, _autocast(query)[0]) for x in (distance_bias, alibi_slopes)
        )
    kept = call_attention(
        op, query, key, value, Lambda(sink_size, window_size, right), rope, interleaved, limit, distance_bias,
        alibi_slopes, sink_logits, softcap, dropout_p, scale, lengths, return_lse or middle_topk != 0,
        symmetric_bias=symmetric_bias,
    )  # fmt: skip
    if middle_topk == 0:
        return kept
    query, key, value = _autocast(query, key, value)
    seen = rotated(query, rope, interleaved, window_size)
    with torch.no_grad():
        index, count = middle_tokens(seen, key, lengths, sink_size, window_size, middle_topk)
    bias = distance_bias
    if distance_bias is not None:
        bias = distance_bias[:, min(window_size, distance_bias.shape[1] - 1), None].contiguous()
    elif alibi_slopes is not None and alibi_slopes.dim() == 1:
        bias = -alibi_slopes.to(seen.dtype)[:, None] * window_size
    middle_key, middle_value = (gathered(x, index).to(seen.dtype) for x in (key, value))
    middle = call_attention(
        op, seen, middle_key, middle_value, Full(), None, False, None, bias, None, None, softcap,
        dropout_p, scale, (None, count, None, query_lengths), True,
    )  # fmt: skip
    assert isinstance(kept, tuple) and isinstance(middle, tuple)
    if alibi_slopes is not None and alibi_slopes.dim() == 2:  # one number for all keys of a row moves its lse alone
        middle = (middle[0], middle[1] - (alibi_slopes.to(seen.dtype) * window_size)[..., None])
    out, lse = merged(kept, middle)
    return (out, lse) if return_lse else out


def call_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    schedule: Schedule,
    rope: tuple[Tensor, Tensor] | None,
    interleaved: bool,
    distance_limit: int | None,
    distance_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sink_logits: Tensor | None,
    softcap: float | Tensor,
    dropout_p: float,
    scale: float | Tensor | None,
    lengths: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    return_lse: bool,
    key_ring: int = 0,
    symmetric_bias: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` under the name `op`; key_ring is how a cache keeps its keys (attention.h in csrc/include)."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, tensor)
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{op}: schedule is a {type(schedule).__name__} and must be one of pycore.schedules")
    if isinstance(schedule, Lambda | Segments | Tree):
        check_int(op, "sink_size", schedule.sink_size, 0)
        right = None if isinstance(schedule, Tree) else schedule.right
        for name, size, least in (("window_size", schedule.window_size, 1), ("right", right, 0)):
            if size is not None or (isinstance(schedule, Lambda) and name == "window_size"):
                check_int(op, name, size, least)
    if isinstance(schedule, Segments | KeySubset):
        check_bool(op, "causal", schedule.causal)
    names = ("key_starts", "key_lengths", "key_offset", "query_lengths", "distance_bias", "alibi_slopes", "sink_logits")
    for name, option in zip(names, (*lengths, distance_bias, alibi_slopes, sink_logits), strict=True):
        if option is not None:
            check_tensor(op, name, option)
    schedule_tensor, block_bias = schedule.tensor, None
    if schedule_tensor is not None:
        check_tensor(op, "prefix_lengths" if schedule.kind == "prefix" else "boundaries", schedule_tensor)
        schedule_tensor = as_index(schedule_tensor)
    check_bool(op, "symmetric_bias", symmetric_bias)
    cos, sin = _rope_tables(op, rope)
    check_bool(op, "interleaved", interleaved)
    check_bool(op, "return_lse", return_lse)
    if scale is not None:
        scale = _factor(op, "scale", scale)
    softcap, dropout_p = _factor(op, "softcap", softcap), check_number(op, "dropout_p", dropout_p)
    limit = _NO_LIMIT
    if distance_limit is not None:
        check_int(op, "distance_limit", distance_limit, 0)
        limit = distance_limit
    query, key, value = _autocast(query, key, value)
    cos, sin, distance_bias, alibi_slopes, sink_logits = (
        x if x is None else as_table(x, query) for x in (cos, sin, distance_bias, alibi_slopes, sink_logits)
    )
    starts, ends, offsets, queries = (x if x is None else as_index(x) for x in lengths)
    lengths = (starts, ends, offsets, queries)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    numbers = None
    given = isinstance(scale, Tensor) or isinstance(softcap, Tensor)
    if given or (torch.compiler.is_compiling() and (scale is not None or softcap != 0 or dropout_p != 0)):
        numbers = graph_numbers(1.0 if scale is None else scale, softcap, dropout_p)
        scale, softcap, dropout_p = scale if scale is None else 1.0, 0.0, 0.0
    if isinstance(schedule, Probabilistic) and query.dim() == 4 and key.dim() == 4:
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        wide = query.dtype == torch.float64
        schedule_tensor, block_bias = draw_blocks(op, schedule, shape, lengths, query.device, wide)
    elif isinstance(schedule, KeySubset) and key.dim() == 4:
        schedule_tensor = key_words(op, schedule, key.shape[2], shifted=lengths[2] is not None)
    elif isinstance(schedule, Tree):
        schedule_tensor = tree_nodes(op, schedule)
    # For a gradient, lse comes with what rounding it left out.
    differentiable = (query, key, value, distance_bias, alibi_slopes, sink_logits, numbers)
    pair = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
    out, lse = torch.ops.pycore.attention(
        query, key, value, cos, sin, distance_bias, alibi_slopes, sink_logits, *lengths, schedule_tensor, seed,
        block_bias, op, schedule.kind, schedule.args, bool(interleaved), limit, scale, softcap, dropout_p, key_ring,
        bool(symmetric_bias), numbers, pair,
    )  # fmt: skip
    if not return_lse:
        return out
    return out, lse[0] if pair else lse


def _factor(op: str, name: str, value: Any) -> Any:
    """A number, or a tensor of one, which may want a gradient."""
    if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
        check_tensor(op, name, value)
        return value
    return check_number(op, name, value)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value in the dtype autocast asks for; float64 stays, and so does what is no floating point."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _rope_tables(op: str, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if rope is None:
        return None, None
    if not isinstance(rope, (tuple, list)) or len(rope) != 2 or not all(isinstance(t, Tensor) for t in rope):
        raise TypeError(f"{op}: rope must be a pair of Tensors, (cos, sin)")
    check_tensor(op, "rope's cos", rope[0])
    check_tensor(op, "rope's sin", rope[1])
    return rope[0], rope[1]


# The tensors of an attention call, in schema order; what follows them, up to `numbers` at the end, is `options`.
_TENSORS = (
    "query", "key", "value", "rope_cos", "rope_sin", "distance_bias", "alibi_slopes", "sink_logits", "key_starts",
    "key_lengths", "key_offset", "query_lengths", "schedule_tensor", "dropout_seed", "block_bias",
)  # fmt: skip
_SLOPES = _TENSORS.index("alibi_slopes")
_LSE_PAIR = len(_TENSORS) + 11  # the last of all, after symmetric_bias and numbers
_NUMBERS = _LSE_PAIR - 1
_BIAS, _SINK = _TENSORS.index("distance_bias"), _TENSORS.index("sink_logits")


def _sum_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _check_fakes(*args: Any, **others: Any) -> None:
    count = len(_TENSORS)
    tensors, op = dict(zip(_TENSORS, args[:count], strict=True)), args[count]
    for name in ("query", "key", "value"):
        if tensors[name].dim() != 4:
            raise ValueError(
                f"{op}: {name} has {tensors[name].dim()} dimensions and must have 4: [batch, heads, length, head_dim]"
            )
    check_devices(op, **tensors, **others)


@torch.library.register_fake("pycore::attention")
def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, lse_pair: bool = False
) -> tuple[Tensor, Tensor]:
    _check_fakes(query, key, value, *args)
    batch, heads, length, _ = query.shape
    pair = (2,) if lse_pair or any(args[_LSE_PAIR - 3 :]) else ()
    return (
        query.new_empty(batch, heads, length, value.shape[3]),
        query.new_empty(*pair, batch, heads, length, dtype=_sum_dtype(query)),
    )


@torch.library.register_fake("pycore::attention_backward")
def _attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_gradient: bool, sink_gradient: bool,
    *args: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_fakes(*args, grad_out=grad_out, grad_lse=grad_lse, out=out, lse=lse)
    query, key, value = args[:3]
    bias = args[_BIAS].shape if bias_gradient else (0, 0)
    sink = args[_SINK].shape if sink_gradient else (0,)
    slopes_gradient, numbers_gradient = (*args[_NUMBERS + 1 :], False, False)[:2]
    slopes = args[_SLOPES].shape if slopes_gradient else (0,)
    shapes = (query.shape, key.shape, value.shape, bias, sink, slopes)
    grads = (query.new_empty(shape, dtype=_sum_dtype(query)) for shape in shapes)
    return *grads, query.new_empty(3 if numbers_gradient else 0, dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    count = len(_TENSORS)
    ctx.options = inputs[count:_NUMBERS]
    ctx.save_for_backward(*output, *inputs[:count], inputs[_NUMBERS])


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors, numbers = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * (_LSE_PAIR + 1)
    if grad_out is None and grad_lse is None:
        return tuple(grads)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if grad_lse is not None and grad_lse.dim() == 4:
        grad_lse = grad_lse[0]
    wanted = [ctx.needs_input_grad[place] for place in (_BIAS, _SINK, _SLOPES, _NUMBERS)]
    query, key, value, *others = torch.ops.pycore.attention_backward(
        grad_out, grad_lse, out, lse, *wanted[:2], *tensors, *ctx.options, numbers, *wanted[2:]
    )
    grads[:3] = (query.to(out.dtype), key.to(out.dtype), value.to(out.dtype))
    for place, wants, gradient in zip((_BIAS, _SINK, _SLOPES), wanted, others, strict=False):
        grads[place] = gradient if wants else None
    grads[_NUMBERS] = others[3].to("cpu") if wanted[3] else None
    return tuple(grads)


register_derivatives("attention", _backward, _setup_context, attention_jvp)
no_second_derivative("attention_backward", lambda inputs: inputs[6 + len(_TENSORS)])


def _fold(info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...], first: int = 0) -> list[Any]:
    """The arguments with vmap's dimension folded into the batch. `first` is query's place; all before it are folded."""
    folded = list(args)
    batched, bitmap = _mapped(args, first)
    batch = _batch(in_dims, args, first)
    kind = args[first + len(_TENSORS) + 1]
    for place, (dim, arg) in enumerate(zip(in_dims, args, strict=True)):
        if arg is None or not isinstance(arg, Tensor):
            continue
        if place == bitmap and kind == "segments" and arg.dim() == (1 if dim is None else 2):
            arg, dim = (arg, dim) if dim is None else (arg.movedim(dim, 0), 0)
            arg = arg.unsqueeze(-2)
        if place == first + _SLOPES and dim is not None and arg.dim() == 2:  # [H] of each sample
            arg, dim = arg.movedim(dim, 0).unsqueeze(1), 0
        per_row = place == first + _SLOPES and arg.dim() > 1
        if place == bitmap or per_row:  # one for all rows, or one for each
            if dim is not None or arg.shape[0] != 1:
                rows = arg[None] if dim is None else arg.movedim(dim, 0)
                rows = rows.expand(info.batch_size, batch, *rows.shape[2:])
                folded[place] = rows.flatten(0, 1).contiguous()
        elif place == first - 3 and arg.dim() == (4 if dim is None else 5):  # lse in two parts, in front of the batch
            arg = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            folded[place] = arg.movedim(0, 1).flatten(1, 2).contiguous()
        elif place in batched:
            arg = arg.unsqueeze(0).expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            folded[place] = arg.flatten(0, 1)
        elif place == first + _SEED:  # of no samples
            folded[place] = arg.new_zeros(1)
        elif dim is not None:
            raise NotImplementedError(_NOT_OVER_TABLES)
    return folded


_NOT_OVER_TABLES = "attention: vmap may run over query, key, value and the lengths, not over tables"
_PER_ROW = {_TENSORS.index(name) for name in _TENSORS if name in ("query", "key", "value") or name.endswith("_lengths")}
_PER_ROW |= {_TENSORS.index("key_starts"), _TENSORS.index("key_offset")}


def _mapped(args: tuple[Any, ...], first: int) -> tuple[set[int], int | None]:
    """The places of what has a row for each of the batch, and of a bitmap that may have one for all."""
    kind, schedule_tensor = args[first + len(_TENSORS) + 1], first + _TENSORS.index("schedule_tensor")
    places = {*range(first), *(first + place for place in _PER_ROW)}
    if kind in ("prefix", "blocks"):
        places.add(schedule_tensor)
    return places, schedule_tensor if kind in ("segments", "key_subset", "tree") else None


def _batch(in_dims: tuple[int | None, ...], args: tuple[Any, ...], first: int) -> int:
    """The batch of one sample."""
    query, dim = args[first], in_dims[first]
    batch: int = query.shape[0] if dim is None else query.movedim(dim, 0).shape[1]
    return batch


def _one_by_one(
    op: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...], first: int = 0
) -> tuple[Tensor, ...]:
    """Samples one after another, for dropout: what a row drops depends on its place in the batch of its own sample.

    vmap's randomness then does to masks what it does to torch's: a seed for all samples where it is "same", one for
    each where it is "different"; where it is "error", drawing the seed has raised.
    """
    places, bitmap = _mapped(args, first)
    places |= {first + _SEED, first + _SLOPES} if bitmap is None else {first + _SEED, first + _SLOPES, bitmap}
    mapped = [place for place, dim in enumerate(in_dims) if isinstance(args[place], Tensor) and dim is not None]
    if not places.issuperset(mapped):
        raise NotImplementedError(_NOT_OVER_TABLES)
    samples = [
        op(
            *(
                _sample(arg, in_dims[place], n, place < first) if place in mapped else arg
                for place, arg in enumerate(args)
            )
        )
        for n in range(info.batch_size)
    ]
    return tuple(torch.stack(results) for results in zip(*samples, strict=True))


def _sample(arg: Tensor, dim: Any, n: int, dense: bool) -> Tensor:
    return arg.select(dim, n).contiguous() if dense else arg.select(dim, n)


_SEED = _TENSORS.index("dropout_seed")


@torch.library.register_vmap("pycore::attention")
def _attention_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    if args[_SEED] is not None and info.batch_size > 0:
        return _one_by_one(torch.ops.pycore.attention, info, in_dims, args), (0, 0)
    out, lse = torch.ops.pycore.attention(*_fold(info, in_dims, args))
    batch, rows = lse.dim() - 3, (info.batch_size, _batch(in_dims, args, 0))
    return (out.unflatten(0, rows), lse.unflatten(batch, rows)), (0, batch)


@torch.library.register_vmap("pycore::attention_backward")
def _attention_backward_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    # What a table gathers is that of all rows, so each sample needs a call of its own.
    tables = args[4] or args[5] or any(args[6 + _NUMBERS + 1 :])
    if (tables or args[6 + _SEED] is not None) and info.batch_size > 0:
        grads = _one_by_one(torch.ops.pycore.attention_backward, info, in_dims, args, first=6)
        return grads, (0,) * len(grads)
    outputs = torch.ops.pycore.attention_backward(*_fold(info, in_dims, args, first=6))
    grads = tuple(x.unflatten(0, (info.batch_size, _batch(in_dims, args, 6))) for x in outputs[:3])
    others = tuple(x.expand(info.batch_size, *x.shape) for x in outputs[3:])
    return (*grads, *others), (0,) * len(outputs)
