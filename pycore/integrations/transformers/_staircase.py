# SPDX-License-Identifier: Apache-2.0
"""StaircaseCache: transformers' cache interface over a StaircaseKVCache a layer.

Where the attention in use reads packed caches, `update` keeps the new tokens and returns them marked with their layer,
as LambdaCache does, and the attention function appends them and attends. Any other attention is given all keys and
values, unpacked. Which of the two it is says the model's config, which the cache therefore holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from pycore._checks import check_int, check_str
from pycore.cache.staircase_cache import Staircase, StaircaseKVCache
from pycore.integrations.transformers._cache import StoreLayer
from pycore.schedules import Schedule

# Names of registered attention that reads packed caches.
READERS: set[str] = set()


class StaircaseLayer(StoreLayer):
    """One layer of a StaircaseCache."""

    cache_name = "StaircaseCache"
    store: StaircaseKVCache | None

    def __init__(self, config: Any, staircase: Staircase, capacity: int | None, prefill: str) -> None:
        """As StaircaseCache's; config is the decoder's."""
        super().__init__()
        self.config, self.staircase, self.capacity, self.prefill = config, staircase, capacity, prefill
        self.rollback = staircase.rollback
        self.reset()

    def __deepcopy__(self, memo: Any) -> StaircaseLayer:
        """The model's config stays the model's: it says which attention is in use."""
        new = StaircaseLayer(self.config, self.staircase, self.capacity, self.prefill)
        memo[id(self)] = new
        if self.store is not None:
            new.store = self._made(self.store.batch, self.store.kv_heads, self.store.head_dim, self.store.value_dim,
                                   self.store.dtype)  # fmt: skip
            new.store.load_state_dict(self.store.state_dict())
        new._seen = self._seen
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes new tokens and returns them marked, or appends them and returns all there are, unpacked."""
        if self.config._attn_implementation in READERS:
            return super().update(key_states, value_states, *args, **kwargs)
        return self._unpacked(key_states, value_states)

    def _made(self, batch: int, kv_heads: int, head_dim: int, value_dim: int, dtype: torch.dtype) -> StaircaseKVCache:
        return StaircaseKVCache(
            self.staircase, batch=batch, kv_heads=kv_heads, head_dim=head_dim, capacity=self.capacity,
            value_dim=value_dim, dtype=dtype,
        )  # fmt: skip

    def _open_store(self, key: Tensor, value: Tensor) -> StaircaseKVCache:
        """The store, made by the first tokens."""
        if key.device.type != "cpu":
            raise ValueError(f"StaircaseCache: key_states is on {key.device} and must be on the CPU")
        if self.store is None or self._seen == 0:
            batch, kv_heads, _, head_dim = key.shape
            self.store = self._made(batch, kv_heads, head_dim, value.shape[3], key.dtype)
        return self.store

    def takes_back(self, key: Tensor, starts: Tensor | None) -> bool:
        """Whether `append_and_attend` can undo that it took these tokens."""
        return starts is None and key.shape[2] <= self.rollback

    @torch.compiler.disable  # what it does depends on lengths, which would be a graph for every token
    def append_and_attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, starts: Tensor | None, schedule: Schedule, **options: Any
    ) -> Tensor:
        """Attention of the new tokens over the packed cache, [batch, heads, tokens, value_dim]."""
        store = self._open_store(key, value)
        store.append(key, value, starts=starts)
        try:
            out = store.attend(query, schedule=schedule, prefill=self.prefill, **options)
        except Exception:
            if self.takes_back(key, starts):
                store.crop(key.shape[2])
            raise
        assert isinstance(out, Tensor)
        self._seen += key.shape[2]
        return out

    @torch.compiler.disable
    def _unpacked(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values for any attention: those held as the first new token reads them, and the new ones in full.

        With one new token that is what its query reads of the packed cache; several of them read as with
        prefill="full", since each would read widths of its own.
        """
        store = self._open_store(key, value)
        held = store.read_next()
        if not all(length == self._seen for length in store.lengths.tolist()):
            # Rows are kept without the padding that attention on the packed cache left out; here they end alike.
            padding = (self._seen - store.lengths)[:, None]
            place = (torch.arange(self._seen) - padding).clamp(min=0)[:, None, :, None]
            held = tuple(  # type: ignore[assignment]
                x.gather(2, place.expand(-1, x.shape[1], -1, x.shape[3]))
                if x.shape[2]
                else x.new_zeros(*x.shape[:2], self._seen, x.shape[3])
                for x in held
            )
        store.append(key, value)
        self._seen += key.shape[2]
        return torch.cat([held[0], key], 2), torch.cat([held[1], value], 2)


class StaircaseCache(Cache):
    """A cache with fewer bits for older tokens, for any model whose attention transformers runs on the CPU.

    An attention made by `register` without a distance limit (`window_size=None` for the model's own) reads it packed.
    To any other it gives keys and values unpacked, which saves memory between steps and no time.

    Layers of full attention are quantized. All others (sliding windows, which keep few tokens anyway, linear attention)
    are left alone, kept as transformers keeps them, and named in `left_alone`.

    Args:
        config: the model's own, `model.config`; it says which layers there are and which attention is in use.
        staircase: the ladder of every layer, or a sequence with one for each layer, None for a layer to leave alone.
            Those given must agree in rollback, which is what assisted decoding needs.
        capacity: tokens a row that storage is made for; None lets it grow.
        prefill: "staircase": each token of a chunk reads what it would have read alone; "full": all read the first
            one's widths, and the chunk in full. With an attention that reads unpacked keys it is always "full".

    Attributes:
        left_alone: layer -> what it is: "full_attention", "sliding_attention", ….

    Raises:
        ValueError: no layer would be quantized, there are not as many ladders as layers, or they differ in rollback.
        TypeError: an argument of another type.

    Example:
        >>> register("pycore_causal", window_size=None)
        >>> model.set_attn_implementation("pycore_causal")
        >>> cache = StaircaseCache(model.config, Staircase((16, 8, 4)))
        >>> model.generate(**inputs, past_key_values=cache)
    """

    def __init__(
        self,
        config: Any,
        staircase: Staircase | Sequence[Staircase | None] | None = None,
        *,
        capacity: int | None = None,
        prefill: str = "staircase",
    ) -> None:
        op = "StaircaseCache"
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"{op}: config is a {type(config).__name__} and must be the model's PretrainedConfig")
        if capacity is not None:
            check_int(op, "capacity", capacity, 1)
        check_str(op, "prefill", prefill)
        if prefill not in ("staircase", "full"):
            raise ValueError(f"{op}: prefill is {prefill!r} and must be 'staircase' or 'full'")
        decoder = config.get_text_config(decoder=True)
        layers: list[Any] = list(DynamicCache(config=config).layers)
        ladders = _ladders(op, Staircase() if staircase is None else staircase, len(layers))
        types = getattr(decoder, "layer_types", None) or [_kind(layer) for layer in layers]
        self.left_alone: dict[int, str] = {}
        for i, ladder in enumerate(ladders):
            if ladder is None or type(layers[i]) is not DynamicLayer:
                self.left_alone[i] = types[i]
                continue
            if isinstance(ladder.step, float) and capacity is None:
                raise ValueError(f"{op}: step is {ladder.step}, a fraction of capacity, which must be given")
            layers[i] = StaircaseLayer(decoder, ladder, capacity, prefill)
        if len(self.left_alone) == len(layers):
            raise ValueError(f"{op}: config has layers {sorted(set(types))} and must have full_attention to quantize")
        self._last: StaircaseLayer | None = None
        super().__init__(layers=layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes a layer's new tokens and returns what the attention in use takes.

        Raises:
            ValueError: the attention before this one did not take its tokens from the cache.
        """
        if self._last is not None and self._last.waits:
            self._last.forget_new()
            raise ValueError(
                f"StaircaseCache: config has attn_implementation {self._last.config._attn_implementation!r}, the model "
                "used another, and config must be the model's own"
            )
        new = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        self._last = layer if isinstance(layer, StaircaseLayer) else None
        return new

    def reset(self) -> None:
        """Forgets everything."""
        self._last = None
        super().reset()

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held, those of layers left alone among them."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, StaircaseLayer):
                total += 0 if layer.store is None else layer.store.nbytes
            else:
                held = [getattr(layer, name, None) for name in ("keys", "values")]
                total += sum(x.numel() * x.element_size() for x in held if isinstance(x, Tensor))
        return total


def _kind(layer: Any) -> str:
    return "sliding_attention" if getattr(layer, "is_sliding", False) else "full_attention"


def _ladders(op: str, staircase: Any, layers: int) -> list[Staircase | None]:
    """A ladder a layer."""
    if isinstance(staircase, Staircase):
        return [staircase] * layers
    if not isinstance(staircase, Sequence) or isinstance(staircase, str):
        raise TypeError(f"{op}: staircase is a {type(staircase).__name__} and must be a Staircase or a list of them")
    for i, ladder in enumerate(staircase):
        if ladder is not None and not isinstance(ladder, Staircase):
            raise TypeError(f"{op}: staircase[{i}] is a {type(ladder).__name__} and must be a Staircase or None")
    if len(staircase) != layers:
        raise ValueError(f"{op}: staircase has {len(staircase)} entries and must have {layers}, one for each layer")
    rollbacks = {ladder.rollback for ladder in staircase if ladder is not None}
    if len(rollbacks) > 1:
        raise ValueError(f"{op}: staircase has rollback {sorted(rollbacks)} and must have one in every layer")
    return list(staircase)
