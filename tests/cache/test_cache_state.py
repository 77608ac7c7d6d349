# SPDX-License-Identifier: Apache-2.0
"""LambdaKVCache after an error is what it was before, whatever was refused; and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore import LambdaKVCache
from pycore.nn import LambdaAttention, ProbabilisticAttention
from pycore.ops import lambda_attention
from pycore.positions import rope_tables
from pycore.schedules import Geometric, Tree

HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 4, 2, 16, 8


def tokens(length: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, VALUE_DIM))
    q, k, v = (torch.randn(batch, heads, length, channels) for heads, channels in shapes)
    return q, k, v


def filled(length: int = 300) -> tuple[LambdaKVCache, tuple[Tensor, Tensor, Tensor]]:
    q, k, v = tokens(length)
    cache = LambdaKVCache(4, 100, 20)
    cache.append(k, v)
    return cache, (q, k, v)


def snapshot(cache: LambdaKVCache) -> dict[str, Any]:
    return {name: copy.deepcopy(x) for name, x in vars(cache).items()}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def unchanged(cache: LambdaKVCache, before: dict[str, Any]) -> bool:
    return all(same(x, before[name]) for name, x in vars(cache).items() if name != "_rehearsed")


Q, K, V = tokens(2)
LONG = tokens(200)
BAD_CALLS: dict[str, tuple[type[Exception], str, Callable[[LambdaKVCache], Any]]] = {
    "softcap": (ValueError, "softcap is -1", lambda c: c.attend(LONG[0], softcap=-1.0)),
    "scale": (TypeError, "scale is a str", lambda c: c.attend(LONG[0], scale="1")),
    "query-dtype": (ValueError, "key is float32 and must be float64", lambda c: c.attend(LONG[0].double())),
    "query-heads": (ValueError, "key has 2 heads, which does not divide", lambda c: c.attend(LONG[0][:, :3])),
    "query-dims": (ValueError, "query has 3 dimensions", lambda c: c.attend(LONG[0][0])),
    "query-type": (TypeError, "query is a list", lambda c: c.attend([1])),
    "queries": (ValueError, "query has 301 rows and may have 300", lambda c: c.attend(tokens(301)[0])),
    "rope": (ValueError, "rope has 20 rows", lambda c: c.attend(LONG[0], rope=rope_tables(20, HEAD_DIM))),
    "sinks": (ValueError, "sink_logits has shape", lambda c: c.attend(LONG[0], sink_logits=torch.zeros(3))),
    "middle": (ValueError, "middle_topk needs the middle tokens", lambda c: c.attend(Q[:, :, :1], middle_topk=3)),
    "middle-type": (TypeError, "middle_topk is a str and must be an int", lambda c: c.attend(Q, middle_topk="3")),
    "tree-type": (TypeError, "tree is a list and must be a", lambda c: c.attend(Q, tree=[-1, 0])),
    "tree-window": (
        ValueError,
        "tree has a window or sinks of its own",
        lambda c: c.attend(Q, tree=Tree(torch.tensor([-1, 0]), 0, 9)),
    ),
    "tree-parents": (ValueError, r"parents\[0, 1\] is 1", lambda c: c.attend(Q, tree=Tree(torch.tensor([-1, 1])))),
    "tree-middle": (
        ValueError,
        "middle_topk is 2 and must be 0 with a tree",
        lambda c: c.attend(Q, tree=Tree(torch.tensor([-1, 0])), middle_topk=2),
    ),
    "long-starts-dtype": (
        ValueError,
        r"starts is float32 \[2\] and must be int64 \[2\]",
        lambda c: c.append(*LONG[1:], starts=torch.zeros(2)),
    ),
    "long-starts-bool": (
        ValueError,
        r"starts is bool \[2\] and must be int64 \[2\]",
        lambda c: c.append(*LONG[1:], starts=torch.zeros(2, dtype=torch.bool)),
    ),
    "long-starts-shape": (
        ValueError,
        r"starts is int64 \[3\] and must be int64 \[2\]",
        lambda c: c.append(*LONG[1:], starts=torch.zeros(3, dtype=torch.int64)),
    ),
    "long-starts-dims": (
        ValueError,
        r"starts is int64 \[2, 1\] and must be int64 \[2\]",
        lambda c: c.append(*LONG[1:], starts=torch.zeros(2, 1, dtype=torch.int64)),
    ),
    "long-starts-high": (
        ValueError,
        r"starts\[1\] is 201 and must be between 0 and key's 200 tokens",
        lambda c: c.append(*LONG[1:], starts=torch.tensor([0, 201])),
    ),
    "long-starts-low": (
        ValueError,
        r"starts\[0\] is -1 and must be between 0 and key's 200 tokens",
        lambda c: c.append(*LONG[1:], starts=torch.tensor([-1, 0])),
    ),
    "long-starts-device": (
        ValueError,
        "starts is on meta and must be on cpu like key",
        lambda c: c.append(*LONG[1:], starts=torch.zeros(2, dtype=torch.int64, device="meta")),
    ),
    "starts-type": (TypeError, "starts is a int", lambda c: c.append(K, V, starts=1)),
    "long-tokens": (
        ValueError,
        "value has 199 tokens and key has 200; they must be equal",
        lambda c: c.append(LONG[1], LONG[2][:, :, 1:]),
    ),
    "long-shape": (ValueError, "value has shape", lambda c: c.append(LONG[1], LONG[2][..., :3])),
    "key-nested": (
        ValueError,
        "key is nested and must be a dense tensor",
        lambda c: c.append(torch.nested.nested_tensor([K[0], K[1]]), V),
    ),
    "key-sparse": (
        ValueError,
        "key has layout sparse_coo and must be a dense tensor",
        lambda c: c.append(K.to_sparse(), V),
    ),
    "key-meta": (ValueError, "key is torch.float32 on meta", lambda c: c.append(K.to("meta"), V)),
    "crop-type": (TypeError, "tokens is a float and must be an int", lambda c: c.crop(1.0)),
    "crop-much": (ValueError, "tokens is 21 and must be at most rollback, 20", lambda c: c.crop(21)),
    "reorder": (IndexError, "LambdaKVCache.reorder: index must be", lambda c: c.reorder(torch.tensor([0, 2]))),
    "select": (ValueError, "index is torch.bool", lambda c: c.select(torch.tensor([True, False]))),
    "repeat": (TypeError, "repeats is a str", lambda c: c.repeat_interleave("2")),
    "accept-type": (TypeError, "path is a list", lambda c: c.accept([0], 2)),
    "accept-dtype": (ValueError, "path is float32", lambda c: c.accept(torch.zeros(1), 2)),
    "accept-rows": (ValueError, r"path is int64 \[3, 1\]", lambda c: c.accept(torch.zeros(3, 1).long(), 2)),
    "accept-far": (IndexError, "path must be between 0 and 1", lambda c: c.accept(torch.tensor([0, 2]), 2)),
    "accept-order": (ValueError, "path does not ascend", lambda c: c.accept(torch.tensor([1, 0]), 2)),
    "accept-gap": (ValueError, "path does not ascend", lambda c: c.accept(torch.tensor([0, -1, 1]), 2)),
    "accept-much": (
        ValueError,
        "LambdaKVCache.accept: tokens is 21 and must be at most rollback, 20",
        lambda c: c.accept(torch.tensor([0]), 21),
    ),
    "step": (
        ValueError,
        "softcap is -2",
        lambda c: c.append_and_attend(*LONG, softcap=-2.0),
    ),
    "step-rope": (
        ValueError,
        "rope has 20 rows",
        lambda c: c.append_and_attend(Q, K, V, rope=rope_tables(20, HEAD_DIM)),
    ),
    "step-queries": (ValueError, "query has 1 rows and must have 2", lambda c: c.append_and_attend(Q[:, :, :1], K, V)),
}


# About the chunk that waits, or what may be taken back: a cache that was cropped answers otherwise.
OF_A_WHOLE_CACHE = ("queries", "accept", "crop", "softcap", "scale", "query", "rope", "sinks")


@pytest.mark.parametrize(
    ("cropped", "name"),
    [(False, name) for name in BAD_CALLS]
    + [(True, name) for name in BAD_CALLS if not name.startswith(OF_A_WHOLE_CACHE)],
)
def test_a_refused_call_changes_nothing(name: str, cropped: bool) -> None:
    """The chunk that waits for its queries among it."""
    error, words, call = BAD_CALLS[name]
    cache, (q, k, v) = filled()
    if cropped:
        cache.crop(3)
        q, k, v = (x[:, :, :297] for x in (q, k, v))
    before = snapshot(cache)
    for _ in range(2):
        with pytest.raises(error, match=words):
            call(cache)
        assert unchanged(cache, before)
    count = 1 if cache._chunk is None else 300
    expected = lambda_attention(q, k, v, sink_size=4, window_size=100)
    assert torch.equal(cache.attend(q[:, :, -count:]), expected[:, :, -count:])


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {key: x for key, x in state.items() if key != name}


def changed(**entries: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state | {k: x(state[k]) if callable(x) else x for k, x in entries.items()}


BAD_STATES: dict[str, tuple[type[Exception], str, Callable[[dict[str, Any]], Any]]] = {
    "no-dict": (TypeError, "state is a list and must be a dict", lambda state: [state]),
    **{
        f"no-{name}": (ValueError, f"{name} is missing", without(name))
        for name in ("sink_size", "window_size", "rollback", "key", "value", "lengths", "cropped")
    },
    "sizes": (ValueError, "window_size is 99 and must be 100", changed(window_size=99)),
    "sizes-type": (TypeError, "sink_size is a float and must be an int", changed(sink_size=4.0)),
    "key-type": (TypeError, "key is a ndarray and must be a Tensor", changed(key=lambda x: x.numpy())),
    "value-none": (TypeError, "value is a NoneType and must be a Tensor", changed(value=None)),
    "key-dtype": (ValueError, "value is torch.float32 on cpu and must be torch.float64", changed(key=Tensor.double)),
    "key-int": (ValueError, "key is int64 and must be float32", changed(key=Tensor.long)),
    "key-rows": (ValueError, r"key has shape \[2, 2, 2, 16, 64\] and must be", changed(key=lambda x: x[:, :, 1:])),
    "key-dims": (ValueError, r"key has shape \[2, 3, 16, 64\] and must be", changed(key=lambda x: x[0])),
    "value-batch": (ValueError, "value has shape .* and must have 2 batch rows", changed(value=lambda x: x[:1])),
    "value-heads": (ValueError, "value has shape .* and must have 2 batch rows", changed(value=lambda x: x[:, :1])),
    "value-device": (ValueError, "value is torch.float32 on meta", changed(value=lambda x: x.to("meta"))),
    "lengths-dtype": (ValueError, r"lengths is float32 \[2\] and must be int64 \[2\]", changed(lengths=Tensor.float)),
    "lengths-shape": (ValueError, r"lengths is int64 \[1\] and must be int64 \[2\]", changed(lengths=lambda x: x[:1])),
    "lengths-device": (ValueError, "lengths is on meta and", changed(lengths=lambda x: x.to("meta"))),
    "lengths-low": (ValueError, r"lengths\[0\] is -1 and must be between", changed(lengths=lambda x: x * 0 - 1)),
    "lengths-high": (ValueError, r"lengths\[0\] is 4611686018427387904", changed(lengths=lambda x: x * 0 + 2**62)),
    "lengths-type": (TypeError, "lengths is a list and must be a Tensor", changed(lengths=lambda x: x.tolist())),
    "cropped-type": (TypeError, "cropped is a str and must be an int", changed(cropped="2")),
    "cropped-high": (ValueError, "cropped is 21 and must be between 0 and rollback, 20", changed(cropped=21)),
    "cropped-low": (ValueError, "cropped is -1 and must be between 0 and rollback, 20", changed(cropped=-1)),
    "cropped-rows": (
        ValueError,
        r"cropped\[1\] is 21 and must be between 0 and 20",
        changed(cropped=torch.tensor([0, 21])),
    ),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_refused_state_changes_nothing(name: str) -> None:
    error, words, change = BAD_STATES[name]
    cache, (q, k, v) = filled()
    other, _ = filled(50)
    other.crop(2)
    before = snapshot(cache)
    with pytest.raises(error, match=f"LambdaKVCache.load_state_dict: {words}"):
        cache.load_state_dict(change(other.state_dict()))
    assert unchanged(cache, before)
    assert torch.equal(cache.attend(q), lambda_attention(q, k, v, sink_size=4, window_size=100))


def test_any_strides_load() -> None:
    cache, (q, k, v) = filled()
    state = cache.state_dict()
    state["key"] = state["key"].mT.contiguous().mT
    other = LambdaKVCache(4, 100, 20)
    other.load_state_dict(state)
    _, more_k, more_v = tokens(1)
    for one in (cache, other):
        one.append(more_k, more_v)
    assert torch.equal(other.attend(q[:, :, -1:]), cache.attend(q[:, :, -1:]))


@pytest.mark.parametrize("how", ["append", "load", "select", "crop", "copy"])
def test_what_was_done_in_inference_mode_can_go_on_outside(how: str) -> None:
    q, k, v = tokens(310)
    cache, _ = LambdaKVCache(4, 100, 20), None
    with torch.inference_mode():
        cache.append(k[:, :, :300], v[:, :, :300])
        if how == "load":
            state = {name: x.clone() if isinstance(x, Tensor) else x for name, x in cache.state_dict().items()}
            cache.load_state_dict(state)
        elif how == "select":
            cache.select(torch.tensor([0, 1]))
        elif how == "crop":
            cache.crop(1)
            cache.append(k[:, :, 299:300], v[:, :, 299:300])
        elif how == "copy":
            cache = copy.deepcopy(cache)
    cache.crop(10)
    assert cache.lengths.tolist() == [290, 290]
    cache.append(k[:, :, 290:], v[:, :, 290:])
    expected = lambda_attention(q, k, v, sink_size=4, window_size=100)
    assert torch.equal(cache.attend(q[:, :, 290:]), expected[:, :, 290:])
    with torch.inference_mode():
        cache.crop(20)
    with pytest.raises(ValueError, match="tokens is 1 with 20 taken back before"):
        cache.crop(1)
    assert cache.lengths.tolist() == [290, 290]


def test_rows_written_over_are_not_differentiated() -> None:
    """A query that learns must be gone back through before its keys are overwritten: torch says so."""
    cache, (q, k, v) = filled()
    query = q[:, :, -1:].clone().requires_grad_()
    cache.attend(query).sum().backward()
    assert query.grad is not None
    out = cache.attend(query)
    cache.append(k[:, :, :1], v[:, :, :1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_memory() -> None:
    for sizes in ((2**40, 2**40), (0, 2**62, 2**62), (2**62, 1)):
        cache = LambdaKVCache(*sizes)
        with pytest.raises(MemoryError, match="LambdaKVCache.append: sink_size, window_size and rollback are .* bytes"):
            cache.append(K, V)
        assert cache.nbytes == 0


def test_int32_is_taken() -> None:
    cache, other = LambdaKVCache(4, 100), LambdaKVCache(4, 100)
    cache.append(K, V, starts=torch.tensor([1, 0]))
    other.append(K, V, starts=torch.tensor([1, 0], dtype=torch.int32))
    other.reorder(torch.tensor([1, 0], dtype=torch.int32))
    assert torch.equal(cache.keys()[[1, 0]], other.keys())


# ---- layers on a cache ---------------------------------------------------------------------------------------------


def test_a_layer_that_refuses_leaves_its_cache() -> None:
    layer = LambdaAttention(64, HEADS, sink_size=4, window_size=100)
    cache = layer.cache()
    x = torch.randn(2, 150, 64)
    with torch.no_grad():
        layer(x[:, :140], cache=cache)
        before = snapshot(cache)
        layer.softcap = -1.0
        with pytest.raises(ValueError, match="softcap is -1"):
            layer(x[:, 140:], cache=cache)
        layer.softcap = 0.0
        rope, layer.positions.rope_cos = layer.positions.rope_cos, layer.positions.rope_cos.double()
        with pytest.raises(ValueError, match="rope's cos is float64"):
            layer(x[:, 140:], cache=cache)
        with pytest.raises(ValueError, match="starts"):
            layer(x[:, 140:], cache=cache, starts=torch.tensor([0, 11]))
        assert unchanged(cache, before)
        layer.positions.rope_cos = rope
        assert torch.equal(layer(x[:, 140:], cache=cache), layer(x)[:, 140:])


def test_a_refused_round_is_not_counted() -> None:
    layer = ProbabilisticAttention(64, HEADS, distance_probs=Geometric(0.8)).train()
    layer(torch.randn(1, 9, 64))
    with pytest.raises(ValueError, match="softcap"):
        layer.softcap = -1.0
        layer(torch.randn(1, 9, 64))
    assert layer.round == 1
