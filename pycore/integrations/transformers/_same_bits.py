# SPDX-License-Identifier: Apache-2.0
"""Models of transformers whose logits have the same bits whatever a token is computed with.

Modules change their class, to one that derives from theirs and has another `forward`; parameters, buffers and names
stay. What is left to torch between them rounds one way only: looking up embeddings, additions, products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from pycore._checks import check_bool
from pycore.integrations.transformers._register import register, registered
from pycore.integrations.transformers._rope import FREQUENCIES
from pycore.ops import gelu_mul, invariant_linear, invariant_linears, rms_norm, rotary_tables, rotate, silu_mul, softcap
from pycore.positions import rope_frequencies

__all__ = ["same_bits"]

_FAMILIES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3")
_NAME = "pycore_same_bits"  # of causal attention over all tokens
_STATE = "_pycore_same_bits"  # of a model: the attention it had
_GATE = "_pycore_gate"  # of an MLP: its function
_GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": silu_mul,
    "gelu": gelu_mul,
    "gelu_tanh": functools.partial(gelu_mul, approximate="tanh"),
}
# Classes of transformers' activations, in all its versions.
_ACTIVATIONS = {
    "SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh", "FastGELUActivation": "gelu_tanh",
}  # fmt: skip


def same_bits(model: nn.Module, undo: bool = False) -> nn.Module:
    """Gives a model of transformers logits that are bitwise the same whatever a token is computed with.

    In one pass, in chunks and token by token, with any cache (`DynamicCache`, `KVCache`, `LambdaCache`,
    `StaircaseCache` with prefill="staircase"), alone or in a batch with padding on the left and position ids that leave
    it out, on any number of threads, compiled or not, on AVX2 and AVX-512. Linear layers, norms, activations, rotation
    and the softcap of logits become those of `pycore.ops`, attention one of this library's: the registered one in use,
    or else causal attention. docs/same_bits.md says in which order everything is added.

    The model is changed in place. Its parameters, buffers and state dict stay as they are, so it can be saved, copied,
    cast and trained. Against the model as it was, logits differ by rounding: in 16 bits a norm or activation rounds
    once in place of twice, and rotation takes exact angles.

    Args:
        model: gemma, gemma2, gemma3_text, llama, mistral, qwen2, qwen3 or smollm3 by `config.model_type`, on the CPU,
            with any head or none. One that has the same bits already is left alone.
        undo: gives the model its own modules and attention back.

    Returns:
        model.

    Raises:
        ValueError: a model of another kind, or with a layer, activation or rotary embedding that has no counterpart;
            undo of what was not done.
        TypeError: model is no module, or undo no bool.

    Example:
        >>> model = same_bits(AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"same_bits: model is a {type(model).__name__} and must be a model of transformers")
    check_bool("same_bits", "undo", undo)
    given: Any = model
    if undo:
        return _undone(given)
    if hasattr(model, _STATE):
        return model
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in _FAMILIES or not hasattr(model, "set_attn_implementation"):
        raise ValueError(
            f"same_bits: model is a {type(model).__name__}, whose model_type is {kind}, and must be one of "
            f"{', '.join(_FAMILIES)}"
        )
    # All is looked at before anything changes.
    changes = [(module, change) for path, module in model.named_modules() if (change := _change(path, module, kind))]
    before = config._attn_implementation
    if registered(before) is None:
        register(_NAME, window_size=None)
        given.set_attn_implementation(_NAME)
    for module, (mixin, attributes) in changes:
        for name, value in attributes.items():
            setattr(module, name, value)
        module.__class__ = _derived(type(module), mixin)  # type: ignore[arg-type]
    setattr(model, _STATE, before)
    return model


def _undone(model: Any) -> nn.Module:
    if not hasattr(model, _STATE):
        raise ValueError(f"same_bits: model is a {type(model).__name__} without the same bits, and undo must follow do")
    for module in model.modules():
        if isinstance(module, _Derived):
            for name in (FREQUENCIES, _GATE):
                module.__dict__.pop(name, None)
            module.__class__ = type(module)._pycore_base
    if model.config._attn_implementation != getattr(model, _STATE):
        model.set_attn_implementation(getattr(model, _STATE))
    delattr(model, _STATE)
    result: nn.Module = model
    return result


# ---- modules ---------------------------------------------------------------------------------------------------------


class _Derived:
    """What classes with another forward have in common."""

    _pycore_base: type

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """What is made by a module's own class, as `type(model).from_pretrained` does, is a plain one."""
        return cls._pycore_base(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes are made as they are needed, so that a copy asks for its own."""
        return _remade, (self._pycore_base, type(self).__mro__[1]), self.__dict__


def _remade(base: type, mixin: type) -> Any:
    made: Any = _derived(base, mixin)
    return made.__new__(made)


@functools.cache
def _derived(base: type, mixin: type) -> type:
    """A subclass of base with the forward of mixin; its name and module stay, which transformers looks at."""
    return type(base.__name__, (mixin, base), {"__module__": base.__module__, "_pycore_base": base})


class _Linear(_Derived):
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return invariant_linear(x, self.weight, self.bias)


_FEW = 6  # rows, up to which a layer takes as long as its weight is read, and its call
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_everywhere = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]


def _side_by_side(x: Tensor, module: nn.Module, names: tuple[str, ...]) -> Tensor | None:
    """What linear layers of a module make of x in a decoding step, in one call.

    None where there is more to do than that: many rows, gradients, a graph, or a layer that must be called itself
    because it is of another kind, is compiled, or has hooks, a forward, a weight or a bias made its own way.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or any(_everywhere):
        return None
    if x.numel() > _FEW * x.shape[-1]:  # in a graph this would be a guard
        return None
    layers = module._modules
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for name in names:
        layer = layers.get(name)
        if not isinstance(layer, _Linear) or type(layer).forward is not _Linear.forward:
            return None
        own = layer.__dict__
        if "forward" in own or own.get("_compiled_call_impl") is not None or any(map(own.__getitem__, _HOOKS)):
            return None
        parameters = own["_parameters"]  # where a module's own look-up ends, after a good part of this call's time
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if weight is None or "bias" not in parameters:
            return None
        weights.append(weight)
        if bias is not None:
            biases.append(bias)
    return None if biases and len(biases) < len(weights) else invariant_linears(x, weights, biases or None)


class _Norm(_Derived):
    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.variance_epsilon)


class _NormPlusOne(_Derived):
    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, True)


class _Mlp(_Derived):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    _pycore_gate: str

    def forward(self, x: Tensor) -> Tensor:
        both = _side_by_side(x, self, ("gate_proj", "up_proj"))  # type: ignore[arg-type]
        gate, up = (self.gate_proj(x), self.up_proj(x)) if both is None else both.chunk(2, -1)
        out: Tensor = self.down_proj(_GATES[self._pycore_gate](gate, up))
        return out


class _Rotary(_Derived):
    _pycore_frequencies: dict[str | None, Tensor]

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """[batch or 1, length, pairs], float32: half of what transformers makes, and not rounded to x's dtype."""
        cos, sin = rotary_tables(position_ids, self._pycore_frequencies[layer_type], x.dtype == torch.float64)
        scaling = getattr(self, "attention_scaling" if layer_type is None else f"{layer_type}_attention_scaling")
        return (cos, sin) if scaling == 1 else (cos * scaling, sin * scaling)


class _Attention(_Derived):
    """The attention of all families, with the projections that each has."""

    config: Any
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    scaling: float
    layer_idx: int
    attention_dropout: float
    training: bool

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        implementation = self.config._attn_implementation
        function = registered(implementation)
        if function is None:
            raise ValueError(
                f"same_bits: config has attn_implementation {implementation!r} and must have one registered by "
                "pycore.integrations.transformers"
            )
        query, key, value = self._heads(hidden_states, position_embeddings)
        options = self._options()
        if past_key_values is not None:
            extra = () if cache_position is None else ({"cache_position": cache_position},)
            key, value = past_key_values.update(key, value, self.layer_idx, *extra)
            layers = getattr(past_key_values, "layers", ())
            if self.layer_idx < len(layers) and isinstance(layers[self.layer_idx], DynamicSlidingWindowLayer):
                options["evicted"] = layers[self.layer_idx].get_seq_length() - key.shape[2]
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = function(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **options, **kwargs
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights

    def _heads(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, [batch, heads, length, head_dim], normalised and turned as the family does."""
        shape, rotates = (*x.shape[:-1], -1, self.head_dim), getattr(self, "use_rope", True)
        normalises = hasattr(self, "q_norm")
        all_heads = _side_by_side(x, self, ("q_proj", "k_proj", "v_proj"))  # type: ignore[arg-type]
        if all_heads is None:
            query, key, value = (y(x).view(shape) for y in (self.q_proj, self.k_proj, self.v_proj))
        else:
            heads = all_heads.view(shape)
            keys = self.k_proj.weight.shape[0] // self.head_dim  # type: ignore[index, operator]
            first = heads.shape[-2] - 2 * keys
            if rotates and not normalises:  # query and key in one call
                assert angles is not None
                heads = heads.transpose(1, 2)
                turned = rotate(heads[:, :-keys], *angles)
                return turned[:, :first], turned[:, first:], heads[:, -keys:]
            query, key, value = heads.split([first, keys, keys], -2)
        if normalises:
            query, key = self.q_norm(query), self.k_norm(key)  # type: ignore[attr-defined]
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if rotates:
            assert angles is not None
            query, key = rotate(query, *angles), rotate(key, *angles)
        return query, key, value

    def _options(self) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window} if hasattr(self, "sliding_window") else {}


class _MistralAttention(_Attention):
    def _options(self) -> dict[str, Any]:
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


class _Gemma2Attention(_Attention):
    attn_logit_softcapping: float | None

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"softcap": self.attn_logit_softcapping}


class _CappedLogits(_Derived):
    """A causal language model whose head caps its logits."""

    config: Any
    model: nn.Module
    lm_head: nn.Module
    vocab_size: int
    loss_function: Callable[..., Tensor]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        logits = softcap(logits, self.config.final_logit_softcapping)
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )  # fmt: skip


# ---- what becomes what -----------------------------------------------------------------------------------------------

_Change = tuple[type, dict[str, Any]]


def _change(path: str, module: nn.Module, kind: str) -> _Change | None:
    """The class that gives a module its forward, and attributes that it needs; None for one that is left alone."""
    name = type(module).__name__
    if type(module) is nn.Linear:
        return _Linear, {}
    if name.endswith("RMSNorm"):
        return (_NormPlusOne if kind.startswith("gemma") else _Norm), {}
    if name.endswith("MLP"):
        act: Any = module.act_fn
        function = type(act).__name__
        if isinstance(act, nn.GELU):
            function = "GELUTanh" if act.approximate == "tanh" else "GELUActivation"
        if function not in _ACTIVATIONS:
            raise ValueError(f"same_bits: {path}.act_fn is {function} and must be SiLU or GELU")
        return _Mlp, {_GATE: _ACTIVATIONS[function]}
    if name.endswith("RotaryEmbedding"):
        return _Rotary, {FREQUENCIES: _frequencies(path, module)}
    if name.endswith("Attention"):
        return {"mistral": _MistralAttention, "gemma2": _Gemma2Attention}.get(kind, _Attention), {}
    if name.endswith("ForCausalLM") and getattr(module.config, "final_logit_softcapping", None) is not None:
        return _CappedLogits, {}
    if not isinstance(module, nn.Embedding) and any(True for _ in module.parameters(recurse=False)):
        raise ValueError(f"same_bits: {path} is a {name} and must be a layer that {kind} has by itself")
    return None


def _frequencies(path: str, rotary: Any) -> dict[str | None, Tensor]:
    """Radians a token by pair, for each kind of layer that has its own, None where all have one."""
    config = rotary.config
    types: list[str | None] = [None] if hasattr(rotary, "inv_freq") else list(rotary.layer_types)
    found: dict[str | None, Tensor] = {}
    for layer_type in types:
        given = getattr(rotary, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq", None)
        if given is None:
            continue
        settings: Any = getattr(config, "rope_parameters", None)
        if settings is None:  # transformers 4
            settings = {"rope_theta": config.rope_theta} | (getattr(config, "rope_scaling", None) or {})
        elif layer_type is not None:
            settings = settings[layer_type]
        settings = {"original_max_position_embeddings": config.max_position_embeddings} | dict(settings)
        rope_type = settings.get("rope_type", settings.get("type", "default"))
        if rope_type not in ("default", "linear", "llama3", "yarn"):
            raise ValueError(
                f"same_bits: {path} has rope_type {rope_type}, whose frequencies change with the length, and must have "
                "default, linear, llama3 or yarn"
            )
        made = rope_frequencies(0, 2 * given.shape[0], 10000.0, settings)
        if not torch.allclose(made, given.double(), rtol=1e-2 if given.dtype == torch.bfloat16 else 1e-4, atol=0):
            raise ValueError(f"same_bits: {path} has frequencies of its own and must have those of its config")
        found[layer_type] = made
    return found
