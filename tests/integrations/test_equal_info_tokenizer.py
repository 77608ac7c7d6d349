# SPDX-License-Identifier: Apache-2.0
"""EqualInfoTokenizer: what transformers asks of a tokenizer that a model is trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
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


def test_decoding_special_tokens(tokenizer: Any) -> None:
    """They stand for themselves, between the pieces of a text that is given back as it was."""
    text = "<s>def  f ä</s><pad><pad>"
    ids = tokenizer(text)["input_ids"]
    assert ids[-3:] == [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "def  f ä"
    assert tokenizer.decode(torch.tensor(ids)) == text and tokenizer.decode(np.array(ids)) == text
    assert tokenizer.decode(tuple(ids)) == text
    assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) == text
    assert tokenizer.decode([]) == ""


def test_decoding_one_id(tokenizer: Any) -> None:
    one = tokenizer.convert_tokens_to_ids("def")
    for given in (one, torch.tensor(one), np.int64(one), [one], torch.tensor([one])):
        assert tokenizer.decode(given) == "def"
    eos = tokenizer.eos_token_id
    assert tokenizer.decode(eos) == "</s>" and tokenizer.decode(torch.tensor(eos)) == "</s>"
    assert tokenizer.decode(eos, skip_special_tokens=True) == ""


def test_decoding_batches(tokenizer: Any) -> None:
    texts = ["def f(x):", "d", "", "日本"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    assert tokenizer.batch_decode(batch, skip_special_tokens=True) == texts
    assert tokenizer.batch_decode(batch.tolist(), skip_special_tokens=True) == texts
    pads = (batch == tokenizer.pad_token_id).sum(1).tolist()
    assert tokenizer.batch_decode(batch) == [x + "<pad>" * n for x, n in zip(texts, pads, strict=True)]


@pytest.mark.parametrize("content", ["<tool>", "hello", "def ", "日"])
def test_decoding_added_tokens(tokenizer: Any, content: str, tmp_path: Path) -> None:
    """Also after saving."""
    assert tokenizer.add_tokens([content]) == 1
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end of turn>"]})
    tokenizer.save_pretrained(tmp_path / "saved")
    added = tokenizer.convert_tokens_to_ids(content)
    end = tokenizer.convert_tokens_to_ids("<end of turn>")
    ids = [tokenizer.bos_token_id, *tokenizer.table.encode(b"a b").tolist(), added, added, end]
    for one in (tokenizer, EqualInfoTokenizer.from_pretrained(tmp_path / "saved")):
        assert one.decode(ids) == f"<s>a b{content}{content}<end of turn>"
        assert one.decode(ids, skip_special_tokens=True) == f"a b{content}{content}"


def test_decoding_with_other_spaces(tokenizer: Any) -> None:
    ids = tokenizer("<s>do n't stop , now .</s>")["input_ids"]
    assert tokenizer.decode(ids) == "<s>do n't stop , now .</s>"
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == "<s>don't stop, now.</s>"
    assert tokenizer.decode(ids, spaces_between_special_tokens=True) == "<s> do n't stop , now . </s>"
    (cleaned,) = tokenizer.batch_decode([ids], skip_special_tokens=True, clean_up_tokenization_spaces=True)
    assert cleaned == "don't stop, now."


def test_a_special_token_inside_a_character(tokenizer: Any) -> None:
    first, second = (
        tokenizer.table.encode("本".encode()).tolist()[:1],
        tokenizer.table.encode("本".encode()).tolist()[1:],
    )
    ids = [*first, tokenizer.pad_token_id, *second]
    assert tokenizer.decode(ids) == "�<pad>��"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "本"


@pytest.mark.parametrize("index", [-1, 515, -100])
def test_ids_that_do_not_exist(tokenizer: Any, index: int) -> None:
    message = f"^EqualInfoTokenizer: id is {index} and must be one of the table's, 0 to 511, or of an added token$"
    for call in (tokenizer.decode, tokenizer.convert_ids_to_tokens):
        with pytest.raises(IndexError, match=message):
            call([3, index])


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
