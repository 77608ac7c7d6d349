# SPDX-License-Identifier: Apache-2.0
"""A whole model with the same bits beside the plain one, in the sizes of SmolLM2-135M with random weights."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bench import inputs
from bench.case import Case, Options, Outputs, Prepare, largest_error

PROMPT = 1024
SIZES = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    "initializer_range": 0.04,
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # of logits, after thirty layers


def _model(dtype: torch.dtype) -> tuple[Any, Tensor]:
    """The plain model, and a prompt with one token more."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(inputs.SEED)
    config = AutoConfig.for_model("llama", **SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()
    return model, torch.randint(SIZES["vocab_size"], (1, PROMPT + 1))


def _prepare(decode: bool, same: bool) -> Prepare:
    def prepare(given: tuple[Any, Tensor]) -> Callable[[], Outputs]:
        from transformers import DynamicCache

        from pycore.integrations.transformers import same_bits

        model, ids = copy.deepcopy(given[0]), given[1]
        if same:
            same_bits(model)
        if not decode:
            return torch.no_grad()(lambda: (model(ids[:, :PROMPT], logits_to_keep=1).logits,))
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1)

        @torch.no_grad()
        def step() -> Outputs:
            logits = model(ids[:, PROMPT:], past_key_values=cache).logits
            cache.crop(-1)
            return (logits,)

        return step

    return prepare


def _check(decode: bool) -> Callable[[tuple[Any, Tensor]], Callable[[Outputs], float]]:
    def check(given: tuple[Any, Tensor]) -> Callable[[Outputs], float]:
        model, ids = copy.deepcopy(given[0]).double(), given[1]
        with torch.no_grad():
            exact = model(ids if decode else ids[:, :PROMPT], logits_to_keep=1).logits
        return lambda outputs: largest_error(outputs, (exact,))

    return check


def cases(options: Options) -> Iterable[Case]:
    """A prompt of 1024 tokens, and a token after it. CPU only, and only with --full: a model takes its time."""
    if options.device != "cpu" or options.quick or importlib.util.find_spec("transformers") is None:
        return
    weights = 134.5e6
    for name, dtype in DTYPES.items():
        for decode in (False, True):
            yield Case(
                name=f"SmolLM2-135M, {'a token after' if decode else 'a prompt of'} {PROMPT}, {name}",
                group="same_bits",
                inputs=lambda dtype=dtype: _model(dtype),
                contenders={"same_bits": _prepare(decode, True), "plain, SDPA": _prepare(decode, False)},
                check=_check(decode),
                tolerance=TOLERANCE[name],
                flops=0.0 if decode else 2.0 * PROMPT * 106.2e6,  # the layers' weights; the head's are for one token
                bytes=weights * dtype.itemsize if decode else 0.0,
                before=int(decode),
            )


def bench_same_bits(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
