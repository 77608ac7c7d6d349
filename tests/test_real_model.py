# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M through pycore's attention and caches; skipped where `python examples/smollm2.py` has not put it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

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
]
SINKS, WINDOW = 4, 64


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Any, Any]]:
    from pycore.integrations.transformers import register

    register("real_lambda", sink_size=SINKS, window_size=WINDOW)
    register("real_wide", sink_size=SINKS, window_size=1024)
    register("real_causal", window_size=None)
    yield smollm2.load()


@pytest.fixture(scope="module")
def text(loaded: tuple[Any, Any]) -> torch.Tensor:
    return smollm2.texts(smollm2.encoder(loaded[1]), 1, 512)[0]


@torch.no_grad()
def losses(model: Any, attention: str, ids: torch.Tensor, cache: Any = None, chunk: int = 512) -> torch.Tensor:
    """Nats of each token but the first."""
    model.set_attn_implementation(attention)
    parts = [model(part, past_key_values=cache).logits for part in ids.split(chunk, 1)]
    return torch.nn.functional.cross_entropy(torch.cat(parts, 1)[0, :-1], ids[0, 1:], reduction="none")


def test_it_is_the_trained_model(loaded: tuple[Any, Any], text: torch.Tensor) -> None:
    """A model with shuffled rows or another rotation reads Python at 6 nats and more."""
    assert losses(loaded[0], "sdpa", text).mean() < 3


def test_within_the_window_it_is_the_models_own_attention(loaded: tuple[Any, Any], text: torch.Tensor) -> None:
    model, _ = loaded
    plain = losses(model, "sdpa", text)
    torch.testing.assert_close(losses(model, "real_wide", text), plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(losses(model, "real_causal", text), plain, rtol=1e-3, atol=1e-3)


def test_lambda_cache_has_the_bits_of_a_full_one(loaded: tuple[Any, Any], text: torch.Tensor) -> None:
    from transformers import DynamicCache

    from pycore.integrations.transformers import LambdaCache

    model, _ = loaded
    kept = losses(model, "real_lambda", text, LambdaCache(SINKS, WINDOW), 100)
    whole = losses(model, "real_lambda", text, DynamicCache(config=model.config), 100)
    assert torch.equal(kept, whole)
    # Past the window it reads on, a little worse than with everything.
    assert 0 < (kept - losses(model, "sdpa", text))[WINDOW + SINKS :].mean() < 0.7


def test_staircase_keeps_what_matters(loaded: tuple[Any, Any], text: torch.Tensor) -> None:
    from pycore import Staircase
    from pycore.integrations.transformers import StaircaseCache

    model, _ = loaded
    cache = StaircaseCache(model.config, Staircase((16, 8, 4)))
    difference = losses(model, "real_causal", text, cache, 128).mean() - losses(model, "sdpa", text).mean()
    assert abs(difference) < 0.02
    assert cache.nbytes < 0.8 * 512 * 30 * 2 * 3 * 64 * 4  # float32 of 30 layers with 3 key heads of 64


def test_greedy_answers_agree(loaded: tuple[Any, Any]) -> None:
    from pycore.integrations.transformers import LambdaCache

    model, tokenizer = loaded
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    said = []
    for attention, cache in (("sdpa", None), ("real_wide", LambdaCache(SINKS, 1024))):
        model.set_attn_implementation(attention)
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
        said.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))
    assert said[0] == said[1] and "Paris" in said[0]
