# SPDX-License-Identifier: Apache-2.0
"""`torch.nn.functional.scaled_dot_product_attention` on pycore's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pycore._checks import check_bool
from pycore._tensors import check_tensor
from pycore.ops import attention
from pycore.schedules import Full, Lambda

__all__ = ["scaled_dot_product_attention"]


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
        query: [..., H, L, E], float32, float16, bfloat16 or float64 (CPU). The leading dimensions are the batch; with
            two or three dimensions, H (and the batch) are 1.
        key: [..., H, S, E]; value: [..., H, S, Ev]. With enable_gqa their H may be a divisor of query's.
        attn_mask: must be None. A mask of L x S bytes is what pycore is there to avoid: `pycore.ops.attention` takes
            windows, sinks, prefixes, segments and padding as schedules and lengths.
        dropout_p, is_causal, scale, enable_gqa: torch's.

    Returns:
        [..., H, L, Ev]. Differentiable in query, key and value.

    Raises:
        ValueError: a mask, shapes that do not fit, or fewer key heads without enable_gqa.
    """
    op = "scaled_dot_product_attention"
    if attn_mask is not None:
        raise ValueError(
            f"{op}: attn_mask is given and must be None; pycore.ops.attention has schedules and lengths in its place"
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, tensor)
        if tensor.dim() < 2:
            raise ValueError(
                f"{op}: {name} has {tensor.dim()} dimensions and must have at least 2: [..., length, head_dim]"
            )
        if tensor.dim() != query.dim():
            raise ValueError(
                f"{op}: {name} has {tensor.dim()} dimensions and query has {query.dim()}; they must be equal"
            )
    check_bool(op, "is_causal", is_causal)
    check_bool(op, "enable_gqa", enable_gqa)
    heads, kv_heads = (x.shape[-3] if x.dim() > 2 else 1 for x in (query, key))
    if not enable_gqa and heads != kv_heads:
        raise ValueError(f"{op}: key has {kv_heads} heads and query has {heads}; they must be equal without enable_gqa")
    shape = (*query.shape[:-1], value.shape[-1])
    leading = query.shape[:-3]
    query, key, value = (_four_dimensions(op, x, leading) for x in (query, key, value))
    length, keys = query.shape[2], key.shape[2]
    if not is_causal:
        out = attention(query, key, value, schedule=Full(), dropout_p=dropout_p, scale=scale)
    elif length <= keys:
        # Top-left: nobody sees beyond the first `length` keys, and on those the two alignments are one.
        out = attention(query, key[:, :, :length], value[:, :, :length], dropout_p=dropout_p, scale=scale)
    else:
        # As if length - keys tokens had been evicted behind the keys: query i then stands at position i.
        behind = torch.full((query.shape[0],), length - keys, dtype=torch.int64, device=query.device)
        schedule = Lambda(sink_size=keys, window_size=1)
        out = attention(query, key, value, schedule=schedule, key_offset=behind, dropout_p=dropout_p, scale=scale)
    assert isinstance(out, Tensor)
    return out.reshape(shape)


def _four_dimensions(op: str, x: Tensor, leading: torch.Size) -> Tensor:
    if x.shape[:-3] != leading:
        raise ValueError(f"{op}: batch dimensions are {list(x.shape[:-3])} and {list(leading)}; they must be equal")
    if x.dim() < 4:
        return x[(None,) * (4 - x.dim())]
    return x if x.dim() == 4 else x.flatten(0, -4)
