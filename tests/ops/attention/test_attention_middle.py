# SPDX-License-Identifier: Apache-2.0
"""middle_topk: the keys between sinks and window that a decoding query scores highest come back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pycore import LambdaKVCache
from pycore.ops import attention, lambda_attention
from pycore.reference import attention as reference
from pycore.schedules import Full, Lambda
from tests.support.attention_inputs import lengths, qkv, tables
from tests.support.tolerance import assert_as_accurate

SINKS, WINDOW, LENGTH = 5, 40, 200
H, HKV, D, DV = 4, 2, 24, 16

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope": {"rope": tables(WINDOW + 64, D)},
    "partial-interleaved": {"rope": tables(WINDOW + 64, 8), "interleaved": True, "scale": 0.7},
    "bias": {"distance_bias": torch.linspace(-2, 2, H * 30).view(H, 30), "softcap": 3.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.01, 0.0]), "sink_logits": torch.tensor([0.0, 1.0, -1.0, 2.0])},
    "alibi-of-rows": {"alibi_slopes": torch.tensor([[0.5, 0.1, 0.01, 0.0], [0.0, 0.3, 0.2, 1.0]]), "softcap": 3.0},
}
some_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def in_float64(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(in_float64(t) for t in x)
    return x.double() if isinstance(x, Tensor) else x


def run(q: Tensor, k: Tensor, v: Tensor, topk: int, **options: Any) -> tuple[Tensor, Tensor]:
    pair = lambda_attention(q, k, v, sink_size=SINKS, window_size=WINDOW, middle_topk=topk, return_lse=True, **options)
    assert isinstance(pair, tuple)
    return pair


def expected(q: Tensor, k: Tensor, v: Tensor, topk: int, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor]:
    if dtype == torch.float64:
        options = {name: in_float64(x) for name, x in options.items()}
    return reference.attention(
        q.to(dtype), k.to(dtype), v.to(dtype), schedule=Lambda(SINKS, WINDOW), distance_limit=WINDOW,
        middle_topk=topk, **options,
    )  # fmt: skip


@some_options
@pytest.mark.parametrize("topk", [1, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values(options: dict[str, Any], topk: int, dtype: torch.dtype, isa: str) -> None:
    q, k, v = (x.to(dtype) for x in qkv(2, H, HKV, 1, LENGTH, D, DV))
    out, lse = run(q, k, v, topk, **options)
    exact_out, exact_lse = expected(q, k, v, topk, torch.float64, **options)
    plain_out, plain_lse = expected(q, k, v, topk, torch.float32, **options)
    assert_as_accurate(out, exact_out, plain_out.to(dtype))
    assert_as_accurate(lse, exact_lse, plain_lse)
    without, _ = run(q, k, v, 0, **options)
    assert not torch.allclose(out, without)


def test_all_the_middle_is_dense_attention() -> None:
    q, k, v = qkv(1, H, HKV, 1, LENGTH, D, DV)
    dense = attention(q, k, v, schedule=Full())
    assert isinstance(dense, Tensor)
    torch.testing.assert_close(run(q, k, v, LENGTH)[0], dense, rtol=1e-5, atol=1e-6)


def test_without_a_middle_the_bits_stay() -> None:
    q, k, v = qkv(2, H, HKV, 1, SINKS + WINDOW, D, DV)
    for mine, plain in zip(run(q, k, v, 3), run(q, k, v, 0), strict=True):
        assert torch.equal(mine, plain)
    none = run(q, k[:, :, :0], v[:, :, :0], 3)
    assert not none[0].any() and (none[1] == -torch.inf).all()


def test_equal_scores_take_the_first() -> None:
    q, _, v = qkv(1, H, HKV, 1, LENGTH, D, DV)
    k = torch.ones(1, HKV, LENGTH, D)
    kept = [*range(SINKS + 7), *range(LENGTH - WINDOW, LENGTH)]
    chosen = attention(q, k[:, :, kept], v[:, :, kept], schedule=Full())
    assert isinstance(chosen, Tensor)
    torch.testing.assert_close(run(q, k, v, 7)[0], chosen, rtol=1e-5, atol=1e-6)


def test_rows_are_as_if_alone() -> None:
    """Padding, static caches and batches do not change a bit, nor which tokens are chosen."""
    q, k, v = qkv(3, H, HKV, 1, LENGTH, D, DV)
    starts, ends = (0, 30, 190), (LENGTH, 150, 195)
    out = run(q, k, v, 6, key_starts=lengths(*starts), key_lengths=lengths(*ends))
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        alone = run(q[b : b + 1], k[b : b + 1, :, start:end], v[b : b + 1, :, start:end], 6)
        for x, y in zip(out, alone, strict=True):
            assert torch.equal(x[b : b + 1], y)


def test_gradients() -> None:
    inputs = [x.double().requires_grad_() for x in qkv(1, 2, 1, 1, 70, 8, 6)]
    rope = tuple(t.double() for t in tables(WINDOW + 64, 8))

    def outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return run(q, k, v, 4, rope=rope)

    assert torch.autograd.gradcheck(outputs, inputs)


def test_compiled() -> None:
    q, k, v = qkv(2, H, HKV, 1, LENGTH, D, DV)
    options = {"sink_size": SINKS, "window_size": WINDOW, "middle_topk": 4}
    compiled = torch.compile(lambda *x: lambda_attention(*x, **options), fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), lambda_attention(q, k, v, **options), rtol=1e-5, atol=1e-6)


def test_on_a_cache() -> None:
    q, k, v = qkv(2, H, HKV, LENGTH, LENGTH, D, DV)
    cache = LambdaKVCache(SINKS, WINDOW, rollback=LENGTH)
    cache.append(k[:, :, :150], v[:, :, :150])
    for i in range(150, LENGTH):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        out = cache.attend(q[:, :, i : i + 1], middle_topk=3)
        assert torch.equal(out, run(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], 3)[0])
    evicting = LambdaKVCache(SINKS, WINDOW)
    evicting.append(k, v)
    with pytest.raises(ValueError, match=f"middle_topk needs the middle tokens, and {LENGTH - 64 - SINKS} have left"):
        evicting.attend(q[:, :, -1:], middle_topk=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"topk": -1}, "lambda_attention: middle_topk is -1 and must be at least 0"),
        ({"topk": 2, "rows": 3}, "lambda_attention: query has length 3 and must have 1 for middle_topk"),
        ({"topk": 2, "distance_limit": 50, **OPTIONS["rope"]}, "distance_limit is 50 and must be window_size, 40"),
        ({"topk": 2, "distance_limit": 50, **OPTIONS["alibi"]}, "distance_limit is 50 and must be window_size, 40"),
    ],
)
def test_errors(options: dict[str, Any], words: str) -> None:
    q, k, v = qkv(1, H, HKV, options.pop("rows", 1), LENGTH, D, DV)
    with pytest.raises(ValueError, match=words):
        run(q, k, v, options.pop("topk"), **options)


def test_type_error() -> None:
    q, k, v = qkv(1, H, HKV, 1, LENGTH, D, DV)
    with pytest.raises(TypeError, match="lambda_attention: middle_topk is a float and must be an int"):
        run(q, k, v, 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["key", "query"])
def test_a_nan_among_the_middle_keys_shows(where: str) -> None:
    """Its score is none, so nothing says that it would not have been chosen: the rows that scored it are NaN."""
    q, k, v = qkv(2, H, HKV, 1, LENGTH, D, DV)
    if where == "key":
        k[1, 0, 100, 3] = torch.nan
    else:
        q[1, :2] = torch.nan
    out, lse = run(q, k, v, 8)
    broken = torch.zeros(2, H, 1, dtype=torch.bool)
    broken[1, :2] = True
    assert torch.equal(out.isnan().any(-1), broken) and torch.equal(lse.isnan(), broken)


def test_infinite_scores_among_the_middle_keys() -> None:
    """A middle key whose score is -inf is still a middle key: no sink and no key of the window takes its place."""
    q, k, v = (x.abs() for x in qkv(1, 1, 1, 1, LENGTH, D, DV))
    k[0, 0, SINKS : LENGTH - WINDOW - 3] = -torch.inf
    out, lse = run(q, k, v, 50)
    kept = torch.cat([torch.arange(SINKS), torch.arange(LENGTH - WINDOW - 3, LENGTH)])
    alone = reference.attention(q, k[:, :, kept], v[:, :, kept], schedule=Full())
    torch.testing.assert_close(out, alone[0] if isinstance(alone, tuple) else alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alibi_slopes_have_their_whole_gradient(dtype: torch.dtype) -> None:
    """That of sinks, window and middle tokens, with the output's bits; against differences in float64."""
    q, k, v = (x.to(dtype) for x in qkv(2, H, HKV, 1, LENGTH, D, DV))
    slopes = torch.tensor([0.5, 0.1, 0.01, 0.0])
    learned = slopes.clone().requires_grad_()
    out, lse = run(q, k, v, 8, alibi_slopes=learned)
    assert torch.equal(out, run(q, k, v, 8, alibi_slopes=slopes)[0])
    weights = torch.randn(out.shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad((out * weights).sum() + lse.sum(), learned)
    wide = [x.double() for x in (q, k, v)]

    def total(x: Tensor) -> Tensor:
        out, lse = run(wide[0], wide[1], wide[2], 8, alibi_slopes=x)
        return (out * weights).sum() + lse.sum()

    step = 1e-6 * torch.eye(H, dtype=torch.float64)
    slope = torch.stack([(total(slopes.double() + d) - total(slopes.double() - d)) / 2e-6 for d in step])
    tolerance = 1e-3 if dtype == torch.float32 else 0.05 * slope.abs().max().item()
    torch.testing.assert_close(grad.double(), slope, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("name", ["plain", "bias", "alibi"])
@pytest.mark.parametrize("batch, keys", [(0, LENGTH), (2, 0), (0, 0)])
def test_middle_tokens_of_nothing(name: str, batch: int, keys: int) -> None:
    leaves = [x.requires_grad_() for x in qkv(batch, H, HKV, 1, keys, D, DV)]
    out, lse = run(leaves[0], leaves[1], leaves[2], 8, **OPTIONS[name])
    assert out.shape == (batch, H, 1, DV) and not out.count_nonzero()
    assert all(x.shape == y.shape for x, y in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True))
