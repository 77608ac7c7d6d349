# SPDX-License-Identifier: Apache-2.0
"""What `lmzip` and `draft` ask of a language model, a byte model that answers, and the weights that pycore ships."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pycore.cache import LambdaKVCache
from pycore.models import _checkpoint
from pycore.models.bytelm import BOS, Bytelm, BytelmConfig
from pycore.schedules import Causal, Lambda, Tree

__all__ = ["ByteModel", "LanguageModel", "load_bytelm", "save_bytelm", "shipped"]

SHIPPED = Path(__file__).parent / "data" / "bytelm.pt"
# A text that the fingerprint looks at the logits of: longer than a key tile, with every kind of byte.
PROBE = b"def probe(self, text: str = 'na\xc3\xafve') -> None:\n    return [1, 2.5e-3]\n" * 2 + bytes(range(0, 256, 7))


class LanguageModel(Protocol):
    """Texts as tokens, and logits whose bits do not depend on chunks, batch or threads.

    Attributes:
        vocabulary: tokens are 0 to vocabulary - 1.
        bos: what every text is preceded by; it may lie beyond the vocabulary.
        fingerprint: 32 bits that two models, or machines that compute other bits, do not share.
        longest: tokens that it reads one after another, BOS not counted.
        batch: texts that it reads side by side with profit.
    """

    vocabulary: int
    bos: int
    fingerprint: int
    longest: int
    batch: int

    def tokens(self, data: bytes) -> list[int]:
        """The text in tokens, for any bytes at all."""
        ...

    def text(self, tokens: Sequence[int]) -> bytes:
        """Inverse of `tokens`."""
        ...

    def segment(self, tokens: int) -> int:
        """How many tokens of a text of so many to read one after another, where nobody says."""
        ...

    def state(self, rollback: int = 0) -> Any:
        """Nothing read yet; that of a draft takes `rollback` tokens back, and has `accept` of `KVCache`."""
        ...

    def read(self, tokens: Tensor, state: Any) -> None:
        """Reads tokens whose logits nobody wants."""
        ...

    def logits(self, tokens: Tensor, state: Any, tree: Tree | None = None) -> Tensor:
        """Logits, ``[batch, n, vocabulary]``: of what follows each of int64 ``[batch, n]``, which follow `state`.

        tree: the tokens are the nodes of a tree, see :class:`pycore.schedules.Tree`.
        """
        ...


class ByteState(list[LambdaKVCache]):
    """A cache for each layer."""

    def accept(self, path: Tensor, tokens: int) -> None:
        """Of the newest tokens keeps those at path."""
        for cache in self:
            cache.accept(path, tokens)


class ByteModel:
    """A :class:`Bytelm` read with Λ attention: constant memory for any length.

    Args:
        model: the byte-level decoder.
        sink_size: tokens kept from the start, BOS among them.
        window_size: newest tokens kept.
    """

    vocabulary = 256
    bos = BOS
    longest = 1 << 20
    batch = 64

    def __init__(self, model: Bytelm, *, sink_size: int = 4, window_size: int = 512) -> None:
        if not isinstance(model, Bytelm):
            raise TypeError(f"ByteModel: model is a {type(model).__name__} and must be a Bytelm")
        self.model = model.eval().requires_grad_(False)
        self.schedule = Lambda(sink_size, window_size)
        model.caches(self.schedule)  # says what is wrong with the sizes
        digest = hashlib.sha256(json.dumps([asdict(model.config), sink_size, window_size]).encode())
        for name, x in sorted(model.state_dict().items()):
            digest.update(name.encode() + x.float().numpy().tobytes())
        # The same weights on a machine that computes other bits are another model.
        probe = self.logits(torch.tensor([[BOS, *PROBE]]), self.state())
        digest.update(probe.numpy().tobytes())
        self.fingerprint = int.from_bytes(digest.digest()[:4], "little")

    def tokens(self, data: bytes) -> list[int]:
        """The bytes."""
        return list(data)

    def text(self, tokens: Sequence[int]) -> bytes:
        """The bytes."""
        return bytes(tokens)

    def segment(self, tokens: int) -> int:
        """4096, whatever the text."""
        return 4096

    def state(self, rollback: int = 0) -> ByteState:
        """Empty caches, one for each layer."""
        return ByteState(self.model.caches(self.schedule, rollback=rollback))

    def read(self, tokens: Tensor, state: ByteState) -> None:
        """As `logits`."""
        self.logits(tokens, state)

    @torch.inference_mode()
    def logits(self, tokens: Tensor, state: ByteState, tree: Tree | None = None) -> Tensor:
        """float32 ``[batch, n, 256]``; BOS, which follows nothing, has none."""
        return cast(Tensor, self.model(tokens, caches=state, schedule=tree or Causal()))[..., :256]


def save_bytelm(model: Bytelm, path: str | os.PathLike[str], facts: dict[str, Any] | None = None) -> None:
    """Writes the weights, in float16, with the configuration and whatever `facts` say about their origin."""
    state = {name: x.half() for name, x in model.state_dict().items()}
    _checkpoint.save(state, model.config, path, facts)


def load_bytelm(path: str | os.PathLike[str]) -> Bytelm:
    """The model of a file that :func:`save_bytelm` wrote, its weights in float32.

    Raises:
        ValueError: the file is none of these.
        OSError: it cannot be read.
    """
    return _checkpoint.load(
        "load_bytelm", path, lambda config: Bytelm(BytelmConfig(**config)), "a checkpoint of a Bytelm"
    )


@lru_cache(maxsize=1)
def shipped() -> ByteModel:
    """The byte model that comes with pycore (docs/models/lmzip.md says what it was trained on)."""
    return ByteModel(load_bytelm(SHIPPED))
