# SPDX-License-Identifier: Apache-2.0
"""pycore.native.attention and attention_backward: the torch op's bits, for NumPy arrays and DLPack tensors."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pycore.ops
from pycore import native
from pycore.schedules import KeySubset, Tree
from tests.support.attention_inputs import lengths, qkv, tables

# The op's arguments between value and op, in the schema's order.
TENSORS = (
    "rope_cos", "rope_sin", "distance_bias", "alibi_slopes", "sink_logits", "key_starts", "key_lengths", "key_offset",
    "query_lengths", "schedule_tensor", "dropout_seed", "block_bias",
)  # fmt: skip
COS, SIN = tables(90, 8)
BIAS, SINKS = torch.linspace(-1, 1, 48).view(4, 12), torch.tensor([0.5, -1.0, 3.0, 0.0])
CALLS: dict[str, dict[str, Any]] = {
    "causal": {},
    "lambda": {
        "schedule": "lambda", "schedule_args": [3, 9], "distance_limit": 9, "rope_cos": COS, "rope_sin": SIN,
        "interleaved": True, "alibi_slopes": SINKS.abs(),
    },
    "prefix": {"schedule": "prefix", "schedule_tensor": lengths(20, 3), "distance_bias": BIAS},
    "segments": {"schedule": "segments", "schedule_args": [0], "schedule_tensor": lengths(0, 9, 30, 41)},
    "key-subset": {
        "schedule": "key_subset", "schedule_args": [1], "schedule_tensor": lengths(0b1011 << 30, 7)[:, None],
        "rope_cos": COS, "rope_sin": SIN,
    },
    "tree": {
        "schedule": "tree", "rope_cos": COS, "rope_sin": SIN, "distance_limit": 9, "distance_bias": BIAS,
        "schedule_tensor": torch.tensor([[[-1, 0, 1], [0, 1, 3], [0, 1, 5], [2, 2, 13], [-1, 0, 16]]]),
    },
    "options": {
        "schedule": "full", "distance_bias": BIAS, "sink_logits": SINKS, "softcap": 3.0, "scale": 0.4,
        "dropout_p": 0.3, "dropout_seed": lengths(77), "key_lengths": lengths(41, 30), "query_lengths": lengths(9, 35),
    },
}  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def op_arguments(options: dict[str, Any]) -> tuple[Any, ...]:
    numbers = {
        "schedule": "causal", "schedule_args": [], "interleaved": False, "distance_limit": -1, "scale": 16**-0.5,
        "softcap": 0.0, "dropout_p": 0.0,
    }  # fmt: skip
    assert set(options) <= {*TENSORS, *numbers}
    return *[options.get(name) for name in TENSORS], "attention", *[options.get(k, x) for k, x in numbers.items()]


def same(array: Any, tensor: Tensor) -> bool:
    return torch.equal(array if isinstance(array, Tensor) else torch.from_dlpack(array), tensor)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CALLS)
def test_the_bits_of_the_torch_op(name: str, dtype: torch.dtype, threads: int, isa: str) -> None:
    """Forward and backward, of DLPack tensors, into given arrays."""
    inputs, options = qkv(2, 4, 2, 35, 41, 16, 8, dtype=dtype), CALLS[name]
    out, lse = torch.ops.pycore.attention(*inputs, *op_arguments(options))
    given = torch.empty_like(out), torch.empty_like(lse)
    native.attention(*inputs, **options, out=given[0], lse=given[1], threads=threads)
    assert same(given[0], out) and same(given[1], lse)
    grads = torch.randn_like(out), torch.randn_like(lse)
    wants = "distance_bias" in options, "sink_logits" in options
    expected = torch.ops.pycore.attention_backward(*grads, out, lse, *wants, *inputs, *op_arguments(options))[:5]
    results = native.attention_backward(*grads, out, lse, *inputs, **options, threads=threads)
    assert len(results) == 5
    for x, y, wanted in zip(results, expected, (True, True, True, *wants), strict=True):
        assert same(x, y) if wanted else x is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy(dtype: Any) -> None:
    q, k, v = (x.numpy().astype(dtype) for x in qkv(1, 4, 2, 5, 9, 16))
    table_dtype = np.float64 if dtype == np.float64 else np.float32
    sinks, bias = SINKS.numpy().astype(table_dtype), BIAS.numpy().astype(table_dtype)
    out, lse = native.attention(q, k, v, sink_logits=sinks, distance_bias=bias)
    assert isinstance(out, np.ndarray) and out.dtype == dtype and lse.dtype == table_dtype
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    options = {"sink_logits": torch.from_numpy(sinks), "distance_bias": torch.from_numpy(bias)}
    expected = torch.ops.pycore.attention(*tensors, *op_arguments(options))
    assert same(out, expected[0]) and same(lse, expected[1])
    given = {"grad_bias": np.empty_like(bias), "grad_sink_logits": np.empty_like(sinks)}
    grads = native.attention_backward(out, None, out, lse, q, k, v, sink_logits=sinks, distance_bias=bias, **given)
    assert grads[3] is given["grad_bias"] and grads[4] is given["grad_sink_logits"]
    wanted = torch.ops.pycore.attention_backward(
        expected[0], None, *expected, True, True, *tensors, *op_arguments(options)
    )[:5]
    assert all(same(x, y) for x, y in zip(grads, wanted, strict=True))


BAD: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "unknown": (TypeError, {"window": 3}, "there is no argument 'window'"),
    "type": (TypeError, {"softcap": "3"}, "softcap is a str, which it cannot be"),
    "schedule-args": (TypeError, {"schedule_args": 3}, "schedule_args is a int, which it cannot be"),
    "distance-limit": (ValueError, {"distance_limit": -1}, "distance_limit is -1 and must be at least 0"),
    "bias": (
        ValueError,
        {"distance_bias": BIAS[:3]},
        "distance_bias has shape [3, 12] and must be [heads, n], with 4 heads",
    ),
    "seed": (ValueError, {"dropout_p": 0.5}, "dropout_seed must be one int64 number"),
    "tensor": (ValueError, {"schedule": "prefix"}, 'schedule "prefix" takes one tensor'),
    "key-subset-shape": (
        ValueError,
        {"schedule": "key_subset", "schedule_args": [1], "schedule_tensor": lengths(1, 2)},
        "schedule's tensor has 1 dimensions and must have 2: [1 or batch, words of 64 positions]",
    ),
    "key-subset-dtype": (
        ValueError,
        {"schedule": "key_subset", "schedule_args": [1], "schedule_tensor": torch.zeros(1, 1)},
        "schedule's tensor is float32 and must be int64",
    ),
    "key-subset-stride": (
        ValueError,
        {"schedule": "key_subset", "schedule_args": [1], "schedule_tensor": lengths(1, 2, 3, 4)[None, ::2]},
        "schedule's tensor must be contiguous",
    ),
    "tree-shape": (
        ValueError,
        {"schedule": "tree", "schedule_tensor": torch.zeros(1, 70, 3, dtype=torch.int64)},
        "schedule's tensor has shape [1, 70, 3] and must be [1 or batch, 70, 4]",
    ),
    "tree-depth": (
        ValueError,
        {"schedule": "tree", "schedule_tensor": torch.tensor([[[-1, 0, 1], [0, 2, 3]]])},
        "schedule's tensor has, at node 1 of row 0, another depth or other ancestors than its parents give",
    ),
    "tree-ancestors": (
        ValueError,
        {"schedule": "tree", "schedule_tensor": torch.tensor([[[-1, 0, 1], [0, 1, 2]]])},
        "schedule's tensor has, at node 1 of row 0, another depth or other ancestors than its parents give",
    ),
    "softcap": (ValueError, {"softcap": -2.0}, "softcap is -2 and must be finite and at least 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str) -> None:
    error, options, message = BAD[name]
    inputs = qkv(1, 4, 2, 5, 9, 16)
    with pytest.raises(error, match=f"^{re.escape(f'attention: {message}')}$"):
        native.attention(*inputs, **options)
    out, lse = native.attention(*inputs)
    with pytest.raises(error, match=f"^{re.escape(f'attention_backward: {message}')}$"):
        native.attention_backward(out, None, out, lse, *inputs, **options)


def test_bitmaps_from_numpy() -> None:
    """As the documentation makes them: numpy.packbits, eight bytes a word."""
    q, k, v = (x.numpy() for x in qkv(1, 4, 2, 5, 150, 16))
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    mask = np.random.default_rng(0).random(150) < 0.2
    bits = np.zeros(192, dtype=bool)
    bits[:150] = mask
    words = np.packbits(bits, bitorder="little").view(np.int64)[None]
    out, _ = native.attention(q, k, v, schedule="key_subset", schedule_args=[1], schedule_tensor=words)
    assert same(out, pycore.ops.attention(*tensors, schedule=KeySubset(torch.from_numpy(mask))))
    parents = np.array([-1, 0, 0, 2, -1])
    nodes = np.zeros((1, 5, 3), dtype=np.int64)
    for node, parent in enumerate(parents):
        depth, ancestors = nodes[0, parent, 1:] + [1, 0] if parent >= 0 else (0, 0)
        nodes[0, node] = parent, depth, ancestors | 1 << node
    out, _ = native.attention(q, k, v, schedule="tree", schedule_tensor=nodes)
    assert same(out, pycore.ops.attention(*tensors, schedule=Tree(torch.from_numpy(parents))))


def test_gradients_of_tables_that_are_not_there() -> None:
    inputs = qkv(1, 4, 2, 5, 9, 16)
    out, lse = native.attention(*inputs)
    for name in ("grad_bias", "grad_sink_logits"):
        with pytest.raises(TypeError, match=f"^attention_backward: there is no argument '{name}'$"):
            native.attention_backward(out, None, out, lse, *inputs, **{name: torch.empty(4)})


@pytest.mark.parametrize("function", ["attention", "attention_backward"])
def test_the_stub_names_the_keywords(function: str) -> None:
    """The module takes **kwargs, so only the stub tells which: each is taken, whatever becomes of its value."""
    tree = ast.parse((Path(pycore.__file__).parent / "native.pyi").read_text())
    (stub,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    keywords = {argument.arg for argument in stub.args.kwonlyargs}
    assert {*TENSORS, "schedule", "schedule_args", "softcap", "dropout_p", "threads", "stream"} <= keywords
    inputs = qkv(1, 4, 2, 5, 9, 16)
    out, lse = native.attention(*inputs)
    first = () if function == "attention" else (out, None, out, lse)
    tables_given = {} if function == "attention" else {"distance_bias": BIAS, "sink_logits": SINKS}
    for name in keywords:
        options = tables_given | {name: None} if not name.startswith("grad_") else tables_given
        getattr(native, function)(*first, *inputs, **options)


def test_small_integers_and_gaps_are_copied() -> None:
    """Lengths, boundaries and tables as NumPy users hold them: int32, every other element, expanded, transposed."""
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 2, 2, 9, 8), dtype=np.float32)
    table, slopes = rng.standard_normal((2, 5), dtype=np.float32), rng.random(2, dtype=np.float32)
    ends, bounds = np.array([5, 9]), np.array([0, 4, 9])
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"key_lengths": ends}, {"key_lengths": ends.astype(np.int32)}),
        ({"key_lengths": ends}, {"key_lengths": np.repeat(ends, 3)[::3]}),
        ({"key_starts": np.array([3, 3])}, {"key_starts": np.broadcast_to(np.uint8(3), 2)}),
        ({"alibi_slopes": slopes}, {"alibi_slopes": np.repeat(slopes, 2)[::2]}),
        ({"sink_logits": slopes}, {"sink_logits": np.repeat(slopes, 2)[::2]}),
        ({"distance_bias": table}, {"distance_bias": np.asfortranarray(table)}),
    ]
    for plain, given in pairs:
        assert np.array_equal(
            native.attention(query, key, value, **given)[0], native.attention(query, key, value, **plain)[0]
        )
    segments = {"schedule": "segments", "schedule_args": [1]}
    wanted = native.attention(query, key, value, schedule_tensor=bounds, **segments)[0]
    narrow = native.attention(query, key, value, schedule_tensor=bounds.astype(np.int16), **segments)[0]
    assert np.array_equal(narrow, wanted)
    with pytest.raises(ValueError, match="is int32 and must be int64"):  # words of bits are no numbers
        words = {"schedule": "key_subset", "schedule_args": [1], "schedule_tensor": np.ones((1, 1), np.int32)}
        native.attention(query, key, value, **words)
    with pytest.raises(TypeError, match="masked array"):
        native.attention(query, key, value, key_lengths=np.ma.masked_array(ends, [0, 1]))
