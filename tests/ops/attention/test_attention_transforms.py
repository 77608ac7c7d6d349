# SPDX-License-Identifier: Apache-2.0
"""Attention's options under torch.compile, torch.export, autocast and vmap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pycore.ops import attention, lambda_attention
from pycore.schedules import Causal, Full, KeySubset, Lambda, Prefix, Segments, Tree
from tests.support.attention_inputs import lengths, qkv, random_tree, tables

BIAS, SINKS = torch.linspace(-1, 1, 48).view(4, 12), torch.tensor([0.5, -1.0, 3.0, 0.0])
ROPE = tables(300, 8)


@pytest.fixture
def counter() -> Iterator[CompileCounterWithBackend]:
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


# ---- torch.compile and torch.export --------------------------------------------------------------------------------


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor, cap: float = 4.0) -> Tensor:
    x = attention(q, k, v, distance_bias=bias, sink_logits=sinks, softcap=cap, rope=ROPE)
    y = lambda_attention(x, k, v, sink_size=3, window_size=20, alibi_slopes=sinks.abs(), sink_logits=sinks)
    return x + y


def test_compile_with_bias_sinks_and_softcap(counter: Any) -> None:
    """Values and gradients of every length, from a graph for the first and one for the others."""
    compiled = torch.compile(biased, fullgraph=True, backend=counter)
    for n in (37, 38, 64, 127, 200):
        inputs = qkv(1, 4, 2, n, n, 8)
        results = []
        for f in (compiled, biased):
            leaves = [x.clone().requires_grad_() for x in (*inputs, BIAS, SINKS)]
            out = f(*leaves)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
        assert all(x.count_nonzero() for x in results[0])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not-causal"])
def test_compile_with_schedules_of_tensors(causal: bool, counter: Any) -> None:
    """New prefixes and boundaries need no new graph, nor does another number of segments."""

    def f(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, boundaries: Tensor) -> Tensor:
        x = attention(q, k, v, schedule=Prefix(prefix))
        return x + attention(q, k, v, schedule=Segments(boundaries, causal))

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    inputs = qkv(2, 4, 2, 50, 50, 8)
    for step in range(1, 6):
        given = lengths(step, 40 - step), lengths(*range(0, 10 * step, 10), 50)
        assert torch.equal(compiled(*inputs, *given), f(*inputs, *given))
    assert counter.frame_count <= 3  # torch specializes a first size of 2


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not-causal"])
def test_compile_with_key_subsets(causal: bool, counter: Any) -> None:
    """Masks and positions are packed in the graph, for every length of text and every number of positions."""

    def f(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        x = attention(q, k, v, schedule=KeySubset(mask, causal), rope=ROPE)
        return x + attention(q, k, v, schedule=KeySubset(places, causal))

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for n in (50, 64, 65, 130, 200):
        inputs = [x.requires_grad_() for x in qkv(2, 4, 2, n, n, 8)]
        mask, places = torch.rand(2, n) < 0.3, torch.randint(0, n + 5, (n // 7,))
        mask[:, 0] = True
        actual, wanted = compiled(*inputs, mask, places), f(*inputs, mask, places)
        assert torch.equal(actual, wanted)
        grads = [torch.autograd.grad(x.square().sum(), inputs) for x in (actual, wanted)]
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    assert counter.frame_count <= 3  # torch specializes a first length, and a bitmap of one word
    with pytest.raises(RuntimeError, match="attention: keys has a negative position, where all must be at least 0"):
        compiled(*qkv(2, 4, 2, 50, 50, 8), mask[:, :50], torch.arange(-1, 6))


def test_compile_with_trees(counter: Any) -> None:
    """A tree's nodes are packed in the graph; trees of other shapes and sizes need no new one."""

    def f(q: Tensor, k: Tensor, v: Tensor, parents: Tensor) -> Tensor:
        return attention(q, k, v, schedule=Tree(parents), rope=ROPE, distance_limit=90, alibi_slopes=SINKS.abs())

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for n in (7, 20, 64, 65, 130):
        inputs = qkv(2, 4, 2, n, 100 + n, 8)
        for parents in (random_tree(n, 1), random_tree(n, 2)):
            assert torch.equal(compiled(*inputs, parents), f(*inputs, parents))
    assert counter.frame_count <= 3  # torch specializes a first length, and a bitmap of one word
    with pytest.raises(ValueError, match=r"^attention: parents\[0, 3\] is 5 and must be at least -1 and less than 3$"):
        compiled(*inputs, lengths(-1, 0, 1, 5))


def test_compile_with_dropout(counter: Any) -> None:
    """Fullgraph; drawn anew at every call, and the backward pass uses the call's own mask."""

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, dropout_p=0.5)

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    q, k, v = qkv(1, 4, 2, 40, 40, 8)
    v.requires_grad_()
    torch.manual_seed(1)
    first, second = compiled(q, k, v), compiled(q, k, v)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(f(q, k, v), first)
    weights = torch.randn_like(first)
    (grad,) = torch.autograd.grad(first, v, weights)
    torch.testing.assert_close((first.double() * weights).sum(), (v.double() * grad).sum(), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


class Biased(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.sinks = torch.nn.Parameter(BIAS.clone()), torch.nn.Parameter(SINKS.clone())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor) -> Tensor:
        return attention(q, k, v, schedule=Prefix(prefix), distance_bias=self.bias, sink_logits=self.sinks, softcap=4.0)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_tables(strict: bool) -> None:
    length = torch.export.Dim("length", min=2, max=1 << 20)
    model = Biased()
    exported = torch.export.export(
        model, (*qkv(2, 4, 2, 40, 40, 8), lengths(0, 30)),
        dynamic_shapes=({2: length}, {2: length}, {2: length}, None), strict=strict,
    )  # fmt: skip
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count("pycore.attention.default") == 1
    for n in (17, 40, 250):
        inputs = (*qkv(2, 4, 2, n, n, 8), lengths(9, 2))
        assert torch.equal(exported.module()(*inputs), model(*inputs))


# ---- autocast ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_casts_query_key_and_value(dtype: torch.dtype) -> None:
    """And nothing else: tables stay float32, and so do their gradients and the inputs'."""
    leaves = [x.clone().requires_grad_() for x in (*qkv(2, 4, 2, 30, 40, 8), BIAS, SINKS)]
    with torch.autocast("cpu", dtype=dtype):
        out, lse = attention(*leaves[:3], distance_bias=leaves[3], sink_logits=leaves[4], rope=ROPE, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    grads = torch.autograd.grad((out.float().sum() + lse.sum()), leaves)
    assert all(x.dtype == torch.float32 for x in grads)
    half = [x.detach().to(dtype) for x in leaves[:3]]
    by_hand = attention(*half, distance_bias=BIAS, sink_logits=SINKS, rope=ROPE, return_lse=True)
    assert torch.equal(out, by_hand[0]) and torch.equal(lse, by_hand[1])


def test_autocast_of_mixed_inputs() -> None:
    q, k, v = qkv(1, 4, 2, 5, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lambda_attention(q.bfloat16(), k, v.half(), sink_size=2, window_size=4)
    assert torch.equal(
        out, lambda_attention(q.bfloat16(), k.bfloat16(), v.half().bfloat16(), sink_size=2, window_size=4)
    )


def test_autocast_leaves_float64_alone() -> None:
    inputs = qkv(1, 4, 2, 5, 9, 8, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*inputs)
    assert out.dtype == torch.float64 and torch.equal(out, attention(*inputs))


def test_autocast_off_inside_on() -> None:
    inputs = qkv(1, 4, 2, 5, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert attention(*inputs).dtype == torch.float32


def test_autocast_under_compile(counter: Any) -> None:
    inputs = qkv(1, 4, 2, 30, 40, 8)
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = compiled(*inputs, sink_logits=SINKS), attention(*inputs, sink_logits=SINKS)
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)


# ---- vmap ----------------------------------------------------------------------------------------------------------

TIMES, BATCH = 3, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"schedule": Causal()},
    "full-bias-sinks": {"schedule": Full(), "distance_bias": BIAS, "sink_logits": SINKS, "softcap": 3.0},
    "lambda-rope": {"schedule": Lambda(2, 5), "rope": ROPE, "distance_limit": 7},
    "segments": {"schedule": Segments(lengths(0, 4, 9))},
    "keys": {"schedule": KeySubset(lengths(0, 2, 6, 8))},
    "keys-of-rows": {"schedule": KeySubset(torch.arange(18).view(2, 9) % 3 > 0, causal=False)},
    "tree": {"schedule": Tree(lengths(-1, 0, 0)), "rope": ROPE, "distance_limit": 3},
    "tree-of-rows": {"schedule": Tree(lengths(-1, 0, 0, -1, 0, 1).view(2, 3)), "distance_bias": BIAS},
}


def loop(f: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> Tensor:
    """What vmap stands for."""
    calls = [[x if d is None else x.select(d, n) for x, d in zip(args, in_dims, strict=True)] for n in range(TIMES)]
    return torch.stack([f(*call) for call in calls])


@pytest.mark.parametrize(
    "in_dims",
    [(0, 0, 0), (0, None, None), (None, 0, 0), (None, None, 0), (1, 2, 3), (4, 4, 0), (-1, -2, 0), (3, None, 1)],
    ids=str,
)
@pytest.mark.parametrize("name", OPTIONS)
def test_vmap_is_a_loop(name: str, in_dims: tuple[int | None, ...]) -> None:
    args = []
    for x, dim in zip(qkv(TIMES * BATCH, 4, 2, 5, 9, 8, 6), in_dims, strict=True):
        x = x.unflatten(0, (TIMES, BATCH))
        args.append(x[0] if dim is None else x.movedim(0, dim))

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, **OPTIONS[name])

    assert torch.equal(torch.vmap(f, in_dims)(*args), loop(f, in_dims, *args))


def test_vmap_returns_lse() -> None:
    q, k, v = (x.unflatten(0, (TIMES, BATCH)) for x in qkv(TIMES * BATCH, 4, 2, 5, 9, 8))
    out, lse = torch.vmap(lambda *x: attention(*x, return_lse=True))(q, k, v)
    assert out.shape == (TIMES, BATCH, 4, 5, 8) and lse.shape == (TIMES, BATCH, 4, 5)
    for n in range(TIMES):
        alone = attention(q[n], k[n], v[n], return_lse=True)
        assert torch.equal(out[n], alone[0]) and torch.equal(lse[n], alone[1])


@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 0)], ids=str)
def test_vmap_over_lengths(in_dims: tuple[int | None, ...]) -> None:
    q, k, v = qkv(BATCH, 4, 2, 5, 9, 8)
    key_lengths, starts = lengths(9, 5, 7, 8, 3, 9).view(TIMES, BATCH), lengths(0, 1, 2, 3, 1, 0).view(TIMES, BATCH)
    args = [x[0] if d is None else x.movedim(0, d) for x, d in zip((key_lengths, starts), in_dims, strict=True)]

    def f(key_lengths: Tensor, starts: Tensor) -> Tensor:
        return attention(q, k, v, key_lengths=key_lengths, key_starts=starts)

    assert torch.equal(torch.vmap(f, in_dims)(*args), loop(f, in_dims, *args))


def test_vmap_over_prefix_lengths() -> None:
    q, k, v = qkv(BATCH, 4, 2, 5, 9, 8)
    prefixes = lengths(0, 9, 5, 7, 6, 8).view(TIMES, BATCH)

    def f(prefix: Tensor) -> Tensor:
        return attention(q, k, v, schedule=Prefix(prefix))

    assert torch.equal(torch.vmap(f)(prefixes), loop(f, (0,), prefixes))


@pytest.mark.parametrize("rows", [False, True], ids=["one-row", "batch-rows"])
@pytest.mark.parametrize("in_dims", [(0, 0), (None, 1)], ids=str)
@pytest.mark.parametrize("kind", ["mask", "positions", "tree"])
def test_vmap_over_bitmaps(kind: str, rows: bool, in_dims: tuple[int | None, ...]) -> None:
    """Over masks, positions or parents, of all batch rows or of each."""
    q, k, v = qkv(TIMES * BATCH, 4, 2, 5, 9, 8)
    shape = (TIMES, BATCH) if rows else (TIMES,)
    given = {
        "mask": torch.rand(*shape, 9) < 0.5,
        "positions": torch.randint(0, 9, (*shape, 4)),
        "tree": torch.stack([random_tree(4, seed) for seed in range(6)])[: TIMES * shape[-1] if rows else TIMES].view(
            *shape, 4
        ),
    }[kind]
    queries = q.unflatten(0, (TIMES, BATCH)) if in_dims[0] == 0 else q[:BATCH]
    args = [queries, given.movedim(0, in_dims[1])]

    def f(q: Tensor, x: Tensor) -> Tensor:
        schedule = Tree(x) if kind == "tree" else KeySubset(x)
        return attention(q, k[:BATCH], v[:BATCH], schedule=schedule)

    assert torch.equal(torch.vmap(f, in_dims)(*args), loop(f, in_dims, *args))


def test_nested_vmap() -> None:
    q, k, v = (x.view(2, 3, 1, *x.shape[1:]) for x in qkv(6, 4, 2, 5, 9, 8))
    mapped = torch.vmap(torch.vmap(attention, (0, None, 0)), (0, 0, 0))(q, k[:, 0], v)
    for a in range(2):
        for b in range(3):
            assert torch.equal(mapped[a, b], attention(q[a, b], k[a, 0], v[a, b]))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 0)], ids=str)
def test_gradient_through_vmap(in_dims: tuple[int | None, ...]) -> None:
    """Queries, keys and values of all calls."""
    args = []
    for x, dim in zip(qkv(TIMES * BATCH, 4, 2, 5, 9, 8), in_dims, strict=True):
        x = x.unflatten(0, (TIMES, BATCH))
        args.append(x[0] if dim is None else x.movedim(0, dim))

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, distance_bias=BIAS, sink_logits=SINKS, schedule=Lambda(2, 4))

    results = []
    for run in (torch.vmap(f, in_dims), lambda *x: loop(f, in_dims, *x)):
        leaves = [x.clone().requires_grad_() for x in args]
        results.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", OPTIONS)
def test_batched_gradients(name: str) -> None:
    """Several gradients of one output at once: torch.autograd.grad(is_grads_batched=True), as jacobians are taken."""
    leaves = [x.requires_grad_() for x in qkv(BATCH, 4, 2, 5, 9, 8)]
    out, lse = attention(*leaves, **OPTIONS[name], return_lse=True)
    weights = torch.randn(TIMES, *out.shape), torch.randn(TIMES, *lse.shape)
    together = torch.autograd.grad((out, lse), leaves, weights, is_grads_batched=True, retain_graph=True)
    for n in range(TIMES):
        alone = torch.autograd.grad((out, lse), leaves, [x[n] for x in weights], retain_graph=True)
        assert all(torch.equal(x[n], y) for x, y in zip(together, alone, strict=True))


def test_gradient_of_tables_through_vmap() -> None:
    """Tables outside the mapped dimension collect the gradient of every call."""
    q, k, v = (x.unflatten(0, (TIMES, BATCH)) for x in qkv(TIMES * BATCH, 4, 2, 5, 9, 8))
    results = []
    for mapped in (True, False):
        bias, sinks = BIAS.clone().requires_grad_(), SINKS.clone().requires_grad_()

        def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor = bias, sinks: Tensor = sinks) -> Tensor:
            return attention(q, k, v, distance_bias=bias, sink_logits=sinks)

        out = torch.vmap(f)(q, k, v) if mapped else loop(f, (0, 0, 0), q, k, v)
        results.append(torch.autograd.grad(out.square().sum(), (bias, sinks)))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


def test_vmap_refuses_tables() -> None:
    q, k, v = qkv(BATCH, 4, 2, 5, 9, 8)
    message = "attention: vmap may run over query, key, value and the lengths, not over tables"
    with pytest.raises(NotImplementedError, match=f"^{message}$"):
        torch.vmap(lambda sinks: attention(q, k, v, sink_logits=sinks))(SINKS.expand(TIMES, 4))
    with pytest.raises(NotImplementedError, match=f"^{message}$"):
        torch.vmap(lambda bias: attention(q, k, v, distance_bias=bias))(BIAS.expand(TIMES, 4, 12))


@pytest.mark.parametrize("in_dims", [(0, None, 0), (1, 2, 3), (4, None, None), (None, None, 1)], ids=str)
def test_vmap_of_the_backward_op(in_dims: tuple[int | None, ...]) -> None:
    """torch.ops.pycore.attention_backward itself, mapped over gradients, keys and values, with tables and without."""
    q, k, v = (x.unflatten(0, (TIMES, BATCH)) for x in qkv(TIMES * BATCH, 4, 2, 5, 9, 8))
    q, grad_lse = q[0], torch.randn(BATCH, 4, 5)
    grad_out = torch.randn(TIMES, BATCH, 4, 5, 8)
    rest = (*ROPE, BIAS, None, SINKS, *[None] * 7, "attention", "lambda", [2, 4], False, 4, 0.3, 2.0, 0.0)
    args = [x[0] if d is None else x.movedim(0, d) for x, d in zip((grad_out, k, v), in_dims, strict=True)]

    def backward(tables: bool, grad_out: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, lse = torch.ops.pycore.attention(q, k, v, *rest)
        return torch.ops.pycore.attention_backward(grad_out, grad_lse, out, lse, tables, tables, q, k, v, *rest)

    for with_tables, count in ((False, 3), (True, 5)):
        mapped = torch.vmap(lambda *x, wanted=with_tables, n=count: backward(wanted, *x)[:n], in_dims)(*args)
        for place in range(count):
            expected = loop(lambda *x, wanted=with_tables, n=place: backward(wanted, *x)[n], in_dims, *args)
            assert torch.equal(mapped[place], expected)
