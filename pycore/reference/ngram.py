# SPDX-License-Identifier: Apache-2.0
"""The table of trigrams in plain Python: what csrc/cpu/ngram/dispatch.cpp is held to."""

from __future__ import annotations

SLOTS, MOST_SCORE, UNIT = 12, 3 << 16, 1 << 16


class Table:
    """Successors of pairs of tokens with their scores, the highest first."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], list[tuple[int, int]]] = {}  # pair -> [(token, score)]

    def update(self, first: int, second: int, token: int, weight: int) -> None:
        """Adds the weight to the score of a trigram."""
        row = self.rows.setdefault((first, second), [])
        place = next((n for n, (held, _) in enumerate(row) if held == token), len(row))
        if place < len(row):
            weight += row.pop(place)[1]
        elif place == SLOTS:
            if weight < row[-1][1]:
                return
            row.pop()
            place -= 1
        score = min(weight, MOST_SCORE)
        while place > 0 and row[place - 1][1] < score:  # of equal scores the one that was there stays first
            place -= 1
        row.insert(place, (token, score))

    def draft(self, first: int, second: int, nodes: int, depth: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of the likeliest continuations, best first."""
        tokens, parents, depths, paths = [second], [-2], [0], [1.0]
        taken = [0]
        while len(tokens) <= nodes:
            best, most = -1, 0.0
            for n, token in enumerate(tokens):
                before = first if n == 0 else tokens[parents[n]]
                row = self.rows.get((before, token), [])
                if taken[n] < len(row) and depths[n] < depth:
                    p = paths[n] * min(row[taken[n]][1] / UNIT, 1 - 2**-10)
                    if p > most:
                        best, most = n, p
            if best < 0:
                break
            before = first if best == 0 else tokens[parents[best]]
            tokens.append(self.rows[before, tokens[best]][taken[best]][0])
            taken[best] += 1
            parents.append(best)
            depths.append(depths[best] + 1)
            paths.append(most)
            taken.append(0)
        return tokens[1:], [n - 1 for n in parents[1:]]
