# SPDX-License-Identifier: Apache-2.0
"""`pycore.EqualInfoTable`: the most probable strings of a model as tokens, with no model at run time.

docs/ops/arithmetic_coding_equal_info.md says what it is for, docs/formats.md how a file looks; the kernels are in
csrc/cpu/arithmetic_coding/table.cpp, and pycore/reference/arithmetic_coding_table.py has it all in plain Python.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from numpy.typing import NDArray

from pycore import _load
from pycore._checks import check_bytes, check_int, check_whole
from pycore.coding.arithmetic_coding_windows import NextProbs, Rows, token_array

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EqualInfoTable"]

_LEAST_BITS, _MOST_BITS = 8, 20
_LONGEST = 255


class EqualInfoTable:
    """2^bits strings, each a token; text becomes tokens by longest match, and tokens text by lookup.

    Made by `build` from a model, or by `load` from a file. Every byte is a string of the table, so any bytes can be
    encoded, and any tokens decoded. Token 0 is the most probable string.

    Source: "Training LLMs over Neurally Compressed Text" (arXiv 2404.03626), whose windows of 16 bits are such a table
        too, because model and coder start anew at each of them; here the strings are chosen as a table.

    Example:
        >>> table = pycore.EqualInfoTable.build(model, bits=16)
        >>> tokens = table.encode(b"some text")
        >>> table.decode(tokens)
        b'some text'
        >>> table.save("table.pcei")
    """

    def __init__(self, file: bytes) -> None:
        """From the bytes of a file; `build` and `load` are the ways to come by one.

        Raises:
            BitstreamError: no table, or a damaged one.
        """
        self._file = bytes(file)
        self._trie = _load.native().EqualInfoTrie(self._file)
        self._strings: list[bytes] | None = None

    @classmethod
    def build(
        cls, model: NextProbs, bits: int = 16, *, progress: bool | None = None, max_batch: int = 4096
    ) -> EqualInfoTable:
        """The 2^bits most probable strings of at most 255 bytes, all single bytes among them.

        Probabilities are the model's from the start of a text, as `quantize_cdf` gives them at precision 24, so that
        the table is the same on every machine if the model is. A string that has all 256 extensions in the table is
        left out, since the longest match never ends there. The model is asked about every string of the table.

        Args:
            model: has `next_probs` (see `pycore.coding.arithmetic_coding_windows.NextProbs`).
            bits: 8 to 20.
            progress: a bar on stderr, or lines where that is no terminal; None for a bar on a terminal only.
            max_batch: the most prefixes the model is asked at once; the table does not depend on it.

        Raises:
            ValueError: bits or max_batch out of range; what the model returned is no [n, 256] of probabilities (the
                sentence names the prefix).
            TypeError: bits or max_batch is no int, or the model has no next_probs.
        """
        op = "EqualInfoTable.build"
        check_whole(op, "bits", bits)
        check_int(op, "max_batch", max_batch, 1)
        if not _LEAST_BITS <= bits <= _MOST_BITS:
            raise ValueError(f"{op}: bits is {bits} and must be {_LEAST_BITS} to {_MOST_BITS}")
        strings = _most_probable(Rows(op, model, 256, max_batch), bits, max_batch, _Progress(progress))
        return cls(_load.native().pack_equal_info(strings))

    def encode(self, data: bytes, *, parse: str = "longest") -> Tensor:
        """The tokens of data.

        Args:
            data: any bytes.
            parse: "longest", the longest match at each place; or "optimal", as few tokens as can be (and the longest
                first among such), which is slower and needs five bytes of memory a byte.

        Returns:
            int64 [n].

        Raises:
            TypeError: data is not bytes-like.
            ValueError: another parse.
        """
        import torch

        check_bytes("EqualInfoTable.encode", "data", data)
        if parse not in ("longest", "optimal"):
            raise ValueError(f"EqualInfoTable.encode: parse is {parse!r} and must be 'longest' or 'optimal'")
        tokens = self._trie.encode(data if isinstance(data, bytes) else bytes(data), fewest=parse == "optimal")
        return torch.from_numpy(tokens)

    def decode(self, tokens: Tensor | Sequence[int]) -> bytes:
        """The strings of the tokens, one after another.

        Args:
            tokens: integers, [n]: a tensor, an array or a sequence.

        Raises:
            IndexError: a token outside of [0, 2^bits).
            TypeError: tokens are no integers.
            ValueError: tokens has another shape.
        """
        array = token_array("EqualInfoTable.decode", tokens)
        data: bytes = self._trie.decode(np.ascontiguousarray(array, dtype=np.int64))
        return data

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table to a file, in the format of docs/formats.md."""
        part = Path(f"{os.fspath(path)}.part")
        try:
            part.write_bytes(self._file)
            os.replace(part, path)  # a file of that name is whole at all times
        except OSError:
            part.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EqualInfoTable:
        """A table that `save` wrote, by this version or an earlier one.

        Raises:
            BitstreamError: the file is truncated, damaged, extended, foreign, or of a later version.
            OSError: it cannot be read.
        """
        return cls(Path(path).read_bytes())

    @property
    def bits(self) -> int:
        """The table has 2^bits strings."""
        bits: int = self._trie.bits
        return bits

    @property
    def strings(self) -> list[bytes]:
        """The string of every token."""
        if self._strings is None:
            self._strings = self._trie.strings()
        return list(self._strings)

    def __len__(self) -> int:
        return 1 << self.bits

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EqualInfoTable) and self._file == other._file

    def __hash__(self) -> int:
        return hash(self._file)

    def __reduce__(self) -> tuple[type[EqualInfoTable], tuple[bytes]]:
        return EqualInfoTable, (self._file,)

    def __repr__(self) -> str:
        return f"EqualInfoTable(bits={self.bits})"


EqualInfoTable.__module__ = "pycore"  # its public home


class _Progress:
    """A bar on a terminal; elsewhere, if it was asked for, a line for every tenth."""

    def __init__(self, wanted: bool | None, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.bar = self.stream.isatty()
        self.shown = self.bar if wanted is None else bool(wanted)
        self.started = time.monotonic()
        self.done = -1

    def update(self, done: int, total: int) -> None:
        """Shows that `done` of the total strings are known, if that is more than before."""
        before, self.done = self.done, max(done, self.done)
        if not self.shown or self.done <= before:
            return
        left = (time.monotonic() - self.started) * (total - self.done) / max(self.done, 1)
        if self.bar:
            filled = 30 * self.done // total
            text = f"\rtable [{'#' * filled}{'.' * (30 - filled)}] {self.done}/{total}  {left:.0f} s left"
            print(text.ljust(80), end="\n" if self.done == total else "", file=self.stream, flush=True)
        elif 10 * self.done // total > 10 * max(before, 0) // total:
            print(f"table {self.done}/{total}", file=self.stream, flush=True)


class _Candidates:
    """Strings that may be in the table, but for the single bytes: the best `room` of those known.

    Best-first takes strings in the order of (-p, length, bytes), because no string comes before one it begins with: its
    probability is a product with one factor more, and its length is greater. So what best-first takes are the first so
    many of all strings in that order, whenever the model is asked about which, and a string that has `room` known ones
    before it is not among the first `room`.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.p = np.empty(0)
        self.strings: list[bytes] = []
        self.expanded = np.empty(0, dtype=bool)

    def add(self, parents: list[bytes], p: NDArray[np.float64]) -> None:
        """P [parents, V], of each parent with each symbol after it. Parents come in the order of (length, bytes)."""
        flat = p.ravel()
        together = np.concatenate([self.p, flat])
        keep_old = np.ones(len(self.p), dtype=bool)
        chosen = np.arange(len(flat))
        if len(together) > self.room:
            least = -np.partition(-together, self.room - 1)[self.room - 1]
            ties = self.room - int((together > least).sum())
            keep_old = self.p >= least
            # flat is in the order of (length, bytes) too, so of its ties only the first can be among the best.
            tied = np.flatnonzero(flat == least)[:ties]
            chosen = np.sort(np.concatenate([np.flatnonzero(flat > least), tied]))
        symbols = [bytes([i]) for i in range(p.shape[1])]
        new = [parents[i // p.shape[1]] + symbols[i % p.shape[1]] for i in chosen.tolist()]
        self.strings = [string for string, keep in zip(self.strings, keep_old.tolist(), strict=True) if keep] + new
        self.p = np.concatenate([self.p[keep_old], flat[chosen]])
        self.expanded = np.concatenate([self.expanded[keep_old], np.zeros(len(new), dtype=bool)])
        surplus = len(self.p) - self.room
        if surplus > 0:  # old ties and new ones
            tied = np.flatnonzero(self.p == self.p.min())
            worst = sorted(tied.tolist(), key=lambda i: (len(self.strings[i]), self.strings[i]))[-surplus:]
            keep = np.ones(len(self.p), dtype=bool)
            keep[worst] = False
            self.strings = [string for string, good in zip(self.strings, keep.tolist(), strict=True) if good]
            self.p, self.expanded = self.p[keep], self.expanded[keep]

    def take(self, count: int, longest: int) -> tuple[list[bytes], NDArray[np.float64]]:
        """The best `count` that were not expanded, in the order of (length, bytes), and their probabilities."""
        waiting = np.flatnonzero(~self.expanded)
        if len(waiting) > count:
            waiting = waiting[np.argpartition(-self.p[waiting], count - 1)[:count]]
        self.expanded[waiting] = True
        short = [i for i in waiting.tolist() if len(self.strings[i]) < longest]
        short.sort(key=lambda i: (len(self.strings[i]), self.strings[i]))
        return [self.strings[i] for i in short], self.p[short]


def _most_probable(rows: Rows, bits: int, max_batch: int, progress: _Progress, longest: int = _LONGEST) -> list[bytes]:
    """The strings of the table, the most probable first: pycore.reference.arithmetic_coding_table.build, in batches."""
    limit, alphabet = 1 << bits, rows.alphabet
    first = rows.shares([b""])[0]
    entered = {bytes([i]): p for i, p in enumerate(first.tolist())}
    # Every string that gives its place up has `alphabet` extensions of its own, so of n that enter besides the single
    # ones at most n / alphabet do, and n is at most this:
    room = (limit - alphabet) * alphabet // (alphabet - 1) + 1
    candidates = _Candidates(room)
    total = room + alphabet
    parents, p = list(entered), first
    while limit > alphabet:
        for begin in range(0, len(parents), max_batch):
            batch = parents[begin : begin + max_batch]
            candidates.add(batch, p[begin : begin + max_batch, None] * rows.shares(batch))
        progress.update(min(int(candidates.expanded.sum()), total - 1), total)
        if candidates.expanded.all():
            break
        parents, p = candidates.take(max_batch, longest)
    order = sorted(zip((-candidates.p).tolist(), map(len, candidates.strings), candidates.strings, strict=True))
    extensions: dict[bytes, int] = {}
    freed: set[bytes] = set()
    for minus_p, _, string in order:
        if len(entered) - len(freed) == limit:
            break
        entered[string] = -minus_p
        parent = string[:-1]
        extensions[parent] = extensions.get(parent, 0) + 1
        if extensions[parent] == alphabet and len(parent) >= 2:
            freed.add(parent)
    progress.update(total, total)
    return sorted(entered.keys() - freed, key=lambda string: (-entered[string], len(string), string))
