# SPDX-License-Identifier: Apache-2.0
"""pycore.compat.torch.scaled_dot_product_attention against torch's function of that name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pycore.compat.torch import scaled_dot_product_attention
from pycore.ops import attention
from tests.support.tolerance import assert_as_accurate

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


COMPILED = {
    "gqa": lambda q, k, v: ((q, k, v[:, :2]), {"enable_gqa": True}),
    "shared": lambda q, k, v: ((q, k[0, :1], v[0, 0]), {"is_causal": True}),
    "no-channels": lambda q, k, v: ((q[..., :0], k[:, :1, :, :0], v[:, :1]), {}),
    "all-dropped": lambda q, k, v: ((q, k, v), {"dropout_p": 1.0, "enable_gqa": True}),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", COMPILED)
def test_compiles_fullgraph(kind: str, dynamic: bool) -> None:
    """With batches, lengths and a scale that change."""
    torch._dynamo.reset()
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, length, keys, scale in ((2, 33, 20, 0.3), (3, 40, 21, 0.5), (4, 41, 37, 0.25)):
        query, key, value = inputs((batch, 6), (1, 3), length, keys, torch.float32)
        tensors, options = COMPILED[kind](query, key, value)
        out = compiled(*tensors, **options, scale=scale)
        assert torch.equal(out, scaled_dot_product_attention(*tensors, **options, scale=scale))


BROADCASTS = [  # query, key, value, options
    pytest.param((1, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 6), {}, id="one-query-batch"),
    pytest.param((3, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 6), {}, id="one-key-batch"),
    pytest.param((3, 4, 5, 8), (3, 4, 7, 8), (1, 4, 7, 6), {}, id="one-value-batch"),
    pytest.param((3, 4, 5, 8), (3, 1, 7, 8), (3, 1, 7, 6), {}, id="one-key-head"),
    pytest.param((3, 1, 5, 8), (3, 4, 7, 8), (3, 1, 7, 6), {}, id="one-query-head"),
    pytest.param((3, 4, 5, 8), (4, 7, 8), (4, 7, 6), {}, id="key-in-three-dimensions"),
    pytest.param((4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 6), {}, id="query-in-three-dimensions"),
    pytest.param((3, 4, 5, 8), (7, 8), (3, 4, 7, 6), {}, id="key-in-two-dimensions"),
    pytest.param((5, 8), (3, 7, 8), (7, 6), {}, id="query-in-two-dimensions"),
    pytest.param((2, 1, 4, 5, 8), (3, 4, 7, 8), (1, 3, 1, 7, 6), {}, id="five-dimensions"),
    pytest.param((2, 6, 5, 8), (2, 3, 7, 8), (2, 2, 7, 6), {"enable_gqa": True}, id="other-value-heads"),
    pytest.param((2, 4, 5, 8), (2, 4, 7, 8), (2, 1, 7, 6), {"enable_gqa": True}, id="one-value-head"),
    pytest.param((2, 4, 5, 8), (1, 2, 7, 8), (2, 7, 6), {"enable_gqa": True}, id="gqa-one-key-batch"),
    pytest.param((6, 5, 8), (2, 2, 7, 8), (2, 1, 7, 6), {"enable_gqa": True}, id="gqa-mixed-dimensions"),
    pytest.param((2, 4, 5, 0), (2, 4, 7, 0), (2, 4, 7, 6), {}, id="no-channels"),
    pytest.param((2, 4, 5, 0), (1, 7, 0), (2, 1, 7, 6), {"scale": 0.5}, id="no-channels-broadcast"),
    pytest.param((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 0), {}, id="no-value-channels"),
    pytest.param((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 6), {}, id="no-keys"),
    pytest.param((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 6), {}, id="no-queries"),
    pytest.param((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 6), {}, id="no-batch"),
    pytest.param((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 6), {}, id="no-heads"),
    pytest.param((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6), {"dropout_p": 1.0}, id="everything-dropped"),
    pytest.param((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6), {"dropout_p": 1}, id="everything-dropped-int"),
]


@pytest.mark.parametrize("causal", [False, True], ids=lambda c: f"causal={c}")
@pytest.mark.parametrize("swapped", [False, True], ids=["more-keys", "more-queries"])
@pytest.mark.parametrize(("query", "key", "value", "options"), BROADCASTS)
def test_takes_what_torch_takes(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], options: Any, swapped: bool, causal: bool
) -> None:
    """Values, gradients and shape, in float64. The lengths 5 and 7 are exchanged for `swapped`."""
    lengths = {5: 7, 7: 5} if swapped else {}
    shapes = ((*s[:-2], lengths.get(s[-2], s[-2]), s[-1]) for s in (query, key, value))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    options = options | {"is_causal": causal}
    out = scaled_dot_product_attention(*tensors, **options)
    expected = functional.scaled_dot_product_attention(*tensors, **options)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(x, tensors, weight) for x in (out, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def test_shared_heads_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel sees one key head, and views of batches that are broadcast."""
    seen = []

    def spy(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.extend(tensors)
        return attention(*tensors, **options)

    monkeypatch.setattr("pycore.compat.torch.attention", spy)
    query, key, value = torch.randn(3, 4, 5, 8), torch.randn(1, 1, 7, 8), torch.randn(7, 6)
    scaled_dot_product_attention(query, key, value)
    assert seen[0].data_ptr() == query.data_ptr() and seen[1].data_ptr() == key.data_ptr()
    assert seen[2].data_ptr() == value.data_ptr() and seen[1].shape[1] == seen[2].shape[1] == 1


def refused(*shapes: tuple[int, ...], dtypes: Any = (torch.float32,) * 3, **options: Any) -> str:
    """What is said of a call that torch refuses too. As torch's error it is a RuntimeError, as ours a ValueError."""
    tensors = [torch.ones(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with sdpa_kernel([SDPBackend.MATH]), pytest.raises((RuntimeError, IndexError, NotImplementedError)):
        functional.scaled_dot_product_attention(*tensors, **options)
    with pytest.raises(ValueError, match="^scaled_dot_product_attention: ") as caught:
        scaled_dot_product_attention(*tensors, **options)
    assert isinstance(caught.value, RuntimeError)
    return str(caught.value).removeprefix("scaled_dot_product_attention: ")


@pytest.mark.parametrize("causal", [False, True], ids=lambda c: f"causal={c}")
@pytest.mark.parametrize("keys", [3, 6, 9], ids=lambda n: f"{n}-keys")
def test_other_lengths_of_key_and_value_are_refused(keys: int, causal: bool) -> None:
    for values in (1, keys - 1, keys + 1):
        message = refused((2, 4, 6, 8), (2, 4, keys, 8), (2, 4, values, 8), is_causal=causal)
        assert message == f"value has length {values} and must have key's {keys}"


def test_what_torch_refuses_is_refused() -> None:
    four = (2, 4, 5, 8)
    assert refused((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)) == "key has 2 as its heads and must have 4 or 1"
    assert refused(four, four, (2, 2, 5, 8)) == "value has 2 as its heads and must have 4 or 1"
    gqa = {"enable_gqa": True}
    assert refused(four, (2, 3, 5, 8), (2, 3, 5, 8), **gqa) == "key has 3 heads, which does not divide query's 4"
    assert refused(four, four, (2, 3, 5, 8), **gqa) == "value has 3 heads, which does not divide query's 4"
    assert refused((2, 1, 5, 8), four, four, **gqa) == "key has 4 heads, which does not divide query's 1"
    assert refused((5, 8), (5, 8), (5, 8), **gqa).startswith(
        "query has 2 dimensions and must have at least 3: [..., he"
    )
    assert refused((8,), (5, 8), (5, 8)).startswith("query has 1 dimensions and must have at least 2: [..., length")
    assert refused(four, (8,), (5, 8)).startswith("key has 1 dimensions and must have at least 2")
    assert refused(four, (3, 4, 5, 8), four) == "key has 3 as its batch dimension 0 and must have 2 or 1"
    assert refused((2, 1, 4, 5, 8), (3, 1, 4, 5, 8), four).startswith("key has 3 as its batch dimension 0 and must")
    assert refused(four, (2, 4, 5, 7), four) == "key has head_dim 7 and must have query's 8"
    assert refused(four, (2, 4, 5, 1), four) == "key has head_dim 1 and must have query's 8"
    f32, f16, f64 = torch.float32, torch.float16, torch.float64
    message = refused(four, four, four, dtypes=(f32, f16, f16))
    assert message == "key is float16 and must be float32, as query is"
    message = refused(four, four, four, dtypes=(f32, f32, f64))
    assert message == "value is float64 and must be float32, as query is"
    for dtype in (torch.int64, torch.bool, torch.complex64):
        message = refused(four, four, four, dtypes=(dtype,) * 3)
        assert message.startswith(f"query is {str(dtype)[6:]} and must be float32, float64, float16 or bfloat16")
    assert refused(four, four, four, dropout_p=1.5) == "dropout_p is 1.5 and must be from 0 to 1"


def test_other_errors() -> None:
    query = torch.randn(2, 4, 8, 8)
    start = "^scaled_dot_product_attention: "
    with pytest.raises(ValueError, match=start + "attn_mask is given and must be None"):
        scaled_dot_product_attention(query, query, query, torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(TypeError, match=start + "value is a list and must be a Tensor"):
        scaled_dot_product_attention(query, query, [])
    with pytest.raises(TypeError, match=start + "dropout_p is a str and must be a number"):
        scaled_dot_product_attention(query, query, query, dropout_p="1")
    for p in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=start + f"dropout_p is {p} and must be from 0 to 1"):
            scaled_dot_product_attention(query, query, query, dropout_p=p)
    with pytest.raises(ValueError, match=start + "key is on meta and must be on cpu, as query is"):
        scaled_dot_product_attention(query, query.to("meta"), query)
    nested = torch.nested.as_nested_tensor([query[0], query[1, :, :3]], layout=torch.jagged)
    with pytest.raises(ValueError, match=start + "query .* must be a dense tensor"):
        scaled_dot_product_attention(nested, nested, nested)


def test_autocast_casts_as_torch_does() -> None:
    """Three dtypes become one."""
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product_attention(query, key.half(), key)
        theirs = functional.scaled_dot_product_attention(query, key.half(), key)
    assert out.dtype == theirs.dtype == torch.bfloat16
    cast = [x.bfloat16().double() for x in (query, key.half(), key)]
    assert_as_accurate(out, functional.scaled_dot_product_attention(*cast), theirs)
