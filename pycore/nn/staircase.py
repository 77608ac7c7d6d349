# SPDX-License-Identifier: Apache-2.0
"""A layer's key-value cache with fewer bits for older tokens, as `Bytelm.staircase_caches` makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycore import ops
from pycore.cache.staircase_cache import Staircase, StaircaseKVCache
from pycore.schedules import Causal, Lambda

__all__ = ["StaircaseLayer"]


class StaircaseLayer:
    """A `StaircaseKVCache` behind the one method of a `LambdaKVCache` that a layer of attention calls.

    Keys come in un-rotated; this cache keeps them rotated by their positions, since it cannot turn what it has packed.
    A distance limit is then out of reach, and with it RoPE under Λ. Slopes and biases by distance have no such bound:
    they are added to scores, up to the limit. Every token reads what it would have read alone, so that one pass and
    steps of one token have the same bits.

    Args:
        staircase: the ladder.
        schedule: Causal, or Λ.
        most: the largest distance that slopes serve under Causal.
    """

    def __init__(self, staircase: Staircase, schedule: Causal | Lambda, most: int) -> None:
        self.staircase, self.schedule, self.most = staircase, schedule, most
        self.store: StaircaseKVCache | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.store is None else self.store.nbytes

    def append_and_attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        starts: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        distance_limit: int | None = None,
        distance_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The new tokens' attention, `[batch, heads, n, head_dim]`; as `LambdaKVCache.append_and_attend`."""
        if self.store is None:
            self.store = StaircaseKVCache(
                self.staircase, batch=len(key), kv_heads=key.shape[1], head_dim=key.shape[3], value_dim=value.shape[3],
                dtype=key.dtype,
            )  # fmt: skip
        del options["interleaved"]  # no scheme of pycore.nn has it
        if rope is not None:
            query, key = self._rotated(query, key, rope, starts, distance_limit)
        if distance_limit is None and isinstance(self.schedule, Lambda):
            distance_limit = self.schedule.window_size  # as a LambdaKVCache has it
        if alibi_slopes is not None:
            distances = torch.arange(self.most + 1 if distance_limit is None else distance_limit + 1)
            distance_bias = -alibi_slopes.reshape(-1, 1) * distances
        elif distance_bias is not None and distance_limit is not None:
            distance_bias = distance_bias[..., : distance_limit + 1]  # the last entry holds for all that are farther
        self.store.append(key, value, starts=starts)
        return self.store.attend(query, schedule=self.schedule, distance_bias=distance_bias, **options)

    def _rotated(
        self, query: Tensor, key: Tensor, rope: tuple[Tensor, Tensor], starts: Tensor | None, limit: int | None
    ) -> tuple[Tensor, Tensor]:
        assert self.store is not None
        if isinstance(self.schedule, Lambda) or limit is not None:
            raise ValueError(
                "StaircaseLayer: rope is given with a distance limit, which packed keys cannot have; it must come "
                "without Lambda, or the position scheme must be another"
            )
        first = self.store.lengths if starts is None else self.store.lengths - starts
        places = (first[:, None] + torch.arange(key.shape[2])).clamp(min=0)
        if int(places.max()) >= len(rope[0]):
            raise ValueError(
                f"StaircaseLayer: rope has {len(rope[0])} rows and must have {int(places.max()) + 1}, one for every "
                "position"
            )
        cos, sin = (table[places] for table in rope)
        return ops.rotate(query, cos, sin), ops.rotate(key, cos, sin)
