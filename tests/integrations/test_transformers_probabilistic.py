# SPDX-License-Identifier: Apache-2.0
"""Probabilistic attention registered with transformers: values, rounds, padding, caches, training, refusals."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from pycore.integrations.transformers import LambdaCache, register_probabilistic, set_round
from pycore.integrations.transformers._rounds import round_of
from pycore.reference.attention import attention as reference_attention
from pycore.schedules import Constant, Harmonic, Lambda, Probabilistic
from tests.support.tiny_models import logits, tiny, tokens, use
from tests.support.tolerance import assert_model_as_accurate

LENGTH, BLOCK, SEED = 100, 16, 3
DRAW: dict[str, Any] = {"distance_probs": Constant(0.4), "seed": SEED, "block_size": BLOCK, "sink_size": 2}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register_probabilistic("drawn", **DRAW)
    register_probabilistic("everything", distance_probs=Constant(1.0))


def in_plain_torch(model: Any, ids: Tensor, round: int) -> Tensor:
    """The model's logits with `pycore.reference.attention` for its attention, in the model's dtype."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        window = kwargs.get("sliding_window")
        drawn = Probabilistic(round=round, **DRAW).for_layer(module.layer_idx)
        schedule = drawn if window is None else Lambda(0, window)
        out = reference_attention(
            query, key, value, schedule=schedule, scale=kwargs["scaling"], softcap=kwargs.get("softcap") or 0.0,
            sink_logits=kwargs.get("s_aux"),
        )  # fmt: skip
        return out[0].transpose(1, 2).contiguous(), None

    AttentionInterface.register("reference_blocks", attend)
    AttentionMaskInterface.register("reference_blocks", lambda *args, **kwargs: None)
    return logits(use(model, "reference_blocks"), ids)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "cohere", "gpt_neox"])
def test_values(model_type: str) -> None:
    """Grouped heads, softcap, sliding layers, learned sinks, and a model whose rotation pycore does not know."""
    ids = tokens(8, LENGTH)
    exact = in_plain_torch(tiny(model_type, dtype=torch.float64), ids, 0)
    plain = in_plain_torch(tiny(model_type), ids, 0)
    assert_model_as_accurate(logits(use(tiny(model_type), "drawn"), ids), exact, plain)


def test_all_blocks_are_the_models_own_attention() -> None:
    ids = tokens(8, LENGTH)
    exact, plain = logits(tiny("llama", dtype=torch.float64), ids), logits(tiny("llama"), ids)
    assert_model_as_accurate(logits(use(tiny("llama"), "everything"), ids), exact, plain)


def test_evaluation_keeps_its_round() -> None:
    model, ids = use(tiny("llama"), "drawn"), tokens(1, LENGTH)
    first = logits(model, ids)
    assert torch.equal(logits(model, ids), first)
    set_round(model, 7)
    seventh = logits(model, ids)
    assert not torch.equal(seventh, first)
    torch.testing.assert_close(seventh, in_plain_torch(tiny("llama"), ids, 7), rtol=0, atol=1e-4)
    set_round(model, 0)
    assert torch.equal(logits(model, ids), first)


def test_a_training_pass_is_a_round() -> None:
    """And the state dict does not know."""
    model, ids = use(tiny("llama"), "drawn"), tokens(1, LENGTH)
    with torch.inference_mode():
        model(ids)
    model.train()
    seen = [logits(model, ids) for _ in range(3)]
    assert len({x.sum().item() for x in seen}) == 3
    rounds = [module.pycore_round for module in model.modules() if hasattr(module, "pycore_round")]
    assert [int(x) for x in rounds] == [3, 3]
    torch.testing.assert_close(seen[1], in_plain_torch(tiny("llama"), ids, 2), rtol=0, atol=1e-4)
    assert set(model.state_dict()) == set(tiny("llama").state_dict())
    other = copy.deepcopy(model).eval()
    assert torch.equal(logits(other, ids), seen[2])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing: bool) -> None:
    """Of the round of the forward pass, also where the backward pass computes it again."""
    ids = tokens(2, LENGTH)
    model = use(tiny("llama"), "drawn").train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    expected = tiny("llama")
    in_plain_torch(expected, ids, 1)  # leaves the reference in place
    expected.zero_grad()
    expected(ids, labels=ids).loss.backward()
    for (name, x), y in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-5 * float(y.grad.abs().max() + 1), msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    """Blocks are counted from a row's first token."""
    model, ids, mask = use(tiny("llama"), "drawn"), tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    place = slice(0, 37) if side == "left" else slice(LENGTH - 37, LENGTH)
    ids[1, place], mask[1, place] = 0, 0
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    both = logits(model, ids, attention_mask=mask, position_ids=position)
    alone = logits(model, ids[1:, mask[1].bool()])
    torch.testing.assert_close(both[1:, mask[1].bool()], alone, rtol=0, atol=1e-4)


def test_steps_on_a_cache() -> None:
    """Prefill, a chunk and single tokens read what one pass reads."""
    model, ids, cache = use(tiny("llama"), "drawn"), tokens(2, LENGTH), DynamicCache()
    whole = logits(model, ids)
    parts = [slice(0, 50), slice(50, 90), *(slice(i, i + 1) for i in range(90, LENGTH))]
    steps = torch.cat([logits(model, ids[:, part], past_key_values=cache) for part in parts], 1)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_compiled_training_draws_anew() -> None:
    torch._dynamo.reset()
    model, ids = use(tiny("llama"), "drawn").train(), tokens(1, LENGTH)
    logits(model, ids)
    eager = copy.deepcopy(model)
    expected = [logits(eager, ids, use_cache=False) for _ in range(6)]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()  # reset() leaves what other tests counted
    for before in expected:
        torch.testing.assert_close(logits(compiled, ids, use_cache=False), before, rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


def test_a_refused_pass_is_no_round() -> None:
    model, ids = use(tiny("llama", layers=1), "drawn").train(), tokens(1, LENGTH)
    attention = model.model.layers[0].self_attn
    logits(model, ids)
    attention.scaling, scaling = float("nan"), attention.scaling
    before = int(round_of(attention))
    with pytest.raises(ValueError, match="scale is nan"):
        logits(model, ids)
    attention.scaling = scaling
    assert int(round_of(attention)) == before


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (TypeError, "register_probabilistic: name is a int and must be a str", {"name": 3}),
        (TypeError, "register_probabilistic: seed is a float and must be an int", {"seed": 1.0}),
        (
            TypeError,
            "register_probabilistic: distance_probs is a float and must be a Tensor or a family of pycore.schedules",
            {"distance_probs": 0.5},
        ),
        (
            ValueError,
            "register_probabilistic: block_size is 24 and must be a power of two between 16 and 2**30",
            {"block_size": 24},
        ),
        (ValueError, "register_probabilistic: blocks_per_row is 0 and must be at least 1", {"blocks_per_row": 0}),
    ],
)
def test_registering_is_refused(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=exactly(message)):
        register_probabilistic(**({"name": "drawn", "distance_probs": Harmonic(2)} | changes))


@pytest.mark.parametrize("table", [torch.tensor([0.5, 1.5]), torch.tensor([[0.5], [float("nan")]])])
def test_no_probability(table: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^register_probabilistic: distance_probs\["):
        register_probabilistic("drawn", distance_probs=table)


def test_a_lambda_cache_is_refused() -> None:
    message = "drawn: past_key_values is a LambdaCache and must be a cache of transformers' own"
    with pytest.raises(ValueError, match=exactly(message)):
        logits(use(tiny("llama"), "drawn"), tokens(1, 8), past_key_values=LambdaCache(2, 8))


def test_set_round_is_refused() -> None:
    model = use(tiny("llama"), "drawn")
    with pytest.raises(ValueError, match=r"^set_round: model has no round and must have run with an attention of"):
        set_round(model, 1)
    logits(model, tokens(1, 8))
    for round, error in ((-1, ValueError), (2**32, ValueError), (0.5, TypeError)):
        with pytest.raises(error, match=r"^set_round: round is "):
            set_round(model, round)
