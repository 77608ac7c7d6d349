# SPDX-License-Identifier: Apache-2.0
"""Attention layers: projections around one call of an attention op, and the ways positions reach it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pycore._checks import check_bool, check_int, check_number
from pycore._limits import KEY_TILE
from pycore.cache import LambdaKVCache
from pycore.nn.linear import Projection
from pycore.nn.staircase import StaircaseLayer
from pycore.ops.attention_call import AttentionOptions, call_attention
from pycore.positions import alibi_slopes, rope_alibi_harmonic, rope_tables, t5_bias
from pycore.schedules import Causal, Lambda, Schedule, Tree

__all__ = ["POSITIONS", "LambdaAttention", "PositionScheme", "SelfAttention"]

POSITIONS = ("rope", "alibi", "t5", "harmonic", "none")


class PositionScheme(nn.Module):
    """How attention learns where keys stand: calling it gives arguments of the attention op.

    ``rope`` rotates by distance; ``alibi`` takes a slope times the distance off each logit; ``t5`` adds a learned bias
    for each bucket of distances; ``harmonic`` rotates and penalises (:func:`pycore.positions.rope_alibi_harmonic`);
    ``none`` leaves it to the causal mask.

    Args:
        name: one of :data:`POSITIONS`.
        heads: query heads.
        head_dim: channels of a head; all are rotated.
        max_distance: rope, harmonic: the largest distance between a query and a key, after any distance limit.
        theta: rope, harmonic: base of the frequencies.
        buckets: t5: how many.
        bucket_distance: t5: distances from here on share the last bucket.
    """

    rope_cos: Tensor
    rope_sin: Tensor
    alibi_slopes: Tensor
    distance_bias: Tensor

    def __init__(
        self,
        name: str,
        heads: int,
        head_dim: int,
        *,
        max_distance: int,
        theta: float = 10000.0,
        buckets: int = 32,
        bucket_distance: int = 128,
    ) -> None:
        super().__init__()
        if name not in POSITIONS:
            raise ValueError(f"PositionScheme: name is {name!r} and must be one of {', '.join(POSITIONS)}")
        for argument, number in (("heads", heads), ("head_dim", head_dim), ("buckets", buckets)):
            check_int("PositionScheme", argument, number, 1)
        for argument, number in (("max_distance", max_distance), ("bucket_distance", bucket_distance)):
            check_int("PositionScheme", argument, number, 0)
        self.name = name
        self.bucket_distance = bucket_distance
        # Buffers are functions of the configuration, so not part of a checkpoint.
        rows = max_distance + 1 + KEY_TILE
        if name in ("rope", "harmonic"):
            if name == "rope":
                cos, sin = rope_tables(rows, head_dim, theta=theta)
            else:
                (cos, sin), bias = rope_alibi_harmonic(rows, head_dim, heads, theta=theta)
                self.register_buffer("distance_bias", bias, persistent=False)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        elif name == "alibi":
            self.register_buffer("alibi_slopes", alibi_slopes(heads), persistent=False)
        elif name == "t5":
            self.weight = nn.Parameter(torch.randn(buckets, heads) * 0.1)

    def forward(self) -> dict[str, Any]:
        if self.name == "rope":
            return {"rope": (self.rope_cos, self.rope_sin)}
        if self.name == "harmonic":
            return {"rope": (self.rope_cos, self.rope_sin), "distance_bias": self.distance_bias}
        if self.name == "alibi":
            return {"alibi_slopes": self.alibi_slopes}
        if self.name == "t5":
            bias = t5_bias(self.weight, self.bucket_distance + 1, max_distance=self.bucket_distance)
            return {"distance_bias": bias}
        return {}


class SelfAttention(nn.Module):
    """Projections around one call of :func:`pycore.ops.attention`, or of a cache's.

    Keys stay un-rotated: the op rotates by distance, which is what a distance limit and an evicting cache need.

    Args:
        dim: channels of the input and the output.
        heads: query heads.
        kv_heads: key and value heads, which divide ``heads``; ``heads`` by default.
        head_dim: channels of a head, ``dim / heads`` by default.
        bias: whether the query, key and value projections have one.
        gain: scale of the output projection's initial weights.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        name = type(self).__name__
        for argument, number in (("dim", dim), ("heads", heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            if number is not None:
                check_int(name, argument, number, 1)
        check_bool(name, "bias", bias)
        if heads % kv_heads != 0:
            raise ValueError(f"{name}: kv_heads is {kv_heads} and must divide heads, {heads}")
        if head_dim is None and dim % heads != 0:
            raise ValueError(f"{name}: heads is {heads} and must divide dim, {dim}, where no head_dim is given")
        self.head_dim = head_dim = dim // heads if head_dim is None else head_dim
        self.query = Projection(dim, heads * head_dim, bias=bias)
        self.key = Projection(dim, kv_heads * head_dim, bias=bias)
        self.value = Projection(dim, kv_heads * head_dim, bias=bias)
        self.out = Projection(heads * head_dim, dim, gain=gain)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attention is given: query, key and value of the input, ``[batch, heads, length, head_dim]``."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        return query, key, value

    def forward(
        self,
        x: Tensor,
        options: AttentionOptions,
        schedule: Schedule = Causal(),  # noqa: B008 - a frozen value
        cache: LambdaKVCache | StaircaseLayer | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """The layer's output.

        Args:
            x: ``[batch, length, dim]``.
            options: of the attention op.
            schedule: which keys a query keeps; the cache's own affair where there is one, but for the drafts of a Tree.
            cache: is given the new keys and values, and answers the new queries.
            starts: int64 ``[batch]``, tokens at the front of x that are padding.
        """
        query, key, value = self.project(x)
        if cache is None:
            options = options._replace(key_starts=starts)
            mixed: Any = call_attention("attention", query, key, value, schedule, options)
        elif isinstance(schedule, Tree):
            if isinstance(cache, StaircaseLayer):
                raise ValueError(f"{type(self).__name__}: schedule is a Tree and must be none on a staircase")
            cache.append(key, value, starts=starts)
            mixed = cache.attend(query, tree=schedule, **options.for_cache())
        else:
            mixed = cache.append_and_attend(query, key, value, starts=starts, **options.for_cache())
        return self.out(mixed.transpose(1, 2).flatten(2))


def check_factors(op: str, softcap: float, dropout_p: float) -> tuple[float, float]:
    """Softcap and dropout_p as the attention op takes them, or what is wrong with them."""
    softcap, dropout_p = check_number(op, "softcap", softcap), check_number(op, "dropout_p", dropout_p)
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"{op}: softcap is {softcap} and must be finite and at least 0")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p} and must be at least 0 and less than 1")
    return softcap, dropout_p


class LambdaAttention(SelfAttention):
    """Self-attention whose cost grows linearly with the length: sinks, a window and a distance limit. Usually causal.

    A row's output has the same bits in one pass, in chunks, or token by token on a cache, alone or in a batch.

    Args:
        dim: channels of the input and the output.
        heads: query heads.
        sink_size: tokens kept from the start, at least 0.
        window_size: newest tokens kept, the query's own among them.
        right: tokens kept after the query's own, for encoders, which have no cache; biases then go by the distance to
            either side.
        kv_heads: key and value heads, which divide ``heads``; ``heads`` by default.
        head_dim: channels of a head, ``dim / heads`` by default; even for ``rope``.
        position: ``"rope"``, ``"alibi"``, ``"t5"``, ``"harmonic"`` or ``"none"``, see :class:`PositionScheme`.
        theta: base of the rotary frequencies.
        distance_limit: the largest distance positions see; by default, and at least, the larger of ``window_size`` and
            ``right``.
        sink_logits: whether a learned logit for each head joins the softmax and carries no value.
        softcap: logits become ``softcap * tanh(logit / softcap)``; 0 for none.
        dropout_p: share of the attention weights set to zero in training.
        bias: whether the query, key and value projections have one.

    Example:
        >>> layer = LambdaAttention(256, 8, sink_size=4, window_size=512)
        >>> y = layer(x)                                      # [batch, length, 256]
        >>> cache = layer.cache()
        >>> y = layer(prompt, cache=cache)                    # then token by token:
        >>> y = layer(token, cache=cache)                     # [batch, 1, 256]

    Raises:
        ValueError: a number that does not fit; the sentence names it.

    Source: Han et al., "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models", section 3.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        sink_size: int,
        window_size: int,
        right: int = 0,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        position: str = "rope",
        theta: float = 10000.0,
        distance_limit: int | None = None,
        sink_logits: bool = False,
        softcap: float = 0.0,
        dropout_p: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias)
        LambdaKVCache(sink_size, window_size)  # says what is wrong with either
        check_int("LambdaAttention", "right", right, 0)
        self.sink_size, self.window_size, self.right = sink_size, window_size, right
        if distance_limit is not None:
            check_int("LambdaAttention", "distance_limit", distance_limit)
        self.distance_limit = max(window_size, right) if distance_limit is None else distance_limit
        for name, least in (("window_size", window_size), ("right", right)):
            if self.distance_limit < least:
                raise ValueError(
                    f"LambdaAttention: distance_limit is {distance_limit} and must be at least {name}, {least}"
                )
        check_bool("LambdaAttention", "sink_logits", sink_logits)
        self.softcap, self.dropout_p = check_factors("LambdaAttention", softcap, dropout_p)
        self.positions = PositionScheme(position, heads, self.head_dim, max_distance=self.distance_limit, theta=theta)
        self.sink_logits = nn.Parameter(torch.zeros(heads)) if sink_logits else None

    def cache(self, rollback: int = 0) -> LambdaKVCache:
        """An empty cache for this layer, whose last ``rollback`` tokens can be taken back.

        Raises:
            ValueError: the layer looks to the right: tokens that are still to come would change what is computed.
        """
        self._refuse_cache()
        return LambdaKVCache(self.sink_size, self.window_size, rollback)

    def _refuse_cache(self) -> None:
        if self.right != 0:
            raise ValueError(f"LambdaAttention: right is {self.right} and must be 0 where there is a cache")

    def forward(  # type: ignore[override]
        self, x: Tensor, *, cache: LambdaKVCache | None = None, starts: Tensor | None = None
    ) -> Tensor:
        """The layer's output, ``[batch, length, dim]``.

        Args:
            x: ``[batch, length, dim]``.
            cache: from :meth:`cache`; x then follows what the cache has seen. Dropout does not apply.
            starts: int64 ``[batch]``, tokens at the front of x that are padding; their outputs mean nothing.
        """
        options = AttentionOptions(
            distance_limit=self.distance_limit, symmetric_bias=self.right != 0, sink_logits=self.sink_logits,
            softcap=self.softcap, dropout_p=self.dropout_p if self.training and cache is None else 0.0,
            **self.positions(),
        )  # fmt: skip
        if cache is None:
            schedule = Lambda(self.sink_size, self.window_size, self.right)
            return super().forward(x, options, schedule, starts=starts)
        self._refuse_cache()
        if (cache.sink_size, cache.window_size) != (self.sink_size, self.window_size):
            raise ValueError(
                f"LambdaAttention: cache has sink_size {cache.sink_size} and window_size {cache.window_size} and must "
                f"have {self.sink_size} and {self.window_size}"
            )
        return super().forward(x, options, cache=cache, starts=starts)
