# SPDX-License-Identifier: Apache-2.0
"""Both directions of differentiation through every op, and torch.func's transforms over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from pycore import ops
from pycore.cache import LambdaKVCache
from pycore.compat import torchac
from pycore.ops import attention, gelu_mul, invariant_linear, lambda_attention, layer_norm, rms_norm, silu_mul
from pycore.reference import attention as reference
from pycore.schedules import (
    Causal,
    Full,
    KeySubset,
    Lambda,
    Prefix,
    Probabilistic,
    Segments,
    Tree,
)
from tests.support.allocations import allocations
from tests.support.attention_inputs import Case, qkv, tables
from tests.support.tolerance import assert_as_accurate

F32, F64 = torch.float32, torch.float64


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    deviation = x - x.mean(-1, keepdim=True)
    return deviation * (deviation.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight + bias


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "invariant_linear": (invariant_linear, torch.nn.functional.linear, ((3, 4), (2, 4), (2,))),
    "rms_norm": (rms_norm, plain_norm, ((3, 4), (4,))),
    "layer_norm": (layer_norm, plain_layer_norm, ((3, 4), (4,), (4,))),
    "silu_mul": (silu_mul, lambda gate, up: torch.nn.functional.silu(gate) * up, ((3, 4), (3, 4))),
    "gelu_mul": (gelu_mul, lambda gate, up: torch.nn.functional.gelu(gate) * up, ((3, 4), (3, 4))),
    "attention": (attention, plain_attention, ((2, 1, 3, 4), (2, 1, 3, 4), (2, 1, 3, 2))),
}


def problem(name: str) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The op, the same in plain torch, and inputs and tangents in float64."""
    op, plain, shapes = OPS[name]
    inputs = tuple(torch.randn(shape, dtype=F64) for shape in shapes)
    return op, plain, inputs, tuple(torch.randn_like(x) for x in inputs)


def assert_equal(actual: Any, expected: Any) -> None:
    ours, theirs = tree_leaves(actual), tree_leaves(expected)
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def squared(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: op(*inputs).square().sum()


def mapped(transform: Callable[..., Any]) -> Callable[..., Any]:
    """`transform` of a sample, over samples of the first argument."""
    return lambda op, inputs, tangents: vmap(
        lambda x, t: transform(op, (x, *inputs[1:]), (t, *tangents[1:])),
    )(torch.stack([inputs[0], 2 * inputs[0]]), torch.stack([tangents[0], -tangents[0]]))


def dual(op: Callable[..., Any], inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(op(*map(forward_ad.make_dual, inputs, tangents))))


def places(inputs: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda op, x, t: grad(squared(op), places(x))(*x),
    "vjp": lambda op, x, t: vjp(op, *x)[1](op(*x)),
    "jacrev": lambda op, x, t: jacrev(op, places(x))(*x),
    "jacfwd": lambda op, x, t: jacfwd(op, places(x))(*x),
    "jvp": jvp,
    "dual_level": dual,
    "jvp of one": lambda op, x, t: jvp(lambda y: op(*x[:1], y, *x[2:]), x[1:2], t[1:2]),
    "jvp of the last": lambda op, x, t: jvp(lambda y: op(*x[:-1], y), x[-1:], t[-1:]),
    "vmap of grad": mapped(lambda op, x, t: grad(squared(op), places(x))(*x)),
    "vmap of jvp": mapped(jvp),
    "vmap of jacrev": mapped(lambda op, x, t: jacrev(op)(*x)),
    "jvp of vmap": lambda op, x, t: jvp(
        vmap(lambda y: op(y, *x[1:])), (torch.stack([x[0], -x[0]]),), (torch.stack([t[0], t[0]]),)
    ),
    "grad of vmap": lambda op, x, t: grad(squared(vmap(lambda y: op(y, *x[1:]))))(torch.stack([x[0], -x[0]])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPS)
def test_transforms_of_torch_func(name: str, transform: str) -> None:
    op, plain, inputs, tangents = problem(name)
    run = TRANSFORMS[transform]
    assert_equal(run(op, inputs, tangents), run(plain, inputs, tangents))


@pytest.mark.parametrize("name", OPS)
def test_gradcheck_in_both_directions(name: str) -> None:
    op, _, inputs, _ = problem(name)
    inputs = tuple(x.requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(
        op, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@pytest.mark.parametrize("transform", ["grad", "jvp"])
@pytest.mark.parametrize("name", OPS)
def test_transforms_compile(name: str, transform: str) -> None:
    torch._dynamo.reset()
    op, plain, inputs, tangents = problem(name)
    run = TRANSFORMS[transform]
    compiled = torch.compile(lambda x, t: run(op, x, t), fullgraph=True, backend="aot_eager")
    assert_equal(compiled(inputs, tangents), run(plain, inputs, tangents))


SECOND: dict[str, Callable[..., Any]] = {
    "hessian": lambda f, x: hessian(f)(*x),
    "jacrev of jacrev": lambda f, x: jacrev(jacrev(f))(*x),
    "jvp of grad": lambda f, x: jvp(grad(f), x, x),
    "grad of grad": lambda f, x: grad(lambda *y: grad(f)(*y).sum())(*x),
    "backward twice": lambda f, x: backward_twice(f, tuple(y.clone().requires_grad_() for y in x)),
}


def backward_twice(f: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
    (first,) = torch.autograd.grad(f(*inputs), inputs[:1], create_graph=True)
    return torch.autograd.grad(first.sum(), inputs[:1])


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_are_refused(name: str, way: str) -> None:
    op, _, inputs, _ = problem(name)
    with pytest.raises(NotImplementedError, match=f"^{name}: second derivatives are not available$"):
        SECOND[way](squared(op), inputs)


@pytest.mark.parametrize("name", ["invariant_linear", "rms_norm", "layer_norm"])
def test_second_tangents_of_linear_and_norm(name: str) -> None:
    """Forward over forward goes through plain sums."""
    op, plain, inputs, _ = problem(name)
    assert_equal(jacfwd(jacfwd(squared(op)))(*inputs), jacfwd(jacfwd(squared(plain)))(*inputs))


def test_gradients_can_be_taken_again() -> None:
    """Of one graph, through arguments that want a gradient and others that do not."""
    for name in OPS:
        op, _, inputs, _ = problem(name)
        inputs[0].requires_grad_()
        out = op(*inputs)
        first = torch.autograd.grad(out, inputs[0], out.detach(), retain_graph=True)
        assert torch.equal(first[0], torch.autograd.grad(out, inputs[0], out.detach())[0])


# ---- the tangent of attention ----------------------------------------------------------------------------------------

PARENTS = torch.tensor([-1, 0, 0, 1])
CASES = [
    Case(5, 7, Full(), 4, 3), Case(7, 5, Causal(), 4), Case(0, 3, Causal(), 4), Case(3, 0, Full(), 4),
    Case(70, 130, Lambda(66, 10), 4, 3, heads=4, kv_heads=2, batch=2),
    Case(5, 1100, Lambda(1, 1060), 2, rope_dim=2, distance_limit=1060),
    Case(5, 8, Causal(), 6, 3, rope_dim=4), Case(5, 8, Causal(), 7, rope_dim=6, interleaved=True),
    Case(6, 9, Causal(), 6, rope_dim=6, distance_limit=3), Case(8, 5, Full(), 6, rope_dim=4),
    Case(6, 9, Lambda(3, 2), 6, rope_dim=4, distance_limit=4, interleaved=True),
    Case(6, 9, Causal(), 4, scale=-0.7, sinks=True, alibi=True, softcap=2.0), Case(4, 6, Causal(), 4, scale=0.0),
    Case(6, 9, Lambda(2, 3), 6, 4, rope_dim=6, distance_limit=3, softcap=1.5, sinks=True, bias=4, batch=2,
         key_lengths=(9, 3), query_lengths=(6, 2)),
    Case(4, 9, Causal(), 4, batch=3, key_starts=(0, 3, 9), key_offset=(0, 5, 2)),
    Case(6, 9, Prefix(torch.tensor([4, 0])), 4, batch=2), Case(9, 9, Segments(torch.tensor([0, 4, 9])), 4, rope_dim=2),
    Case(6, 9, KeySubset(torch.tensor([0, 3, 4, 8])), 4), Case(4, 9, Tree(PARENTS), 4, bias=5),
    Case(60, 90, Probabilistic(torch.full((9,), 0.5), seed=3, block_size=16, correction="importance"), 4),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tangent_of_attention(case: Case) -> None:
    """Of out and lse, by query, key, value and sinks, against the reference."""
    options = case.options(F64, F64)
    inputs = [x.nan_to_num() for x in case.inputs(F64)]
    sinks = options.pop("sink_logits", None)
    inputs = inputs if sinks is None else [*inputs, sinks]

    def ours(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Any:
        return attention(query, key, value, sink_logits=sinks, **options, return_lse=True)

    def theirs(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Any:
        out, lse = reference.attention(query, key, value, sink_logits=sinks, **options)
        return out, lse

    tangents = tuple(torch.randn_like(x) for x in inputs)
    actual, expected = jvp(ours, tuple(inputs), tangents), jvp(theirs, tuple(inputs), tangents)
    for mine, other in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rope", [False, True], ids=["plain", "rope"])
def test_float32_tangents_are_as_accurate_as_plain_torch(rope: bool, isa: str) -> None:
    options = {"rope": tables(150, 16)} if rope else {}
    inputs = qkv(1, 4, 2, 97, 150, 32, 24)
    tangents = qkv(1, 4, 2, 97, 150, 32, 24)

    def plain(dtype: torch.dtype) -> Any:
        given = {"rope": tables(150, 16, dtype)} if rope else {}
        x, t = (tuple(y.to(dtype) for y in z) for z in (inputs, tangents))
        return jvp(lambda *y: reference.attention(*y, **given), x, t)[1]

    actual = jvp(lambda *x: attention(*x, **options, return_lse=True), inputs, tangents)[1]
    for mine, exact, theirs in zip(actual, plain(F64), plain(F32), strict=True):
        assert_as_accurate(mine, exact, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_tangents_are_rounded_once(dtype: torch.dtype) -> None:
    inputs, tangents = ([x.to(dtype) for x in qkv(1, 2, 1, 40, 70, 16)] for _ in range(2))
    out, tangent = jvp(attention, tuple(inputs), tuple(tangents))
    wide = jvp(attention, tuple(x.float() for x in inputs), tuple(x.float() for x in tangents))
    assert out.dtype == tangent.dtype == dtype and torch.equal(out, attention(*inputs))
    assert torch.equal(tangent, wide[1].to(dtype))


def test_tangent_under_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that the call dropped are the ones its tangent drops: against the slope of a line, seed by seed."""
    inputs, tangents = qkv(2, 2, 1, 30, 40, 8, dtype=F64), qkv(2, 2, 1, 30, 40, 8, dtype=F64)
    seed = torch.tensor([1234567])
    monkeypatch.setattr(torch, "randint", lambda *args, **options: seed)

    def f(*inputs: Tensor) -> Any:
        return attention(*inputs, dropout_p=0.4, return_lse=True)

    actual = jvp(f, inputs, tangents)[1]
    step = 1e-5
    ahead, behind = (f(*(x + sign * step * t for x, t in zip(inputs, tangents, strict=True))) for sign in (1, -1))
    for mine, x, y in zip(actual, ahead, behind, strict=True):
        torch.testing.assert_close(mine, (x - y) / (2 * step), rtol=1e-6, atol=1e-6)


def test_tangent_through_lambda_attention_and_middle_tokens() -> None:
    inputs, tangents = qkv(1, 2, 1, 1, 30, 6, dtype=F64), qkv(1, 2, 1, 1, 30, 6, dtype=F64)
    options: dict[str, Any] = {"rope": tables(100, 4, F64), "distance_limit": 5}
    ours = jvp(lambda *x: lambda_attention(*x, sink_size=2, window_size=5, middle_topk=4, **options), inputs, tangents)
    theirs = jvp(
        lambda *x: reference.attention(*x, schedule=Lambda(2, 5), middle_topk=4, **options)[0], inputs, tangents
    )
    assert_equal(ours, theirs)


def test_nothing_of_quadratic_size_is_allocated() -> None:
    length = 1500
    inputs, tangents = qkv(1, 1, 1, length, length, 8), qkv(1, 1, 1, length, length, 8)
    asked = allocations(lambda: jvp(lambda *x: attention(*x, schedule=Lambda(4, 64)), inputs, tangents))
    assert length * 8 * 4 <= max(asked) < 4 * length * length / 4


# ---- what has no rule ------------------------------------------------------------------------------------------------

Q, K, V = qkv(1, 2, 2, 5, 5, 4)
TABLE = torch.rand(2, 5)
PROBS = torch.full((3,), 0.5)
CDF = ops.quantize_cdf(torch.tensor([0.5, 0.5]))
SYMBOLS = torch.zeros(1, 4, dtype=torch.int64)


def appended(key: Tensor, value: Tensor) -> Tensor:
    LambdaKVCache(1, 4).append(key, value)
    return key


REFUSED: dict[str, tuple[Callable[..., Any], Tensor, str]] = {
    "distance_bias": (lambda x: attention(Q, K, V, distance_bias=x), TABLE, "attention: distance_bias"),
    "slopes": (lambda x: attention(Q, K, V, alibi_slopes=x), TABLE[:, 0], "attention: alibi_slopes"),
    "cos": (lambda x: attention(Q, K, V, rope=(x, x.detach())), torch.rand(70, 2), "attention: rope's cos"),
    "sin": (
        lambda x: lambda_attention(Q, K, V, sink_size=1, window_size=3, rope=(torch.rand(70, 2), x)),
        torch.rand(70, 2),
        "lambda_attention: rope's sin",
    ),
    "distance_probs": (
        lambda x: attention(Q, K, V, schedule=Probabilistic(x, seed=1, block_size=16)),
        PROBS,
        "attention: distance_probs",
    ),
    "pr_block_mask": (
        lambda x: ops.pr_block_mask(batch=1, heads=1, query_blocks=3, key_blocks=3, distance_probs=x, seed=1),
        PROBS,
        "pr_block_mask: distance_probs",
    ),
    "quantize_cdf": (lambda x: ops.quantize_cdf(x), PROBS, "quantize_cdf: probs"),
    "quantize_cdf of logits": (lambda x: ops.quantize_cdf(logits=x), PROBS, "quantize_cdf: logits"),
    "ac_encode_logits": (lambda x: ops.ac_encode_logits(SYMBOLS, x), PROBS, "ac_encode_logits: logits"),
    "ac_decode_logits": (
        lambda x: ops.ac_decode_logits(ops.ac_encode_logits(SYMBOLS, PROBS), x),
        PROBS,
        "ac_decode_logits: logits",
    ),
    "torchac": (
        lambda x: torchac.encode_float_cdf(x, torch.zeros(1, dtype=torch.int16)),
        torch.tensor([[0.0, 0.5, 1.0]]),
        "encode_float_cdf: cdf_float",
    ),
    "cache key": (lambda x: appended(x, V), K, "LambdaKVCache.append: key"),
    "cache value": (lambda x: appended(K, x), V, "LambdaKVCache.append: value"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tangents_without_a_rule_are_refused(name: str) -> None:
    call, x, start = REFUSED[name]
    message = f"^{start} carries a tangent, and has no forward-mode derivative$"
    with pytest.raises(NotImplementedError, match=message):
        jvp(call, (x,), (x,))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=message):
            call(forward_ad.make_dual(x, x))
        call(x)  # which carries none


def test_a_refused_append_leaves_the_cache_as_it_was() -> None:
    cache = LambdaKVCache(1, 4)
    cache.append(K, V)
    before = cache.attend(Q)
    with pytest.raises(NotImplementedError, match=r"^LambdaKVCache\.append: key carries a tangent"):
        jvp(lambda x: cache.append(x, V), (K,), (K,))
    assert cache.lengths.tolist() == [5] and torch.equal(cache.attend(Q), before)


def test_tangent_of_a_query_against_a_cache() -> None:
    key, value, query = (x.double() for x in (K, V, Q))
    cache = LambdaKVCache(1, 8)
    cache.append(key, value)
    tangent = torch.randn_like(query)
    assert_equal(jvp(cache.attend, (query,), (tangent,)), jvp(lambda x: attention(x, key, value), (query,), (tangent,)))
