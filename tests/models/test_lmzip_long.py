# SPDX-License-Identifier: Apache-2.0
"""lmzip over ten megabytes of real files: the same bytes at other threads, batches and chunks, and back.

The model is a small one, so that the test is about what is long. PYCORE_LMZIP=shipped asks for the one that comes with
pycore, which takes an hour on two cores.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch

import pycore
from pycore.models.bytelm import Bytelm, BytelmConfig
from pycore.models.language import ByteModel, shipped
from pycore.models.lmzip import compress, decompress

SIZE = 10_000_000


def ten_megabytes() -> bytes:
    """Sources, machine code, documentation, zeros, and what no model makes smaller."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    native = Path(pycore.__file__).with_name("libpycore.so").read_bytes()
    pages = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[2].glob("docs/**/*.md")))
    part = sources[:4_000_000] + native[:1_500_000] + pages + bytes(300_000) + zlib.compress(sources)[:200_000]
    return (part * (SIZE // len(part) + 1))[:SIZE]


def small() -> ByteModel:
    """Untrained, but sure of itself."""
    torch.manual_seed(0)
    model = Bytelm(BytelmConfig(layers=1, dim=16, heads=1, kv_heads=1, mlp_ratio=1, position="none"))
    with torch.no_grad():
        model.embedding.mul_(30)
    return ByteModel(model, sink_size=1, window_size=15)


@pytest.mark.slow
def test_ten_megabytes_come_back(threads: None) -> None:
    if pycore.cpu_isa() == "scalar":
        pytest.skip("plain loops compute other bits, and take their time")
    data = ten_megabytes()
    model = shipped() if os.environ.get("PYCORE_LMZIP") == "shipped" else small()
    torch.set_num_threads(2)
    packed = compress(data, model, segment=1024, batch=1024, chunk=64)
    torch.set_num_threads(1)
    assert compress(data, model, segment=1024, batch=333, chunk=300) == packed
    torch.set_num_threads(2)
    assert decompress(packed, model, batch=3000) == data
