# SPDX-License-Identifier: Apache-2.0
"""The attention function that transformers' models call, layer after layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycore.integrations.transformers._cache import MARK, LambdaLayer, StoreLayer, TokensLayer
from pycore.integrations.transformers._mask import Spans, read_spans, require
from pycore.integrations.transformers._positions import check_positions, position_offset
from pycore.integrations.transformers._rope import INTERLEAVED, Rope, attribute, by_op, rope_of, unrotate
from pycore.integrations.transformers._rounds import draw_round, take_back_round
from pycore.integrations.transformers._staircase import StaircaseLayer
from pycore.integrations.transformers._step import Step
from pycore.ops.attention_call import AttentionOptions, call_attention
from pycore.ops.attention_middle import with_middle
from pycore.schedules import Causal, Lambda, Probabilistic, Schedule, Segments

# What a model may hand to its attention that changes the result, and that is not available.
_REFUSED = {
    "position_bias": "a bias of its own", "head_mask": "a mask of heads", "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences", "cu_seqlens": "packed sequences", "seq_idx": "packed sequences",
    "cache": "a paged cache", "indices": "a choice of keys", "block_indices": "a choice of keys",
    "sinks": "sinks of another kind",
}  # fmt: skip
_READ = {"is_causal", "output_attentions", *_REFUSED}  # all that is looked at of what a model hands on


@dataclasses.dataclass(frozen=True)
class Options:
    """What was registered under a name; distance_limit None takes inputs as they come, window_size None all of them."""

    name: str
    sink_size: int
    window_size: int | None = 1
    distance_limit: int | None = None
    interleaved: bool | None = None
    draw: Probabilistic | None = None  # in place of sinks and window; its round is not used
    middle_topk: int = 0  # keys between sinks and window that a single query reads too


class _Call(NamedTuple):
    """One layer's call, besides query, key and value."""

    name: str
    sink_size: int
    window_size: int | None
    schedule: Schedule
    position_ids: Tensor | None  # [batch or 1, queries]
    spans: Spans | None
    rope: Rope | None  # None: nothing is un-rotated
    options: AttentionOptions
    evicted: int = 0  # tokens before the first key, of a cache that keeps a sliding window
    middle_topk: int = 0


def attention_function(registered: Options) -> Callable[..., tuple[Tensor, None]]:
    """The attention function to register."""

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
        evicted: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As transformers calls it: query [B, H, Lq, D], key and value [B, Hkv, Lk, D] -> [B, Lq, H, D]."""
        name = registered.name
        layer: StoreLayer | None = getattr(key, MARK, None)
        said: tuple[Any, ...] | None = None  # of a step that may be like the one before it
        if layer is not None:  # first, so that a refused call leaves nothing waiting
            key, value = layer.take(name)
            if (
                attention_mask is None and s_aux is None and not dropout and not evicted
                and query.shape[2] == 1 and isinstance(layer, TokensLayer) and not torch.compiler.is_compiling()
            ):  # fmt: skip
                own = module.__dict__
                said = (scaling, softcap, own.get("is_causal"), own.get("sliding_window"),
                        kwargs.get("sliding_window"), *kwargs)  # fmt: skip
                if layer.step is not None:
                    out = layer.step.again(registered, module, said, layer, query, key, value, position_ids)
                    if out is not None:
                        return out, None
        _refuse(name, module, kwargs)
        window = _sliding_window(name, module, kwargs)
        sink_size, window_size = (registered.sink_size, registered.window_size) if window is None else (0, window)
        schedule: Schedule = Causal() if window_size is None else Lambda(sink_size, window_size)
        draw, counted = registered.draw if window is None else None, False
        if registered.draw is not None and layer is not None:
            raise ValueError(
                f"{name}: past_key_values is a {layer.cache_name} and must be a cache of transformers' own"
            )
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        sinks = None if s_aux is None else s_aux.to(wide)
        rope, tables, interleaved, limit = None, None, False, None
        if window is None and registered.distance_limit is not None:
            rope = rope_of(name, module, query, registered.distance_limit)
            interleaved = _interleaved(registered, module, rope)
        if rope is not None:
            tables, limit = rope.tables, registered.distance_limit
            if position_ids is None:
                raise ValueError(
                    f"{name}: position_ids is None and must be handed on by {type(module).__name__} for a distance "
                    "limit; register with limit_distances=False"
                )
        spans = read_spans(name, attention_mask, query.shape[0], query.shape[2])
        if spans is None or spans.boundaries is None:
            spans = check_positions(name, position_ids, query, key, spans, layer is not None)
        boundaries = None if spans is None else spans.boundaries
        if spans is not None and boundaries is not None:
            if layer is not None or draw is not None:
                what = "probabilistic attention" if layer is None else f"a {layer.cache_name}"
                message = (
                    f"{name}: position_ids jump within a row and must be consecutive: packed sequences are not "
                    f"available with {what}"
                )
                if not torch.compiler.is_compiling():
                    raise ValueError(message)
                # Compiled code looks for texts wherever there may be several.
                require((boundaries[:, 1:] == query.shape[2]).all(), message)
                spans = spans._replace(boundaries=None)
            else:
                schedule = Segments(boundaries, True, window_size, sink_size)
        if draw is not None:
            schedule, counted = draw_round(draw, module, query.device)
        options = AttentionOptions(
            tables, interleaved, limit, sink_logits=sinks, softcap=softcap or 0.0, dropout_p=dropout, scale=scaling
        )
        topk = registered.middle_topk if rope is not None and query.shape[2] == 1 else 0
        call = _Call(name, sink_size, window_size, schedule, position_ids, spans, rope, options, evicted, topk)
        if layer is None:
            try:
                out = _attend(call, query, key, value)
            except Exception:
                if counted:
                    take_back_round(module)
                raise
        elif isinstance(layer, StaircaseLayer):
            out = _attend_staircase(call, layer, query, key, value)
        else:
            assert isinstance(layer, TokensLayer)
            if isinstance(layer, LambdaLayer):
                _check_sizes(registered, layer)
            out = _attend_cached(call, layer, query, key, value).transpose(1, 2).contiguous()
            by_hand = rope is not None and not by_op(query, interleaved)
            repeats = said is not None and not by_hand and not _READ & kwargs.keys() and "config" in module.__dict__
            layer.step = Step(registered, module, said, rope, out) if repeats and said is not None else None
            return out, None
        return out.transpose(1, 2).contiguous(), None

    return attention


def _check_sizes(registered: Options, layer: LambdaLayer) -> None:
    for size, given, wanted in (
        ("sink_size", layer.sink_size, registered.sink_size),
        ("window_size", layer.window_size, registered.window_size),
    ):
        if given != wanted:
            raise ValueError(
                f"{registered.name}: past_key_values has {size} {given} and must have the registered {wanted}"
            )


def _attend(call: _Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention over keys as transformers' own caches give them, or without a cache."""
    options = call.options
    if call.spans is not None:
        starts, ends, queries, _, _ = call.spans
        options = options._replace(key_starts=starts, key_lengths=ends, query_lengths=queries)
    if call.evicted:  # so that sums are cut where they are cut over all keys
        options = options._replace(key_offset=_evicted(call, key))
    if call.rope is not None:
        assert call.position_ids is not None
        evicted = 0
        if call.spans is None and not call.middle_topk:
            key, value, evicted = _without_middle(call, query.shape[2], key, value)
        if evicted:
            offset = torch.full((key.shape[0],), evicted, dtype=torch.int64, device=key.device)
            options = options._replace(key_offset=offset)
        key_position = _key_positions(call, query, key, evicted)
        paired = call.options.interleaved
        query = unrotate(query, call.rope.turned_by(call.position_ids, query.dtype), paired)
        key = unrotate(key, call.rope.turned_by(key_position, key.dtype), paired)
    if call.middle_topk:
        assert isinstance(call.schedule, Lambda)
        out = with_middle(call.name, query, key, value, call.schedule, options, call.middle_topk)
    else:
        out = call_attention("attention", query, key, value, call.schedule, options)
    assert isinstance(out, Tensor)
    return out


def _evicted(call: _Call, key: Tensor) -> Tensor:
    """How many tokens of each row a sliding window has left behind, int64 [B]; padding on the left is none.

    Where the window holds no padding any more there are no spans, and the position ids alone know a row's padding.
    """
    most = torch.full((key.shape[0],), call.evicted, dtype=torch.int64, device=key.device)
    spans = call.spans
    if call.position_ids is None:
        return most if spans is None else torch.where(spans.key_starts > 0, 0, most)
    held = key.shape[2] if spans is None else spans.key_lengths - spans.key_starts
    tokens = (call.position_ids[:, -1] + 1).expand(key.shape[0])
    return (tokens - held).clamp(min=0).minimum(most)


def _attend_cached(call: _Call, layer: TokensLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Appends new tokens to a layer of a LambdaCache or a KVCache and attends to what it holds."""
    name = call.name
    if call.options.dropout_p:
        raise ValueError(f"{name}: dropout is {call.options.dropout_p} and must be 0 with a {layer.cache_name}")
    if call.middle_topk:
        raise ValueError(
            f"{name}: middle_topk is {call.middle_topk} and must be 0 with a {layer.cache_name}, which "
            + ("forgets the middle" if isinstance(layer, LambdaLayer) else "does not choose tokens")
        )
    store = layer.open_store(name, call.sink_size, call.window_size, call.rope is not None)
    starts = _new_starts(call, query)
    offset, next_ids, rotated = layer.position_offset, None, None
    if call.rope is not None:
        assert call.position_ids is not None
        offset, next_ids = position_offset(name, layer, call.position_ids, query, starts)
        paired = call.options.interleaved
        rotated = call.rope.turned_by(call.position_ids, query.dtype)
        if not by_op(query, paired):
            query, key, rotated = unrotate(query, rotated, paired), unrotate(key, rotated, paired), None
    out = store.append_and_attend(query, key, value, starts=starts, rotated=rotated, **call.options.for_cache())
    layer.count(key.shape[2], offset, next_ids)
    assert isinstance(out, Tensor)
    return out


def _attend_staircase(call: _Call, layer: StaircaseLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Appends new tokens to a layer of a StaircaseCache and attends to what it holds, packed."""
    options = call.options
    if options.dropout_p:
        raise ValueError(f"{call.name}: dropout is {options.dropout_p} and must be 0 with a StaircaseCache")
    assert call.rope is None  # under a distance limit the cache gives unpacked tokens
    starts = _new_starts(call, query)
    if not layer.takes_back(key, starts):
        # Refuses before tokens are taken; a step, of which this would be a good part, takes its token back.
        call_attention("attention", query[:, :, :0], key[:, :, :0], value[:, :, :0], call.schedule, options)
    return layer.append_and_attend(
        query, key, value, starts=starts, schedule=call.schedule, scale=options.scale,
        softcap=options.softcap, sink_logits=options.sink_logits,
    )  # fmt: skip


def _new_starts(call: _Call, query: Tensor) -> Tensor | None:
    """How many of the new tokens are padding, int64 [batch]; None for none."""
    if call.spans is None:
        return None
    all_new = (call.spans.query_lengths == query.shape[2]).all()
    require(all_new, f"{call.name}: attention_mask has padding on the right and must have it on the left")
    starts = call.spans.new_starts
    if starts.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(starts.any()):
        return None
    return starts


def _without_middle(call: _Call, queries: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Leaves out, and counts, the rows that no query keeps, where they are most: no step has to un-rotate them."""
    assert call.window_size is not None
    recent = call.window_size + queries - 1
    evicted = key.shape[2] - call.sink_size - recent
    if evicted <= call.sink_size + recent:
        return key, value, 0
    key, value = (torch.cat([x[:, :, : call.sink_size], x[:, :, -recent:]], 2) for x in (key, value))
    return key, value, evicted


def _key_positions(call: _Call, query: Tensor, key: Tensor, evicted: int) -> Tensor:
    """The position ids of the keys' rows, [B or 1, L], `evicted` rows missing between the sinks and the rest.

    They are counted back from the last query, since only the queries' are known and a text's are consecutive.
    """
    assert call.position_ids is not None
    row = torch.arange(key.shape[2], device=key.device)[None]
    if call.spans is not None and call.spans.boundaries is not None:  # all keys are new, but what a cache has too many
        return torch.nn.functional.pad(call.position_ids, (0, key.shape[2] - query.shape[2]))
    if call.spans is not None:
        last_query = (call.spans.query_lengths - 1).clamp(min=0)[:, None]
        last = call.position_ids.expand(query.shape[0], -1).gather(1, last_query)
        return row + (last - (call.spans.key_lengths - 1)[:, None])
    position = row + (call.position_ids[:, -1:] - (key.shape[2] - 1))
    return position - evicted * (row < call.sink_size)


def _sliding_window(name: str, module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """The window that the layer was trained with, None for a full-attention layer."""
    config: Any = attribute(module, "config")
    types, layer = attribute(config, "layer_types"), attribute(module, "layer_idx")
    kind = types[layer] if types is not None and layer is not None else None
    if kind not in (None, "full_attention", "sliding_attention"):
        raise ValueError(
            f"{name}: layer_type of layer {layer} is {kind} and must be full_attention or sliding_attention"
        )
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else attribute(module, "sliding_window")
    if kind == "sliding_attention" and window is None:
        window = config.sliding_window
    return window


def _refuse(name: str, module: nn.Module, kwargs: dict[str, Any]) -> None:
    causal = kwargs.get("is_causal")
    if not (attribute(module, "is_causal", True) if causal is None else causal):
        raise ValueError(f"{name}: is_causal of {type(module).__name__} is False and must be True")
    for argument in _REFUSED.keys() & kwargs.keys():
        if kwargs[argument] is not None:
            raise ValueError(f"{name}: {argument} is given and must be None: {_REFUSED[argument]} cannot be honoured")
    config: Any = attribute(module, "config")
    own = getattr(config, "__dict__", {})  # where the property reads it
    asked = own["_output_attentions"] if "_output_attentions" in own else getattr(config, "output_attentions", False)
    if kwargs.get("output_attentions") or asked:
        raise ValueError(f"{name}: output_attentions is True and must be False: the weights are never formed")


def _interleaved(registered: Options, module: nn.Module, rope: Rope | None) -> bool:
    if registered.interleaved is not None:
        return registered.interleaved
    if rope is not None and rope.interleaved is not None:
        return rope.interleaved
    model_type = attribute(attribute(module, "config"), "model_type")
    if model_type not in INTERLEAVED:
        raise ValueError(
            f"{registered.name}: model_type is {model_type} and must be one of {', '.join(INTERLEAVED)} for a distance "
            "limit; register with limit_distances=False, or say how the model rotates with interleaved="
        )
    return INTERLEAVED[model_type]
