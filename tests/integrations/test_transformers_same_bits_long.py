# SPDX-License-Identifier: Apache-2.0
"""same_bits on SmolLM2-135M over 65,536 tokens: no bit of a logit differs, whatever it is computed with.

PYCORE_SMOLLM2 names a folder with the model (`AutoModelForCausalLM.from_pretrained` reads it), PYCORE_SAME_BITS_TOKENS
how many tokens in place of 65,536 (an eighth of them in bfloat16), PYCORE_SAME_BITS_TEXT how many of them make a text.
64 texts at once are read token by token, every sixteenth text by itself too. That takes an hour or two on two cores, so
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
ALONE = 16  # every so many texts, one is read token by token by itself too
SINKS, WINDOW = 16, 256
CACHES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "full": ("long_causal", lambda config: transformers.DynamicCache(config=config)),
    "lambda": ("long_lambda", lambda config: LambdaCache(SINKS, WINDOW)),
    "staircase": ("long_causal", lambda config: StaircaseCache(config, Staircase((16, 8, 4)))),
    "full, pycore's": ("long_causal", lambda config: KVCache()),
}


def done() -> dict[str, Any]:
    """The digests of texts that were found equal, of each dtype and cache, and which batches were."""
    return json.loads(Path(DONE).read_text()) if DONE and Path(DONE).exists() else {}


def keep(key: str, value: Any) -> None:
    if DONE:
        Path(DONE).write_text(json.dumps(done() | {key: value}))


def out_of_time(key: str, texts: int, total: int) -> None:
    """Ends the run where its time is over."""
    if time.monotonic() - START > SECONDS:
        pytest.skip(f"{key}: {texts * LENGTH} of {total * LENGTH} tokens so far")


def digests(x: Tensor) -> Tensor:
    """A number for each [..., n] of logits that differs where one of their bits does: [...] of int64.

    Factors are odd, so that no difference of a single value is lost modulo 2^64.
    """
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
    factors = torch.randint(-(2**62), 2**62, (x.shape[-1],), generator=torch.Generator().manual_seed(1)) * 2 + 1
    return torch.stack([(row * factors).sum(-1) for row in bits.flatten(0, -2)]).view(x.shape[:-1])


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
    count = TOKENS // LENGTH if dtype == torch.float32 else max(TOKENS // LENGTH // 8, 1)
    texts = torch.randint(20, model.config.vocab_size, (count, LENGTH), generator=generator)

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
    # Logits of 64 texts do not fit into memory: those of the pass over a whole text are kept as digests, a token each.
    found: list[list[int]] = done().get(key, [])
    threads = torch.get_num_threads()
    try:
        for i in range(len(found), len(texts)):
            out_of_time(key, i, len(texts))
            text = texts[i : i + 1]
            torch.set_num_threads(2)
            whole = parts(text, [LENGTH])
            assert torch.equal(parts(text, [*range(77, LENGTH, 77), LENGTH]), whole), "in chunks"
            assert torch.equal(prefixed(text), whole), "after a cached prefix"
            torch.set_num_threads(1)
            assert torch.equal(parts(text, [LENGTH // 2, LENGTH]), whole), "on one thread"
            torch.set_num_threads(2)
            if i % ALONE == 0:
                assert torch.equal(parts(text, list(range(1, LENGTH + 1))), whole), "token by token"
            found.append(digests(whole)[0].tolist())
            keep(key, found)
        for i in range(0, len(texts), ROWS):
            rows, name = texts[i : i + ROWS], f"{key}, batch {i // ROWS}"
            if name in done():
                continue
            out_of_time(name, 0, 1)
            expected, batch = torch.tensor(found[i : i + ROWS]), make(model.config)
            for at in range(LENGTH):  # all rows at once, token by token
                out = logits(model, rows[:, at : at + 1], past_key_values=batch, use_cache=True)
                assert torch.equal(digests(out)[:, 0], expected[:, at]), f"in a batch of {len(rows)}, token {at}"
            keep(name, True)
    finally:
        torch.set_num_threads(threads)


def test_digests_tell_one_bit() -> None:
    x = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        values = x.to(dtype)
        bits = values.view(torch.int32 if dtype == torch.float32 else torch.int16).clone()
        bits[1, 2, 777] ^= 1
        same = digests(bits.view(dtype)) == digests(values)
        assert same.tolist() == [[True, True, True], [True, True, False]]
