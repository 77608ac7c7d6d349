# SPDX-License-Identifier: Apache-2.0
"""A byte-level decoder whose logits are the same bits in a batch or alone, for a prefix or the whole text.

Every reduction over channels or keys is one of pycore's ops (``rms_norm``, ``invariant_linear``, ``attention``), whose
rows do not depend on what they are computed with. What is left to torch is element-wise (the residual sum and the
squared ReLU) or a lookup, and therefore exact. So the logits of position i depend on bytes 0..i and on nothing else,
to the last bit, which is what an arithmetic coder needs of a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore._checks import check_int
from pycore._tensors import check_tensor
from pycore.cache import LambdaKVCache
from pycore.cache.staircase_cache import Staircase
from pycore.nn.attention import POSITIONS, PositionScheme, SelfAttention
from pycore.nn.linear import Projection, RMSNorm
from pycore.nn.staircase import StaircaseLayer
from pycore.ops.attention_call import AttentionOptions
from pycore.schedules import Causal, Lambda, Probabilistic, Schedule

BOS = 256
VOCABULARY = 257  # 256 bytes and BOS


@dataclass(frozen=True)
class BytelmConfig:
    """Shape of a :class:`Bytelm`. The default has 0.43 million parameters.

    Attributes:
        layers: pairs of attention and feed-forward block.
        dim: width of the residual stream.
        heads: query heads; ``dim / heads`` channels each, an even number because RoPE rotates pairs.
        kv_heads: key and value heads, which divide ``heads``.
        mlp_ratio: hidden channels of a feed-forward block, as a multiple of ``dim``.
        position: how attention learns where keys stand: ``"rope"``, ``"alibi"``, ``"t5"``, ``"harmonic"`` or
            ``"none"``, see :class:`pycore.nn.attention.PositionScheme`.
        theta: base of the rotary frequencies.
        max_distance: largest distance between a query and a key that the rotary tables serve, and that a cache for a
            causal reading holds. Text may be longer where ``distance_limit`` cuts distances off.
        norm_eps: added to the mean square in the norms.
    """

    layers: int = 2
    dim: int = 128
    heads: int = 4
    kv_heads: int = 4
    mlp_ratio: int = 4
    position: str = "rope"
    theta: float = 10000.0
    max_distance: int = 4096
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "heads", "kv_heads", "mlp_ratio", "max_distance"):
            check_int("BytelmConfig", name, getattr(self, name), 1)
        if self.position not in POSITIONS:
            raise ValueError(f"BytelmConfig: position is {self.position!r} and must be one of {', '.join(POSITIONS)}")
        if self.dim % self.heads != 0 or (self.dim // self.heads) % 2 != 0:
            raise ValueError(f"BytelmConfig: heads is {self.heads} and must cut dim {self.dim} into even parts")
        if self.heads % self.kv_heads != 0:
            raise ValueError(f"BytelmConfig: kv_heads is {self.kv_heads} and must divide heads {self.heads}")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.heads


class FeedForward(nn.Module):
    """Two projections with a squared ReLU between them; its square is exact enough to be the same bits everywhere."""

    def __init__(self, config: BytelmConfig) -> None:
        super().__init__()
        hidden = config.mlp_ratio * config.dim
        self.into = Projection(config.dim, hidden)
        self.out = Projection(hidden, config.dim, gain=1.0 / math.sqrt(2 * config.layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(functional.relu(self.into(x)).square())


class Block(nn.Module):
    """One layer: attention and feed-forward, each normed before and added to the residual stream after."""

    def __init__(self, config: BytelmConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        gain = 1.0 / math.sqrt(2 * config.layers)
        self.attention = SelfAttention(config.dim, config.heads, kv_heads=config.kv_heads, gain=gain)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        options: AttentionOptions,
        schedule: Schedule = Causal(),  # noqa: B008 - a frozen value
        cache: LambdaKVCache | StaircaseLayer | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), options, schedule, cache, starts)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Bytelm(nn.Module):
    """Byte-level decoder; the embedding is also the output projection.

    Example:
        >>> model = Bytelm()
        >>> logits = model(tokens_from_bytes(b"import ")[None])                    # [1, 8, 257]
        >>> far = model(tokens, schedule=Lambda(sink_size=4, window_size=128))     # any length, linear cost
        >>> caches = model.caches(Lambda(sink_size=4, window_size=128))
        >>> logits = model(tokens, caches=caches)             # then token by token, in constant memory:
        >>> logits = model(token, caches=caches)              # [1, 1, 257], the bits of one pass over everything
    """

    def __init__(self, config: BytelmConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or BytelmConfig()
        # Small, because it is the output projection too: the logits start near zero.
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, config.dim) * 0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.positions = PositionScheme(
            config.position, config.heads, config.head_dim, max_distance=config.max_distance, theta=config.theta
        )

    def attention_options(self, length: int, schedule: Schedule, distance_limit: int | None) -> AttentionOptions:
        """What every layer tells the attention op: how a pair that the schedule keeps sees its distance."""
        if distance_limit is None and isinstance(schedule, Lambda):
            distance_limit = schedule.window_size
        longest = length - 1 if distance_limit is None else min(length - 1, distance_limit)
        if self.config.position in ("rope", "harmonic") and longest > self.config.max_distance:
            raise ValueError(
                f"Bytelm: tokens has length {length}, whose distances exceed the configuration's max_distance "
                f"{self.config.max_distance}; raise it or pass a distance_limit"
            )
        return AttentionOptions(distance_limit=distance_limit, **self.positions())

    def caches(self, schedule: Schedule = Causal(), *, rollback: int = 0) -> list[LambdaKVCache]:  # noqa: B008
        """An empty cache for each layer, to be passed to every call that goes on with the same text.

        Args:
            schedule: ``Lambda``, whose caches have a constant size for any length; or ``Causal``, whose caches hold
                ``max_distance + 1`` tokens, the longest text that all of it can be attended to.
            rollback: tokens that the caches' ``crop`` may take back.
        """
        if isinstance(schedule, Lambda):
            sinks, window = schedule.sink_size, schedule.window_size
        elif isinstance(schedule, Causal):
            sinks, window = 0, self.config.max_distance + 1
        else:
            raise ValueError(f"Bytelm: schedule is {schedule!r} and must be Causal or Lambda for a cache")
        return [LambdaKVCache(sinks, window, rollback) for _ in self.blocks]

    def staircase_caches(self, staircase: Staircase, schedule: Schedule = Causal()) -> list[StaircaseLayer]:  # noqa: B008
        """As :meth:`caches`, with fewer bits for older tokens; all tokens are kept.

        Args:
            staircase: how many bits at which age.
            schedule: ``Causal``; or ``Lambda``, unless positions are rotations, whose distances packed keys cannot cut
                off.
        """
        if not isinstance(schedule, Causal | Lambda):
            raise ValueError(f"Bytelm: schedule is {schedule!r} and must be Causal or Lambda for a cache")
        if isinstance(schedule, Lambda) and self.config.position in ("rope", "harmonic"):
            raise ValueError(
                f"Bytelm: position is {self.config.position!r} and must be another for Lambda on a staircase"
            )
        return [StaircaseLayer(staircase, schedule, self.config.max_distance) for _ in self.blocks]

    def forward(
        self,
        tokens: Tensor,
        *,
        schedule: Schedule = Causal(),  # noqa: B008 - a frozen value
        distance_limit: int | None = None,
        caches: Sequence[LambdaKVCache | StaircaseLayer] | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token that follows each position.

        Args:
            tokens: int64 ``[batch, length]``, bytes and :data:`BOS`.
            schedule: which keys a query attends to, from :mod:`pycore.schedules`. With caches, theirs, unless it is a
                ``Tree`` of drafts, which the tokens then are; the caches' ``accept`` keeps a branch.
            distance_limit: distances beyond it are seen as it. None stands for the window with ``Lambda``, as in
                LM-Infinite, and for no limit elsewhere.
            caches: from :meth:`caches` or :meth:`staircase_caches`; tokens then follow what the caches have seen.
            starts: int64 ``[batch]``, tokens at the front of each row that are padding; their logits mean nothing.

        Returns:
            Logits, ``[batch, length, 257]``.

        Raises:
            TypeError: tokens is not int64.
            ValueError: tokens is not a matrix, its distances are longer than the rotary table, or caches are not one
                for each layer.
            IndexError: a token is not in 0..256.
        """
        rows = self._rows(tokens, schedule, distance_limit, caches, starts)
        return ops.invariant_linear(rows, self.embedding)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        schedule: Schedule = Causal(),  # noqa: B008 - a frozen value
        distance_limit: int | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """The mean cross entropy, in nats, of the tokens that follow; no logits exist, in neither direction.

        Args:
            tokens: int64 ``[batch, length]``, as in :meth:`forward`.
            targets: int64 ``[batch, length]``, the token that follows each position, -100 where none counts.
            schedule, distance_limit, starts: as in :meth:`forward`.

        Returns:
            A scalar: ``cross_entropy(self(tokens), targets)``.

        Raises:
            ValueError, TypeError, IndexError: as :meth:`forward`, and for targets that do not fit.
        """
        rows = self._rows(tokens, schedule, distance_limit, None, starts)
        return ops.linear_cross_entropy(rows, self.embedding, targets)

    def _rows(
        self,
        tokens: Tensor,
        schedule: Schedule,
        distance_limit: int | None,
        caches: Sequence[LambdaKVCache | StaircaseLayer] | None,
        starts: Tensor | None,
    ) -> Tensor:
        """What the output projection is given, ``[batch, length, dim]``."""
        check_tensor("Bytelm", "tokens", tokens)
        if tokens.dtype != torch.int64:
            raise TypeError(f"Bytelm: tokens has dtype {tokens.dtype} and must have torch.int64")
        if tokens.dim() != 2:
            raise ValueError(f"Bytelm: tokens has {tokens.dim()} dimensions and must have 2, [batch, length]")
        if distance_limit is not None:
            check_int("Bytelm", "distance_limit", distance_limit, 0)
        if caches is None:
            options = self.attention_options(tokens.shape[1], schedule, distance_limit)
        elif len(caches) != len(self.blocks):
            raise ValueError(f"Bytelm: caches has {len(caches)} entries and must have {len(self.blocks)}")
        else:
            options = AttentionOptions(distance_limit=distance_limit, **self.positions())
        x = functional.embedding(tokens, self.embedding)
        for layer, block in enumerate(self.blocks):
            # Layers that read the same blocks could never pass on the others.
            own = schedule.for_layer(layer) if isinstance(schedule, Probabilistic) else schedule
            x = block(x, options, own, None if caches is None else caches[layer], starts)
        rows: Tensor = self.norm(x)
        return rows

    @property
    def parameter_count(self) -> int:
        """Learned numbers, the shared embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def tokens_from_bytes(data: bytes, *, bos: bool = True) -> Tensor:
    """int64 ``[len(data) + bos]``: the bytes, with :data:`BOS` in front, which every text starts with in training."""
    return torch.tensor([BOS, *data] if bos else list(data), dtype=torch.int64)
