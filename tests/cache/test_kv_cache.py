# SPDX-License-Identifier: Apache-2.0
"""KVCache: the bits of causal attention over all that was appended, however it came and whatever was taken back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pycore import KVCache, LambdaKVCache, native
from pycore.ops import attention, lambda_attention
from pycore.positions import alibi_slopes, rope_tables
from pycore.schedules import Tree

HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 4, 2, 16, 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tokens(length: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, VALUE_DIM))
    q, k, v = (torch.randn(batch, heads, length, channels).to(dtype) for heads, channels in shapes)
    return q, k, v


def part(x: tuple[Tensor, Tensor, Tensor], begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t[:, :, begin:end] for t in x)
    return q, k, v


def filled(length: int = 100, **options: Any) -> tuple[KVCache, tuple[Tensor, Tensor, Tensor]]:
    all_tokens = tokens(length)
    cache = KVCache(**options)
    cache.append(*all_tokens[1:])
    return cache, all_tokens


def snapshot(cache: Any) -> dict[str, Any]:
    return {name: copy.deepcopy(x) for name, x in vars(cache).items()}


def unchanged(cache: Any, before: dict[str, Any], but: tuple[str, ...] = ()) -> bool:
    return all(
        torch.equal(x, before[name]) if isinstance(x, Tensor) else x == before[name]
        for name, x in vars(cache).items()
        if name not in but
    )


@pytest.mark.parametrize("capacity", [None, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"rope": 400}, {"alibi_slopes": 4}], ids=str)
def test_chunks_have_the_bits_of_the_whole(
    options: dict[str, int], dtype: torch.dtype, capacity: int | None, isa: str
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given: dict[str, Any] = {}
    if "rope" in options:
        given["rope"] = tuple(x.to(wide) for x in rope_tables(400, HEAD_DIM))
    if "alibi_slopes" in options:
        given["alibi_slopes"] = alibi_slopes(HEADS).to(wide)
    everything = tokens(300, dtype=dtype)
    whole = attention(*everything, **given)
    for fused in (False, True):
        cache, outs = KVCache(capacity), []
        for begin, end in ((0, 70), (70, 75), *((i, i + 1) for i in range(75, 140)), (140, 300)):
            q, k, v = part(everything, begin, end)
            if fused:
                outs.append(cache.append_and_attend(q, k, v, **given))
            else:
                cache.append(k, v)
                outs.append(cache.attend(q, **given))
        assert torch.equal(torch.cat(outs, 2), whole)
        assert torch.equal(cache.keys(), everything[1])
        assert torch.equal(cache.values(), everything[2])


def test_lse_comes_along() -> None:
    everything = tokens(90)
    _, lse = attention(*everything, return_lse=True)
    for fused in (False, True):
        cache = KVCache()
        cache.append(*part(everything, 0, 89)[1:])
        q, k, v = part(everything, 89, 90)
        if fused:
            given = cache.append_and_attend(q, k, v, return_lse=True)
        else:
            cache.append(k, v)
            given = cache.attend(q, return_lse=True)
        assert torch.equal(given[1], lse[:, :, 89:])


def test_rows_padded_on_the_left_go_on_as_if_alone() -> None:
    q, k, v = everything = tokens(150)
    starts = torch.tensor([0, 40])
    for fused in (False, True):
        cache = KVCache()
        q0, k0, v0 = part(everything, 0, 100)
        first = cache.append_and_attend(q0, k0, v0, starts=starts) if fused else None
        if not fused:
            cache.append(k0, v0, starts=starts)
            first = cache.attend(q0)
        outs = [first]
        for i in range(100, 150):
            outs.append(cache.append_and_attend(*part(everything, i, i + 1)))
        assert cache.lengths.tolist() == [150, 110]
        out = torch.cat([x for x in outs if isinstance(x, Tensor)], 2)
        assert torch.equal(out[0], attention(q[:1], k[:1], v[:1])[0])
        assert torch.equal(out[1, :, 40:], attention(q[1:, :, 40:], k[1:, :, 40:], v[1:, :, 40:])[0])
        assert torch.equal(cache.keys()[1, :, :110], k[1, :, 40:])
        assert not cache.keys()[1, :, 110:].any()


def test_growing_copies_what_is_held_now_and_then() -> None:
    """So that a token costs the same however many there are."""
    cache, copied = KVCache(), 0
    _, k, v = tokens(4000, batch=1)
    memory = 0
    for i in range(4000):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        copied += memory if cache.nbytes != memory else 0
        memory = cache.nbytes
    assert torch.equal(cache.keys(), k)
    bytes_of_all = (k.numel() + v.numel()) * 4
    assert copied < 3 * bytes_of_all  # 2/3 + 4/9 + ... of room for at most half more than there is
    assert memory < 1.6 * bytes_of_all


def test_given_capacity_is_allocated_once_and_never_overrun() -> None:
    cache, (q, k, v) = filled(100, capacity=101)
    memory = cache.nbytes
    more = tokens(2)
    for call in (
        lambda: cache.append(*more[1:]),
        lambda: cache.append_and_attend(*more),
        lambda: cache.append(*more[1:], starts=torch.tensor([1, 0])),
        lambda: cache.append_and_attend(*more, starts=torch.tensor([0, 1])),
    ):
        before = snapshot(cache)
        with pytest.raises(
            ValueError, match="KVCache.append: key has 2 tokens, with which a row would have 102, and must"
        ):
            call()
        assert unchanged(cache, before)
    cache.append(*more[1:], starts=torch.tensor([1, 1]))
    assert cache.nbytes == memory and cache.lengths.tolist() == [101, 101]
    expected = attention(more[0][:, :, 1:], torch.cat([k, more[1][:, :, 1:]], 2), torch.cat([v, more[2][:, :, 1:]], 2))
    assert torch.equal(cache.attend(more[0][:, :, 1:]), expected)


@pytest.mark.parametrize("back", [1, 37, 100])
def test_crop(back: int) -> None:
    cache, everything = filled(100)
    cache.crop(back)
    assert cache.lengths.tolist() == [100 - back] * 2
    again = tokens(back + 30)
    _, k, v = (torch.cat([x[:, :, : 100 - back], y], 2) for x, y in zip(everything, again, strict=True))
    assert torch.equal(cache.append_and_attend(*again), attention(again[0], k, v))


def test_rollback_bounds_crop() -> None:
    cache, _ = filled(100, rollback=3)
    cache.crop(2)
    before = snapshot(cache)
    with pytest.raises(
        ValueError, match="KVCache.crop: tokens is 2 with 2 taken back before and must be at most rollback, 3"
    ):
        cache.crop(2)
    assert unchanged(cache, before)
    cache.append(*tokens(2)[1:])
    cache.crop(3)
    assert cache.lengths.tolist() == [99 - 2, 97]


def test_rows_move() -> None:
    cache, (_, k, v) = filled(100)
    query = tokens(1, batch=6)[0]
    cache.reorder(torch.tensor([1, 0]))
    cache.repeat_interleave(3)
    rows = torch.tensor([1, 1, 1, 0, 0, 0])
    assert torch.equal(cache.attend(query), attention(query, k[rows], v[rows]))
    cache.select(torch.tensor([5, 0]))
    assert torch.equal(cache.attend(query[:2]), attention(query[:2], k[[0, 1]], v[[0, 1]]))
    new = tokens(1)
    assert torch.equal(
        cache.append_and_attend(*new),
        attention(new[0], torch.cat([k, new[1]], 2), torch.cat([v, new[2]], 2)),
    )


def test_a_row_that_leaves_takes_its_length_along() -> None:
    cache, everything = filled(100, capacity=120)
    cache.append(*tokens(20)[1:], starts=torch.tensor([0, 20]))
    cache.select(torch.tensor([1]))
    q, k, v = tokens(20, batch=1)
    _, held_k, held_v = (x[1:] for x in everything)
    out = cache.append_and_attend(q, k, v)
    assert isinstance(out, Tensor) and torch.equal(
        out, attention(q, torch.cat([held_k, k], 2), torch.cat([held_v, v], 2))
    )


def test_a_tree_and_its_branch() -> None:
    cache, (_, k, v) = filled(100)
    parents = torch.tensor([-1, 0, 1, -1, 3, 1])
    q, nk, nv = tokens(6)
    out = cache.append_and_attend(q, nk, nv, tree=Tree(parents))
    assert isinstance(out, Tensor)
    path = [0, 1, 5]
    branch = attention(q[:, :, path], torch.cat([k, nk[:, :, path]], 2), torch.cat([v, nv[:, :, path]], 2))
    torch.testing.assert_close(out[:, :, path], branch)
    cache.accept(torch.tensor(path), tokens=6)
    assert cache.lengths.tolist() == [103, 103]
    assert torch.equal(cache.attend(q[:, :, path]), branch)
    with pytest.raises(IndexError, match="KVCache.accept: path must be between 0 and 1"):
        cache.accept(torch.tensor([2]), 2)


@pytest.mark.parametrize("capacity", [None, 200])
def test_saving(capacity: int | None) -> None:
    cache, _ = filled(100, capacity=capacity)
    cache.crop(2)
    other = KVCache(capacity)
    other.load_state_dict(copy.deepcopy(cache.state_dict()))
    new = tokens(150 if capacity is None else 100)
    assert torch.equal(other.append_and_attend(*new), cache.append_and_attend(*new))
    assert torch.equal(other.lengths, cache.lengths)
    empty = KVCache(capacity)
    empty.load_state_dict(KVCache(capacity).state_dict())
    with pytest.raises(ValueError, match="KVCache.attend: the cache is empty"):
        empty.attend(new[0])


Changer = Callable[[dict[str, Any]], Any]
BAD_STATES: dict[str, tuple[type[Exception], str, Changer]] = {
    "type": (TypeError, "state is a list", lambda s: [s]),
    "capacity": (ValueError, "capacity is 5 and must be None", lambda s: s | {"capacity": 5}),
    "version": (ValueError, "version is 3 and must be at most 2", lambda s: s | {"version": 3}),
    "missing": (ValueError, "value is missing", lambda s: {k: x for k, x in s.items() if k != "value"}),
    "key": (ValueError, r"key has shape \[2, 2, 1, 16, 64\]", lambda s: s | {"key": s["key"][:, :, :1]}),
    "rows": (ValueError, r"value has shape \[2, 2, 127, 8\]", lambda s: s | {"value": s["value"][:, :, 1:]}),
    "lengths": (ValueError, "lengths has 200 and must be at most 128", lambda s: s | {"lengths": s["lengths"] + 100}),
    "dtype": (ValueError, "value is torch.float32 on cpu", lambda s: s | {"key": s["key"].double()}),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_refused_state_changes_nothing(name: str) -> None:
    error, words, change = BAD_STATES[name]
    cache, _ = filled()
    before = snapshot(cache)
    with pytest.raises(error, match=f"KVCache.load_state_dict: {words}"):
        cache.load_state_dict(change(filled()[0].state_dict()))
    assert unchanged(cache, before)


Q, K, V = tokens(2)
BAD_CALLS: dict[str, tuple[type[Exception], str, Callable[[KVCache], Any]]] = {
    "heads": (ValueError, "KVCache.append: key has shape", lambda c: c.append(K[:, :1], V)),
    "dtype": (ValueError, "KVCache.append: key is torch.float64", lambda c: c.append(K.double(), V.double())),
    "counts": (ValueError, "value has 1 tokens and key has 2", lambda c: c.append(K, V[:, :, :1])),
    "starts": (ValueError, r"KVCache.append: starts\[0\] is 3", lambda c: c.append(K, V, starts=torch.tensor([3, 0]))),
    "starts-step": (ValueError, r"KVCache.append: starts\[1\] is -1",
                    lambda c: c.append_and_attend(Q, K, V, starts=torch.tensor([0, -1]))),
    "query": (TypeError, "KVCache.attend: query is a list", lambda c: c.append_and_attend([1], K, V)),
    "queries": (ValueError, "KVCache.attend: query has 1 rows and must have 2",
                lambda c: c.append_and_attend(Q[:, :, :1], K, V)),
    "queries-learn": (ValueError, "KVCache.attend: query has 1 rows and must have 2",
                      lambda c: c.append_and_attend(Q[:, :, :1].clone().requires_grad_(), K, V)),
    "softcap": (ValueError, "softcap is -1", lambda c: c.append_and_attend(Q, K, V, softcap=-1.0)),
    "softcap-learn": (ValueError, "softcap is -1",
                      lambda c: c.append_and_attend(Q.clone().requires_grad_(), K, V, softcap=-1.0)),
    "rope": (ValueError, "KVCache.attend: rope has 9 rows",
             lambda c: c.append_and_attend(Q, K, V, rope=rope_tables(9, HEAD_DIM))),
    "name": (TypeError, "unexpected keyword argument 'window'", lambda c: c.append_and_attend(Q, K, V, window=3)),
    "tree": (TypeError, "tree is a int", lambda c: c.append_and_attend(Q, K, V, tree=3)),
    "crop": (ValueError, "KVCache.crop: tokens is 101 and must be at most 100", lambda c: c.crop(101)),
    "reorder": (IndexError, "KVCache.reorder: index", lambda c: c.reorder(torch.tensor([0, 2]))),
    "own": (ValueError, "overlaps", lambda c: c.append_and_attend(
        Q, K, V, sink_logits=c._value.view(-1)[:HEADS])),  # type: ignore[union-attr]
}  # fmt: skip


# What an empty cache takes, or has not.
FILLED_ONLY = {"heads", "dtype", "crop", "reorder", "rope", "own"}


@pytest.mark.parametrize(
    "name, empty",
    [(name, empty) for name in BAD_CALLS for empty in (False, True) if not (empty and name in FILLED_ONLY)],
)
def test_a_refused_call_changes_nothing(name: str, empty: bool) -> None:
    error, words, call = BAD_CALLS[name]
    cache, (q, k, v) = (KVCache(), tokens(100)) if empty else filled(100)
    before = snapshot(cache)
    with pytest.raises(error, match=words):
        call(cache)
    # What was allocated and written behind the rows' ends is no difference.
    assert unchanged(cache, before, but=("_key", "_value"))
    if empty:
        cache.append(k, v)
    assert torch.equal(cache.attend(q), attention(q, k, v))


def test_sizes_are_checked() -> None:
    for arguments, words in (((0,), "capacity is 0"), ((None, -1), "rollback is -1")):
        with pytest.raises(ValueError, match=f"KVCache: {words} and must be at least"):
            KVCache(*arguments)
    with pytest.raises(TypeError, match="KVCache: capacity is a str"):
        KVCache("1")  # type: ignore[arg-type]
    with pytest.raises(MemoryError, match="KVCache.append: capacity is 4611686018427387904 and must fit the memory"):
        KVCache(2**62).append(K, V)


def test_a_query_that_learns() -> None:
    cache, (q, k, v) = filled(100)
    new = tokens(1)
    query = new[0].requires_grad_()
    out = cache.append_and_attend(query, *new[1:])
    assert isinstance(out, Tensor)
    out.sum().backward()
    other = new[0].detach().clone().requires_grad_()
    attention(other, torch.cat([k, new[1]], 2), torch.cat([v, new[2]], 2)).sum().backward()
    assert query.grad is not None and other.grad is not None and torch.equal(query.grad, other.grad)
    out = cache.attend(query)
    cache.append_and_attend(*tokens(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("make", [lambda: KVCache(300), lambda: LambdaKVCache(4, 100)], ids=["full", "lambda"])
def test_a_compiled_step_is_compiled_once(make: Callable[[], Any]) -> None:
    everything = tokens(220)
    cache, plain = make(), make()
    for one in (cache, plain):
        one.append(*part(everything, 0, 200)[1:])
    step = torch.compile(lambda q, k, v: cache.append_and_attend(q, k, v), fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for i in range(200, 220):
        new = part(everything, i, i + 1)
        assert torch.equal(step(*new), plain.append_and_attend(*new))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_a_step_of_a_lambda_cache_is_one_call_and_has_its_bits(isa: str) -> None:
    everything = tokens(400)
    whole = lambda_attention(*everything, sink_size=4, window_size=100)
    cache = LambdaKVCache(4, 100, rollback=10)
    outs = [cache.append_and_attend(*part(everything, 0, 150))]
    outs += [cache.append_and_attend(*part(everything, i, i + 1)) for i in range(150, 400)]
    assert torch.equal(torch.cat([x for x in outs if isinstance(x, Tensor)], 2), whole)


def test_opcheck() -> None:
    cache, _ = filled(100, capacity=130)
    state = cache.state_dict()
    q, k, v = tokens(2)
    held = state["key"], state["value"], state["lengths"]
    arguments = (
        None,
        *rope_tables(200, HEAD_DIM),
        None,
        None,
        None,
        "append",
        "attend",
        "causal",
        [],
        False,
        -1,
        None,
        0.0,
        0,
    )
    torch.library.opcheck(torch.ops.pycore.attention_append, (q, k, v, *held, *arguments))
    torch.library.opcheck(torch.ops.pycore.lambda_cache_append, (*held, k, v, torch.tensor([1, 0]), 0, 130, "append"))


def test_native_face(isa: str) -> None:
    """A step from NumPy arrays, keys by channel and in rows; and what it refuses, before it writes."""
    q, k, v = everything = tokens(300)
    whole = lambda_attention(*everything, sink_size=4, window_size=100)
    for shape in ((2, KV_HEADS, 3, HEAD_DIM, 64), (2, KV_HEADS, 192, HEAD_DIM)):
        held = np.zeros(shape, np.float32), np.zeros((2, KV_HEADS, 192, VALUE_DIM), np.float32), np.zeros(2, np.int64)
        options: dict[str, Any] = {"schedule": "lambda", "schedule_args": [4, 100], "key_ring": 128, "sink_size": 64}
        for i in range(0, 300, 20):
            new = [x[:, :, i : i + 20].numpy() for x in (q, k, v)]
            out, _ = native.attention_append(*new, *held, threads=2, **options)
            assert (out == whole[:, :, i : i + 20].numpy()).all()
        before = [x.copy() for x in held]
        for changed, words in (
            ({"softcap": -1.0}, "softcap is -1"),
            ({"most": 310}, "most is 310 and must be at most the cache's rows, 192"),
            ({"most": 190}, "with which a row would have 320, and must leave it with at most 190"),
            ({"key_lengths": held[2]}, "the cache says where keys are"),
            ({"starts": np.array([0, 21])}, r"starts\[1\] is 21"),
        ):
            with pytest.raises(ValueError, match=f"attention_append: .*{words}"):
                native.attention_append(*new, *held, **options, **changed)
            assert all((a == b).all() for a, b in zip(held, before, strict=True))
        with pytest.raises(ValueError, match="attention_append: query has 1 rows and must have 20, one a token"):
            native.attention_append(new[0][:, :, :1], *new[1:], *held, **options)
        with pytest.raises(ValueError, match="attention_append: out overlaps value_cache"):
            native.attention_append(*new, *held, out=held[1].reshape(-1)[: out.size].reshape(out.shape), **options)


@pytest.mark.parametrize("name", ["sinks", "tile", "rows", "channels", "dims"])
def test_errors_of_tiles(name: str) -> None:
    _, k, v = (x.numpy() for x in tokens(2))
    key, value = (
        np.zeros((2, KV_HEADS, 2, HEAD_DIM, 64), np.float32),
        np.zeros((2, KV_HEADS, 128, VALUE_DIM), np.float32),
    )
    sinks = 0
    if name == "sinks":
        sinks, words = 4, "sink_size is 4 and must be a multiple of 64 where key_cache is in tiles"
    elif name == "tile":
        key, words = key[..., :32].copy(), r"key_cache has shape \[2, 2, 2, 16, 32\] and must be"
    elif name == "rows":
        value, words = value[:, :, :64].copy(), "value_cache has 64 rows and must have 128 like key_cache"
    elif name == "channels":
        k, words = k[..., :8].copy(), "key has 8 channels and must have 16 like key_cache"
    else:
        k, words = k[..., None].copy(), "key has 5 dimensions and must have 4"
    lengths = np.zeros(2, np.int64)
    with pytest.raises(ValueError, match=f"lambda_cache_append: {words}"):
        native.lambda_cache_append(key, value, lengths, k, v, sink_size=sinks)
    assert not key.any() and not value.any() and not lengths.any()


def test_a_state_of_rows_is_taken() -> None:
    """That of a LambdaKVCache as it was kept before: sinks, then the ring, in rows."""
    everything = tokens(400)
    for sinks, seen in ((0, 30), (4, 30), (4, 170), (4, 390), (70, 100), (70, 390)):
        cache = LambdaKVCache(sinks, 100)
        cache.append(*part(everything, 0, seen)[1:])
        ring = 128
        held = [torch.zeros(2, KV_HEADS, sinks + ring, x.shape[3]) for x in everything[1:]]
        for j in range(seen):
            for to, x in zip(held, everything[1:], strict=True):
                to[:, :, j if j < sinks else sinks + j % ring] = x[:, :, j]
        state = {"sink_size": sinks, "window_size": 100, "rollback": 0, "key": held[0], "value": held[1],
                 "lengths": torch.tensor([seen, seen]), "cropped": 0}  # fmt: skip
        other = LambdaKVCache(sinks, 100)
        other.load_state_dict(state)
        for i in range(seen, min(seen + 70, 400)):
            new = part(everything, i, i + 1)
            assert torch.equal(other.append_and_attend(*new), cache.append_and_attend(*new))
