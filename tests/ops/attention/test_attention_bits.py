# SPDX-License-Identifier: Apache-2.0
"""The same bits: a row's result does not depend on what it is computed with. Everything here is torch.equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pycore.ops import attention
from pycore.schedules import Causal, Full, Lambda
from tests.support.attention_inputs import lengths, qkv, tables

LENGTH = 1100  # 18 tiles of 64 keys: the second segment of 16 tiles has begun
HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 4, 2, 40, 24
SINKS, WINDOW = 70, 200  # the sinks end inside a tile

# The options of `attention` a row is computed with; 40 channels, of which 24 are rotated.
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"schedule": Causal()},
    "causal-rope": {"schedule": Causal(), "rope": tables(LENGTH, 24)},
    "causal-rope-limit": {"schedule": Causal(), "rope": tables(90 + 64, 24), "distance_limit": 90},
    "lambda": {"schedule": Lambda(SINKS, WINDOW)},
    "lambda-rope": {"schedule": Lambda(SINKS, WINDOW), "rope": tables(WINDOW + 64, 24), "distance_limit": WINDOW},
    "lambda-rope-interleaved": {
        "schedule": Lambda(3, 64), "rope": tables(264, 24), "distance_limit": 200, "interleaved": True,
    },
    "lambda-wide": {"schedule": Lambda(0, 1060), "rope": tables(LENGTH, 24), "distance_limit": 1060},
}  # fmt: skip
some_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
lambda_options = pytest.mark.parametrize("name", [name for name in OPTIONS if name.startswith("lambda")])


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return qkv(1, HEADS, KV_HEADS, LENGTH, LENGTH, HEAD_DIM, VALUE_DIM)


def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    out, lse = attention(q, k, v, **options, return_lse=True)
    assert not out.isnan().any()
    return out, lse


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(x, y), f"result {i} differs in {int((x != y).sum())} of {x.numel()} elements"


def rows(pair: tuple[Tensor, Tensor], start: int, end: int) -> tuple[Tensor, Tensor]:
    return pair[0][:, :, start:end], pair[1][:, :, start:end]


# ---- forward -------------------------------------------------------------------------------------------------------


@some_options
@pytest.mark.parametrize("chunk", [13, 64, 97, 501])
def test_chunked_prefill(chunk: int, options: dict[str, Any], inputs: tuple[Tensor, Tensor, Tensor], isa: str) -> None:
    """Each chunk of queries sees the keys so far."""
    q, k, v = inputs
    whole = run(q, k, v, **options)
    begin = 0 if chunk > 13 else 990  # small chunks: only across the segment's border
    for start in range(begin, LENGTH, chunk):
        end = min(start + chunk, LENGTH)
        part = run(q[:, :, start:end], k[:, :, :end], v[:, :, :end], **options)
        assert_same(part, rows(whole, start, end))


@some_options
def test_decode(options: dict[str, Any], inputs: tuple[Tensor, Tensor, Tensor], isa: str) -> None:
    """One query at a time; the heads of a group then share a tile."""
    q, k, v = inputs
    whole = run(q, k, v, **options)
    for i in (0, 1, 16, 62, 63, 64, 65, 69, 70, 127, 263, 264, 265, 500, 1022, 1023, 1024, 1025, 1087, 1088, 1099):
        part = run(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], **options)
        assert_same(part, rows(whole, i, i + 1))


@some_options
def test_heads_alone(options: dict[str, Any], inputs: tuple[Tensor, Tensor, Tensor], isa: str) -> None:
    q, k, v = inputs
    for start in (0, LENGTH - 1, LENGTH - 7):
        whole = run(q[:, :, start:], k, v, **options)
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            alone = run(q[:, h : h + 1, start:], k[:, kv : kv + 1], v[:, kv : kv + 1], **options)
            assert_same(alone, (whole[0][:, h : h + 1], whole[1][:, h : h + 1]))


@some_options
@pytest.mark.parametrize("queries", [1, 5, 300])
def test_batch_rows_alone(options: dict[str, Any], queries: int, isa: str) -> None:
    q, k, v = qkv(5, HEADS, KV_HEADS, queries, 300, HEAD_DIM, VALUE_DIM)
    whole = run(q, k, v, **options)
    for b in range(5):
        assert_same(
            run(q[b : b + 1], k[b : b + 1], v[b : b + 1], **options), (whole[0][b : b + 1], whole[1][b : b + 1])
        )


@some_options
@pytest.mark.parametrize("queries", [1, 7, 1100])
def test_threads(
    queries: int, options: dict[str, Any], inputs: tuple[Tensor, Tensor, Tensor], isa: str, threads: None
) -> None:
    q, k, v = inputs
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(q[:, :, -queries:], k, v, **options))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@some_options
@pytest.mark.parametrize("batch, kv_heads", [(1, 3), (3, 1), (1, 5)])
def test_threads_that_heads_do_not_fill(
    batch: int, kv_heads: int, options: dict[str, Any], isa: str, threads: None
) -> None:
    """With few rows such heads are cut into segments, of which one thread has all."""
    q, k, v = qkv(batch, 2 * kv_heads, kv_heads, 3, LENGTH, HEAD_DIM, VALUE_DIM)
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(run(q, k, v, **options))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@lambda_options
@pytest.mark.parametrize("queries", [1, 5, 80])
@pytest.mark.parametrize("total", [80, 300, 1024, 1030, 1100])
def test_evicted_cache(total: int, queries: int, name: str, inputs: tuple[Tensor, Tensor, Tensor], isa: str) -> None:
    """The sinks and the newest keys, without what lies between, give what the whole cache gives."""
    options, (q, k, v) = OPTIONS[name], inputs
    sinks, window = options["schedule"].args
    whole = run(q[:, :, total - queries : total], k[:, :, :total], v[:, :, :total], **options)
    for spare in (0, 9):  # rows that could go but have not yet
        newest = min(window + queries - 1 + spare, total)
        evicted = max(total - newest - sinks, 0)
        k2, v2 = (torch.cat([x[:, :, :sinks], x[:, :, sinks + evicted : total]], dim=2) for x in (k, v))
        part = run(q[:, :, total - queries : total], k2, v2, key_offset=lengths(evicted), **options)
        assert_same(part, whole)


@some_options
@pytest.mark.parametrize("padding", [1, 64, 77])
def test_left_padding(padding: int, options: dict[str, Any], inputs: tuple[Tensor, Tensor, Tensor], isa: str) -> None:
    """Beside a longer row of a batch, behind padding that must not be read."""
    q, k, v = inputs
    alone = run(q[:, :, padding:], k[:, :, : LENGTH - padding], v[:, :, : LENGTH - padding], **options)
    nan = torch.full((1, KV_HEADS, padding, 1), torch.nan)
    padded_k = torch.cat([torch.cat([nan.expand(-1, -1, -1, HEAD_DIM), k[:, :, :-padding]], dim=2), k])
    padded_v = torch.cat([torch.cat([nan.expand(-1, -1, -1, VALUE_DIM), v[:, :, :-padding]], dim=2), v])
    together = run(
        q[:, :, padding:].expand(2, -1, -1, -1), padded_k, padded_v, key_starts=lengths(padding, 0), **options
    )
    assert_same((together[0][:1], together[1][:1]), alone)
    assert_same((together[0][1:], together[1][1:]), run(q[:, :, padding:], k, v, **options))


@some_options
def test_right_padding(options: dict[str, Any], inputs: tuple[Tensor, Tensor, Tensor], isa: str) -> None:
    """Room for more keys and queries than there are."""
    q, k, v = inputs
    alone = run(q[:, :, 900:1050], k[:, :, :1050], v[:, :, :1050], **options)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 1050:] = torch.nan
    v2[:, :, 1050:] = torch.nan
    padded = run(q[:, :, 900:], k2, v2, key_lengths=lengths(1050), query_lengths=lengths(150), **options)
    assert_same(rows(padded, 0, 150), alone)
    assert padded[0][:, :, 150:].count_nonzero() == 0 and bool((padded[1][:, :, 150:] == -torch.inf).all())


@pytest.mark.parametrize("queries", [1, 3, 10, 200])
def test_full_rows_alone(queries: int, isa: str) -> None:
    q, k, v = qkv(1, HEADS, KV_HEADS, 200, 1100, HEAD_DIM, VALUE_DIM)
    whole = run(q, k, v, schedule=Full())
    part = run(q[:, :, 100 : 100 + queries], k, v, schedule=Full())
    assert_same(rows(part, 0, min(queries, 100)), rows(whole, 100, min(100 + queries, 200)))


def test_repeated_calls(inputs: tuple[Tensor, Tensor, Tensor], isa: str) -> None:
    first = run(*inputs, **OPTIONS["lambda-rope"])
    for _ in range(5):
        assert_same(run(*inputs, **OPTIONS["lambda-rope"]), first)


# ---- backward ------------------------------------------------------------------------------------------------------

BACKWARD_OPTIONS = {name: OPTIONS[name] for name in ("causal-rope-limit", "lambda", "lambda-rope", "lambda-wide")}
backward_options = pytest.mark.parametrize("options", BACKWARD_OPTIONS.values(), ids=BACKWARD_OPTIONS)


def gradients(inputs: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    """Of query, key and value, for gradients of out and lse that depend on nothing but the query's row."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out, lse = attention(*inputs, **options, return_lse=True)
    grad_out = torch.sin(torch.arange(out[0].numel(), dtype=torch.float32)).view(out.shape[1:]).expand(out.shape)
    grad_lse = torch.cos(torch.arange(lse[0].numel(), dtype=torch.float32)).view(lse.shape[1:]).expand(lse.shape)
    return torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))


@backward_options
@pytest.mark.parametrize(
    "batch, kv_heads", [(1, 1), (1, 2), (3, 2)], ids=["one-key-head", "two-key-heads", "six-key-heads"]
)
def test_backward_threads(batch: int, kv_heads: int, options: dict[str, Any], isa: str, threads: None) -> None:
    """One thread takes gradients in one pass; more threads than key heads take them in two."""
    inputs = qkv(batch, 2 * kv_heads, kv_heads, 210, 330, HEAD_DIM, VALUE_DIM)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(gradients(inputs, **options))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@backward_options
def test_backward_batch_rows_alone(options: dict[str, Any], isa: str, threads: None) -> None:
    """A batch is taken in one pass, its rows alone in two."""
    torch.set_num_threads(2)
    inputs = qkv(4, 2, 1, 210, 330, HEAD_DIM, VALUE_DIM)
    whole = gradients(inputs, **options)
    for b in range(4):
        assert_same(gradients(tuple(x[b : b + 1] for x in inputs), **options), tuple(x[b : b + 1] for x in whole))


@backward_options
def test_backward_key_heads_alone(options: dict[str, Any], isa: str) -> None:
    """A key head with its group of queries, apart from the others."""
    q, k, v = qkv(1, HEADS, KV_HEADS, 150, 200, HEAD_DIM, VALUE_DIM)
    whole = gradients((q, k, v), **options)
    group = HEADS // KV_HEADS
    alone = gradients((q[:, :group], k[:, :1], v[:, :1]), **options)
    assert_same(alone, (whole[0][:, :group], whole[1][:, :1], whole[2][:, :1]))


@backward_options
@pytest.mark.parametrize("padding", [1, 64, 77])
def test_backward_left_padding(padding: int, options: dict[str, Any], isa: str) -> None:
    """Padding gets no gradient, and changes none."""
    q, k, v = qkv(1, HEADS, KV_HEADS, 150, 200, HEAD_DIM, VALUE_DIM)
    alone = gradients((q, k, v), **options)
    nan = torch.full((1, KV_HEADS, padding, 1), torch.nan)
    padded = tuple(torch.cat([nan.expand(-1, -1, -1, x.shape[3]), x], dim=2) for x in (k, v))
    query, key, value = gradients((q, *padded), key_starts=lengths(padding), **options)
    assert_same((query, key[:, :, padding:], value[:, :, padding:]), alone)
    assert key[:, :, :padding].count_nonzero() == 0 and value[:, :, :padding].count_nonzero() == 0


@pytest.mark.parametrize("name", ["lambda", "lambda-rope"])
def test_backward_evicted_cache(name: str, isa: str) -> None:
    options = OPTIONS[name]
    q, k, v = qkv(1, HEADS, KV_HEADS, 5, 500, HEAD_DIM, VALUE_DIM)
    whole = gradients((q, k, v), **options)
    cut = [torch.cat([x[:, :, :SINKS], x[:, :, -(WINDOW + 4) :]], dim=2) for x in (k, v)]
    evicted = gradients((q, *cut), key_offset=lengths(500 - SINKS - WINDOW - 4), **options)
    for x, y in zip(evicted[1:], whole[1:], strict=True):
        assert y[:, :, SINKS : -(WINDOW + 4)].count_nonzero() == 0
        assert_same((x,), (torch.cat([y[:, :, :SINKS], y[:, :, -(WINDOW + 4) :]], dim=2),))
    assert_same(evicted[:1], whole[:1])


@backward_options
def test_backward_strides(options: dict[str, Any], isa: str) -> None:
    inputs = qkv(2, HEADS, KV_HEADS, 150, 200, HEAD_DIM, VALUE_DIM)
    whole = gradients(inputs, **options)
    assert_same(gradients(tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs), **options), whole)
    assert_same(gradients(tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs), **options), whole)
