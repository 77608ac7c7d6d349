# SPDX-License-Identifier: Apache-2.0
"""`pycore.EqualInfoWindows`: text as tokens that each carry the same number of bits, with a model at run time.

csrc/include/pycore/arithmetic_coding/windows.h says what a window is, docs/ops/arithmetic_coding_equal_info.md why it
decodes; pycore/reference/arithmetic_coding_windows.py has both in plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pycore import _load
from pycore._checks import check_bytes, check_int, check_unmasked, check_whole

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EqualInfoWindows", "NextProbs"]

_LEAST_BITS, _MOST_BITS = 8, 62
_BYTES = 256
_KEPT_ROWS = 8192  # rows of cumulative counts a call remembers: 16 MiB

Ints = NDArray[np.int64]


class NextProbs(Protocol):
    """What `EqualInfoWindows` and `EqualInfoTable.build` ask of a model."""

    def next_probs(self, prefixes: list[bytes]) -> Any:
        """The distribution of the byte after each prefix.

        Returns:
            [n, 256], a torch tensor or a NumPy array in float32, float64, float16 or bfloat16: finite, not negative and
            not all zero; rows need not sum to one. A prefix must get the same row, to the bit, whatever it is asked
            together with.
        """


class EqualInfoWindows:
    """Cuts bytes into windows that are each one of 2^bits codewords, every codeword a window of its own.

    The model starts anew at each window, so that a token means the same bytes wherever it stands. Every token in
    [0, 2^bits) decodes, and windows carry close to `bits` bits of the model's information each.

    Args:
        bits: 8 to 62.
        max_batch: the most prefixes the model is asked at once.

    Raises:
        ValueError: bits or max_batch out of range.
        TypeError: bits or max_batch is no int.

    Source: "Training LLMs over Neurally Compressed Text" (arXiv 2404.03626) for the windows; the code itself is another
        one, because the paper's cannot always be decoded.

    Example:
        >>> windows = pycore.EqualInfoWindows(bits=16)
        >>> tokens = windows.encode(b"some text", model)
        >>> windows.decode(tokens, model)
        b'some text'
    """

    def __init__(self, bits: int = 16, *, max_batch: int = 4096) -> None:
        check_whole("EqualInfoWindows", "bits", bits)
        check_int("EqualInfoWindows", "max_batch", max_batch, 1)
        if not _LEAST_BITS <= bits <= _MOST_BITS:
            raise ValueError(f"EqualInfoWindows: bits is {bits} and must be {_LEAST_BITS} to {_MOST_BITS}")
        self.bits = bits
        self.max_batch = max_batch

    def encode(self, data: bytes, model: NextProbs) -> Tensor:
        """The tokens of one text.

        A window starts where the one before it ended, so the model is asked a prefix at a time: where there are several
        texts, `encode_batch` is faster.

        Args:
            data: any bytes.
            model: has `next_probs` (see `NextProbs`).

        Returns:
            int64 [n]; n is 0 for no bytes.

        Raises:
            TypeError: data is not bytes-like, or the model has no next_probs.
            ValueError: what the model returned is no [n, 256] of probabilities; the sentence names the prefix.
        """
        return self._encode("EqualInfoWindows.encode", [data], model)[0]

    def encode_batch(self, texts: Sequence[bytes], model: NextProbs) -> list[Tensor]:
        """`encode` for each text, with the model asked for all of them at once. The tokens are the same.

        Raises:
            TypeError, ValueError: as `encode`.
        """
        if isinstance(texts, bytes | bytearray | memoryview | str):
            raise TypeError(
                f"EqualInfoWindows.encode_batch: texts is a {type(texts).__name__} and must be a list of bytes"
            )
        return self._encode("EqualInfoWindows.encode_batch", list(texts), model)

    def decode(self, tokens: Tensor | Sequence[int], model: NextProbs) -> bytes:
        """The bytes that were encoded, from all tokens at once.

        A window that the model is certain of can be long: up to 2^bits bytes if it gives one byte everything.

        Args:
            tokens: integers, [n]: a tensor, an array or a sequence.
            model: the one the tokens were encoded with; another one gives other bytes.

        Raises:
            IndexError: a token outside of [0, 2^bits).
            TypeError: tokens are no integers, or the model has no next_probs.
            ValueError: tokens has another shape; what the model returned, as for `encode`.
        """
        op = "EqualInfoWindows.decode"
        values = token_array(op, tokens)
        for i in np.flatnonzero((values < 0) | (values >= 1 << self.bits))[:1]:
            raise IndexError(f"{op}: tokens[{i}] is {values[i]} and must be 0 to {(1 << self.bits) - 1}")
        values = np.ascontiguousarray(values, dtype=np.int64)
        distinct, inverse = np.unique(values, return_inverse=True)
        windows = _decode(distinct, Rows(op, model, _BYTES, self.max_batch), self.bits)
        return b"".join([windows[i] for i in inverse.tolist()])

    def _encode(self, op: str, texts: list[bytes], model: NextProbs) -> list[Tensor]:
        import torch

        for i, text in enumerate(texts):
            check_bytes(op, "data" if op.endswith(".encode") else f"texts[{i}]", text)
        rows = Rows(op, model, _BYTES, self.max_batch)
        tokens = _encode([bytes(text) for text in texts], rows, self.bits)
        return [torch.tensor(each, dtype=torch.int64) for each in tokens]

    def __repr__(self) -> str:
        return f"EqualInfoWindows(bits={self.bits})"


EqualInfoWindows.__module__ = "pycore"  # its public home


def token_array(op: str, tokens: Any) -> NDArray[Any]:
    """Tokens as an array of integers [n]."""
    if hasattr(tokens, "detach"):
        tokens = tokens.detach().cpu()
    check_unmasked(op, "tokens", tokens)
    array = np.asarray(tokens)
    if array.size == 0 and not hasattr(tokens, "dtype"):
        array = array.astype(np.int64)  # an empty list
    if array.dtype.kind not in "iu":
        raise TypeError(f"{op}: tokens has dtype {array.dtype} and must have an integer dtype")
    if array.ndim != 1:
        raise ValueError(f"{op}: tokens has shape {list(array.shape)} and must be [n]")
    return array


def _shown(prefix: bytes) -> str:
    return repr(prefix) if len(prefix) <= 48 else f"...{prefix[-48:]!r} ({len(prefix)} bytes)"


class Rows:
    """Cumulative counts of the model's answers, asked for in batches; the first few are remembered for one call."""

    def __init__(self, op: str, model: Any, alphabet: int, max_batch: int) -> None:
        if not callable(getattr(model, "next_probs", None)):
            raise TypeError(f"{op}: model is a {type(model).__name__} and must have next_probs(prefixes)")
        self.op, self.model, self.alphabet, self.max_batch = op, model, alphabet, max_batch
        self.kept: dict[bytes, Ints] = {}

    def __call__(self, prefixes: Sequence[bytes]) -> tuple[Ints, Ints]:
        """(cumulative [m, V + 1], rows [n]): the counts of prefix i are cumulative[rows[i]]."""
        place: dict[bytes, int] = {}
        rows = np.fromiter((place.setdefault(prefix, len(place)) for prefix in prefixes), np.int64, len(prefixes))
        cumulative = np.empty((len(place), self.alphabet + 1), dtype=np.int64)
        asked: list[bytes] = []
        for prefix, i in place.items():
            row = self.kept.get(prefix)
            if row is None:
                asked.append(prefix)
            else:
                cumulative[i] = row
        for begin in range(0, len(asked), self.max_batch):
            batch = asked[begin : begin + self.max_batch]
            counted = self.ask(batch)
            cumulative[[place[prefix] for prefix in batch]] = counted
            room = max(0, _KEPT_ROWS - len(self.kept))
            self.kept.update(zip(batch[:room], counted[:room].copy(), strict=True))
        return cumulative, rows

    def ask(self, prefixes: list[bytes]) -> Ints:
        """One question to the model; its answer is checked and counted."""
        return self.answer(prefixes)[1]

    def shares(self, prefixes: list[bytes]) -> NDArray[np.float64]:
        """[n, V]: the probabilities after each prefix, as quantize_cdf gives them at precision 24."""
        cdf = _load.native().quantize_cdf(self.answer(prefixes)[0], precision=24)
        return np.diff(cdf) / float(1 << 24)

    def answer(self, prefixes: list[bytes]) -> tuple[Any, Ints]:
        """What the model says, once it is known to be probabilities, and its cumulative counts."""
        probs = self.model.next_probs(list(prefixes))
        if hasattr(probs, "detach"):
            probs = probs.detach().cpu()
        if not hasattr(probs, "dtype") or not hasattr(probs, "shape"):
            raise TypeError(f"{self.op}: next_probs returned a {type(probs).__name__} and must return an array")
        wanted, where = (len(prefixes), self.alphabet), f"{len(prefixes)} prefixes from {_shown(prefixes[0])}"
        if tuple(probs.shape) != wanted:
            raise ValueError(
                f"{self.op}: next_probs returned shape {list(probs.shape)} for {where} and must return {list(wanted)}"
            )
        if str(probs.dtype).rpartition(".")[2] not in ("float32", "float64", "float16", "bfloat16"):
            raise ValueError(
                f"{self.op}: next_probs returned {probs.dtype} for {where} and must return float32, float64, float16 "
                "or bfloat16"
            )
        cumulative, faults = _load.native().window_counts(probs)
        for i in np.flatnonzero(faults)[:1]:
            wrong = "has NaN, infinity or a negative entry" if faults[i] == 1 else "sums to zero"
            raise ValueError(f"{self.op}: next_probs({_shown(prefixes[i])}) {wrong} and must not")
        return probs, cumulative


def _encode(texts: Sequence[bytes], rows: Rows, bits: int) -> list[list[int]]:
    """Every text a walk; all walks take a step at a time, and one that ends a window starts the next."""
    native = _load.native()
    tokens: list[list[int]] = [[] for _ in texts]
    window = [0] * len(texts)  # where the window of each text started
    position = [0] * len(texts)
    start, size = np.zeros(len(texts), np.int64), np.full(len(texts), 1 << bits, np.int64)
    active = [i for i, text in enumerate(texts) if text]
    while active:
        walks = np.array(active)
        cumulative, which = rows([texts[i][window[i] : position[i]] for i in active])
        symbols = np.fromiter((texts[i][position[i]] for i in active), np.int64, len(active))
        moved, start[walks], size[walks] = native.window_encode(
            cumulative, which, start[walks], size[walks], symbols, bits=bits
        )
        for i, went in zip(active, moved.tolist(), strict=True):
            position[i] += went
            if not went or size[i] == 1 or position[i] == len(texts[i]):
                tokens[i].append(int(start[i] + size[i] - 1))
                start[i], size[i], window[i] = 0, 1 << bits, position[i]
        active = [i for i in active if position[i] < len(texts[i])]
    return tokens


def _decode(tokens: Ints, rows: Rows, bits: int) -> list[bytes]:
    """Every token a walk."""
    native = _load.native()
    windows = [bytearray() for _ in tokens]
    start, size = np.zeros(len(tokens), np.int64), np.full(len(tokens), 1 << bits, np.int64)
    active = np.arange(len(tokens))
    while active.size:
        cumulative, which = rows([bytes(windows[i]) for i in active.tolist()])
        symbols, start[active], size[active] = native.window_decode(
            cumulative, which, start[active], size[active], tokens[active], bits=bits
        )
        for i, symbol in zip(active.tolist(), symbols.tolist(), strict=True):
            if symbol >= 0:
                windows[i].append(symbol)
        active = active[(symbols >= 0) & (size[active] > 1)]
    return [bytes(window) for window in windows]
