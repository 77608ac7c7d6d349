# SPDX-License-Identifier: Apache-2.0
"""same_bits on SmolLM2-135M over 65,536 tokens: no bit of a logit differs, whatever it is computed with.

PYCORE_SMOLLM2 names a folder with the model (`AutoModelForCausalLM.from_pretrained` reads it), PYCORE_SAME_BITS_TOKENS
how many tokens in place of 65,536, PYCORE_SAME_BITS_TEXT how many of them make a text. Hours on two cores, so
PYCORE_SAME_BITS_DONE may name a file: what has been found equal is written to it and not done again, and a run ends
after PYCORE_SAME_BITS_SECONDS, which is a skip that says how far it is.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pycore import Staircase  # noqa: E402
from pycore.integrations.transformers import KVCache, LambdaCache, StaircaseCache, register, same_bits  # noqa: E402
from tests.support.tiny_models import logits  # noqa: E402

FOLDER = os.environ.get("PYCORE_SMOLLM2", "")
TOKENS = int(os.environ.get("PYCORE_SAME_BITS_TOKENS", 65_536))
LENGTH = int(os.environ.get("PYCORE_SAME_BITS_TEXT", 1024))
DONE = os.environ.get("PYCORE_SAME_BITS_DONE", "")
SECONDS = float(os.environ.get("PYCORE_SAME_BITS_SECONDS", "inf"))
START = time.monotonic()
ROWS = 64  # of a batch
SINKS, WINDOW = 16, 256
CACHES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "full": ("long_causal", lambda config: transformers.DynamicCache(config=config)),
    "full, pycore's": ("long_causal", lambda config: KVCache()),
    "lambda": ("long_lambda", lambda config: LambdaCache(SINKS, WINDOW)),
    "staircase": ("long_causal", lambda config: StaircaseCache(config, Staircase((16, 8, 4)))),
}


def done() -> dict[str, int]:
    """Texts that were found equal, of each dtype and cache."""
    return json.loads(Path(DONE).read_text()) if DONE and Path(DONE).exists() else {}


def go_on(key: str, texts: int, total: int) -> None:
    """Says that so many texts were found equal, and ends the run where its time is over."""
    if DONE:
        Path(DONE).write_text(json.dumps(done() | {key: texts}))
    if texts < total and time.monotonic() - START > SECONDS:
        pytest.skip(f"{key}: {texts * LENGTH} of {total * LENGTH} tokens so far")


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="PYCORE_SMOLLM2 names no folder with SmolLM2-135M-Instruct of Hugging Face")
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_no_bit_differs(dtype: torch.dtype, cache: str) -> None:
    register("long_causal", window_size=None)
    register("long_lambda", sink_size=SINKS, window_size=WINDOW)
    name, make = CACHES[cache]
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype, attn_implementation=name).eval()
    same_bits(model)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(20, model.config.vocab_size, (TOKENS // LENGTH, LENGTH), generator=generator)

    def parts(ids: Tensor, ends: list[int], given: Any = None) -> Tensor:
        held = make(model.config) if given is None else given
        begins = [0, *ends[:-1]]
        pieces = zip(begins, ends, strict=True)
        return torch.cat([logits(model, ids[:, a:b], past_key_values=held, use_cache=True) for a, b in pieces], 1)

    def prefixed(ids: Tensor) -> Tensor:
        held = make(model.config)
        head = parts(ids, [LENGTH // 3], held)
        rest = logits(model, ids[:, LENGTH // 3 :], past_key_values=held, use_cache=True)
        return torch.cat([head, rest], 1)

    key = f"{str(dtype)[6:]} {cache} {LENGTH}"
    begin = done().get(key, 0)
    threads = torch.get_num_threads()
    try:
        for i in range(begin, len(texts)):
            if time.monotonic() - START > SECONDS:
                go_on(key, i, len(texts))
            text = texts[i : i + 1]
            torch.set_num_threads(2)
            whole = parts(text, [LENGTH])
            assert torch.equal(parts(text, [*range(77, LENGTH, 77), LENGTH]), whole), "in chunks"
            assert torch.equal(prefixed(text), whole), "after a cached prefix"
            torch.set_num_threads(1)
            assert torch.equal(parts(text, [LENGTH // 2, LENGTH]), whole), "on one thread"
            torch.set_num_threads(2)
            assert torch.equal(parts(text, list(range(1, LENGTH + 1))), whole), "token by token"
            if i % ROWS == ROWS - 1 or i == len(texts) - 1:
                rows = texts[i - i % ROWS : i + 1]
                batch = make(model.config)
                for a in range(0, LENGTH, 64):  # all rows at once, the last one compared
                    out = logits(model, rows[:, a : a + 64], past_key_values=batch, use_cache=True)
                    assert torch.equal(out[-1:], whole[:, a : a + 64]), "in a batch"
            go_on(key, i + 1, len(texts))
    finally:
        torch.set_num_threads(threads)
