# SPDX-License-Identifier: Apache-2.0
"""Drafts: several tokens for one pass of the model, and the text of plain greedy decoding.

A table of trigrams proposes a tree of continuations; one pass with the Tree schedule scores all of them; the longest
branch that is what the model would have chosen stays in the cache, and the table learns from it. Logits behind a tree
are those of plain decoding up to the last bits, and cached rows with them: where the two highest logits are nearer to
each other than `margin`, the text so far is read anew, plainly, so that the choice is plain decoding's too.

Source: Liu et al., "Adaptive Draft-Verification for LLM Decoding" (ADED, arXiv 2407.12021).
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pycore import BitstreamError, ops
from pycore._checks import check_bool, check_int, check_number
from pycore.models.language import LanguageModel
from pycore.schedules import Tree

__all__ = ["Drafted", "NgramTable", "accepted", "generate"]

UNIT, SLOTS = 1 << 16, 12
HEADER = struct.Struct("<4sB3xIII")  # magic, version, CRC of the rest, pairs, successors


class NgramTable:
    """What follows two tokens: up to twelve successors of every pair that was seen, with their probabilities.

    Args:
        capacity: room for so many pairs at first; the table grows by itself.

    Example:
        >>> table = NgramTable.build([list(text)])
        >>> tokens, parents = table.draft(text[-2], text[-1], nodes=24)
        >>> table.update(list(text[-16:]))                      # what was just seen becomes likelier
    """

    def __init__(self, capacity: int = 1024) -> None:
        check_int("NgramTable", "capacity", capacity, 1)
        self.pairs = 0
        self._allocate(capacity)

    @classmethod
    def build(cls, texts: Iterable[Sequence[int] | Tensor]) -> NgramTable:
        """The twelve most frequent successors of every pair in the texts; of equally frequent ones the lowest token."""
        trigrams = torch.cat([torch.zeros(0, 3, dtype=torch.int64), *(_trigrams(text) for text in texts)])
        table = cls(1)
        if len(trigrams) == 0:
            return table
        base = int(trigrams.max()) + 1
        if base > 1 << 21:
            raise ValueError(f"NgramTable.build: texts has token {base - 1} and must have tokens below 2^21")
        code, count = ((trigrams[:, 0] * base + trigrams[:, 1]) * base + trigrams[:, 2]).unique(return_counts=True)
        pair, where, of_pair = (code // base).unique_consecutive(return_inverse=True, return_counts=True)
        total = torch.zeros_like(pair).index_add_(0, where, count)
        order = count.argsort(descending=True, stable=True)
        order = order[where[order].argsort(stable=True)]
        rank = torch.arange(len(code)) - (of_pair.cumsum(0) - of_pair)[where]
        order = order[rank < SLOTS]
        rows = torch.stack([code // base // base, code // base % base, code % base], 1)[order]
        table.add(rows, (count * UNIT // total[where]).clamp(min=1)[order])
        return table

    def update(self, tokens: Sequence[int] | Tensor, weight: float = 0.04) -> None:
        """Makes every trigram of the tokens likelier by `weight`, up to 3."""
        weight = check_number("NgramTable.update", "weight", weight)
        if not 0 <= weight <= 3:
            raise ValueError(f"NgramTable.update: weight is {weight} and must be 0 to 3")
        rows = _trigrams(tokens)
        self.add(rows, torch.full((len(rows),), round(weight * UNIT)))

    def add(self, rows: Tensor, weights: Tensor) -> None:
        """Adds weights, in 1/65536, to the scores of trigrams ``[rows, 3]``, see :func:`pycore.ops.ngram_update`."""
        # Room first, if the rows may need it: a table is never more than three quarters full.
        if 4 * (self.pairs + len(rows)) > 3 * len(self._arrays[0]):
            new = len(torch.cat([self._arrays[0], rows[:, 0] << 31 | rows[:, 1]]).unique())
            if 4 * new > 3 * len(self._arrays[0]):
                keys, successors, scores = self._sorted()
                self._allocate(2 * new)
                held = successors >= 0
                first, second = _tokens_of(keys[:, None].expand_as(held)[held])
                old = torch.stack([first, second, successors[held].long()], 1)
                ops.ngram_update(*self._arrays, old, scores[held].long())
        fresh, left_out = ops.ngram_update(*self._arrays, rows, weights).tolist()
        assert left_out == 0
        self.pairs += fresh

    def lookup(self, first: int, second: int) -> tuple[list[int], list[float]]:
        """Successors of the pair and their probabilities, the likeliest first."""
        found, probs = ops.ngram_lookup(*self._arrays, torch.tensor([[first, second]]))
        count = int((found >= 0).sum())
        return found[0, :count].tolist(), probs[0, :count].tolist()

    def successors(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Of many pairs ``[rows, 2]``: successors ``[rows, 12]``, -1 behind the last, and scores in 1/65536."""
        found, probs = ops.ngram_lookup(*self._arrays, pairs)
        return found, (probs * UNIT).long()

    def draft(self, first: int, second: int, *, nodes: int = 24, depth: int = 8) -> tuple[list[int], list[int]]:
        """Tokens and parents of a tree of continuations, see :func:`pycore.ops.ngram_draft`."""
        tokens, parents = ops.ngram_draft(*self._arrays, first, second, nodes=nodes, depth=depth)
        count = int((tokens >= 0).sum())
        return tokens[:count].tolist(), parents[:count].tolist()

    def chain(self, first: int, second: int, *, depth: int = 8) -> list[int]:
        """The likeliest successor, its likeliest successor, and so on; fewer than depth where a pair is unknown."""
        out: list[int] = []
        while len(out) < depth:
            found, _ = self.draft(first, second, nodes=1, depth=1)
            if not found:
                break
            first, second = second, found[0]
            out.append(second)
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table; docs/formats.md has the format."""
        keys, successors, scores = self._sorted()
        held = successors >= 0
        arrays = (keys, held.sum(1).to(torch.uint8), successors[held], scores[held])
        body = b"".join(x.numpy().tobytes() for x in arrays)
        numbers = len(keys), int(held.sum())
        check = zlib.crc32(body, zlib.crc32(HEADER.pack(b"PCNG", 1, 0, *numbers)))
        part = Path(path).with_name(Path(path).name + ".part")
        part.write_bytes(HEADER.pack(b"PCNG", 1, check, *numbers) + body)
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NgramTable:
        """The table of a file that :meth:`save` wrote.

        Raises:
            BitstreamError: the file is damaged, or none of these.
        """
        data = Path(path).read_bytes()
        if len(data) < HEADER.size or data[:8] != b"PCNG\1\0\0\0":
            raise BitstreamError("NgramTable.load: path does not begin as a table of version 1 does")
        _, _, check, pairs, count = HEADER.unpack_from(data)
        body = data[HEADER.size :]
        if check != zlib.crc32(body, zlib.crc32(HEADER.pack(b"PCNG", 1, 0, pairs, count))):
            raise BitstreamError("NgramTable.load: path is damaged or not whole: its CRC is another")
        if len(body) != 9 * pairs + 8 * count:
            raise BitstreamError("NgramTable.load: path has another length than its numbers say")
        table = cls(1)
        if pairs == 0:
            return table
        keys = torch.frombuffer(bytearray(body[: 8 * pairs]), dtype=torch.int64)
        of_pair = torch.tensor(list(body[8 * pairs : 9 * pairs]))
        rest = torch.frombuffer(bytearray(body[9 * pairs :]), dtype=torch.int32).long()
        if int(of_pair.min()) < 1 or int(of_pair.max()) > SLOTS or int(of_pair.sum()) != count or int(rest.min()) < 0:
            raise BitstreamError("NgramTable.load: path has pairs with no or too many successors")
        rows = torch.stack([*_tokens_of(keys.repeat_interleave(of_pair)), rest[:count]], 1)
        try:
            table.add(rows, rest[count:])
        except ValueError as error:
            raise BitstreamError(f"NgramTable.load: path has a row that none has: {error}") from error
        return table

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _allocate(self, pairs: int) -> None:
        capacity = max(16, 1 << (2 * pairs - 1).bit_length())
        self._arrays = (
            torch.full((capacity,), -1),
            torch.full((capacity, SLOTS), -1, dtype=torch.int32),
            torch.zeros(capacity, SLOTS, dtype=torch.int32),
        )

    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        keys, successors, scores = self._arrays
        order = keys.argsort()[int((keys < 0).sum()) :]
        return keys[order], successors[order], scores[order]


def _tokens_of(keys: Tensor) -> tuple[Tensor, Tensor]:
    return keys >> 31, keys & (1 << 31) - 1


def _trigrams(tokens: Sequence[int] | Tensor) -> Tensor:
    text = torch.as_tensor(tokens, dtype=torch.int64)
    return text.unfold(0, 3, 1) if len(text) >= 3 else torch.zeros(0, 3, dtype=torch.int64)


@dataclass
class Drafted:
    """What :func:`generate` returns.

    Attributes:
        tokens: the text behind the prompt, that of plain greedy decoding.
        forwards: passes of the model over a tree.
        reread: passes over the whole text, where two logits were nearly tied.
        lengths: tokens that each pass gave.
    """

    tokens: list[int] = field(default_factory=list)
    forwards: int = 0
    reread: int = 0
    lengths: list[int] = field(default_factory=list)


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    count: int,
    table: NgramTable,
    *,
    nodes: int = 24,
    depth: int = 8,
    adapt: float = 0.04,
    margin: float = 1e-3,
    chain: bool = False,
) -> Drafted:
    """`count` tokens of greedy decoding, several for each pass.

    Args:
        model: what is decoded.
        prompt: the tokens before.
        count: tokens to come.
        table: what proposes the drafts; it learns, unless adapt is 0.
        nodes: drafts for a pass, at most 255. 0 is plain decoding.
        depth: tokens of the longest draft.
        adapt: by how much likelier the trigrams of what was accepted become.
        margin: logits nearer to each other are told apart by reading the text anew.
        chain: one branch, of up to `nodes` tokens, in place of a tree. It is read as text is, so that its logits have
            plain decoding's bits, in any dtype, and nothing is read anew. It suits models of many weights, whose pass
            takes no longer for six rows than for one, and longer for more.
    """
    check_int("generate", "count", count, 0)
    check_int("generate", "nodes", nodes, 0, 255)
    check_int("generate", "depth", depth, 1, 255)
    check_bool("generate", "chain", chain)
    text = [model.bos, *prompt]
    state = model.state(nodes + 1)
    if len(text) > 1:
        model.read(torch.tensor([text[:-1]]), state)
    result = Drafted()
    before = len(text)
    while len(text) < before + count:
        tokens: list[int] = []
        parents: list[int] = []
        if len(text) > 2 and chain:
            tokens = table.chain(text[-2], text[-1], depth=min(nodes, before + count - len(text) - 1))
            parents = list(range(-1, len(tokens) - 1))
        elif len(text) > 2:
            tokens, parents = table.draft(text[-2], text[-1], nodes=nodes, depth=depth)
        tree = None if chain else Tree(torch.tensor([-1, *(n + 1 for n in parents)]))
        logits = model.logits(torch.tensor([[text[-1], *tokens]]), state, tree)[0]
        result.forwards += 1
        if chain:
            choice, gap = logits.argmax(-1).tolist(), [math.inf] * len(logits)
        else:
            best, place = logits.max(-1)
            second = logits.scatter(1, place[:, None], -math.inf).max(-1).values
            choice, gap = place.tolist(), (best - second).tolist()
        children = {(parent + 1, token): n for n, (token, parent) in enumerate(zip(tokens, parents, strict=True), 1)}
        path, new = [0], []
        while gap[path[-1]] >= margin:
            new.append(choice[path[-1]])
            child = children.get((path[-1], new[-1]))
            if child is None or len(text) + len(new) >= before + count:
                break
            path.append(child)
        tied = gap[path[-1]] < margin
        text += new
        if tied:
            # Everything anew, so that the choice and the cached rows are plain decoding's.
            state = model.state(nodes + 1)
            new.append(int(model.logits(torch.tensor([text]), state)[0, -1].argmax()))
            text.append(new[-1])
            result.reread += 1
        else:
            state.accept(torch.tensor(path), len(tokens) + 1)
        result.lengths.append(len(new))
        if adapt:
            table.update(text[max(1, len(text) - len(new) - 2) :], adapt)
    result.tokens = text[before : before + count]
    return result


def accepted(
    table: NgramTable, text: Sequence[int], *, nodes: int = 24, depth: int = 8, adapt: float = 0.04
) -> list[int]:
    """Tokens that each pass would give if the model's choices were those of `text`: its own among them.

    What a table is worth on real text, which no greedy decoding writes.
    """
    lengths, at = [], 2
    while at < len(text):
        tokens, parents = table.draft(text[at - 2], text[at - 1], nodes=nodes, depth=depth)
        children = {(parent, token): n for n, (token, parent) in enumerate(zip(tokens, parents, strict=True))}
        node, length = -1, 1
        while at + length < len(text) and (node, text[at + length - 1]) in children:
            node = children[node, text[at + length - 1]]
            length += 1
        lengths.append(length)
        if adapt:
            table.update(text[at - 2 : at + length], adapt)
        at += length
    return lengths
