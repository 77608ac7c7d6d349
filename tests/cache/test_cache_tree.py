# SPDX-License-Identifier: Apache-2.0
"""A tree of drafts on a LambdaKVCache: every branch as if the cache had been given it alone, and one that stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore import LambdaKVCache
from pycore.ops import attention
from pycore.positions import rope_tables
from pycore.reference import attention as reference
from pycore.schedules import Lambda, Tree
from tests.support.attention_inputs import random_tree
from tests.support.tolerance import assert_as_accurate

HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 4, 2, 16, 8


def tokens(length: int, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, VALUE_DIM))
    q, k, v = (torch.randn(batch, heads, length, channels).to(dtype) for heads, channels in shapes)
    return q, k, v


def branch(parents: Tensor, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = int(parents[node])
    return path[::-1]


def alone(q: Tensor, k: Tensor, v: Tensor, parents: Tensor, context: list[int], window: Lambda, **options: Any) -> Any:
    """Each node's row, from the context and the branch that ends with it: the newest token of a text of its own."""
    double = {"rope": tuple(t.to(q.dtype) for t in options["rope"])} if "rope" in options else {}
    rows = []
    for b, length in enumerate(context):
        tree = parents if parents.dim() == 1 else parents[b]
        for node in range(len(tree)):
            path = torch.tensor([*range(length), *(q.shape[2] - len(tree) + t for t in branch(tree, node))])
            one = [x[b : b + 1, :, path] for x in (q, k, v)]
            out, _ = reference.attention(one[0][:, :, -1:], *one[1:], schedule=window, **(options | double))
            rows.append(out[0, :, 0])
    return torch.stack(rows).unflatten(0, (len(context), -1)).transpose(1, 2)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope": {"rope": rope_tables(300, HEAD_DIM)},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0])},
    "bias": {"distance_bias": torch.randn(HEADS, 40), "softcap": 3.0, "sink_logits": torch.randn(HEADS)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("sinks", "window", "nodes", "length"),
    [(4, 100, 20, 300), (0, 64, 40, 500), (3, 7, 30, 150), (70, 63, 33, 200), (4, 100, 12, 9), (30, 5, 40, 20)],
)
def test_branches_are_as_if_alone(sinks: int, window: int, nodes: int, length: int, options: dict[str, Any]) -> None:
    parents = torch.stack([random_tree(nodes, 1), random_tree(nodes, 2)])
    q, k, v = tokens(length + nodes, 2)
    schedule, limit = Lambda(sinks, window), {"distance_limit": window}
    cache = LambdaKVCache(sinks, window, rollback=nodes)
    cache.append(k[:, :, :length], v[:, :, :length])
    cache.append(k[:, :, length:], v[:, :, length:])
    actual = cache.attend(q[:, :, length:], tree=Tree(parents), **options)
    exact = alone(*(x.double() for x in (q, k, v)), parents, [length] * 2, schedule, **limit, **options)
    plain = alone(q, k, v, parents, [length] * 2, schedule, **limit, **options)
    assert_as_accurate(actual, exact, plain)
    # Level by level, as a drafting model grows it: fewer queries than nodes.
    assert torch.equal(cache.attend(q[:, :, -3:], tree=Tree(parents), **options), actual[:, :, -3:])
    everything = Tree(parents, sinks, window)
    out = attention(q[:, :, length:], k, v, schedule=everything, **limit, **options)
    assert_as_accurate(out, exact, plain)


def test_a_chain_is_no_tree() -> None:
    q, k, v = tokens(360, 1)
    cache = LambdaKVCache(4, 100, rollback=10)
    cache.append(k[:, :, :350], v[:, :, :350])
    cache.append(k[:, :, 350:], v[:, :, 350:])
    chain = Tree(torch.arange(-1, 9))
    torch.testing.assert_close(cache.attend(q[:, :, 350:], tree=chain), cache.attend(q[:, :, 350:]))


def test_a_tree_longer_than_the_ring_serves() -> None:
    """It is attended to once, as any chunk."""
    q, k, v = tokens(300, 1)
    cache, parents = LambdaKVCache(4, 100), random_tree(90)
    cache.append(k[:, :, :210], v[:, :, :210])
    cache.append(k[:, :, 210:], v[:, :, 210:])
    actual = cache.attend(q[:, :, 210:], tree=Tree(parents))
    exact, plain = (
        alone(*(x.to(dtype) for x in (q, k, v)), parents, [210], Lambda(4, 100), distance_limit=100)
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_accurate(actual, exact, plain)
    with pytest.raises(ValueError, match="tree has 90 nodes and may have 29: a longer chunk can be attended to once"):
        cache.attend(q[:, :, -1:], tree=Tree(parents))


@pytest.mark.parametrize("path", [[0, 2, 5], [0], [], [[0, 2, 5], [1, 3, -1]], [[-1, -1], [1, 3]]], ids=str)
def test_accept(path: Any) -> None:
    """The branch stays as if it alone had come: bits, lengths, and what can still be taken back."""
    q, k, v = tokens(400, 2)
    cache = LambdaKVCache(4, 100, rollback=8)
    cache.append(k[:, :, :300], v[:, :, :300])
    other = copy.deepcopy(cache)
    parents = torch.tensor([[-1, -1, 0, 1, 2, 2, 5, 0], [-1, -1, 0, 1, 2, 2, 5, 0]])
    cache.append(k[:, :, 300:308], v[:, :, 300:308])
    cache.attend(q[:, :, 300:308], tree=Tree(parents))
    cache.accept(torch.tensor(path, dtype=torch.int64), 8)
    rows = path if path and isinstance(path[0], list) else [path, path]
    kept = [[300 + t for t in row if t >= 0] for row in rows]
    assert cache.lengths.tolist() == [300 + len(row) for row in kept]
    most = max(map(len, kept))
    chosen = torch.tensor([[0] * (most - len(row)) + row for row in kept], dtype=torch.int64)
    index = chosen[:, None, :, None]
    starts = torch.tensor([most - len(row) for row in kept])
    new = [x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v)]
    other.append(*new, starts=starts)
    assert torch.equal(cache.keys(), other.keys()) and torch.equal(cache.values(), other.values())
    more = slice(310, 312)
    for one in (cache, other):
        one.append(k[:, :, more], v[:, :, more])
    assert torch.equal(cache.attend(q[:, :, more]), other.attend(q[:, :, more]))


def test_decoding_with_drafts() -> None:
    """Round after round the tokens of plain decoding, whatever the drafts: a tree is verified, a branch accepted."""
    q, k, v = tokens(420, 1)  # of the text that is right; drafts agree with it for a while
    window = Lambda(4, 64)
    cache = LambdaKVCache(4, 64, rollback=6)
    cache.append(k[:, :, :300], v[:, :, :300])
    parents = torch.tensor([-1, 0, 1, -1, 3, 1])
    at = 300
    for right in ([0, 1, 2], [3], [], [0, 1, 5], [3, 4], [0, 1]) * 5:
        draft = [torch.randn(*x.shape[:2], 6, x.shape[3]) for x in (q, k, v)]
        for n, node in enumerate(right):
            for x, text in zip(draft, (q, k, v), strict=True):
                x[:, :, node] = text[:, :, at + n]
        cache.append(*draft[1:])
        out = cache.attend(draft[0], tree=Tree(parents))
        cache.accept(torch.tensor(right, dtype=torch.int64), 6)
        expected = attention(q[:, :, : at + 3], k[:, :, : at + 3], v[:, :, : at + 3], schedule=window)
        for n, node in enumerate(right):
            torch.testing.assert_close(out[:, :, node], expected[:, :, at + n], rtol=2e-5, atol=2e-6)
        at += len(right)
        expected = attention(q[:, :, :at], k[:, :, :at], v[:, :, :at], schedule=window)
        assert torch.equal(cache.attend(q[:, :, at - 1 : at]), expected[:, :, -1:])
    assert cache.lengths.tolist() == [at] and at == 300 + 5 * 11
