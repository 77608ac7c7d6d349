# SPDX-License-Identifier: Apache-2.0
"""KVCache in transformers: the bits of a DynamicCache, and everything that `generate` does with a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from pycore.integrations.transformers import KVCache, LambdaCache, StaircaseCache, register, same_bits
from pycore.integrations.transformers import register_probabilistic as probabilistic
from pycore.schedules import Geometric
from tests.support.tiny_models import KINDS, SINKS, WINDOW, logits, tiny, tokens, use

from .test_transformers_cache import CHUNKS, GREEDY, LENGTH, chunks, in_chunks

NAMES = ["kv_causal", "kv_lambda", "kv_kept"]


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register("kv_causal", window_size=None)
    register("kv_lambda", sink_size=SINKS, window_size=WINDOW)
    register("kv_kept", sink_size=SINKS, window_size=WINDOW, limit_distances=False)


@pytest.mark.parametrize("parts", CHUNKS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model_type", KINDS)
def test_bits_of_a_dynamic_cache(model_type: str, name: str, parts: str) -> None:
    model, ids = use(tiny(model_type), name), tokens(2, LENGTH)
    full = in_chunks(model, DynamicCache(), ids, CHUNKS[parts])
    assert torch.equal(in_chunks(model, KVCache(), ids, CHUNKS[parts]), full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["kv_causal", "kv_lambda"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    model, ids = use(tiny("llama", dtype=dtype), name), tokens(2, LENGTH)
    parts = CHUNKS["chunks, then steps"]
    full = in_chunks(model, DynamicCache(), ids, parts)
    assert torch.equal(in_chunks(model, KVCache(capacity=LENGTH), ids, parts), full)


@pytest.mark.parametrize("name", ["kv_causal", "kv_lambda"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss"])
def test_padding(model_type: str, name: str) -> None:
    ids, mask = tokens(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.int64)
    mask[0, :7], mask[1, :53] = 0, 0
    model, parts, valid = use(tiny(model_type), name), CHUNKS["chunks, then steps"], mask.bool()
    full = in_chunks(model, DynamicCache(), ids, parts, mask)
    assert torch.equal(in_chunks(model, KVCache(), ids, parts, mask)[valid], full[valid])


@pytest.mark.parametrize(
    "options",
    [
        {}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"prefill_chunk_size": 7},
        {"num_return_sequences": 3, "do_sample": True},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_generate(model_type: str, options: dict[str, Any]) -> None:
    model, ids = use(tiny(model_type), "kv_causal"), tokens(2, 30)

    def generate(cache: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(ids, **(GREEDY | options), past_key_values=cache)

    assert torch.equal(generate(KVCache()), generate(DynamicCache()))


@pytest.mark.parametrize("way", ["assisted", "prompt lookup"])
def test_speculative_decoding(way: str) -> None:
    model, draft, ids = use(tiny("llama"), "kv_causal"), use(tiny("llama"), "kv_causal"), tokens(1, 10).repeat(1, 3)
    with torch.no_grad():
        for parameter in draft.parameters():  # right often, and not always
            parameter.add_(0.02 * torch.randn_like(parameter))
    options = {"assistant_model": draft} if way == "assisted" else {"prompt_lookup_num_tokens": 5}
    taken_back = []

    class Watched(KVCache):
        def crop(self, length: int) -> None:
            before = self.get_seq_length()
            super().crop(length)
            taken_back.append(before - self.get_seq_length())

    cache = Watched()
    assert torch.equal(model.generate(ids, **GREEDY, **options, past_key_values=cache), model.generate(ids, **GREEDY))
    assert max(taken_back) > 0


def filled(model: Any, ids: torch.Tensor) -> KVCache:
    cache = KVCache()
    in_chunks(model, cache, ids, chunks(17, ids.shape[1]))
    return cache


@pytest.mark.parametrize("name", ["kv_causal", "kv_lambda"])
def test_crop(name: str) -> None:
    model, ids = use(tiny("llama"), name), tokens(2, LENGTH)
    cache, other = filled(model, ids[:, :60]), filled(model, ids[:, :60])
    logits(model, tokens(2, 29), past_key_values=cache)
    cache.crop(-29)
    assert cache.get_seq_length() == 60
    rest = chunks(7, 40)
    assert torch.equal(in_chunks(model, cache, ids[:, 60:], rest), in_chunks(model, other, ids[:, 60:], rest))


@pytest.mark.parametrize("what", ["reorder", "select", "repeat", "copy"])
def test_rows(what: str) -> None:
    model, ids = use(tiny("llama"), "kv_lambda"), tokens(3, 60)
    cache = filled(model, ids)
    rows = {"reorder": [2, 0, 0], "select": [1], "repeat": [0, 0, 1, 1, 2, 2], "copy": [0, 1, 2]}[what]
    index = torch.tensor(rows)
    if what == "reorder":
        cache.reorder_cache(index)
    elif what == "select":
        cache.batch_select_indices(index)
    elif what == "repeat":
        cache.batch_repeat_interleave(2)
    else:
        other, cache = cache, copy.deepcopy(cache)
        logits(model, tokens(3, 5), past_key_values=other)
    new = tokens(len(rows), 9)
    expected = in_chunks(model, filled(model, ids[index]), new, chunks(3, 9))
    assert torch.equal(in_chunks(model, cache, new, chunks(3, 9)), expected)


def test_memory() -> None:
    """Keys and values, of layers, batch, heads, whole tiles of 64; nothing after a reset, which takes another batch."""
    model, cache = use(tiny("llama"), "kv_causal"), KVCache()
    logits(model, tokens(2, 65), past_key_values=cache)
    layers, heads, dim = (getattr(model.config, x) for x in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    assert cache.nbytes == 2 * layers * 2 * heads * dim * 4 * 128
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    ids = tokens(3, 40)
    expected = in_chunks(model, KVCache(), ids, chunks(11, 40))
    assert torch.equal(in_chunks(model, cache, ids, chunks(11, 40)), expected)


def test_another_window_over_the_same_tokens() -> None:
    """Every token is there, so any window may be asked for; not un-rotated keys where rotated ones are kept."""
    model, ids = use(tiny("llama"), "kv_kept"), tokens(2, 60)
    cache, full = KVCache(), DynamicCache()
    for each in (cache, full):
        logits(model, ids[:, :50], past_key_values=each)
    use(model, "kv_causal")
    assert torch.equal(
        logits(model, ids[:, 50:], past_key_values=cache), logits(model, ids[:, 50:], past_key_values=full)
    )
    with pytest.raises(ValueError, match="filled without a limit of distances and must not be used with one"):
        logits(use(model, "kv_lambda"), ids, past_key_values=cache)
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3"])
def test_same_bits(model_type: str) -> None:
    model, ids = same_bits(tiny(model_type)), tokens(2, LENGTH)
    for parts in CHUNKS.values():
        assert torch.equal(in_chunks(model, KVCache(), ids, parts), logits(model, ids))


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_capacity() -> None:
    with pytest.raises(ValueError, match="KVCache: capacity is 0 and must be at least 1"):
        KVCache(0)
    with pytest.raises(TypeError, match="KVCache: capacity is a str and must be an int"):
        KVCache("many")  # type: ignore[arg-type]
    model, cache = use(tiny("llama"), "kv_causal"), KVCache(50)
    logits(model, tokens(1, 50), past_key_values=cache)
    with pytest.raises(ValueError, match="with which a row would have 51, and must leave it with at most 50"):
        logits(model, tokens(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == 50


def test_attention_that_does_not_read_it() -> None:
    model, ids, cache = use(tiny("llama"), "sdpa"), tokens(2, 40), KVCache()
    with pytest.raises(ValueError, match="KVCache: attn_implementation is one that does not read this cache"):
        logits(model, ids, past_key_values=cache)
    probabilistic("kv_drawn", distance_probs=Geometric(0.5))
    with pytest.raises(ValueError, match="past_key_values is a KVCache and must be a cache of transformers' own"):
        logits(use(model, "kv_drawn"), ids, past_key_values=KVCache())
    register("kv_middle", sink_size=SINKS, window_size=WINDOW, middle_topk=2)
    with pytest.raises(ValueError, match="middle_topk is 2 and must be 0 with a KVCache, which does not choose tokens"):
        logits(use(model, "kv_middle"), ids[:, :1], past_key_values=KVCache())
    expected = logits(use(model, "kv_causal"), ids)
    assert torch.equal(logits(model, ids, past_key_values=cache), expected)


# ---- compiled code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["KVCache", "LambdaCache", "StaircaseCache"])
def test_compiled_steps_have_the_same_bits(cache: str) -> None:
    """Steps of compiled code, of a model with the same bits, are what one pass in eager mode says."""
    model, ids = same_bits(use(tiny("llama"), "kv_lambda" if cache == "LambdaCache" else "kv_causal")), tokens(2, 24)
    made: Any = {
        "KVCache": KVCache, "LambdaCache": lambda: LambdaCache(SINKS, WINDOW),
        "StaircaseCache": lambda: StaircaseCache(model.config),
    }[cache]()  # fmt: skip
    whole = logits(model, ids)
    out = [logits(model, ids[:, :9], past_key_values=made)]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for i in range(9, 24):
            out.append(compiled(ids[:, i : i + 1], past_key_values=made).logits)
    assert torch.equal(torch.cat(out, 1), whole)
