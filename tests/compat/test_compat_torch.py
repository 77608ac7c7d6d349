# SPDX-License-Identifier: Apache-2.0
"""pycore.compat.torch.scaled_dot_product_attention against torch's function of that name."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pycore.compat.torch import scaled_dot_product_attention
from tests.tolerance import assert_as_accurate

SHAPES = [
    pytest.param((2, 3), (2, 3), id="four-dimensions"),
    pytest.param((), (), id="two-dimensions"),
    pytest.param((3,), (3,), id="three-dimensions"),
    pytest.param((2, 2, 3), (2, 2, 3), id="five-dimensions"),
    pytest.param((2, 6), (2, 2), id="gqa"),
]
LENGTHS = [pytest.param(n, m, id=f"{n}x{m}") for n, m in ((1, 1), (65, 65), (5, 130), (130, 5), (1, 70), (70, 1))]


def inputs(
    leading: tuple[int, ...], kv: tuple[int, ...], length: int, keys: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    shapes = ((*leading, length, 16), (*kv, keys, 16), (*kv, keys, 16))
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=lambda c: f"causal={c}")
@pytest.mark.parametrize(("length", "keys"), LENGTHS)
@pytest.mark.parametrize(("leading", "kv"), SHAPES)
def test_values_are_torchs(
    leading: tuple[int, ...], kv: tuple[int, ...], length: int, keys: int, causal: bool, dtype: torch.dtype
) -> None:
    tensors = inputs(leading, kv, length, keys, dtype)
    options = {"is_causal": causal, "enable_gqa": leading != kv}
    out = scaled_dot_product_attention(*tensors, **options)
    plain = functional.scaled_dot_product_attention(*tensors, **options)
    exact = functional.scaled_dot_product_attention(*(x.double() for x in tensors), **options)
    assert out.shape == plain.shape and out.dtype == dtype
    assert_as_accurate(out, exact, plain)


@pytest.mark.parametrize(("length", "keys"), [(40, 70), (70, 40)])
def test_gradients_are_torchs(length: int, keys: int) -> None:
    tensors = [x.requires_grad_() for x in inputs((1, 2), (1, 2), length, keys, torch.float64)]
    weight = torch.randn(1, 2, length, 16, dtype=torch.float64)
    ours = torch.autograd.grad(scaled_dot_product_attention(*tensors, is_causal=True), tensors, weight)
    theirs = torch.autograd.grad(functional.scaled_dot_product_attention(*tensors, is_causal=True), tensors, weight)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)


def test_scale_and_dropout() -> None:
    tensors = inputs((2, 3), (2, 3), 64, 64, torch.float32)
    out = scaled_dot_product_attention(*tensors, scale=0.5)
    torch.testing.assert_close(out, functional.scaled_dot_product_attention(*tensors, scale=0.5))
    dropped = torch.stack([scaled_dot_product_attention(*tensors, dropout_p=0.5) for _ in range(400)])
    assert not torch.equal(dropped[0], dropped[1])
    spread = dropped.std(0) / 400**0.5
    full = functional.scaled_dot_product_attention(*tensors)
    assert ((dropped.mean(0) - full).abs() < 6 * spread + 1e-6).all()


def test_compiles_fullgraph() -> None:
    tensors = inputs((2, 3), (2, 3), 33, 20, torch.float32)
    call = torch.compile(lambda *x: scaled_dot_product_attention(*x, is_causal=True), fullgraph=True)
    assert torch.equal(call(*tensors), scaled_dot_product_attention(*tensors, is_causal=True))


def test_errors() -> None:
    query, key, value = inputs((2, 4), (2, 2), 8, 8, torch.float32)
    start = "^scaled_dot_product_attention: "
    with pytest.raises(ValueError, match=start + "attn_mask is given and must be None"):
        scaled_dot_product_attention(query, query, query, torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=start + "key has 2 heads and query has 4; they must be equal without"):
        scaled_dot_product_attention(query, key, value)
    with pytest.raises(ValueError, match=start + "key has 3 dimensions and query has 4; they must be equal"):
        scaled_dot_product_attention(query, key[0], value)
    with pytest.raises(ValueError, match=start + "query has 1 dimensions and must have at least 2"):
        scaled_dot_product_attention(query[0, 0, 0], key, value)
    with pytest.raises(TypeError, match=start + "value is a list and must be a Tensor"):
        scaled_dot_product_attention(query, query, [])
    with pytest.raises(ValueError, match=start + r"batch dimensions are \[1\] and \[2\]"):
        scaled_dot_product_attention(query, query[:1], query)
