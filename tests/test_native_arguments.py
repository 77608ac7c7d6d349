# SPDX-License-Identifier: Apache-2.0
"""What pycore.native refuses and takes, one rule for every function of it: threads, numbers, arrays that are not what
they seem, results that overlap, memory that is not there; and results after an error.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pycore import BitstreamError, native, ops

ROOT = Path(__file__).resolve().parent.parent
CDF = native.quantize_cdf(np.array([0.5, 0.2, 0.2, 0.1]))
SYMBOLS = np.arange(6000).reshape(3, 2000) % 4
DATA, OFFSETS = native.ac_encode(SYMBOLS, CDF)


def arrays(*shapes: tuple[int, ...]) -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


# ---- threads ---------------------------------------------------------------------------------------------------------

Q, X, W = arrays((1, 2, 300, 16), (200, 70), (90, 70))
OUT, LSE = native.attention(Q, Q, Q)
SEED, ROUND = np.array([3]), np.array(0)
WITH_THREADS: dict[str, Callable[[Any], Any]] = {
    "attention": lambda n: native.attention(Q, Q, Q, threads=n),
    "one query": lambda n: native.attention(Q[:, :, :1], Q, Q, threads=n),
    "attention_backward": lambda n: native.attention_backward(OUT, None, OUT, LSE, Q, Q, Q, threads=n)[:3],
    "attention_blocks": lambda n: native.attention_blocks(
        seed=SEED, round=ROUND, batch=1, heads=2, query_length=3000, key_length=3000, family="constant", parameter=0.5,
        threads=n,
    ),
    "invariant_linear": lambda n: native.invariant_linear(X, W, threads=n),
    "invariant_linear_backward": lambda n: native.invariant_linear_backward(X @ W.T, X, W, threads=n),
    "invariant_linears": lambda n: native.invariant_linears(X, [W, W[:7]], threads=n),
    "rms_norm": lambda n: native.rms_norm(X, W[0], threads=n),
    "rms_norm_backward": lambda n: native.rms_norm_backward(X, X, W[0], threads=n),
    "layer_norm": lambda n: native.layer_norm(X, W[0], W[1], threads=n),
    "layer_norm_backward": lambda n: native.layer_norm_backward(X, X, W[0], threads=n),
    "silu_mul": lambda n: native.silu_mul(X, X, threads=n),
    "silu_mul_backward": lambda n: native.silu_mul_backward(X, X, X, threads=n),
    "gelu_mul": lambda n: native.gelu_mul(X, X, threads=n),
    "gelu_mul_backward": lambda n: native.gelu_mul_backward(X, X, X, "tanh", threads=n),
    "quantize_cdf": lambda n: native.quantize_cdf(X, logits=True, threads=n),
    "ac_encode": lambda n: native.ac_encode(SYMBOLS, CDF, threads=n),
    "ac_decode": lambda n: native.ac_decode(DATA, OFFSETS, CDF, threads=n),
    "ac_encode_logits": lambda n: native.ac_encode_logits(SYMBOLS, X[0, :4], threads=n),
    "ac_encode_bytes": lambda n: native.ac_encode_bytes(SYMBOLS.astype(np.uint8), order=1, threads=n),
    "ac_decode_bytes": lambda n: native.ac_decode_bytes(*native.ac_encode_bytes(SYMBOLS.astype(np.uint8)), threads=n),
    "window_counts": lambda n: native.window_counts(np.abs(X), threads=n),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_THREADS)
def test_any_number_of_threads(isa: str, name: str) -> None:
    def results(threads: Any) -> list[Any]:
        given = WITH_THREADS[name](threads)
        return list(given) if isinstance(given, tuple) else [given]

    expected = results(1)
    for threads in (2**62, 2**63 - 1, np.int64(2**31), 1000, None):
        for x, y in zip(results(threads), expected, strict=True):
            np.testing.assert_array_equal(x, y)
    op = {"one query": "attention"}.get(name, name)
    for threads in (0, -1, -(2**63)):
        with pytest.raises(ValueError, match=f"^{op}: threads is {threads} and must be at least 1$"):
            results(threads)


def test_more_threads_than_processors(threads: None) -> None:
    expected = ops.attention(*map(torch.from_numpy, (Q, Q, Q)))
    torch.set_num_threads(1000)
    assert torch.equal(ops.attention(*map(torch.from_numpy, (Q, Q, Q))), expected)


# ---- numbers ---------------------------------------------------------------------------------------------------------

KEYS = np.zeros((1, 1, 68, 8), np.float32)
NEW = np.ones((1, 1, 3, 8), np.float32)
NUMBERS: dict[str, tuple[str, Callable[[Any], Any], int]] = {
    **{f"{name} threads": ("threads", call, 2) for name, call in WITH_THREADS.items() if name != "one query"},
    "attention distance_limit": ("distance_limit", lambda n: native.attention(Q, Q, Q, distance_limit=n), 5),
    "attention key_ring": ("key_ring", lambda n: native.attention(Q, Q, Q, key_ring=n), 0),
    "attention stream": ("stream", lambda n: native.attention(Q, Q, Q, stream=n), 0),
    "attention schedule_args": (
        "schedule_args", lambda n: native.attention(Q, Q, Q, schedule="lambda", schedule_args=[2, n]), 9,
    ),
    "quantize_cdf precision": ("precision", lambda n: native.quantize_cdf(X[:, :4], logits=True, precision=n), 9),
    "ac_encode lanes": ("lanes", lambda n: native.ac_encode(SYMBOLS, CDF, lanes=n), 2),
    "ac_encode model_id": ("model_id", lambda n: native.ac_encode(SYMBOLS, CDF, model_id=n), 7),
    "ac_decode model_id": (
        "model_id", lambda n: native.ac_decode(*native.ac_encode(SYMBOLS, CDF, model_id=7), CDF, model_id=n), 7,
    ),
    "ac_encode_logits precision": ("precision", lambda n: native.ac_encode_logits(SYMBOLS, X[0, :4], precision=n), 8),
    "ac_encode_bytes order": ("order", lambda n: native.ac_encode_bytes(SYMBOLS.astype(np.uint8), order=n), 1),
    "attention_blocks batch": ("batch", lambda n: blocks(batch=n), 1),
    "attention_blocks heads": ("heads", lambda n: blocks(heads=n), 2),
    "attention_blocks query_length": ("query_length", lambda n: blocks(query_length=n), 300),
    "attention_blocks key_length": ("key_length", lambda n: blocks(key_length=n), 300),
    "attention_blocks block_size": ("block_size", lambda n: blocks(block_size=n), 32),
    "attention_blocks sink_size": ("sink_size", lambda n: blocks(sink_size=n), 3),
    "attention_blocks window_blocks": ("window_blocks", lambda n: blocks(window_blocks=n), 2),
    "attention_blocks blocks_per_row": ("blocks_per_row", lambda n: blocks(blocks_per_row=n), 2),
    "lambda_cache_append sink_size": (
        "sink_size", lambda n: native.lambda_cache_append(KEYS, KEYS.copy(), np.array([0]), NEW, NEW, sink_size=n), 4,
    ),
    "window_encode bits": ("bits", lambda n: step(n), 16),
    "ArithmeticEncoder model_id": ("model_id", lambda n: native.ArithmeticEncoder(model_id=n), 7),
    "ArithmeticDecoder model_id": (
        "model_id",
        lambda n: native.ArithmeticDecoder(native.ArithmeticEncoder(model_id=7).finish(), model_id=n), 7,
    ),
    "ArithmeticDecoder count": ("count", lambda n: decoder().decode(CDF, count=n), 3),
}  # fmt: skip


def blocks(**options: Any) -> Any:
    sizes = {"batch": 1, "heads": 2, "query_length": 300, "key_length": 300, "family": "constant", "parameter": 0.5}
    return native.attention_blocks(seed=SEED, round=ROUND, **{**sizes, **options})


def step(bits: Any) -> Any:
    sums, _ = native.window_counts(np.ones((1, 4)))
    zero = np.zeros(1, np.int64)
    return native.window_encode(sums, zero, zero, np.array([2**16]), zero, bits=bits)


def decoder() -> Any:
    return native.ArithmeticDecoder(DATA[OFFSETS[0] : OFFSETS[1]].tobytes())


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    argument, call, good = NUMBERS[name]
    op = name.partition(" ")[0]
    call(good)
    call(np.int32(good))
    for bad in (True, False, np.True_, np.array(True), torch.tensor(True), 2.0, "2", np.array([1, 2])):
        with pytest.raises(TypeError, match=rf"^{op}: {argument} is an? \w+ and must be an int$"):
            call(bad)
    for bad in (2**64, -(2**70)):
        bound = "less than 2**63" if bad > 0 else "at least -2**63"
        with pytest.raises(ValueError, match=f"^{op}: {argument} is {bad} and must be {re.escape(bound)}$"):
            call(bad)


# ---- arrays that are not what they seem ------------------------------------------------------------------------------

ARRAYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "attention": ("query", lambda x: native.attention(x, Q, Q)),
    "invariant_linear": ("x", lambda x: native.invariant_linear(x, np.ones((3, 16), np.float32))),
    "invariant_linears": ("x", lambda x: native.invariant_linears(x, [np.ones((3, 16), np.float32)])),
    "rms_norm": ("x", lambda x: native.rms_norm(x)),
    "layer_norm": ("x", lambda x: native.layer_norm(x)),
    "silu_mul": ("gate", lambda x: native.silu_mul(x, np.ones((1, 2, 300, 16), np.float32))),
    "quantize_cdf": ("logits", lambda x: native.quantize_cdf(x, logits=True)),
    "window_counts": ("probs", lambda x: native.window_counts(x[0, 0])),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_masked_arrays(name: str) -> None:
    argument, call = ARRAYS[name]
    good = np.abs(Q)
    call(good)
    call(good.view(np.ndarray))
    for masked in (np.ma.masked_array(good, good > 1), np.ma.masked_array(good)):
        with pytest.raises(TypeError, match=rf"^{name}: {argument} is a masked array, .*: call filled\(\)$"):
            call(masked)
    call(np.ma.masked_array(good).filled())


def test_masked_results_and_indices() -> None:
    with pytest.raises(TypeError, match=r"^invariant_linear: out is a masked array"):
        native.invariant_linear(X, W, out=np.ma.zeros((200, 90), np.float32))
    with pytest.raises(TypeError, match=r"^attention: key_lengths is a masked array"):
        native.attention(Q, Q, Q, key_lengths=np.ma.masked_array([3]))
    with pytest.raises(TypeError, match=r"^ac_decode: offsets is a masked array"):
        native.ac_decode(DATA, np.ma.masked_array(OFFSETS), CDF)


@pytest.mark.parametrize("name", ARRAYS)
def test_negated_views(name: str) -> None:
    """Torch notes the sign of z.conj().imag beside the tensor, and its DLPack capsule does not tell."""
    argument, call = ARRAYS[name]
    z = torch.complex(torch.randn(1, 2, 300, 16), -torch.randn(1, 2, 300, 16).abs())
    negated = z.conj().imag
    assert negated.is_neg()
    with pytest.raises(
        ValueError, match=rf"^{name}: {argument} is a view that torch negates .*: call resolve_neg\(\)$"
    ):
        call(negated)
    resolved = call(negated.resolve_neg().contiguous())
    expected = call(-z.imag.contiguous())
    for x, y in zip(*(r if isinstance(r, tuple) else (r,) for r in (resolved, expected)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_tensor_without_memory() -> None:
    with pytest.raises((ValueError, TypeError), match="^rms_norm: x "):
        native.rms_norm(torch._efficientzerotensor((3, 4)))


# ---- results ---------------------------------------------------------------------------------------------------------


def overlapping() -> dict[str, tuple[str, Callable[[], Any]]]:
    buffer = np.zeros(1 << 16, np.float32)

    def at(offset: int, *shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return buffer.view(np.uint8)[4 * offset : 4 * offset + count].view(dtype).reshape(shape)

    q, k = at(0, 1, 2, 20, 8), at(1000, 1, 2, 20, 8)
    x, w, bias = at(0, 30, 8), at(1000, 8, 8), at(2000, 8)
    lengths = at(3000, 1, dtype=np.int64)
    lengths[:] = 20
    out, lse = np.zeros((1, 2, 20, 8), np.float32), np.zeros((1, 2, 20), np.float32)
    cdf, data, offsets = at(0, 5, dtype=np.int32), at(100, len(DATA), dtype=np.uint8), at(40000, 4, dtype=np.int64)
    cdf[:], data[:], offsets[:] = CDF, DATA, OFFSETS
    raw = [at(50000, *a.shape, dtype=a.dtype) for a in native.ac_encode_bytes(SYMBOLS.astype(np.uint8))]
    raw_data, raw_offsets = native.ac_encode_bytes(SYMBOLS.astype(np.uint8))
    raw[0][:] = raw_data
    torch_cdf, sym = np.array([0, 30000, 0], np.uint16), at(60000, 9, dtype=np.int16)
    stream = native.torchac_encode(np.tile(torch_cdf, (9, 1)), np.zeros(9, np.int16))
    rows = at(60001, 9, 3, dtype=np.uint16)
    rows[:] = torch_cdf
    cache, seen = at(4000, 1, 2, 68, 8), at(8000, 1, dtype=np.int64)
    del k, sym
    key = at(1000, 1, 2, 20, 8)
    grads = {"grad_query": (1, 2, 20, 8), "grad_key": (1, 2, 20, 8), "grad_value": (1, 2, 20, 8)}
    backward = {
        f"{name} and {other}": (
            f"attention_backward: {name} overlaps {other}",
            lambda name=name, shape=shape, where=where: native.attention_backward(
                out, None, at(20000, 1, 2, 20, 8), lse, q, key, key, **{name: at(where, *shape)}
            ),
        )
        for (name, shape), (other, where) in zip(
            grads.items(), (("query", 5), ("key", 1100), ("out", 20010)), strict=True
        )
    }
    return {
        **backward,
        "gradients": (
            "attention_backward: grad_value overlaps grad_key",
            lambda: native.attention_backward(
                out,
                None,
                out.copy(),
                lse,
                q,
                key,
                key,
                grad_key=at(9000, 1, 2, 20, 8),
                grad_value=at(9300, 1, 2, 20, 8),
            ),
        ),
        "out and query": ("attention: out overlaps query", lambda: native.attention(q, key, key, out=q)),
        "out and value": (
            "attention: out overlaps key",
            lambda: native.attention(q, key, key, out=at(1319, 1, 2, 20, 8)),
        ),
        "out and lengths": (
            "attention: out overlaps key_lengths",
            lambda: native.attention(q, key, key, key_lengths=lengths, out=at(2800, 1, 2, 20, 8)),
        ),
        "lse and out": (
            "attention: lse overlaps out",
            lambda: native.attention(q, key, key, out=at(9000, 1, 2, 20, 8), lse=at(9319, 1, 2, 20)),
        ),
        "linear": ("invariant_linear: out overlaps x", lambda: native.invariant_linear(x, w, out=at(7, 30, 8))),
        "linear and bias": (
            "invariant_linear: out overlaps bias",
            lambda: native.invariant_linear(x, w, bias, out=at(1900, 30, 8)),
        ),
        "linears": (
            "invariant_linears: out overlaps bias",
            lambda: native.invariant_linears(x, [w], [bias], out=at(1900, 30, 8)),
        ),
        "linear backwards": (
            "invariant_linear_backward: grad_weight overlaps weight",
            lambda: native.invariant_linear_backward(at(5000, 30, 8), x, w, grad_weight=w),
        ),
        "norm": ("rms_norm: out overlaps x", lambda: native.rms_norm(x, out=x)),
        "norm of a reversed array": ("rms_norm: out overlaps x", lambda: native.rms_norm(x[::-1], out=at(1, 30, 8))),
        "layer norm and bias": (
            "layer_norm: out overlaps bias",
            lambda: native.layer_norm(x, bias=bias, out=at(1900, 30, 8)),
        ),
        "gated": ("silu_mul: out overlaps up", lambda: native.silu_mul(at(5000, 30, 8), x, out=x)),
        "gated backwards": (
            "gelu_mul_backward: grad_up overlaps gate",
            lambda: native.gelu_mul_backward(at(5000, 30, 8), x, at(5000, 30, 8), grad_up=x),
        ),
        "norm backwards": (
            "rms_norm_backward: grad_x overlaps grad_out",
            lambda: native.rms_norm_backward(x, at(5000, 30, 8), grad_x=x),
        ),
        "quantize": (
            "quantize_cdf: out overlaps logits",
            lambda: native.quantize_cdf(x, logits=True, out=at(3, 30, 9, dtype=np.int32)),
        ),
        "decode and data": (
            "ac_decode: out overlaps data",
            lambda: native.ac_decode(data, offsets, cdf, out=at(100, 3, 2000, dtype=np.int64)),
        ),
        "decode and cdf": (
            "ac_decode: out overlaps cdf",
            lambda: native.ac_decode(DATA, OFFSETS, cdf, out=at(0, 3, 2000, dtype=np.int64)),
        ),
        "decode bytes": (
            "ac_decode_bytes: out overlaps data",
            lambda: native.ac_decode_bytes(raw[0], raw_offsets, out=at(50000, 3, 2000, dtype=np.uint8)),
        ),
        "torchac": (
            "torchac_decode: out overlaps cdf",
            lambda: native.torchac_decode(rows, stream, out=at(60000, 9, dtype=np.int16)),
        ),
        "caches": (
            "lambda_cache_append: value_cache overlaps key_cache",
            lambda: native.lambda_cache_append(cache, cache, seen, key, key, sink_size=4),
        ),
        "cache and key": (
            "lambda_cache_append: key_cache overlaps key",
            lambda: native.lambda_cache_append(
                cache, cache.copy(), seen, cache[:, :, :5], cache[:, :, :5].copy(), sink_size=4
            ),
        ),
    }


OVERLAPPING = overlapping()


@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlapping_results(name: str) -> None:
    sentence, call = OVERLAPPING[name]
    with pytest.raises(ValueError, match=f"^{sentence} and must have memory of its own$"):
        call()


def test_results_beside_the_inputs() -> None:
    """Parts of one buffer that share no byte are fine, and so are inputs that overlap each other."""
    buffer = np.zeros((2, 30, 8), np.float32)
    buffer[0] = arrays((30, 8))[0]
    expected = native.rms_norm(buffer[0].copy())
    assert native.rms_norm(buffer[0], out=buffer[1]) is not None
    np.testing.assert_array_equal(buffer[1], expected)
    empty = np.zeros((0, 8), np.float32)
    native.rms_norm(empty, out=empty)
    native.attention(Q, Q, Q, out=np.empty_like(Q))


def test_the_torch_face_refuses_overlapping_caches() -> None:
    cache = torch.zeros(1, 2, 68, 8)
    with pytest.raises(ValueError, match="^lambda_cache_append: key_cache overlaps key and must"):
        torch.ops.pycore.lambda_cache_append(
            cache, cache.clone(), torch.zeros(1, dtype=torch.int64), cache[:, :, :5], torch.zeros(1, 2, 5, 8), None, 4
        )


def forge(stream: np.ndarray[Any, Any]) -> None:
    """Puts the checksum of its bytes into a frame: see docs/formats.md."""
    crc = 0xFFFFFFFF
    for byte in (*stream[:4].tolist(), *stream[8:].tolist()):
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    stream[4:8] = np.frombuffer((crc ^ 0xFFFFFFFF).to_bytes(4, "little"), np.uint8)


def test_results_after_an_error() -> None:
    """A fault in the last row leaves the rows before it unwritten."""
    probs = np.ones((4000, 5))
    probs[-1, 2] = -1
    cases: list[tuple[type[Exception], Callable[[Any], Any], Any]] = [
        (ValueError, lambda out: native.quantize_cdf(probs, out=out), np.full((4000, 6), 7, np.int32)),
    ]
    rows = np.tile(CDF, (3, 2000, 1))
    rows[2, 1999] = [0, 70000, 70000, 70000, 65536]
    with_id = native.ac_encode(SYMBOLS, CDF, model_id=1)
    cases.append((ValueError, lambda out: native.ac_decode(*with_id, rows, model_id=1, out=out), np.full((3, 2000), 7)))
    other = native.ac_encode(SYMBOLS[::-1], CDF, model_id=1)
    swapped = np.array(other[0])
    swapped[other[1][2] + 8] ^= 1  # the last stream's checksum of the symbols, under a frame's that holds
    forge(swapped[other[1][2] :])
    cases.append(
        (
            BitstreamError,
            lambda out: native.ac_decode(swapped, other[1], CDF, model_id=1, out=out),
            np.full((3, 2000), 7),
        )
    )
    logits = np.zeros((3, 2000, 4), np.float32)
    coded = native.ac_encode_logits(SYMBOLS, logits, model_id=1)
    bad_logits = logits.copy()
    bad_logits[2, 1999] = np.nan
    cases.append(
        (
            ValueError,
            lambda out: native.ac_decode_logits(*coded, bad_logits, model_id=1, out=out),
            np.full((3, 2000), 7),
        )
    )
    ac_rows = np.tile(np.array([0, 30000, 0], np.uint16), (50, 1))
    stream = native.torchac_encode(ac_rows, np.zeros(50, np.int16))
    cases.append(
        (BitstreamError, lambda out: native.torchac_decode(ac_rows, stream[:-1], out=out), np.full(50, 7, np.int16))
    )
    for error, call, out in cases:
        with pytest.raises(error):
            call(out)
        assert (out == 7).all()


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_no_memory() -> None:
    """A MemoryError in one sentence, in both faces, and never a crash: under a limit on the process's addresses."""
    code = """
import re, resource
import numpy as np, torch
import pycore
from pycore import native, ops
torch.ones(4) @ torch.ones(4)
one, many = np.ones((1, 1), np.float32), 1 << 26
wide = np.broadcast_to(one, (many, 1))
q = np.broadcast_to(np.ones((1, 1, 1, 1), np.float32), (1, 1, 1 << 31, 1))
weight = np.ones((64, 1), np.float32)
symbols = np.broadcast_to(np.zeros((1, 1), np.int64), (1 << 25, 1))
long = np.broadcast_to(np.zeros((1, 1), np.uint8), (1, 1 << 34))
cdf = native.quantize_cdf(np.ones(4))
given = torch.from_numpy
small = np.ones((1, 1, 1, 1), np.float32)
calls = [
    ("attention", lambda: native.attention(q, small, small)),
    ("attention", lambda: ops.attention(torch.ones(1, 1, 1, 1).expand(1, 1, 1 << 31, 1), given(small), given(small))),
    ("invariant_linear", lambda: native.invariant_linear(wide, weight)),
    ("invariant_linear", lambda: ops.invariant_linear(torch.ones(1, 1).expand(many, 1), given(weight))),
    ("rms_norm", lambda: native.rms_norm(np.broadcast_to(one, (1 << 31, 1)))),
    ("rms_norm", lambda: ops.rms_norm(torch.ones(1, 1).expand(1 << 31, 1))),
    ("quantize_cdf", lambda: native.quantize_cdf(np.broadcast_to(np.ones((1, 4)), (1 << 29, 4)))),
    ("quantize_cdf", lambda: ops.quantize_cdf(torch.ones(1, 4).expand(1 << 29, 4))),
    ("ac_encode", lambda: native.ac_encode(symbols, cdf)),
    ("ac_encode", lambda: ops.ac_encode(torch.zeros(1, 1, dtype=torch.int64).expand(1 << 25, 1), given(cdf))),
    ("ac_encode", lambda: ops.ac_encode(torch.zeros(1, 1, dtype=torch.int64).expand(1 << 50, 1), given(cdf))),
    ("ac_encode_bytes", lambda: native.ac_encode_bytes(long)),
    ("ac_encode_bytes", lambda: ops.ac_encode_bytes(torch.zeros(1, 1, dtype=torch.uint8).expand(1, 1 << 34))),
    ("attention_blocks", lambda: native.attention_blocks(
        seed=np.array(1), round=np.array(0), batch=1 << 20, heads=1 << 20, query_length=1 << 20, key_length=1 << 20,
        family="constant", parameter=0.5)),
    ("attention_blocks", lambda: native.attention_blocks(
        seed=np.array(1), round=np.array(0), batch=1, heads=1, query_length=1, key_length=1 << 40, block_size=1,
        family="constant", parameter=0.5)),
    ("pr_block_mask", lambda: ops.pr_block_mask(
        batch=1 << 10, heads=1 << 10, query_blocks=1 << 15, key_blocks=1 << 15, seed=1,
        distance_probs=torch.tensor([0.5], dtype=torch.float64))),
]
limit = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024 + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for op, call in calls:
    try:
        call()
    except MemoryError as error:
        assert re.match(rf"{op}: .* has shape \\[.*\\] and must fit into memory, where it could not be allocated$",
                        str(error)), str(error)
    else:
        raise AssertionError(op)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_more_than_any_memory() -> None:
    """Shapes whose bytes no int64 counts."""
    for dtype in (torch.float32, torch.float64):
        far = torch.ones(1, 1, dtype=dtype).expand(1 << 62, 1)
        sentence = r"x has shape \[4611686018427387904, 1\], which is more than any memory holds$"
        with pytest.raises(ValueError, match=f"^rms_norm: {sentence}"):
            ops.rms_norm(far)
        with pytest.raises(ValueError, match=f"^rms_norm: {sentence}"):
            native.rms_norm(far)


# ---- the instruction set ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["bogus", "AVX2", "avx1024"])
def test_an_instruction_set_that_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way the native module comes in, before there is a function to call."""
    monkeypatch.setenv("PYCORE_CPU_ISA", value)
    for code in (
        "import pycore.native",
        "from pycore.native import rms_norm",
        "import importlib; importlib.import_module('pycore.native')",
        "from pycore import native",
        "import pycore.ops",
    ):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        expected = f"ValueError: PYCORE_CPU_ISA is '{value}' and must be scalar, avx2 or avx512"
        assert done.returncode == 1 and done.stderr.splitlines()[-1] == expected, code
