# SPDX-License-Identifier: Apache-2.0
"""Encoders, decoders, encoder-decoders and dual encoders of any tokens or vectors, from the blocks of `bytelm`.

One class is all of them, because they differ in what a call says: the schedule (`Full` for an encoder, `Causal` for a
decoder, `Prefix`, `Segments`, `KeySubset`, ...) and whether there is another model's memory to look at. States come out
and not logits, so that losses are those of :mod:`pycore.ops`, which store no matrix of scores.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore._checks import check_int
from pycore.models.bytelm import Block, BytelmConfig
from pycore.nn.attention import PositionScheme, SelfAttention
from pycore.nn.linear import Projection, RMSNorm
from pycore.ops.attention_call import AttentionOptions, call_attention
from pycore.schedules import Causal, Full, Schedule

__all__ = ["CrossAttention", "CrossBlock", "Transformer", "mean_pool", "nearest_accuracy"]


class CrossAttention(SelfAttention):
    """Attention of one sequence's rows on the rows of another, all of them, without positions."""

    def look(self, x: Tensor, memory: Tensor, memory_lengths: Tensor | None = None) -> Tensor:
        """`x` [batch, length, dim] and `memory` [batch, rows, dim] give [batch, length, dim]."""
        query, key, value = (
            projection(rows).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, rows in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        options = AttentionOptions(key_lengths=memory_lengths)
        mixed = call_attention("attention", query, key, value, Full(), options)
        assert isinstance(mixed, Tensor)
        return self.out(mixed.transpose(1, 2).flatten(2))


class CrossBlock(Block):
    """A block that looks at a memory between its attention and its feed-forward part."""

    def __init__(self, config: BytelmConfig) -> None:
        super().__init__(config)
        self.cross_norm = RMSNorm(config.dim, config.norm_eps)
        gain = 1.0 / math.sqrt(2 * config.layers)
        self.cross = CrossAttention(config.dim, config.heads, kv_heads=config.kv_heads, gain=gain)

    def look(
        self, x: Tensor, options: AttentionOptions, schedule: Schedule, memory: Tensor, memory_lengths: Tensor | None
    ) -> Tensor:
        """The block's output, where there is a memory."""
        x = x + self.attention(self.attention_norm(x), options, schedule)
        x = x + self.cross.look(self.cross_norm(x), memory, memory_lengths)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nn.Module):
    """Tokens, or vectors, to normed states.

    Args:
        config: shape of the blocks and how they learn positions.
        vocabulary: tokens; their embedding is also what :meth:`loss` and :meth:`logits` score states with.
        inputs: instead, channels of the vectors that come in.
        absolute: rows of a learned table of positions that is added to the input; 0 for none.
        cross: whether the blocks look at a memory.

    Example:
        >>> encoder = Transformer(BytelmConfig(dim=64), vocabulary=100)
        >>> states = encoder(tokens, schedule=Full(), lengths=lengths)          # [batch, length, 64]
        >>> decoder = Transformer(BytelmConfig(dim=64), vocabulary=100, cross=True)
        >>> loss = decoder.loss(decoder(tokens[:, :-1], memory=states), tokens[:, 1:])
    """

    def __init__(
        self,
        config: BytelmConfig,
        *,
        vocabulary: int | None = None,
        inputs: int | None = None,
        absolute: int = 0,
        cross: bool = False,
    ) -> None:
        super().__init__()
        if (vocabulary is None) == (inputs is None):
            raise ValueError(
                f"Transformer: vocabulary is {vocabulary} and inputs is {inputs} and one of them must be given"
            )
        check_int("Transformer", "absolute", absolute, 0)
        self.config = config
        if vocabulary is not None:
            check_int("Transformer", "vocabulary", vocabulary, 1)
            self.embedding = nn.Parameter(torch.randn(vocabulary, config.dim) * 0.02)
        elif inputs is not None:
            check_int("Transformer", "inputs", inputs, 1)
            self.into = Projection(inputs, config.dim, bias=True)
        self.absolute = nn.Parameter(torch.randn(absolute, config.dim) * 0.02) if absolute else None
        block = CrossBlock if cross else Block
        self.blocks = nn.ModuleList(block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.positions = PositionScheme(
            config.position, config.heads, config.head_dim, max_distance=config.max_distance, theta=config.theta
        )

    def embed(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """What the first block sees: x [batch, length] of tokens or [batch, length, inputs]."""
        states = self.into(x) if x.is_floating_point() else functional.embedding(x, self.embedding)
        if self.absolute is None:
            return states
        if positions is None:
            if x.shape[1] > len(self.absolute):
                raise ValueError(
                    f"Transformer: x has length {x.shape[1]} and must have at most {len(self.absolute)}, absolute's"
                )
            return states + self.absolute[: x.shape[1]]
        return states + functional.embedding(positions, self.absolute)

    def forward(
        self,
        x: Tensor,
        *,
        schedule: Schedule = Causal(),  # noqa: B008 - a frozen value
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        memory: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        layers: int | None = None,
        embedded: bool = False,
    ) -> Tensor:
        """States ``[batch, length, dim]``, normed.

        Args:
            x: int64 ``[batch, length]``, or floats ``[batch, length, inputs]``.
            schedule: which keys a query attends to.
            lengths: int64 ``[batch]``: rows past a length are padding, which nothing reads; their states mean nothing.
            positions: int64 ``[batch, length]``, rows of the learned table; by default those from 0 on.
            memory: ``[batch, rows, dim]``, where the blocks look at one, of which ``memory_lengths`` rows count.
            layers: stop after so many; by default after all.
            embedded: x is what :meth:`embed` gave, or stands in its place.
        """
        states = x if embedded else self.embed(x, positions)
        # Two-sided schedules see keys behind the query, whose bias is that of the distance to either side.
        symmetric = not isinstance(schedule, Causal)
        options = AttentionOptions(
            symmetric_bias=symmetric, key_lengths=lengths, query_lengths=lengths, **self.positions()
        )
        block: Any
        for block in list(self.blocks)[:layers]:
            if memory is None:
                states = block(states, options, schedule)
            else:
                states = block.look(states, options, schedule, memory, memory_lengths)
        return self.norm(states)

    def loss(self, states: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy of target ``[...]`` (-100: not counted) by states ``[..., dim]``; nothing is stored."""
        return ops.linear_cross_entropy(states, self.embedding, target)

    def logits(self, states: Tensor) -> Tensor:
        """``[..., vocabulary]``."""
        return ops.invariant_linear(states, self.embedding)


def mean_pool(states: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The mean of the rows that count, at length 1: ``[batch, length, dim]`` to ``[batch, dim]``."""
    if lengths is None:
        mean = states.mean(1)
    else:
        counts = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        mean = torch.where(counts[..., None], states, 0.0).sum(1) / lengths.clamp(min=1)[:, None]
    return functional.normalize(mean, dim=-1)


def nearest_accuracy(queries: Tensor, answers: Tensor, k: int = 1) -> float:
    """How often row i of the answers is among the k with the largest product with row i of the queries."""
    found = ops.pairwise_topk(queries, answers, min(k, len(answers)))[1]
    own = torch.arange(len(queries), device=queries.device)[:, None]
    return (found == own).any(1).double().mean().item()
