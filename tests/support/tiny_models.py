# SPDX-License-Identifier: Apache-2.0
"""Small random transformers models, and dense Λ attention for them in plain torch, which tests compare with."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface  # noqa: E402

SINKS, WINDOW, SLIDING = 3, 8, 6  # of the registered attention, and of the sliding layers
VOCABULARY, PAD = 97, 1000  # no token is ever the padding token, which transformers would guess a mask from
# What a configuration needs so that a layer slides and another does not.
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": SLIDING},  # layers alternate
    "gemma3_text": {"sliding_window": SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"sliding_window": SLIDING},  # layers alternate
    "mistral": {"sliding_window": SLIDING},
    "ministral": {"sliding_window": SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"sliding_window": SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0], "layer_types": ["full_attention", "full_attention"]},
    "stablelm": {"use_qkv_bias": True},
}
# Tests that want one of every kind: grouped heads, biases, norms of heads, windows, softcap, sinks, part of a head
# rotated, pairs side by side, a layer without rotation.
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gpt_oss", "phi", "cohere", "glm",
         "smollm3")  # fmt: skip


def tiny(model_type: str, *, dtype: torch.dtype = torch.float32, layers: int = 2, **changes: Any) -> Any:
    """A model of two layers, four heads over two, in eval mode, the same at every call."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None, "initializer_range": 0.2,
    }  # fmt: skip
    if model_type in ("mixtral", "gpt_oss", "qwen2_moe", "qwen3_moe", "granitemoe", "glm4_moe"):
        sizes |= {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    try:
        config = AutoConfig.for_model(model_type, **(sizes | CHANGES.get(model_type, {}) | changes))
    except (ValueError, KeyError):
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if hasattr(model, "set_experts_implementation"):  # transformers 5; the others have no float64
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms of one would hide in which order norm and rotation come
                parameter.add_(0.3 * torch.randn(parameter.shape))
            if name.endswith("sinks"):
                parameter.copy_(torch.randn(parameter.shape))
    if dtype == torch.float64:
        return model.double()
    if dtype != torch.float32:  # as from_pretrained(dtype=...) does it: weights alone
        half = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
        half.load_state_dict(model.state_dict())
        return half
    return model


def tokens(batch: int, length: int) -> Tensor:
    """Token ids [batch, length]."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def use(model: Any, name: str) -> Any:
    """The model, with this attention."""
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name or not _takes(model):
        pytest.skip(f"transformers {transformers.__version__} keeps {type(model).__name__}'s own attention")
    return model


def _takes(model: Any) -> bool:
    file = sys.modules[type(model).__module__]
    return hasattr(file, "ALL_ATTENTION_FUNCTIONS")


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """[batch, length, vocabulary]."""
    return model(ids, **inputs).logits


# ---- the reference -------------------------------------------------------------------------------------------------


class _Rotation:
    """The rotation that a patched model was about to apply: its own function and tables."""

    function: Any
    cos: Tensor
    sin: Tensor
    channels: int

    @classmethod
    def by(cls, query: Tensor, distance: int) -> Tensor:
        """query, rotated by a distance; scaled as the model scales."""
        cos, sin = (x[:1, distance : distance + 1].to(query.dtype) for x in (cls.cos, cls.sin))
        rotated = cls.function(query[..., : cls.channels], query[..., : cls.channels], cos, sin)[0]
        return torch.cat([rotated, query[..., cls.channels :]], -1)


def _dense(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, sinks: int,
    window: int, limit: int | None, scaling: float, softcap: float | None = None, s_aux: Tensor | None = None,
    sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The formula, pair by pair: query and key un-rotated, no padding, no cache."""
    assert attention_mask is None
    length = query.shape[2]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    position = torch.arange(length)
    distance = position[:, None] - position[None]
    if sliding_window is not None:
        sinks, window, limit = 0, sliding_window, None
    keep = (distance >= 0) & ((distance < window) | (position[None] < sinks))
    if getattr(module, "use_rope", True):
        # Only the query is turned, by the distance, and the key keeps the tables' scaling.
        scaled = torch.cat(
            [key[..., : _Rotation.channels] * _Rotation.cos[0, 0, 0], key[..., _Rotation.channels :]], -1
        )
        limited = distance if limit is None else distance.clamp(max=limit)
        score = query.new_zeros(*query.shape[:3], length)
        for d in range(int(limited.max()) + 1):
            score = torch.where(limited == d, _Rotation.by(query, d) @ scaled.mT, score)
    else:
        score = query @ key.mT
    score = score * scaling
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~keep, -torch.inf)
    if s_aux is not None:
        sink = s_aux[None, :, None, None].expand(*query.shape[:3], 1)
        score = torch.cat([score, sink], -1)
    weight = score.softmax(-1)[..., :length]
    return (weight @ value).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def reference(model: Any, *, sinks: int = SINKS, window: int = WINDOW, limit: int | None = WINDOW) -> Iterator[Any]:
    """Inside, the model computes dense Λ attention, of the queries and keys it has not rotated yet."""
    file = sys.modules[type(model).__module__]
    _Rotation.function = file.apply_rotary_pos_emb

    def not_yet(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        _Rotation.cos, _Rotation.sin, _Rotation.channels = cos, sin, q.shape[-1]
        return q, k

    AttentionInterface.register("dense_reference", functools.partial(_dense, sinks=sinks, window=window, limit=limit))
    AttentionMaskInterface.register("dense_reference", lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    use(model, "dense_reference")
    file.apply_rotary_pos_emb = not_yet
    try:
        yield model
    finally:
        file.apply_rotary_pos_emb = _Rotation.function
        model.set_attn_implementation(before)
