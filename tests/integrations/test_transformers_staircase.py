# SPDX-License-Identifier: Apache-2.0
"""StaircaseCache: what a StaircaseKVCache a layer gives by hand, packed and unpacked, and all that `generate` does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from pycore import Staircase, StaircaseKVCache
from pycore.integrations.transformers import StaircaseCache, register
from pycore.schedules import Causal, Lambda
from tests.support.tiny_models import PAD, logits, tiny, tokens, use
from tests.support.tolerance import assert_model_as_accurate

LENGTH = 400
GREEDY: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": PAD, "eos_token_id": PAD + 1}
SMALL: dict[str, Any] = {"step": 64, "sink_size": 3, "group_size": 64, "rollback": 20}
LADDER = Staircase((16, 8, 4), **SMALL)


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register("stairs_causal", window_size=None)
    register("stairs_window", sink_size=3, window_size=100, limit_distances=False)
    register("stairs_limit", sink_size=3, window_size=100)
    AttentionInterface.register("stairs_by_hand", _by_hand)
    AttentionMaskInterface.register("stairs_by_hand", lambda *args, **kwargs: None)


@pytest.fixture
def no_dynamo_state() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class ByHand(DynamicCache):
    """A StaircaseKVCache a layer, and for the model's bookkeeping a full cache; its attention is `_by_hand`."""

    def __init__(self, staircase: Staircase = LADDER, schedule: Any = None) -> None:
        super().__init__()
        self.staircase, self.schedule = staircase, Causal() if schedule is None else schedule
        self.stores: dict[int, StaircaseKVCache] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        batch, heads, _, dim = key.shape
        store = self.stores.setdefault(
            layer_idx,
            StaircaseKVCache(self.staircase, batch=batch, kv_heads=heads, head_dim=dim, dtype=key.dtype),
        )
        store.append(key, value)
        keys, values = super().update(key, value, layer_idx, *args, **kwargs)
        keys.by_hand = (store, self.schedule)
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for store in self.stores.values():
            store.reorder(beam_idx)


def _by_hand(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any) -> Any:
    store, schedule = key.by_hand
    return store.attend(query, schedule=schedule, scale=scaling).transpose(1, 2).contiguous(), None


def in_chunks(model: Any, cache: Any, ids: Tensor, sizes: list[int], mask: Tensor | None = None) -> Tensor:
    out, at = [], 0
    for size in sizes:
        inputs: dict[str, Any] = {}
        if mask is not None:
            seen = mask[:, : at + size]
            inputs = {"attention_mask": seen, "position_ids": (seen.cumsum(-1) - 1).clamp(min=0)[:, at:]}
        out.append(logits(model, ids[:, at : at + size], past_key_values=cache, use_cache=True, **inputs))
        at += size
    return torch.cat(out, 1)


STEPS = [150, *[1] * 100, 50, *[1] * 100]


@pytest.mark.parametrize(
    "name, schedule", [("stairs_causal", None), ("stairs_window", Lambda(3, 100))], ids=["causal", "window"]
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma"])
def test_packed_is_the_loop_by_hand(model_type: str, name: str, schedule: Any) -> None:
    ids = tokens(2, LENGTH)
    by_hand = in_chunks(use(tiny(model_type), "stairs_by_hand"), ByHand(schedule=schedule), ids, STEPS)
    model = use(tiny(model_type), name)
    assert torch.equal(in_chunks(model, StaircaseCache(model.config, LADDER), ids, STEPS), by_hand)
    assert not torch.equal(by_hand, in_chunks(model, DynamicCache(), ids, STEPS)), "something is quantized"


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_is_the_loop_by_hand(beams: int) -> None:
    ids, options = tokens(2, 150), GREEDY | {"num_beams": beams}
    model = use(tiny("llama"), "stairs_by_hand")
    by_hand = model.generate(ids, **options, past_key_values=ByHand())
    model = use(tiny("llama"), "stairs_causal")
    assert torch.equal(model.generate(ids, **options, past_key_values=StaircaseCache(model.config, LADDER)), by_hand)


@pytest.mark.parametrize("name", ["stairs_causal", "sdpa", "eager", "stairs_limit"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
def test_a_ladder_of_16_is_a_full_cache(model_type: str, name: str) -> None:
    """Packed, and unpacked for another attention; layers with a window beside."""
    if name == "sdpa" and model_type != "llama":
        pytest.skip("transformers has no SDPA with softcap or learned sinks")
    ids, sizes = tokens(2, LENGTH), [150, 1, 1, 98, 1, 149]
    model, double = use(tiny(model_type), name), use(tiny(model_type, dtype=torch.float64), name)
    full = in_chunks(model, DynamicCache(config=model.config), ids, sizes)
    cache = StaircaseCache(model.config, Staircase((16,), **SMALL))
    assert_model_as_accurate(in_chunks(model, cache, ids, sizes), logits(double, ids), full, name)


@pytest.mark.parametrize("rotation", [None, "hadamard"])
def test_unpacked_is_packed(rotation: str | None) -> None:
    """A token at a time, another attention computes what the packed one does, within rounding."""
    ladder = Staircase((16, 8, 4), **SMALL, key_rotation=rotation, value_rotation=rotation)
    ids, sizes = tokens(2, 250), [1] * 250
    model = use(tiny("llama"), "stairs_causal")
    packed = in_chunks(model, StaircaseCache(model.config, ladder), ids, sizes)
    full = in_chunks(model, DynamicCache(), ids, sizes)
    use(model, "eager")
    unpacked = in_chunks(model, StaircaseCache(model.config, ladder), ids, sizes)
    error = (unpacked - packed).abs().max()
    assert error < 2e-3 * (full - packed).abs().max(), float(error)


def test_unpacked_chunks_read_as_prefill_full() -> None:
    ids, sizes = tokens(2, LENGTH), [150, 100, 1, 149]
    model = use(tiny("llama"), "stairs_causal")
    packed = in_chunks(model, StaircaseCache(model.config, LADDER, prefill="full"), ids, sizes)
    stairs = in_chunks(model, StaircaseCache(model.config, LADDER), ids, sizes)
    use(model, "eager")
    unpacked = in_chunks(model, StaircaseCache(model.config, LADDER), ids, sizes)
    error = (unpacked - packed).abs().max()
    assert error < 2e-3 * (stairs - packed).abs().max(), float(error)


def test_prefill_in_chunks_is_one_by_one() -> None:
    """The bits of the attention itself, of one layer fed with the same keys, whatever the chunks."""
    model = use(tiny("llama", layers=1), "stairs_causal")
    attention, outs = AttentionInterface()["stairs_causal"], []
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, LENGTH, 16, generator=generator) for heads in (4, 2, 2))
    for sizes in ([LENGTH], [1] * LENGTH, [150, 1, 49, 200]):
        cache, at, parts = StaircaseCache(model.config, LADDER), 0, []
        for size in sizes:
            q, k, v = (x[:, :, at : at + size] for x in (query, key, value))
            parts.append(attention(model.model.layers[0].self_attn, q, *cache.update(k, v, 0), None, scaling=0.25)[0])
            at += size
        outs.append(torch.cat(parts, 1))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_ladders_of_their_own() -> None:
    """The layer that is left alone is as in a full cache."""
    ids = tokens(1, 300)
    model = use(tiny("llama"), "stairs_causal")
    outs = {}
    for name, ladders in {"both": LADDER, "first": [LADDER, None], "second": [None, LADDER]}.items():
        cache = StaircaseCache(model.config, ladders)
        outs[name] = in_chunks(model, cache, ids, [250, *[1] * 50])
        left = {"both": {}, "first": {1: "full_attention"}, "second": {0: "full_attention"}}[name]
        assert cache.left_alone == left
        for i, layer in enumerate(cache.layers):
            assert (layer.keys is not None) == (i in left)
    assert len({tuple(x.flatten().tolist()) for x in outs.values()}) == 3


@pytest.mark.parametrize("name", ["stairs_causal", "eager"])
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_sliding_layers_are_left_alone(model_type: str, name: str) -> None:
    model = use(tiny(model_type), name)
    cache = StaircaseCache(model.config, LADDER)
    model.generate(tokens(2, 200), **GREEDY, past_key_values=cache)
    assert cache.left_alone == {0: "sliding_attention"}
    assert cache.layers[1].store.lengths.tolist() == [229, 229] and cache.get_seq_length() == 229
    assert cache.layers[0].keys.shape[2] < 10


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[LENGTH], [150, 100, *[1] * 150]], ids=["whole", "chunks, then steps"])
def test_left_padding(sizes: list[int]) -> None:
    """Sinks and ages count from a row's first token: a padded row has the bits of the row alone."""
    model = use(tiny("llama", layers=1), "stairs_causal")
    module, attention = model.model.layers[0].self_attn, AttentionInterface()["stairs_causal"]
    spans = AttentionMaskInterface()["stairs_causal"]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, LENGTH, 16, generator=generator) for heads in (4, 2, 2))
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    mask[0, :7], mask[1, :203] = 0, 0
    cache, at, parts = StaircaseCache(model.config, LADDER), 0, []
    for size in sizes:
        new, end = slice(at, at + size), at + size
        told = spans(3, size, end, at, 0, attention_mask=mask[:, :end])
        keys, values = cache.update(key[:, :, new], value[:, :, new], 0)
        parts.append(attention(module, query[:, :, new], keys, values, told, scaling=0.25)[0])
        at = end
    out = torch.cat(parts, 1)
    assert cache.layers[0].store.lengths.tolist() == [393, 197, 400] and cache.get_seq_length() == LENGTH
    for row, start in enumerate((7, 203, 0)):
        q, k, v = (x[row : row + 1, :, start:] for x in (query, key, value))
        alone = attention(module, q, *StaircaseCache(model.config, LADDER).update(k, v, 0), None, scaling=0.25)[0]
        assert torch.equal(out[row, start:], alone[0]), row


def test_padding_and_then_another_attention() -> None:
    """What was kept without its padding is unpacked with it."""
    ids, mask = tokens(2, 220), torch.ones(2, 220, dtype=torch.int64)
    mask[1, :103] = 0
    model = use(tiny("llama"), "stairs_causal")
    cache = StaircaseCache(model.config, LADDER)
    in_chunks(model, cache, ids, [200], mask[:, :200])
    other = copy.deepcopy(cache)
    mask, position = mask[:, :201], (mask.cumsum(-1) - 1)[:, 200:201]
    rest = {"attention_mask": mask, "position_ids": position, "use_cache": True}
    packed = logits(model, ids[:, 200:201], **rest, past_key_values=cache)
    use(model, "eager")
    unpacked = logits(model, ids[:, 200:201], **rest, past_key_values=other)
    torch.testing.assert_close(unpacked, packed, rtol=0, atol=2e-5 * float(packed.abs().max()))


def filled(model: Any, ids: Tensor) -> StaircaseCache:
    cache = StaircaseCache(model.config, LADDER)
    in_chunks(model, cache, ids, [130, ids.shape[1] - 130])
    return cache


@pytest.mark.parametrize("name", ["stairs_causal", "eager"])
@pytest.mark.parametrize("what", ["reorder", "select", "repeat", "copy"])
def test_rows(what: str, name: str) -> None:
    model, ids = use(tiny("llama"), name), tokens(3, 200)
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
    expected = in_chunks(model, filled(model, ids[index]), new, [3, 6])
    torch.testing.assert_close(in_chunks(model, cache, new, [3, 6]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["stairs_causal", "eager"])
def test_crop(name: str) -> None:
    """What was taken back leaves no trace."""
    model, ids = use(tiny("llama"), name), tokens(2, 240)
    cache, other = filled(model, ids[:, :200]), filled(model, ids[:, :200])
    assert all(layer.is_croppable for layer in cache.layers)
    in_chunks(model, cache, tokens(2, 9), [1] * 9)
    cache.crop(-9)
    assert cache.get_seq_length() == 200
    rest = [1] * 30
    assert torch.equal(in_chunks(model, cache, ids[:, 200:], rest), in_chunks(model, other, ids[:, 200:], rest))
    with pytest.raises(ValueError, match="tokens is 21 and must be at most rollback, 20"):
        cache.crop(-21)


def test_prompt_lookup() -> None:
    """Rejected candidates are taken back; the tokens are those of greedy decoding."""
    model, ids = use(tiny("llama"), "stairs_causal"), tokens(1, 50).repeat(1, 3)
    caches = [StaircaseCache(model.config, LADDER) for _ in range(2)]
    greedy = model.generate(ids, **GREEDY, past_key_values=caches[0])
    assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=5, past_key_values=caches[1]), greedy)


def test_second_turn() -> None:
    model = use(tiny("llama"), "stairs_causal")
    cache = StaircaseCache(model.config, LADDER)
    said = model.generate(tokens(1, 100), **GREEDY, past_key_values=cache)
    text = torch.cat([said, tokens(1, 80)], 1)
    again = model.generate(text, **GREEDY, past_key_values=cache)
    assert cache.get_seq_length() == again.shape[1] - 1 == 239
    by_hand = use(tiny("llama"), "stairs_by_hand").generate(text, **GREEDY, past_key_values=ByHand())
    assert torch.equal(again, by_hand)
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    assert torch.equal(model.generate(tokens(1, 100), **GREEDY, past_key_values=cache), said)


def test_compiled_with_static_shapes(no_dynamo_state: None) -> None:
    """Tokens one at a time: graphs break at the cache, and are not made anew as it fills."""
    model, ids = use(tiny("llama"), "stairs_causal"), tokens(2, 160)
    cache, other = (StaircaseCache(model.config, LADDER, capacity=256) for _ in range(2))
    expected = in_chunks(model, other, ids, [100, *[1] * 60])
    compiled = torch.compile(model, backend="aot_eager")
    first = in_chunks(compiled, cache, ids[:, :104], [100, 1, 1, 1, 1])
    with torch.compiler.set_stance("fail_on_recompile"):
        rest = in_chunks(compiled, cache, ids[:, 104:], [1] * 56)
    torch.testing.assert_close(torch.cat([first, rest], 1), expected, rtol=0, atol=1e-5)
    assert cache.layers[0].store.lengths.tolist() == [160, 160]


def test_bytes() -> None:
    """16/8/4 takes, of a text that fills it, under half of what bfloat16 takes."""
    model, ids = use(tiny("llama", dtype=torch.bfloat16), "stairs_causal"), tokens(1, 2048)
    cache, full = StaircaseCache(model.config, LADDER, capacity=2048), DynamicCache()
    for each in (cache, full):
        logits(model, ids, past_key_values=each)
    dense = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    assert cache.nbytes == sum(layer.store.nbytes for layer in cache.layers)
    assert cache.nbytes < dense / 2


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [1, 20, 21, 150])
def test_a_refused_call_leaves_the_cache_as_it_was(new: int) -> None:
    model, ids = use(tiny("llama", layers=1), "stairs_causal"), tokens(2, 200 + new)
    cache, other = filled(model, ids[:, :200]), filled(model, ids[:, :200])
    attention = model.model.layers[0].self_attn
    attention.scaling, scaling = float("nan"), attention.scaling
    with pytest.raises(ValueError, match="scale is nan"):
        logits(model, ids[:, 200:], past_key_values=cache)
    attention.scaling = scaling
    assert cache.get_seq_length() == 200 and cache.layers[0].store.lengths.tolist() == [200, 200]
    expected = logits(model, ids[:, 200:], past_key_values=other)
    assert torch.equal(logits(model, ids[:, 200:], past_key_values=cache), expected)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"staircase": [LADDER]}, ValueError, "staircase has 1 entries and must have 2, one for each layer"),
        ({"staircase": (16, 8)}, TypeError, r"staircase\[0\] is a int and must be a Staircase or None"),
        ({"staircase": 4}, TypeError, "staircase is a int and must be a Staircase or a list of them"),
        (
            {"staircase": [LADDER, Staircase((16, 4))]}, ValueError,
            r"staircase has rollback \[20, 64\] and must have one in every layer",
        ),
        ({"staircase": [None, None]}, ValueError, r"config has layers \['full_attention'\] and must have"),
        ({"prefill": "half"}, ValueError, "prefill is 'half' and must be 'staircase' or 'full'"),
        ({"capacity": 0}, ValueError, "capacity is 0 and must be at least 1"),
        ({"staircase": Staircase(step=0.5)}, ValueError, "step is 0.5, a fraction of capacity, which must be given"),
    ],
)  # fmt: skip
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"StaircaseCache: {message}"):
        StaircaseCache(tiny("llama").config, **arguments)


def test_config_and_layers() -> None:
    with pytest.raises(TypeError, match="config is a Staircase and must be the model's PretrainedConfig"):
        StaircaseCache(LADDER)
    with pytest.raises(ValueError, match=r"config has layers \['sliding_attention'\] and must have full_attention"):
        StaircaseCache(tiny("mistral").config)


def test_a_config_that_is_not_the_models() -> None:
    other = copy.deepcopy(use(tiny("llama"), "stairs_causal").config)
    model, ids = use(tiny("llama"), "eager"), tokens(2, 20)
    with pytest.raises(ValueError, match="config has attn_implementation 'stairs_causal', the model used another"):
        logits(model, ids, past_key_values=StaircaseCache(other, LADDER))


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, "padding on the right and must have it on the left"),
        ({"position_ids": torch.tensor([[0, 1, 0]])}, "packed sequences are not available with a StaircaseCache"),
    ],
)
def test_calls_that_are_refused(inputs: dict[str, Tensor], message: str) -> None:
    model = use(tiny("llama"), "stairs_causal")
    cache = StaircaseCache(model.config, LADDER)
    with pytest.raises(ValueError, match=message):
        logits(model, tokens(2, 3), past_key_values=cache, **inputs)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sink_size": 2, "window_size": None}, "sink_size is 2 and must be 0 with window_size=None"),
        ({"window_size": None, "distance_limit": 5}, "distance_limit is 5 and must be None with window_size=None"),
    ],
)
def test_register_without_a_window(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"register: {message}"):
        register("stairs_wrong", **arguments)
