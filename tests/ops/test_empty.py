# SPDX-License-Identifier: Apache-2.0
"""Inputs without elements, and gradients without memory: forward and backward, in every op and module."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore import nn, ops
from pycore.compat.torch import scaled_dot_product_attention
from pycore.models.bytelm import Bytelm, BytelmConfig
from pycore.schedules import Causal, Full, Geometric, KeySubset, Lambda, Prefix, Segments, Tree
from tests.support.attention_inputs import lengths


def check(f: Callable[..., Tensor], *inputs: Tensor) -> None:
    """A sum, whose gradient is expanded from one number, and a gradient of rows that are one row; both finite."""
    results = []
    for expand in (True, False):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = f(*leaves)
        ones = torch.ones(()).expand_as(out)
        results.append(torch.autograd.grad(out, leaves, ones if expand else ones.clone()))
    for x, expanded, dense in zip(inputs, *results, strict=True):
        assert expanded.shape == x.shape and expanded.isfinite().all() and torch.equal(expanded, dense)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    f(*leaves).sum().backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(leaves, results[0], strict=True) if x.grad is not None)


@pytest.mark.parametrize("rows, features, outputs", list(itertools.product([0, 3], repeat=3)), ids=str)
@pytest.mark.parametrize("leading", [(), (2,), (0,)], ids=str)
def test_invariant_linear(rows: int, features: int, outputs: int, leading: tuple[int, ...]) -> None:
    x, weight = torch.randn(*leading, rows, features), torch.randn(outputs, features)
    check(ops.invariant_linear, x, weight)
    check(ops.invariant_linear, x, weight, torch.randn(outputs))
    out = ops.invariant_linear(x, weight, torch.ones(outputs))
    assert out.shape == (*leading, rows, outputs) and (features or bool((out == 1).all()))
    check(lambda x, *weights: ops.invariant_linears(x, weights), x, weight, torch.randn(2, features))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3), (0, 3, 4), (2, 3, 4)], ids=str)
def test_rms_norm(shape: tuple[int, ...]) -> None:
    check(ops.rms_norm, torch.randn(shape))
    check(ops.rms_norm, torch.randn(shape), torch.randn(shape[-1]))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3), (0, 3, 4), (2, 3, 4)], ids=str)
def test_layer_norm_and_gated(shape: tuple[int, ...]) -> None:
    check(ops.layer_norm, torch.randn(shape))
    check(ops.layer_norm, torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1]))
    check(ops.silu_mul, torch.randn(shape), torch.randn(shape))
    check(ops.gelu_mul, torch.randn(shape), torch.randn(shape))


SIZES = [x for x in itertools.product((0, 2), (0, 4), (0, 2), (0, 3), (0, 5), (0, 6)) if x[2] or not x[1]]


@pytest.mark.parametrize("batch, heads, kv_heads, queries, keys, channels", [x for x in SIZES if 0 in x], ids=str)
def test_attention(batch: int, heads: int, kv_heads: int, queries: int, keys: int, channels: int) -> None:
    q = torch.randn(batch, heads, queries, 8)
    k, v = torch.randn(batch, kv_heads, keys, 8), torch.randn(batch, kv_heads, keys, channels)
    counts, none = lengths(*[0] * batch), lengths()
    table, sinks = torch.randn(heads, 3), torch.randn(heads)
    for options in (
        {"schedule": Causal(), "dropout_p": 0.5}, {"schedule": Full()}, {"schedule": Lambda(1, 2)},
        {"schedule": Prefix(counts)}, {"schedule": Segments(lengths(0))}, {"schedule": KeySubset(none)},
        {"schedule": KeySubset(torch.zeros(batch, keys, dtype=torch.bool))}, {"schedule": Tree(none)},
        {"query_lengths": counts},
    ):  # fmt: skip
        check(lambda q, k, v, o=options: ops.attention(q, k, v, **o), q, k, v)
    check(lambda q, k, v, b, s: ops.attention(q, k, v, distance_bias=b, sink_logits=s), q, k, v, table, sinks)
    check(lambda q, k, v: ops.pr_flash_attention(q, k, v, distance_probs=Geometric(0.5), seed=1), q, k, v)
    if heads == kv_heads:
        check(lambda q, k, v: scaled_dot_product_attention(q, k, v), q, k, v)
    out, lse = ops.attention(q, k, v, return_lse=True)
    assert out.shape == (batch, heads, queries, channels) and lse.shape == (batch, heads, queries)
    check(lambda q, k: ops.attention(q, k, v, return_lse=True)[1], q, k.requires_grad_())


@pytest.mark.parametrize("batch, length", [(0, 3), (2, 0), (0, 0), (2, 3)])
@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "harmonic", "none"])
def test_modules(position: str, batch: int, length: int) -> None:
    """Gradients of the input and of every parameter."""
    x = torch.randn(batch, length, 16)
    layers: list[torch.nn.Module] = [
        nn.LambdaAttention(16, 2, sink_size=1, window_size=4, position=position, sink_logits=True, bias=True),
        nn.ProbabilisticAttention(16, 2, distance_probs=Geometric(0.5), position=position, bias=True).eval(),
    ]
    for layer in layers:
        parameters = list(layer.parameters())
        check(lambda x, *_, f=layer: f(x), x)
        grads = torch.autograd.grad(layer(x).sum(), parameters)
        assert all(x.shape == y.shape and x.isfinite().all() for x, y in zip(grads, parameters, strict=True))
    model = Bytelm(BytelmConfig(dim=16, heads=2, kv_heads=1, layers=1, position=position))
    logits = model(torch.zeros(batch, length, dtype=torch.int64))
    assert logits.shape == (batch, length, 257)
    grads = torch.autograd.grad(logits.sum(), list(model.parameters()))
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("batch, length", [(0, 3), (2, 0), (0, 0)])
def test_caches_of_nothing(batch: int, length: int) -> None:
    model = Bytelm(BytelmConfig(dim=16, heads=2, kv_heads=1, layers=1))
    with torch.no_grad():
        caches = model.caches(Lambda(1, 4))
        assert model(torch.zeros(batch, length, dtype=torch.int64), caches=caches).shape == (batch, length, 257)
        assert model(torch.zeros(batch, 1, dtype=torch.int64), caches=caches).shape == (batch, 1, 257)


@pytest.mark.parametrize("streams, length", [(0, 0), (0, 3), (2, 0)])
def test_coder(streams: int, length: int) -> None:
    symbols, logits = torch.zeros(streams, length, dtype=torch.int64), torch.zeros(streams, length, 3)
    cdf = ops.quantize_cdf(logits=logits)
    assert cdf.shape == (streams, length, 4)
    decoded: list[Any] = [
        ops.ac_decode(ops.ac_encode(symbols, cdf), cdf),
        ops.ac_decode(ops.ac_encode(symbols, cdf[..., :1, :], lanes=3) if length else ops.ac_encode(symbols, cdf), cdf),
        ops.ac_decode_logits(ops.ac_encode_logits(symbols, logits), logits),
        ops.ac_decode_bytes(ops.ac_encode_bytes(symbols.byte())),
    ]
    for x in decoded:  # no stream says how long it would be
        assert x.shape == (streams, length if streams else 0)
    with pytest.raises(ValueError, match="^quantize_cdf: probs has 0 entries in its last dimension and must have at"):
        ops.quantize_cdf(torch.ones(streams, 0))


def test_no_blocks() -> None:
    for sizes in itertools.product((0, 2), (0, 1), (0, 3), (0, 3)):
        names = ("batch", "heads", "query_blocks", "key_blocks")
        mask = ops.pr_block_mask(**dict(zip(names, sizes, strict=True)), distance_probs=Geometric(0.5), seed=1)
        assert mask.shape == sizes
