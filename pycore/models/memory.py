# SPDX-License-Identifier: Apache-2.0
"""Codes as a memory: a classifier that looks up values by nearest keys, and a transformer that speaks in codes.

`BottleneckClassifier` learns one class after another without losing those before it: a step moves the values of the
keys that its inputs hit, and no other. `with_codebooks` puts a codebook before the output projection of every attention
layer, whose codes can then be read, switched off and switched on. Both search on `pycore.ops.vq_encode`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pycore import ops
from pycore._checks import check_int, check_number
from pycore._tensors import check_tensor
from pycore.nn.attention import SelfAttention
from pycore.nn.vq import CodebookFeatures, DiscreteKeyValueBottleneck

__all__ = [
    "BottleneckClassifier",
    "CodedProjection",
    "codebook_loss",
    "codebooks",
    "learn_codebooks",
    "with_codebooks",
]


class BottleneckClassifier(nn.Module):
    """Random projections of an input, each to its nearest key, each key to logits of every class; their mean counts.

    First the keys learn where inputs are, from inputs without classes (`learn_keys`); then they stay, and training
    moves values alone, which start at zero. There is nothing else to learn, so a class that is not trained any more
    keeps its logits where its inputs do not share keys with others.

    Args:
        dim: channels of an input.
        classes: how many.
        books: projections, each with keys of its own.
        keys: of a book.
        key_dim: channels of a key.
        decay: of the keys' moving averages.
        least_hits: a key whose moving number of hits falls below this share of an even one moves to an input.

    Source: Träuble et al., "Discrete Key-Value Bottleneck".
    """

    def __init__(
        self, dim: int, classes: int, *, books: int = 64, keys: int = 256, key_dim: int = 8, decay: float = 0.95,
        least_hits: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        name = "BottleneckClassifier"
        given = (("dim", dim), ("classes", classes), ("books", books), ("keys", keys), ("key_dim", key_dim))
        for argument, number in given:
            check_int(name, argument, number, 1)
        check_number(name, "least_hits", least_hits)
        if not 0.0 <= least_hits < 1.0:
            raise ValueError(f"{name}: least_hits is {least_hits} and must be at least 0 and less than 1")
        self.dim, self.classes, self.keys, self.least_hits = dim, classes, keys, least_hits
        self.bottleneck = DiscreteKeyValueBottleneck(
            key_dim, num_memories=keys, dim_embed=dim, num_memory_codebooks=books, dim_memory=classes, decay=decay,
            kmeans_init=True,
        )  # fmt: skip
        self.bottleneck.freeze_keys()

    def _rows(self, x: Any) -> Tensor:
        check_tensor("BottleneckClassifier", "x", x)
        if x.dim() != 2 or x.shape[1] != self.dim or not x.is_floating_point():
            raise ValueError(
                f"BottleneckClassifier: x has shape {list(x.shape)} of {x.dtype} and must have [rows, {self.dim}] of "
                f"floating point"
            )
        return x.unsqueeze(0)

    @torch.no_grad()
    def learn_keys(self, x: Tensor, *, epochs: int = 10, batch_size: int = 256) -> None:
        """Moves the keys to where inputs are: x [rows, dim], in any order and without classes. The first rows seed."""
        check_int("BottleneckClassifier", "epochs", epochs, 1)
        check_int("BottleneckClassifier", "batch_size", batch_size, 1)
        rows, bottleneck = self._rows(x)[0], self.bottleneck
        training = bottleneck.training
        bottleneck.train()
        bottleneck.freeze_keys(False)
        for _ in range(epochs):
            for batch in rows[torch.randperm(len(rows), device=rows.device)].split(batch_size):
                codebook = bottleneck.vq._codebook
                codebook.threshold_ema_dead_code = self.least_hits * len(batch) / self.keys
                bottleneck(batch.unsqueeze(0))
        bottleneck.freeze_keys()
        bottleneck.train(training)

    def codes(self, x: Tensor) -> Tensor:
        """The key that x [rows, dim] hits in every book, int64 [rows, books]."""
        with torch.no_grad():
            _, (_, codes, _) = self.bottleneck(self._rows(x), return_intermediates=True)
        return codes.reshape(len(x), -1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [rows, classes] of x [rows, dim]."""
        logits: Tensor = self.bottleneck(self._rows(x))[0]
        return logits

    @torch.no_grad()
    def forget(self, x: Tensor) -> int:
        """Sets to zero the values of every key that x [rows, dim] hits; how many there were."""
        codes, values = self.codes(x), self.bottleneck.values
        forgotten = 0
        for book in range(values.shape[0]):
            hit, _ = ops.vq_statistics(x, codes[:, book], self.keys)
            forgotten += int((hit > 0).sum())
            values[book] *= (hit == 0).unsqueeze(-1)
        return forgotten


class CodedProjection(nn.Module):
    """A projection whose input goes through codebooks first.

    Attributes:
        features: the codebooks.
        projection: what follows.
        loss: of the last forward pass.
        codes: of the last forward pass, [..., heads, k].
    """

    def __init__(self, features: CodebookFeatures, projection: nn.Module) -> None:
        super().__init__()
        self.features, self.projection = features, projection
        self.loss: Tensor | None = None
        self.codes: Tensor | None = None
        self._seen: list[Tensor] | None = None  # inputs are collected here, and pass by the codebooks, if it is a list

    def forward(self, x: Tensor) -> Tensor:
        if self._seen is not None:
            self._seen.append(x.detach().flatten(0, -2))
            bare: Tensor = self.projection(x)
            return bare
        coded, self.codes, self.loss = self.features(x)
        out: Tensor = self.projection(coded)
        return out


def with_codebooks(model: nn.Module, num_codes: int, *, k: int = 8, loss: str = "aeloss") -> nn.Module:
    """A copy of a model in which every attention layer's heads go through a codebook each before they are joined.

    Args:
        model: holds `pycore.nn.attention.SelfAttention` layers, at least one; it stays as it is.
        num_codes: codes of each head.
        k: codes of a head and position.
        loss: as in `CodebookFeatures`; `codebook_loss` sums it over layers.

    Returns:
        The copy. Codes start as they are drawn: `learn_codebooks` moves them to activations, and then training the
        copy, with `codebook_loss` added to its loss, makes up for most of what the codes leave out.

    Raises:
        ValueError: there is no attention layer, or there are codebooks already.

    Source: Tamkin et al., "Codebook Features", which calls the place attn_preproj.
    """
    coded = copy.deepcopy(model)
    layers = [module for module in coded.modules() if isinstance(module, SelfAttention)]
    if not layers:
        raise ValueError(f"with_codebooks: model is {type(model).__name__} without a SelfAttention and must have one")
    for layer in layers:
        if isinstance(layer.out, CodedProjection):
            raise ValueError("with_codebooks: model has codebooks, and must have none yet")
        dim = layer.out.weight.shape[1]
        features = CodebookFeatures(dim, num_codes, k=k, num_codebooks=dim // layer.head_dim, loss=loss)
        layer.out = CodedProjection(features.to(layer.out.weight.device), layer.out)  # type: ignore[assignment]
    return coded


def codebooks(model: nn.Module) -> list[CodedProjection]:
    """The codebooks of a model from `with_codebooks`, the first layer's first."""
    return [module for module in model.modules() if isinstance(module, CodedProjection)]


@torch.no_grad()
def learn_codebooks(model: nn.Module, batches: Iterable[Any], *, iterations: int = 10, seed: int = 0) -> None:
    """Moves the codes to the k-means of what the model's heads give for some inputs, without codebooks before them.

    Args:
        model: from `with_codebooks`.
        batches: what the model is called with, one after another.
        iterations, seed: of `pycore.ops.kmeans`.

    Raises:
        ValueError: there are fewer positions in all batches than codes.
    """
    layers = codebooks(model)
    try:
        for layer in layers:
            layer._seen = []
        for batch in batches:
            model(batch)
        for layer in layers:
            features, seen = layer.features, layer._seen
            rows = torch.cat(seen) if seen else torch.empty(0, features.dim)
            if len(rows) < features.num_codes:
                raise ValueError(
                    f"learn_codebooks: batches have {len(rows)} positions and must have at least the "
                    f"{features.num_codes} codes of a head"
                )
            for head, part in enumerate(rows.chunk(features.heads, dim=-1)):
                centroids = ops.kmeans(part.contiguous(), features.num_codes, iterations=iterations, seed=seed)[0]
                features.codebook[head].copy_(centroids)
    finally:
        for layer in layers:
            layer._seen = None


def codebook_loss(model: nn.Module) -> Tensor:
    """What the codebooks add to the loss of the pass just made, summed over layers."""
    losses = [layer.loss for layer in codebooks(model) if layer.loss is not None]
    if not losses:
        raise ValueError("codebook_loss: model has seen no input through codebooks, and must have")
    return torch.stack(losses).sum()
