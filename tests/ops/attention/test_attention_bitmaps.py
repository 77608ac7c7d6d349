# SPDX-License-Identifier: Apache-2.0
"""`KeySubset` and `Tree`: values and gradients against the reference, and what each of them promises."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore.ops import attention
from pycore.positions import alibi_slopes
from pycore.reference import attention as reference
from pycore.schedules import Causal, KeySubset, Tree
from tests.support.attention_inputs import Case, lengths, qkv, random_tree, tables
from tests.support.tolerance import assert_as_accurate

F32, F64 = torch.float32, torch.float64


def scattered(*shape: int, share: float = 0.15) -> Tensor:
    """A mask of random keys."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) < share


def runs(length: int) -> Tensor:
    """A mask of whole stretches, some longer than a key tile."""
    return (torch.arange(length) // 90) % 3 == 1


SUBSETS = [
    Case(n, m, KeySubset(scattered(m), causal), value_dim=dv)
    for n, m, dv in [(0, 17, None), (1, 1, None), (17, 97, 40), (113, 203, None), (203, 113, 24), (1, 339, None),
                     (339, 339, None)]
    for causal in (True, False)
] + [
    Case(130, 330, KeySubset(runs(400), causal), heads=3, rope_dim=8, distance_limit=limit, bias=bias)
    for causal, limit, bias in [(True, None, None), (True, 50, 70), (False, 50, 400), (True, 0, None)]
] + [
    Case(97, 330, KeySubset(scattered(2, 250), causal), batch=2, sinks=True, softcap=4.0, alibi=True, **rows)
    for causal in (True, False)
    for rows in (
        {"key_starts": (0, 70)}, {"key_lengths": (330, 64)}, {"query_lengths": (97, 5)},
        {"key_starts": (3, 0), "key_lengths": (140, 300), "key_offset": (0, 60), "query_lengths": (97, 64)},
    )
] + [
    Case(1100, 1100, KeySubset(scattered(1100, share=0.01)), heads=1),
    Case(40, 97, KeySubset(torch.zeros(97, dtype=torch.bool))), Case(40, 97, KeySubset(torch.ones(97) > 0)),
    Case(40, 97, KeySubset(torch.zeros(0, dtype=torch.bool)), sinks=True),
]  # fmt: skip
TREES = [
    Case(n, m, Tree(random_tree(nodes)), value_dim=dv)
    for n, m, nodes, dv in [(1, 1, 1, None), (17, 17, 17, 40), (40, 203, 40, 24), (40, 203, 13, None), (203, 203, 5, 1),
                            (5, 203, 40, None), (256, 500, 256, None), (330, 300, 290, None), (3, 1100, 3, None),
                            (9, 97, 0, None)]
] + [
    Case(n, m, Tree(random_tree(nodes)), heads=3, rope_dim=8, distance_limit=limit, bias=bias, alibi=alibi,
         interleaved=limit == 3)
    for n, m, nodes, limit, bias, alibi in [
        (65, 203, 65, None, None, False), (65, 203, 65, 20, None, False), (65, 203, 65, None, 300, False),
        (65, 203, 65, 30, 20, False), (65, 203, 65, None, None, True), (200, 330, 200, 3, None, True),
        (200, 330, 190, 0, 40, False), (2, 330, 200, 10, 200, False), (150, 210, 140, 150, None, True)]
] + [
    Case(70, 230, Tree(torch.stack([random_tree(50, 1), random_tree(50, 2)])), batch=2, sinks=True, softcap=4.0,
         rope_dim=8, distance_limit=40, bias=60, **rows)
    for rows in (
        {"key_starts": (0, 70)}, {"key_lengths": (230, 64)}, {"query_lengths": (70, 5)}, {"key_offset": (0, 1000)},
        {"key_starts": (3, 0), "key_lengths": (140, 200), "query_lengths": (50, 64)},
    )
]  # fmt: skip
WINDOWS = [
    Case(n, m, Tree(random_tree(nodes), sinks, window), heads=2, rope_dim=rope, distance_limit=limit, bias=bias)
    for n, m, nodes, sinks, window, rope, limit, bias in [
        (17, 17, 17, 0, 1, 0, None, None), (40, 203, 40, 4, 60, 8, 60, None), (40, 203, 13, 70, 5, 0, None, 100),
        (65, 203, 65, 3, 9, 8, 20, 300), (203, 203, 5, 0, 64, 0, None, None), (200, 330, 200, 250, 7, 8, 9, None),
        (330, 300, 290, 2, 129, 0, 150, 40), (3, 1100, 3, 4, 300, 8, 300, None), (9, 97, 0, 3, 20, 0, None, None),
        (5, 203, 40, 150, 30, 0, None, None)]
] + [
    Case(70, 230, Tree(torch.stack([random_tree(50, 1), random_tree(50, 2)]), 5, 30), batch=2, sinks=True, softcap=4.0,
         rope_dim=8, distance_limit=40, bias=60, **rows)
    for rows in (
        {"key_starts": (0, 70)}, {"key_lengths": (230, 64)}, {"query_lengths": (70, 5)}, {"key_offset": (0, 1000)},
        {"key_starts": (3, 0), "key_lengths": (140, 200), "key_offset": (9, 70), "query_lengths": (50, 64)},
    )
]  # fmt: skip
CASES = SUBSETS + TREES + WINDOWS


# A table has a handful of entries, too few to compare errors by: their gradients are taken for this many losses.
DRAWS = 8
TABLES = ("distance_bias", "sink_logits")


def results(f: Any, case: Case, dtype: torch.dtype, table_dtype: torch.dtype = F32) -> list[Tensor]:
    """Out, lse, and the gradients of query, key, value and tables."""
    options = case.options(dtype, table_dtype)
    leaves = [x.requires_grad_() for x in case.inputs(dtype)]
    leaves += [options[name].requires_grad_() for name in TABLES if name in options]
    out, lse = f(*leaves[:3], **options)
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(DRAWS if len(leaves) > 3 else 1):
        weights = [torch.randn(x.shape, generator=generator).to(dtype) for x in (out, lse)]
        grads = torch.autograd.grad((out, lse), leaves, weights, allow_unused=True, retain_graph=True)
        draws.append([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)])
    return [out.detach(), lse.detach(), *draws[0][:3], *map(torch.stack, list(zip(*draws, strict=True))[3:])]


@functools.cache
def expected(case: Case, dtype: torch.dtype, table_dtype: torch.dtype = F32) -> list[Tensor]:
    """The reference's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations
    result = results(reference.attention, case, dtype, table_dtype)
    torch.set_num_threads(threads)
    return result


def pycore_attention(*inputs: Tensor, **options: Any) -> Any:
    return attention(*inputs, **options, return_lse=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_as_accurate_as_plain_torch(case: Case, isa: str) -> None:
    actual = results(pycore_attention, case, F32)
    for i, (x, exact, plain) in enumerate(zip(actual, expected(case, F64), expected(case, F32), strict=True)):
        assert_as_accurate(x, exact, plain, f"result {i}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_the_reference(case: Case) -> None:
    table_dtype = F64 if case.rope_dim else F32
    actual = results(pycore_attention, case, F64, table_dtype)
    for x, exact in zip(actual, expected(case, F64, table_dtype), strict=True):
        torch.testing.assert_close(x, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "schedule", [KeySubset(lengths(0, 2, 5)), KeySubset(lengths(1, 4), False), Tree(lengths(-1, 0, 0, 2, -1))], ids=str
)
@pytest.mark.parametrize("limit", [None, 1])
def test_gradcheck(schedule: KeySubset | Tree, limit: int | None, threads: None) -> None:
    torch.set_num_threads(1)  # thousands of tiny calls
    inputs = [x.requires_grad_() for x in qkv(1, 2, 1, 6, 8, 4, dtype=F64)]
    bias, rope = torch.randn(2, 3, dtype=F64).requires_grad_(), tables(70, 4, F64)

    def f(*leaves: Tensor) -> Any:
        out, lse = attention(
            *leaves[:3], schedule=schedule, rope=rope, distance_limit=limit, distance_bias=leaves[3], return_lse=True
        )
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(f, (*inputs, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", [SUBSETS[6], SUBSETS[14], TREES[2], TREES[11]], ids=str)
def test_half_precision_is_float32_rounded(case: Case, dtype: torch.dtype, isa: str) -> None:
    inputs, options = [x.to(dtype) for x in case.inputs(F32)], case.options(F32)
    wide = attention(*(x.float() for x in inputs), **options)
    torch.testing.assert_close(attention(*inputs, **options), wide.to(dtype))


# ---- key subsets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not-causal"])
def test_masks_and_positions_are_the_same(causal: bool, isa: str) -> None:
    """Positions in any order, some twice, some where no key is; masks that end early or late."""
    q, k, v = qkv(2, 2, 1, 60, 150, 16)
    mask = scattered(2, 150)
    out = attention(q, k, v, schedule=KeySubset(mask, causal))
    for b in range(2):
        alone = [x[b : b + 1] for x in (q, k, v)]
        places = mask[b].nonzero().flatten().flip(0)
        for keys in (places, torch.cat([places, places[:5], lengths(150, 2**62)]), places[None]):
            assert torch.equal(attention(*alone, schedule=KeySubset(keys, causal))[0], out[b])
        longer = torch.cat([mask[b], torch.ones(200, dtype=torch.bool)])
        assert torch.equal(attention(*alone, schedule=KeySubset(longer, causal))[0], out[b])
        shorter = mask[b].clone()
        shorter[101:] = False
        cut = attention(*alone, schedule=KeySubset(shorter, causal))
        assert torch.equal(attention(*alone, schedule=KeySubset(shorter[:101], causal)), cut)
    assert torch.equal(attention(q, k, v, schedule=KeySubset(torch.ones(150) > 0)), attention(q, k, v))


def test_positions_past_evicted_tokens() -> None:
    q, k, v = qkv(2, 2, 1, 5, 60, 16)
    places, offset = lengths(3, 1001, 1040, 1055), lengths(1000, 0)
    mask = torch.zeros(1060, dtype=torch.bool)
    mask[places] = True
    out = attention(q, k, v, schedule=KeySubset(places), key_offset=offset)
    assert torch.equal(out, attention(q, k, v, schedule=KeySubset(mask), key_offset=offset))
    assert out.count_nonzero() == out.numel()


@pytest.mark.parametrize("queries", [1, 5, 300])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not-causal"])
def test_keys_outside_the_subset_are_not_read(causal: bool, queries: int, isa: str) -> None:
    """They hold NaN; so does the causal future, in the gradient's pass too."""
    q, k, v = qkv(1, 4, 2, queries, 300, 16)
    mask = scattered(300) & (torch.arange(300) // 64 != 2)
    hidden = ~mask[:, None]
    inputs = [q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)]
    results = []
    for given in (inputs, (q, k, v)):
        leaves = [x.clone().requires_grad_() for x in given]
        out = attention(*leaves, schedule=KeySubset(mask, causal), rope=tables(300, 16))
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(*results, strict=True))
    assert results[0][2][:, :, ~mask].count_nonzero() == 0


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not-causal"])
def test_the_same_bits(causal: bool, isa: str, threads: None) -> None:
    """Chunks, single queries, padding, batches and threads; a causal row in a longer text."""
    length = 1100
    q, k, v = qkv(2, 4, 2, length, length, 24)
    mask = scattered(length, share=0.05)
    mask[300:600] = True
    options = {"schedule": KeySubset(mask, causal), "rope": tables(length, 24), "distance_limit": 900}
    whole = attention(q, k, v, **options)
    for start, end in ((0, 1), (64, 65), (1023, 1024), (590, 700), (1000, 1100)):
        if causal:
            part = attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], **options)
            assert torch.equal(part, whole[:, :, start:end])
    assert torch.equal(attention(q[:, :, -7:], k, v, **options), whole[:, :, -7:])
    assert torch.equal(attention(q[1:], k[1:], v[1:], **options), whole[1:])
    padded_k, padded_v = (torch.nn.functional.pad(x, (0, 0, 70, 0), value=torch.nan) for x in (k, v))
    assert torch.equal(attention(q, padded_k, padded_v, key_starts=lengths(70, 70), **options), whole)
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(attention(q[:, :, -1:], k, v, **options), whole[:, :, -1:])
        assert torch.equal(attention(q, k, v, **options), whole)


# ---- trees ---------------------------------------------------------------------------------------------------------

CONTEXT, NODES = 150, 70
SCHEMES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope": {"rope": tables(CONTEXT + NODES, 16)},
    "rope-limit": {"rope": tables(40 + 64, 16), "distance_limit": 40},
    "rope-limit-less-than-a-branch": {"rope": tables(NODES, 16), "distance_limit": 3},
    "alibi": {"alibi_slopes": alibi_slopes(4)},
    "alibi-limit": {"alibi_slopes": alibi_slopes(4), "distance_limit": 40},
    "bias": {"distance_bias": torch.randn(4, 300, generator=torch.Generator().manual_seed(0))},
    "sinks-softcap": {"sink_logits": torch.tensor([0.5, -1.0, 3.0, 0.0]), "softcap": 3.0, "rope": tables(300, 8)},
}


def path_to(parents: Tensor, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = int(parents[node])
    return path[::-1]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_tree_is_each_of_its_branches_decoded(name: str, isa: str) -> None:
    """For every leaf: the rows of its branch are those of causal attention on the context and the branch, in a row."""
    parents, options = random_tree(NODES), SCHEMES[name]
    q, k, v = qkv(1, 4, 2, CONTEXT + NODES, CONTEXT + NODES, 16)
    out, lse = attention(q[:, :, CONTEXT:], k, v, schedule=Tree(parents), **options, return_lse=True)
    leaves = sorted(set(range(NODES)) - set(parents.tolist()))
    assert len(leaves) > 10 and int((parents == -1).sum()) > 1
    for leaf in leaves:
        path = path_to(parents, leaf)
        rows = torch.cat([torch.arange(CONTEXT), CONTEXT + torch.tensor(path)])
        branch = attention(q[:, :, rows[CONTEXT:]], k[:, :, rows], v[:, :, rows], **options, return_lse=True)
        torch.testing.assert_close(out[:, :, path], branch[0], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(lse[:, :, path], branch[1], rtol=2e-5, atol=2e-6)


def test_a_tree_behind_a_cache(isa: str) -> None:
    """Batch rows with trees, lengths, padding and evicted tokens of their own, beside their branches alone."""
    trees = torch.stack([random_tree(30, 1), random_tree(30, 2), random_tree(30, 3)])
    starts, ends, offsets = lengths(0, 11, 5), lengths(200, 130, 61), lengths(0, 0, 500)
    q, k, v = qkv(3, 4, 2, 30, 200, 16)
    options = {"rope": tables(720, 16), "alibi_slopes": alibi_slopes(4), "distance_limit": 600}
    out = attention(
        q, k, v, schedule=Tree(trees), key_starts=starts, key_lengths=ends, key_offset=offsets, **options
    )  # fmt: skip
    for b in range(3):
        for node in (3, 17, 29):
            path = torch.tensor(path_to(trees[b], node))
            context = torch.arange(int(starts[b]), int(ends[b]) - 30)
            rows = torch.cat([context, int(ends[b]) - 30 + path])
            branch = attention(
                q[b : b + 1, :, path], k[b : b + 1, :, rows], v[b : b + 1, :, rows], key_offset=offsets[b : b + 1],
                **options,
            )  # fmt: skip
            torch.testing.assert_close(out[b : b + 1, :, path], branch, rtol=2e-5, atol=2e-6)


def test_a_chain_is_causal(isa: str) -> None:
    """So are the queries before a tree, and so a row with fewer nodes can begin with its context's last tokens."""
    q, k, v = qkv(1, 4, 2, 300, 300, 16)
    options = {"rope": tables(300, 16), "distance_limit": 100}
    causal = attention(q, k, v, **options)
    chain = torch.arange(-1, 199)
    torch.testing.assert_close(attention(q, k, v, schedule=Tree(chain), **options), causal, rtol=2e-5, atol=2e-6)
    tree = random_tree(20)
    out = attention(q, k, v, schedule=Tree(tree), **options)
    torch.testing.assert_close(out[:, :, :280], causal[:, :, :280], rtol=2e-5, atol=2e-6)
    padded = torch.cat([torch.arange(-1, 4), torch.where(tree < 0, 4, tree + 5)])
    torch.testing.assert_close(attention(q, k, v, schedule=Tree(padded), **options), out, rtol=2e-5, atol=2e-6)


def test_other_branches_do_not_matter(isa: str) -> None:
    """Keys and values of nodes that are no ancestors hold NaN."""
    parents = random_tree(90)
    q, k, v = qkv(1, 2, 1, 90, 200, 16)
    out = attention(q, k, v, schedule=Tree(parents), rope=tables(200, 16))
    for node in (0, 40, 63, 64, 89):
        hidden = torch.ones(200, 1, dtype=torch.bool)
        hidden[:110] = False
        hidden[[110 + n for n in path_to(parents, node)]] = False
        poisoned = (x.masked_fill(hidden, torch.nan) for x in (k, v))
        row = attention(q, *poisoned, schedule=Tree(parents), rope=tables(200, 16))
        assert torch.equal(row[:, :, node], out[:, :, node])


# ---- errors --------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "keys-type": (TypeError, {"schedule": KeySubset([1])}, "keys is a list and must be a Tensor"),
    "keys-dtype": (ValueError, {"schedule": KeySubset(torch.zeros(9))}, "keys is float32 and must be bool or int64"),
    "keys-dims": (
        ValueError,
        {"schedule": KeySubset(torch.ones(1, 2, 9) > 0)},
        "keys has 3 dimensions and must have 1 or 2: [n] or [batch, n]",
    ),
    "keys-batch": (
        ValueError,
        {"schedule": KeySubset(torch.ones(3, 9) > 0)},
        "keys has 3 rows and must have one, or one for each of 2 batch rows",
    ),
    "keys-negative": (
        ValueError,
        {"schedule": KeySubset(lengths(4, -3, 2))},
        "keys has position -3, where all must be at least 0",
    ),
    "parents-type": (TypeError, {"schedule": Tree((-1, 0))}, "parents is a tuple and must be a Tensor"),
    "parents-dtype": (ValueError, {"schedule": Tree(torch.zeros(2))}, "parents is float32 and must be int64"),
    "parents-dims": (
        ValueError,
        {"schedule": Tree(torch.tensor(-1))},
        "parents has 0 dimensions and must have 1 or 2: [T] or [batch, T]",
    ),
    "parents-batch": (
        ValueError,
        {"schedule": Tree(lengths(-1, -1, -1)[:, None])},
        "parents has 3 rows and must have one, or one for each of 2 batch rows",
    ),
    "parents-itself": (
        ValueError,
        {"schedule": Tree(lengths(-1, 1))},
        "parents[0, 1] is 1 and must be at least -1 and less than 1",
    ),
    "parents-later": (
        ValueError,
        {"schedule": Tree(lengths(-1, 0, 1, -1, 5, 2).view(2, 3))},
        "parents[1, 1] is 5 and must be at least -1 and less than 1",
    ),
    "parents-negative": (
        ValueError,
        {"schedule": Tree(lengths(-2, 0))},
        "parents[0, 0] is -2 and must be at least -1 and less than 0",
    ),
    "parents-count": (
        ValueError,
        {"schedule": Tree(random_tree(7)), "key_lengths": lengths(9, 6)},
        "parents has 7 nodes and batch row 1 has 6 keys; the nodes must be the last of them",
    ),
    "parents-rope": (
        ValueError,
        {"schedule": Tree(random_tree(90)), "key": torch.zeros(2, 1, 95, 8), "value": torch.zeros(2, 1, 95, 8),
         "rope": tables(80, 8), "distance_limit": 3},
        "rope has 80 rows and must have 90, one for every node of parents",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str) -> None:
    error, changes, message = BAD[name]
    query, key, value = qkv(2, 2, 1, 5, 9, 8)
    with pytest.raises(error, match=f"^{re.escape(f'attention: {message}')}$"):
        attention(**({"query": query, "key": key, "value": value} | changes))


def test_rows_without_queries_need_no_nodes() -> None:
    q, k, v = qkv(2, 2, 1, 5, 9, 8)
    options = {"key_lengths": lengths(9, 0), "query_lengths": lengths(5, 0)}
    out = attention(q, k, v, schedule=Tree(random_tree(7)), **options)
    assert out[0].count_nonzero() == out[0].numel() and out[1].count_nonzero() == 0


def test_causal_by_default() -> None:
    q, k, v = qkv(1, 2, 1, 9, 9, 8)
    every = torch.ones(9, dtype=torch.bool)
    assert torch.equal(attention(q, k, v, schedule=KeySubset(every)), attention(q, k, v, schedule=Causal()))
