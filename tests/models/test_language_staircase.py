# SPDX-License-Identifier: Apache-2.0
"""lmzip on a staircase: what was compressed comes back, another ladder is another model, and no tree stands on one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import pycore
from pycore import BitstreamError, Staircase
from pycore.models.bytelm import Bytelm, BytelmConfig
from pycore.models.language import ByteModel, shipped
from pycore.models.language_staircase import StaircaseByteModel
from pycore.models.lmzip import compress, decompress

SOURCE = Path(os.__file__).read_bytes()


def model(bits: tuple[int, ...] = (16, 8, 4), **options: Any) -> StaircaseByteModel:
    return StaircaseByteModel(shipped().model, Staircase(bits, **({"step": 64} | options)), window_size=200)


@pytest.mark.usefixtures("threads")
def test_ways_of_cutting_up_are_the_same_bytes() -> None:
    """Longer than the window and all steps of the ladder, in segments whose last is short."""
    language, data = model(), SOURCE[3000:4100]
    packed = compress(data, language, segment=330)
    assert len(packed) < 0.6 * len(data)
    for threads, batch, chunk in ((1, 1, 330), (2, 2, 77), (2, 64, 5)):
        torch.set_num_threads(threads)
        assert compress(data, language, segment=330, batch=batch, chunk=chunk) == packed
        assert decompress(packed, language, batch=batch) == data
    assert packed != compress(data, ByteModel(shipped().model, window_size=200), segment=330)


def test_another_ladder_is_another_model() -> None:
    generator = torch.Generator().manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(2, 32, 32, generator=generator))[0] for _ in range(2)]
    ladders: list[dict[str, Any]] = [
        {"bits": (16, 8, 4)}, {"bits": (16, 8)}, {"bits": (16, 8, 4, 2)}, {"step": 128}, {"sink_size": 3},
        {"group_size": 32}, {"key_rotation": "hadamard"}, {"value_rotation": "hadamard"},
        {"key_rotation": turns[0]}, {"key_rotation": turns[1]}, {"value_bits": (16, 4)},
    ]  # fmt: skip
    models = [model(**ladder) for ladder in ladders]
    found = [each.fingerprint for each in models]
    assert len({*found, shipped().fingerprint}) == len(ladders) + 1
    assert [model(**ladder).fingerprint for ladder in ladders] == found
    packed = compress(SOURCE[:200], models[0])
    with pytest.raises(BitstreamError, match="was compressed with model"):
        decompress(packed, models[1])
    assert decompress(packed, model()) == SOURCE[:200]
    if pycore.cpu_isa() != "scalar":
        before = pycore.cpu_isa()
        pycore.native.set_cpu_isa("scalar")
        try:
            assert model().fingerprint != found[0], "a machine that computes other bits"
        finally:
            pycore.native.set_cpu_isa(before)


def test_errors() -> None:
    with pytest.raises(TypeError, match="^StaircaseByteModel: staircase is a tuple and must be a Staircase$"):
        StaircaseByteModel(shipped().model, (16, 8))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="^StaircaseByteModel: rollback is 5 and must be 0: a staircase takes no tree$"
    ):
        model().state(5)
    rope = Bytelm(BytelmConfig(layers=1, dim=16, heads=1, kv_heads=1))
    with pytest.raises(ValueError, match="^Bytelm: position is 'rope' and must be another for Lambda on a staircase$"):
        StaircaseByteModel(rope, Staircase())
