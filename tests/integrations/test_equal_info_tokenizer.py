# SPDX-License-Identifier: Apache-2.0
"""EqualInfoTokenizer: what transformers asks of a tokenizer that a model is trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pycore
from pycore import native

pytest.importorskip("transformers", reason="transformers is not installed")

from pycore.integrations.equal_info import EqualInfoTokenizer  # noqa: E402

STRINGS = [bytes([i]) for i in range(256)] + [b"de", b"def", b"def ", b"  ", b"    ", "ä".encode(), b"<p", b"<s"]
STRINGS += [b" " + bytes([i]) for i in range(256) if i != 32][: 512 - len(STRINGS)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    strings = list(STRINGS)
    strings[-1] = b"   "  # the prefix of four spaces
    path = tmp_path / "table.pcei"
    path.write_bytes(native.pack_equal_info(strings))
    return EqualInfoTokenizer(path)


@pytest.mark.parametrize("text", ["def f(x):\n    return 'ä'", "", "日本語 \x00 text", "<p<x", "a  b   c"])
def test_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == tokenizer.table.encode(text.encode()).tolist()
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids


def test_special_tokens(tokenizer: Any) -> None:
    """They come after the table's, also where the table has strings that begin like them."""
    assert tokenizer.vocab_size == 512 and len(tokenizer) == 515 == len(tokenizer.get_vocab())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert sorted(special) == [512, 513, 514]
    ids = tokenizer("def <s>  x")["input_ids"]
    assert tokenizer.bos_token_id in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "def   x"
    assert sorted(tokenizer.get_vocab().values()) == list(range(515))


def test_batches(tokenizer: Any) -> None:
    batch = tokenizer(["def f", "d"], padding=True, return_tensors="pt")
    assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() == [len(tokenizer.tokenize(text)) for text in ("def f", "d")]
    assert batch["input_ids"][1, -1] == tokenizer.pad_token_id


def test_save_and_load(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    again = EqualInfoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.table == tokenizer.table and again("def f(x)")["input_ids"] == tokenizer("def f(x)")["input_ids"]
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_model_trains_with_it(tokenizer: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = tokenizer(["def f(x):\n    return x", "def g(y):\n    return y + 1"], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(20):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_errors(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="^EqualInfoTokenizer: parse is 'best' and must be 'longest' or 'optimal'$"):
        EqualInfoTokenizer(tokenizer.vocab_file, parse="best")
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(pycore.BitstreamError, match="^EqualInfoTable: the file is no table of pycore$"):
        EqualInfoTokenizer(tmp_path / "bad")
