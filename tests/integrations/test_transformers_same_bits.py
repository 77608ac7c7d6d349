# SPDX-License-Identifier: Apache-2.0
"""same_bits: logits that are bitwise equal whatever a token is computed with, for every family, cache and dtype.

tests/golden/same_bits_models.json has a digest for each family and dtype, of models with integer weights, which any
machine checks. `python tests/integrations/test_transformers_same_bits.py --update` rewrites it, after a change that is
meant to move bits.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore import Staircase, native
from pycore.integrations.transformers import LambdaCache, StaircaseCache, register, same_bits
from tests.support.tiny_models import PAD, VOCABULARY, logits, tiny, tokens, use
from tests.support.tolerance import assert_model_as_accurate

from transformers import DynamicCache  # isort: skip # tiny_models skips where it is missing

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "same_bits_models.json"
FAMILIES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3")
DTYPES = [torch.float32, torch.bfloat16]
LENGTH, SINKS, WINDOW = 100, 3, 30
CAPPED: dict[str, Any] = {"final_logit_softcapping": 5.0}
LADDER = Staircase((16, 8, 4), step=32, sink_size=3, group_size=16, rollback=0)
parametrize_family = pytest.mark.parametrize("family", FAMILIES)
parametrize_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

# name: the attention in use (None: what same_bits chooses), and a cache
CACHES: dict[str, tuple[str | None, Callable[[Any], Any]]] = {
    "full": (None, lambda config: DynamicCache(config=config)),
    "lambda": ("same_lambda", lambda config: LambdaCache(SINKS, WINDOW)),
    "lambda, kept": ("same_kept", lambda config: LambdaCache(SINKS, WINDOW)),
    "staircase": (None, lambda config: StaircaseCache(config, LADDER, prefill="staircase")),
}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register("same_lambda", sink_size=SINKS, window_size=WINDOW)
    register("same_kept", sink_size=SINKS, window_size=WINDOW, limit_distances=False)


def made(family: str, dtype: torch.dtype = torch.float32, name: str | None = None, **changes: Any) -> Any:
    """A model with the same bits."""
    if family.startswith(("gemma2", "gemma3")):
        changes = CAPPED | changes
    model = tiny(family, dtype=dtype, **changes)
    if name is not None:
        use(model, name)
    return same_bits(model)


def in_parts(model: Any, ids: Tensor, ends: list[int], cache: Any, mask: Tensor | None = None) -> Tensor:
    """Logits of ids, chunk by chunk."""
    out, begin = [], 0
    for end in ends:
        inputs: dict[str, Any] = {}
        if mask is not None:
            seen = mask[:, :end]
            inputs = {"attention_mask": seen, "position_ids": (seen.cumsum(-1) - 1).clamp(min=0)[:, begin:end]}
        out.append(logits(model, ids[:, begin:end], past_key_values=cache, use_cache=True, **inputs))
        begin = end
    return torch.cat(out, 1)


def equal_parts(length: int, size: int) -> list[int]:
    return [*range(size, length, size), length]


def differing(model: Any, ids: Tensor, cache: Callable[[], Any], whole: Tensor) -> dict[str, int]:
    """How many logits differ from those of row 0 of `ids` in one pass, for each way to compute them."""
    length, rows = ids.shape[1], ids.shape[0]
    found: dict[str, Tensor] = {}
    found["one pass"] = in_parts(model, ids[:1], [length], cache())
    found["steps"] = in_parts(model, ids[:1], equal_parts(length, 1), cache())
    found["chunks"] = in_parts(model, ids[:1], [17, 66, 67, length], cache())
    found["batch"] = in_parts(model, ids, [length], cache())[:1]
    found["batch, chunks"] = in_parts(model, ids, equal_parts(length, 64), cache())[:1]
    # Left padding: row 0 whole beside others that are shorter, and a short row beside row 0.
    pads = [0, *(7 * i for i in range(1, rows))]
    mask = torch.ones(rows, length, dtype=torch.int64)
    padded = torch.full_like(ids, 0)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
        padded[row, pad:] = ids[0, : length - pad]
    for name, ends in (("padded", [length]), ("padded, chunks", [30, 31, 79, length])):
        out = in_parts(model, padded, ends, cache(), mask)
        found[name] = torch.cat([out[row, pad:] for row, pad in enumerate(pads)])
    expected = {name: whole for name in found}
    expected |= dict.fromkeys(("padded", "padded, chunks"), torch.cat([whole[0, : length - pad] for pad in pads]))
    prefix = cache()
    head = in_parts(model, ids[:1], [70], prefix)
    tails = [in_parts(model, ids[:1, 70:], equal_parts(length - 70, size), copy.deepcopy(prefix)) for size in (80, 1)]
    for name, tail in zip(("prefix, one pass", "prefix, steps"), tails, strict=True):
        found[name], expected[name] = torch.cat([head, tail], 1), whole
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[f"{threads} threads"] = in_parts(model, ids[:1], [70, length], cache())
            expected[f"{threads} threads"] = whole
    finally:
        torch.set_num_threads(before)
    return {name: int((found[name] != expected[name]).sum()) for name in found}


@pytest.mark.parametrize("cache", CACHES)
@parametrize_dtype
@parametrize_family
def test_no_bit_differs(family: str, dtype: torch.dtype, cache: str) -> None:
    name, make = CACHES[cache]
    model, ids = made(family, dtype, name), tokens(8, LENGTH)
    if cache.startswith("lambda") and family == "mistral":
        pytest.skip("all of its layers slide")
    try:
        make_one = make(model.config)
    except ValueError:
        assert cache == "staircase" and family == "mistral"
        pytest.skip("all of its layers slide")
    if cache == "staircase":
        whole = in_parts(model, ids[:1], [LENGTH], make_one)
    else:
        whole = logits(model, ids[:1])
    assert whole.isfinite().all()
    found = differing(model, ids, lambda: make(model.config), whole)
    assert found == dict.fromkeys(found, 0)


def test_instruction_sets() -> None:
    """Bits of one set on the other, forward and backward."""
    wide = [isa for isa in native.available_isas() if isa != "scalar"]
    model, ids = made("gemma2"), tokens(2, 60)
    before, found = native.cpu_isa(), []
    try:
        for isa in wide:
            native.set_cpu_isa(isa)
            out = model(ids).logits
            out.square().sum().backward()
            found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
            model.zero_grad()
    finally:
        native.set_cpu_isa(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@parametrize_dtype
@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(x, marks=pytest.mark.slow) for x in ("gemma2", "gemma3_text", "qwen3", "smollm3"))],
)
def test_compiled(family: str, dtype: torch.dtype) -> None:
    """In one graph, with a length that changes, and steps with a cache."""
    model, ids = made(family, dtype), tokens(2, 60)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for length in (60, 31, 7):
        assert torch.equal(logits(compiled, ids[:, :length]), logits(model, ids[:, :length]))
    whole, cache = logits(model, ids), DynamicCache(config=model.config)
    steps = torch.compile(model, dynamic=True)
    assert torch.equal(in_parts(steps, ids, [20, 50, *range(51, 61)], cache), whole)
    torch.compiler.reset()


@pytest.mark.parametrize("cache", ["full", "lambda", "staircase"])
def test_generate(cache: str) -> None:
    """What generate scores token by token is what one pass over its text gives; beside others too."""
    name, make = CACHES[cache]
    model = made("llama", name=name)
    mask = torch.ones(3, 30, dtype=torch.int64)
    mask[1, :11], mask[2, :29] = 0, 0
    options: dict[str, Any] = {
        "max_new_tokens": 60, "do_sample": False, "pad_token_id": PAD, "eos_token_id": PAD + 1,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    out = model.generate(tokens(3, 30), attention_mask=mask, past_key_values=make(model.config), **options)
    scored = torch.stack(out.logits, 1)
    for row, pad in enumerate((0, 11, 29)):
        text = out.sequences[row : row + 1, pad:]
        alone = in_parts(model, text, [text.shape[1]], make(model.config))
        assert torch.equal(scored[row], alone[0, 29 - pad : -1])


def test_without_it_bits_differ() -> None:
    """The very ways of `differing`, on a model wide enough for torch to choose between its products."""
    model = tiny("llama", hidden_size=256, intermediate_size=704, num_attention_heads=4, head_dim=64)
    ids = tokens(8, LENGTH)
    model.set_attn_implementation("sdpa")
    found = differing(model, ids, lambda: DynamicCache(config=model.config), logits(model, ids[:1]))
    assert found["steps"] > 0 and found["chunks"] > 0 and found["padded"] > 0
    same_bits(model)
    found = differing(model, ids, lambda: DynamicCache(config=model.config), logits(model, ids[:1]))
    assert found == dict.fromkeys(found, 0)


@parametrize_family
def test_as_accurate_as_the_plain_model(family: str) -> None:
    """Against the model in float64, in which transformers too rotates by float32 angles."""
    ids = tokens(2, 100)
    capped = CAPPED if family.startswith(("gemma2", "gemma3")) else {}
    exact = logits(tiny(family, dtype=torch.float64, **capped), ids)
    for dtype in DTYPES:
        plain = tiny(family, dtype=dtype, **capped)
        assert_model_as_accurate(logits(made(family, dtype), ids), exact, logits(plain, ids))


# ---- the model -------------------------------------------------------------------------------------------------------


@parametrize_family
def test_undo_and_state(family: str, tmp_path: Path) -> None:
    model, ids = tiny(family), tokens(1, 40)
    before = {name: value for name, value in model.state_dict(keep_vars=True).items()}
    classes = [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    plain, attention = logits(model, ids), model.config._attn_implementation
    assert same_bits(model) is model
    changed = logits(model, ids)
    assert same_bits(model) is model and torch.equal(logits(model, ids), changed)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert type(loaded) is classes[0]
    assert torch.equal(logits(loaded, ids), plain) and torch.equal(logits(same_bits(loaded), ids), changed)
    assert same_bits(model, undo=True) is model
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert model.config._attn_implementation == attention and torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_copies_and_casts(family: str) -> None:
    model, ids = made(family), tokens(1, 40)
    expected = logits(model, ids)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), ids), expected)
    same_bits(other, undo=True)
    assert torch.equal(logits(model, ids), expected) and not torch.equal(logits(other, ids), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(logits(half, ids), logits(made(family, torch.bfloat16), ids))
    assert torch.equal(in_parts(half, ids, equal_parts(40, 1), DynamicCache(config=half.config)), logits(half, ids))


NAN = float("nan")


@contextlib.contextmanager
def spoiled(model: Any, path: str, way: str) -> Iterator[None]:
    """A linear layer's result is no number, by something that only a call of that layer meets."""
    parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    linear = getattr(parent, name)
    if way == "hook":
        handle = linear.register_forward_hook(lambda module, args, out: out * NAN)
    elif way == "hook before":
        handle = linear.register_forward_pre_hook(lambda module, args: (args[0] * NAN,))
    elif way == "hook of all modules":
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, out: out * NAN if module is linear else None
        )
    elif way == "forward of its own":
        linear.forward = lambda x: type(linear).forward(linear, x) * NAN
    elif way == "class of its own":
        made: Any = type(linear)
        linear.__class__ = type("Spoiled", (made,), {"forward": lambda self, x: made.forward(self, x) * NAN})
    else:
        setattr(parent, name, torch.nn.Sequential(linear, torch.nn.Threshold(torch.inf, NAN)))
    try:
        yield
    finally:
        if way.startswith("hook"):
            handle.remove()
        elif way == "forward of its own":
            del linear.forward
        elif way == "class of its own":
            linear.__class__ = type(linear).__mro__[1]
        else:
            setattr(parent, name, linear)


@pytest.mark.parametrize("way", ["hook", "hook before", "hook of all modules", "forward of its own", "class of its own",
                                 "another module"])  # fmt: skip
@pytest.mark.parametrize("path", ["self_attn.k_proj", "mlp.up_proj"])
def test_a_step_calls_layers_that_have_more_to_do(path: str, way: str) -> None:
    model, ids = made("qwen2"), tokens(1, 9)  # with biases

    def steps() -> Tensor:
        return in_parts(model, ids, equal_parts(9, 1), DynamicCache(config=model.config))

    expected = logits(model, ids)
    assert torch.equal(steps(), expected)
    with spoiled(model, f"model.layers.1.{path}", way):
        assert steps().isnan().all()
    assert torch.equal(steps(), expected)
    linear = model.get_submodule(f"model.layers.1.{path}")
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", torch.nn.Identity())
    assert torch.equal(steps(), expected)


class Shift(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_biases_that_are_made_anew_are_added() -> None:
    model, ids = made("qwen2"), tokens(1, 9)
    before = logits(model, ids)
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = model.get_submodule(f"model.layers.1.self_attn.{name}")
        torch.nn.utils.parametrize.register_parametrization(linear, "bias", Shift())
    whole = logits(model, ids)
    assert not torch.equal(whole, before)
    assert torch.equal(in_parts(model, ids, equal_parts(9, 1), DynamicCache(config=model.config)), whole)


@parametrize_family
def test_parts_of_a_few_tokens(family: str) -> None:
    """What takes several layers at once has up to six rows, of one text or of several."""
    model, ids = made(family), tokens(2, 40)
    whole = logits(model, ids)
    for rows, ends in ((1, [3, 9, 15, 22, 24, 40]), (2, [2, 5, 8, 12, 40])):
        cache = DynamicCache(config=model.config)
        assert torch.equal(in_parts(model, ids[:rows], ends, cache), whole[:rows])


def test_a_step_takes_several_layers_at_once() -> None:
    names: list[str] = []

    class Called(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    model, ids = made("llama"), tokens(1, 8)
    cache = DynamicCache(config=model.config)
    in_parts(model, ids, [7], cache)
    with Called():
        logits(model, ids[:, 7:], past_key_values=cache, use_cache=True)
    layers = model.config.num_hidden_layers
    assert names.count("pycore::invariant_linears") == 2 * layers
    assert names.count("pycore::invariant_linear") == 2 * layers + 1 and names.count("pycore::rotate") == layers


def test_tied_heads() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    same_bits(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model, tokens(1, 9)), torch.cat([logits(model, tokens(1, 9)[:, :n])[:, -1:]
                                                               for n in range(1, 10)], 1))  # fmt: skip


def test_a_model_without_a_head() -> None:
    model = made("llama")
    ids = tokens(1, 20)
    base = same_bits(copy.deepcopy(same_bits(copy.deepcopy(model), undo=True).model))
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("scaling", [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
], ids=lambda scaling: scaling["rope_type"])  # fmt: skip
def test_stretched_frequencies(scaling: dict[str, Any]) -> None:
    ids = tokens(1, 100)
    plain = tiny("llama", max_position_embeddings=256, rope_scaling=dict(scaling))
    expected = logits(plain, ids)
    model = same_bits(plain)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-3, atol=1e-3)
    steps = in_parts(model, ids, equal_parts(100, 1), DynamicCache(config=model.config))
    assert torch.equal(steps, logits(model, ids))
    use(model, "same_lambda")
    steps = in_parts(model, ids, equal_parts(100, 7), LambdaCache(SINKS, WINDOW))
    assert torch.equal(steps, in_parts(model, ids, [50, 100], DynamicCache(config=model.config)))


def test_training() -> None:
    """Gradients arrive at every parameter and are those of the plain model, as near as float32 has them."""
    model, ids = tiny("qwen3"), tokens(2, 50)
    model(ids, labels=ids).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    same_bits(model)(ids, labels=ids).loss.backward()
    for parameter, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_refused() -> None:
    families = ", ".join(FAMILIES)
    phi = tiny("phi")
    with pytest.raises(ValueError, match="^same_bits: model is a PhiForCausalLM, whose model_type is phi, and must be "
                                         rf"one of {families}$"):  # fmt: skip
        same_bits(phi)
    with pytest.raises(ValueError, match="^same_bits: model is a Linear, whose model_type is None, and must be one of"):
        same_bits(torch.nn.Linear(3, 4))
    with pytest.raises(TypeError, match="^same_bits: model is a str and must be a model of transformers$"):
        same_bits("llama")  # type: ignore[arg-type]
    model = tiny("llama")
    with pytest.raises(ValueError, match="^same_bits: model is a LlamaForCausalLM without the same bits, and undo must "
                                         "follow do$"):  # fmt: skip
        same_bits(model, undo=True)
    with pytest.raises(TypeError, match="^same_bits: undo "):
        same_bits(model, undo=1)  # type: ignore[arg-type]


def test_refused_layers() -> None:
    """Nothing has changed afterwards."""

    class Adapter(torch.nn.Linear):
        pass

    model, ids = tiny("llama"), tokens(1, 9)
    expected, classes = logits(model, ids), [type(module) for module in model.modules()]

    def refuses(sentence: str) -> None:
        with pytest.raises(ValueError, match=f"^same_bits: {sentence}$"):
            same_bits(model)
        assert not any("_pycore" in name for module in model.modules() for name in module.__dict__)

    projection = model.model.layers[1].self_attn.o_proj
    projection.__class__ = Adapter
    refuses("model.layers.1.self_attn.o_proj is a Adapter and must be a layer that llama has by itself")
    projection.__class__ = torch.nn.Linear
    mlp = model.model.layers[0].mlp
    before, mlp.act_fn = mlp.act_fn, torch.nn.ReLU()
    refuses("model.layers.0.mlp.act_fn is ReLU and must be SiLU or GELU")
    mlp.act_fn = before
    model.model.rotary_emb.inv_freq.mul_(2)
    refuses("model.rotary_emb has frequencies of its own and must have those of its config")
    model.model.rotary_emb.inv_freq.div_(2)
    assert [type(module) for module in model.modules()] == classes and torch.equal(logits(model, ids), expected)
    model = tiny("llama", max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    refuses("model.rotary_emb has rope_type dynamic, whose frequencies change with the length, and must have default, "
            "linear, llama3 or yarn")  # fmt: skip


def test_another_attention() -> None:
    """Chosen afterwards, it would lose the bits without a word."""
    model = made("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="^same_bits: config has attn_implementation 'sdpa' and must have one "
                                         "registered by pycore.integrations.transformers$"):  # fmt: skip
        logits(model, tokens(1, 9))


# ---- other machines --------------------------------------------------------------------------------------------------


def integer_model(family: str, dtype: torch.dtype) -> Any:
    """Weights that every machine draws alike."""
    model = tiny(family, **(CAPPED if family.startswith(("gemma2", "gemma3")) else {}))
    generator = torch.Generator().manual_seed(len(family))
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randint(-512, 513, parameter.shape, generator=generator)
            parameter.copy_(drawn / 2048 + (parameter.dim() == 1))
    return same_bits(model.to(dtype))


def digest(family: str, dtype: torch.dtype) -> str:
    ids = torch.randint(3, VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(1))
    out = logits(integer_model(family, dtype), ids)
    assert out.isfinite().all()
    return hashlib.sha256(out.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


def digests() -> dict[str, str]:
    return {f"{family} {str(dtype)[6:]}": digest(family, dtype) for family in FAMILIES for dtype in DTYPES}


@pytest.mark.parametrize("capability", ["default", "avx2", None])
def test_digests_of_every_machine(capability: str | None) -> None:
    """With torch's own instruction set lowered too: what is left to it rounds one way only."""
    if "avx2" not in native.available_isas():
        pytest.skip("this machine has no AVX2")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if capability is not None:
        environment |= {"ATEN_CPU_CAPABILITY": capability, "PYCORE_CPU_ISA": "avx2"}
    run = subprocess.run(
        [sys.executable, __file__, "--print"], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == json.loads(GOLDEN.read_text())


if __name__ == "__main__":
    if sys.argv[1:] not in (["--update"], ["--print"]):
        sys.exit("usage: python tests/integrations/test_transformers_same_bits.py --update")
    if sys.argv[1] == "--update":
        GOLDEN.write_text(json.dumps(digests(), indent=1) + "\n")
    print(json.dumps(digests()))
