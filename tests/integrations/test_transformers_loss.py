# SPDX-License-Identifier: Apache-2.0
"""`register_loss`: loss and gradients of transformers' own, without the logits."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

from pycore.integrations.transformers import register_loss, unregister_loss
from tests.support.tiny_models import KINDS, VOCABULARY, tiny, tokens


def trained(model_type: str, **changes: Any) -> Any:
    model = tiny(model_type, **changes).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch() -> dict[str, Tensor]:
    ids = tokens(3, 20)
    labels = ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: Any, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """The output of a training step, and the gradients of every parameter that has one."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(mine: tuple[Any, dict[str, Tensor]], theirs: tuple[Any, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(mine[0].loss, theirs[0].loss, rtol=1e-5, atol=1e-5)
    assert mine[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        torch.testing.assert_close(mine[1][name], expected, rtol=1e-5, atol=1e-5 * max(1, expected.abs().max().item()))


@pytest.mark.parametrize("model_type", (*KINDS, "granite", "mixtral", "gpt2", "bloom"))
def test_loss_and_gradients_are_the_models(model_type: str) -> None:
    model = trained(model_type)
    mine = register_loss(copy.deepcopy(model))
    for more in ({}, {"num_items_in_batch": torch.tensor(11)}, {"num_items_in_batch": 11}):
        actual, expected = step(mine, **batch(), **more), step(model, **batch(), **more)
        assert_same_step(actual, expected)
        assert actual[0].logits.shape == (3, 20, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights(tied: bool) -> None:
    model = trained("llama", tie_word_embeddings=tied)
    mine = register_loss(copy.deepcopy(model))
    assert (mine.lm_head.weight is mine.model.embed_tokens.weight) == tied
    assert_same_step(step(mine, **batch()), step(model, **batch()))


def test_labels_given_otherwise() -> None:
    model = trained("llama")
    mine = register_loss(copy.deepcopy(model))
    inputs = batch()
    labels = inputs["labels"]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    assert_same_step(step(mine, **inputs, shift_labels=shifted), step(model, **inputs))
    place = list(inspect.signature(model.forward).parameters).index("labels")
    by_place = [inputs["input_ids"], *[None] * (place - 1), labels]
    torch.testing.assert_close(mine(*by_place).loss, model(*by_place).loss)
    pair = mine(**inputs, return_dict=False)
    torch.testing.assert_close(pair[0], model(**inputs).loss)
    nothing = mine(input_ids=inputs["input_ids"], labels=torch.full_like(labels, -100))
    assert nothing.loss.isnan()


class _Largest(TorchDispatchMode):
    """The most numbers that a tensor made inside has."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self.most = max(self.most, part.numel())
        return result


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere"])
def test_no_logits_exist(model_type: str) -> None:
    model = trained(model_type, vocab_size=3000)
    ids = tokens(4, 100)
    most = []
    for each in (model, register_loss(copy.deepcopy(model))):
        with _Largest() as largest:
            each(input_ids=ids, labels=ids).loss.backward()
        most.append(largest.most)
    assert most[0] == 4 * 100 * 3000
    assert most[1] == 3000 * 64  # the embedding, and its gradient


def test_nothing_else_changes() -> None:
    model = tiny("gemma2")
    mine = register_loss(copy.deepcopy(model))
    ids = tokens(2, 12)
    assert torch.equal(mine(ids).logits, model(ids).logits)
    assert torch.equal(mine(ids, labels=ids).loss, model(ids, labels=ids).loss)  # in evaluation
    assert mine(ids, labels=ids).logits.shape == (2, 12, VOCABULARY)
    mine.train(), model.train()
    assert torch.equal(mine(ids).logits, model(ids).logits)  # without labels
    assert torch.equal(mine.eval().generate(ids, max_new_tokens=3), model.eval().generate(ids, max_new_tokens=3))
    assert isinstance(mine, type(model)) and type(mine).__name__ == type(model).__name__
    assert inspect.signature(mine.forward) == inspect.signature(model.forward)
    assert mine.state_dict().keys() == model.state_dict().keys()


def test_copies_files_and_undoing(tmp_path: Any) -> None:
    model = trained("llama")
    kind = type(model)
    mine = register_loss(register_loss(copy.deepcopy(model)))
    expected = step(model, **batch())
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        result = step(other, **batch())
        assert_same_step(result, expected)
        assert result[0].logits.shape[-1] == 0
    mine.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert type(again) is kind and again.config.architectures == [kind.__name__]
    assert unregister_loss(mine) is mine
    assert type(mine) is kind and type(mine.lm_head) is nn.Linear
    result = step(mine, **batch())
    assert result[0].logits.shape[-1] == VOCABULARY
    assert torch.equal(result[0].loss, expected[0].loss)


def test_a_failing_step_leaves_the_model_as_it_was() -> None:
    mine = register_loss(trained("llama"))
    ids = tokens(2, 8)
    with pytest.raises(IndexError, match="linear_cross_entropy: target"):
        mine(input_ids=ids, labels=ids + VOCABULARY)
    assert mine(ids).logits.shape == (2, 8, VOCABULARY)
    assert_same_step(step(mine, **batch()), step(trained("llama"), **batch()))


def test_another_vocabulary() -> None:
    model = trained("llama")
    mine = register_loss(copy.deepcopy(model))
    with torch.no_grad():
        for each in (model, mine):
            each.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
            each.lm_head.weight.copy_(torch.randn(VOCABULARY + 3, 64, generator=torch.Generator().manual_seed(1)))
            each.model.embed_tokens.weight.copy_(each.lm_head.weight)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM has another head, a Linear, and must be registered anew"):
        mine(**batch())
    result = step(register_loss(mine), **batch())
    assert_same_step(result, step(model, **batch()))


def test_half_precision() -> None:
    """The loss of logits in float32, where transformers rounds them to bfloat16."""
    model = tiny("llama", dtype=torch.bfloat16).train()
    inputs = batch()
    rows = model.model(inputs["input_ids"]).last_hidden_state[:, :-1].flatten(0, 1)
    logits = rows.float() @ model.lm_head.weight.float().T
    output, gradients = step(register_loss(model), **inputs)
    expected = torch.nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert output.loss.dtype == torch.float32 and gradients["lm_head.weight"].dtype == torch.bfloat16


def test_checkpointing() -> None:
    model = trained("llama")
    mine = register_loss(copy.deepcopy(model))
    mine.gradient_checkpointing_enable()
    assert_same_step(step(mine, **batch()), step(model, **batch()))


def test_compiled() -> None:
    torch._dynamo.reset()
    model = trained("llama")
    mine = register_loss(copy.deepcopy(model))
    expected = step(model, **batch())
    compiled = torch.compile(mine, backend="aot_eager")
    output = compiled(**batch())
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected[0].loss)
    torch.testing.assert_close(mine.lm_head.weight.grad, expected[1]["lm_head.weight"], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="register_loss: model is a Linear and must be a model of transformers"):
        register_loss(nn.Linear(2, 2))
    bert = BertForSequenceClassification(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    )
    with pytest.raises(ValueError, match="model is a BertForSequenceClassification, which has a loss of its own"):
        register_loss(bert)
    model = trained("llama")
    with pytest.raises(ValueError, match="unregister_loss: model is a LlamaForCausalLM and must be one of"):
        unregister_loss(model)
    model.loss_function = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="model has a loss_function that was set"):
        register_loss(model)
    model = trained("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=re.escape("model has a Sequential as its head and must have torch's Linear")):
        register_loss(model)
    model = register_loss(trained("llama"))
    with pytest.raises(ValueError, match="LlamaForCausalLM has pycore's loss and must be unregistered first"):
        model.loss_function = lambda *args, **kwargs: None
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM has another head, a Sequential"):
        model(**batch())


def test_a_model_that_changes_its_logits_otherwise() -> None:
    """Falcon-H1 multiplies them by a number of its own: the step is refused, not wrong."""
    model = register_loss(trained("falcon_h1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8))
    with pytest.raises(RuntimeError, match="FalconH1ForCausalLM changes its logits before the loss"):
        model(**batch())
