# SPDX-License-Identifier: Apache-2.0
"""Λ attention registered with transformers: values, padding, gradients, compilation, and transformers' own caches."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from pycore import ops
from pycore.integrations.transformers import LambdaCache, _rope, register
from tests.support.tiny_models import KINDS, PAD, SINKS, WINDOW, logits, reference, tiny, tokens, use
from tests.support.tolerance import assert_as_accurate, assert_model_as_accurate

LENGTH = 40
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 4.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register("lam", sink_size=SINKS, window_size=WINDOW)
    register("lam_farther", sink_size=SINKS, window_size=WINDOW, distance_limit=WINDOW + 5)
    register("lam_wide", sink_size=SINKS, window_size=64)
    register("lam_kept", sink_size=SINKS, window_size=WINDOW, limit_distances=False)


@pytest.fixture
def no_dynamo_state() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rope_config(kind: str) -> dict[str, Any]:
    """The configuration's entry, under the names of both versions."""
    return {"rope_scaling": {"rope_type": kind, **ROPES.get(kind, {})}, "max_position_embeddings": 64}


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", _rope.INTERLEAVED)
def test_short_texts_are_the_models_own_attention(model_type: str) -> None:
    """With a window longer than the text: every model that is known, its rotation taken back and put on again."""
    ids = tokens(8, LENGTH)
    exact, plain = logits(tiny(model_type, dtype=torch.float64), ids), logits(tiny(model_type), ids)
    assert_model_as_accurate(logits(use(tiny(model_type), "lam_wide"), ids), exact, plain)


@pytest.mark.parametrize("name, limit", [("lam", WINDOW), ("lam_farther", WINDOW + 5), ("lam_kept", None)])
@pytest.mark.parametrize("model_type", KINDS)
def test_values(model_type: str, name: str, limit: int | None) -> None:
    ids = tokens(8, LENGTH)
    with reference(tiny(model_type, dtype=torch.float64), limit=limit) as model:
        exact = logits(model, ids)
    with reference(tiny(model_type), limit=limit) as model:
        plain = logits(model, ids)
    assert_model_as_accurate(logits(use(tiny(model_type), name), ids), exact, plain)


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_frequencies(kind: str) -> None:
    """YaRN also scales the tables, which stays in query and key."""
    ids = tokens(8, LENGTH)
    with reference(tiny("llama", dtype=torch.float64, **rope_config(kind))) as model:
        exact = logits(model, ids)
    with reference(tiny("llama", **rope_config(kind))) as model:
        plain = logits(model, ids)
    assert_model_as_accurate(logits(use(tiny("llama", **rope_config(kind)), "lam"), ids), exact, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "olmo2", "gpt_oss"])
def test_half_precision(model_type: str, dtype: torch.dtype) -> None:
    """As accurate as the model's own attention, whether it rounds its tables (Llama) or not (OLMo 2)."""
    ids = tokens(8, LENGTH)
    half = tiny(model_type, dtype=dtype)
    double = tiny(model_type, dtype=torch.float64)
    double.load_state_dict(half.state_dict())
    exact, plain = logits(double, ids), logits(half, ids)
    assert_model_as_accurate(logits(use(half, "lam_wide"), ids), exact, plain)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_cast_models(model_type: str) -> None:
    """`.to(dtype)` rounds the frequencies of the rotary embedding, which no configuration tells."""
    model = tiny(model_type).to(torch.bfloat16)
    ids = tokens(1, 2000)
    plain = logits(model, ids).float()
    register("lam_long", sink_size=SINKS, window_size=2048)
    actual = logits(use(model, "lam_long"), ids).float()
    # Other frequencies would turn far pairs by a radian; two ways to round differ like two ways to round.
    other = logits(use(model, "sdpa"), ids).float() - plain
    assert (actual - plain).pow(2).mean() <= 2 * other.pow(2).mean()


def test_autocast() -> None:
    ids = tokens(8, LENGTH)
    exact = logits(tiny("llama", dtype=torch.float64), ids)
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits(tiny("llama"), ids)
        actual = logits(use(tiny("llama"), "lam_wide"), ids)
    assert_model_as_accurate(actual, exact, plain)


def test_inference_mode() -> None:
    """Its tensors do not count what is done to them."""
    ids = tokens(2, LENGTH)
    expected = logits(use(tiny("llama"), "lam"), ids)
    with torch.inference_mode():
        model = use(tiny("llama"), "lam")
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids, past_key_values=LambdaCache(SINKS, WINDOW)).logits, expected)


def test_position_ids_that_change_in_place() -> None:
    """The layers of a pass share work on one tensor, which may hold other numbers in the next pass."""
    model, ids = use(tiny("llama"), "lam"), tokens(1, LENGTH)
    position = torch.arange(LENGTH)[None]
    first = logits(model, ids, position_ids=position)
    position += 7
    second = logits(model, ids, position_ids=position)
    assert torch.equal(second, logits(model, ids, position_ids=torch.arange(7, LENGTH + 7)[None]))
    torch.testing.assert_close(second, first, rtol=0, atol=1e-4)


def test_switching_names() -> None:
    """One model, several sizes: each call has the tables of its own limit."""
    model, ids = tiny("llama"), tokens(1, LENGTH)
    first = {name: logits(use(model, name), ids) for name in ("lam", "lam_farther", "lam_kept", "lam_wide")}
    for name, before in first.items():
        assert torch.equal(logits(use(model, name), ids), before)
    assert len({x.sum().item() for x in first.values()}) == 4


def test_registering_anew_replaces_the_sizes() -> None:
    model, ids = tiny("llama"), tokens(1, LENGTH)
    register("lam_changes", sink_size=SINKS, window_size=WINDOW)
    assert torch.equal(logits(use(model, "lam_changes"), ids), logits(use(model, "lam"), ids))
    register("lam_changes", sink_size=SINKS, window_size=64)
    assert torch.equal(logits(use(model, "lam_changes"), ids), logits(use(model, "lam_wide"), ids))


def test_unknown_models_say_how_they_rotate() -> None:
    """GPT-NeoX is not in the table; told how it rotates, it works."""
    register("lam_told", sink_size=SINKS, window_size=64, interleaved=False)
    ids = tokens(8, LENGTH)
    changes = {"num_key_value_heads": 4, "use_parallel_residual": True}
    exact, plain = (
        logits(tiny("gpt_neox", dtype=torch.float64, **changes), ids),
        logits(tiny("gpt_neox", **changes), ids),
    )
    assert_model_as_accurate(logits(use(tiny("gpt_neox", **changes), "lam_told"), ids), exact, plain)


@pytest.mark.parametrize("side", [None, "left"])
def test_middle_tokens(side: str | None) -> None:
    """A step reads what `lambda_attention` does of the same inputs, un-rotated, with middle_topk."""
    register("lam_middle", sink_size=SINKS, window_size=WINDOW, middle_topk=3)
    model, ids = tiny("llama", dtype=torch.float64, num_hidden_layers=1), tokens(2, LENGTH)
    use(model, "lam_middle")
    mask = torch.ones_like(ids)
    if side is not None:
        mask[0, :5] = 0
    layer, seen = model.model.layers[0].self_attn, {}
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layer, name).register_forward_hook(
            lambda module, args, out, name=name: seen.__setitem__(name, [*seen.get(name, []), out])
        )
    layer.o_proj.register_forward_pre_hook(lambda module, args: seen.__setitem__("out", args[0]))
    cache = DynamicCache(config=model.config)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    for part in (slice(0, LENGTH - 1), slice(LENGTH - 1, LENGTH)):
        logits(model, ids[:, part], past_key_values=cache, attention_mask=mask[:, : part.stop],
               position_ids=position[:, part])  # fmt: skip
    query, key, value = (
        torch.cat(seen[name], 1).unflatten(2, (-1, layer.head_dim)).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    angle = torch.arange(WINDOW + 65.0, dtype=torch.float64)[:, None] * model.model.rotary_emb.inv_freq.double()
    expected = ops.lambda_attention(
        query[:, :, -1:], key, value, sink_size=SINKS, window_size=WINDOW, rope=(angle.cos(), angle.sin()),
        middle_topk=3, key_starts=None if side is None else torch.tensor([5, 0]),
    )  # fmt: skip
    torch.testing.assert_close(seen["out"], expected.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-6)
    without = ops.lambda_attention(
        query[:, :, -1:], key, value, sink_size=SINKS, window_size=WINDOW, rope=(angle.cos(), angle.sin())
    )
    assert (without.transpose(1, 2).flatten(2) - seen["out"]).abs().max() > 1e-3


# ---- padding -------------------------------------------------------------------------------------------------------


def padded(side: str, pads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask: rows of LENGTH with so many padding tokens."""
    ids, mask = tokens(len(pads), LENGTH), torch.ones(len(pads), LENGTH, dtype=torch.int64)
    for row, count in enumerate(pads):
        place = slice(0, count) if side == "left" else slice(LENGTH - count, LENGTH)
        ids[row, place], mask[row, place] = 0, 0
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss", "cohere"])
def test_padding(model_type: str, side: str) -> None:
    """A padded row is what it is alone, as near as it is to the truth: matrix products depend on the batch."""
    ids, mask = padded(side, [0, 7, 25, 39])
    double, model = use(tiny(model_type, dtype=torch.float64), "lam"), use(tiny(model_type), "lam")
    together = logits(model, ids, attention_mask=mask)
    numbered = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for row in range(len(ids)):
        valid = mask[row].bool()
        alone = ids[row : row + 1, valid]
        exact, plain = logits(double, alone)[0], logits(model, alone)[0]
        assert_as_accurate(together[row, valid], exact, plain, f"row {row}")
        assert_as_accurate(numbered[row, valid], exact, plain, f"row {row}, positions from 0")


def test_mask_of_ones_is_no_mask() -> None:
    model, ids = use(tiny("llama"), "lam"), tokens(2, LENGTH)
    assert torch.equal(logits(model, ids, attention_mask=torch.ones_like(ids)), logits(model, ids))


def test_row_of_padding_alone() -> None:
    """Nothing to attend to gives zeros, and leaves the other row as it is."""
    ids, mask = padded("left", [LENGTH, 0])
    both = logits(use(tiny("llama"), "lam"), ids, attention_mask=mask)
    assert both.isfinite().all()
    torch.testing.assert_close(both[1:], logits(use(tiny("llama"), "lam"), ids[1:]))


# ---- transformers' own caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["dynamic", "dynamic with windows", "static"])
@pytest.mark.parametrize("model_type", KINDS)
def test_own_caches(model_type: str, make: str) -> None:
    """Prefill in chunks, then steps: the sliding layers of the cache drop rows, a static cache has too many."""
    ids, length = tokens(8, 100), 100
    double, model = use(tiny(model_type, dtype=torch.float64), "lam"), use(tiny(model_type), "lam")
    cache = {
        "dynamic": lambda: DynamicCache(),
        "dynamic with windows": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=length + 9),
    }[make]()
    parts = [slice(0, 17), slice(17, 50), *(slice(i, i + 1) for i in range(50, length))]
    actual = torch.cat([logits(model, ids[:, part], past_key_values=cache, use_cache=True) for part in parts], 1)
    assert_model_as_accurate(actual, logits(double, ids), logits(model, ids))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("kind", [None, "static"])
def test_generate(model_type: str, kind: str | None) -> None:
    """Greedy tokens are those of the whole text at once, padded or not."""
    model = use(tiny(model_type), "lam")
    ids, mask = padded("left", [0, 12])
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "cache_implementation": kind}
    together = model.generate(ids, attention_mask=mask, **options)[:, LENGTH:]
    for row in range(2):
        text = ids[row : row + 1, mask[row].bool()]
        for token in together[row]:
            assert logits(model, text)[0, -1].argmax() == token
            text = torch.cat([text, token.view(1, 1)], 1)


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "glm"])
def test_gradients(model_type: str, checkpointing: bool) -> None:
    ids = tokens(2, LENGTH)

    def gradients(model: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}

    with reference(tiny(model_type, dtype=torch.float64)) as model:
        exact = gradients(model)
    with reference(tiny(model_type)) as model:
        plain = gradients(model)
    model = use(tiny(model_type), "lam")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # these models have no dropout by default
    actual = gradients(model)
    assert actual.keys() == exact.keys()
    # As one vector, every parameter in units of its largest gradient: a bias of four has too few errors to compare.
    vectors = (
        torch.cat([g[name].flatten() / exact[name].abs().max() for name in exact]) for g in (actual, exact, plain)
    )
    assert_as_accurate(*vectors)


def test_dropout() -> None:
    """Only in training, drawn from torch's generator, and right on average."""
    model, ids = use(tiny("llama", attention_dropout=0.25, layers=1), "lam"), tokens(1, LENGTH)
    without = logits(model, ids)
    model.train()
    torch.manual_seed(1)
    first = logits(model, ids)
    torch.manual_seed(1)
    assert torch.equal(logits(model, ids), first)
    assert not torch.equal(first, without)
    hidden = torch.stack([logits(model, ids) for _ in range(64)]).mean(0)
    assert (hidden - without).norm() < (first - without).norm() / 2


# ---- torch.compile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type, backend, fullgraph",
    [
        ("gemma2", "aot_eager", True),
        pytest.param("llama", "inductor", True, marks=pytest.mark.slow),
        pytest.param("gpt_oss", "aot_eager", False, marks=pytest.mark.slow),
    ],
)
def test_compile(model_type: str, backend: str, fullgraph: bool, no_dynamo_state: None) -> None:
    """Once the model has run: padded and not, of other lengths. gpt-oss's own loop over experts breaks the graph.

    What layers share is seen with Gemma 2, which has two of two kinds; where compiling takes longest, one is enough.
    """
    model = use(tiny(model_type, layers=2 if model_type == "gemma2" else 1), "lam")
    ids, mask = padded("left", [0, 7])
    expected, expected_padded = logits(model, ids), logits(model, ids, attention_mask=mask)
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    torch.testing.assert_close(logits(compiled, ids, use_cache=False), expected, rtol=0, atol=1e-4)
    actual = logits(compiled, ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(actual[mask.bool()], expected_padded[mask.bool()], rtol=0, atol=1e-4)
    shorter = logits(compiled, ids[:, :29], use_cache=False)
    torch.testing.assert_close(shorter, logits(model, ids[:, :29]), rtol=0, atol=1e-4)


def test_compile_of_a_model_that_never_ran(no_dynamo_state: None) -> None:
    """The graph breaks once, where the rotary embedding is looked for."""
    ids = tokens(2, LENGTH)
    expected = logits(use(tiny("llama"), "lam"), ids)
    compiled = torch.compile(use(tiny("llama"), "lam"), backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(logits(compiled, ids, use_cache=False), expected)


def test_compile_with_a_lambda_cache(no_dynamo_state: None) -> None:
    """One graph for the prompt and, whatever has been seen, a constant number for the steps."""
    model, ids = use(tiny("llama"), "lam"), tokens(2, LENGTH)
    expected = logits(model, ids)
    compiled, cache = torch.compile(model, backend="aot_eager", fullgraph=True), LambdaCache(SINKS, WINDOW)
    out, graphs = [logits(compiled, ids[:, :20], past_key_values=cache)], []
    for i in range(20, LENGTH):
        out.append(logits(compiled, ids[:, i : i + 1], past_key_values=cache))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch.testing.assert_close(torch.cat(out, 1), expected, rtol=0, atol=1e-4)
    assert graphs[-1] == graphs[2]


@pytest.mark.parametrize("what", ["positions", "hole"])
def test_compiled_code_checks_too(what: str, no_dynamo_state: None) -> None:
    model, ids = use(tiny("llama"), "lam"), tokens(1, LENGTH)
    logits(model, ids)
    inputs = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(LENGTH)[None]}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits(compiled, ids, use_cache=False, **inputs)
    if what == "positions":
        inputs["position_ids"] = inputs["position_ids"] % 20
    else:
        inputs["attention_mask"] = (torch.arange(LENGTH) != 20).to(torch.int64)[None]
    with pytest.raises(RuntimeError, match="packed sequences" if what == "positions" else "a hole"):
        logits(compiled, ids, use_cache=False, **inputs)


# ---- the model as an object ----------------------------------------------------------------------------------------


def test_copies_and_pickles_of_a_model() -> None:
    """What attention notes down on a module does not travel, and is found again."""
    model, ids = use(tiny("llama"), "lam"), tokens(1, LENGTH)
    expected = logits(model, ids)
    assert set(model.state_dict()) == set(tiny("llama").state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.to(torch.bfloat16)  # not the first one's
        assert torch.equal(logits(other, ids), logits(use(tiny("llama"), "lam").to(torch.bfloat16), ids))
    assert torch.equal(logits(model, ids), expected)


def test_pycore_does_not_import_transformers() -> None:
    code = "import sys, pycore, pycore.integrations, pycore.ops; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations" / "transformers.md"


def test_page_runs() -> None:
    """The code of docs/integrations/transformers.md, block after block, with a small model in place of a checkpoint."""
    blocks = PAGE.read_text().split("```")[1::2]
    assert len(blocks) == 8
    model, ids = tiny("llama"), tokens(1, LENGTH)
    model.generation_config.eos_token_id = PAD
    model.generation_config.pad_token_id = PAD
    scope: dict[str, Any] = {"model": model, "inputs": {"input_ids": ids}}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
        assert model.config._attn_implementation.startswith("pycore_")
        assert scope["out"].shape == (1, LENGTH + 64)
        if isinstance(scope.get("cache"), LambdaCache):
            with pytest.raises(ValueError, match="rollback"):
                scope["cache"].crop(-11)


def test_page_names_the_models() -> None:
    named = PAGE.read_text().split("With the limit: ")[1].split(", where", 1)[0].split(",\nwhere")[0]
    names = {re.sub("[^a-z0-9]", "", name.lower().replace("(text)", "text")) for name in named.split(",")}
    assert names == {re.sub("[^a-z0-9]", "", name) for name in _rope.INTERLEAVED}
