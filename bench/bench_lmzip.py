# SPDX-License-Identifier: Apache-2.0
"""lmzip with SmolLM2-135M: a text packed and unpacked, its segments side by side.

Cases exist where `python examples/smollm2.py` has put the model. Peers are general compressors, which need no model and
are thousands of times faster; sizes stand in examples/compression.py. What is packed counts if it comes back to the
byte and, of lmzip, if it is denser than xz.
"""

from __future__ import annotations

import functools
import lzma
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench.bench_model import _examples
from bench.case import Case, Options, Outputs, Prepare

FULL, QUICK = (32768, 256), (2048, 24)  # bytes of the text, tokens of a segment


@functools.cache
def _model() -> Any:
    from pycore.models.tokens import load_tokens

    return load_tokens(_examples().FOLDER)


class Text:
    """Sources of the standard library, and what both sides of lmzip make of them."""

    def __init__(self, size: int, segment: int) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from tools.train_bytelm import corpus

        self.data = b"".join(data for _, data in corpus()[1])[:size]
        self.segment = segment

    @functools.cached_property
    def packed(self) -> bytes:
        """By lmzip."""
        return _lmzip(False)(self)()[0].numpy().tobytes()


def _bytes(data: bytes) -> Outputs:
    return (torch.frombuffer(bytearray(data), dtype=torch.uint8),)


def _lmzip(decode: bool) -> Prepare:
    from pycore.models.lmzip import compress, decompress

    def prepare(text: Text) -> Callable[[], Outputs]:
        model = _model()
        if decode:
            packed = text.packed
            return lambda: _bytes(decompress(packed, model))
        return lambda: _bytes(compress(text.data, model, segment=text.segment))

    return prepare


def _xz(decode: bool) -> Prepare:
    def prepare(text: Text) -> Callable[[], Outputs]:
        packed = lzma.compress(text.data, preset=9 | lzma.PRESET_EXTREME)
        if decode:
            return lambda: _bytes(lzma.decompress(packed))
        return lambda: _bytes(lzma.compress(text.data, preset=9 | lzma.PRESET_EXTREME))

    return prepare


def _check(decode: bool) -> Callable[[Text], Callable[[Outputs], float]]:
    def check(text: Text) -> Callable[[Outputs], float]:
        xz = len(lzma.compress(text.data, preset=9 | lzma.PRESET_EXTREME))

        def error(outputs: Outputs) -> float:
            got = outputs[0].numpy().tobytes()
            good = got == text.data if decode else len(got) <= xz
            return 0.0 if good else float("inf")

        return error

    return check


def cases(options: Options) -> Iterable[Case]:
    """One text, packed and unpacked. CPU only, and only where the model is."""
    if options.device != "cpu" or not _examples().present():
        return
    size, segment = QUICK if options.quick else FULL
    for decode in (False, True):
        yield Case(
            name=f"lmzip, SmolLM2-135M, {'unpack' if decode else 'pack'} {size} bytes, segments of {segment}",
            group="lmzip (SmolLM2-135M, bfloat16)",
            inputs=lambda: Text(size, segment),
            # As many rounds as the fastest peer may have would be too long for the quick form.
            contenders={"pycore": _lmzip(decode)} | ({} if options.quick else {"xz -9e": _xz(decode)}),
            check=_check(decode),
            tolerance=0.0,
        )


def bench_lmzip(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
