# SPDX-License-Identifier: Apache-2.0
"""Compiled code whose numbers all change: every op and module under dynamic=True, with the bits of the eager call.

Numbers of a schema are part of a graph, unless they are SymInts or arrive in a tensor: nine other values of one would
end torch.compile(fullgraph=True). So each case runs with more than that, and with a bound on its graphs: one for the
first call, where torch takes a size of 1 or an argument for a constant, and few for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pycore import nn, ops
from pycore.compat.torch import scaled_dot_product_attention
from pycore.models.bytelm import Bytelm, BytelmConfig
from pycore.positions import rope_tables
from pycore.schedules import (
    Constant,
    Full,
    Geometric,
    KeySubset,
    Lambda,
    Prefix,
    Probabilistic,
    Segments,
    Tree,
)  # fmt: skip

STEPS = range(9)  # more than torch's recompile_limit of 8
Args = tuple[Any, ...]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def qkv(n: int, keys: int | None = None, dim: int = 8, batch: int = 2, heads: int = 4, kv: int = 2) -> list[Tensor]:
    keys = n if keys is None else keys
    shapes = ((batch, heads, n, dim), (batch, kv, keys, dim), (batch, kv, keys, dim))
    return [leaf(*shape) for shape in shapes]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def coded(symbols: Tensor, probs: Tensor, model_id: int, lanes: int, precision: int) -> Tensor:
    cdf = ops.quantize_cdf(probs, precision=precision)
    streams = ops.ac_encode(symbols, cdf, model_id=model_id, lanes=lanes)
    return ops.ac_decode(streams, cdf, model_id=model_id)


def coded_logits(symbols: Tensor, logits: Tensor, model_id: int, precision: int) -> Tensor:
    streams = ops.ac_encode_logits(symbols, logits, model_id=model_id, precision=precision)
    return ops.ac_decode_logits(streams, logits, model_id=model_id, precision=precision)


# Name: the function, its arguments at a step, and how many graphs it may take.
CASES: dict[str, tuple[Callable[..., Any], Callable[[int], Args], int]] = {
    "attention-sizes": (
        ops.attention, lambda i: tuple(qkv(5 + i, 6 + 2 * i, 8 + 3 * i, 2 + i, 4 + 2 * i, 2 + i)), 2,
    ),
    "attention-scale": (lambda q, k, v, x: ops.attention(q, k, v, scale=x), lambda i: (*qkv(9), 0.1 + 0.05 * i), 2),
    "attention-negative-scale": (
        lambda q, k, v, x: ops.attention(q, k, v, scale=x), lambda i: (*qkv(9), -0.1 - 0.05 * i), 2,
    ),
    "attention-int-scale": (lambda q, k, v, x: ops.attention(q, k, v, scale=x), lambda i: (*qkv(9), 2 + i), 2),
    "attention-softcap": (
        lambda q, k, v, x: ops.attention(q, k, v, softcap=x), lambda i: (*qkv(9 + i), 1.0 + 0.05 * i), 2,
    ),
    "attention-dropout": (
        lambda q, k, v, x: ops.attention(q, k, v, dropout_p=x), lambda i: (*qkv(9 + i), 0.1 + 0.05 * i), 2,
    ),
    "attention-everything": (
        lambda q, k, v, s, c, p, limit: ops.attention(q, k, v, scale=s, softcap=c, dropout_p=p, distance_limit=limit),
        lambda i: (*qkv(9 + i, dim=8 + 2 * i, batch=2 + i), 0.3 + i / 10, 2.0 + i, 0.1 + i / 20, 5 + i), 2,
    ),
    "attention-tables": (
        lambda q, k, v, b, s, c: ops.attention(q, k, v, distance_bias=b, sink_logits=s, rope=c),
        lambda i: (*qkv(9 + i, dim=16), torch.randn(4, 2 + i, requires_grad=True), torch.randn(4, requires_grad=True),
                   rope_tables(9 + 2 * i, 4 + 2 * (i % 6))), 3,
    ),
    "attention-lengths": (
        lambda q, k, v, *x: ops.attention(q, k, v, key_starts=x[0], key_lengths=x[1], key_offset=x[2],
                                          query_lengths=x[3]),
        lambda i: (*qkv(9 + i), numbers(i // 2, 1), numbers(i + 4, 5), numbers(i, 3 * i), numbers(i, 9)), 2,
    ),
    "lambda_attention": (
        lambda q, k, v, s, w, d: ops.lambda_attention(q, k, v, sink_size=s, window_size=w, distance_limit=d),
        lambda i: (*qkv(9 + i), i, 3 + i, 9 + 2 * i), 2,
    ),
    "lambda_attention-limit": (
        lambda q, k, v, s, w: ops.lambda_attention(q, k, v, sink_size=s, window_size=w),
        lambda i: (*qkv(9 + i), i, 3 + i), 2,
    ),
    "lambda_attention-middle": (
        lambda q, k, v, s, w, m: ops.lambda_attention(q, k, v, sink_size=s, window_size=w, middle_topk=m),
        lambda i: (*(x.detach() for x in qkv(1, 40 + i, batch=1)), i, 3 + i, 2 + i), 2,
    ),
    "pr_flash_attention": (
        lambda q, k, v, s, r, n, w, b: ops.pr_flash_attention(
            q, k, v, distance_probs=Constant(0.5), seed=s, round=r, sink_size=n, window_blocks=w, block_size=b),
        lambda i: (*qkv(90 + i), 5 + i, i, i, i % 3, 2 ** (4 + i % 3)), 2,
    ),
    "pr_flash_attention-rows": (
        lambda q, k, v, n: ops.pr_flash_attention(
            q, k, v, distance_probs=Constant(0.5), seed=1, blocks_per_row=n, block_size=16),
        lambda i: (*qkv(190 + i), 1 + i), 2,
    ),
    "pr_flash_attention-family": (
        lambda q, k, v, rho: ops.pr_flash_attention(
            q, k, v, distance_probs=Geometric(rho), seed=3, block_size=16, correction="importance"),
        lambda i: (*qkv(90 + i), 0.5 + i / 30), 2,
    ),
    "pr_flash_attention-table": (
        lambda q, k, v, p, s: ops.pr_flash_attention(q, k, v, distance_probs=p, seed=s, block_size=16),
        lambda i: (*qkv(90 + i), torch.linspace(1, 0, i + 2), numbers(i, i + 1)), 3,
    ),
    "for_layer": (
        lambda q, k, v, s, n: ops.attention(
            q, k, v, schedule=Probabilistic(Constant(0.5), s, block_size=16).for_layer(n)),
        lambda i: (*qkv(90 + i), 3 + i, i), 2,
    ),
    "pr_block_mask": (
        lambda s, n, w: ops.pr_block_mask(batch=2, heads=n, query_blocks=n, key_blocks=n + 3,
                                          distance_probs=Constant(0.5), seed=s, window_blocks=w),
        lambda i: (i, 3 + i, 1 + i % 3), 2,
    ),
    "prefix": (
        lambda q, k, v, x: ops.attention(q, k, v, schedule=Prefix(x)), lambda i: (*qkv(9 + i), numbers(i, 2 * i)), 2,
    ),
    "full": (lambda q, k, v: ops.attention(q, k, v, schedule=Full()), lambda i: tuple(qkv(9 + i, 3 + 2 * i)), 2),
    "segments": (
        lambda q, k, v, x: ops.attention(q, k, v, schedule=Segments(x, False)),
        lambda i: (*qkv(20 + i), torch.arange(0, 20, 1 + i)), 3,
    ),
    "key_subset": (
        lambda q, k, v, x: ops.attention(q, k, v, schedule=KeySubset(x)),
        lambda i: (*qkv(50 + 10 * i), torch.arange(0, 20, 1 + i % 3)), 3,
    ),
    "tree": (
        lambda q, k, v, x: ops.attention(q, k, v, schedule=Tree(x)),
        lambda i: (*qkv(50 + 10 * i), torch.arange(5 + 7 * i) - 1), 3,
    ),
    "sdpa": (
        lambda q, k, v, s, p: scaled_dot_product_attention(q, k, v, scale=s, dropout_p=p, enable_gqa=True),
        lambda i: (*qkv(5 + i), 0.2 + i / 9, 0.1 + i / 20), 2,
    ),
    "invariant_linear": (
        ops.invariant_linear,
        lambda i: tuple(leaf(*shape) for shape in ((2 + i, 3 + i), (4 + i, 3 + i), (4 + i,))), 2,
    ),
    "invariant_linears": (
        lambda x, *rest: ops.invariant_linears(x, rest[:2], rest[2:]),
        lambda i: tuple(leaf(*shape) for shape in ((2 + i, 3 + i), (4 + i, 3 + i), (5, 3 + i), (4 + i,), (5,))), 2,
    ),
    "rms_norm": (
        lambda x, w, eps: ops.rms_norm(x, w, eps=eps),
        lambda i: (leaf(2 + i, 3 + i), leaf(3 + i), 0.1 * (1 + i)), 2,
    ),
    "layer_norm": (
        lambda x, w, b, eps: ops.layer_norm(x, w, b, eps=eps),
        lambda i: (leaf(2 + i, 3 + i), leaf(3 + i), leaf(3 + i), 0.1 * (1 + i)), 2,
    ),
    "gated": (
        lambda x, y: ops.silu_mul(x, y) + ops.gelu_mul(y, x) * ops.gelu_mul(x, x, "tanh"),
        lambda i: (leaf(2 + i, 3 + i), leaf(2 + i, 3 + i)), 2,
    ),
    "quantize_cdf": (
        lambda x, p: ops.quantize_cdf(logits=x, precision=p), lambda i: (torch.rand(2 + i, 3 + i), 10 + i), 2,
    ),
    "coder": (
        coded, lambda i: (torch.randint(3 + i, (2 + i, 5 + i)), torch.rand(3 + i) + 0.1, i, 1 + i, 10 + i), 2,
    ),
    "coder-logits": (
        coded_logits, lambda i: (torch.randint(3 + i, (2 + i, 5 + i)), torch.rand(3 + i), i, 10 + i), 2,
    ),
    "coder-bytes": (
        lambda x, order: ops.ac_decode_bytes(ops.ac_encode_bytes(x, order=order)),
        lambda i: (torch.randint(256, (2 + i, 5 + i)).to(torch.uint8), i % 2), 2,
    ),
}  # fmt: skip


def run(f: Callable[..., Any], parameters: list[Tensor], args: Args) -> list[Tensor]:
    """Outputs and gradients."""
    torch.manual_seed(3)
    out = f(*args)
    leaves = [*parameters, *(x for x in args if isinstance(x, Tensor) and x.requires_grad)]
    if not leaves or not out.requires_grad:
        return [out.detach()]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def compare(f: Callable[..., Any], steps: Callable[[int], Args], graphs: int, dynamic: bool | None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=counter)
    parameters = list(f.parameters()) if isinstance(f, torch.nn.Module) else []
    for step in STEPS:
        args = steps(step)
        actual, wanted = run(compiled, parameters, args), run(f, parameters, args)
        assert all(torch.equal(x, y) for x, y in zip(actual, wanted, strict=True)), step
    assert counter.frame_count <= graphs


@pytest.mark.parametrize("name", CASES)
def test_every_number_changes(name: str) -> None:
    f, steps, graphs = CASES[name]
    compare(f, steps, graphs, True)


@pytest.mark.parametrize("name", ["attention-sizes", "attention-everything", "pr_flash_attention-family", "rms_norm"])
def test_numbers_that_torch_finds_to_change(name: str) -> None:
    """Without dynamic=True the first graph is of constants, and a number that changes is one more."""
    f, steps, _ = CASES[name]
    compare(f, steps, 4, None)


@pytest.mark.parametrize("position", ["rope", "t5"])
def test_lambda_layers(position: str) -> None:
    layer = nn.LambdaAttention(
        16, 2, sink_size=1, window_size=4, position=position, sink_logits=True, bias=True, softcap=5.0, dropout_p=0.1
    )
    compare(layer, lambda i: (torch.randn(1 + i % 4, 3 + i, 16, requires_grad=True),), 3, True)


def test_probabilistic_layers() -> None:
    layer = nn.ProbabilisticAttention(16, 2, distance_probs=Geometric(0.5), position="harmonic", block_size=16).eval()
    compare(layer, lambda i: (torch.randn(1 + i % 4, 30 + 5 * i, 16, requires_grad=True),), 3, True)


def test_bytelm() -> None:
    """The text, and sinks and window of a call."""
    model = Bytelm(BytelmConfig(dim=16, heads=2, kv_heads=1, layers=1))
    compare(model, lambda i: (torch.randint(257, (1 + i % 4, 2 + i)),), 3, True)
    with torch.no_grad():
        compare(
            lambda x, sinks, window: model(x, schedule=Lambda(sinks, window)),
            lambda i: (torch.randint(257, (1 + i % 4, 2 + i)), i, i + 3), 4, True,
        )  # fmt: skip


def test_numbers_are_checked_when_compiled_code_runs() -> None:
    """A number that a graph computes is refused in the words of the eager call."""
    compiled = torch.compile(
        lambda q, x: ops.attention(q, q, q, softcap=x), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    q = torch.randn(1, 2, 3, 8)
    compiled(q, 2.5)
    with pytest.raises(ValueError, match=r"^attention: softcap is 1e\+39 and must be at most 2.35e\+38"):
        compiled(q, 1e39)


def test_positions_beside_an_offset_in_a_graph() -> None:
    """Their bitmap would be as long as they are far, which a graph cannot know; a mask says it."""
    q, k, v = (x.detach() for x in qkv(5))
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    offset, mask = numbers(3, 0), torch.tensor([True, False, True, True, True, True])
    out = compiled(q, k, v, schedule=KeySubset(mask), key_offset=offset)
    assert torch.equal(out, ops.attention(q, k, v, schedule=KeySubset(mask), key_offset=offset))
    with pytest.raises(Exception, match="keys is a list of positions and must be a mask where a graph has"):
        compiled(q, k, v, schedule=KeySubset(numbers(0, 2)), key_offset=offset)
