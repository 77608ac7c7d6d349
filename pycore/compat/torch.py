# SPDX-License-Identifier: Apache-2.0
"""`torch.nn.functional.scaled_dot_product_attention` on pycore's kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pycore._checks import check_bool, check_number
from pycore._tensors import check_tensor, short_name
from pycore.ops import attention
from pycore.schedules import Causal, Full, Lambda, Schedule

__all__ = ["scaled_dot_product_attention"]

_OP = "scaled_dot_product_attention"
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class _RefusedError(ValueError, RuntimeError):
    """A ValueError, as everywhere in pycore, that code written for torch's function catches as its RuntimeError."""


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's function of this name computes, with pycore's same bits.

    torch aligns a causal mask top-left: query i sees keys 0..i, whatever the lengths. `pycore.ops.attention` aligns
    bottom-right, as decoding wants it.

    Args:
        query: [..., L, E], float32, float16, bfloat16 or float64 (CPU).
        key: [..., S, E]; value: [..., S, Ev]. The leading dimensions of all three broadcast, heads as well as batches.
            With enable_gqa the third dimension from the end is the heads, and key's and value's may each be a divisor
            of query's. E may be 0: every key then has the same weight.
        attn_mask: must be None. A mask of L x S bytes is what pycore is there to avoid: `pycore.ops.attention` takes
            windows, sinks, prefixes, segments and padding as schedules and lengths.
        dropout_p: from 0 to 1. At 1 no weight is left, and neither is a gradient.
        is_causal, scale, enable_gqa: torch's.

    Returns:
        [..., L, Ev]. Differentiable in query, key and value.

    Raises:
        ValueError: a mask, or shapes, dtypes and devices that do not fit. It is a RuntimeError too, as torch's is.
        TypeError: an argument that is no tensor.
    """
    if attn_mask is not None:
        raise _RefusedError(
            f"{_OP}: attn_mask is given and must be None; pycore.ops.attention has schedules and lengths in its place"
        )
    check_bool(_OP, "enable_gqa", enable_gqa)
    _check_tensors(query, key, value, enable_gqa)
    check_bool(_OP, "is_causal", is_causal)
    dropout_p = check_number(_OP, "dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise _RefusedError(f"{_OP}: dropout_p is {dropout_p} and must be from 0 to 1")
    query, key, value, leading = _four_dimensions(query, key, value, enable_gqa)
    if query.shape[3] == 0:  # scores without a channel are zeros, as those of one channel of zeros are
        query, key, scale = functional.pad(query, (0, 1)), functional.pad(key, (0, 1)), 1.0
    if dropout_p == 1:
        value, dropout_p = value * 0, 0.0
    length, keys = query.shape[2], key.shape[2]
    schedule: Schedule = Causal() if is_causal else Full()
    behind = None
    if is_causal and length > keys:
        # As if length - keys tokens had been evicted behind the keys: query i then stands at position i.
        behind = torch.full((query.shape[0],), length - keys, dtype=torch.int64, device=query.device)
        schedule = Lambda(sink_size=keys, window_size=1)
    elif is_causal:
        # Top-left: nobody sees beyond the first `length` keys, and on those the two alignments are one.
        key, value = key[:, :, :length], value[:, :, :length]
    out = attention(query, key, value, schedule=schedule, key_offset=behind, dropout_p=dropout_p, scale=scale)
    assert isinstance(out, Tensor)
    return out.reshape(*leading, *out.shape[2:])


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    cast = isinstance(query, Tensor) and query.device.type in ("cpu", "cuda")
    cast = cast and torch.is_autocast_enabled(query.device.type)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(_OP, name, tensor)
        least = 3 if enable_gqa else 2
        if tensor.dim() < least:
            needed = "[..., heads, length, head_dim] for enable_gqa" if enable_gqa else "[..., length, head_dim]"
            raise _RefusedError(f"{_OP}: {name} has {tensor.dim()} dimensions and must have at least {least}: {needed}")
        if tensor.dtype not in _DTYPES:
            raise _RefusedError(
                f"{_OP}: {name} is {short_name(tensor.dtype)} and must be float32, float64, float16 or bfloat16"
            )
        if tensor.dtype != query.dtype and not cast:  # which leaves one dtype
            raise _RefusedError(
                f"{_OP}: {name} is {short_name(tensor.dtype)} and must be {short_name(query.dtype)}, as query is"
            )
        if tensor.device != query.device:
            raise _RefusedError(f"{_OP}: {name} is on {tensor.device} and must be on {query.device}, as query is")
    if key.shape[-1] != query.shape[-1]:
        raise _RefusedError(f"{_OP}: key has head_dim {key.shape[-1]} and must have query's {query.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise _RefusedError(f"{_OP}: value has length {value.shape[-2]} and must have key's {key.shape[-2]}")


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """The three as [B, H or a divisor, length, channels], and the leading dimensions of the result."""
    tensors = [query, key, value]
    counts = [x.shape[-3] if x.dim() > 2 else 1 for x in tensors]
    if enable_gqa:
        heads = counts[0]
        for name, own in zip(("key", "value"), counts[1:], strict=True):
            if own == 0 and heads != 0 or own != 0 and heads % own != 0:
                raise _RefusedError(f"{_OP}: {name} has {own} heads, which does not divide query's {heads}")
        least, most = min(counts[1:]), max(counts[1:])
        kv_heads = 0 if heads == 0 else most if most % least == 0 else heads
        tensors[1:] = (_repeated(x, kv_heads) for x in tensors[1:])
    else:
        heads = _broadcast("heads", counts)
        kv_heads = 1 if counts[1] == counts[2] == 1 else heads  # a key head that all share is kept as one
    batch = [x.shape[:-3] for x in tensors]
    count = max(len(shape) for shape in batch)
    padded = [(1,) * (count - len(shape)) + tuple(shape) for shape in batch]
    leading = tuple(_broadcast(f"batch dimension {d}", [shape[d] for shape in padded]) for d in range(count))
    for place, x in enumerate(tensors):
        x = x.expand(*leading, heads if place == 0 else kv_heads, *x.shape[-2:])
        tensors[place] = x[None] if count == 0 else x if count == 1 else x.flatten(0, -4)
    shape = leading if max(x.dim() for x in (query, key, value)) == 2 else (*leading, heads)
    return tensors[0], tensors[1], tensors[2], shape


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Heads repeated to `heads`, each behind itself."""
    if x.shape[-3] == heads:
        return x
    if heads == 0:
        return x[..., :0, :, :]
    times = heads // x.shape[-3]
    return x.unsqueeze(-3).expand(*x.shape[:-2], times, *x.shape[-2:]).flatten(-4, -3)


def _broadcast(what: str, sizes: list[int]) -> int:
    size = 1
    for name, other in zip(("query", "key", "value"), sizes, strict=True):
        if other != 1 and size not in (1, other):
            raise _RefusedError(f"{_OP}: {name} has {other} as its {what} and must have {size} or 1")
        size = size if other == 1 else other
    return size
