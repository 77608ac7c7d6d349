# SPDX-License-Identifier: Apache-2.0
"""Position tables against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pycore.positions import rope_tables


def test_rope_tables_formula() -> None:
    cos, sin = rope_tables(5000, 32)
    assert cos.shape == sin.shape == (5000, 16) and cos.dtype == sin.dtype == torch.float32
    assert cos[0].tolist() == [1.0] * 16 and sin[0].tolist() == [0.0] * 16
    for d in (1, 2, 127, 4999):
        for i in range(16):
            frequency = torch.tensor(10000.0 ** (-2 * i / 32), dtype=torch.float32).item()
            assert cos[d, i].item() == pytest.approx(math.cos(d * frequency), abs=1e-7)
            assert sin[d, i].item() == pytest.approx(math.sin(d * frequency), abs=1e-7)


def test_rope_tables_extend_each_other() -> None:
    short, long = rope_tables(97, 6, theta=500.0), rope_tables(1023, 6, theta=500.0)
    assert all(torch.equal(a, b[:97]) for a, b in zip(short, long, strict=True))
    assert rope_tables(0, 2)[0].shape == (0, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n": -1, "dim": 4}, "n is -1 and must be at least 0"),
        ({"n": 4, "dim": 5}, "dim is 5 and must be a positive even number"),
        ({"n": 4, "dim": 0}, "dim is 0 and must be a positive even number"),
        ({"n": 4, "dim": 4, "theta": 0.0}, "theta is 0.0 and must be positive and finite"),
        ({"n": 4, "dim": 4, "theta": math.nan}, "theta is nan and must be positive and finite"),
    ],
)
def test_rope_tables_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"rope_tables: {message}"):
        rope_tables(**arguments)
