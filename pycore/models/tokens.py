# SPDX-License-Identifier: Apache-2.0
"""Any bytes as the tokens of a byte-level vocabulary, and a `Llama` over them as a :class:`LanguageModel`.

A token of such a vocabulary is a string of bytes, so that tokens have one text; which tokens a text has the tokenizer
says. It reads Unicode, and some of the 256 bytes are no token of their own in some vocabularies. What is no UTF-8, and
what does not come back, is therefore spelled byte by byte, and bytes that are missing become tokens behind the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pycore import BitstreamError
from pycore.cache.staircase_cache import Staircase
from pycore.models.llama import Llama, LlamaState, load_llama
from pycore.schedules import Tree

__all__ = ["ByteTokens", "TokenModel", "load_tokens"]

# What stood between two documents in training, by the names that vocabularies have for it.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "<s>")
RARE = 11.0  # nats that a token which the model does not know is less likely than the likeliest
PROBE = 192  # tokens of the fingerprint's text: several tiles of keys
TEXT = "def probe(self, text: str = 'naïve') -> None:\n    return [1, 2.5e-3]  # Größe, 日本語\n" * 6


def _alphabet() -> dict[str, int]:
    """The byte of each character that byte-level vocabularies are written in (GPT-2's rule)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(rest)}


class ByteTokens:
    """Tokens of any bytes; a text's tokens stand for its bytes one after another, wherever it is cut.

    Args:
        tokenizer: of the package tokenizers, with a byte-level vocabulary.

    Attributes:
        bos: what stood between documents in training, or else the first special token.
        known: tokens of the vocabulary. Bytes that it lacks are tokens from there on.
        spelling: the bytes of each token; None for one that stands for none.

    Raises:
        ValueError: a vocabulary of another kind, or without special tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        kinds = json.loads(tokenizer.to_str())
        decoder = kinds.get("decoder") or {}
        names = [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))]
        if "ByteLevel" not in names:
            raise ValueError(f"ByteTokens: tokenizer has decoder {decoder.get('type')} and must have ByteLevel")
        special = {token["content"]: token["id"] for token in kinds["added_tokens"] if token["special"]}
        if not special:
            raise ValueError("ByteTokens: tokenizer has no special token and must have one")
        self.bos: int = next((special[name] for name in SEPARATORS if name in special), min(special.values()))
        byte_of = _alphabet()
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self.known = max(vocabulary.values()) + 1
        self.spelling: list[bytes | None] = [None] * self.known
        for text, token in vocabulary.items():
            if text not in special and all(character in byte_of for character in text):
                self.spelling[token] = bytes(byte_of[character] for character in text)
        single = {x[0]: token for token, x in enumerate(self.spelling) if x is not None and len(x) == 1}
        missing = [byte for byte in range(256) if byte not in single]
        self.spelling += [bytes([byte]) for byte in missing]
        self.of_byte = [single.get(byte, -1) for byte in range(256)]
        for token, byte in enumerate(missing, self.known):
            self.of_byte[byte] = token
        # What the tokenizer is not given: surrogates, which stand for what is no UTF-8, and characters it would lose.
        lost = "".join(re.escape(chr(byte)) for byte in missing if byte < 128)
        self._apart = re.compile(f"([\udc80-\udcff{lost}]+)")
        tokenizer.encode_special_tokens = True  # "<|im_start|>" in a text is a text

    def tokens(self, data: bytes) -> list[int]:
        """The bytes as tokens; :meth:`text` gives them back."""
        out: list[int] = []
        # Odd parts are those that stand apart.
        for n, part in enumerate(self._apart.split(data.decode("utf-8", "surrogateescape"))):
            out += self._spelled(part.encode("utf-8", "surrogateescape")) if n % 2 else self._read(part)
        return out

    def text(self, tokens: Sequence[int]) -> bytes:
        """The bytes that tokens stand for.

        Raises:
            BitstreamError: tokens that :meth:`tokens` never gives.
        """
        found = [self.spelling[token] if token < len(self.spelling) else None for token in tokens]
        if None in found:
            raise BitstreamError(f"ByteTokens.text: tokens has {tokens[found.index(None)]}, which stands for no bytes")
        return b"".join(cast(list[bytes], found))

    def _spelled(self, data: bytes) -> list[int]:
        return [self.of_byte[byte] for byte in data]

    def _read(self, text: str) -> list[int]:
        """The tokenizer's tokens; where they are not the text, those of its lines, and of such a line its bytes."""
        if not text:
            return []
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if b"".join(self.spelling[token] or b"" for token in found) == text.encode():
            return found
        lines = text.splitlines(keepends=True)
        if len(lines) == 1:
            return self._spelled(text.encode())
        return [token for line in lines for token in self._read(line)]


class TokenModel:
    """A :class:`Llama` and the tokens that it was trained on, as `lmzip` and `draft` take them.

    Args:
        model: the decoder.
        tokens: its vocabulary.
        staircase: read texts from a quantized cache, whose tokens have fewer bits the older they are: less memory for
            somewhat less density. Not for `draft`.
    """

    batch = 32

    def __init__(self, model: Llama, tokens: ByteTokens, *, staircase: Staircase | None = None) -> None:
        if not isinstance(model, Llama):
            raise TypeError(f"TokenModel: model is a {type(model).__name__} and must be a Llama")
        if not isinstance(tokens, ByteTokens):
            raise TypeError(f"TokenModel: tokens is a {type(tokens).__name__} and must be a ByteTokens")
        if staircase is not None and not isinstance(staircase, Staircase):
            raise TypeError(f"TokenModel: staircase is a {type(staircase).__name__} and must be a Staircase or None")
        if tokens.known > model.config.vocabulary:
            raise ValueError(
                f"TokenModel: tokens has {tokens.known} tokens and must have at most {model.config.vocabulary}, model's"
            )
        self.model, self.byte_tokens, self.staircase = model, tokens, staircase
        self.vocabulary = len(tokens.spelling)
        self.bos, self.longest = tokens.bos, model.config.longest - 1
        shape = [asdict(model.config), str(model.dtype), repr(staircase), self.bos]
        digest = hashlib.sha256(json.dumps(shape).encode())
        for spelled in tokens.spelling:
            digest.update(b"\xff\xff" if spelled is None else len(spelled).to_bytes(2, "little") + spelled)
        for name, x in sorted(model.named_parameters()):
            digest.update(name.encode())
            digest.update(x.detach().contiguous().view(torch.uint8).numpy().tobytes())
        # The same weights on a machine that computes other bits are another model.
        probe = torch.tensor([[self.bos, *tokens.tokens(TEXT.encode())[:PROBE]]])
        digest.update(self.logits(probe, self.state())[:, -16:].float().numpy().tobytes())
        self.fingerprint = int.from_bytes(digest.digest()[:4], "little")

    def tokens(self, data: bytes) -> list[int]:
        """The bytes as tokens."""
        return self.byte_tokens.tokens(data)

    def text(self, tokens: Sequence[int]) -> bytes:
        """Inverse of `tokens`."""
        return self.byte_tokens.text(tokens)

    def state(self, rollback: int = 0) -> LlamaState:
        """Nothing read yet; all of it can be taken back."""
        return self.model.state(self.staircase)

    @torch.inference_mode()
    def read(self, tokens: Tensor, state: LlamaState) -> None:
        """Reads tokens without the head, a fifth of the weights."""
        self.model.states(torch.where(tokens < self.byte_tokens.known, tokens, self.bos), state)

    @torch.inference_mode()
    def logits(self, tokens: Tensor, state: LlamaState, tree: Tree | None = None) -> Tensor:
        """``[batch, n, vocabulary]`` in the model's dtype; a byte that it has no token for is always rare."""
        known = self.byte_tokens.known
        read = self.model(torch.where(tokens < known, tokens, self.bos), state, tree)[..., :known]
        if known == self.vocabulary:
            return cast(Tensor, read)
        rare = read.amax(-1, keepdim=True) - RARE
        return torch.cat([read, rare.expand(*read.shape[:-1], self.vocabulary - known)], -1)

    def segment(self, tokens: int) -> int:
        """Tokens for `lmzip` to read one after another: enough of them side by side, and each with a context."""
        return min(max(-(-tokens // self.batch), 1024), 2048, self.longest)


def load_tokens(
    folder: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16, staircase: Staircase | None = None
) -> TokenModel:
    """The model of a folder with transformers' config.json, model.safetensors and tokenizer.json.

    Raises:
        ValueError: the files hold something else, or a package that reads them is missing.
        OSError: they cannot be read.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError("load_tokens: it needs tokenizers; pip install pycore-kernels[transformers]") from error
    text = (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:
        raise ValueError(f"load_tokens: {os.fspath(folder)!r} must have a tokenizer.json: {error}") from error
    return TokenModel(load_llama(folder, dtype), ByteTokens(tokenizer), staircase=staircase)
