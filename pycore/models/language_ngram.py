# SPDX-License-Identifier: Apache-2.0
"""What a text itself has said so far, beside a byte model or alone: adaptive counts, mixed into the distribution.

A table of trigrams (csrc/include/pycore/ngram/ngram.h) counts what follows the last few bytes of each text. An order's
distribution is its counts, with the share of an escape for the next lower order (PPM's method C); below the lowest
order stands the byte model's distribution, or an even one. The model and the orders are experts whose weights are
Bayes': what each gave the byte that came (with a share for all, so that they may change places), one set of weights for
each number of orders whose context is known.

The same bits everywhere: integers, and products, sums and quotients of float64 in one order, each of which IEEE 754
rounds in one way; no logarithm, and no sum over the 256 bytes. A byte is one step for all texts of a batch.

Source: Moffat, "Implementing the PPM data compression scheme" (IEEE Trans. Commun. 1990), method C; Herbster and
    Warmuth, "Tracking the best expert" (Machine Learning 1998), fixed share.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycore import ops
from pycore.models.bytelm import BOS
from pycore.models.draft import SLOTS, NgramTable
from pycore.models.language import ByteModel
from pycore.schedules import Tree

__all__ = ["NgramByteModel"]

ORDERS = (1, 2, 3, 4, 6)  # bytes of a context
# What a byte adds to its count. A score ends at 3 * 65536, so low orders, which see more, count in smaller units.
UNITS = (64, 256, 1024, 1024, 2048)
ESCAPE = 2  # units for each successor of a context, the share of the lower order
SHARED = 0.05  # of the weights, after each byte, evenly to all experts
BITS = 22  # of the byte model's shares
HASH, MASK = 0x2F0B4C47, (1 << 31) - 1


class NgramState:
    """Counts and weights of a batch of texts."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.table = NgramTable()
        self.history = torch.zeros(0, 0, dtype=torch.int64)  # [batch, most of orders], bytes and one; 0 before the text
        self.contexts = torch.zeros(0, 2, dtype=torch.int64)  # [batch * orders, 2], those of the newest distribution
        self.units = torch.zeros(0, dtype=torch.int64)  # [batch * orders]
        # NumPy's arrays from here on: steps this small are mostly calls, and its are the cheaper ones.
        self.rows: Any = None  # [batch], 0, 1, 2 …
        self.known: Any = None  # [batch], orders whose context has been seen
        self.weights: Any = None  # [batch, orders + 1, experts]
        self.experts: Any = None  # [batch, experts, 256] of the newest distribution; None before the first


class NgramByteModel:
    """A byte model, or none, with the adaptive counts of the text mixed in; for `lmzip`.

    It needs no training for the counts, and learns whatever a text is made of. Memory grows with the texts of a batch,
    by up to a kilobyte a byte.

    Args:
        base: the byte model that is mixed with them (one on a staircase too); None for the counts alone.
    """

    vocabulary = 256
    bos = BOS
    longest = 1 << 20
    batch = 16

    def __init__(self, base: ByteModel | None = None) -> None:
        if base is not None and not isinstance(base, ByteModel):
            raise TypeError(f"NgramByteModel: base is a {type(base).__name__} and must be a ByteModel or None")
        self.base = base
        self.orders = ORDERS if base is None else ORDERS[1:]  # a byte model knows better than a single byte
        said = repr(("ngram", 1, self.orders, UNITS, ESCAPE, SHARED, BITS, HASH)).encode()
        self.fingerprint = zlib.crc32(said, base.fingerprint if base is not None else 0)
        self.experts = len(self.orders) + (base is not None)
        self._units = torch.tensor(UNITS[-len(self.orders) :])
        self._escapes = ESCAPE * self._units.numpy()
        # What byte n from the end, the newest last, is multiplied by in the hash of each order.
        longest = max(self.orders)
        powers = [pow(HASH, n, MASK) for n in reversed(range(longest))]
        self._powers = torch.tensor(
            [[p if at >= longest - k else 0 for at, p in enumerate(powers)] for k in self.orders]
        )

    def tokens(self, data: bytes) -> list[int]:
        """The bytes."""
        return list(data)

    def text(self, tokens: Sequence[int]) -> bytes:
        """The bytes."""
        return bytes(tokens)

    def segment(self, tokens: int) -> int:
        """Sixteen of a long text, at most 65536 bytes, side by side; those of a short one 8192."""
        return max(8192, min(1 << 16, -(-tokens // self.batch)))

    def state(self, rollback: int = 0) -> NgramState:
        """Nothing counted. A step cannot be taken back: there is no tree of drafts."""
        if rollback:
            raise ValueError(f"NgramByteModel: rollback is {rollback} and must be 0: what was counted stays counted")
        return NgramState(None if self.base is None else self.base.state())

    def read(self, tokens: Tensor, state: NgramState) -> None:
        """As `probabilities`."""
        self.probabilities(tokens, state)

    def logits(self, tokens: Tensor, state: NgramState, tree: Tree | None = None) -> Tensor:
        """Logarithms of `probabilities`, float32; another machine may round them otherwise."""
        if tree is not None:
            raise ValueError("NgramByteModel: tree is a Tree and must be None: what was counted stays counted")
        return self.probabilities(tokens, state).log().float()

    @torch.inference_mode()
    def probabilities(self, tokens: Tensor, state: NgramState) -> Tensor:
        """float64 ``[batch, n, 256]``: of what follows each of int64 ``[batch, n]``, the same bits on every machine."""
        batch, length = tokens.shape
        if self.base is None:
            below = torch.full((1, 1, 256), 1 / 256, dtype=torch.float64).expand(batch, length, 256)
        else:
            cdf = ops.quantize_cdf(logits=self.base.logits(tokens, state.base), precision=BITS)
            below = (cdf[..., 1:] - cdf[..., :-1]).double() * 2.0**-BITS
        longest, orders = max(self.orders), len(self.orders)
        if state.rows is None:
            state.history = torch.zeros(batch, longest, dtype=torch.int64)
            state.units = self._units.repeat(batch)
            state.rows = np.arange(batch)
            state.weights = np.full((batch, orders + 1, self.experts), 1 / self.experts)
        # BOS is no byte: it leaves the history as it is, all zeros.
        read = torch.cat([state.history, torch.where(tokens == BOS, 0, tokens + 1)], 1)
        state.history = read[:, -longest:]
        seen = read[:, 1:].unfold(1, longest, 1)[:, :, None]  # [batch, n, 1, longest]
        hashes = (seen * self._powers).sum(-1) & MASK  # [batch, n, orders]
        # Each order of each text has pairs of its own.
        owner = torch.arange(batch * orders)
        out = torch.empty(batch, length, 256, dtype=torch.float64)
        for at in range(length):
            self._learn(tokens[:, at], state)
            state.contexts = torch.stack([owner, hashes[:, at].flatten()], 1)
            out[:, at] = torch.from_numpy(self._mix(below[:, at].numpy(), state))
        return out

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _mix(self, below: Any, state: NgramState) -> Any:
        """The distribution behind `state.contexts`; `below` [batch, 256] is the byte model's."""
        batch, orders = len(below), len(self.orders)
        found, scored = state.table.successors(state.contexts)
        successors, scores = (x.numpy().reshape(batch, orders, SLOTS) for x in (found, scored))
        # A place without a successor has a score of 0, and is the last entry, -1, which is cut off.
        counts = np.zeros((batch, orders, 257))
        np.put_along_axis(counts, successors, scores, 2)
        escape = (successors >= 0).sum(2) * self._escapes
        total = scores.sum(2) + escape
        state.known = (total > 0).sum(1)
        # Nothing known: all of it is the lower order's.
        escape, total = np.where(total > 0, (escape, total), 1).astype(np.float64)[..., None]
        first = self.experts - orders
        state.experts = np.empty((batch, self.experts, 256))
        state.experts[:, 0] = below
        for order in range(orders):
            below = (counts[:, order, :256] + escape[:, order] * below) / total[:, order]
            state.experts[:, first + order] = below
        weights = state.weights[state.rows, state.known]
        mixed = weights[:, 0, None] * state.experts[:, 0]
        for n in range(1, self.experts):
            mixed += weights[:, n, None] * state.experts[:, n]
        return mixed

    def _learn(self, token: Tensor, state: NgramState) -> None:
        """What the newest distribution's byte was."""
        if state.experts is None:
            return
        gave = state.weights[state.rows, state.known] * state.experts[state.rows, :, token.numpy()]
        total = gave[:, 0].copy()
        for n in range(1, self.experts):
            total += gave[:, n]
        state.weights[state.rows, state.known] = gave / total[:, None] * (1 - SHARED) + SHARED / self.experts
        came = token[:, None].expand(-1, len(self.orders)).reshape(-1, 1)
        trigrams = torch.cat([state.contexts, came], 1)
        state.table.add(trigrams, state.units)
