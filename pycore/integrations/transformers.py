# SPDX-License-Identifier: Apache-2.0
"""Λ attention for Hugging Face transformers (4.57 and newer): one call registers it, one argument chooses it.

    register(sink_size=16, window_size=1024)
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="pycore_lambda")
    model.generate(**inputs, past_key_values=LambdaCache(sink_size=16, window_size=1024))

docs/integrations/transformers.md says which models, what padding and caches do, and what is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from pycore.integrations._transformers_cache import _MARK, LambdaCache, LambdaLayer
from pycore.integrations._transformers_mask import read_spans, require, spans_function
from pycore.integrations._transformers_rope import INTERLEAVED, Rope, rope_of, unrotate
from pycore.ops import lambda_attention

__all__ = ["LambdaCache", "register"]

_REGISTERED: set[str] = set()
# What a model may hand to its attention that changes the result, and that is not available.
_REFUSED = {
    "position_bias": "a bias of its own", "head_mask": "a mask of heads", "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences", "cu_seqlens": "packed sequences", "seq_idx": "packed sequences",
    "cache": "a paged cache", "indices": "a choice of keys", "block_indices": "a choice of keys",
    "sinks": "sinks of another kind",
}  # fmt: skip

_Spans = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class _Options:
    name: str
    sink_size: int
    window_size: int
    distance_limit: int | None  # None: inputs are taken rotated, as the model gives them
    interleaved: bool | None


def register(
    name: str = "pycore_lambda",
    *,
    sink_size: int,
    window_size: int,
    distance_limit: int | None = None,
    limit_distances: bool = True,
    interleaved: bool | None = None,
) -> None:
    """Registers Λ attention with transformers, for `attn_implementation=name` and `model.set_attn_implementation`.

    A full-attention layer then keeps the first `sink_size` tokens and the newest `window_size` and rotates a pair by
    min(distance, distance_limit), which lets a model read far beyond its training length. A sliding layer keeps the
    window it was trained with. Registering a name anew replaces its sizes.

    Args:
        name: a name of your own; "flash", "sdpa", "flex_attention", "paged" and "/" mean something to transformers.
        sink_size: tokens kept from the start of each text, at least 0.
        window_size: newest tokens kept, the query's own among them, at least 1.
        distance_limit: `window_size` by default, as in LM-Infinite; at least that.
        limit_distances: False takes query and key as the model rotated them: the Λ mask alone, for any rotary or other
            position encoding.
        interleaved: says that every full-attention layer of a model this module does not know rotates its query and
            key in channel pairs (2i, 2i + 1) (True) or (i, i + R/2) (False). None for the models it knows.

    Raises:
        ValueError: a size out of range, or a name that is taken or means something else.
        TypeError: an argument of another type.
    """
    if not isinstance(name, str):
        raise TypeError(f"register: name is a {type(name).__name__} and must be a str")
    taken = name in AttentionInterface() and name not in _REGISTERED
    if taken or not name or any(part in name for part in ("flash", "sdpa", "flex_attention", "paged", "/", "|")):
        raise ValueError(
            f"register: name is {name!r} and must be a new name without flash, sdpa, flex_attention, paged, / and |, "
            "which mean something to transformers"
        )
    sizes = [("sink_size", sink_size, 0), ("window_size", window_size, 1)]
    if distance_limit is not None:
        sizes.append(("distance_limit", distance_limit, window_size))
    for argument, size, least in sizes:
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"register: {argument} is a {type(size).__name__} and must be an int")
        if size < least:
            raise ValueError(f"register: {argument} is {size} and must be at least {least}")
    if distance_limit is not None and not limit_distances:
        raise ValueError(f"register: distance_limit is {distance_limit} and must be None with limit_distances=False")
    limit = (window_size if distance_limit is None else distance_limit) if limit_distances else None
    AttentionInterface.register(name, _attention_function(_Options(name, sink_size, window_size, limit, interleaved)))
    AttentionMaskInterface.register(name, spans_function(name))
    _REGISTERED.add(name)


def _attention_function(options: _Options) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As transformers calls it: query [B, H, Lq, D], key and value [B, Hkv, Lk, D] -> [B, Lq, H, D]."""
        layer: LambdaLayer | None = getattr(key, _MARK, None)
        if layer is not None:  # first, so that a refused call leaves nothing waiting
            key, value = layer.take(options.name)
        window = _sliding_window(options.name, module, kwargs)
        _refuse(options.name, module, kwargs)
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        call: dict[str, Any] = {
            "scale": scaling,
            "softcap": softcap or 0.0,
            "sink_logits": None if s_aux is None else s_aux.to(wide),
        }
        rope = None
        if window is None and options.distance_limit is not None:
            call["distance_limit"] = options.distance_limit
            rope = rope_of(options.name, module, query, options.distance_limit)
            call["interleaved"] = _interleaved(options, module)
        if rope is not None:
            call["rope"] = (rope.cos, rope.sin)
            if position_ids is None:
                raise ValueError(
                    f"{options.name}: position_ids is None and must be handed on by {type(module).__name__} for a distance "
                    "limit; register with limit_distances=False"
                )
        sizes = (options.sink_size, options.window_size) if window is None else (0, window)
        spans = read_spans(options.name, attention_mask, query.shape[0])
        _check_positions(options.name, position_ids, query.shape[2], spans)
        if layer is not None:
            out = _attend_cached(options, layer, query, key, value, position_ids, spans, rope, dropout, sizes, call)
        else:
            out = _attend(query, key, value, position_ids, spans, rope, dropout, sizes, call)
        return out.transpose(1, 2).contiguous(), None

    return attention


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor | None,
    spans: _Spans | None,
    rope: Rope | None,
    dropout: float,
    sizes: tuple[int, int],
    call: dict[str, Any],
) -> Tensor:
    """Attention over keys as transformers' own caches give them, or without a cache."""
    call |= {"sink_size": sizes[0], "window_size": sizes[1], "dropout_p": dropout}
    if spans is not None:
        call |= {"key_starts": spans[0], "key_lengths": spans[1], "query_lengths": spans[2]}
    if rope is not None:
        if spans is None:
            key, value, call["key_offset"] = _without_middle(key, value, query.shape[2], sizes)
        assert position_ids is not None
        positions = _positions(query, key, position_ids, spans)
        if call.get("key_offset") is not None:
            sinks = torch.arange(key.shape[2], device=key.device) < sizes[0]
            positions = positions[0], positions[1] - sinks * call["key_offset"][:1]
        query = unrotate(query, rope.inverse(positions[0], query.dtype), call["interleaved"])
        key = unrotate(key, rope.inverse(positions[1], key.dtype), call["interleaved"])
    out = lambda_attention(query, key, value, **call)
    assert isinstance(out, Tensor)
    return out


def _attend_cached(
    options: _Options,
    layer: LambdaLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor | None,
    spans: _Spans | None,
    rope: Rope | None,
    dropout: float,
    sizes: tuple[int, int],
    call: dict[str, Any],
) -> Tensor:
    """Appends new tokens to a layer of a LambdaCache and attends to what it holds."""
    name = options.name
    for size, given, registered in (
        ("sink_size", layer.sink_size, options.sink_size),
        ("window_size", layer.window_size, options.window_size),
    ):
        if given != registered:
            raise ValueError(f"{name}: past_key_values has {size} {given} and must have the registered {registered}")
    if dropout:
        raise ValueError(f"{name}: dropout is {dropout} and must be 0 with a LambdaCache")
    store = layer.open_store(name, *sizes)
    starts = None
    if spans is not None:
        all_new = (spans[2] == query.shape[2]).all()
        require(all_new, f"{name}: attention_mask has padding on the right and must have it on the left")
        starts = spans[3]
        if starts.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(starts.any()):
            starts = None
    offset = layer.position_offset
    if rope is not None:
        assert position_ids is not None
        offset = _position_offset(name, layer, position_ids, query, starts)
        inverse = rope.inverse(_positions(query, key, position_ids, None)[0], query.dtype)
        query, key = (unrotate(x, inverse, call["interleaved"]) for x in (query, key))
    layer.append(key, value, starts, offset)
    out = store.attend(query, **call)
    assert isinstance(out, Tensor)
    return out


def _without_middle(
    key: Tensor, value: Tensor, queries: int, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Leaves out what no query keeps, where that is most of it, so that it is not un-rotated at every step."""
    sinks, recent = sizes[0], sizes[1] + queries - 1
    evicted = key.shape[2] - sinks - recent
    if evicted <= sinks + recent:
        return key, value, None
    key, value = (torch.cat([x[:, :, :sinks], x[:, :, -recent:]], 2) for x in (key, value))
    return key, value, torch.full((key.shape[0],), evicted, dtype=torch.int64, device=key.device)


def _positions(query: Tensor, key: Tensor, position_ids: Tensor, spans: _Spans | None) -> tuple[Tensor, Tensor]:
    """The position ids of the query's and of the key's rows, [B or 1, L], for rows of a text.

    They are counted back from the last query, since only the queries' are known and a text's are consecutive.
    """
    device = query.device
    queries, keys = query.shape[2], key.shape[2]
    last_query: Tensor | int = queries - 1
    last_key: Tensor | int = keys - 1
    if spans is not None:
        last_query, last_key = (spans[2] - 1).clamp(min=0)[:, None], (spans[1] - 1)[:, None]
    if spans is None:
        last = position_ids[:, -1:]
    else:
        last = position_ids.expand(query.shape[0], -1).gather(1, torch.as_tensor(last_query))
    query_position = torch.arange(queries, device=device)[None] + (last - last_query)
    return query_position, torch.arange(keys, device=device)[None] + (last - last_key)


def _check_positions(name: str, position_ids: Tensor | None, queries: int, spans: _Spans | None) -> None:
    """Position ids of a text must be consecutive: where they start again, another text begins."""
    if position_ids is None:
        return
    if position_ids.dim() != 2:
        raise ValueError(f"{name}: position_ids has {position_ids.dim()} dimensions and must have 2, [batch, length]")
    if queries == 1:
        return
    consecutive = position_ids.diff(dim=-1) == 1
    if spans is not None:  # padding may have any
        row = torch.arange(1, queries, device=position_ids.device)[None]
        consecutive = consecutive | (row <= spans[3][:, None]) | (row >= spans[2][:, None])
    require(
        consecutive.all(),
        f"{name}: position_ids jump within a row and must be consecutive: packed sequences are not available",
    )


def _position_offset(
    name: str, layer: LambdaLayer, position_ids: Tensor, query: Tensor, starts: Tensor | None
) -> Tensor:
    """What a token's position id exceeds its number by, [batch]; the first new token must follow the last one held."""
    new: Tensor | int = query.shape[2] if starts is None else query.shape[2] - starts
    last = position_ids[:, -1].expand(query.shape[0]) + 1
    if layer.get_seq_length() == 0:
        return last - new
    assert layer.store is not None
    held = layer.store.lengths
    offset = last - held - new
    if layer.position_offset is not None:
        require(
            ((offset == layer.position_offset) | (held == 0)).all(),
            f"{name}: position_ids do not go on where past_key_values ends and must be consecutive",
        )
    return offset


def _sliding_window(name: str, module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """The window that the layer was trained with, None for a full-attention layer."""
    config: Any = getattr(module, "config", None)
    types, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    kind = types[layer] if types is not None and layer is not None else None
    if kind not in (None, "full_attention", "sliding_attention"):
        raise ValueError(
            f"{name}: layer_type of layer {layer} is {kind} and must be full_attention or sliding_attention"
        )
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else getattr(module, "sliding_window", None)
    if kind == "sliding_attention" and window is None:
        window = config.sliding_window
    return window


def _refuse(name: str, module: nn.Module, kwargs: dict[str, Any]) -> None:
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(f"{name}: is_causal of {type(module).__name__} is False and must be True")
    for argument, what in _REFUSED.items():
        if kwargs.get(argument) is not None:
            raise ValueError(f"{name}: {argument} is given and must be None: {what} cannot be honoured")
    if kwargs.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        raise ValueError(f"{name}: output_attentions is True and must be False: the weights are never formed")


def _interleaved(options: _Options, module: nn.Module) -> bool:
    if options.interleaved is not None:
        return options.interleaved
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    if model_type not in INTERLEAVED:
        raise ValueError(
            f"{options.name}: model_type is {model_type} and must be one of {', '.join(INTERLEAVED)} for a distance "
            "limit; register with limit_distances=False, or say how the model rotates with interleaved="
        )
    return INTERLEAVED[model_type]
