# SPDX-License-Identifier: Apache-2.0
"""A step of decoding like the one before it takes a short way: with the same bits, and only where nothing differs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pycore.integrations.transformers import KVCache, LambdaCache, _attention, register
from tests.support.tiny_models import SINKS, WINDOW, tiny, tokens, use

PROMPT, STEPS = 20, 60
CACHES: dict[str, Callable[[], Any]] = {"step_lam": lambda: LambdaCache(SINKS, WINDOW), "step_causal": KVCache}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register("step_lam", sink_size=SINKS, window_size=WINDOW)
    register("step_causal", window_size=None)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all attention that was looked at as a whole."""
    seen: list[str] = []
    refuse = _attention._refuse
    monkeypatch.setattr(_attention, "_refuse", lambda name, *rest: (seen.append(name), refuse(name, *rest)))
    return seen


def forget(cache: Any) -> None:
    for layer in cache.layers:
        layer.step = None


def step(model: Any, cache: Any, ids: torch.Tensor, at: int, **kwargs: Any) -> torch.Tensor:
    return model(ids[:, at : at + 1], past_key_values=cache, **kwargs).logits


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "gpt_oss", "cohere", "qwen3"])
def test_bits_of_steps_that_look(model_type: str, name: str, inference: bool) -> None:
    model, ids = use(tiny(model_type), name), tokens(2, PROMPT + STEPS)
    with torch.inference_mode() if inference else torch.no_grad():
        short, long = CACHES[name](), CACHES[name]()
        for cache in (short, long):
            model(ids[:, :PROMPT], past_key_values=cache)
        for at in range(PROMPT, PROMPT + STEPS):
            forget(long)
            assert torch.equal(step(model, short, ids, at), step(model, long, ids, at))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", CACHES)
def test_no_step_looks_twice(name: str, inference: bool, looks: list[str]) -> None:
    model, ids = use(tiny("llama"), name), tokens(1, PROMPT + 5)
    with torch.inference_mode() if inference else torch.no_grad():
        cache = CACHES[name]()
        model(ids[:, :PROMPT], past_key_values=cache)
        step(model, cache, ids, PROMPT)
        looks.clear()
        for at in range(PROMPT + 1, PROMPT + 5):
            step(model, cache, ids, at)
        assert looks == []
        forget(cache)
        step(model, cache, ids, PROMPT + 4)
        assert looks == [name] * len(model.model.layers)


def test_steps_that_learn_look(looks: list[str]) -> None:
    model, ids = use(tiny("llama"), "step_lam"), tokens(1, PROMPT + 3)
    cache = LambdaCache(SINKS, WINDOW)
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        step(model, cache, ids, PROMPT)
    looks.clear()
    assert step(model, cache, ids, PROMPT + 1).requires_grad
    assert len(looks) == len(model.model.layers)


def _turned(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.9)


def _rescaled(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2


def _registered(model: Any) -> None:
    register("step_lam", sink_size=SINKS, window_size=WINDOW, distance_limit=WINDOW + 3)
    model.set_attn_implementation("step_lam")


@pytest.mark.parametrize("change", [_turned, _rescaled, _registered])
@torch.no_grad()
def test_what_changes_between_steps_is_seen(change: Callable[[Any], None]) -> None:
    model, ids = use(tiny("llama"), "step_lam"), tokens(1, PROMPT + 8)
    short, long = LambdaCache(SINKS, WINDOW), LambdaCache(SINKS, WINDOW)
    for cache in (short, long):
        model(ids[:, :PROMPT], past_key_values=cache)
    for at in range(PROMPT, PROMPT + 4):
        forget(long)
        assert torch.equal(step(model, short, ids, at), step(model, long, ids, at))
    before = step(model, copy.deepcopy(short), ids, PROMPT + 4)
    try:
        change(model)
        for at in range(PROMPT + 4, PROMPT + 8):
            forget(long)
            now = step(model, short, ids, at)
            assert at > PROMPT + 4 or not torch.equal(now, before) or change is _registered
            assert torch.equal(now, step(model, long, ids, at))
    finally:
        register("step_lam", sink_size=SINKS, window_size=WINDOW)


@torch.no_grad()
def test_what_is_refused_is_refused_after_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = use(tiny("llama"), "step_lam"), tokens(1, PROMPT + 6)
    cache = LambdaCache(SINKS, WINDOW)
    model(ids[:, :PROMPT], past_key_values=cache)
    for at in (PROMPT, PROMPT + 1):
        step(model, cache, ids, at)
    with pytest.raises(ValueError, match="do not go on where past_key_values ends"):
        step(model, cache, ids, PROMPT + 2, position_ids=torch.tensor([[PROMPT + 7]]))
    reused = torch.tensor([[PROMPT + 2]])
    step(model, cache, ids, PROMPT + 2, position_ids=reused)
    with pytest.raises(ValueError, match="do not go on where past_key_values ends"):
        step(model, cache, ids, PROMPT + 3, position_ids=reused)
    expected = step(model, copy.deepcopy(cache), ids, PROMPT + 3)
    assert torch.equal(step(model, cache, ids, PROMPT + 3, position_ids=reused.add_(1)), expected)
    monkeypatch.setitem(model.config.__dict__, "_output_attentions", True)
    with pytest.raises(ValueError, match="output_attentions is True"):
        step(model, cache, ids, PROMPT + 4)


@torch.no_grad()
def test_padding_that_comes_and_goes() -> None:
    """A mask with padding takes the long way, and one without it the short one."""
    model, ids = use(tiny("llama"), "step_lam"), tokens(2, PROMPT + 4)
    ids[0, :7] = 0
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    short, long = LambdaCache(SINKS, WINDOW), LambdaCache(SINKS, WINDOW)
    for cache in (short, long):
        model(ids[:, :PROMPT], past_key_values=cache, attention_mask=mask[:, :PROMPT],
              position_ids=position[:, :PROMPT])  # fmt: skip
    for at in range(PROMPT, PROMPT + 4):
        forget(long)
        inputs = {"attention_mask": mask[:, : at + 1], "position_ids": position[:, at : at + 1]}
        assert torch.equal(step(model, short, ids, at, **inputs), step(model, long, ids, at, **inputs))


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_rows_chosen_and_tokens_taken_back_between_steps(name: str) -> None:
    model, ids = use(tiny("llama"), name), tokens(2, PROMPT + 8)
    make = (lambda: LambdaCache(SINKS, WINDOW, rollback=4)) if name == "step_lam" else KVCache
    short, long = make(), make()
    for cache in (short, long):
        model(ids[:, :PROMPT], past_key_values=cache)
        step(model, cache, ids, PROMPT)
        step(model, cache, ids, PROMPT + 1)
        cache.crop(-1)
        step(model, cache, ids, PROMPT + 1)
        cache.reorder_cache(torch.tensor([1, 0]))
    for at in range(PROMPT + 2, PROMPT + 8):
        forget(long)
        assert torch.equal(step(model, short, ids, at), step(model, long, ids, at))
    copied = copy.deepcopy(short)
    assert all(layer.step is None for layer in copied.layers)
    assert torch.equal(step(model, copied, ids, 0), step(model, short, ids, 0))


@torch.no_grad()
def test_a_step_is_not_saved() -> None:
    model, ids = use(tiny("llama"), "step_causal"), tokens(1, PROMPT + 2)
    cache = KVCache()
    model(ids[:, :PROMPT], past_key_values=cache)
    step(model, cache, ids, PROMPT)
    layer = cache.layers[0]
    assert layer.step is not None
    assert pickle.loads(pickle.dumps(layer.step)) is None and copy.deepcopy(layer.step) is None
