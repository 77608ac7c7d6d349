# SPDX-License-Identifier: Apache-2.0
"""What register, the registered attention and LambdaCache refuse: one sentence each."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache

from pycore.integrations.transformers import LambdaCache, register
from pycore.integrations.transformers._rope import INTERLEAVED
from tests.support.tiny_models import SINKS, WINDOW, logits, tiny, tokens, use

KNOWN = ", ".join(INTERLEAVED)


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register("lam", sink_size=SINKS, window_size=WINDOW)
    register("lam_kept", sink_size=SINKS, window_size=WINDOW, limit_distances=False)


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (TypeError, "register: name is a int and must be a str", {"name": 3}),
        (TypeError, "register: sink_size is a float and must be an int", {"sink_size": 4.0}),
        (TypeError, "register: window_size is a bool and must be an int", {"window_size": True}),
        (TypeError, "register: distance_limit is a str and must be an int", {"distance_limit": "8"}),
        (ValueError, "register: sink_size is -1 and must be at least 0", {"sink_size": -1}),
        (ValueError, "register: window_size is 0 and must be at least 1", {"window_size": 0}),
        (ValueError, "register: distance_limit is 7 and must be at least 8", {"distance_limit": 7}),
        (
            ValueError,
            "register: distance_limit is 9 and must be None with limit_distances=False",
            {"distance_limit": 9, "limit_distances": False},
        ),
        *(
            (
                ValueError,
                "register: middle_topk is 2 and must be 0 unless distances are limited to window_size, where middle "
                "tokens are put",
                {"middle_topk": 2, **more},
            )
            for more in ({"limit_distances": False}, {"distance_limit": 9}, {"sink_size": 0, "window_size": None})
        ),
        (ValueError, "register: middle_topk is -1 and must be at least 0", {"middle_topk": -1}),
        (TypeError, "register: middle_topk is a float and must be an int", {"middle_topk": 2.0}),
        *(
            (
                ValueError,
                f"register: name is {name!r} and must be a new name without flash, sdpa, flex_attention, paged, / and "
                "|, which mean something to transformers",
                {"name": name},
            )
            for name in ("", "sdpa", "my_flash", "org/name", "flex_attention", "paged|mine")
        ),
    ],
)
def test_register(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=exactly(message)):
        register(**({"name": "lam", "sink_size": SINKS, "window_size": WINDOW} | changes))


def test_register_leaves_others_names_alone() -> None:
    AttentionInterface.register("someone_elses", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="^register: name is 'someone_elses' and must be a new name"):
        register("someone_elses", sink_size=SINKS, window_size=WINDOW)


# ---- what models hand over -----------------------------------------------------------------------------------------


def refused(message: str, model: Any, *, error: type[Exception] = ValueError, **inputs: Any) -> None:
    with pytest.raises(error, match=exactly(message)):
        logits(model, tokens(2, 12), **inputs)


def llama(**changes: Any) -> Any:
    return use(tiny("llama", **changes), "lam")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_four_dimensional_mask(dtype: torch.dtype) -> None:
    refused(
        f"lam: attention_mask is a {dtype} tensor of shape [2, 1, 12, 12] and must be the 2-D mask of padding, given "
        "to the model: masks of queries by keys are not available",
        llama(),
        attention_mask=torch.ones(2, 1, 12, 12, dtype=dtype),
    )


def test_hole_in_the_mask() -> None:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 5] = 0
    refused(
        "lam: attention_mask has a hole and must keep one run of tokens in each row, with padding on its left or right",
        llama(),
        attention_mask=mask,
    )


def test_short_mask() -> None:
    cache = DynamicCache()
    model = llama()
    logits(model, tokens(2, 5), past_key_values=cache, use_cache=True)
    refused(
        "lam: attention_mask has 12 columns and must have 17, one for each token so far",
        model,
        attention_mask=torch.ones(2, 12, dtype=torch.int64),
        past_key_values=cache,
        use_cache=True,
    )


def test_packed_texts() -> None:
    """Where they cannot be kept apart."""
    positions = (torch.arange(12) % 7)[None].expand(2, -1)
    refused(
        "lam: position_ids jump within a row and must be consecutive: packed sequences are not available with a "
        "LambdaCache",
        llama(),
        position_ids=positions,
        past_key_values=LambdaCache(SINKS, WINDOW),
    )
    model, cache = llama(), DynamicCache()
    logits(model, tokens(2, 5), past_key_values=cache)
    refused(
        "lam: position_ids begin again within a row while past_key_values holds tokens and must go on: packed "
        "sequences need an empty cache",
        model,
        position_ids=positions + 5,
        past_key_values=cache,
    )
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("model_type", ["llama", "gpt_bigcode"])
def test_a_cache_of_packed_texts_does_not_go_on(model_type: str) -> None:
    model, cache = packed_model(model_type), DynamicCache()
    logits(model, tokens(2, 12), position_ids=(torch.arange(12) % 7)[None], past_key_values=cache)
    message = "lam_kept: past_key_values holds several texts a row, of packed position_ids, and must hold one to go on"
    with pytest.raises(ValueError, match=exactly(message)):
        logits(model, tokens(2, 1), position_ids=torch.tensor([[5]]), past_key_values=cache)
    other = DynamicCache()
    for _ in range(2):
        logits(model, tokens(2, 12), past_key_values=other)


def packed_model(model_type: str) -> Any:
    changes = {"n_embd": 64, "n_head": 4, "n_layer": 2} if model_type == "gpt_bigcode" else {}
    model = use(tiny(model_type, **changes), "lam_kept")
    try:
        logits(model, tokens(1, 3))
    except ValueError as error:  # transformers 4's GPT BigCode
        assert "must be the 2-D mask of padding" in str(error)
        pytest.skip(f"{model_type} makes a mask of queries by keys by itself")
    return model


def test_positions_that_jump_ahead() -> None:
    """With a mask, transformers sees no new text there, so neither reading would be safe."""
    positions = torch.cat([torch.arange(5), torch.arange(50, 57)])[None]
    refused(
        "lam: position_ids jump within a row and must be consecutive: packed sequences are not available",
        llama(),
        position_ids=positions,
        attention_mask=torch.ones(2, 12, dtype=torch.int64),
    )


@pytest.mark.parametrize("shape", [(2, 1, 1, 4), (2, 1, 12, 12), (2, 1, 1, 12), (1, 1, 12, 12), (2, 1, 12, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.int32], ids=str)
@pytest.mark.parametrize("name", ["lam", "lam_kept"])
def test_foreign_masks(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Of whatever dtype and shape they are not taken for what this library hands itself."""
    mask = torch.tril(torch.ones(12, 12)).to(dtype) if shape[2:] == (12, 12) else torch.ones(shape[2:], dtype=dtype)
    message = (
        f"{name}: attention_mask is a {dtype} tensor of shape {list(shape)} and must be the 2-D mask of padding, given "
        "to the model: masks of queries by keys are not available"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        logits(use(tiny("llama"), name), tokens(2, 12), attention_mask=mask.expand(shape))


def test_foreign_masks_of_few_keys() -> None:
    """Four keys and one query: the shape that this library's own once had, and five and six of them."""
    model = use(tiny("llama"), "lam_kept")
    for keys in (4, 5, 6, 7):
        cache = DynamicCache()
        logits(model, tokens(2, keys - 1), past_key_values=cache)
        with pytest.raises(ValueError, match="must be the 2-D mask of padding"):
            mask = torch.ones(2, 1, 1, keys, dtype=torch.int64)
            logits(model, tokens(2, 1), past_key_values=cache, attention_mask=mask)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"])
def test_packing_arguments(name: str) -> None:
    refused(
        f"lam: {name} is given and must be None: packed sequences cannot be honoured",
        llama(),
        **{name: torch.tensor([0, 12])},
    )


def test_weights() -> None:
    refused(
        "lam: output_attentions is True and must be False: the weights are never formed",
        llama(),
        output_attentions=True,
    )


def test_bidirectional() -> None:
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    refused("lam: is_causal of LlamaAttention is False and must be True", model)


def test_masks_that_look_ahead() -> None:
    """A Gemma 3 that attends both ways says so in its mask before its attention is asked."""
    model = use(tiny("gemma3_text", use_bidirectional_attention=True), "lam")
    # transformers 5 marks such a mask, in transformers 4 it shows beside the diagonal.
    with pytest.raises(
        ValueError,
        match="^lam: the model's mask (lets a token see a later one|is causal with a function of its own) and must be "
        "causal",
    ):
        logits(model, tokens(2, 12))


def test_chunked_attention() -> None:
    model = use(tiny("llama4_text", attention_chunk_size=8, intermediate_size_mlp=64, num_local_experts=2), "lam")
    refused("lam: config.attention_chunk_size is 8 and must be None: chunked attention is not available", model)


def test_unknown_model() -> None:
    model = use(tiny("gpt_neox", num_key_value_heads=4), "lam")
    refused(
        f"lam: model_type is gpt_neox and must be one of {KNOWN} for a distance limit; register with "
        "limit_distances=False, or say how the model rotates with interleaved=",
        model,
    )
    assert logits(use(model, "lam_kept"), tokens(2, 12)).isfinite().all()


def test_model_without_rotation() -> None:
    model = use(tiny("gpt2", n_embd=64, n_head=4, n_layer=2), "lam")
    with pytest.raises(ValueError, match=r"^lam: (model_type is gpt2 and must be one of|GPT2Attention has no rotary)"):
        logits(model, tokens(2, 12))
    assert logits(use(model, "lam_kept"), tokens(2, 12)).isfinite().all()


def test_positions_that_are_not_handed_on() -> None:
    def untold(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return AttentionInterface()["lam"](*args, **kwargs)

    AttentionInterface.register("lam_untold", untold)
    refused(
        "lam: position_ids is None and must be handed on by LlamaAttention for a distance limit; register with "
        "limit_distances=False",
        use(tiny("llama"), "lam_untold"),
    )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change(kind: str) -> None:
    """Without the limit they work, as nothing is un-rotated."""
    scaling: dict[str, Any] = {"rope_type": kind, "factor": 2.0}
    changes: dict[str, Any] = {"max_position_embeddings": 64}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16}
    model = llama(rope_scaling=scaling, **changes)
    refused(
        f"lam: rope_type is {kind}, whose frequencies change with the length, and must have fixed frequencies for a "
        "distance limit; register with limit_distances=False",
        model,
    )
    assert logits(use(model, "lam_kept"), tokens(2, 12)).isfinite().all()


# ---- the function itself, for arguments that only some models pass -------------------------------------------------


class Stub(nn.Module):
    is_causal = True
    layer_idx = 0


def call(**arguments: Any) -> Any:
    x = torch.zeros(1, 2, 3, 8)
    function = AttentionInterface()["lam_kept"]
    return function(arguments.pop("module", Stub()), x, x, x, None, **arguments)


def test_the_function_takes_a_stub() -> None:
    out, weights = call(scaling=1.0, softcap=None, s_aux=None, use_cache=True, is_causal=None)
    assert out.shape == (1, 3, 2, 8) and weights is None


@pytest.mark.parametrize(
    "name, what",
    [
        ("position_bias", "a bias of its own"),
        ("head_mask", "a mask of heads"),
        ("cache", "a paged cache"),
        ("indices", "a choice of keys"),
        ("block_indices", "a choice of keys"),
        ("sinks", "sinks of another kind"),
    ],
)
def test_arguments(name: str, what: str) -> None:
    with pytest.raises(
        ValueError, match=exactly(f"lam_kept: {name} is given and must be None: {what} cannot be honoured")
    ):
        call(**{name: torch.zeros(1)})


def test_positions_of_more_dimensions() -> None:
    message = "lam_kept: position_ids has 3 dimensions and must have 2, [batch, length]"
    with pytest.raises(ValueError, match=exactly(message)):
        call(position_ids=torch.zeros(3, 1, 3, dtype=torch.int64))


def test_other_layer_types() -> None:
    module = Stub()
    module.config = type("Config", (), {"layer_types": ["chunked_attention"]})()
    message = "lam_kept: layer_type of layer 0 is chunked_attention and must be full_attention or sliding_attention"
    with pytest.raises(ValueError, match=exactly(message)):
        call(module=module)


# ---- LambdaCache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, bad", [("sink_size", -1), ("window_size", 0), ("rollback", -1)])
def test_cache_sizes(name: str, bad: int) -> None:
    sizes = {"sink_size": SINKS, "window_size": WINDOW, "rollback": 0} | {name: bad}
    with pytest.raises(ValueError, match=f"{name} is {bad} and must be at least"):
        LambdaCache(**sizes)


@pytest.mark.parametrize("name, other", [("sink_size", SINKS + 1), ("window_size", WINDOW + 1)])
def test_cache_of_other_sizes(name: str, other: int) -> None:
    sizes = {"sink_size": SINKS, "window_size": WINDOW}
    refused(
        f"lam: past_key_values has {name} {other} and must have the registered {sizes[name]}",
        llama(),
        past_key_values=LambdaCache(**(sizes | {name: other})),
    )


@pytest.mark.parametrize("other", ["eager", "sdpa"])
def test_cache_with_other_attention(other: str) -> None:
    refused(
        "LambdaCache: attn_implementation is one that does not read this cache and must be one made by "
        "pycore.integrations.transformers.register",
        use(tiny("llama"), other),
        past_key_values=LambdaCache(SINKS, WINDOW),
    )


def test_cache_and_padding_on_the_right() -> None:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    refused(
        "lam: attention_mask has padding on the right and must have it on the left",
        llama(),
        attention_mask=mask,
        past_key_values=LambdaCache(SINKS, WINDOW),
    )


def test_cache_and_middle_tokens() -> None:
    register("lam_middle", sink_size=SINKS, window_size=WINDOW, middle_topk=2)
    model, cache = use(tiny("llama"), "lam_middle"), LambdaCache(SINKS, WINDOW)
    logits(model, tokens(1, 20), past_key_values=cache)
    with pytest.raises(ValueError, match="middle_topk is 2 and must be 0 with a LambdaCache, which forgets the middle"):
        logits(model, tokens(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == 20


def test_cache_and_dropout() -> None:
    model = llama(attention_dropout=0.1).train()
    refused("lam: dropout is 0.1 and must be 0 with a LambdaCache", model, past_key_values=LambdaCache(SINKS, WINDOW))


def test_cache_and_positions_that_do_not_go_on() -> None:
    model, cache = llama(), LambdaCache(SINKS, WINDOW)
    logits(model, tokens(2, 12), past_key_values=cache)
    refused(
        "lam: position_ids do not go on where past_key_values ends and must be consecutive",
        model,
        past_key_values=cache,
        position_ids=torch.arange(5, 17)[None],
    )


def test_cache_filled_by_another_registration() -> None:
    """A model whose window was changed since must not read the old tensors with new sizes."""
    register("lam_moves", sink_size=SINKS, window_size=WINDOW)
    model, cache = use(tiny("mistral"), "lam_moves"), LambdaCache(SINKS, WINDOW)
    logits(model, tokens(2, 12), past_key_values=cache)
    model.config.sliding_window = 5
    refused(
        "lam_moves: past_key_values was filled with sink_size 0 and window_size 6 and must be used with these, not "
        "with 0 and 5",
        model,
        past_key_values=cache,
    )


@pytest.mark.parametrize("tokens_back, rollback", [(1, 0), (5, 4)])
def test_cache_rollback(tokens_back: int, rollback: int) -> None:
    model, cache = llama(), LambdaCache(SINKS, WINDOW, rollback)
    logits(model, tokens(2, 12), past_key_values=cache)
    with pytest.raises(ValueError, match=f"tokens is {tokens_back} and must be at most rollback, {rollback}$"):
        cache.crop(-tokens_back)
    assert cache.get_seq_length() == 12
