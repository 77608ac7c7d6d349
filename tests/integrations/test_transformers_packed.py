# SPDX-License-Identifier: Apache-2.0
"""Packed texts: `position_ids` that begin again within a row. Each text gets what it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from pycore.integrations.transformers import register, register_probabilistic
from pycore.schedules import Constant
from tests.support.tiny_models import KINDS, SINKS, WINDOW, logits, tiny, tokens, use
from tests.support.tolerance import assert_model_as_accurate

TEXTS = [[23, 1, 16], [40], [1, 1, 38], [12, 28]]  # the lengths of each row's
LENGTH = 40
# Models that do not hand their position ids to their attention.
UNTOLD: dict[str, dict[str, Any]] = {
    "ctrl": {"n_embd": 64, "dff": 96, "n_layer": 2, "n_head": 4},
    "gpt_bigcode": {"n_embd": 64, "n_head": 4, "n_layer": 2},
    "persimmon": {"num_key_value_heads": 4},
    "moshi": {"num_key_value_heads": 4, "num_codebooks": 2, "audio_vocab_size": 32},
}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register("lam", sink_size=SINKS, window_size=WINDOW)
    register("lam_kept", sink_size=SINKS, window_size=WINDOW, limit_distances=False)


@pytest.fixture
def no_dynamo_state() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packed(texts: list[list[int]] = TEXTS) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and position ids."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in texts])
    return tokens(len(texts), LENGTH), positions


def one_by_one(model: Any, ids: torch.Tensor, texts: list[list[int]] = TEXTS) -> torch.Tensor:
    rows = []
    for row, lengths in zip(ids, texts, strict=True):
        rows.append(torch.cat([logits(model, text[None])[0] for text in row.split(lengths)]))
    return torch.stack(rows)


def ways(model: Any) -> dict[str, dict[str, Any]]:
    return {
        "no cache": {"use_cache": False},
        "cache": {},
        "mask": {"attention_mask": torch.ones(4, LENGTH, dtype=torch.int64)},
        "mask, no cache": {"attention_mask": torch.ones(4, LENGTH, dtype=torch.int64), "use_cache": False},
        "dynamic cache": {"past_key_values": DynamicCache(config=model.config)},
        "static cache": {"past_key_values": StaticCache(config=model.config, max_cache_len=LENGTH + 9)},
    }


@pytest.mark.parametrize("way", ways(tiny("llama")))
@pytest.mark.parametrize("name", ["lam", "lam_kept"])
@pytest.mark.parametrize("model_type", KINDS)
def test_each_text_as_if_alone(model_type: str, name: str, way: str) -> None:
    """Rows of their own packing, sinks and the window inside each text, also in layers that slide."""
    ids, positions = packed()
    double, model = use(tiny(model_type, dtype=torch.float64), name), use(tiny(model_type), name)
    exact, plain = one_by_one(double, ids), one_by_one(model, ids)
    actual = logits(model, ids, position_ids=positions, **ways(model)[way])
    assert_model_as_accurate(actual, exact, plain)


def untold(model_type: str) -> Any:
    model = use(tiny(model_type, **UNTOLD[model_type]), "lam_kept")
    try:
        logits(model, tokens(1, 3))
    except ValueError as error:  # transformers 4's old models
        assert "must be the 2-D mask of padding" in str(error)
        pytest.skip(f"{model_type} makes a mask of queries by keys by itself")
    return model


@pytest.mark.parametrize("way", ["no cache", "cache", "mask", "mask, no cache"])
@pytest.mark.parametrize("model_type", UNTOLD)
def test_models_that_do_not_hand_on_position_ids(model_type: str, way: str) -> None:
    ids, positions = packed()
    model = untold(model_type)
    expected = one_by_one(model, ids)
    actual = logits(model, ids, position_ids=positions, **ways(model)[way])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    apart = logits(model, ids) - expected
    assert apart.abs().max() > 1e-2  # what mixing them would give


@pytest.mark.parametrize("name", ["lam", "lam_kept"])
def test_one_row_of_positions_for_all(name: str) -> None:
    ids, positions = packed([[23, 1, 16]] * 4)
    model = use(tiny("llama"), name)
    expected = one_by_one(model, ids, [[23, 1, 16]] * 4)
    for inputs in ways(model).values():
        actual = logits(model, ids, position_ids=positions[:1], **inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["lam", "lam_kept"])
def test_padding_beside_packed_texts(name: str, side: str) -> None:
    ids, positions = packed()
    mask = torch.ones_like(ids)
    place = slice(0, 5) if side == "left" else slice(LENGTH - 5, LENGTH)
    mask[1:3, place], positions[1:3, place] = 0, 0
    if side == "left":  # what is left of the texts begins anew
        positions[1, 5:] = torch.arange(LENGTH - 5)
        positions[2, 5:] = torch.arange(LENGTH - 5)
    model = use(tiny("llama"), name)
    actual = logits(model, ids, position_ids=positions, attention_mask=mask)
    for b, row in enumerate(TEXTS):
        lengths = row if b in (0, 3) else [35] if side == "left" else [35] if b == 1 else [1, 1, 33]
        valid = mask[b].bool()
        expected = one_by_one(model, ids[b : b + 1, valid], [lengths])
        torch.testing.assert_close(actual[b : b + 1, valid], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt_bigcode"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(model_type: str, checkpointing: bool) -> None:
    """Those of the texts one by one, together; also where the backward pass computes again."""
    ids, positions = packed()
    model = untold(model_type) if model_type in UNTOLD else use(tiny(model_type), "lam")

    def gradients(out: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        out.log_softmax(-1)[..., 5].sum().backward()
        return {n: x.grad.clone() for n, x in model.named_parameters() if x.grad is not None}

    texts = [model(text[None]).logits[0] for row, n in zip(ids, TEXTS, strict=True) for text in row.split(n)]
    expected = gradients(torch.cat(texts))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attn_dropout") and isinstance(module.attn_dropout, float):
                module.attn_dropout = 0.0
    actual = gradients(model(ids, position_ids=positions, use_cache=False).logits)
    assert actual.keys() == expected.keys()
    for key, x in expected.items():
        torch.testing.assert_close(actual[key], x, rtol=1e-3, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize("model_type, name", [("llama", "lam"), ("gemma2", "lam_kept")])
def test_compiled(model_type: str, name: str, no_dynamo_state: None) -> None:
    """Texts cut otherwise, and rows of one text, run through the same graph."""
    model = use(tiny(model_type, layers=2 if model_type == "gemma2" else 1), name)
    ids, positions = packed()
    logits(model, ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for texts in (TEXTS, [[40]] * 4, [[3, 37], [20, 20], [39, 1], [13, 13, 14]]):
        ids, positions = packed(texts)
        actual = logits(compiled, ids, position_ids=positions, use_cache=False)
        torch.testing.assert_close(actual, one_by_one(model, ids, texts), rtol=1e-4, atol=1e-4)


def test_probabilistic_attention_refuses(no_dynamo_state: None) -> None:
    register_probabilistic("prob", distance_probs=Constant(0.5))
    ids, positions = packed()
    model = use(tiny("llama"), "prob")
    with pytest.raises(ValueError, match="^prob: position_ids jump within a row and must be consecutive: packed "
                       "sequences are not available with probabilistic attention$"):  # fmt: skip
        logits(model, ids, position_ids=positions)
    expected = logits(model, ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = logits(compiled, ids, position_ids=torch.arange(LENGTH).expand(4, -1), use_cache=False)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match="packed sequences are not available"):
        logits(compiled, ids, position_ids=positions, use_cache=False)
