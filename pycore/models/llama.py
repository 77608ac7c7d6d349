# SPDX-License-Identifier: Apache-2.0
"""A decoder of Llama's kind, read from the files of transformers and computed with pycore's ops.

Its logits are those of `pycore.integrations.transformers.same_bits` to the last bit, whatever a token is computed with.
Projections that read the same rows are one matrix: an output's sum does not depend on the outputs beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.cache import KVCache
from pycore.cache.staircase_cache import Staircase, StaircaseKVCache
from pycore.positions import rope_frequencies
from pycore.schedules import Tree

__all__ = ["Llama", "LlamaConfig", "LlamaState", "load_llama"]


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a `Llama`.

    Attributes:
        vocabulary, dim, hidden, layers, heads, kv_heads, head_dim: sizes; hidden is that of the feed-forward part.
        longest: tokens that it was trained to read.
        norm_eps: of the norms.
        theta: of the rotation.
        tied: whether the head is the embedding.
    """

    vocabulary: int
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    longest: int
    norm_eps: float
    theta: float
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """That of a config.json of transformers.

        Raises:
            ValueError: it is of another kind, or has what this class does not compute.
        """
        settings = dict(config.get("rope_parameters") or {})
        settings |= dict(config.get("rope_scaling") or {})
        found: dict[str, Any] = {
            "model_type": config.get("model_type"),
            "hidden_act": config.get("hidden_act", "silu"),
            "attention_bias": config.get("attention_bias", False),
            "mlp_bias": config.get("mlp_bias", False),
            "rope_type": settings.get("rope_type", settings.get("type", "default")),
        }
        wanted = {
            "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "rope_type": "default",
        }  # fmt: skip
        for name, value in wanted.items():
            if found[name] != value:
                raise ValueError(f"Llama: config has {name} {found[name]!r} and must have {value!r}")
        try:
            heads = config["num_attention_heads"]
            return cls(
                config["vocab_size"], config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"],
                heads, config.get("num_key_value_heads") or heads,
                config.get("head_dim") or config["hidden_size"] // heads, config["max_position_embeddings"],
                config["rms_norm_eps"], settings.get("rope_theta", config.get("rope_theta", 10000.0)),
                config.get("tie_word_embeddings", False),
            )  # fmt: skip
        except KeyError as error:
            raise ValueError(f"Llama: config has no {error.args[0]} and must have one") from error


class LlamaState:
    """What a `Llama` has read of the texts of a batch: the keys and values of each layer.

    Args:
        layers: how many there are.
        staircase: for a quantized cache, whose tokens are read with fewer bits the older they are.
        rollback: tokens that can be taken back; of an unquantized cache all can.
    """

    def __init__(self, layers: int, staircase: Staircase | None = None, rollback: int = 0) -> None:
        self.length = 0
        self.staircase = staircase
        self.stores: list[Any] = [KVCache() if staircase is None else None for _ in range(layers)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, tree: Tree | None) -> Tensor:
        """A layer's attention of new tokens, ``[batch, heads, n, head_dim]``, over all there are."""
        store = self.stores[layer]
        if self.staircase is None:
            more = {} if tree is None else {"tree": tree}
            out = store.append_and_attend(query, key, value, **more)
        else:
            if tree is not None:
                raise ValueError("LlamaState: tree is given and must be None with a staircase")
            if store is None:
                batch, heads, _, channels = key.shape
                store = self.stores[layer] = StaircaseKVCache(
                    self.staircase, batch=batch, kv_heads=heads, head_dim=channels, dtype=key.dtype
                )
            store.append(key, value)
            out = store.attend(query)
        assert isinstance(out, Tensor)
        return out

    def accept(self, path: Tensor, tokens: int) -> None:
        """Of the newest tokens keeps those at path, see `KVCache.accept`."""
        kept = len(path)
        straight = bool((path == torch.arange(kept)).all())
        for store in self.stores:
            if not straight:
                store.accept(path, tokens)
            elif kept < tokens:
                store.crop(tokens - kept)
        self.length += kept - tokens


class Llama(nn.Module):
    """Token ids to logits.

    Args:
        config: the sizes.
        weights: the tensors of a checkpoint of transformers, by name.
        dtype: of weights and activations.
    """

    def __init__(self, config: LlamaConfig, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        left = set(weights)

        def take(*names: str, shape: tuple[int, ...]) -> nn.Parameter:
            missing = [name for name in names if name not in weights]
            if missing:
                raise ValueError(f"Llama: weights has no {missing[0]} and must have one")
            left.difference_update(names)
            parts = [weights[name] for name in names]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            if whole.shape != shape:
                raise ValueError(
                    f"Llama: weights has {' and '.join(names)} of shape {list(whole.shape)} and must have {list(shape)}"
                )
            return nn.Parameter(whole.detach().to(dtype), requires_grad=False)

        width = config.heads * config.head_dim
        rows = width + 2 * config.kv_heads * config.head_dim
        self.embedding = take("model.embed_tokens.weight", shape=(config.vocabulary, config.dim))
        self.norm = take("model.norm.weight", shape=(config.dim,))
        self.blocks = nn.ModuleList()
        for at in range(config.layers):
            name, block = f"model.layers.{at}.", nn.Module()
            block.attention_norm = take(f"{name}input_layernorm.weight", shape=(config.dim,))
            own = [f"{name}self_attn.{part}_proj.weight" for part in "qkv"]
            block.query_key_value = take(*own, shape=(rows, config.dim))
            block.out = take(f"{name}self_attn.o_proj.weight", shape=(config.dim, width))
            block.mlp_norm = take(f"{name}post_attention_layernorm.weight", shape=(config.dim,))
            own = [f"{name}mlp.{part}_proj.weight" for part in ("gate", "up")]
            block.gate_up = take(*own, shape=(2 * config.hidden, config.dim))
            block.down = take(f"{name}mlp.down_proj.weight", shape=(config.dim, config.hidden))
            self.blocks.append(block)
        head = "lm_head.weight"
        if config.tied:
            left.discard(head)
        self.head = self.embedding if config.tied else take(head, shape=(config.vocabulary, config.dim))
        extra = sorted(name for name in left if not name.endswith("rotary_emb.inv_freq"))
        if extra:
            raise ValueError(f"Llama: weights has {extra[0]} and must have nothing that is not computed")
        frequencies = rope_frequencies(0, config.head_dim, config.theta, {"rope_type": "default"})
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, tokens: Tensor, state: LlamaState, tree: Tree | None = None) -> Tensor:
        """Logits of what follows each token, ``[batch, n, vocabulary]``.

        Args:
            tokens: int64 ``[batch, n]``, which follow what `state` has seen.
            state: of :meth:`state`.
            tree: the tokens are the nodes of a tree of drafts; `LlamaState.accept` then keeps a branch.
        """
        return ops.invariant_linear(self.states(tokens, state, tree), self.head)

    def states(self, tokens: Tensor, state: LlamaState, tree: Tree | None = None) -> Tensor:
        """What :meth:`forward` gives the head, ``[batch, n, dim]``."""
        config, (batch, count) = self.config, tokens.shape
        cos, sin = self._rotation(state.length, count, tree)
        x = functional.embedding(tokens, self.embedding)
        block: Any
        for layer, block in enumerate(self.blocks):
            mixed = ops.invariant_linear(ops.rms_norm(x, block.attention_norm, config.norm_eps), block.query_key_value)
            heads = mixed.view(batch, count, -1, config.head_dim).transpose(1, 2)
            query, key, value = heads.split([config.heads, config.kv_heads, config.kv_heads], 1)
            query, key = ops.rotate(query, cos, sin), ops.rotate(key, cos, sin)
            seen = state.attend(layer, query, key, value, tree)
            x = x + ops.invariant_linear(seen.transpose(1, 2).reshape(batch, count, -1), block.out)
            gate, up = ops.invariant_linear(ops.rms_norm(x, block.mlp_norm, config.norm_eps), block.gate_up).chunk(
                2, -1
            )
            x = x + ops.invariant_linear(ops.silu_mul(gate, up), block.down)
        state.length += count
        return ops.rms_norm(x, self.norm, config.norm_eps)

    def state(self, staircase: Staircase | None = None) -> LlamaState:
        """Nothing read yet."""
        return LlamaState(self.config.layers, staircase)

    def _rotation(self, length: int, count: int, tree: Tree | None) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each token's place in its text: in a tree, that of its branch."""
        place = list(range(count))
        if tree is not None:
            for node, parent in enumerate(tree.parents.tolist()):
                place[node] = 0 if parent < 0 else place[parent] + 1
        positions = torch.tensor([place]) + length
        frequencies: Any = self.frequencies
        return ops.rotary_tables(positions, frequencies, self.dtype == torch.float64)


def load_llama(folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Llama:
    """The model of a folder with transformers' config.json and model.safetensors.

    Raises:
        ValueError: the files hold something else.
        OSError: they cannot be read.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError("load_llama: it needs safetensors; pip install pycore-kernels[transformers]") from error
    config = json.loads((Path(folder) / "config.json").read_bytes())
    path = Path(folder) / "model.safetensors"
    try:
        weights = load_file(path)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"load_llama: {os.fspath(path)!r} must be a file of safetensors: {error}") from error
    return Llama(LlamaConfig.of(config), weights, dtype)
