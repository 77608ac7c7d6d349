# SPDX-License-Identifier: Apache-2.0
"""LambdaKVCache on random walks: whatever is done to it, the bits of attention over the tokens that survived."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore import LambdaKVCache
from pycore.ops import lambda_attention
from pycore.positions import rope_tables

HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 4, 2, 16, 8
Row = tuple[Tensor, Tensor, Tensor]  # query, key and value of the tokens a row has


def empty_row() -> Row:
    return (torch.empty(HEADS, 0, HEAD_DIM), torch.empty(KV_HEADS, 0, HEAD_DIM), torch.empty(KV_HEADS, 0, VALUE_DIM))


class Walk:
    """A cache, and beside it every token of each row that was appended and not taken back."""

    def __init__(self, sinks: int, window: int, rollback: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = LambdaKVCache(sinks, window, rollback)
        self.rows = [empty_row() for _ in range(self.draw(1, 3))]
        self.options: dict[str, Any] = {"rope": rope_tables(window + 64, HEAD_DIM)} if self.draw(0, 1) else {}
        self.chunk: Tensor | None = None  # queries of the newest chunk, and how much of each row is padding
        self.starts: list[int] = []
        self.refused = self.compared = 0

    def draw(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def append(self) -> None:
        batch = len(self.rows)
        size = self.draw(0, 3) if self.draw(0, 2) else self.draw(0, 220)
        padded = self.draw(0, 2) == 0
        starts = [self.draw(0, size) if padded else 0 for _ in range(batch)]
        if padded and self.draw(0, 1):
            starts = [0 if self.draw(0, 1) else size for _ in range(batch)]
        q, k, v = (self.random(batch, *shape) for shape in ((HEADS, size, HEAD_DIM), (KV_HEADS, size, HEAD_DIM),
                                                            (KV_HEADS, size, VALUE_DIM)))  # fmt: skip
        self.cache.append(k, v, starts=torch.tensor(starts) if padded else None)
        for b, start in enumerate(starts):
            new = zip(self.rows[b], (q, k, v), strict=True)
            self.rows[b] = tuple(torch.cat([x, y[b, :, start:]], 1) for x, y in new)  # type: ignore[assignment]
        self.chunk, self.starts = q, starts

    def expected(self, b: int) -> Tensor:
        q, k, v = (x[None] for x in self.rows[b])
        sizes = {"sink_size": self.cache.sink_size, "window_size": self.cache.window_size}
        out = lambda_attention(q, k, v, **sizes, **self.options)
        assert isinstance(out, Tensor) and not out.isnan().any()
        return out[0]

    def attend_chunk(self) -> None:
        """The queries of the newest chunk, right after it."""
        if self.chunk is None:
            return
        out = self.cache.attend(self.chunk, **self.options)
        for b, start in enumerate(self.starts):
            new = self.chunk.shape[2] - start
            total = self.rows[b][0].shape[1]
            assert torch.equal(out[b, :, start:], self.expected(b)[:, total - new :]), (b, start)
        self.chunk = None
        self.compared += 1

    def attend_last(self) -> None:
        """Some of the newest queries of every row, in whatever chunk they came. Refused, or right."""
        shortest = min((x[0].shape[1] for x in self.rows), default=0)
        count = self.draw(0, min(shortest, 200)) if self.draw(0, 1) else min(shortest, self.draw(1, 40))
        if self.chunk is not None and count == self.chunk.shape[2] and any(self.starts):
            return  # taken for the chunk's own, with its padding
        query = torch.stack([x[0][:, x[0].shape[1] - count :] for x in self.rows])
        try:
            out = self.cache.attend(query, **self.options)
        except ValueError as error:
            assert "query has" in str(error)
            assert count > self.cache._ring - self.cache.window_size + 1 - self.cache.rollback  # one is always served
            self.refused += 1
            return
        self.chunk = None
        for b, (q, _, _) in enumerate(self.rows):
            assert torch.equal(out[b], self.expected(b)[:, q.shape[1] - count :]), (b, count)
        self.compared += 1

    def crop(self) -> None:
        shortest = min(x[0].shape[1] for x in self.rows)
        count = self.draw(0, min(self.cache.rollback, shortest))
        try:
            self.cache.crop(count)
        except ValueError as error:
            assert "taken back before" in str(error)
            return
        self.rows = [tuple(x[:, : x.shape[1] - count] for x in row) for row in self.rows]  # type: ignore[misc]
        self.chunk = None

    def choose(self) -> None:
        batch = len(self.rows)
        which = self.draw(0, 2)
        if which == 2 and batch <= 2:
            self.cache.repeat_interleave(2)
            index = [b for b in range(batch) for _ in range(2)]
        else:
            index = [self.draw(0, batch - 1) for _ in range(batch if which == 0 else self.draw(1, 3))]
            (self.cache.reorder if which == 0 else self.cache.select)(torch.tensor(index))
        self.rows = [self.rows[b] for b in index]
        self.chunk = None

    def travel(self) -> None:
        """Into another cache, as by saving and loading."""
        state = copy.deepcopy(self.cache.state_dict())
        self.cache = LambdaKVCache(self.cache.sink_size, self.cache.window_size, self.cache.rollback)
        self.cache.load_state_dict(state)
        self.chunk = None

    def check(self) -> None:
        assert self.cache.lengths.tolist() == [x[0].shape[1] for x in self.rows]
        keys = self.cache.keys()
        for b, (_, k, _) in enumerate(self.rows):
            sinks, window, length = self.cache.sink_size, self.cache.window_size, k.shape[1]
            kept = torch.cat([k[:, :sinks], k[:, max(sinks, length - window) :]], 1)
            assert torch.equal(keys[b, :, : kept.shape[1]], kept)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize(("sinks", "window", "rollback"), [(0, 64, 64), (4, 100, 20), (3, 1, 63), (70, 63, 130)])
def test_walks(sinks: int, window: int, rollback: int, seed: int) -> None:
    walk = Walk(sinks, window, rollback, seed)
    walk.append()
    steps = [walk.append, walk.attend_chunk, walk.attend_last, walk.attend_last, walk.crop, walk.choose, walk.travel]
    for _ in range(40):
        step = steps[walk.draw(0, len(steps) - 1)]
        step()
        if step != walk.attend_chunk and step != walk.append:
            walk.check()
        if step == walk.append and walk.draw(0, 1):
            walk.attend_chunk()
    assert walk.compared >= 3


def test_the_ring_serves_less_after_a_crop() -> None:
    """What was cropped and not appended anew lies where older tokens lay."""
    q, k, v = (torch.randn(1, 2, 300, 16) for _ in range(3))
    expected = lambda_attention(q[:, :, :236], k[:, :, :236], v[:, :, :236], sink_size=0, window_size=64)
    cache = LambdaKVCache(0, 64, rollback=64)
    cache.append(k, v)
    cache.crop(64)
    with pytest.raises(ValueError, match="query has 2 rows and may have 1, 64 tokens having been taken back: "):
        cache.attend(q[:, :, 234:236])
    assert torch.equal(cache.attend(q[:, :, 235:236]), expected[:, :, 235:])
    cache.append(k[:, :, 236:246], v[:, :, 236:246])
    expected = lambda_attention(q[:, :, :246], k[:, :, :246], v[:, :, :246], sink_size=0, window_size=64)
    assert torch.equal(cache.attend(q[:, :, 235:246]), expected[:, :, 235:])
    with pytest.raises(ValueError, match="query has 12 rows and may have 11, 54 tokens"):
        cache.attend(q[:, :, 234:246])


def test_rows_that_differ_in_what_they_lack() -> None:
    """A padded chunk after a crop: the rollback left is the least of the rows', and the chunk's queries are served."""
    q, k, v = (torch.randn(2, 2, 500, 16) for _ in range(3))
    cache = LambdaKVCache(0, 64, rollback=64)
    cache.append(k[:, :, :300], v[:, :, :300])
    cache.crop(60)
    cache.append(k[:, :, 240:300], v[:, :, 240:300], starts=torch.tensor([60, 0]))
    out = cache.attend(q[:, :, 240:300])
    expected = lambda_attention(q[1:, :, :300], k[1:, :, :300], v[1:, :, :300], sink_size=0, window_size=64)
    assert torch.equal(out[1:], expected[:, :, 240:])
    assert cache.lengths.tolist() == [240, 300]
    with pytest.raises(ValueError, match="tokens is 5 with 60 taken back before and must be at most rollback, 64"):
        cache.crop(5)
    cache.select(torch.tensor([1]))
    cache.crop(64)
    assert cache.lengths.tolist() == [236]
