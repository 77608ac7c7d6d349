# SPDX-License-Identifier: Apache-2.0
"""Windows of equal information in plain Python integers, for tests and readers, over an alphabet of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

# The counts of what may follow a prefix of the window, for example pycore.reference.arithmetic_coding.counts_of_probs.
Counts = Callable[[tuple[int, ...]], Sequence[int]]


def bounds(counts: Sequence[int], size: int, root: bool) -> list[int]:
    """Where each symbol's share of a node's codewords begins, and where the last one ends.

    The root gives every symbol one codeword and divides the rest. Any other node keeps its last codeword and divides
    what is before it, which may give a symbol nothing.
    """
    sums = list(accumulate(counts, initial=0))
    if root:
        return [i + c * (size - len(counts)) // sums[-1] for i, c in enumerate(sums)]
    return [c * (size - 1) // sums[-1] for c in sums]


def encode_window(data: Sequence[int], model: Counts, bits: int) -> tuple[int, int]:
    """The codeword of the first window of data, which is not empty, and the number of symbols in it."""
    start, size, taken = 0, 1 << bits, 0
    while size > 1 and taken < len(data):
        edges = bounds(model(tuple(data[:taken])), size, taken == 0)
        begin, end = edges[data[taken]], edges[data[taken] + 1]
        if begin == end:
            break
        start, size, taken = start + begin, end - begin, taken + 1
    return start + size - 1, taken


def encode(data: Sequence[int], model: Counts, bits: int) -> list[int]:
    """The codewords of data, one for each window."""
    tokens, position = [], 0
    while position < len(data):
        token, taken = encode_window(data[position:], model, bits)
        tokens.append(token)
        position += taken
    return tokens


def decode_window(token: int, model: Counts, bits: int) -> tuple[int, ...]:
    """The symbols of the window that a codeword stands for."""
    start, size = 0, 1 << bits
    symbols: tuple[int, ...] = ()
    while size > 1 and (not symbols or token != start + size - 1):
        edges = bounds(model(symbols), size, not symbols)
        symbol = max(i for i in range(len(edges) - 1) if edges[i] <= token - start < edges[i + 1])
        start, size, symbols = start + edges[symbol], edges[symbol + 1] - edges[symbol], (*symbols, symbol)
    return symbols


def decode(tokens: Sequence[int], model: Counts, bits: int) -> list[int]:
    """Inverse of `encode`."""
    return [symbol for token in tokens for symbol in decode_window(token, model, bits)]
