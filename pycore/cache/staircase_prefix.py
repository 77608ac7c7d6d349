# SPDX-License-Identifier: Apache-2.0
"""A prefix that several staircase caches continue, kept in memory once.

Its planes lie in a file without a name, which every continuation maps for itself alone: the system shares the pages
until one is written to, and copies that page for the writer. So kernels see plain tensors, what they compute is what
they compute on a copy, and a continuation has pages of its own only where its own tokens went.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import struct
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycore._checks import check_int

__all__ = ["StaircasePrefix", "held_bytes", "trimmed"]

_PAGE = mmap.PAGESIZE
_FIXED, _NORESERVE = 0x10, 0x4000  # of <sys/mman.h>; Python's mmap has no address to map at
_PRESENT, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61  # of /proc/self/pagemap
_mapped: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # address -> its bytes


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _map(address: int | None, size: int, flags: int, file: int, offset: int) -> int:
    flags |= mmap.MAP_PRIVATE | _NORESERVE
    result = _libc().mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, offset)
    if result in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"StaircasePrefix.fork: {size} bytes of addresses must be free, and could not be mapped")
    return int(result)


def held_bytes(x: Tensor) -> int:
    """Bytes of memory that a tensor has for itself: all, or the pages that were written to of a prefix's."""
    address = x.data_ptr() if x.numel() else 0
    if address not in _mapped:
        return x.numel() * x.element_size()
    pages = len(_mapped[address]) // _PAGE
    with open("/proc/self/pagemap", "rb", buffering=0) as table:
        table.seek(address // _PAGE * 8)
        entries = table.read(8 * pages)
    words = struct.unpack(f"={pages}Q", entries)
    return _PAGE * sum(bool(word & (_PRESENT | _SWAPPED)) and not word & _OF_FILE for word in words)


def trimmed(storage: list[Tensor], rings: list[int], tiles: int) -> list[Tensor]:
    """A side without the tiles past the cache's room, which a prefix's pages bring; rings have none."""
    whole = {0, *rings}
    return [x if i in whole or x.dim() < 4 else x[:, :, : max(tiles, 1)] for i, x in enumerate(storage)]


class _Part(NamedTuple):
    """A tensor of the storage that lies in the file."""

    side: int
    place: int  # in the side
    offset: int  # bytes into the file
    shape: tuple[int, ...]  # of one row
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class StaircasePrefix:
    """The tokens of a `StaircaseKVCache` as they were when `freeze` was called, for caches that go on from them.

    What the cache keeps for good (the planes of its last width, lo, hi and their centers) is kept once, however many
    continuations there are; what it keeps in rings, which a continuation soon writes over, each copies.
    """

    def __init__(self, cache: Any, room: int) -> None:
        """As `StaircaseKVCache.freeze`, which checks."""
        self._made: dict[str, Any] = {
            "kv_heads": cache.kv_heads, "head_dim": cache.head_dim, "value_dim": cache.value_dim,
            "capacity": cache.capacity, "dtype": cache.dtype,
        }  # fmt: skip
        self._kind, self._staircase = type(cache), cache.staircase
        group = cache.staircase.group_size
        tokens = int(cache._peak.max()) if cache.batch else 0
        used = -(-tokens // group)
        self._rows = cache._up(tokens + room if cache.capacity is None else cache.capacity)
        if any(side.full_rows is None for side in cache._sides):  # copied as it is
            self._rows = cache._rows
        shared = [
            (which, i)
            for which, side in enumerate(cache._sides)
            for i in range(1, 9)
            if i not in side.rings() and cache._storage[which][i].dim() == 4
        ]
        # Rows begin where pages do, so a row has a multiple of some number of tiles; the room that makes is never used.
        tiles = self._rows // group
        for which, i in shared:
            x = cache._storage[which][i]
            unit = _PAGE // math.gcd(x.shape[1] * x.shape[3] * x.element_size(), _PAGE)
            tiles = -(-tiles // unit) * unit
        self._parts, size = [], 0
        for which, i in shared:
            x = cache._storage[which][i]
            part = _Part(which, i, size, (x.shape[1], tiles, x.shape[3]), x.dtype)
            self._parts.append(part)
            size += cache.batch * part.row_bytes
        with torch.inference_mode(False):
            self._own = [[x.clone() for x in storage] for storage in cache._storage]
            self._lengths, self._peak = cache._lengths.clone(), cache._peak.clone()
            self._file = os.memfd_create("pycore_staircase_prefix") if size else -1
            if size:
                weakref.finalize(self, os.close, self._file)
                os.truncate(self._file, size)
                bytes_of_all = mmap.mmap(self._file, size)
                for part in self._parts:
                    x = cache._storage[part.side][part.place]
                    to = torch.frombuffer(
                        bytes_of_all, dtype=part.dtype, offset=part.offset, count=x.shape[0] * math.prod(part.shape)
                    ).view(x.shape[0], *part.shape)
                    to[:, :, :used] = x[:, :, :used]
            for part in self._parts:
                self._own[part.side][part.place] = torch.zeros(0, dtype=part.dtype)

    @property
    def lengths(self) -> Tensor:
        """int64 [batch]: tokens of each row."""
        return self._lengths.clone()

    @property
    def nbytes(self) -> int:
        """Bytes that the prefix keeps, continuations not counted; those have their own `nbytes`."""
        shared = os.fstat(self._file).st_blocks * 512 if self._file >= 0 else 0
        return shared + sum(x.numel() * x.element_size() for storage in self._own for x in storage)

    def fork(self, repeats: int = 1) -> Any:
        """A `StaircaseKVCache` that goes on from here, with every row `repeats` times, copies side by side.

        It is in every bit as a copy would be, and may be continued, cropped within `rollback` and attended to while
        others are. Choosing or reordering its rows, or growing past the room, gives it memory of its own.

        Raises:
            ValueError: repeats is below 1.
            TypeError: repeats is not an int.
            MemoryError: there are no addresses left.
        """
        check_int("StaircasePrefix.fork", "repeats", repeats, 1)
        cache = self._kind(self._staircase, batch=0, **self._made)
        batch = len(self._lengths) * repeats
        with torch.inference_mode(False):
            storage = [[x.repeat_interleave(repeats, 0) if x.dim() == 4 else x for x in each] for each in self._own]
            for part in self._parts:
                storage[part.side][part.place] = self._view(part, batch, repeats)
            cache._lengths = self._lengths.repeat_interleave(repeats)
            cache._peak = self._peak.repeat_interleave(repeats)
        cache.batch, cache._storage, cache._rows = batch, storage, self._rows
        return cache

    def _view(self, part: _Part, batch: int, repeats: int) -> Tensor:
        size = batch * part.row_bytes
        if size == 0:
            return torch.zeros(batch, *part.shape, dtype=part.dtype)
        address = _map(None, size, mmap.MAP_ANONYMOUS, -1, 0)
        data: Any = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(data, _libc().munmap, address, size).atexit = False  # tensors may live longer
        for row in range(batch):
            place = address + row * part.row_bytes
            _map(place, part.row_bytes, _FIXED, self._file, part.offset + row // repeats * part.row_bytes)
        _mapped[address] = data
        return torch.frombuffer(data, dtype=part.dtype).view(batch, *part.shape)
