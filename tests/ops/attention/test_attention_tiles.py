# SPDX-License-Identifier: Apache-2.0
"""Keys by channel within tiles of 64 tokens: the bits of the same keys in rows, in every call that takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pycore import native
from pycore.ops import attention
from pycore.ops.attention_call import AttentionOptions, call_attention
from pycore.ops.key_tiles import rows_of_tiles, tiles_of_rows
from pycore.positions import alibi_slopes, rope_tables
from pycore.schedules import Causal, Constant, Full, KeySubset, Lambda, Probabilistic, Schedule, Tree

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = {
    "decode": (2, 4, 2, 1, 200, 32, 24),
    "decode-long": (1, 8, 2, 1, 1500, 128, 128),
    "decode-odd": (1, 3, 3, 1, 65, 37, 5),
    "one-key": (1, 2, 1, 1, 1, 16, 16),
    "whole-tiles": (1, 6, 1, 1, 128, 16, 16),
    "chunk": (2, 4, 1, 3, 190, 32, 16),
    "prefill": (1, 4, 2, 150, 150, 40, 16),
    "one-channel": (1, 2, 1, 2, 70, 1, 1),
    "no-keys": (1, 2, 1, 2, 0, 8, 8),
    "no-queries": (1, 2, 1, 0, 70, 8, 8),
    "no-batch": (0, 2, 1, 1, 70, 8, 8),
}


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, queries, keys, dim, value_dim = shape
    generator = torch.Generator().manual_seed(7)
    sizes = ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim))
    q, k, v = (torch.randn(batch, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return q, k, v


def tiles(key: Tensor) -> Tensor:
    """With NaN where no key is."""
    laid, keys = tiles_of_rows(key), key.shape[2]
    if keys % 64:
        laid[:, :, -1, :, keys % 64 :] = torch.nan
    return laid


def same(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> None:
    rows = attention(query, key, value, return_lse=True, **options)
    laid = attention(query, tiles(key), value, return_lse=True, key_layout="tiles", **options)
    for a, b in zip(rows, laid, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_bits(name: str, dtype: torch.dtype, isa: str) -> None:
    same(*problem(SHAPES[name], dtype))


OPTIONS: dict[str, dict[str, Any]] = {
    "rope": {"rope": rope_tables(300, 32)},
    "rope-limit": {"rope": rope_tables(100 + 64, 32), "distance_limit": 100},
    "rope-interleaved": {"rope": rope_tables(300, 32), "interleaved": True},
    "rope-part": {"rope": rope_tables(300, 24)},
    "rope-part-limit": {"rope": rope_tables(70 + 64, 12), "distance_limit": 70, "interleaved": True},
    "alibi": {"alibi_slopes": alibi_slopes(4), "softcap": 5.0},
    "sinks": {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "lengths": {"key_lengths": torch.tensor([130, 0]), "query_lengths": torch.tensor([1, 0])},
    "full": {"schedule": Full()},
    "window": {"schedule": Lambda(5, 70)},
    "probabilistic": {"schedule": Probabilistic(Constant(0.5), seed=3, block_size=16, sink_size=2)},
    "subset": {"schedule": KeySubset(torch.arange(200) % 3 == 0)},
}


@pytest.mark.parametrize("queries", [1, 2, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_bits_with_options(name: str, dtype: torch.dtype, queries: int, isa: str) -> None:
    options = dict(OPTIONS[name])
    if dtype == torch.float64:
        wide = {"rope": lambda x: tuple(t.double() for t in x), "alibi_slopes": Tensor.double,
                "sink_logits": Tensor.double}  # fmt: skip
        options = {key: wide[key](x) if key in wide else x for key, x in options.items()}
    same(*problem((2, 4, 2, queries, 200, 32, 24), dtype), **options)


def test_a_tree_stands_at_its_depths(isa: str) -> None:
    parents = torch.tensor([-1, 0, 1, -1, 3, 1])
    for rope in (None, rope_tables(300, 32)):
        same(*problem((1, 4, 2, 6, 197, 32, 16)), schedule=Tree(parents), rope=rope)


@pytest.mark.parametrize("queries", [1, 20])
def test_strides_say_where_tiles_lie(queries: int, isa: str) -> None:
    q, k, v = problem((2, 4, 2, queries, 200, 32, 16))
    wide = torch.full((2, 3, 6, 40, 128), torch.nan)
    view = wide[:, :2, 1:5, 4:36, :64]
    view.copy_(tiles(k))
    assert torch.equal(attention(q, view, v, key_layout="tiles"), attention(q, k, v))
    turned = tiles(k).mT.contiguous().mT  # by token: copied
    assert torch.equal(attention(q, turned, v, key_layout="tiles"), attention(q, k, v))


@pytest.mark.parametrize("rows_before", [64, 128])
@pytest.mark.parametrize("sinks", [0, 5, 64])
def test_a_ring_of_tiles(sinks: int, rows_before: int, isa: str) -> None:
    """Position j in column j of the tiles before the ring, or in column j modulo the ring behind them."""
    q, k, v = problem((1, 4, 2, 3, 700, 32, 16))
    ring, window = 192, 150
    position = torch.arange(700)
    row = torch.where(position < rows_before, position, rows_before + position % ring)
    held_key, held_value = (
        torch.full((1, 2, rows_before + ring, 32), torch.nan),
        torch.zeros(1, 2, rows_before + ring, 16),
    )
    for j in range(700):
        held_key[:, :, row[j]], held_value[:, :, row[j]] = k[:, :, j], v[:, :, j]
    lengths = torch.tensor([700])
    options = AttentionOptions(rope=rope_tables(window + 64, 32), distance_limit=window)
    expected = call_attention("test", q, k, v, Lambda(sinks, window), options)
    options = options._replace(key_lengths=lengths)
    for layout, key in (("rows", held_key), ("tiles", tiles_of_rows(held_key))):
        assert torch.equal(
            call_attention("test", q, key, held_value, Lambda(sinks, window), options, ring, layout), expected
        )


def test_gradients_are_those_of_rows() -> None:
    q, k, v = problem((2, 4, 2, 5, 150, 16, 8))
    rows = [x.clone().requires_grad_() for x in (q, k, v)]
    laid = [x.clone().requires_grad_() for x in (q, tiles_of_rows(k), v)]
    grad = torch.randn(2, 4, 5, 8)
    attention(*rows).backward(grad)
    attention(*laid, key_layout="tiles").backward(grad)
    assert laid[1].grad is not None and rows[1].grad is not None
    assert torch.equal(rows_of_tiles(laid[1].grad, 150), rows[1].grad)
    for place in (0, 2):
        a, b = rows[place].grad, laid[place].grad
        assert a is not None and b is not None and torch.equal(a, b)


def test_tangents_are_those_of_rows() -> None:
    q, k, v = problem((1, 2, 1, 3, 100, 8, 8))
    moving = torch.randn_like(k)
    _, rows = torch.func.jvp(lambda key: attention(q, key, v), (k,), (moving,))
    laid, move = tiles_of_rows(k), tiles_of_rows(moving)
    _, by_tiles = torch.func.jvp(lambda key: attention(q, key, v, key_layout="tiles"), (laid,), (move,))
    assert torch.equal(rows, by_tiles)


def test_transforms() -> None:
    q, k, v = problem((3, 4, 2, 2, 100, 16, 8))
    laid = tiles_of_rows(k)
    mapped = torch.vmap(lambda a, b, c: attention(a[None], b[None], c[None], key_layout="tiles")[0])(q, laid, v)
    assert torch.equal(mapped, attention(q, k, v))
    compiled = torch.compile(lambda *x: attention(*x, key_layout="tiles"), fullgraph=True, dynamic=True)
    for keys in (100, 130, 70):
        q, k, v = problem((3, 4, 2, 2, keys, 16, 8))
        assert torch.equal(compiled(q, tiles_of_rows(k), v), attention(q, k, v))


def test_opcheck() -> None:
    q, k, v = problem((1, 4, 2, 2, 100, 16, 8))
    for laid in (tiles_of_rows(k), tiles_of_rows(k).requires_grad_()):
        torch.library.opcheck(
            torch.ops.pycore.attention.default,
            (q, laid, v, *[None] * 12, "attention", "causal", [], False, -1, None, 0.0, 0.0),
            {"key_layout": "tiles"},
        )


def test_native() -> None:
    q, k, v = (x.numpy() for x in problem((1, 4, 2, 2, 100, 16, 8)))
    laid = tiles_of_rows(torch.from_numpy(k)).numpy()
    for a, b in zip(native.attention(q, k, v), native.attention(q, laid, v, key_layout="tiles"), strict=True):
        assert (a == b).all()
    with pytest.raises(ValueError, match='attention_backward: key_layout is "tiles" and must be "rows"'):
        out, lse = native.attention(q, k, v)
        native.attention_backward(out, None, out, lse, q, laid, v, key_layout="tiles")


Q, K, V = problem((1, 4, 2, 2, 100, 16, 8))
LAID = tiles_of_rows(K)
ERRORS: dict[str, tuple[type[Exception], str, tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = {
    "name": (ValueError, 'key_layout is "columns" and must be "rows" or "tiles"', (Q, K, V), {"key_layout": "columns"}),
    "type": (TypeError, "key_layout is a int and must be a str", (Q, K, V), {"key_layout": 1}),
    "dims": (ValueError, "key has 4 dimensions and must have 5", (Q, K, V), {}),
    "rows": (ValueError, "key has 5 dimensions and must have 4", (Q, LAID, V), {"key_layout": "rows"}),
    "tiles": (ValueError, r"key has shape \[1, 2, 1, 16, 64\] and must have 2 tiles of 64 for value's length 100",
              (Q, LAID[:, :, :1], V), {}),
    "tile": (ValueError, "and must have 2 tiles of 64", (Q, LAID[..., :32], V), {}),
    "channels": (ValueError, "key has head_dim 15 and query has 16", (Q, LAID[:, :, :, 1:], V), {}),
    "heads": (ValueError, "their first two dimensions must be equal", (Q, LAID[:, :1], V), {}),
    "channel-stride": (ValueError, "key's channels have stride 0 and must have a positive one",
                       (Q, LAID[:, :, :, :1].expand(-1, -1, -1, 16, -1), V), {}),
    "dtype": (ValueError, "key is float64 and must be float32", (Q, LAID.double(), V), {}),
    "starts": (ValueError, 'key_starts is given with key_layout "tiles"', (Q, LAID, V),
               {"key_starts": torch.tensor([1])}),
    "offset": (ValueError, 'key_offset is given with key_layout "tiles"', (Q, LAID, V),
               {"key_offset": torch.tensor([1])}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    error, words, tensors, options = ERRORS[name]
    with pytest.raises(error, match=words):
        attention(*tensors, **({"key_layout": "tiles"} | options))


def test_a_ring_begins_at_a_tile() -> None:
    options = AttentionOptions(key_lengths=torch.tensor([100]))
    key, value = torch.zeros(1, 2, 3, 16, 64), torch.zeros(1, 2, 132, 8)
    schedule: Schedule = Lambda(4, 60)
    with pytest.raises(
        ValueError, match="key has length 132 and must have a multiple of 64 rows before a ring of tiles"
    ):
        call_attention("test", Q, key, value, schedule, options, 128, "tiles")
    with pytest.raises(ValueError, match="key_ring is given with schedule"):
        call_attention("test", Q, key, value, Causal(), options, 64, "tiles")
