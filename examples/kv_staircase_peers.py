# SPDX-License-Identifier: Apache-2.0
"""transformers' QuantizedCache on optimum-quanto, for kv_staircase.py, where that package is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

RESIDUAL = 128  # tokens that it keeps in full, and what it is read in here: its own default


class Kept(NamedTuple):
    """What came of one way to keep old tokens."""

    log_probs: Tensor  # [tokens, vocabulary] of the second part
    nbytes: int
    attention_error: float


def quantized_caches(model: Any, ids: Tensor, held: Sequence[Any], prefix: int) -> dict[str, Callable[[], Kept]]:
    """By name. `held`: each layer's newest queries, keys and values of the text ids [1, tokens + 1]."""
    if importlib.util.find_spec("optimum") is None or importlib.util.find_spec("optimum.quanto") is None:
        return {}
    return {f"quanto {bits}": lambda bits=bits: _quantized(model, ids, held, prefix, bits) for bits in (4, 2)}  # type: ignore[misc]


@torch.no_grad()
def _quantized(model: Any, ids: Tensor, held: Sequence[Any], prefix: int, bits: int) -> Kept:
    """Chunks as long as what it keeps in full, so a token reads up to that many others of its own chunk in full.

    Each chunk is quantized together with all that was: a token of the prefix is rounded anew every time.
    """
    from transformers import QuantizedCache

    def made() -> Any:
        return QuantizedCache("quanto", model.config, nbits=bits, residual_length=RESIDUAL)

    tokens = ids.shape[1] - 1
    cache, before = made(), model.config._attn_implementation
    model.set_attn_implementation("sdpa")  # which takes what the cache unpacks
    for i, layer in enumerate(held):
        cache.update(layer.key[:, :, :prefix], layer.value[:, :, :prefix], i)
    parts = [
        torch.log_softmax(model(ids[:, at : min(at + RESIDUAL, tokens)], past_key_values=cache).logits[0].float(), -1)
        for at in range(prefix, tokens, RESIDUAL)
    ]
    model.set_attn_implementation(before)
    size = sum(_nbytes(x) for layer in cache.layers for x in (layer._quantized_keys, layer._quantized_values))
    size += sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))

    squares, fresh = [], made()
    for i, (query, key, value) in enumerate(held):
        count = query.shape[2]
        fresh.update(key[:, :, :-count], value[:, :, :-count], i)
        unpacked = fresh.update(key[:, :, -count:], value[:, :, -count:], i)
        causal = torch.ones(count, key.shape[2], dtype=torch.bool).tril(key.shape[2] - count)
        got, exact = (
            scaled_dot_product_attention(
                query.double(), *(x.double() for x in pair), attn_mask=causal, enable_gqa=True
            )
            for pair in (unpacked, (key, value))
        )  # fmt: skip
        squares.append(float((got - exact).square().sum() / exact.square().sum()))
    return Kept(torch.cat(parts), size, (sum(squares) / len(squares)) ** 0.5)


def _nbytes(x: Any) -> int:
    """Of a tensor, or of those that a quantized one is made of."""
    if not hasattr(x, "__tensor_flatten__"):
        return int(x.numel() * x.element_size())
    return sum(_nbytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
