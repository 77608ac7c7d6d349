# SPDX-License-Identifier: Apache-2.0
"""A table of what follows two tokens, in three tensors: updated in place, looked up, and read as a tree of drafts.

csrc/include/pycore/ngram/ngram.h has the rules; `pycore.models.draft.NgramTable` keeps such tensors, builds them from a
corpus and makes room in them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_int
from pycore._load import load_ops
from pycore._tensors import check_tensor

load_ops()

__all__ = ["ngram_draft", "ngram_lookup", "ngram_update"]


def ngram_update(keys: Tensor, successors: Tensor, scores: Tensor, trigrams: Tensor, weights: Tensor) -> Tensor:
    """Adds weights to the scores of trigrams, in place, one row after another.

    A pair of tokens keeps twelve successors, those with the highest scores. A new one takes the place of the twelfth
    unless its weight is less than that one's score; of equal scores the one that came first stays first.

    Args:
        keys: int64 [capacity], a power of two; first * 2^31 + second of the pair at each place, -1 where there is none.
        successors: int32 [capacity, 12], the likeliest first, -1 behind the last.
        scores: int32 [capacity, 12], in 1/65536, at most 3.
        trigrams: int64 [rows, 3], tokens from 0 to 2^31 - 1.
        weights: int64 [rows], in 1/65536.

    Returns:
        int64 [2]: pairs that are new, and rows that were left out because the table has no room for another pair.

    Raises:
        ValueError: a shape, dtype, token or weight that does not fit; the table is then as it was.
        TypeError: an argument that is no tensor.
    """
    _check("ngram_update", keys=keys, successors=successors, scores=scores, trigrams=trigrams, weights=weights)
    return torch.ops.pycore.ngram_update(keys, successors, scores, trigrams, weights)


def ngram_lookup(keys: Tensor, successors: Tensor, scores: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
    """What follows pairs of tokens: (successors int64 [rows, 12], probabilities float32 [rows, 12]).

    Args:
        keys, successors, scores: the table, as for `ngram_update`.
        contexts: int64 [rows, 2].

    Raises:
        ValueError, TypeError: as for `ngram_update`.
    """
    _check("ngram_lookup", keys=keys, successors=successors, scores=scores, contexts=contexts)
    return torch.ops.pycore.ngram_lookup(keys, successors, scores, contexts)


def ngram_draft(
    keys: Tensor, successors: Tensor, scores: Tensor, first: int, second: int, *, nodes: int = 64, depth: int = 8
) -> tuple[Tensor, Tensor]:
    """The likeliest continuations of two tokens as a tree, best first: (tokens, parents), int64 [nodes].

    Again and again the child with the greatest product of probabilities on its path is added, of equal ones that of the
    earliest node. A parent stands before its children; -1 is `second`. Unused nodes, at the end, are -1.

    Args:
        keys, successors, scores: the table, as for `ngram_update`.
        first: the token before the newest.
        second: the newest token.
        nodes: at most so many, 0 to 256.
        depth: tokens of the longest path.

    Raises:
        ValueError, TypeError: as for `ngram_update`.

    Source: Liu et al., "Adaptive Draft-Verification for LLM Decoding" (ADED, arXiv 2407.12021), with best-first search
        in place of its Monte Carlo tree search.
    """
    _check("ngram_draft", keys=keys, successors=successors, scores=scores)
    for name, number in (("first", first), ("second", second), ("nodes", nodes), ("depth", depth)):
        check_int("ngram_draft", name, number)
    return torch.ops.pycore.ngram_draft(keys, successors, scores, first, second, nodes, depth)


def _check(op: str, **tensors: Any) -> None:
    for name, tensor in tensors.items():
        check_tensor(op, name, tensor)


@torch.library.register_fake("pycore::ngram_update")
def _update_fake(keys: Tensor, successors: Tensor, scores: Tensor, trigrams: Tensor, weights: Tensor) -> Tensor:
    return keys.new_empty((2,))


@torch.library.register_fake("pycore::ngram_lookup")
def _lookup_fake(keys: Tensor, successors: Tensor, scores: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
    shape = (contexts.shape[0], successors.shape[1])
    return keys.new_empty(shape), keys.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("pycore::ngram_draft")
def _draft_fake(
    keys: Tensor, successors: Tensor, scores: Tensor, first: int, second: int, nodes: int, depth: int
) -> tuple[Tensor, Tensor]:
    return keys.new_empty((nodes,)), keys.new_empty((nodes,))
