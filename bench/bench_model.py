# SPDX-License-Identifier: Apache-2.0
"""A whole model, SmolLM2-135M: prefill and decoding by transformers as it is, and with pycore's attention and caches.

Cases exist where `python examples/smollm2.py` has put the model. All contenders share its weights and read the same
text, sources of the standard library. Beyond its window Λ attention reads 4 sinks and 1024 tokens where the others
read all, which is what is compared. The check is the KL divergence of a prediction from SDPA's, which the tables
give: rounding where a contender reads the same, more where it reads less or fewer bits.
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench import model_peers
from bench.case import Case, Options, Outputs, Prepare

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SINK, WINDOW, CHUNK = 4, 1024, 512
# KL divergence of the next token from SDPA's, nats: rounding, fewer bits, fewer tokens, four bits for all that is old.
ROUNDING, BITS, TOKENS, FOUR_BITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}, 0.1, 1.0, 1.0
ERROR = "nats from SDPA's prediction"
STEPS = 256  # more than any run takes


@functools.cache
def _examples() -> Any:
    """The module that loads the model."""
    sys.path.insert(0, str(EXAMPLES))
    import smollm2

    return smollm2


@functools.cache
def _loaded(dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """The model, and a text of 8192 tokens and what follows it."""
    model, tokenizer = _examples().load(dtype)
    return model, _examples().texts(_examples().encoder(tokenizer), 1, 8192 + STEPS)[0]


def _with_attention(model: Any, attention: str) -> Any:
    """The model with another attention; it shares the weights."""
    same = {id(parameter): parameter for parameter in model.parameters()}
    other = copy.deepcopy(model, same)
    other.set_attn_implementation(attention)
    return other


class Inputs:
    """The model, a text, and SDPA's cache and prediction after `context` of its tokens."""

    def __init__(self, context: int, dtype: torch.dtype) -> None:
        """Makes nothing yet."""
        self.model, self.ids = _loaded(dtype)
        self.context = context
        self.filled: dict[str, Any] = {}

    @functools.cached_property
    def read(self) -> tuple[Any, torch.Tensor]:
        """SDPA's cache, to copy, and what it predicts after the context and one more token."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        self.fill(self.model, cache)
        return cache, step_logits(self.model, copy.deepcopy(cache), self.ids[:, self.context : self.context + 1])

    @torch.no_grad()
    def fill(self, model: Any, cache: Any) -> None:
        """Reads the context into a cache."""
        for at in range(0, self.context, CHUNK):
            model(self.ids[:, at : min(at + CHUNK, self.context)], past_key_values=cache, logits_to_keep=1)


@torch.no_grad()
def step_logits(model: Any, cache: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The logits after some tokens."""
    return model(ids, past_key_values=cache, logits_to_keep=1, **kwargs).logits[0, -1]


def _divergence(expected: torch.Tensor) -> Callable[[Outputs], float]:
    """Of a prediction from the expected one, nats."""
    log_probs = torch.log_softmax(expected.double(), -1)

    def check(outputs: Outputs) -> float:
        return (log_probs.exp() * (log_probs - torch.log_softmax(outputs[0].double(), -1))).sum().abs().item()

    return check


def _allowed(names: Iterable[str], tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """What a contender's prediction after so many tokens may diverge from SDPA's, where that is not rounding."""
    bits = {name: max(BITS if "staircase" in name else FOUR_BITS, ROUNDING[dtype]) for name in names if " bits" in name}
    less = {name: TOKENS for name in names if tokens > WINDOW and ("Λ" in name or "sliding" in name)}
    return bits | less


# ---- caches and the attention that reads them ------------------------------------------------------------------------


def _lambda(model: Any) -> tuple[Any, Any]:
    from pycore.integrations.transformers import LambdaCache, register

    register("bench_lambda", sink_size=SINK, window_size=WINDOW)
    return _with_attention(model, "bench_lambda"), LambdaCache(SINK, WINDOW)


def _causal(model: Any) -> tuple[Any, Any]:
    from pycore.integrations import transformers as ours

    ours.register("bench_causal", window_size=None)
    return _with_attention(model, "bench_causal"), ours.KVCache()


def _staircase(model: Any) -> tuple[Any, Any]:
    from pycore import Staircase
    from pycore.integrations.transformers import StaircaseCache, register

    register("bench_staircase", window_size=None)
    model = _with_attention(model, "bench_staircase")
    return model, StaircaseCache(model.config, Staircase((16, 8, 4)))


def _same(make: Callable[[Any], tuple[Any, Any]]) -> Callable[[Any], tuple[Any, Any]]:
    """The same cache, of a model with the same bits."""

    def made(model: Any) -> tuple[Any, Any]:
        from pycore.integrations.transformers import same_bits

        model, cache = make(model)
        return same_bits(model), cache

    return made


def _dynamic(attention: str) -> Callable[[Any], tuple[Any, Any]]:
    def make(model: Any) -> tuple[Any, Any]:
        from transformers import DynamicCache

        return _with_attention(model, attention), DynamicCache(config=model.config)

    return make


def ours() -> dict[str, Callable[[Any], tuple[Any, Any]]]:
    """Pycore's caches, by name; Λ first."""
    caches = {"pycore Λ": _lambda, "pycore KVCache": _causal, "pycore staircase, 16/8/4 bits": _staircase}
    same = {name.replace("pycore", "pycore same_bits"): _same(make) for name, make in caches.items()}
    return caches | same


# ---- decoding --------------------------------------------------------------------------------------------------------

# Takes the text's next token and its position, returns logits.
Step = Callable[[torch.Tensor, int], torch.Tensor]


def _timed(prepare_step: Callable[[Inputs], Step]) -> Prepare:
    """A call takes the text's next token."""

    def prepare(inputs: Inputs) -> Callable[[], Outputs]:
        step, at = prepare_step(inputs), itertools.count(inputs.context)

        def run() -> Outputs:
            i = next(at)
            return (step(inputs.ids[:, i : i + 1], i),)

        return run

    return prepare


def _decode(name: str, make: Callable[[Any], tuple[Any, Any]]) -> Callable[[Inputs], Step]:
    """A cache that the model fills itself; with the same bits, a copy of what it was filled with without them."""
    plain = name.replace("pycore same_bits", "pycore")

    def prepare(inputs: Inputs) -> Step:
        model, cache = make(inputs.model)
        if plain in inputs.filled:
            cache = copy.deepcopy(inputs.filled[plain])
        else:
            inputs.fill(model, cache)
            inputs.filled[plain] = copy.deepcopy(cache)
        return lambda ids, _: step_logits(model, cache, ids)

    return prepare


def _decode_dynamic(attention: str) -> Callable[[Inputs], Step]:
    def prepare(inputs: Inputs) -> Step:
        model, cache = _with_attention(inputs.model, attention), copy.deepcopy(inputs.read[0])
        return lambda ids, _: step_logits(model, cache, ids)

    return prepare


def _copied(inputs: Inputs, cache: Any) -> Any:
    """`cache`, with what SDPA's holds."""
    for i, layer in enumerate(inputs.read[0].layers):
        cache.update(layer.keys, layer.values, i)
    return cache


def _decode_quantized(inputs: Inputs) -> Step:
    """Transformers' own: 4 bits, the newest 128 in full."""
    from transformers import QuantizedCache

    model, cache = _with_attention(inputs.model, "sdpa"), QuantizedCache("quanto", inputs.model.config)
    _copied(inputs, cache)
    return lambda ids, _: step_logits(model, cache, ids)


def _decode_window(inputs: Inputs) -> Step:
    """Transformers' sliding layers as a cache for a model that has none: the newest tokens, without sinks."""
    from transformers import DynamicCache

    model = _with_attention(inputs.model, "sdpa")
    config = copy.deepcopy(model.config)
    config.sliding_window, config.layer_types = WINDOW, ["sliding_attention"] * config.num_hidden_layers
    cache = _copied(inputs, DynamicCache(config=config))
    return lambda ids, i: step_logits(model, cache, ids, position_ids=torch.tensor([[i]]))


def _decode_static(inputs: Inputs) -> Step:
    """Transformers' advice for speed: a static cache and compiled code."""
    from transformers import StaticCache

    model = _with_attention(inputs.model, "sdpa")
    cache = _copied(inputs, StaticCache(config=model.config, max_cache_len=inputs.context + STEPS))
    forward = torch.compile(model.forward, fullgraph=True)

    @torch.no_grad()
    def step(ids: torch.Tensor, i: int) -> torch.Tensor:
        position = torch.tensor([[i]])
        return forward(ids, past_key_values=cache, position_ids=position, logits_to_keep=1).logits[0, -1]

    return step


def _decode_outside(make: Callable[[Any, int], model_peers.Reader]) -> Callable[[Inputs], Step]:
    """Another library's whole model, which reads the context itself."""

    def prepare(inputs: Inputs) -> Step:
        read = make(inputs.model, inputs.context + STEPS)
        for at in range(0, inputs.context, CHUNK):
            read(inputs.ids[:, at : min(at + CHUNK, inputs.context)], at)
        return read

    return prepare


def decode_case(context: int, dtype: torch.dtype, quick: bool) -> Case:
    """One token after `context` of them."""
    contenders = {name: _decode(name, make) for name, make in ours().items()}
    contenders["transformers SDPA"] = _decode_dynamic("sdpa")
    if context <= WINDOW:
        contenders["transformers eager"] = _decode_dynamic("eager")
    if not quick and dtype == torch.float32:  # compiling takes minutes
        contenders["static cache, compiled"] = _decode_static
    if not quick and context > WINDOW:
        contenders["QuantizedCache, 4 bits"] = _decode_quantized
        contenders[f"sliding layers, {WINDOW}"] = _decode_window
    if not quick:
        contenders |= {name: _decode_outside(make) for name, make in model_peers.makers(dtype).items()}
    name = str(dtype).removeprefix("torch.")
    return Case(
        name=f"SmolLM2-135M, a token at {context}, {name}",
        group=f"SmolLM2-135M decode (Λ: {SINK} sinks, window {WINDOW})",
        inputs=lambda: Inputs(context, dtype),
        contenders={name: _timed(prepare) for name, prepare in contenders.items()},
        check=lambda inputs: _divergence(inputs.read[1]),
        tolerance=ROUNDING[dtype],
        tolerances=_allowed(contenders, context + 1, dtype),
        error=ERROR,
        bytes=float(dtype.itemsize * 134_515_008),  # every weight, once
        before=1,
    )


# ---- prefill ---------------------------------------------------------------------------------------------------------


def _prefill(make: Callable[[Any], tuple[Any, Any]]) -> Prepare:
    def prepare(inputs: Inputs) -> Callable[[], Outputs]:
        model, empty = make(inputs.model)
        ids = inputs.ids[:, : inputs.context]

        def run() -> Outputs:
            cache = copy.deepcopy(empty)  # every call fills one of its own
            return (step_logits(model, cache, ids),)

        return run

    return prepare


def _prefill_outside(make: Callable[[Any, int], model_peers.Reader]) -> Prepare:
    def prepare(inputs: Inputs) -> Callable[[], Outputs]:
        read, ids = make(inputs.model, inputs.context), inputs.ids[:, : inputs.context]
        return lambda: (read(ids, 0),)

    return prepare


def prefill_case(context: int, dtype: torch.dtype, quick: bool) -> Case:
    """A prompt of `context` tokens in one pass."""
    makers = ours() if context <= 1024 else {"pycore Λ": _lambda}
    makers["transformers SDPA"] = _dynamic("sdpa")
    if context <= 1024:
        makers["transformers eager"] = _dynamic("eager")
    contenders = {name: _prefill(make) for name, make in makers.items()}
    if context <= 1024 and not quick:
        contenders |= {name: _prefill_outside(make) for name, make in model_peers.makers(dtype).items()}

    def check(inputs: Inputs) -> Callable[[Outputs], float]:
        model, cache = _dynamic("sdpa")(inputs.model)
        return _divergence(step_logits(model, cache, inputs.ids[:, :context]))

    return Case(
        name=f"SmolLM2-135M, prompt of {context}, {str(dtype).removeprefix('torch.')}",
        group=f"SmolLM2-135M prefill (Λ: {SINK} sinks, window {WINDOW})",
        inputs=lambda: Inputs(context, dtype),
        contenders=contenders,
        check=check,
        tolerance=ROUNDING[dtype],
        tolerances=_allowed(contenders, context, dtype),
        error=ERROR,
        flops=2.0 * 106_203_456 * context,  # the layers' weights; attention counts nothing here
    )


def cases(options: Options) -> Iterable[Case]:
    """A quick one of each; else what twenty minutes have room for."""
    if options.device != "cpu":
        return
    if not _examples().present():
        print(f"bench_model is left out: {_examples().missing()}", file=sys.stderr)
        return
    if options.quick:
        yield decode_case(256, torch.float32, True)
        yield prefill_case(1024, torch.float32, True)
        return
    if absent := model_peers.absent():
        print(f"bench_model does without contenders of {', '.join(absent)}, not installed", file=sys.stderr)
    for dtype, contexts in ((torch.float32, (256, 8192)), (torch.bfloat16, (256, 4096))):
        for context in contexts:
            yield decode_case(context, dtype, False)
        yield prefill_case(1024, dtype, False)
    yield prefill_case(8192, torch.float32, False)


def bench_model(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
