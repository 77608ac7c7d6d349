# SPDX-License-Identifier: Apache-2.0
"""EqualInfoTable on one core: text to tokens and back, beside a copy of the same text."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.case import Case, Options, Outputs

BYTES = 1 << 24


class Order1:
    """How often a byte follows another in a text, with a little of everything."""

    def __init__(self, text: bytes) -> None:
        data = np.frombuffer(text, np.uint8).astype(np.int64)
        pairs = np.bincount(data[:-1] * 256 + data[1:], minlength=1 << 16).reshape(256, 256)
        self.after = pairs + 0.01 * np.bincount(data, minlength=256) / len(data) + 1e-4
        self.first = np.bincount(data, minlength=256) + 1e-4

    def next_probs(self, prefixes: list[bytes]) -> Any:
        return np.stack([self.after[prefix[-1]] if prefix else self.first for prefix in prefixes])


class Text:
    """Source text of the standard library, a table of 2^bits strings by its own statistics, and its tokens."""

    def __init__(self, bits: int) -> None:
        import pycore

        root = Path(sysconfig.get_path("stdlib"))
        text = b"".join(path.read_bytes() for path in sorted(root.glob("*.py")))
        self.data = (text * (1 + BYTES // len(text)))[:BYTES]
        self.table = pycore.EqualInfoTable.build(Order1(text), bits)
        self.tokens = self.table.encode(self.data)
        self.array = np.frombuffer(self.data, np.uint8)


@functools.cache
def _text(bits: int) -> Text:
    return Text(bits)


def _size(count: int) -> Outputs:
    return (torch.tensor([float(count)]),)


def _check(wanted: Callable[[Text], int]) -> Callable[[Text], Callable[[Outputs], float]]:
    def check(data: Text) -> Callable[[Outputs], float]:
        assert data.table.decode(data.tokens) == data.data
        return lambda outputs: 0.0 if outputs[0].item() in (wanted(data), BYTES) else float("inf")

    return check


def cases(options: Options) -> Iterable[Case]:
    """Encoding by both parses, and decoding; `copy` writes the text once more."""
    if options.device != "cpu":
        return
    group = f"EqualInfoTable, {BYTES >> 20} MiB of text, one core"
    copy = {"copy": lambda data: lambda: _size(data.array.copy().size)}
    for bits in (16,) if options.quick else (12, 16):
        inputs = functools.partial(_text, bits)
        for parse in ("longest", "optimal"):
            yield Case(
                name=f"encode, {parse}, {bits} bits",
                group=group,
                inputs=inputs,
                contenders={
                    "pycore": lambda data, parse=parse: lambda: _size(len(data.table.encode(data.data, parse=parse))),
                    **copy,
                },
                check=_check(lambda data, parse=parse: len(data.table.encode(data.data, parse=parse))),
                tolerance=0.0,
                bytes=float(BYTES),
            )
        yield Case(
            name=f"decode, {bits} bits",
            group=group,
            inputs=inputs,
            contenders={"pycore": lambda data: lambda: _size(len(data.table.decode(data.tokens))), **copy},
            check=_check(lambda data: BYTES),
            tolerance=0.0,
            bytes=float(BYTES),
        )


def bench_arithmetic_coding_table(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
