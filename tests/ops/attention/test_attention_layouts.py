# SPDX-License-Identifier: Apache-2.0
"""What attention takes as it comes: strided and expanded tables and lengths, smaller integers, tables of halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pycore
from pycore.ops import attention, lambda_attention, pr_flash_attention
from pycore.schedules import Constant, KeySubset, Prefix, Segments, Tree
from tests.support.attention_inputs import lengths, qkv, tables

B, H, N, D = 2, 4, 19, 8
INPUTS = qkv(B, H, 2, N, N, D)
TABLES: dict[str, Tensor] = {
    "sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0]),
    "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]),
    "distance_bias": torch.randn(H, 7, generator=torch.Generator().manual_seed(1)),
}


def apart(x: Tensor) -> Tensor:
    """The same numbers, every second of a longer row."""
    return torch.stack([x, torch.full_like(x, 99)], dim=-1).flatten(-2)[..., ::2]


def expanded(x: Tensor) -> Tensor:
    """The first entry of the last dimension, over and over, without memory for it."""
    return x[..., :1].expand(x.shape)


def turned(x: Tensor) -> Tensor:
    """A transposed matrix."""
    return x.t().contiguous().t()


@pytest.mark.parametrize("layout", [apart, expanded], ids=["apart", "expanded"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_in_any_layout(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    """Values and gradients, to the bit, of a table that lies closely."""
    results = []
    for place in (layout, lambda x: layout(x).contiguous()):
        leaves = [x.requires_grad_() for x in (*(x.clone() for x in INPUTS), TABLES[name].clone())]
        out = attention(*leaves[:3], **{name: place(leaves[3])})
        wanted = leaves[:3] if name == "alibi_slopes" else leaves
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_transposed_and_strided_distance_bias() -> None:
    bias = TABLES["distance_bias"]
    wanted = attention(*INPUTS, distance_bias=bias)
    for given in (turned(bias), torch.cat([bias, bias], 1)[:, :7], bias[:, None].expand(H, 2, 7)[:, 1]):
        assert torch.equal(attention(*INPUTS, distance_bias=given), wanted)


@pytest.mark.parametrize("layouts", [(turned, turned), (turned, torch.clone), (apart, torch.clone), (apart, turned)])
def test_rope_in_any_layout(layouts: tuple[Callable[[Tensor], Tensor], ...]) -> None:
    """Also where cos and sin do not lie alike."""
    cos, sin = tables(N, D)
    wanted = attention(*INPUTS, rope=(cos, sin))
    rope = layouts[0](cos), layouts[1](sin)
    assert torch.equal(attention(*INPUTS, rope=rope), wanted)


LENGTHS = {
    "key_lengths": lengths(17, 19), "key_starts": lengths(3, 1), "key_offset": lengths(5, 9),
    "query_lengths": lengths(4, 19),
}  # fmt: skip
SCHEDULES: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "prefix": (Prefix, lengths(4, 0)),
    "segments": (Segments, lengths(0, 5, 11, 19)),
    "segments-of-rows": (Segments, torch.stack([lengths(0, 5, 19), lengths(0, 7, 18)])),
    "keys": (KeySubset, lengths(0, 2, 3, 11)),
    "keys-of-rows": (KeySubset, lengths(0, 2, 3, 11).view(2, 2)),
    "tree": (Tree, lengths(-1, 0, 0, 1)),
}
SMALLER = [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32]


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_in_any_layout_and_integer_dtype(name: str) -> None:
    numbers = LENGTHS[name]
    wanted = attention(*INPUTS, **{name: numbers})
    for given in (apart(numbers), *(numbers.to(dtype) for dtype in SMALLER), apart(numbers.int())):
        assert torch.equal(attention(*INPUTS, **{name: given}), wanted)
    same = numbers[:1].expand(B)
    assert torch.equal(attention(*INPUTS, **{name: same}), attention(*INPUTS, **{name: same.clone()}))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_in_any_layout_and_integer_dtype(name: str) -> None:
    schedule, numbers = SCHEDULES[name]
    wanted = attention(*INPUTS, schedule=schedule(numbers))
    signed = [dtype for dtype in SMALLER if name != "tree" or dtype.is_signed]
    for given in (apart(numbers), *(numbers.to(dtype) for dtype in signed), apart(numbers.int())):
        assert torch.equal(attention(*INPUTS, schedule=schedule(given)), wanted)


def test_seeds_and_rounds_in_any_layout_and_integer_dtype() -> None:
    q, k, v = qkv(B, H, 2, 90, 90, D)
    seed, ends = lengths(3, 4), lengths(70, 90)
    options: dict[str, Any] = {"distance_probs": Constant(0.5), "block_size": 16}
    wanted = pr_flash_attention(q, k, v, **options, seed=seed, round=2, key_lengths=ends)
    for change in (apart, Tensor.int, lambda x: apart(x.int())):
        given = {"seed": change(seed), "round": change(torch.tensor([2]))[0], "key_lengths": change(ends)}
        out = pr_flash_attention(q, k, v, **options, **given)
        assert torch.equal(out, wanted)


def test_starts_of_a_cache() -> None:
    q, k, v = qkv(B, H, 2, N, N, D)
    results = []
    for starts in (lengths(3, 0), apart(lengths(3, 0)), torch.tensor([3, 0], dtype=torch.int32)):
        cache = pycore.LambdaKVCache(1, 8)
        cache.append(k, v, starts=starts)
        results.append(cache.attend(q[:, :, -1:]))
    assert all(torch.equal(results[0], x) for x in results[1:])


# ---- tables in half precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*TABLES, "rope"])
def test_half_tables_beside_half_queries(name: str, dtype: torch.dtype) -> None:
    """As a model in one dtype holds them: their own numbers, widened, and gradients in their dtype."""
    q, k, v = (x.to(dtype) for x in qkv(B, H, 2, N, N, D))
    if name == "rope":
        cos, sin = (x.to(dtype) for x in tables(N, D))
        out = attention(q, k, v, rope=(cos, sin))
        assert torch.equal(out, attention(q, k, v, rope=(cos.float(), sin.float())))
        return
    table = TABLES[name].to(dtype).requires_grad_()
    wide = table.detach().float().requires_grad_()
    out, wanted = (attention(q, k, v, **{name: x}) for x in (table, wide))
    assert torch.equal(out, wanted)
    if name != "alibi_slopes":
        grad, wide_grad = (torch.autograd.grad(x.sum(), y)[0] for x, y in ((out, table), (wanted, wide)))
        assert grad.dtype == dtype and torch.equal(grad, wide_grad.to(dtype))


@pytest.mark.parametrize("name", [*TABLES, "rope"])
def test_half_tables_under_autocast(name: str) -> None:
    inputs = qkv(B, H, 2, N, N, D)
    given: Any = tables(N, D) if name == "rope" else TABLES[name]
    half: Any = tuple(x.bfloat16() for x in given) if name == "rope" else given.bfloat16()
    wide: Any = tuple(x.float() for x in half) if name == "rope" else half.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(*inputs, **{name: half}), attention(*inputs, **{name: wide}))
    with pytest.raises(ValueError, match="^attention: .* is bfloat16 and must be float32$"):
        attention(*inputs, **{name: half})


@pytest.mark.parametrize("name", ["alibi_slopes", "distance_bias"])
def test_half_tables_beside_middle_tokens(name: str) -> None:
    q, k, v = (x.bfloat16() for x in qkv(B, H, 2, 1, 90, D))
    half = TABLES[name].bfloat16()
    options: dict[str, Any] = {"sink_size": 2, "window_size": 16, "middle_topk": 5}
    out, wanted = (lambda_attention(q, k, v, **options, **{name: x}) for x in (half, half.float()))
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64], ids=str)
def test_autocast_casts_floating_point_alone(dtype: torch.dtype) -> None:
    """What is no query without autocast is none with it."""
    inputs = qkv(B, H, 2, 3, 3, D)
    for place, name in enumerate(("query", "key", "value")):
        changed = [x.to(dtype) if n == place else x for n, x in enumerate(inputs)]
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=f"^attention: {name} "):
            attention(*changed)
