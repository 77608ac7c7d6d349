# SPDX-License-Identifier: Apache-2.0
"""lmzip over megabytes of real files: the same bytes at other threads, batches and chunks, and back.

The model is a small one, so that the test is about what is long: one megabyte, or ten with PYCORE_LMZIP=long, in two or
three minutes.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch

import pycore
from pycore.models.bytelm import Bytelm, BytelmConfig
from pycore.models.language import ByteModel
from pycore.models.lmzip import compress, decompress

SIZE = 10_000_000 if os.environ.get("PYCORE_LMZIP") == "long" else 1_000_000


def files() -> bytes:
    """Sources, machine code, documentation, zeros, and what no model makes smaller."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    native = Path(pycore.__file__).with_name("libpycore.so").read_bytes()
    pages = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[2].glob("docs/**/*.md")))
    part = sources[: SIZE // 3] + native[: SIZE // 6] + pages + bytes(SIZE // 30) + zlib.compress(sources)[: SIZE // 50]
    return (part * (SIZE // len(part) + 1))[:SIZE]


def small(data: bytes) -> ByteModel:
    """Untrained, but it knows how often each byte occurs: the first channel is almost the same in all of them."""
    torch.manual_seed(0)
    model = Bytelm(BytelmConfig(layers=1, dim=16, heads=1, kv_heads=1, mlp_ratio=1, position="none"))
    counts = torch.bincount(torch.frombuffer(bytearray(data), dtype=torch.uint8), minlength=257) + 1
    with torch.no_grad():
        model.embedding[:, 0] = 100 + (counts / counts.sum()).log() / model.config.dim**0.5
    return ByteModel(model, sink_size=1, window_size=15)


@pytest.mark.slow
def test_megabytes_come_back(threads: None) -> None:
    if pycore.cpu_isa() == "scalar":
        pytest.skip("plain loops compute other bits, and take their time")
    data = files()
    model = small(data)
    torch.set_num_threads(2)
    packed = compress(data, model, segment=1024, batch=1024, chunk=64)
    assert len(packed) < 0.9 * len(data)
    torch.set_num_threads(1)
    assert compress(data, model, segment=1024, batch=333, chunk=300) == packed
    torch.set_num_threads(2)
    assert decompress(packed, model, batch=3000) == data
