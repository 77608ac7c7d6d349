# SPDX-License-Identifier: Apache-2.0
"""A frozen prefix and its continuations: the bits of full copies, in memory once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pycore import Staircase, StaircaseKVCache
from tests.support.staircase_caches import fed, made, same, small, tokens


def copied(cache: StaircaseKVCache, repeats: int) -> StaircaseKVCache:
    """The same tokens in memory of its own."""
    copy = made(cache.staircase, batch=cache.batch, dtype=cache.dtype, capacity=cache.capacity)
    copy.load_state_dict(cache.state_dict())
    copy.repeat_interleave(repeats)
    return copy


@pytest.mark.parametrize("bits", [(16, 8, 4, 2), (16, 8, 4), (16, 2), (8, 4), (16,)], ids=str)
@pytest.mark.parametrize("capacity", [None, 400])
def test_going_on_is_going_on_with_a_copy(bits: tuple[int, ...], capacity: int | None) -> None:
    """To the bit, in turns, with different tokens, over cropped ones, and past the room that growing needs."""
    cache = fed(made(small(bits), capacity=capacity, dtype=torch.bfloat16), *tokens_twice(150), [100, 50])
    prefix = cache.freeze() if capacity else cache.freeze(room=40)
    assert prefix.lengths.tolist() == [150, 150]
    repeats = [1, 3, 1]
    forks, copies = [prefix.fork(n) for n in repeats], [copied(cache, n) for n in repeats]
    del prefix
    for n, back in ((1, 0), (7, 5), (17, 9), (70, 20), (64, 0), (3, 1)):
        for fork, copy in zip(forks, copies, strict=True):
            key, value = tokens_twice(n, fork.batch)
            query = tokens(min(n, 4), batch=fork.batch, heads=4, dtype=torch.bfloat16)
            for each in (fork, copy):
                each.append(key, value)
            assert torch.equal(fork.attend(query), copy.attend(query))  # type: ignore[arg-type]
            for each in (fork, copy):
                each.crop(back)
            assert torch.equal(fork.lengths, copy.lengths)
            assert torch.equal(fork.keys(), copy.keys()) and torch.equal(fork.values(), copy.values())
    if capacity:
        assert all(same(fork, copy) for fork, copy in zip(forks, copies, strict=True))
    choice = torch.tensor([1, 0])
    forks[0].reorder(choice)
    copies[0].reorder(choice)
    assert torch.equal(forks[0].keys(), copies[0].keys())


def test_a_prefix_stays_what_it_was() -> None:
    """Whatever its continuations, and the cache it was taken from, do."""
    cache = fed(made(small(), capacity=300, dtype=torch.bfloat16), *tokens_twice(150), [150])
    kept = copied(cache, 1)
    prefix = cache.freeze()
    for each in (cache, prefix.fork(), prefix.fork(2)):
        each.crop(20)
        each.append(*tokens_twice(100, each.batch))
    again = prefix.fork()
    assert same(again, kept)
    twice = again.freeze().fork()
    for each in (twice, kept):
        torch.manual_seed(1)
        each.append(*tokens_twice(90))
    assert same(twice, kept)


def test_a_state_of_a_continuation_goes_on_elsewhere() -> None:
    cache = fed(made(small(), dtype=torch.bfloat16), *tokens_twice(150), [150])
    fork, other = cache.freeze().fork(), made(small(), dtype=torch.bfloat16)
    other.load_state_dict(fork.state_dict())
    key, value = tokens_twice(60)
    for each in (fork, other, cache):
        each.append(key, value)
    assert torch.equal(fork.keys(), cache.keys()) and torch.equal(other.keys(), cache.keys())


def test_bytes_are_in_memory_once() -> None:
    """A continuation has its rings and the pages of its own tokens; its planes are in the prefix."""
    stairs = Staircase((16, 8, 4), step=64, rollback=0)
    cache = made(stairs, batch=1, heads=4, dim=64, dtype=torch.bfloat16, capacity=8192)
    for _ in range(32):
        cache.append(*(tokens(250, batch=1, heads=4, dim=64, dtype=torch.bfloat16) for _ in "kv"))
    cache.crop(0)  # lets go of the last chunk
    rings = sum(
        side[i].nbytes
        for side, what in zip(cache._storage, cache._sides, strict=True)
        for i in range(9)
        if i in what.rings()
    )
    prefix = cache.freeze()
    assert 0.95 * cache.nbytes < prefix.nbytes <= cache.nbytes
    forks = [prefix.fork() for _ in range(5)]
    assert [fork.nbytes for fork in forks] == [rings] * 5
    key, value = (tokens(128, batch=1, heads=4, dim=64, dtype=torch.bfloat16) for _ in "kv")
    for fork in forks:
        fork.append(key, value)
        fork.attend(tokens(1, batch=1, heads=8, dim=64))
    # Two tiles of each of six tensors a side and four heads: a page or two for each.
    assert all(rings < fork.nbytes <= rings + 2 * 5 * 4 * 2 * 4096 for fork in forks)
    copy = prefix.fork()
    copy.select(torch.tensor([0]))
    assert copy.nbytes >= cache.nbytes  # no longer shared


def test_no_rows_and_no_tokens() -> None:
    assert made(small(), batch=0).freeze().fork(3).batch == 0
    fork = made(small()).freeze().fork(2)
    key, value = tokens(70, batch=4), tokens(70, batch=4)
    fork.append(key, value)
    assert torch.equal(fork.keys(), fed(made(small(), batch=4), key, value, [70]).keys())


@pytest.mark.parametrize(
    "room, capacity, kind, sentence",
    [
        (-1, None, ValueError, "StaircaseKVCache.freeze: room is -1 and must be at least 0"),
        (1.5, None, TypeError, "StaircaseKVCache.freeze: room is a float and must be an int"),
        (5, 64, ValueError, "StaircaseKVCache.freeze: room is 5 and must be None, since capacity is 64"),
    ],
)
def test_freeze_refuses(room: Any, capacity: int | None, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind) as error:
        made(small(), capacity=capacity).freeze(room)
    assert str(error.value) == sentence


@pytest.mark.parametrize("repeats, kind", [(0, ValueError), (True, TypeError), ("two", TypeError)])
def test_fork_refuses(repeats: Any, kind: type[Exception]) -> None:
    prefix = made(small()).freeze()
    with pytest.raises(kind, match=r"^StaircasePrefix.fork: repeats is .* and must be "):
        prefix.fork(repeats)


def tokens_twice(n: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = tokens(2 * n, batch=batch, dtype=torch.bfloat16).split(n, 2)
    return key, value
