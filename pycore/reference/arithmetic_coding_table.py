# SPDX-License-Identifier: Apache-2.0
"""The table of most probable strings in plain Python, for tests and readers: best-first, a string at a time."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import pairwise

# The cumulative frequencies of quantize_cdf at precision 24 after a prefix.
Cdf = Callable[[bytes], Sequence[int]]


def shares(cdf: Sequence[int]) -> list[float]:
    """The probability of each symbol: its share of 2^24."""
    return [(high - low) / cdf[-1] for low, high in pairwise(cdf)]


def build(model: Cdf, bits: int, alphabet: int = 256, longest: int = 255) -> list[bytes]:
    """The 2^bits strings of the table, by falling probability; ties go by length, then by bytes.

    All single symbols are in it. Then the most probable string that extends a string of the table by one symbol comes
    in, again and again. A string of two symbols or more that has all its extensions in the table gives its own place
    up: the longest match never ends there.
    """
    first = shares(model(b""))
    entered = {bytes([i]): p for i, p in enumerate(first)}
    heap: list[tuple[float, int, bytes]] = []

    def extend(string: bytes, p: float) -> None:
        if len(string) < longest:
            for symbol, share in enumerate(shares(model(string))):
                heapq.heappush(heap, (-(p * share), len(string) + 1, string + bytes([symbol])))

    for string, p in list(entered.items()):
        extend(string, p)
    extensions: dict[bytes, int] = {}
    freed: set[bytes] = set()
    while len(entered) - len(freed) < 1 << bits:
        p, _, string = heapq.heappop(heap)
        entered[string] = -p
        parent = string[:-1]
        extensions[parent] = extensions.get(parent, 0) + 1
        if extensions[parent] == alphabet and len(parent) >= 2:
            freed.add(parent)
        extend(string, -p)
    return sorted(entered.keys() - freed, key=lambda string: (-entered[string], len(string), string))


def longest_match(strings: Sequence[bytes], data: bytes) -> list[int]:
    """The longest string of the table that the text goes on with, again and again."""
    token = {string: i for i, string in enumerate(strings)}
    longest = max(map(len, strings))
    tokens, position = [], 0
    while position < len(data):
        length = next(n for n in range(longest, 0, -1) if data[position : position + n] in token)
        tokens.append(token[data[position : position + length]])
        position += length
    return tokens


def fewest(strings: Sequence[bytes], data: bytes) -> list[int]:
    """As few tokens as can be; among such parses the one with the longest first token, then second, and so on."""
    token = {string: i for i, string in enumerate(strings)}
    longest = max(map(len, strings))
    cost = [0] * (len(data) + 1)
    length = [0] * len(data)
    for i in reversed(range(len(data))):
        fitting = [n for n in range(1, min(longest, len(data) - i) + 1) if data[i : i + n] in token]
        length[i] = min(fitting, key=lambda n: (cost[i + n], -n))
        cost[i] = 1 + cost[i + length[i]]
    tokens, position = [], 0
    while position < len(data):
        tokens.append(token[data[position : position + length[position]]])
        position += length[position]
    return tokens
