# SPDX-License-Identifier: Apache-2.0
"""EqualInfoWindows: the code by exhaustion on tiny alphabets, the steps against the reference, and what is refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import pycore
from pycore import native
from pycore.coding.arithmetic_coding_windows import Rows, _decode, _encode
from pycore.reference import arithmetic_coding as coder
from pycore.reference import arithmetic_coding_windows as reference
from tests.support.byte_models import Fixed, Hashed, Order2

TEXT = b"def windows(text):\n    return [window for window in text if window]  # windows of equal information\n" * 3


def counts_of(model: Any) -> Callable[[tuple[int, ...]], list[int]]:
    """The reference's view of a model."""
    known: dict[tuple[int, ...], list[int]] = {}

    def counts(prefix: tuple[int, ...]) -> list[int]:
        if prefix not in known:
            known[prefix] = coder.counts_of_probs(model.next_probs([bytes(prefix)])[0].tolist())
        return known[prefix]

    return counts


def rows_of(model: Any, alphabet: int) -> Rows:
    return Rows("test", model, alphabet, 4096)


# ---- the code --------------------------------------------------------------------------------------------------------


def tiny_models(alphabet: int) -> list[Any]:
    skewed = [0.9] + [0.1 / (alphabet - 1)] * (alphabet - 1)
    return [Fixed(skewed), Fixed(skewed[::-1]), Fixed([1.0] + [0.0] * (alphabet - 1)), Hashed(alphabet)]


@pytest.mark.parametrize(
    "alphabet, bits, longest", [(2, 1, 10), (2, 2, 11), (2, 4, 12), (2, 8, 12), (3, 2, 7), (3, 5, 8), (5, 3, 5)]
)
@pytest.mark.parametrize("which", range(4))
def test_every_short_text(alphabet: int, bits: int, longest: int, which: int) -> None:
    """All texts up to a length: each decodes to itself, so no two share their tokens."""
    model = tiny_models(alphabet)[which]
    texts = [bytes(text) for n in range(longest + 1) for text in itertools.product(range(alphabet), repeat=n)]
    tokens = _encode(texts, rows_of(model, alphabet), bits)
    assert len({tuple(each) for each in tokens}) == len(texts)
    flat = np.array([token for each in tokens for token in each])
    decoded = _decode(flat, rows_of(model, alphabet), bits)
    ends = np.cumsum([0, *map(len, tokens)])
    assert [b"".join(decoded[a:b]) for a, b in itertools.pairwise(ends)] == texts
    counts = counts_of(model)
    for text, each in zip(texts[:: max(1, len(texts) // 300)], tokens[:: max(1, len(texts) // 300)], strict=True):
        assert reference.encode(text, counts, bits) == each
        assert bytes(reference.decode(each, counts, bits)) == text


@pytest.mark.parametrize("alphabet, bits", [(2, 1), (2, 6), (3, 7), (7, 5), (16, 8), (256, 8), (256, 11)])
def test_every_codeword(alphabet: int, bits: int) -> None:
    """Each codeword is a window of its own, and encoding that window, with nothing after it, gives the codeword."""
    model = Hashed(alphabet)
    windows = _decode(np.arange(1 << bits), rows_of(model, alphabet), bits)
    assert len(set(windows)) == 1 << bits and all(windows)
    assert _encode(windows, rows_of(model, alphabet), bits) == [[token] for token in range(1 << bits)]
    counts = counts_of(model)
    for token in range(0, 1 << bits, max(1, (1 << bits) // 64)):
        assert bytes(reference.decode_window(token, counts, bits)) == windows[token]


def test_the_papers_counterexample() -> None:
    """P(a) = 0.9, 4 bits: the paper's greedy rule gives three windows of a's one codeword; here they have three."""

    def greedy(text: str) -> tuple[str, str]:
        """The paper's rule: the longest prefix whose shortest codeword has at most 4 bits, padded with zeros."""
        low, width, best = Fraction(0), Fraction(1), ("", "")
        for i, letter in enumerate(text):
            low, width = (low, width * Fraction(9, 10)) if letter == "a" else (
                low + width * Fraction(9, 10), width / 10)  # fmt: skip
            fitting = [n for n in range(5) if (-(-low * 2**n // 1) + 1) / Fraction(2**n) <= low + width]
            if not fitting:
                break
            code = -(-low * 2 ** fitting[0] // 1)
            best = (text[: i + 1], format(int(code), "b").zfill(fitting[0])[-fitting[0] :] if fitting[0] else "")
        return best[0], best[1].ljust(4, "0")

    texts = ["a" * 7 + "b" * 9, "a" * 10 + "b" * 9, "a" * 40]
    assert [greedy(text) for text in texts] == [("a" * 7, "0000"), ("a" * 10, "0000"), ("a" * 26, "0000")]

    model = Fixed([0.9, 0.1])
    codes = [bytes(text.translate({97: 0, 98: 1}), "latin-1") for text in texts]
    tokens = _encode(codes, rows_of(model, 2), 4)
    assert len({tuple(each) for each in tokens}) == 3
    assert [b"".join(_decode(np.array(each), rows_of(model, 2), 4)) for each in tokens] == codes


@pytest.mark.parametrize("bits", [8, 9, 16, 24, 31, 32, 33, 48, 53, 61, 62])
def test_round_trip(bits: int, isa: str) -> None:
    windows, model = pycore.EqualInfoWindows(bits), Hashed()
    texts = [TEXT[:90], bytes(range(256)), b"\0" * 40, b"\xff" * 40]
    for text in texts:
        tokens = windows.encode(text, model)
        assert tokens.dtype == torch.int64 and tokens.dim() == 1
        assert 0 <= int(tokens.min()) and int(tokens.max()) < 1 << bits
        assert windows.decode(tokens, model) == text
        assert tokens.tolist() == reference.encode(text, counts_of(model), bits)


@pytest.mark.parametrize("bits", [8, 16, 62])
def test_all_bytes(bits: int) -> None:
    """Each of the 256 bytes by itself and at the end of a text, after a model that gives them nothing."""
    windows, model = pycore.EqualInfoWindows(bits), Fixed([1.0] + [0.0] * 255)
    texts = [bytes([byte]) for byte in range(256)] + [b"\0\0" + bytes([byte]) for byte in range(256)]
    for text, tokens in zip(texts, windows.encode_batch(texts, model), strict=True):
        assert windows.decode(tokens, model) == text


@pytest.mark.parametrize("bits", [8, 16, 40])
def test_every_end(bits: int) -> None:
    """Every prefix of a text comes back whole, and its windows but the last are those of the text."""
    windows, model = pycore.EqualInfoWindows(bits), Order2(TEXT)
    text = TEXT[:120]
    whole = windows.encode(text, model).tolist()
    for n, tokens in enumerate(windows.encode_batch([text[:n] for n in range(len(text) + 1)], model)):
        assert windows.decode(tokens, model) == text[:n]
        assert tokens.tolist()[:-1] == whole[: len(tokens) - 1] if n else tokens.shape == (0,)


def test_no_bytes() -> None:
    windows, model = pycore.EqualInfoWindows(), Hashed()
    assert windows.encode(b"", model).shape == (0,)
    assert windows.decode(windows.encode(b"", model), model) == windows.decode([], model) == b""
    assert windows.encode_batch([], model) == [] and model.asked == []


def test_windows_fill_their_bits() -> None:
    """On text the model knows, a window carries nearly all of its bits: more than the 13.35 of 16 of the paper's."""
    windows, model = pycore.EqualInfoWindows(16), Order2(TEXT)
    tokens, position, information = windows.encode(TEXT, model), 0, []
    for token in tokens.tolist()[:-1]:
        piece = windows.decode([token], model)
        shares = [model.row(piece[:i])[byte] for i, byte in enumerate(piece)]
        information.append(-np.log2(shares).sum())
        position += len(piece)
    assert np.mean(information) > 13.8


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [1, 7, 4096])
def test_batches_change_nothing(max_batch: int) -> None:
    model = Hashed()
    texts = [TEXT[i : i + 30] for i in range(0, 150, 10)]
    alone = [pycore.EqualInfoWindows(20).encode(text, model).tolist() for text in texts]
    model.asked.clear()
    windows = pycore.EqualInfoWindows(20, max_batch=max_batch)
    assert [tokens.tolist() for tokens in windows.encode_batch(texts, model)] == alone
    assert max(model.asked) <= max_batch
    for text, tokens in zip(texts, alone, strict=True):
        assert windows.decode(tokens, model) == text


def test_decoding_asks_for_many_at_once() -> None:
    model = Order2(TEXT)
    tokens = pycore.EqualInfoWindows().encode(TEXT, model)
    hashed = Hashed()
    pycore.EqualInfoWindows().decode(tokens, hashed)
    assert max(hashed.asked) > 10 and hashed.asked[0] == 1  # all windows begin with the one row of the empty prefix


def test_threads_and_instruction_sets(isa: str) -> None:
    generator = np.random.default_rng(0)
    probs = generator.random((300, 256)).astype(np.float32)
    one, faults = native.window_counts(probs, threads=1)
    many, _ = native.window_counts(probs, threads=3)
    assert not faults.any() and np.array_equal(one, many)
    for i in range(0, 300, 60):
        counts = coder.counts_of_probs(probs[i].tolist())
        assert one[i].tolist() == [0, *itertools.accumulate(counts)]
    rows = np.arange(300)
    start = generator.integers(0, 2**61, 300)
    size = generator.integers(2, 2**40, 300)
    tokens = start + generator.integers(0, size)
    results = [native.window_decode(one, rows, start, size, tokens, bits=62, threads=n) for n in (1, 3)]
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("size", [2, 3, 255, 256, 1000, 2**33, 2**61 + 12345])
@pytest.mark.parametrize("bits", [62])
def test_steps_against_the_reference(size: int, bits: int) -> None:
    model = Hashed()
    cumulative, _ = native.window_counts(model.next_probs([b"x"]))
    edges = reference.bounds(np.diff(cumulative[0]).tolist(), size, root=False)
    one = np.zeros(256, np.int64)
    start, sizes = np.full(256, 1 << 60), np.full(256, size)
    moved, begin, width = native.window_encode(cumulative, one, start, sizes, np.arange(256), bits=bits)
    shares = np.diff(np.array(edges))
    assert np.array_equal(moved, shares > 0)
    assert np.array_equal(begin[moved > 0] - (1 << 60), np.array(edges[:-1])[moved > 0])
    assert np.array_equal(width, np.where(moved > 0, shares, size))
    inside = np.flatnonzero(moved)
    for codewords in (begin[inside], begin[inside] + width[inside] - 1):
        symbols, first, count = native.window_decode(
            cumulative, one[inside], start[inside], sizes[inside], codewords, bits=bits
        )
        assert np.array_equal(symbols, inside)
        assert np.array_equal(first, begin[inside]) and np.array_equal(count, width[inside])
    stop = native.window_decode(cumulative, one[:1], start[:1], sizes[:1], start[:1] + size - 1, bits=bits)
    assert stop[0].tolist() == [-1]


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_a_model_may_return(dtype: torch.dtype) -> None:
    class Torch:
        def next_probs(self, prefixes: list[bytes]) -> torch.Tensor:
            return torch.from_numpy(Hashed(sharpness=1.0).next_probs(prefixes)).to(dtype).requires_grad_()

    class Strided(Torch):
        def next_probs(self, prefixes: list[bytes]) -> torch.Tensor:
            return super().next_probs(prefixes).t().contiguous().t()

    class Numpy(Torch):
        def next_probs(self, prefixes: list[bytes]) -> Any:
            return super().next_probs(prefixes).detach().float().numpy()

    windows, models = pycore.EqualInfoWindows(), [Torch(), Strided(), Numpy()]
    if dtype == torch.float64:
        models.pop()
    tokens = [windows.encode(TEXT[:60], model).tolist() for model in models]
    assert tokens[0] == tokens[1] == tokens[-1]
    assert windows.decode(tokens[0], models[-1]) == TEXT[:60]


class Wrong:
    """A good model, except after one prefix."""

    def __init__(self, spoil: Callable[[np.ndarray], Any], prefix: bytes = b"de") -> None:
        self.spoil, self.prefix, self.good = spoil, prefix, Hashed(sharpness=0.5)

    def next_probs(self, prefixes: list[bytes]) -> Any:
        rows = self.good.next_probs(prefixes)
        return self.spoil(rows) if self.prefix in prefixes else rows


def entry(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def spoil(rows: np.ndarray) -> np.ndarray:
        rows[:, 7] = value
        return rows

    return spoil


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (entry(float("nan")), ValueError, r"next_probs\(b'de'\) has NaN, infinity or a negative entry and must not"),
        (entry(float("inf")), ValueError, r"next_probs\(b'de'\) has NaN, infinity or a negative entry and must not"),
        (entry(-1e-9), ValueError, r"next_probs\(b'de'\) has NaN, infinity or a negative entry and must not"),
        (np.zeros_like, ValueError, r"next_probs\(b'de'\) sums to zero and must not"),
        (
            lambda rows: rows[:, :255],
            ValueError,
            r"next_probs returned shape \[1, 255\] for 1 prefixes from b'de' and must return \[1, 256\]",
        ),
        (
            lambda rows: rows[0],
            ValueError,
            r"next_probs returned shape \[256\] for 1 prefixes from b'de' and must return \[1, 256\]",
        ),
        (
            lambda rows: (rows * 100).astype(np.int64),
            ValueError,
            r"next_probs returned int64 for 1 prefixes from b'de' and must return float32, ",
        ),
        (lambda rows: rows.tolist(), TypeError, r"next_probs returned a list and must return an array"),
    ],
)
def test_a_wrong_model(spoil: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^EqualInfoWindows.encode: {message}"):
        pycore.EqualInfoWindows(40).encode(TEXT, Wrong(spoil))


def test_a_long_prefix_is_shortened() -> None:
    model = Wrong(entry(-1.0), b"a" * 100)
    model.good = Fixed([0.0] * 97 + [1.0] + [0.0] * 158)
    message = r"next_probs\(\.\.\.b'a{48}' \(100 bytes\)\) has NaN"
    with pytest.raises(ValueError, match=message):
        pycore.EqualInfoWindows(40).encode(b"a" * 200, model)


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [7, 63, 0, -1])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match=f"^EqualInfoWindows: bits is {bits} and must be 8 to 62$"):
        pycore.EqualInfoWindows(bits)


def test_constructor_errors() -> None:
    with pytest.raises(TypeError, match="^EqualInfoWindows: bits is a float and must be an int$"):
        pycore.EqualInfoWindows(16.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^EqualInfoWindows: max_batch is 0 and must be at least 1$"):
        pycore.EqualInfoWindows(max_batch=0)


@pytest.mark.parametrize("token", [-1, 65536, 2**40])
def test_tokens_out_of_range(token: int) -> None:
    message = rf"^EqualInfoWindows.decode: tokens\[1\] is {token} and must be 0 to 65535$"
    for tokens in ([0, token], torch.tensor([0, token])):
        with pytest.raises(IndexError, match=message):
            pycore.EqualInfoWindows().decode(tokens, Hashed())


def test_argument_errors() -> None:
    windows = pycore.EqualInfoWindows()
    with pytest.raises(TypeError, match="^EqualInfoWindows.encode: data is a str and must be bytes$"):
        windows.encode("text", Hashed())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^EqualInfoWindows.encode_batch: texts\[1\] is a str and must be bytes$"):
        windows.encode_batch([b"", "text"], Hashed())  # type: ignore[list-item]
    with pytest.raises(TypeError, match="^EqualInfoWindows.encode_batch: texts is a bytes and must be a list of bytes"):
        windows.encode_batch(b"text", Hashed())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^EqualInfoWindows.encode: model is a object and must have next_probs\("):
        windows.encode(b"text", object())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^EqualInfoWindows.decode: tokens has dtype float32 and must have an integer"):
        windows.decode(torch.zeros(3), Hashed())
    with pytest.raises(ValueError, match=r"^EqualInfoWindows.decode: tokens has shape \[1, 3\] and must be \[n\]$"):
        windows.decode(torch.zeros(1, 3, dtype=torch.int64), Hashed())


ROW = np.array([[0, 1, 2, 3]])


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"bits": 63}, ValueError, "window_encode: bits is 63 and must be 1 to 62"),
        ({"bits": 1}, ValueError, "window_encode: cumulative has 3 symbols and must have 2 to 2 at 1 bits"),
        ({"cumulative": ROW[:, ::-1].copy()}, ValueError, "window_encode: cumulative[0] must rise from 0 to more than"),
        ({"cumulative": 0 * ROW}, ValueError, "window_encode: cumulative[0] must rise from 0 to more than 0"),
        ({"cumulative": ROW.astype(np.int32)}, ValueError, "window_encode: cumulative is int32 [1, 4] and must be int"),
        ({"rows": np.array([1])}, IndexError, "window_encode: rows[0] is 1 and must be 0 to 0"),
        (
            {"start": np.array([250])},
            ValueError,
            "window_encode: start[0] and size[0] are 250 and 9 and must be a node",
        ),
        ({"size": np.array([1])}, ValueError, "window_encode: start[0] and size[0] are 4 and 1 and must be a node of"),
        ({"size": np.array([1, 2])}, ValueError, "window_encode: size is int64 [2] and must be int64 [1]"),
        ({"symbols": np.array([3])}, IndexError, "window_encode: symbols[0] is 3 and must be 0 to 2"),
        ({"symbols": np.array([-1])}, IndexError, "window_encode: symbols[0] is -1 and must be 0 to 2"),
    ],
)
def test_step_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"cumulative": ROW, "rows": np.array([0]), "start": np.array([4]), "size": np.array([9]),
            "symbols": np.array([2]), "bits": 8}  # fmt: skip
    assert native.window_encode(**good)[0].tolist() == [1]
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        native.window_encode(**{**good, **changes})


def test_decode_step_errors() -> None:
    one = np.array([0])
    for token in (3, 13):
        with pytest.raises(IndexError, match=rf"^window_decode: tokens\[0\] is {token} and must be 4 to 12$"):
            native.window_decode(ROW, one, one + 4, one + 9, one + token, bits=8)
    for probs in (np.zeros((2, 3), np.int64), np.zeros(3), np.zeros((2, 1))):
        with pytest.raises(ValueError, match="^window_counts: probs has "):
            native.window_counts(probs)
