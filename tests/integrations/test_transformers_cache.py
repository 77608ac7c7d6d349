# SPDX-License-Identifier: Apache-2.0
"""LambdaCache: the bits of a full cache at constant size, and everything that `generate` does with a cache.

A model's own matrix products depend on the shape of what they multiply, so bits are compared between runs in the same
chunks, where the attention is all that differs.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from pycore.integrations.transformers import LambdaCache, register
from tests.support.tiny_models import KINDS, PAD, SINKS, SLIDING, WINDOW, logits, tiny, tokens, use
from tests.support.tolerance import assert_as_accurate

LENGTH = 100
# No token ends a text; transformers 4's prompt lookup needs one that would.
GREEDY: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": PAD, "eos_token_id": PAD + 1}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register("lam", sink_size=SINKS, window_size=WINDOW)
    register("lam_farther", sink_size=SINKS, window_size=WINDOW, distance_limit=WINDOW + 5)
    register("lam_kept", sink_size=SINKS, window_size=WINDOW, limit_distances=False)


def chunks(*ends: int) -> list[slice]:
    return [slice(a, b) for a, b in zip((0, *ends), ends, strict=False)]


CHUNKS = {
    "whole": chunks(LENGTH),
    "steps": chunks(*range(1, LENGTH + 1)),
    "chunks, then steps": chunks(17, 50, 58, *range(59, LENGTH + 1)),
}


def in_chunks(model: Any, cache: Any, ids: torch.Tensor, parts: list[slice], mask: torch.Tensor | None = None) -> Any:
    """Logits of ids, part by part, as generate counts positions."""
    out = []
    for part in parts:
        inputs: dict[str, Any] = {}
        if mask is not None:
            seen = mask[:, : part.stop]
            inputs = {"attention_mask": seen, "position_ids": (seen.cumsum(-1) - 1).clamp(min=0)[:, part]}
        out.append(logits(model, ids[:, part], past_key_values=cache, use_cache=True, **inputs))
    return torch.cat(out, 1)


@pytest.mark.parametrize(
    "name, parts",
    [*(("lam", parts) for parts in CHUNKS), ("lam_farther", "chunks, then steps"), ("lam_kept", "chunks, then steps")],
)
@pytest.mark.parametrize("model_type", KINDS)
def test_bits_of_a_full_cache(model_type: str, name: str, parts: str) -> None:
    model, ids = use(tiny(model_type), name), tokens(2, LENGTH)
    full = in_chunks(model, DynamicCache(), ids, CHUNKS[parts])
    assert torch.equal(in_chunks(model, LambdaCache(SINKS, WINDOW), ids, CHUNKS[parts]), full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_bits_of_a_full_cache_in_other_dtypes(model_type: str, dtype: torch.dtype) -> None:
    model, ids = use(tiny(model_type, dtype=dtype), "lam"), tokens(2, LENGTH)
    parts = CHUNKS["chunks, then steps"]
    full = in_chunks(model, DynamicCache(), ids, parts)
    assert torch.equal(in_chunks(model, LambdaCache(SINKS, WINDOW), ids, parts), full)


@pytest.mark.parametrize("parts", CHUNKS)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss", "cohere"])
def test_padding(model_type: str, parts: str) -> None:
    """On the left, across the chunks; the bits of a full cache, and the row alone as near as it is to the truth."""
    ids, mask = tokens(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.int64)
    mask[0, :7], mask[1, :53] = 0, 0
    model, double = use(tiny(model_type), "lam"), use(tiny(model_type, dtype=torch.float64), "lam")
    padded = in_chunks(model, LambdaCache(SINKS, WINDOW), ids, CHUNKS[parts], mask)
    valid = mask.bool()
    assert torch.equal(padded[valid], in_chunks(model, DynamicCache(), ids, CHUNKS[parts], mask)[valid])
    for row in range(3):
        alone = ids[row : row + 1, valid[row]]
        assert_as_accurate(padded[row, valid[row]], logits(double, alone)[0], logits(model, alone)[0], f"row {row}")


# ---- generate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", KINDS)
def test_generate(model_type: str) -> None:
    model, ids = use(tiny(model_type), "lam"), tokens(2, 30)
    assert torch.equal(
        model.generate(ids, **GREEDY, past_key_values=LambdaCache(SINKS, WINDOW)),
        model.generate(ids, **GREEDY, past_key_values=DynamicCache()),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_return_sequences": 3, "do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"prefill_chunk_size": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_ways_to_generate(model_type: str, options: dict[str, Any]) -> None:
    model, ids = use(tiny(model_type), "lam"), tokens(2, 30)

    def generate(cache: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(ids, **(GREEDY | options), past_key_values=cache)

    assert torch.equal(generate(LambdaCache(SINKS, WINDOW)), generate(DynamicCache()))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("way", ["assisted", "prompt lookup"])
def test_speculative_decoding(model_type: str, way: str) -> None:
    """Candidates are taken back through the rollback; the tokens are those of greedy decoding."""
    model, ids = use(tiny(model_type), "lam"), tokens(1, 10).repeat(1, 3)
    draft = use(tiny(model_type), "lam")
    with torch.no_grad():
        for parameter in draft.parameters():  # right often, and not always
            parameter.add_(0.02 * torch.randn_like(parameter))
    draft.generation_config.num_assistant_tokens = 5
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    options = {"assistant_model": draft} if way == "assisted" else {"prompt_lookup_num_tokens": 5}
    taken_back = []

    class Watched(LambdaCache):
        def crop(self, length: int) -> None:
            before = self.get_seq_length()
            super().crop(length)
            taken_back.append(before - self.get_seq_length())

    cache = Watched(SINKS, WINDOW, rollback=6)
    assert torch.equal(model.generate(ids, **GREEDY, **options, past_key_values=cache), model.generate(ids, **GREEDY))
    assert max(taken_back) > 0


def test_left_padded_batch() -> None:
    model, double = use(tiny("llama"), "lam"), use(tiny("llama", dtype=torch.float64), "lam")
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :13] = 0
    together = model.generate(ids, attention_mask=mask, **GREEDY, past_key_values=LambdaCache(SINKS, WINDOW))
    assert torch.equal(together[1:], double.generate(ids[1:], **GREEDY))
    assert torch.equal(together[:1, 13:], double.generate(ids[:1, 13:], **GREEDY))


def test_second_turn() -> None:
    """A conversation goes on in the same cache: the whole text again, or what is new, with a mask of it all."""
    model = use(tiny("llama"), "lam")
    first, second = tokens(1, 30), tokens(1, 25)
    caches = [LambdaCache(SINKS, WINDOW), DynamicCache()]
    said = [model.generate(first, **GREEDY, past_key_values=cache) for cache in caches]
    assert torch.equal(*said)
    text = torch.cat([said[0], second], 1)
    again = [model.generate(text, **GREEDY, past_key_values=cache) for cache in caches]
    assert torch.equal(*again)
    assert torch.equal(again[0], use(tiny("llama", dtype=torch.float64), "lam").generate(text, **GREEDY))
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == again[0].shape[1] - 1


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_constant_memory(model_type: str) -> None:
    """Whatever has been seen. Keys and values, of layers, batch, heads: sinks and a ring, both of whole tiles of 64."""
    model, cache = use(tiny(model_type), "lam"), LambdaCache(SINKS, WINDOW)
    sizes = []
    for length in (20, 600):
        model.generate(tokens(2, 5), **(GREEDY | {"max_new_tokens": length}), past_key_values=cache)
        sizes.append(cache.nbytes)
        cache.reset()
        assert cache.nbytes == 0 and cache.get_seq_length() == 0
    sinks = {"llama": 2, "gpt_oss": 1}[model_type]  # a sliding layer has none
    assert sizes == [2 * 4 * 2 * 2 * 16 * 64 * (sinks + 2)] * 2
    assert max(WINDOW, SLIDING) <= 64 and SINKS <= 64


def test_half_precision_takes_half_the_memory() -> None:
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        cache = LambdaCache(SINKS, WINDOW)
        logits(use(tiny("llama", dtype=dtype), "lam"), tokens(1, 200), past_key_values=cache)
        logits(use(tiny("llama", dtype=dtype), "lam"), tokens(1, 1), past_key_values=cache)
        sizes.append(cache.nbytes)
    assert sizes[0] == 2 * sizes[1] > 0


# ---- rows and tokens by hand ---------------------------------------------------------------------------------------


def filled(model: Any, ids: torch.Tensor, rollback: int = 0) -> LambdaCache:
    cache = LambdaCache(SINKS, WINDOW, rollback)
    in_chunks(model, cache, ids, chunks(17, ids.shape[1]))
    return cache


def test_crop() -> None:
    """What was taken back leaves no trace."""
    model, ids = use(tiny("gpt_oss"), "lam"), tokens(2, LENGTH)
    cache, other = filled(model, ids[:, :60], rollback=9), filled(model, ids[:, :60], rollback=9)
    logits(model, tokens(2, 9), past_key_values=cache)
    cache.crop(-9)
    assert cache.get_seq_length() == 60
    rest = chunks(7, 40)
    assert torch.equal(in_chunks(model, cache, ids[:, 60:], rest), in_chunks(model, other, ids[:, 60:], rest))


@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "reset"])
def test_positions_are_counted_anew(change: str) -> None:
    """A step trusts the ids of the pass before it; not after rows or tokens have changed."""
    model, ids = use(tiny("llama"), "lam"), tokens(2, 60)
    cache = filled(model, ids[:, :40], rollback=9)
    logits(model, ids[:, 40:41], past_key_values=cache)
    if change == "crop":
        cache.crop(-3)
    elif change == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
    elif change == "repeat":
        cache.batch_repeat_interleave(2)
    else:
        cache.reset()
        logits(model, ids[:, :41], past_key_values=cache)
    seen = cache.get_seq_length()
    rows = 4 if change == "repeat" else 2
    next_ids = tokens(rows, 1)
    before = copy.deepcopy(cache)
    for wrong in (seen + 1, seen - 1):
        with pytest.raises(ValueError, match="position_ids do not go on where past_key_values ends"):
            logits(model, next_ids, past_key_values=cache, position_ids=torch.full((rows, 1), wrong))
    right = logits(model, next_ids, past_key_values=cache, position_ids=torch.full((rows, 1), seen))
    assert torch.equal(right, logits(model, next_ids, past_key_values=before))
    with pytest.raises(ValueError, match="position_ids do not go on where past_key_values ends"):
        logits(model, next_ids, past_key_values=cache, position_ids=torch.full((rows, 1), seen))


def test_crop_to_a_length() -> None:
    """As transformers 4 asks for it."""
    model, ids = use(tiny("llama"), "lam"), tokens(1, 30)
    cache = filled(model, ids, rollback=5)
    cache.crop(27)
    assert cache.get_seq_length() == 27
    cache.crop(27)
    cache.crop(40)
    assert cache.get_seq_length() == 27


@pytest.mark.parametrize("what", ["reorder", "select", "repeat", "copy"])
def test_rows(what: str) -> None:
    model, ids = use(tiny("llama"), "lam"), tokens(3, 60)
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


def test_reset() -> None:
    """A used cache starts anew, with another batch."""
    model = use(tiny("llama"), "lam")
    cache = filled(model, tokens(3, 60))
    cache.reset()
    ids = tokens(2, 40)
    parts = chunks(11, 40)
    assert torch.equal(in_chunks(model, cache, ids, parts), in_chunks(model, LambdaCache(SINKS, WINDOW), ids, parts))


def test_a_failed_call_can_be_repeated() -> None:
    """An argument that is refused leaves the cache as it was."""
    model, ids = use(tiny("llama"), "lam"), tokens(2, 40)
    cache = filled(model, ids[:, :30])
    with pytest.raises(ValueError, match="packed sequences"):
        logits(model, ids[:, 30:], past_key_values=cache, position_ids=torch.arange(10)[None] % 5)
    assert cache.get_seq_length() == 30
    expected = logits(model, ids[:, 30:], past_key_values=filled(model, ids[:, :30]))
    assert torch.equal(logits(model, ids[:, 30:], past_key_values=cache), expected)


@pytest.mark.parametrize("seen", [0, 30])
def test_what_attention_refuses_is_not_in_the_cache(seen: int) -> None:
    model, ids = use(tiny("llama", layers=1), "lam"), tokens(2, 40)
    cache = LambdaCache(SINKS, WINDOW)
    if seen:
        logits(model, ids[:, :seen], past_key_values=cache)
    attention = model.model.layers[0].self_attn
    attention.scaling, scaling = float("nan"), attention.scaling
    for _ in range(2):
        with pytest.raises(ValueError, match="scale is nan"):
            logits(model, ids[:, seen:], past_key_values=cache)
        assert cache.get_seq_length() == seen
    attention.scaling = scaling
    expected = logits(model, ids)[:, seen:]
    torch.testing.assert_close(logits(model, ids[:, seen:], past_key_values=cache), expected, rtol=0, atol=1e-4)


def test_another_attention_leaves_the_cache_usable() -> None:
    model, ids = use(tiny("llama"), "sdpa"), tokens(2, 40)
    cache = LambdaCache(SINKS, WINDOW)
    with pytest.raises(ValueError, match="attn_implementation is one that does not read this cache"):
        logits(model, ids, past_key_values=cache)
    expected = logits(use(model, "lam"), ids)
    assert torch.equal(logits(model, ids, past_key_values=cache), expected)


def test_repeats_that_are_refused() -> None:
    model = use(tiny("llama"), "lam")
    cache = filled(model, tokens(3, 60))
    with pytest.raises(ValueError, match="repeats is 0 and must be at least 1"):
        cache.batch_repeat_interleave(0)
    expected = logits(model, tokens(3, 5), past_key_values=filled(model, tokens(3, 60)))
    assert torch.equal(logits(model, tokens(3, 5), past_key_values=cache), expected)
