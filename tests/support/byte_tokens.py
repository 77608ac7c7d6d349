# SPDX-License-Identifier: Apache-2.0
"""A small byte-level tokenizer that lacks some bytes, as real ones do, and a random Llama over its tokens."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from pycore.models.llama import Llama, LlamaConfig  # noqa: E402
from pycore.models.tokens import ByteTokens, TokenModel  # noqa: E402
from tests.support.tiny_models import tiny  # noqa: E402

MISSING = (4, 29, 192, 193, 245, 255)
LEARNED = ("the text of a file, in words: def function(self, value) -> None:\n    return value\n", "über 日本 12 34 56")


@functools.cache
def _json() -> str:
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    lost = {
        chr(256 + [b for b in range(256) if b not in plain].index(b)) if b not in plain else chr(b) for b in MISSING
    }
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=310, special_tokens=["<|endoftext|>", "<|im_start|>"], initial_alphabet=sorted(set(alphabet) - lost),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(LEARNED * 2, trainer)
    return str(made.to_str())


def byte_tokens() -> ByteTokens:
    """Of about 300 tokens, six bytes not among them."""
    return ByteTokens(tokenizers.Tokenizer.from_str(_json()))


def token_model(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[TokenModel, Any]:
    """A `TokenModel` of two layers that thinks something, and the model of transformers whose weights it has."""
    tokens = byte_tokens()
    model = tiny("llama", dtype=dtype, vocab_size=tokens.known, tie_word_embeddings=True, pad_token_id=None)
    own = Llama(LlamaConfig.of(model.config.to_dict()), model.state_dict(), dtype)
    return TokenModel(own, tokens, **options), model
