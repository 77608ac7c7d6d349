# SPDX-License-Identifier: Apache-2.0
"""The table of trigrams: against plain Python, in both faces; and what bad arguments get."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore import native, ops
from pycore.reference import ngram as reference

Arrays = tuple[Tensor, Tensor, Tensor]


def empty(capacity: int) -> Arrays:
    return (
        torch.full((capacity,), -1),
        torch.full((capacity, 12), -1, dtype=torch.int32),
        torch.zeros(capacity, 12, dtype=torch.int32),
    )


def rows(seed: int, count: int, alphabet: int, base: int = 0) -> tuple[Tensor, Tensor]:
    """Trigrams of a skewed alphabet, so that pairs meet more successors than they keep, and weights."""
    draw = random.Random(seed)
    tokens = [[base + int(alphabet * draw.random() ** 2) for _ in range(3)] for _ in range(count)]
    return torch.tensor(tokens), torch.tensor([draw.choice((1, 2, 2621, 40000)) for _ in range(count)])


@pytest.mark.parametrize(("alphabet", "base", "capacity"), [(5, 0, 64), (40, 0, 2048), (30, 2**31 - 40, 1024)])
def test_is_the_reference(alphabet: int, base: int, capacity: int) -> None:
    trigrams, weights = rows(1, 4000, alphabet, base)
    table, expected = empty(capacity), reference.Table()
    halves = [ops.ngram_update(*table, trigrams[part], weights[part]) for part in (slice(0, 700), slice(700, 4000))]
    for row, weight in zip(trigrams.tolist(), weights.tolist(), strict=True):
        expected.update(*row, weight)
    assert [x[1].item() for x in halves] == [0, 0]
    assert sum(x[0].item() for x in halves) == len(expected.rows) == int((table[0] >= 0).sum())
    assert max(map(len, expected.rows.values())) == min(12, alphabet)
    contexts = torch.tensor(list(expected.rows))
    successors, probs = ops.ngram_lookup(*table, contexts)
    for n, row in enumerate(expected.rows.values()):
        assert successors[n].tolist() == [token for token, _ in row] + [-1] * (12 - len(row))
        assert probs[n].tolist() == [score / 65536 for _, score in row] + [0.0] * (12 - len(row))
    for first, second in [*list(expected.rows)[:20], (base, 3)]:
        for nodes, depth in ((0, 8), (1, 8), (24, 1), (64, 8), (256, 256)):
            tokens, parents = ops.ngram_draft(*table, first, second, nodes=nodes, depth=depth)
            wanted = expected.draft(first, second, nodes, depth)
            rest = [-1] * (nodes - len(wanted[0]))
            assert (tokens.tolist(), parents.tolist()) == (wanted[0] + rest, wanted[1] + rest)


def test_a_pair_that_was_not_seen() -> None:
    table = empty(16)
    ops.ngram_update(*table, torch.tensor([[1, 2, 3]]), torch.tensor([9]))
    successors, probs = ops.ngram_lookup(*table, torch.tensor([[2, 1], [1, 2]]))
    assert successors.tolist() == [[-1] * 12, [3] + [-1] * 11] and probs.tolist()[0] == [0.0] * 12
    assert ops.ngram_lookup(*table, torch.zeros(0, 2, dtype=torch.int64))[0].shape == (0, 12)
    assert ops.ngram_draft(*table, 5, 5, nodes=3)[0].tolist() == [-1, -1, -1]


def test_a_full_table_leaves_rows_out() -> None:
    """Pairs that are there go on being counted; others find no room, and that is said."""
    table = empty(4)
    trigrams = torch.tensor([[n, n, 1] for n in range(6)] + [[0, 0, 1]])
    assert ops.ngram_update(*table, trigrams, torch.ones(7, dtype=torch.int64)).tolist() == [4, 2]
    assert ops.ngram_lookup(*table, torch.tensor([[0, 0], [5, 5]]))[1][:, 0].tolist() == [2 / 65536, 0.0]


def test_scores_have_a_bound() -> None:
    table = empty(4)
    for _ in range(3):
        ops.ngram_update(*table, torch.tensor([[1, 1, 1]]), torch.tensor([2 << 16]))
    assert ops.ngram_lookup(*table, torch.tensor([[1, 1]]))[1][0, 0] == 3.0
    tokens, parents = ops.ngram_draft(*table, 1, 1, nodes=5, depth=9)  # a probability of 1 would never end
    assert tokens.tolist() == [1] * 5 and parents.tolist() == [-1, 0, 1, 2, 3]


def test_both_faces() -> None:
    trigrams, weights = rows(2, 500, 20)
    one, two = empty(1024), tuple(x.numpy() for x in empty(1024))
    result = ops.ngram_update(*one, trigrams, weights)
    assert native.ngram_update(*two, trigrams.numpy(), weights.numpy()).tolist() == result.tolist()
    assert all((a.numpy() == b).all() for a, b in zip(one, two, strict=True))
    found = native.ngram_lookup(*two, trigrams[:, :2].contiguous().numpy())
    assert all((a.numpy() == b).all() for a, b in zip(ops.ngram_lookup(*one, trigrams[:, :2]), found, strict=True))
    drafted = native.ngram_draft(*two, 0, 0, nodes=20, depth=4)
    expected = ops.ngram_draft(*one, 0, 0, nodes=20, depth=4)
    assert all((a.numpy() == b).all() for a, b in zip(expected, drafted, strict=True))


def test_torchs_checks() -> None:
    trigrams, weights = rows(3, 50, 9)
    table = empty(128)
    torch.library.opcheck(torch.ops.pycore.ngram_update.default, (*table, trigrams, weights))
    torch.library.opcheck(torch.ops.pycore.ngram_lookup.default, (*table, trigrams[:, :2].contiguous()))
    torch.library.opcheck(torch.ops.pycore.ngram_draft.default, (*table, 1, 2, 9, 3))


T, W = torch.tensor([[1, 2, 3]]), torch.tensor([5])
BAD: list[tuple[Callable[[Arrays], Any], type[Exception], str]] = [
    (lambda t: ops.ngram_update(*t, [1], W), TypeError, "trigrams is a list and must be a"),
    (
        lambda t: ops.ngram_update(*t, T.int(), W),
        ValueError,
        r"trigrams is int32 \[1, 3\] and must be int64 \[rows, 3\]",
    ),
    (lambda t: ops.ngram_update(*t, T[0], W), ValueError, r"trigrams is int64 \[3\] and must be int64 \[rows, 3\]"),
    (lambda t: ops.ngram_update(*t, -T, W), ValueError, r"trigrams\[0, 0\] is -1 and must be 0 to 2147483647"),
    (lambda t: ops.ngram_update(*t, T + 2**31, W), ValueError, r"trigrams\[0, 0\] is 2147483649 and must be"),
    (lambda t: ops.ngram_update(*t, T, W[:0]), ValueError, r"weights is int64 \[0\] and must be int64 \[1\]"),
    (lambda t: ops.ngram_update(*t, T, -W), ValueError, r"weights\[0\] is -5 and must be 0 to 196608"),
    (lambda t: ops.ngram_update(t[0][:3], *t[1:], T, W), ValueError, r"successors has shape \[8, 12\] and must have"),
    (
        lambda t: ops.ngram_update(*(x[:3] for x in t), T, W),
        ValueError,
        "keys has 3 places and must have a power of two",
    ),
    (lambda t: ops.ngram_update(t[0].int(), *t[1:], T, W), ValueError, "keys is int32 and must be int64"),
    (lambda t: ops.ngram_update(t[0], t[1].T.contiguous().T, t[2], T, W), ValueError, "successors must be contiguous"),
    (lambda t: ops.ngram_update(t[0], t[1], t[1], T, W), ValueError, "scores overlaps successors"),
    (lambda t: ops.ngram_lookup(*t, T), ValueError, r"contexts is int64 \[1, 3\] and must be int64 \[rows, 2\]"),
    (lambda t: ops.ngram_draft(*t, -1, 0), ValueError, "first is -1 and must be 0 to 2147483647"),
    (lambda t: ops.ngram_draft(*t, 0, 0, nodes=257), ValueError, "nodes is 257 and must be 0 to 256"),
    (lambda t: ops.ngram_draft(*t, 0, 0, depth=-1), ValueError, "depth is -1 and must be 0 to 256"),
    (lambda t: ops.ngram_draft(*t, 0, 1.0), TypeError, "second is a float and must be an int"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[x[2] for x in BAD])
def test_bad_arguments(call: Callable[[Arrays], Any], error: type[Exception], message: str) -> None:
    table = empty(8)
    with pytest.raises(error, match=f"^ngram_(update|lookup|draft): {message}"):
        call(table)
    assert all(torch.equal(a, b) for a, b in zip(table, empty(8), strict=True))
