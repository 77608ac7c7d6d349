# SPDX-License-Identifier: Apache-2.0
"""The two models of kv_staircase.py, each reading a text on caches that differ only in how they keep old tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import UserError
from kv_staircase_peers import Kept, quantized_caches
from length_extrapolation import Training, trained_model
from torch import Tensor

from pycore import Staircase, StaircaseKVCache
from pycore.models.bytelm import Bytelm, tokens_from_bytes

NAME, CHUNK, PROBES = "kv_staircase", 256, 16

Ladders = Sequence[Staircase]  # of each layer


class Captured(NamedTuple):
    """What one layer's attention saw of the whole text: keys and values after RoPE, and its newest queries."""

    query: Tensor  # [batch, heads, PROBES, head_dim]
    key: Tensor
    value: Tensor


@dataclass
class Reading:
    """What a model makes of a text: its first part is read on a full cache, and then each cache goes on from there."""

    scored: Tensor  # int64 [tokens]: the targets of the second part, all rows one after another
    tokens: int  # of a row
    prefix: int
    learn: list[Captured]  # another text's, for rotations
    held: list[Captured]
    log_probs: Callable[[Ladders | None], Tensor]  # [tokens, vocabulary] of the second part; None: a full cache
    others: dict[str, Callable[[], Kept]] = field(default_factory=dict)  # caches of others, by name

    def kept(self, ladders: Ladders | None) -> Kept:
        """What comes of a staircase for each layer, or of the full cache."""
        if ladders is None:
            return Kept(self.log_probs(None), sum(2 * layer.key.nbytes for layer in self.held), 0.0)
        return Kept(self.log_probs(ladders), self.nbytes(ladders), self.attention_error(ladders))

    def nbytes(self, ladders: Ladders) -> int:
        """Bytes of the caches with the whole text in them, and no room for more."""
        return sum(self._filled(layer, stairs).nbytes for layer, stairs in zip(self.held, ladders, strict=True))

    def attention_error(self, ladders: Ladders) -> float:
        """Relative error of the newest queries' attention outputs: the root of the mean of the layers' squares."""
        squares = []
        for layer, stairs in zip(self.held, ladders, strict=True):
            got, exact = (
                self._filled(layer, each).attend(layer.query) for each in (stairs, Staircase((16,), rollback=64))
            )
            assert isinstance(got, Tensor) and isinstance(exact, Tensor)
            squares.append(float((got.double() - exact.double()).square().sum() / exact.double().square().sum()))
        return (sum(squares) / len(squares)) ** 0.5

    def _filled(self, layer: Captured, stairs: Staircase) -> StaircaseKVCache:
        batch, heads, tokens, width = layer.key.shape
        cache = StaircaseKVCache(
            stairs, batch=batch, kv_heads=heads, head_dim=width, capacity=tokens, dtype=layer.key.dtype
        )
        cache.append(layer.key[:, :, :-PROBES], layer.value[:, :, :-PROBES])
        cache.append(layer.key[:, :, -PROBES:], layer.value[:, :, -PROBES:])
        return cache


# ---- a model of transformers ----------------------------------------------------------------------------------------


def loaded(folder: Path | None) -> tuple[Any, Callable[[bytes], list[int]]]:
    """The model in bfloat16 and what makes tokens of bytes; without a folder, a random one."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError("it needs transformers; pip install pycore-kernels[transformers]") from error
    if folder is None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2,
        )  # fmt: skip
        return LlamaForCausalLM(config).bfloat16().eval(), lambda text: list(text)
    if not folder.is_dir():
        raise UserError(f"--model is {folder} and must be a folder with a model and its tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder} is not a causal model and its tokenizer: {error}".split("\n")[0]) from error
    return model, lambda text: tokenizer(text.decode("utf-8", "replace"), verbose=False)["input_ids"]


def transformers_reading(folder: Path | None, text: bytes, train: bytes, tokens: int, prefix: int) -> Reading:
    """One row of text. `train` is what rotations are learned from."""
    model, tokenize = loaded(folder)
    from pycore.integrations.transformers import StaircaseCache, register

    register(NAME, window_size=None)
    model.set_attn_implementation(NAME)
    rows = []
    for data, count in ((text, tokens + 1), (train, 4 * CHUNK)):
        ids = tokenize(data[: 16 * count])[:count]
        if len(ids) < count:
            raise UserError(f"--tokens is {tokens} and must be less than {len(ids)}, what the text has")
        rows.append(torch.tensor([ids]))
    ids, learn = rows
    from transformers import DynamicCache

    def filled(row: Tensor) -> tuple[Any, list[Tensor]]:
        """A full cache of a row, and each layer's newest queries."""
        cache: Any = DynamicCache(config=model.config)
        with torch.no_grad(), _Queries(model) as queries:
            for at in range(0, row.shape[1], CHUNK):
                queries.seen.clear()
                model(row[:, at : at + CHUNK], past_key_values=cache, logits_to_keep=1)
        return cache, queries.seen

    def captured(row: Tensor) -> list[Captured]:
        cache, queries = filled(row)
        layers = zip(queries, cache.layers, strict=True)
        return [Captured(query[:, :, -PROBES:], layer.keys, layer.values) for query, layer in layers]

    held = captured(ids[:, :tokens])

    @torch.no_grad()
    def log_probs(ladders: Ladders | None) -> Tensor:
        cache: Any = (
            DynamicCache(config=model.config)
            if ladders is None
            else StaircaseCache(model.config, list(ladders), capacity=tokens)
        )
        model.set_attn_implementation("sdpa")  # so that the cache takes tokens by themselves
        for i, layer in enumerate(held):
            cache.update(layer.key[:, :, :prefix], layer.value[:, :, :prefix], i)
        model.set_attn_implementation(NAME)
        parts = [
            torch.log_softmax(model(ids[:, at : min(at + CHUNK, tokens)], past_key_values=cache).logits[0].float(), -1)
            for at in range(prefix, tokens, CHUNK)
        ]
        return torch.cat(parts)

    others = quantized_caches(model, ids, held, prefix)
    return Reading(ids[0, prefix + 1 :], tokens, prefix, captured(learn), held, log_probs, others)


class _Queries:
    """Keeps the queries that each layer's attention is called with, after RoPE."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen = model, []  # type: ignore[var-annotated]

    def __enter__(self) -> _Queries:
        from transformers import AttentionInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def keeping(module: Any, query: Tensor, *args: Any, **options: Any) -> Any:
            self.seen.append(query.detach())
            return attend(module, query, *args, **options)

        AttentionInterface.register(f"{NAME}_queries", keeping)
        from transformers import AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        AttentionMaskInterface.register(f"{NAME}_queries", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        self.model.set_attn_implementation(f"{NAME}_queries")
        return self

    def __exit__(self, *error: object) -> None:
        self.model.set_attn_implementation(NAME)


# ---- the byte model -------------------------------------------------------------------------------------------------


class _Layer:
    """A layer's cache for bytelm, which hands over keys that are not rotated."""

    def __init__(self, model: Bytelm, stairs: Staircase | None, tokens: int) -> None:
        config = model.config
        self.tables = (model.positions.rope_cos, model.positions.rope_sin)
        self.captured: Captured | None = None
        self.held: StaircaseKVCache | None = None
        self.stairs, self.tokens, self.heads, self.width = stairs, tokens, config.kv_heads, config.head_dim
        self.keys: list[Captured] = []

    def append_and_attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if self.held is None:
            stairs = Staircase((16,)) if self.stairs is None else self.stairs
            self.held = StaircaseKVCache(
                stairs, batch=key.shape[0], kv_heads=self.heads, head_dim=self.width, capacity=self.tokens
            )
        at = int(self.held.lengths[0])
        query, key = self._turned(query, at), self._turned(key, at)
        self.keys.append(Captured(query, key, value))
        self.held.append(key, value)
        out = self.held.attend(query)
        assert isinstance(out, Tensor)
        return out

    def _turned(self, x: Tensor, at: int) -> Tensor:
        cos, sin = (table[at : at + x.shape[2]] for table in self.tables)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def all(self) -> Captured:
        """Everything that came through."""
        query, key, value = (torch.cat(parts, 2) for parts in zip(*self.keys, strict=True))
        return Captured(query[:, :, -PROBES:], key, value)


def byte_reading(
    path: Path, train: bytes, held_out: Sequence[bytes], fingerprint: str, training: Training, windows: int, prefix: int
) -> Reading:
    """`windows` rows of held-out bytes, each as long as those that the model was trained on."""
    model, _ = trained_model(path, train, fingerprint, training)
    length = training.length
    pieces = [data[:length] for data in held_out if len(data) >= length][:windows]
    if len(pieces) < windows:
        raise UserError(f"the held-out text has {len(pieces)} files of {length} bytes and must have {windows}")
    ids = torch.stack([tokens_from_bytes(data) for data in pieces])
    learn = torch.stack([tokens_from_bytes(train[i * length : (i + 1) * length]) for i in range(2)])

    @torch.no_grad()
    def read(tokens: Tensor, ladders: Ladders | None) -> tuple[Tensor, list[_Layer]]:
        count = len(model.blocks)
        layers = [_Layer(model, None, length) for _ in range(count)]
        full: Any = layers
        first = model(tokens[:, :prefix], caches=full)
        if ladders is not None:  # which go on from what was read in full
            layers = [_Layer(model, stairs, length) for stairs in ladders]
            for new, old in zip(layers, full, strict=True):
                _, key, value = old.keys[0]
                new.held = StaircaseKVCache(
                    new.stairs, batch=len(key), kv_heads=new.heads, head_dim=new.width, capacity=length
                )
                new.held.append(key, value)
        rest: Any = layers
        return torch.cat([first, model(tokens[:, prefix:length], caches=rest)], 1), layers

    def log_probs(ladders: Ladders | None) -> Tensor:
        return torch.log_softmax(read(ids, ladders)[0][:, prefix:], -1).flatten(0, 1)

    learned, held = ([layer.all() for layer in read(tokens, None)[1]] for tokens in (learn, ids))
    return Reading(ids[:, prefix + 1 :].flatten(), length, prefix, learned, held, log_probs)
