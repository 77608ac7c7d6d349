# SPDX-License-Identifier: Apache-2.0
"""Models over tokens: any bytes as tokens, the bits of `same_bits`, lmzip and draft with them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pycore
from pycore import BitstreamError, Staircase
from pycore.models.draft import NgramTable, generate
from pycore.models.llama import Llama, LlamaConfig, load_llama
from pycore.models.lmzip import compress, decompress
from pycore.models.lmzip.command import main
from pycore.models.lmzip.container import CODED, HEADER, MIXED
from pycore.models.tokens import ByteTokens, TokenModel, load_tokens
from pycore.schedules import Tree
from tests.support.byte_tokens import MISSING, byte_tokens, token_model
from tests.support.greedy import greedy

ROOT = Path(__file__).parents[2]
SOURCE = Path(os.__file__).read_bytes()
NOISE = random.Random(0).randbytes(400)
TEXTS = {
    "empty": b"",
    "a byte": b"a",
    "a byte that is no token": b"\xff",
    "no UTF-8": b"caf\xe9 \xc3( \xf0\x9f\x98 end\xc3",
    "special tokens": b"<|im_start|>user<|endoftext|>\n<|im_start|>",
    "every byte": bytes(range(256)) * 2,
    "source": SOURCE[:700],
    "UTF-8": "Größe, naïve, 日本語 \N{SNOWMAN} \U00050000\U0010ffff\n".encode() * 3,
    "lines": b"\r\n\r \x0b\x0c\x1c\x85 \xe2\x80\xa8x\n" * 5,
    "noise": NOISE,
}


@pytest.fixture(autouse=True)
def vector_machine() -> None:
    if pycore.cpu_isa() == "scalar":
        pytest.skip("plain loops compute other bits")


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_bytes_come_back(name: str) -> None:
    tokens = byte_tokens()
    found = tokens.tokens(TEXTS[name])
    assert tokens.text(found) == TEXTS[name]
    assert all(0 <= token < len(tokens.spelling) for token in found)
    for cut in range(0, len(found), 7):  # wherever it is cut
        assert tokens.text(found[:cut]) + tokens.text(found[cut:]) == TEXTS[name]


def test_missing_bytes_are_tokens_behind_the_others() -> None:
    tokens = byte_tokens()
    assert len(tokens.spelling) == tokens.known + len(MISSING)
    assert tokens.tokens(bytes(MISSING)) == list(range(tokens.known, tokens.known + len(MISSING)))
    assert len(tokens.tokens(b"return value")) < 6  # a text is the tokenizer's
    assert tokens.bos == tokens.tokenizer.token_to_id("<|endoftext|>")


def test_what_the_tokenizer_loses_is_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that reads one line as another: that line alone is bytes."""
    tokens = byte_tokens()
    whole = tokens.tokens(b"return value\n")

    class Lossy:
        def encode(self, text: str, **options: Any) -> Any:
            return real.encode(text.replace("Lost", "lost"), **options)

    real = tokens.tokenizer
    monkeypatch.setattr(tokens, "tokenizer", Lossy())
    found = tokens.tokens(b"return value\nLost\nreturn value\n")
    assert found == [*whole, *(tokens.of_byte[byte] for byte in b"Lost\n"), *whole]


def test_tokens_without_bytes_are_reported() -> None:
    tokens = byte_tokens()
    with pytest.raises(BitstreamError, match="ByteTokens.text: tokens has 0, which stands for no bytes"):
        tokens.text([tokens.of_byte[65], tokens.bos])
    with pytest.raises(BitstreamError, match="which stands for no bytes"):
        tokens.text([len(tokens.spelling)])


def test_other_vocabularies_are_refused() -> None:
    import tokenizers

    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    with pytest.raises(ValueError, match="ByteTokens: tokenizer has decoder None and must have ByteLevel"):
        ByteTokens(plain)
    plain.decoder = tokenizers.decoders.ByteLevel()
    with pytest.raises(ValueError, match="ByteTokens: tokenizer has no special token and must have one"):
        ByteTokens(plain)


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_bits_of_same_bits(dtype: torch.dtype) -> None:
    """In one pass, in chunks, a token at a time, in a batch: those of the model of transformers."""
    from pycore.integrations.transformers import same_bits

    own, theirs = token_model(dtype)
    ids = torch.randint(own.byte_tokens.known, (3, 90), generator=torch.Generator().manual_seed(0))
    expected = same_bits(theirs)(ids).logits
    for cuts in ([90], [70, 20], [1] * 90, [33, 1, 56]):
        state, found = own.model.state(), []
        for part in ids.split(cuts, 1):
            found.append(own.model(part, state))
        assert torch.equal(torch.cat(found, 1), expected)
    assert torch.equal(own.model(ids[1:2], own.model.state()), expected[1:2])


@torch.inference_mode()
def test_a_branch_of_a_tree() -> None:
    """Its rows are those of the branch up to rounding, and what is accepted goes on as if it alone had been read."""
    own, _ = token_model(torch.float32)
    ids = torch.arange(20, 60)[None]
    state, plain = own.state(), own.state()
    own.logits(ids, state)
    own.logits(ids, plain)
    tree = own.logits(torch.tensor([[5, 6, 7, 8]]), state, Tree(torch.tensor([-1, 0, 0, 2])))
    branch = own.logits(torch.tensor([[5, 7, 8]]), plain)
    torch.testing.assert_close(tree[:, [0, 2, 3]], branch, rtol=1e-4, atol=1e-4)
    state.accept(torch.tensor([0, 2, 3]), 4)
    after, expected = (own.logits(torch.tensor([[9]]), each) for each in (state, plain))
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert state.length == plain.length == 44


def test_what_a_llama_must_have(tmp_path: Path) -> None:
    own, theirs = token_model()
    config, weights = theirs.config.to_dict(), theirs.state_dict()
    for name, value, message in (
        ("model_type", "gpt2", "config has model_type 'gpt2' and must have 'llama'"),
        ("attention_bias", True, "config has attention_bias True and must have False"),
        ("hidden_act", "gelu", "config has hidden_act 'gelu' and must have 'silu'"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "config has rope_type 'yarn' and must have 'default'"),
    ):
        with pytest.raises(ValueError, match=f"Llama: {message}"):
            LlamaConfig.of({**config, name: value})
    with pytest.raises(ValueError, match="Llama: config has no vocab_size and must have one"):
        LlamaConfig.of({name: x for name, x in config.items() if name != "vocab_size"})
    sizes = LlamaConfig.of(config)
    with pytest.raises(ValueError, match=r"weights has no model.norm.weight and must have one"):
        Llama(sizes, {name: x for name, x in weights.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"weights has model.norm.weight of shape \[3\] and must have \[64\]"):
        Llama(sizes, {**weights, "model.norm.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="weights has a.bias and must have nothing that is not computed"):
        Llama(sizes, {**weights, "a.bias": torch.zeros(3)})
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(OSError):
        load_llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="load_llama: .* must be a file of safetensors"):
        load_llama(tmp_path)
    with pytest.raises(TypeError, match="TokenModel: model is a int and must be a Llama"):
        TokenModel(3, own.byte_tokens)  # type: ignore[arg-type]


# ---- lmzip -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_round_trips(name: str) -> None:
    model, _ = token_model()
    packed = compress(TEXTS[name], model, segment=60)
    assert decompress(packed, model) == TEXTS[name]
    assert len(packed) <= len(TEXTS[name]) + HEADER.size


class Leaning(TokenModel):
    """A model that is told what is likely: the bytes of words."""

    def logits(self, tokens: torch.Tensor, state: Any, tree: Any = None) -> torch.Tensor:
        """Those of the weights, and nine for some tokens."""
        found = super().logits(tokens, state, tree).clone()
        for byte in b"etaoin shr":
            found[..., self.byte_tokens.of_byte[byte]] += 9.0
        return found


def leaning(dtype: torch.dtype = torch.float32, **options: Any) -> Leaning:
    own, _ = token_model(dtype)
    return Leaning(own.model, own.byte_tokens, **options)


def words(count: int) -> bytes:
    generator = random.Random(count)
    return b"".join(generator.choice([b"nor ", b"hat ", b"iris "]) for _ in range(count))


@pytest.mark.parametrize("staircase", [None, Staircase(step=64)], ids=["all bits", "staircase"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ways_of_cutting_up_are_the_same_bytes(dtype: torch.dtype, staircase: Staircase | None) -> None:
    model = leaning(dtype, staircase=staircase)
    data = words(130)
    expected = compress(data, model, segment=200)
    assert expected[5] == CODED and len(model.tokens(data)) > 400
    before = torch.get_num_threads()
    try:
        for threads, batch, chunk in ((1, 1, 200), (2, 2, 1), (2, 64, 77)):
            torch.set_num_threads(threads)
            assert compress(data, model, segment=200, batch=batch, chunk=chunk) == expected
            assert decompress(expected, model, batch=batch) == data
    finally:
        torch.set_num_threads(before)


def test_segments_of_noise_are_kept_as_they_are() -> None:
    model = leaning()
    text = words(150)
    data = text + NOISE + text
    packed = compress(data, model, segment=64)
    assert packed[5] == MIXED and decompress(packed, model) == data
    alone = compress(text, model, segment=64)
    assert alone[5] == CODED and len(model.tokens(text)) > 64
    assert len(packed) < 2 * len(alone) + len(NOISE) + 120
    for at in range(HEADER.size, len(packed), 11):
        damaged = bytearray(packed)
        damaged[at] ^= 4
        with pytest.raises(BitstreamError):
            decompress(bytes(damaged), model)


def test_another_model_is_reported() -> None:
    model, other = leaning(), token_model(torch.bfloat16)[0]
    with pytest.raises(BitstreamError, match=r"data was compressed with model \w{8} and this one is \w{8};"):
        decompress(compress(b"the rain " * 40, model), other)
    prints = {x.fingerprint for x in (model, other, token_model(staircase=Staircase())[0], token_model()[0])}
    assert len(prints) == 4 - (model.fingerprint == token_model()[0].fingerprint)


def test_a_segment_is_no_longer_than_the_model_reads() -> None:
    model, theirs = token_model()
    assert model.longest == theirs.config.max_position_embeddings - 1
    assert model.segment(10) == 1024 and model.segment(50000) == 1563 and model.segment(10**6) == 2047
    with pytest.raises(ValueError, match="compress: segment is 2048 and must be at most 2047, which model reads"):
        compress(b"abc", model, segment=2048)


def saved(folder: Path) -> Path:
    """A model's files, as transformers writes them."""
    model, theirs = token_model()
    theirs.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(model.byte_tokens.tokenizer.to_str())
    return folder


def test_the_command_takes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = saved(tmp_path / "model"), tmp_path / "text"
    assert load_tokens(folder, torch.float32).fingerprint == token_model()[0].fingerprint
    file.write_bytes(SOURCE[:200])
    assert main(["compress", str(file), "--model", str(folder), "--segment", "50", "--threads", "2"]) == 0
    file.unlink()
    assert main(["decompress", f"{file}.pclz", "--model", str(folder)]) == 0
    assert file.read_bytes() == SOURCE[:200]
    assert main(["compress", str(file), "--staircase"]) == 1
    assert "--staircase is given and --model is 'bytelm', which must be a Llama for it" in capsys.readouterr().err
    (folder / "tokenizer.json").write_text("{}")
    assert main(["compress", str(file), "--model", str(folder)]) == 1
    assert "load_tokens: '" in capsys.readouterr().err


def test_the_model_that_was_not_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pycore.models.lmzip import command

    monkeypatch.setattr(command, "SMOLLM2", tmp_path)
    (tmp_path / "text").write_bytes(b"text")
    assert main(["compress", str(tmp_path / "text"), "--model", "smollm2"]) == 1
    assert "lmzip: the model is not at " in capsys.readouterr().err


def test_another_instruction_set_is_the_same_model(tmp_path: Path) -> None:
    """The same fingerprint, of which logits are part, in both dtypes."""
    folder = saved(tmp_path / "model")
    program = (
        "import sys, torch; from pycore.models.tokens import load_tokens\n"
        "print([load_tokens(sys.argv[1], x).fingerprint for x in (torch.float32, torch.bfloat16)])"
    )
    isas = [isa for isa in pycore.native.available_isas() if isa != "scalar"]
    said = {
        subprocess.run(
            [sys.executable, "-c", program, str(folder)], capture_output=True, check=True, cwd=ROOT, text=True,
            env={**os.environ, "PYCORE_CPU_ISA": isa},
        ).stdout
        for isa in isas
    }  # fmt: skip
    assert len(said) == 1


# ---- draft -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chains_are_the_text_of_plain_decoding(dtype: torch.dtype) -> None:
    """Its bits, so that in bfloat16, where logits are often equal, nothing has to be read anew."""
    model, _ = token_model(dtype)
    prompt = model.tokens(SOURCE[:150])
    expected = greedy(model, prompt, 60)
    table = NgramTable.build([expected])
    drafted = generate(model, prompt, 60, table, nodes=5, chain=True)
    assert drafted.tokens == expected and drafted.reread == 0
    assert drafted.forwards < 40 and max(drafted.lengths) == 6
    wrong = NgramTable.build([list(reversed(expected))])
    assert generate(model, prompt, 60, wrong, nodes=5, chain=True).tokens == expected


def test_trees_are_the_text_of_plain_decoding() -> None:
    model, _ = token_model()
    prompt = model.tokens(SOURCE[:150])
    expected = greedy(model, prompt, 40)
    assert generate(model, prompt, 40, NgramTable.build([expected]), nodes=12).tokens == expected


def test_a_chain_of_a_table() -> None:
    table = NgramTable.build([[1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 4]])
    assert table.chain(1, 2, depth=3) == [3, 4, 1] and table.chain(1, 2, depth=0) == []
    assert table.chain(9, 9) == []
    with pytest.raises(TypeError, match="generate: chain is a int and must be a bool"):
        generate(token_model()[0], [1], 1, table, chain=1)  # type: ignore[arg-type]
