# SPDX-License-Identifier: Apache-2.0
"""Run by test_attention.py in a process of its own: attention on inputs that end where readable memory ends.

An access beyond them kills the process. Prints the name of each part it survived.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

import pycore
from pycore.ops import attention
from pycore.schedules import Causal, Full, Lambda, Segments
from tests.support.attention_inputs import tables

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
NO_ACCESS = 0


def forbid(memory: mmap.mmap, start: int, size: int) -> None:
    """Makes whole pages inaccessible."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if LIBC.mprotect(ctypes.c_void_p(address + start), ctypes.c_size_t(size), NO_ACCESS) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(x: Tensor, at_end: bool = True) -> Tensor:
    """A copy of x whose last byte (or first) lies at the edge of its pages; beyond them is nothing."""
    if x.numel() == 0:
        return x
    size = x.numel() * x.element_size()
    pages = max(-(-size // PAGE), 1) * PAGE
    memory = mmap.mmap(-1, pages + 2 * PAGE)
    offset = PAGE + (pages - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    copy.copy_(x)
    forbid(memory, 0, PAGE)
    forbid(memory, PAGE + pages, PAGE)
    return copy


def run(queries: int, keys: int, schedule: object, rows: int, limit: int | None, dim: int, heads: int = 6) -> None:
    """Forward and backward, with every input and the gradient at the end of its pages."""
    q, k, v = torch.randn(1, heads, queries, dim), torch.randn(1, 1, keys, dim), torch.randn(1, 1, keys, dim)
    rope = tables(rows, 2 * (dim // 4))
    expected = attention(q, k, v, schedule=schedule, rope=rope, distance_limit=limit)
    for at_end in (True, False):
        inputs = [guarded(x, at_end).requires_grad_() for x in (q, k, v)]
        pair = tuple(guarded(t, at_end) for t in rope)
        out = attention(*inputs, schedule=schedule, rope=pair, distance_limit=limit)
        assert torch.equal(out, expected)
        torch.autograd.grad(out, inputs, guarded(torch.ones_like(out), at_end))


def main() -> None:
    """The parts, in the order of their names in the test."""
    pycore.native.set_cpu_isa(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # Rows beyond the limit stand in one block with rows within it: the table ends at the limit and a tile.
    for limit in (0, 17, 63, 64, 100):
        for queries in (200, 16, 1):
            run(queries, 250, Causal(), limit + 64, limit, 16)
            run(queries, 250, Lambda(130, max(limit, 1)), max(limit, 1) + 64, max(limit, 1), 16)
    print("tables")
    for dim in (1, 7, 16, 33, 63):
        for queries, keys in ((1, 1), (5, 3), (3, 67), (70, 130)):
            for schedule in (Full(), Causal(), Lambda(2, 3)):
                run(queries, keys, schedule, max(queries, keys), None, dim)
    print("ends")
    # Λ reads the sinks' tile and the window's: what lies between them, 100 000 rows, has no readable page.
    length, dim = 100_000, 16
    q = torch.randn(1, 2, 3, dim)
    cache = []
    for _ in range(2):
        memory = mmap.mmap(-1, length * dim * 4)
        x = torch.frombuffer(memory, dtype=torch.float32).view(1, 1, length, dim)
        x[:, :, :64] = torch.randn(64, dim)
        x[:, :, -192:] = torch.randn(192, dim)
        forbid(memory, PAGE, (length - 192) * dim * 4 // PAGE * PAGE - PAGE)
        cache.append(x)
    one, last = torch.tensor([0, length]), torch.tensor([[0, length // 2, length - 70, 2 * length]])
    for schedule in (
        Lambda(4, 100), Lambda(4, 100, right=20), Segments(one, window_size=100, sink_size=4), Segments(last),
        Segments(one, False, 100, 4, 20), Segments(last, causal=False), Segments(last, False, 30),
    ):  # fmt: skip
        both_ends = isinstance(schedule, Segments) and not schedule.causal and schedule.right is None
        rows = length if both_ends else 164
        out = attention(q, *cache, schedule=schedule, rope=tables(rows, dim), distance_limit=100)
        assert out.isfinite().all() and out.count_nonzero() == out.numel()
    print("middle")


main()
