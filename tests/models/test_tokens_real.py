# SPDX-License-Identifier: Apache-2.0
"""lmzip and draft with SmolLM2-135M; skipped where `python examples/smollm2.py` has not put it."""

from __future__ import annotations

import lzma
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pycore
from pycore.models.draft import NgramTable, generate
from pycore.models.lmzip import compress, decompress
from pycore.models.tokens import TokenModel, load_tokens
from tests.test_examples import EXAMPLES

pytest.importorskip("transformers")
sys.path.insert(0, str(EXAMPLES))
try:
    import smollm2
finally:
    sys.path.remove(str(EXAMPLES))

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(not smollm2.present(), reason=smollm2.missing()),
    pytest.mark.skipif(pycore.cpu_isa() == "scalar", reason="plain loops compute other bits"),
]
SOURCE = Path(os.__file__).read_bytes()


@pytest.fixture(scope="module")
def model() -> TokenModel:
    return load_tokens(smollm2.FOLDER)


@torch.inference_mode()
def test_bits_of_the_model_of_transformers(model: TokenModel) -> None:
    from pycore.integrations.transformers import same_bits

    theirs: Any = same_bits(smollm2.load(torch.bfloat16)[0])
    ids = torch.tensor([model.tokens(SOURCE[:500])[:48]])
    state = model.model.state()
    found = [model.model(part, state) for part in (ids[:, :44], *ids[:, 44:].split(1, 1))]
    assert torch.equal(torch.cat(found, 1), theirs(ids).logits)


def test_bytes_that_no_token_spells_come_back(model: TokenModel) -> None:
    data = bytes(range(256)) + "naïve 日本 <|im_start|>".encode() + b"\xe9\xff" + SOURCE[:2000]
    assert model.text(model.tokens(data)) == data
    assert model.vocabulary == 49152 + 21  # bytes that SmolLM2 has no token for


def test_a_text_is_twice_as_dense_as_xz_makes_it(model: TokenModel) -> None:
    text = b"".join(line for line in SOURCE.splitlines(keepends=True)[300:315])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        packed = compress(text, model, segment=32)
        torch.set_num_threads(2)
        assert compress(text, model, segment=32, batch=3) == packed
        assert decompress(packed, model) == text
    finally:
        torch.set_num_threads(before)
    assert 2 * len(packed) < len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def test_drafts_are_the_text_of_plain_decoding(model: TokenModel) -> None:
    prompt = model.tokens(SOURCE[3000:3600])
    plain = generate(model, prompt, 20, NgramTable(), nodes=0, adapt=0.0, chain=True)
    table = NgramTable.build([model.tokens(SOURCE[:3000]), prompt])
    drafted = generate(model, prompt, 20, table, nodes=5, adapt=1.0, chain=True)
    assert plain.forwards == 20 and drafted.tokens == plain.tokens
    assert drafted.forwards < 20
