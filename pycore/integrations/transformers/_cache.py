# SPDX-License-Identifier: Apache-2.0
"""LambdaCache and KVCache: transformers' cache interface over a LambdaKVCache or a KVCache a layer.

A layer of transformers' caches takes rotated keys and returns all of them. Here only the attention function can undo
the rotation and knows the padding, so `update` keeps the new tokens and returns them marked with their layer; the
function finds the mark, appends them un-rotated and attends. Whether a layer slides is known there too, so the tensors
come into being with the first attention.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from pycore._checks import check_int
from pycore.cache import KVCache as Tokens
from pycore.cache import LambdaKVCache
from pycore.schedules import Causal, Lambda

MARK = "_pycore_layer"  # the attribute of marked keys


class StoreLayer(CacheLayerMixin):
    """A layer of one of our caches: a store, and the new tokens that wait for the attention which will take them.

    Attributes:
        cache_name: of the cache it belongs to, for messages.
        store: the keys and values, once there are any.
        rollback: tokens that can be taken back.
    """

    is_compileable = False
    is_sliding = False  # a sliding layer too takes the whole mask
    supports_early_init = False
    cache_name: str
    rollback: int
    store: Any  # LambdaKVCache, KVCache or StaircaseKVCache, None as long as there are no tokens

    def reset(self) -> None:
        """Forgets everything."""
        self.store = None
        self._seen = 0
        self._new: tuple[Tensor, Tensor] | None = None

    @property
    def waits(self) -> bool:
        """Whether new tokens have not been attended to."""
        return self._new is not None

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return self.rollback > 0

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do before the first attention."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes new tokens, [batch, kv_heads, tokens, head_dim], and returns them marked."""
        self._new = (key_states, value_states)
        setattr(key_states, MARK, self)
        return key_states, value_states

    def take(self, name: str) -> tuple[Tensor, Tensor]:
        """The tokens that wait, once; they count when the store has taken them."""
        if self._new is None:
            raise ValueError(f"{name}: key was attended to before and must come from this call of the cache's update")
        new, self._new = self._new, None
        return new

    def forget_new(self) -> None:
        """Lets go of tokens that wait: no attention will come for them."""
        self._new = None

    def get_seq_length(self) -> int:
        """Tokens seen, padding among them."""
        return self._seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """The whole mask: padding is counted from the start. transformers 4 gives the positions of the queries."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self._seen + new, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4

    def crop(self, length: int) -> None:
        """Takes -length tokens back where length is negative; else keeps the first `length`, as transformers 4 asks."""
        tokens = -length if length < 0 else self._seen - length if length > 0 else 0
        if tokens > 0:
            if self.store is not None:
                self.store.crop(tokens)
            self._seen -= tokens

    def _choose(self, index: Tensor) -> None:
        if self.store is not None:
            self.store.select(index.to(self.store.lengths.device, torch.int64))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row beam_idx[b] was."""
        self._choose(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps rows `indices`."""
        self._choose(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.store is not None:
            self.store.repeat_interleave(repeats)


class TokensLayer(StoreLayer):
    """A layer whose store keeps tokens in their own dtype, un-rotated where distances are limited.

    Attributes:
        position_offset: int64 [batch], what a token's position id exceeds its number by; None as long as none is known.
        next_ids: the position id that each row goes on with; None where it has to be counted.
        step: the newest call of attention, if the next one may be like it (`_step.Step`).
    """

    store: LambdaKVCache | Tokens | None

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.position_offset: Tensor | None = None
        self.next_ids: list[int] | None = None
        self.step: Any = None

    def open_store(self, name: str, sink_size: int, window_size: int | None, unrotated: bool) -> Any:
        """The store, for attention of these sizes over keys that are rotated or not."""
        raise NotImplementedError

    def count(self, tokens: int, position_offset: Tensor | None, next_ids: list[int] | None) -> None:
        """Says that `store` has taken tokens."""
        self._seen += tokens
        self.position_offset, self.next_ids = position_offset, next_ids

    def crop(self, length: int) -> None:
        """As any layer's."""
        super().crop(length)
        self.next_ids = self.step = None

    def _choose(self, index: Tensor) -> None:
        super()._choose(index)
        self.next_ids = self.step = None
        if self.position_offset is not None:
            self.position_offset = self.position_offset[index.to(self.position_offset.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.next_ids = self.step = None
        if self.store is not None and self.position_offset is not None:
            self.position_offset = self.position_offset.repeat_interleave(repeats)


class LambdaLayer(TokensLayer):
    """One layer of a LambdaCache."""

    cache_name = "LambdaCache"
    store: LambdaKVCache | None

    def __init__(self, sink_size: int, window_size: int, rollback: int) -> None:
        """The sizes are LambdaCache's."""
        super().__init__()
        self.sink_size, self.window_size, self.rollback = sink_size, window_size, rollback
        self.reset()

    def open_store(self, name: str, sink_size: int, window_size: int | None, unrotated: bool) -> LambdaKVCache:
        """The store, of these sizes."""
        assert window_size is not None  # it is the layer's
        if self.store is None or self._seen == 0:
            self.store = LambdaKVCache(sink_size, window_size, self.rollback)
        if (self.store.sink_size, self.store.window_size) != (sink_size, window_size):
            raise ValueError(
                f"{name}: past_key_values was filled with sink_size {self.store.sink_size} and window_size "
                f"{self.store.window_size} and must be used with these, not with {sink_size} and {window_size}"
            )
        return self.store


class KVLayer(TokensLayer):
    """One layer of a KVCache."""

    cache_name = "KVCache"
    rollback = 1  # any number of tokens
    store: Tokens | None

    def __init__(self, capacity: int | None) -> None:
        """As KVCache's."""
        super().__init__()
        self.capacity = capacity
        self._sizes: tuple[int, int | None] | None = None
        self.reset()

    def open_store(self, name: str, sink_size: int, window_size: int | None, unrotated: bool) -> Tokens:
        """The store, whose attention now has these sizes: it has every token."""
        if self.store is None or self._seen == 0:
            self.store, self.unrotated, self._sizes = Tokens(self.capacity), unrotated, None
        if self.unrotated != unrotated:
            limits = ("without", "with") if unrotated else ("with", "without")
            raise ValueError(
                f"{name}: past_key_values was filled {limits[0]} a limit of distances and must not be used "
                f"{limits[1]} one: keys are kept as that attention takes them"
            )
        if self._sizes != (sink_size, window_size):
            self._sizes = (sink_size, window_size)
            self.store.schedule = Causal() if window_size is None else Lambda(sink_size, window_size)
        return self.store


class _StoreCache(Cache):
    """A cache of store layers, which only a registered attention can read."""

    _last: StoreLayer | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes a layer's new tokens and returns them for the attention function.

        Raises:
            ValueError: the attention before this one did not take its tokens from the cache.
        """
        if self._last is not None and self._last.waits:
            self._last.forget_new()
            raise ValueError(
                f"{type(self).__name__}: attn_implementation is one that does not read this cache and must be one made "
                "by pycore.integrations.transformers.register"
            )
        if layer_idx >= len(self.layers):  # transformers makes them
            new = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            self._last = self.layers[layer_idx]
            return new
        self._last = self.layers[layer_idx]
        return self._last.update(key_states, value_states)

    def reset(self) -> None:
        """Forgets everything."""
        self._last = None
        super().reset()

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(layer.store.nbytes for layer in self.layers if layer.store is not None)


class LambdaCache(_StoreCache):
    """A cache of constant size for models whose `attn_implementation` was made by `register`.

    Full-attention layers keep `sink_size` + `window_size` + `rollback` tokens, sliding layers their own window and
    `rollback`, whatever has been seen. Where the registered attention limits distances the keys are kept un-rotated.

    Args:
        sink_size: as registered.
        window_size: as registered.
        rollback: tokens that can be taken back, for assisted and prompt-lookup decoding: at least the number of
            candidates a step.

    Raises:
        ValueError, TypeError: a size is no integer, or out of range.

    Example:
        >>> cache = LambdaCache(sink_size=16, window_size=1024)
        >>> model.generate(**inputs, past_key_values=cache)
    """

    def __init__(self, sink_size: int, window_size: int, rollback: int = 0) -> None:
        LambdaKVCache(sink_size, window_size, rollback)  # checks them
        self.sink_size, self.window_size, self.rollback = sink_size, window_size, rollback
        new_layer: Any = functools.partial(LambdaLayer, sink_size, window_size, rollback)
        super().__init__(layer_class_to_replicate=new_layer)


class KVCache(_StoreCache):
    """A cache of every token for models whose `attn_implementation` was made by `register`, at decoding's speed.

    A step appends and attends in one call, keys lie as decoding reads them, and room grows by half whenever it is full,
    so that nothing is copied for a token. Any number of tokens can be taken back, which is what assisted decoding asks
    for. `register(name, window_size=None)` is the attention that reads all it keeps.

    Args:
        capacity: tokens that a row may have, room for which is made with the first ones. None: it grows.

    Raises:
        ValueError, TypeError: capacity is no integer, or less than 1.

    Example:
        >>> register("pycore_causal", window_size=None)
        >>> model.set_attn_implementation("pycore_causal")
        >>> model.generate(**inputs, past_key_values=KVCache())
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None:
            check_int("KVCache", "capacity", capacity, 1)
        self.capacity = capacity
        new_layer: Any = functools.partial(KVLayer, capacity)
        super().__init__(layer_class_to_replicate=new_layer)
