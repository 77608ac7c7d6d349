# SPDX-License-Identifier: Apache-2.0
"""A self-attention layer that reads a random choice of blocks, another one at every training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_int
from pycore.nn.attention import PositionScheme, SelfAttention, check_factors
from pycore.ops.attention_call import AttentionOptions
from pycore.schedules import DistanceFamily, Probabilistic

__all__ = ["ProbabilisticAttention"]


class ProbabilisticAttention(SelfAttention):
    """Causal self-attention over the blocks that a round draws, see :func:`pycore.ops.pr_flash_attention`.

    ``round`` is a buffer, so a checkpoint goes on where it ended. In training every forward pass is a round of its
    own; in evaluation the round stays, and with it the blocks. Recomputation in the backward pass (gradient
    checkpointing) reads the blocks of the last forward pass.

    Args:
        dim: channels of the input and the output.
        heads: query heads.
        distance_probs: `Geometric`, `PowerLaw`, `Harmonic`, `Gaussian` or `Constant` of :mod:`pycore.schedules`, or a
            tensor ``[n]`` or ``[heads, n]`` of probabilities by block distance, which becomes a buffer.
        seed: of the draws, at least 0.
        layer: index of this layer, folded into the seed so that layers draw independently.
        block_size: tokens a block, a power of two from 16 on.
        sink_size: tokens at the start that every query keeps; without one the method fails on trained models.
        window_blocks: newest blocks that always take part.
        pattern, correction, blocks_per_row: see :func:`pycore.ops.pr_flash_attention`.
        kv_heads: key and value heads, which divide ``heads``; ``heads`` by default.
        head_dim: channels of a head, ``dim / heads`` by default; even for ``rope``.
        position: ``"rope"``, ``"alibi"``, ``"t5"``, ``"harmonic"`` or ``"none"``.
        theta: base of the rotary frequencies.
        max_distance: rope and harmonic: the longest text, in tokens, less one.
        softcap: logits become ``softcap * tanh(logit / softcap)``; 0 for none.
        dropout_p: share of the attention weights set to zero in training.
        bias: whether the query, key and value projections have one.

    Example:
        >>> layer = ProbabilisticAttention(256, 8, distance_probs=Geometric(0.8), layer=3)
        >>> y = layer(x)  # [batch, length, 256]

    Raises:
        ValueError: a number that does not fit; the sentence names it. Those of the draw come with the first call.

    Source: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI"
    (arXiv 2410.18441), abstract; our reading of it.
    """

    round: Tensor
    distance_table: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        distance_probs: DistanceFamily | Tensor,
        seed: int = 0,
        layer: int = 0,
        block_size: int = 64,
        sink_size: int = 1,
        window_blocks: int = 1,
        pattern: str = "independent",
        correction: str = "none",
        blocks_per_row: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        position: str = "rope",
        theta: float = 10000.0,
        max_distance: int = 8192,
        softcap: float = 0.0,
        dropout_p: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias)
        for name, number in (("seed", seed), ("layer", layer)):
            check_int("ProbabilisticAttention", name, number, 0)
        self.family = None if isinstance(distance_probs, Tensor) else distance_probs
        if isinstance(distance_probs, Tensor):
            self.register_buffer("distance_table", distance_probs.detach().clone())
        self.register_buffer("round", torch.zeros((), dtype=torch.int64))
        self.seed, self.layer = seed, layer
        self.draw: dict[str, Any] = {
            "block_size": block_size,
            "sink_size": sink_size,
            "window_blocks": window_blocks,
            "pattern": pattern,
            "correction": correction,
            "blocks_per_row": blocks_per_row,
        }
        self.softcap, self.dropout_p = check_factors("ProbabilisticAttention", softcap, dropout_p)
        self.positions = PositionScheme(position, heads, self.head_dim, max_distance=max_distance, theta=theta)

    def schedule(self) -> Probabilistic:
        """The round that a forward pass in evaluation reads now."""
        probs = self.distance_table if self.family is None else self.family
        return Probabilistic(probs, self.seed, self.round, **self.draw).for_layer(self.layer)

    def forward(self, x: Tensor, *, starts: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The layer's output, ``[batch, length, dim]``.

        Args:
            x: ``[batch, length, dim]``.
            starts: int64 ``[batch]``, tokens at the front of x that are padding; their outputs mean nothing.
        """
        counted = advance(self.round, self.training)
        if torch.compiler.is_compiling():
            return self._forward(x, starts)
        try:
            return self._forward(x, starts)
        except Exception:
            if counted:
                self.round.sub_(1)  # what was refused was no round
            raise

    def _forward(self, x: Tensor, starts: Tensor | None) -> Tensor:
        options = AttentionOptions(
            softcap=self.softcap, dropout_p=self.dropout_p if self.training else 0.0, **self.positions()
        )
        return super().forward(x, options, self.schedule(), starts=starts)


def advance(round: Tensor, training: bool) -> bool:
    """Counts a forward pass in training, but not one inside a backward pass: gradient checkpointing computes again.

    Returns whether it has counted.
    """
    in_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    if training and not in_backward:
        round.add_(1)
        return True
    return False
