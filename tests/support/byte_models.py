# SPDX-License-Identifier: Apache-2.0
"""Models for the tests of the Equal-Info codes: small, deterministic, and of any alphabet."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from typing import Any

import numpy as np


class Hashed:
    """A different distribution after every prefix, from a hash of it; some entries are zero, some close to one."""

    def __init__(self, alphabet: int = 256, seed: int = 0, sharpness: float = 3.0) -> None:
        self.alphabet, self.seed, self.sharpness = alphabet, seed, sharpness
        self.asked: list[int] = []  # prefixes in each question

    def row(self, prefix: bytes) -> np.ndarray:
        digest = hashlib.sha256(self.seed.to_bytes(4, "little") + prefix).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        row = np.exp(self.sharpness * generator.standard_normal(self.alphabet))
        row[generator.random(self.alphabet) < 0.2] = 0.0
        row[generator.integers(self.alphabet)] += 1.0
        return row / row.sum()

    def next_probs(self, prefixes: list[bytes]) -> Any:
        self.asked.append(len(prefixes))
        return np.stack([self.row(prefix) for prefix in prefixes])


class Fixed:
    """The same distribution after every prefix."""

    def __init__(self, probs: Any) -> None:
        self.probs = np.asarray(probs, dtype=np.float64)

    def next_probs(self, prefixes: list[bytes]) -> Any:
        return np.tile(self.probs, (len(prefixes), 1))


class Order2:
    """Counts of the byte after the two before it, on top of order 1 and order 0: learns a text in an instant."""

    def __init__(self, text: bytes) -> None:
        self.tables: list[dict[bytes, Counter[int]]] = []
        for order in range(3):
            table: dict[bytes, Counter[int]] = defaultdict(Counter)
            for i in range(order, len(text)):
                table[text[i - order : i]][text[i]] += 1
            self.tables.append(table)

    def row(self, prefix: bytes) -> np.ndarray:
        row = np.full(256, 1 / 256)
        for order, table in enumerate(self.tables):
            if len(prefix) < order:
                break
            seen = table.get(prefix[len(prefix) - order :])
            if not seen:
                break
            new = np.zeros(256)
            new[list(seen)] = list(seen.values())
            row = (new + 2.0 * row) / (new.sum() + 2.0)
        return row

    def next_probs(self, prefixes: list[bytes]) -> Any:
        return np.stack([self.row(prefix) for prefix in prefixes])
