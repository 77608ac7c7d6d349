# SPDX-License-Identifier: Apache-2.0
"""LambdaKVCache: the bits of attention over everything, at a constant size, in whatever chunks the tokens come."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pycore
from pycore import LambdaKVCache
from pycore.ops import lambda_attention
from pycore.positions import rope_tables

BATCH, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 2, 4, 2, 40, 24
LENGTH = 700


def tokens(length: int = LENGTH, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Query, key and value."""
    return (
        torch.randn(batch, HEADS, length, HEAD_DIM).to(dtype),
        torch.randn(batch, KV_HEADS, length, HEAD_DIM).to(dtype),
        torch.randn(batch, KV_HEADS, length, VALUE_DIM).to(dtype),
    )


def whole(q: Tensor, k: Tensor, v: Tensor, cache: LambdaKVCache, **options: Any) -> Tensor:
    out = lambda_attention(q, k, v, sink_size=cache.sink_size, window_size=cache.window_size, **options)
    assert isinstance(out, Tensor) and not out.isnan().any()
    return out


def fed(cache: LambdaKVCache, q: Tensor, k: Tensor, v: Tensor, sizes: list[int], **options: Any) -> Tensor:
    """Attention in chunks of these sizes, with single tokens to the end."""
    outs, at = [], 0
    for size in sizes + [1] * (q.shape[2] - sum(sizes)):
        cache.append(k[:, :, at : at + size], v[:, :, at : at + size])
        outs.append(cache.attend(q[:, :, at : at + size], **options))
        at += size
    return torch.cat(outs, dim=2)


CHUNKS: dict[str, list[int]] = {
    "one": [LENGTH],
    "prompt": [300],
    "single tokens": [],
    "chunks": [13, 64, 1, 100, 7, 129, 200],
    "second turn": [200, *[1] * 40, 250, *[1] * 40],
    "ring at once": [2, 70, 70, 70],
}


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(("sinks", "window", "rollback"), [(4, 100, 0), (70, 64, 30), (0, 1, 0), (3, 129, 64)])
def test_same_bits(sizes: list[int], sinks: int, window: int, rollback: int, isa: str) -> None:
    q, k, v = tokens()
    cache = LambdaKVCache(sinks, window, rollback)
    options = {"rope": rope_tables(window + 64, HEAD_DIM)}
    assert torch.equal(fed(cache, q, k, v, sizes, **options), whole(q, k, v, cache, **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01])},
        {"alibi_slopes": torch.linspace(0, 1, 4 * BATCH).view(BATCH, 4)},
        {"distance_bias": torch.randn(HEADS, 90), "softcap": 5.0, "scale": 0.3},
        {"sink_logits": torch.randn(HEADS), "rope": rope_tables(264, 24), "distance_limit": 200, "interleaved": True},
    ],
    ids=["plain", "alibi", "alibi-of-rows", "bias", "rope"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        options = {
            name: x.double() if isinstance(x, Tensor) else tuple(t.double() for t in x) if name == "rope" else x
            for name, x in options.items()
        }
    q, k, v = tokens(400, dtype=dtype)
    cache = LambdaKVCache(5, 80, 3)
    assert torch.equal(fed(cache, q, k, v, [150, 3, 77], **options), whole(q, k, v, cache, **options))


def test_lse() -> None:
    q, k, v = tokens(300)
    cache = LambdaKVCache(5, 80)
    cache.append(k, v)
    _, lse = cache.attend(q[:, :, -1:], return_lse=True)
    expected = lambda_attention(q, k, v, sink_size=5, window_size=80, return_lse=True)[1]
    assert torch.equal(lse, expected[:, :, -1:])


def padded_turns(rollback: int = 0) -> tuple[LambdaKVCache, list[Tensor], tuple[Tensor, ...], list[Tensor]]:
    """Three turns of a left-padded batch; the rows' own queries, keys and values."""
    q, k, v = tokens(900, batch=3)
    cache = LambdaKVCache(4, 100, rollback)
    turns = [(350, (0, 17, 350)), (20, (3, 0, 5)), (300, (0, 299, 100)), *[(1, (0, 0, 0))] * 30]
    mine: list[tuple[list[Tensor], ...]] = [([], [], []) for _ in range(3)]
    outs: list[list[Tensor]] = [[], [], []]
    at = 0
    for size, starts in turns:
        chunk = [x[:, :, at : at + size] for x in (q, k, v)]
        for b, start in enumerate(starts):
            for kept, x in zip(mine[b], chunk, strict=True):
                kept.append(x[b : b + 1, :, start:].clone())
            for x in chunk[1:]:
                x[b, :, :start] = torch.nan  # padding is never read
        cache.append(chunk[1], chunk[2], starts=torch.tensor(starts))
        out = cache.attend(chunk[0])
        for b, start in enumerate(starts):
            outs[b].append(out[b : b + 1, :, start:])
        at += size
    return cache, [torch.cat(o, dim=2) for o in outs], (), [tuple(torch.cat(x, dim=2) for x in m) for m in mine]


def test_padded_rows_are_as_if_alone() -> None:
    cache, outs, _, mine = padded_turns()
    assert cache.lengths.tolist() == [x[0].shape[2] for x in mine]
    for out, (q, k, v) in zip(outs, mine, strict=True):
        assert torch.equal(out, whole(q, k, v, cache))


def test_keys_and_values() -> None:
    cache, _, _, mine = padded_turns()
    keys, values = cache.keys(), cache.values()
    assert keys.shape == (3, KV_HEADS, 104, HEAD_DIM) and values.shape == (3, KV_HEADS, 104, VALUE_DIM)
    for b, (_, k, v) in enumerate(mine):
        for held, given in ((keys, k), (values, v)):
            kept = torch.cat([given[0, :, :4], given[0, :, max(4, given.shape[2] - 100) :]], dim=1)
            assert torch.equal(held[b, :, : kept.shape[1]], kept)
            assert not held[b, :, kept.shape[1] :].any()


def test_constant_size() -> None:
    q, k, v = tokens()
    cache = LambdaKVCache(4, 100, 28)
    cache.append(k[:, :, :10], v[:, :, :10])
    held = cache.nbytes
    assert held == BATCH * KV_HEADS * (64 + 128) * (HEAD_DIM + VALUE_DIM) * 4  # sinks are whole tiles
    cache.append(k[:, :, 10:600], v[:, :, 10:600])
    assert cache.nbytes > held  # the chunk, which its own queries still need
    cache.attend(q[:, :, 10:600])
    assert cache.nbytes == held
    for i in range(600, 650):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        assert cache.nbytes == held


@pytest.mark.parametrize("taken", [[5], [20], [1, 19], [7, 13], [0]])
@pytest.mark.parametrize("before", [30, 150, 400])
def test_crop(taken: list[int], before: int) -> None:
    """Speculation: tokens that were wrong leave again, and the bits are as if they had never come."""
    q, k, v = tokens()
    cache = LambdaKVCache(4, 100, 20)
    cache.append(k[:, :, :before], v[:, :, :before])
    at = before
    for n in taken:
        wrong = torch.full((BATCH, KV_HEADS, n, HEAD_DIM), 3.0), torch.full((BATCH, KV_HEADS, n, VALUE_DIM), 1e3)
        cache.append(*wrong)
        cache.crop(n)
        assert cache.lengths.tolist() == [at] * BATCH
        expected = whole(q, k, v, cache)
        for size in (1, 3, 20):  # the ring serves rollback + 1 queries at once
            cache.append(k[:, :, at : at + size], v[:, :, at : at + size])
            assert torch.equal(cache.attend(q[:, :, at : at + size]), expected[:, :, at : at + size])
            at += size


def test_crop_limits() -> None:
    _, k, v = tokens(300)
    cache = LambdaKVCache(4, 100, 10)
    cache.append(k[:, :, :200], v[:, :, :200])
    cache.crop(6)
    with pytest.raises(ValueError, match="tokens is 5 with 6 taken back before and must be at most rollback, 10"):
        cache.crop(5)
    cache.append(k[:, :, 194:195], v[:, :, 194:195])
    cache.crop(5)
    assert cache.lengths.tolist() == [190] * BATCH
    with pytest.raises(ValueError, match="tokens is 11"):
        LambdaKVCache(4, 100, 10).crop(11) if cache.lengths is None else cache.crop(11)
    short = LambdaKVCache(4, 100, 10)
    short.append(k[:, :, :3], v[:, :, :3])
    with pytest.raises(ValueError, match="tokens is 4 and must be at most 3, a row's length"):
        short.crop(4)
    short.crop(3)
    assert short.lengths.tolist() == [0, 0]


def test_rows_chosen() -> None:
    """Beam search: rows move and repeat, and each goes on as if it had its history to itself."""
    q, k, v = tokens(330, batch=3)
    cache = LambdaKVCache(4, 100)
    cache.append(k[:, :, :300], v[:, :, :300])
    history = torch.tensor([0, 1, 2])
    moves = [("reorder", [2, 0, 0]), ("reorder", [1, 1, 2]), ("select", [2, 0]), ("repeat_interleave", 2)]
    for n, (method, argument) in enumerate(moves):
        index = torch.tensor([0, 0, 1, 1] if isinstance(argument, int) else argument)
        getattr(cache, method)(argument if isinstance(argument, int) else index)
        history = history[index]
        at = 300 + n
        cache.append(k[history, :, at : at + 1], v[history, :, at : at + 1])
        out = cache.attend(q[history, :, at : at + 1])
        assert torch.equal(out, whole(q, k, v, cache)[history, :, at : at + 1])


def test_saved_and_loaded() -> None:
    q, k, v = tokens(320)
    first = LambdaKVCache(4, 100, 8)
    first.append(k[:, :, :300], v[:, :, :300])
    first.crop(2)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = LambdaKVCache(4, 100, 8)
    second.load_state_dict(state)
    with pytest.raises(ValueError, match="with 2 taken back before"):
        second.crop(7)
    second.append(k[:, :, 298:320], v[:, :, 298:320])
    assert torch.equal(second.attend(q[:, :, -1:]), whole(q, k, v, second)[:, :, -1:])
    with pytest.raises(ValueError, match="window_size is 100 and must be 99"):
        LambdaKVCache(4, 99, 8).load_state_dict(state)
    del state["lengths"]
    with pytest.raises(ValueError, match="lengths is missing"):
        second.load_state_dict(state)
    empty = LambdaKVCache(4, 100, 8)
    second.load_state_dict(empty.state_dict())
    with pytest.raises(ValueError, match="the cache is empty"):
        second.keys()


def test_compiled_decoding() -> None:
    """64 steps of decoding, across the ring's end, in at most two compilations."""
    q, k, v = tokens(264)
    cache = LambdaKVCache(4, 100)
    rope = rope_tables(164, HEAD_DIM)
    cache.append(k[:, :, :200], v[:, :, :200])
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal compiled
        compiled += 1
        return torch._inductor.compile(graph, inputs)

    @torch.compile(backend=backend, fullgraph=True)
    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.append(key, value)
        out = cache.attend(query * 1.0, rope=rope)
        assert isinstance(out, Tensor)
        return out + 0.0

    expected = whole(q, k, v, cache, rope=rope)
    for i in range(200, 264):
        assert torch.equal(step(*(x[:, :, i : i + 1] for x in (q, k, v))), expected[:, :, i : i + 1])
    assert 1 <= compiled <= 2
    assert cache.lengths.tolist() == [264] * BATCH


def test_opcheck() -> None:
    _, k, v = tokens(30)
    cache = LambdaKVCache(4, 100)
    cache.append(k, v)
    state = cache.state_dict()
    for starts in (None, torch.tensor([3, 0])):
        torch.library.opcheck(
            torch.ops.pycore.lambda_cache_append, (state["key"], state["value"], state["lengths"], k, v, starts, 64)
        )


def test_native_face(isa: str) -> None:
    """The same cache from NumPy arrays."""
    q, k, v = (x.numpy() for x in tokens(500))
    key_cache = np.zeros((BATCH, KV_HEADS, 4 + 128, HEAD_DIM), np.float32)
    value_cache = np.zeros((BATCH, KV_HEADS, 4 + 128, VALUE_DIM), np.float32)
    lengths = np.zeros(BATCH, np.int64)
    starts = np.array([5, 0])
    for begin, end in ((0, 300), (300, 301), (301, 330)):
        pycore.native.lambda_cache_append(
            key_cache, value_cache, lengths, k[:, :, begin:end], v[:, :, begin:end],
            starts if begin == 0 else None, sink_size=4, threads=2,
        )  # fmt: skip
        if begin > 0:
            out, _ = pycore.native.attention(
                q[:, :, begin:end], key_cache, value_cache, schedule="lambda", schedule_args=[4, 100],
                key_lengths=lengths, key_ring=128,
            )  # fmt: skip
            expected, _ = pycore.native.attention(
                q[:, :, begin:end], k[:, :, :end], v[:, :, :end], schedule="lambda", schedule_args=[4, 100],
                key_starts=starts,
            )  # fmt: skip
            assert np.array_equal(out, expected)
    assert lengths.tolist() == [325, 330]


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    """The bits of that device's attention over everything, and the values of the CPU's."""
    q, k, v = tokens()
    rope = rope_tables(164, HEAD_DIM)
    expected = fed(LambdaKVCache(4, 100), q, k, v, [300, 5, 100], rope=rope)
    on_gpu = [x.cuda() for x in (q, k, v)]
    gpu_rope = (rope[0].cuda(), rope[1].cuda())
    cache = LambdaKVCache(4, 100)
    out = fed(cache, *on_gpu, [300, 5, 100], rope=gpu_rope)
    assert torch.equal(out, whole(*on_gpu, cache, rope=gpu_rope))
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_threads(threads: None) -> None:
    q, k, v = tokens(600)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        cache = LambdaKVCache(4, 300)
        results.append(fed(cache, q, k, v, [500]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_strided_and_expanded_inputs() -> None:
    q, k, v = tokens(200)
    cache = LambdaKVCache(4, 100)
    cache.append(k.transpose(1, 2).contiguous().transpose(1, 2), v.transpose(2, 3).contiguous().transpose(2, 3))
    assert torch.equal(cache.attend(q[:, :, -1:]), whole(q, k, v, cache)[:, :, -1:])
    shared = LambdaKVCache(4, 100)
    shared.append(k[:1].expand(BATCH, -1, -1, -1), v[:1].expand(BATCH, -1, -1, -1))
    assert torch.equal(shared.attend(q[:, :, -1:])[0], cache.attend(q[:, :, -1:])[0])


def test_reset_and_empty_chunks() -> None:
    q, k, v = tokens(200)
    cache = LambdaKVCache(4, 100)
    cache.append(k[:, :, :0], v[:, :, :0])
    assert cache.lengths.tolist() == [0, 0] and cache.keys().shape == (BATCH, KV_HEADS, 0, HEAD_DIM)
    assert cache.attend(q[:, :, :0]).shape == (BATCH, HEADS, 0, VALUE_DIM)
    cache.append(k, v)
    assert torch.equal(cache.attend(q), whole(q, k, v, cache))
    cache.reset()
    cache.append(k[:1].double(), v[:1].double())
    assert cache.keys().dtype == torch.float64


def test_gradients_do_not_flow() -> None:
    q, k, v = tokens(20)
    k.requires_grad_()
    cache = LambdaKVCache(4, 100)
    cache.append(k, v)
    assert not cache.attend(q).requires_grad and not cache.keys().requires_grad


def filled() -> tuple[LambdaKVCache, tuple[Tensor, ...]]:
    q, k, v = tokens(200)
    cache = LambdaKVCache(4, 100, 2)
    cache.append(k, v)
    return cache, (q, k, v)


def test_errors_of_sizes() -> None:
    for arguments, words in (
        ((-1, 5), "LambdaKVCache: sink_size is -1 and must be at least 0"),
        ((1, 0), "LambdaKVCache: window_size is 0 and must be at least 1"),
        ((1, 5, -2), "LambdaKVCache: rollback is -2 and must be at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            LambdaKVCache(*arguments)
    with pytest.raises(TypeError, match="LambdaKVCache: window_size is a float and must be an int"):
        LambdaKVCache(1, 5.0)  # type: ignore[arg-type]


def test_errors_of_append() -> None:
    cache, (_, k, v) = filled()
    before = {name: x.clone() if isinstance(x, Tensor) else x for name, x in cache.state_dict().items()}
    one = slice(0, 1)
    cases: list[tuple[type[Exception], tuple[Any, Any], dict[str, Any], str]] = [
        (TypeError, (k.numpy(), v), {}, "key is a ndarray and must be a Tensor"),
        (ValueError, (k[0], v), {}, "key has 3 dimensions and must have 4"),
        (ValueError, (k[:1], v[:1]), {}, r"key has shape \[1, 2, 200, 40\] and must be \[2, 2, tokens, 40\]"),
        (ValueError, (k, v[..., :7]), {}, r"value has shape \[2, 2, 200, 7\] and must be \[2, 2, tokens, 24\]"),
        (ValueError, (k.double(), v), {}, "key is torch.float64 on cpu and must be torch.float32 on cpu"),
        (ValueError, (k[:, :, one], v[:, :, :2]), {}, "value has 2 tokens and key has 1; they must be equal"),
        (TypeError, (k, v), {"starts": [0, 1]}, "starts is a list and must be a Tensor"),
        (ValueError, (k[:, :, one], v[:, :, one]), {"starts": torch.tensor([0, 2])}, r"starts\[1\] is 2 and must be"),
        (ValueError, (k[:, :, one], v[:, :, one]), {"starts": torch.tensor([0, -1])}, r"starts\[1\] is -1"),
        (ValueError, (k[:, :, one], v[:, :, one]), {"starts": torch.zeros(3, dtype=torch.int64)}, r"starts is int64"),
        (ValueError, (k[:, :, one], v[:, :, one]), {"starts": torch.zeros(2)}, r"starts is float32 \["),
    ]  # fmt: skip
    for error, arguments, keywords, words in cases:
        with pytest.raises(error, match=words):
            cache.append(*arguments, **keywords)
    for name, x in cache.state_dict().items():
        assert torch.equal(x, before[name]) if isinstance(x, Tensor) else x == before[name]
    fresh = LambdaKVCache(4, 100)
    with pytest.raises(ValueError, match="key_cache is int64 and must be float32"):
        fresh.append(k.long(), v.long())
    with pytest.raises(ValueError, match="the cache is empty"):
        fresh.attend(k)


def test_errors_of_attend() -> None:
    cache, (q, _, _) = filled()
    with pytest.raises(ValueError, match="query has 200 rows and may have 29: a longer chunk can be attended to once"):
        cache.attend(q[:, :, -1:])
        cache.attend(q)
    cache, (q, k, v) = filled()
    with pytest.raises(ValueError, match="query has 201 rows and may have 200, one for each token appended last"):
        cache.attend(torch.cat([q, q[:, :, :1]], dim=2))
    with pytest.raises(TypeError, match="LambdaKVCache.attend: query is a NoneType and must be a Tensor"):
        cache.attend(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LambdaKVCache.attend: distance_limit is 50 and must be at least window_size"):
        cache.attend(q[:, :, :1], distance_limit=50)
    with pytest.raises(ValueError, match="LambdaKVCache.attend: rope has 100 rows and must have 164"):
        cache.attend(q[:, :, :1], rope=rope_tables(100, HEAD_DIM))


def test_errors_of_choosing() -> None:
    cache, _ = filled()
    with pytest.raises(TypeError, match="LambdaKVCache.reorder: index is a list and must be a Tensor"):
        cache.reorder([0, 1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LambdaKVCache.reorder: index has 3 entries and must have 2"):
        cache.reorder(torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=r"LambdaKVCache.select: index is torch.float32 \[2\] and must be int64"):
        cache.select(torch.zeros(2))
    with pytest.raises(IndexError, match="LambdaKVCache.select: index must be between 0 and 1"):
        cache.select(torch.tensor([2]))
    with pytest.raises(ValueError, match="repeats is 0 and must be at least 1"):
        cache.repeat_interleave(0)
    with pytest.raises(ValueError, match="tokens is -1 and must be at least 0"):
        cache.crop(-1)


def test_errors_of_a_ring() -> None:
    """The op itself, where the cache cannot get it wrong."""
    q, k, v = (x.numpy() for x in tokens(132))
    good: dict[str, Any] = {
        "schedule": "lambda", "schedule_args": [4, 100], "key_lengths": np.array([500, 20]), "key_ring": 128,
    }  # fmt: skip
    pycore.native.attention(q[:, :, :29], k, v, **good)
    for changed, words in (
        ({"key_ring": 100}, "key_ring is 100 and must be a multiple of 64"),
        ({"key_ring": -64}, "key_ring is -64 and must be a multiple of 64"),
        ({"key_ring": 192}, "key has length 132 and must have room for a ring of 192 and 4 sinks"),
        ({"schedule_args": [5, 100]}, "must have room for a ring of 128 and 5 sinks"),
        ({"schedule_args": [4, 101]}, "key_ring is 128 and must hold the windows of 29 queries, each of 101"),
        ({"schedule": "causal", "schedule_args": []}, 'key_ring is given with schedule "causal"'),
        ({"key_lengths": None}, "key_ring comes with key_lengths, and without key_starts and key_offset"),
        ({"key_starts": np.array([0, 0])}, "key_ring comes with key_lengths, and without"),
        ({"key_lengths": np.array([-1, 0])}, r"key_lengths\[0\] is -1 and must be between 0 and"),
    ):
        with pytest.raises(ValueError, match=words):
            pycore.native.attention(q[:, :, :29], k, v, **{**good, **changed})
