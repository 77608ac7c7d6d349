# SPDX-License-Identifier: Apache-2.0
"""EqualInfoTable: its strings, parses and bytes against the reference, its file, and what is refused."""

from __future__ import annotations

import functools
import io
import pickle
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pycore
from pycore import native
from pycore.coding.arithmetic_coding_table import _most_probable, _Progress
from pycore.coding.arithmetic_coding_windows import Rows
from pycore.reference import arithmetic_coding as coder
from pycore.reference import arithmetic_coding_table as reference
from tests.support.byte_models import Fixed, Hashed, Order2

GOLDEN_TOKENS = [
    *(86, 87, 116, 44, 24, 12, 116, 9, 232, 75, 153, 147),
    *(244, 250, 181, 68, 7, 58, 14, 101, 121, 249, 166, 22),
]  # fmt: skip
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "equal_info_table.pcei"
TEXT = Path(__file__).read_bytes()


def cdf_of(model: Any) -> Any:
    return lambda prefix: coder.cdf_of_counts(coder.counts_of_probs(model.next_probs([prefix])[0].tolist()), 24)


def packed(strings: list[bytes]) -> pycore.EqualInfoTable:
    return pycore.EqualInfoTable(native.pack_equal_info(strings))


@pytest.fixture(scope="module")
def table() -> pycore.EqualInfoTable:
    return pycore.EqualInfoTable.build(Order2(TEXT), bits=11)


# ---- which strings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [1, 3, 64, 4096])
@pytest.mark.parametrize(
    "alphabet, bits, longest", [(2, 1, 9), (2, 5, 9), (2, 7, 255), (3, 4, 9), (3, 6, 5), (4, 8, 9), (16, 6, 9)]
)
@pytest.mark.parametrize("which", range(4))
def test_batches_find_what_best_first_finds(alphabet: int, bits: int, longest: int, max_batch: int, which: int) -> None:
    """Also where many strings are equally probable, and where strings give their places up."""
    skewed = [0.9] + [0.1 / (alphabet - 1)] * (alphabet - 1)
    model = [Hashed(alphabet), Fixed([1.0] * alphabet), Fixed(skewed[::-1]), Hashed(alphabet, seed=1, sharpness=0.3)]
    rows = Rows("test", model[which], alphabet, max_batch)
    strings = _most_probable(rows, bits, max_batch, _Progress(False), longest)
    assert strings == reference.build(cdf_of(model[which]), bits, alphabet, longest)
    assert len(strings) == 1 << bits and {bytes([i]) for i in range(alphabet)} <= set(strings)


def test_strings_that_give_their_place_up() -> None:
    """With two symbols of one probability every string of two or three is extended both ways, and none is kept."""
    strings = reference.build(cdf_of(Fixed([1.0, 1.0])), 4, 2)
    assert sorted(map(len, strings)) == [1] * 2 + [3] * 3 + [4] * 11
    assert not any(len(string) >= 2 and {string + b"\0", string + b"\1"} <= set(strings) for string in strings)


@pytest.mark.parametrize("max_batch", [7, 4096])
def test_bytes(table: pycore.EqualInfoTable, max_batch: int) -> None:
    model = Order2(TEXT)
    again = pycore.EqualInfoTable.build(model, bits=11, max_batch=max_batch)
    assert again == table and hash(again) == hash(table) and len(table) == 2048 and table.bits == 11
    assert table.strings == reference.build(cdf_of(model), 11)


# ---- parses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 3, 17, 100, 2047, 2048, 2049, 2300, 5000, 33000, 70001])
def test_parses(table: pycore.EqualInfoTable, n: int) -> None:
    data = (TEXT * 8)[17 : 17 + n]
    tokens, few = table.encode(data), table.encode(data, parse="optimal")
    assert tokens.dtype == few.dtype == torch.int64
    assert table.decode(tokens) == table.decode(few) == data
    assert len(few) <= len(tokens) <= n
    if n <= 5000:
        assert tokens.tolist() == reference.longest_match(table.strings, data)
        assert few.tolist() == reference.fewest(table.strings, data)


@functools.cache
def from_the_front(strings: tuple[bytes, ...], text: bytes) -> list[int]:
    return reference.longest_match(strings, text)


def test_segments_join(table: pycore.EqualInfoTable, isa: str) -> None:
    """Long texts are parsed in segments side by side; the tokens are those of the parse from the front."""
    generator = random.Random(1)
    texts = [
        b" " * 40_000,  # every segment starts inside a token, and all parses agree only by chance
        b"ab" * 20_000,
        bytes(generator.randrange(256) for _ in range(40_000)),
        bytes(generator.choice(b" ab") for _ in range(40_000)),
    ]
    strings = [bytes([i]) for i in range(256)] + [b" " * n for n in range(2, 200)] + [b"ab" * 20, b"ba"]
    closed = {string[:n] for string in strings for n in range(1, len(string) + 1)}
    filler = (bytes([7, 7]) + bytes([i, j]) for i in range(256) for j in range(256))
    closed |= {bytes([7, 7])} | {bytes([7, 7, i]) for i in range(256)}
    while len(closed) < 1024:
        closed.add(next(filler))
    for each in (packed(sorted(closed)), table):
        for text in texts:
            tokens = each.encode(text)
            assert each.decode(tokens) == text
            assert tokens.tolist() == from_the_front(tuple(each.strings), text)


@pytest.mark.parametrize("length", range(1, 12))
def test_ends_inside_strings_without_a_token(length: int) -> None:
    """`aa` and `aaa` are extended by all bytes and are no tokens: only the end of a text can stop there."""
    strings = [bytes([i]) for i in range(256)]
    strings += [b"aa" + bytes([i]) for i in range(256) if i != 97] + [b"aaa" + bytes([i]) for i in range(256)]
    strings += [b"b" + bytes([i]) for i in range(256)] + [b"ca"]
    assert len(set(strings)) == len(strings) == 1024
    table = packed(strings)
    for text in (b"a" * length, b"x" + b"a" * length, b"a" * length + b"b", b"aaab" + b"a" * length):
        assert table.encode(text).tolist() == reference.longest_match(strings, text)
        assert table.encode(text, parse="optimal").tolist() == reference.fewest(strings, text)
        assert table.decode(table.encode(text)) == text


def test_the_optimal_parse_is_shorter_somewhere() -> None:
    strings = [bytes([i]) for i in range(256)] + [b"ab", b"bcdefg", b"bc", b"bcd", b"bcde", b"bcdef"]
    strings += [b"z" + bytes([i]) for i in range(250)]
    table = packed(strings)
    assert [len(table.encode(b"abcdefg", parse=parse)) for parse in ("longest", "optimal")] == [6, 2]


def test_every_token(table: pycore.EqualInfoTable, isa: str) -> None:
    strings = table.strings
    assert [table.decode([token]) for token in range(2048)] == strings
    assert table.decode(torch.arange(2048)) == table.decode(np.arange(2048, dtype=np.uint16)) == b"".join(strings)
    for token, string in enumerate(strings):
        assert table.encode(string).tolist() == [token]
    assert table.decode(torch.arange(2048).flip(0)[::2]) == b"".join(strings[::-1][::2])


def test_long_strings() -> None:
    """A model that is sure of everything: strings up to the longest, 255 bytes, which are not copied in one piece."""
    table = pycore.EqualInfoTable.build(Fixed([1.0 if i == 97 else 0.0 for i in range(256)]), bits=10)
    assert max(map(len, table.strings)) == 255
    for n in (1, 14, 15, 16, 17, 254, 255, 256, 1000, 5000):
        for text in (b"a" * n, b"a" * n + b"b", (b"a" * n + b"bc") * 9):
            assert table.decode(table.encode(text)) == text
            assert table.encode(text).tolist() == reference.longest_match(table.strings, text)


def test_decoding_more_than_was_guessed() -> None:
    """The size of the text is guessed by a sample of the tokens, which here meets the short ones alone, or the long."""
    strings = BYTES + [b"a" * n for n in range(2, 256)] + [b"b" * n for n in range(2, 4)]
    table = packed(strings)
    for rare in (255, 0):
        tokens = torch.full((100_000,), 509 - rare)
        tokens[torch.arange(len(tokens)) % 25 == 0] = 254 + rare
        assert table.decode(tokens) == b"".join(strings[token] for token in tokens.tolist())
        tokens[-1] = 512
        with pytest.raises(IndexError, match=r"^EqualInfoTable.decode: tokens\[99999\] is 512 and must be 0 to 511$"):
            table.decode(tokens)


def test_random_tokens_decode(table: pycore.EqualInfoTable) -> None:
    tokens = torch.randint(0, 2048, (30_000,))
    data = table.decode(tokens)
    assert data == b"".join(table.strings[token] for token in tokens.tolist())
    assert table.decode(table.encode(data)) == data


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_kinds_of_bytes(table: pycore.EqualInfoTable, kind: Any) -> None:
    assert torch.equal(table.encode(kind(TEXT)), table.encode(TEXT))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_file(table: pycore.EqualInfoTable, tmp_path: Path) -> None:
    path = tmp_path / "table.pcei"
    table.save(path)
    loaded = pycore.EqualInfoTable.load(path)
    assert loaded == table and loaded.strings == table.strings and list(tmp_path.iterdir()) == [path]
    assert pickle.loads(pickle.dumps(table)) == table
    strings = table.strings
    body = bytes(map(len, strings)) + b"".join(strings)
    head = b"PCEI\x01\x0b\0\0"
    size = sum(map(len, strings)).to_bytes(4, "little")
    crc = coder.crc32c(head + size + body).to_bytes(4, "little")
    assert path.read_bytes() == head + crc + size + body


def test_golden_file() -> None:
    """A file that the first version wrote."""
    table = pycore.EqualInfoTable.load(GOLDEN)
    assert (
        table.bits == 9 and table.encode(b"def windows(self) -> int:\n    return self.bits\n").tolist() == GOLDEN_TOKENS
    )
    assert native.pack_equal_info(table.strings) == GOLDEN.read_bytes()


def test_every_truncation_and_flip() -> None:
    file = GOLDEN.read_bytes()
    for n in [*range(64), *range(64, len(file), 37)]:
        with pytest.raises(pycore.BitstreamError, match="^EqualInfoTable: the file is truncated$"):
            pycore.EqualInfoTable(file[:n])
    for i in range(len(file)):
        damaged = bytearray(file)
        damaged[i] ^= 1 << i % 8
        with pytest.raises(pycore.BitstreamError, match="^EqualInfoTable: the file (is|has) "):
            pycore.EqualInfoTable(bytes(damaged))
    with pytest.raises(pycore.BitstreamError, match="^EqualInfoTable: the file has bytes after its end$"):
        pycore.EqualInfoTable(file + b"\0")
    with pytest.raises(pycore.BitstreamError, match="^EqualInfoTable: the file is no table of pycore$"):
        pycore.EqualInfoTable(b"\x89PNG" + file[4:])
    with pytest.raises(pycore.BitstreamError, match="^EqualInfoTable: the file has format version 2, and this library"):
        pycore.EqualInfoTable(file[:4] + b"\2" + file[5:])


BYTES = [bytes([i]) for i in range(256)]


@pytest.mark.parametrize(
    "strings, message",
    [
        (BYTES + [b"ab"] * 2 + [b"z" + bytes([i]) for i in range(254)], "has one string for tokens 256 and 257"),
        ([b"xy"] + BYTES[1:] + [b"z" + bytes([i]) for i in range(256)], "lacks strings that begin with some byte"),
        (
            [b"\0\0"] + BYTES[1:] + [b"z" + bytes([i]) for i in range(256)],
            "lacks the string of the single byte 0",
        ),
        (
            BYTES + [b"z" + bytes([i]) for i in range(255)] + [b"abc"],
            "lacks a string that others begin with, and not every byte may follow it",
        ),
    ],
)
def test_tables_that_cannot_be(strings: list[bytes], message: str) -> None:
    """A whole file whose strings are no table: the kernels rely on what is checked."""
    with pytest.raises(pycore.BitstreamError, match=f"^EqualInfoTable: the file {message}$"):
        packed(strings)


def test_a_table_with_holes_is_read_in_a_moment() -> None:
    """Nodes of few children leave holes that others, with one child, cannot use; looking at all of them each time took
    two minutes for this table.
    """
    pairs = [bytes([i, j]) for i in range(256) for j in range(256)]
    half = 7 * len(pairs) // 10
    triples = [pair + bytes([i]) for pair in pairs[:half] for i in (0, 2, 5, 9, 20, 77)]
    triples += [pair + b"\1" for pair in pairs[half:]]
    strings = BYTES + pairs + triples
    strings += [triple + b"\1" for triple in triples[: 2**19 - len(strings)]]
    begin = time.perf_counter()
    trie = native.EqualInfoTrie(native.pack_equal_info(strings))
    assert time.perf_counter() - begin < 20
    assert trie.trie_bytes < 12 * len(strings)


def test_pack_errors() -> None:
    with pytest.raises(ValueError, match=r"^pack_equal_info: strings has 3 entries and must have a power of two from"):
        native.pack_equal_info([b"a"] * 3)
    for string in (b"", b"a" * 256):
        with pytest.raises(
            ValueError, match=rf"^pack_equal_info: strings\[255\] has {len(string)} bytes and must have"
        ):
            native.pack_equal_info(BYTES[:255] + [string])


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_build_errors() -> None:
    build: Any = pycore.EqualInfoTable.build
    for bits in (7, 21):
        with pytest.raises(ValueError, match=f"^EqualInfoTable.build: bits is {bits} and must be 8 to 20$"):
            build(Hashed(), bits)
    with pytest.raises(TypeError, match=r"^EqualInfoTable.build: bits is a float and must be an int$"):
        build(Hashed(), 9.0)
    with pytest.raises(ValueError, match=r"^EqualInfoTable.build: max_batch is 0 and must be at least 1$"):
        build(Hashed(), max_batch=0)
    with pytest.raises(
        TypeError, match=r"^EqualInfoTable.build: model is a object and must have next_probs\(prefixes\)"
    ):
        build(object())
    with pytest.raises(ValueError, match=r"^EqualInfoTable.build: next_probs\(b''\) has NaN, infinity or a negative"):
        build(Fixed([float("nan")] * 256))


def test_argument_errors(table: Any) -> None:
    with pytest.raises(TypeError, match="^EqualInfoTable.encode: data is a str and must be bytes$"):
        table.encode("text")
    with pytest.raises(ValueError, match="^EqualInfoTable.encode: parse is 'best' and must be 'longest' or 'optimal'$"):
        table.encode(b"text", parse="best")
    for token in (-1, 2048, 2**40):
        with pytest.raises(
            IndexError, match=rf"^EqualInfoTable.decode: tokens\[1500\] is {token} and must be 0 to 2047"
        ):
            table.decode([0] * 1500 + [token])
    with pytest.raises(TypeError, match="^EqualInfoTable.decode: tokens has dtype float32 and must have an integer"):
        table.decode(torch.zeros(2))
    with pytest.raises(ValueError, match=r"^EqualInfoTable.decode: tokens has shape \[1, 2\] and must be \[n\]$"):
        table.decode(torch.zeros(1, 2, dtype=torch.int64))
    assert table.decode([]) == b"" and table.encode(b"").shape == (0,)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines where there is no terminal, nothing unless asked; a bar on a terminal."""
    pycore.EqualInfoTable.build(Order2(TEXT), bits=9)
    assert capsys.readouterr().err == ""
    pycore.EqualInfoTable.build(Order2(TEXT), bits=9, progress=True, max_batch=16)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "table 514/514" and 3 <= len(lines) <= 10 and not any("\r" in line for line in lines)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    bar = _Progress(None, stream)
    bar.update(5, 10)
    bar.update(10, 10)
    assert stream.getvalue().count("\r") == 2 and "[" + "#" * 15 + "." * 15 + "] 5/10" in stream.getvalue()


def test_masked_tokens() -> None:
    """A masked array of NumPy is no array of integers: what is masked would be decoded all the same."""
    table = pycore.EqualInfoTable(pycore.native.pack_equal_info([bytes([i]) for i in range(256)]))
    windows = pycore.EqualInfoWindows(bits=16)
    masked = np.ma.masked_array([65, 66], [True, False])
    for op, call in (
        ("EqualInfoTable", lambda: table.decode(masked)),
        ("EqualInfoWindows", lambda: windows.decode(masked, None)),
    ):
        with pytest.raises(TypeError, match=rf"^{op}\.decode: tokens is a masked array, .*: call filled\(\)$"):
            call()
    assert table.decode(masked.filled(67)) == b"CB"
