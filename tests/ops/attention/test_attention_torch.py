# SPDX-License-Identifier: Apache-2.0
"""The attention ops as citizens of torch: opcheck, torch.compile, torch.export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pycore.ops import attention, lambda_attention
from pycore.schedules import Causal, KeySubset, Lambda, Tree
from pycore.schedules.attention_bitmaps import key_words, tree_nodes
from tests.support.attention_inputs import lengths, qkv, tables

ROPE = tables(300, 8)
LENGTHS = (lengths(2, 0), lengths(9, 7), lengths(0, 3), lengths(5, 1))
NO_ROPE, NO_TABLES, NO_LENGTHS, NO_OTHERS = (None,) * 2, (None,) * 3, (None,) * 4, (None,) * 3
NO_OPTIONS = (0.0, 0.0)
BIAS, SLOPES, SINKS = torch.linspace(-1, 1, 20).view(4, 5), torch.tensor([0.5, 0.25, 0.1, 0.0]), torch.arange(4.0)
SEED = torch.tensor([2**62 + 7])

# The arguments of torch.ops.pycore.attention after query, key and value: rope, tables, lengths, schedule's tensor,
# seed and block bias, then numbers.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "causal": (
        *NO_ROPE, *NO_TABLES, *NO_LENGTHS, *NO_OTHERS, "attention", "causal", [], False, -1, 0.3, *NO_OPTIONS,
    ),
    "full-rope": (*ROPE, *NO_TABLES, *NO_LENGTHS, *NO_OTHERS, "attention", "full", [], False, -1, 0.3, *NO_OPTIONS),
    "lambda-rope-limit": (
        *ROPE, *NO_TABLES, *NO_LENGTHS, *NO_OTHERS, "lambda_attention", "lambda", [2, 4], True, 6, 0.3, *NO_OPTIONS,
    ),
    "lengths": (
        *ROPE, *NO_TABLES, *LENGTHS, *NO_OTHERS, "lambda_attention", "lambda", [2, 4], False, 4, 0.3, *NO_OPTIONS,
    ),
    "bias-sinks-softcap": (
        *NO_ROPE, BIAS, None, SINKS, *NO_LENGTHS, *NO_OTHERS, "attention", "causal", [], False, -1, 0.3, 5.0, 0.0,
    ),
    "alibi-dropout": (
        *NO_ROPE, None, SLOPES, None, *LENGTHS, None, SEED, None, "lambda_attention", "lambda", [2, 4], False, 4, 0.3,
        0.0, 0.25,
    ),
    "prefix": (
        *NO_ROPE, BIAS, None, None, *NO_LENGTHS, lengths(3, 8), None, None, "attention", "prefix", [], False, -1, 0.3,
        *NO_OPTIONS,
    ),
    "segments": (
        *NO_ROPE, None, None, SINKS, *NO_LENGTHS, lengths(0, 6, 9), None, None, "attention", "segments", [0], False, -1,
        0.3, *NO_OPTIONS,
    ),
    "key-subset": (
        *ROPE, BIAS, None, None, *LENGTHS, key_words("test", KeySubset(lengths(0, 3, 4, 8)), 9), None, None,
        "attention", "key_subset", [0], False, -1, 0.3, *NO_OPTIONS,
    ),
    "tree": (
        *ROPE, BIAS, None, SINKS, *NO_LENGTHS, tree_nodes("test", Tree(lengths(-1, 0, 0, -1, -1, 0).view(2, 3))), None,
        None, "attention", "tree", [], False, 6, 0.3, *NO_OPTIONS,
    ),
}  # fmt: skip


def arguments(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Tables in the dtype that accumulates."""
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def cast(x: Any) -> Any:
        return x.to(table_dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(cast(x) for x in ARGUMENTS[name])


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck_forward(name: str, dtype: torch.dtype) -> None:
    """With gradients of the tables that have one."""
    inputs = [x.requires_grad_() for x in qkv(2, 4, 2, 5, 9, 8, 6, dtype=dtype)]
    rest = list(arguments(name, dtype))
    for place in (2, 4):  # distance_bias and sink_logits
        rest[place] = None if rest[place] is None else rest[place].clone().requires_grad_()
    results = torch.library.opcheck(torch.ops.pycore.attention.default, (*inputs, *rest))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: qkv(1, 2, 2, 3, 0, 8),
        lambda: qkv(0, 2, 2, 3, 3, 8),
        lambda: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(2, 4, 2, 5, 9, 8)],
        lambda: [x.transpose(2, 3).contiguous().transpose(2, 3) for x in qkv(2, 4, 2, 5, 9, 8)],
    ],
    ids=["no-keys", "no-batch", "batch-length-heads-dim", "last-dim-not-contiguous"],
)
def test_opcheck_layouts(make: Any) -> None:
    inputs = [x.requires_grad_() for x in make()]
    results = torch.library.opcheck(
        torch.ops.pycore.attention.default, (*inputs, *arguments("lambda-rope-limit", torch.float32))
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out-and-lse"])
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck_backward(name: str, dtype: torch.dtype, with_lse: bool) -> None:
    inputs = qkv(2, 4, 2, 5, 9, 8, 6, dtype=dtype)
    rest = arguments(name, dtype)
    out, lse = torch.ops.pycore.attention(*inputs, *rest)
    first = (torch.randn_like(out), torch.randn_like(lse) if with_lse else None, out, lse)
    wants = (rest[2] is not None, rest[4] is not None)
    results = torch.library.opcheck(torch.ops.pycore.attention_backward.default, (*first, *wants, *inputs, *rest))
    assert set(results.values()) == {"SUCCESS"}


@pytest.fixture
def counter() -> Any:
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


PREFILLS = [37, 38, 64, 65, 127, 200]
# Torch takes lengths that are equal at first to stay equal, and compiles again when they differ: they differ at first.
CHUNKS = [(3, 120), (1, 121), (1, 122), (5, 250), (129, 129), (37, 37), (2, 2), (200, 201)]


def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two ops, with something of torch's between and around them."""
    x = lambda_attention(2 * q, k, v, sink_size=3, window_size=20, rope=ROPE)
    y, lse = attention(x + q, k, v, schedule=Causal(), rope=ROPE, distance_limit=30, return_lse=True)
    return y * lse.sigmoid()[..., None]


def test_compile_with_changing_lengths(counter: Any) -> None:
    """Fullgraph: a graph for the first length, one for all others."""
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for n in PREFILLS:
        inputs = qkv(1, 4, 2, n, n, 8)
        assert torch.equal(compiled(*inputs), model(*inputs))
    assert counter.frame_count <= 2


def test_compile_prefill_then_decode(counter: Any) -> None:
    """Query and key lengths that change apart from each other, and a single query."""
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for n, m in CHUNKS:
        inputs = qkv(1, 4, 2, n, m, 8)
        if counter.frame_count == 0:
            for x in inputs:
                torch._dynamo.mark_dynamic(x, 2)
        assert torch.equal(compiled(*inputs), model(*inputs))
    assert counter.frame_count <= 2  # torch always specializes a length of 1


def test_compile_backward_with_changing_lengths(counter: Any) -> None:
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for n in PREFILLS:
        results = []
        inputs = qkv(1, 4, 2, n, n, 8)
        for f in (compiled, model):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = f(*leaves)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert counter.frame_count <= 2


def test_compile_with_changing_sizes_and_counts(counter: Any) -> None:
    """Windows, sinks, limits and the tensors of lengths: what changes per call compiles no graph per value."""

    def f(
        q: Tensor, k: Tensor, v: Tensor, sinks: int, window: int, limit: int, starts: Tensor, offset: Tensor
    ) -> Tensor:
        return lambda_attention(
            q, k, v, sink_size=sinks, window_size=window, distance_limit=limit, rope=ROPE, key_starts=starts,
            key_offset=offset,
        )  # fmt: skip

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    inputs = qkv(2, 4, 2, 5, 50, 8)
    for step in range(10):
        numbers = (3 + step, 10 + step, 20 + step, lengths(step, 2), lengths(0, 10 * step))
        assert torch.equal(compiled(*inputs, *numbers), f(*inputs, *numbers))
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    inputs = [x.requires_grad_() for x in qkv(1, 4, 2, 40, 40, 8)]
    actual, expected = compiled(*inputs), model(*inputs)
    torch.testing.assert_close(actual, expected)
    for x, y in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(x, y)
    torch._dynamo.reset()


class Model(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        return attention(
            q, k, v, schedule=Lambda(3, 20), rope=ROPE, distance_limit=20, key_starts=starts, return_lse=True
        )


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_a_dynamic_length(strict: bool) -> None:
    length = torch.export.Dim("length", min=2, max=1 << 20)
    dynamic = ({2: length}, {2: length}, {2: length}, None)
    exported = torch.export.export(
        Model(), (*qkv(2, 4, 2, 40, 40, 8), lengths(0, 3)), dynamic_shapes=dynamic, strict=strict
    )
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count("pycore.attention.default") == 1
    for n in (17, 40, 113, 250):
        inputs = (*qkv(2, 4, 2, n, n, 8), lengths(5, 0))
        assert all(torch.equal(x, y) for x, y in zip(exported.module()(*inputs), Model()(*inputs), strict=True))


def test_exported_program_is_a_file(tmp_path: Any) -> None:
    inputs = (*qkv(2, 4, 2, 40, 40, 8), lengths(0, 3))
    torch.export.save(torch.export.export(Model(), inputs), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert all(torch.equal(x, y) for x, y in zip(loaded(*inputs), Model()(*inputs), strict=True))


def test_fake_tensors_have_the_right_shapes() -> None:
    inputs = [x.to("meta") for x in qkv(2, 4, 2, 5, 9, 8, 6, dtype=torch.float64)]
    out, lse = attention(*inputs, return_lse=True)
    assert out.shape == (2, 4, 5, 6) and lse.shape == (2, 4, 5)
    assert out.device.type == "meta" and out.dtype == lse.dtype == torch.float64
