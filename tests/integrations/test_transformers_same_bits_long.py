# SPDX-License-Identifier: Apache-2.0
"""same_bits on SmolLM2-135M over 65,536 tokens: no bit of a logit differs, whatever it is computed with.

The model is where `python examples/smollm2.py` puts it. PYCORE_SAME_BITS=1 asks for the whole test, which takes
some hours on two cores: every text in one pass, in chunks, after a cached prefix and on one thread; then all texts at
once token by token, and each text token by token by itself, with one thread and two by turns. PYCORE_SAME_BITS_TOKENS
says how many tokens in place of 65,536 (an eighth of them in bfloat16). PYCORE_SAME_BITS_DONE may name a file: what
has been found equal is written to it and not done again, and a run ends after PYCORE_SAME_BITS_SECONDS, which is a
skip that says how far it is.

tests/golden/same_bits_real_model.json has digests of the logits, of all texts and of the first tokens of the first
one; the latter are checked in every run, on each instruction set of the machine. PYCORE_SAME_BITS=update puts
those of the whole test there, after a change that is meant to move bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pycore import Staircase, native  # noqa: E402
from pycore.integrations.transformers import KVCache, LambdaCache, StaircaseCache, register, same_bits  # noqa: E402
from tests.support.tiny_models import logits  # noqa: E402
from tests.test_examples import EXAMPLES  # noqa: E402

sys.path.insert(0, str(EXAMPLES))
try:
    import smollm2
finally:
    sys.path.remove(str(EXAMPLES))

pytestmark = [pytest.mark.real_model, pytest.mark.skipif(not smollm2.present(), reason=smollm2.missing())]
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "same_bits_real_model.json"
LENGTH, FIRST = 1024, 512  # tokens of a text, and of the first text those that every run reads
WHOLE = 65_536
TOKENS = int(os.environ.get("PYCORE_SAME_BITS_TOKENS", WHOLE))
DONE = os.environ.get("PYCORE_SAME_BITS_DONE", "")
SECONDS = float(os.environ.get("PYCORE_SAME_BITS_SECONDS", "inf"))
START = time.monotonic()
ROWS = 64  # of a batch
SINKS, WINDOW = 16, 256
CACHES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "full": ("long_causal", lambda config: transformers.DynamicCache(config=config)),
    "lambda": ("long_lambda", lambda config: LambdaCache(SINKS, WINDOW)),
    "staircase": ("long_causal", lambda config: StaircaseCache(config, Staircase((16, 8, 4)))),
    "full, kept by channel": ("long_causal", lambda config: KVCache()),
}


def done() -> dict[str, Any]:
    """The digests of texts that were found equal, of each dtype and cache, and what was token by token."""
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


def digest(rows: Any) -> str:
    """Of digests of tokens."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def loaded(dtype: torch.dtype, cache: str) -> Any:
    """The model with the same bits, on the attention that a cache needs."""
    register("long_causal", window_size=None)
    register("long_lambda", sink_size=SINKS, window_size=WINDOW)
    name = CACHES[cache][0]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.FOLDER, dtype=dtype, attn_implementation=name
    ).eval()
    return same_bits(model)


def some_texts(model: Any, dtype: torch.dtype) -> Tensor:
    texts = torch.randint(
        20, model.config.vocab_size, (WHOLE // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    return texts[: TOKENS // LENGTH if dtype == torch.float32 else max(TOKENS // LENGTH // 8, 1)]


def golden(dtype: torch.dtype, cache: str) -> dict[str, str]:
    """The digests that are kept; a full cache has one pair, however it keeps its keys."""
    kept: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text())
    return kept[f"{cache.split(',')[0]} {str(dtype)[6:]}"]


def update_golden(dtype: torch.dtype, cache: str, found: dict[str, str]) -> None:
    kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    kept[f"{cache.split(',')[0]} {str(dtype)[6:]}"] = found
    GOLDEN.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


parametrize_cache = pytest.mark.parametrize("cache", CACHES)
parametrize_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])


@pytest.mark.parametrize("cache", ["full", "lambda", "staircase"])
@parametrize_dtype
def test_first_tokens_on_any_machine(dtype: torch.dtype, cache: str) -> None:
    model, make = loaded(dtype, cache), CACHES[cache][1]
    first = some_texts(model, dtype)[:1, :FIRST]
    before = native.cpu_isa()
    found = {}
    try:
        for isa in native.available_isas():
            if isa != "scalar":  # keeps its bits among machines without AVX2
                native.set_cpu_isa(isa)
                out = logits(model, first, past_key_values=make(model.config), use_cache=True)
                found[isa] = digest(digests(out)[0].tolist())
    finally:
        native.set_cpu_isa(before)
    if not found:
        pytest.skip("this machine has no AVX2")
    assert found == dict.fromkeys(found, golden(dtype, cache)["first"])


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("PYCORE_SAME_BITS"), reason="PYCORE_SAME_BITS=1 asks for some hours of it")
@parametrize_cache
@parametrize_dtype
def test_no_bit_differs(dtype: torch.dtype, cache: str) -> None:
    model, make = loaded(dtype, cache), CACHES[cache][1]
    texts = some_texts(model, dtype)

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

    def token_by_token(ids: Tensor, expected: Tensor, first: int, what: str) -> None:
        """All rows at once, on one thread and on two by turns from `first` on, against digests [rows, tokens]."""
        held = make(model.config)
        for at in range(LENGTH):
            torch.set_num_threads(1 + (at + first) % 2)
            out = logits(model, ids[:, at : at + 1], past_key_values=held, use_cache=True)
            assert torch.equal(digests(out)[:, 0], expected[:, at]), f"{what}, token {at}"

    key = f"{cache} {str(dtype)[6:]}"
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
            found.append(digests(whole)[0].tolist())
            keep(key, found)
        for rows in (ROWS, 1):
            for i in range(0, len(texts), rows):
                name = f"{key}, token by token, {rows} from {i}"
                if name not in done():
                    out_of_time(name, i, len(texts))
                    token_by_token(texts[i : i + rows], torch.tensor(found[i : i + rows]), i, name)
                    keep(name, True)
    finally:
        torch.set_num_threads(threads)
    if TOKENS == WHOLE:
        made = {"first": digest(found[0][:FIRST]), "all": digest(found)}
        if os.environ["PYCORE_SAME_BITS"] == "update":
            update_golden(dtype, cache, made)
        assert made == golden(dtype, cache)


def test_digests_tell_one_bit() -> None:
    x = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        values = x.to(dtype)
        bits = values.view(torch.int32 if dtype == torch.float32 else torch.int16).clone()
        bits[1, 2, 777] ^= 1
        same = digests(bits.view(dtype)) == digests(values)
        assert same.tolist() == [[True, True, True], [True, True, False]]
