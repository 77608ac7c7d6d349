# SPDX-License-Identifier: Apache-2.0
"""Codes that were written down: on every machine and instruction set they are the same, version after version.

`python tests/ops/vq/test_vq_golden.py --update` rewrites the list; that is a change of what the library promises.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pycore import ops

GOLDEN = Path(__file__).parents[2] / "golden" / "vq.json"

# (rows, stages, codes, channels, metric, beam)
CASES = [
    (50, 1, 100, 7, "euclidean", 1), (50, 3, 1030, 8, "euclidean", 1), (200, 4, 64, 40, "euclidean", 1),
    (40, 3, 50, 33, "euclidean", 5), (60, 2, 130, 24, "cosine", 1), (2, 3, 300, 128, "cosine", 4),
]  # fmt: skip


def made(start: int, *shape: int) -> Tensor:
    """Floats that are made of integers, so that every machine has the same."""
    state, out = start, []
    for _ in range(torch.Size(shape).numel()):
        state = (state * 1664525 + 1013904223) % 2**32
        out.append((state >> 8) - 2**23)
    return (torch.tensor(out, dtype=torch.float64) / 2**22).float().reshape(shape)


def digest(case: tuple[int, int, int, int, str, int]) -> str:
    rows, stages, codes, channels, metric, beam = case
    x, books = made(1, rows, channels), made(2, stages, codes, channels)
    found = ops.rvq_encode(x, books, metric=metric, beam_size=beam)
    decoded = ops.rvq_decode(found, books)
    text = hashlib.sha256(found.numpy().tobytes())
    text.update(decoded.numpy().tobytes())
    return text.hexdigest()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_are_those_written_down(isa: str, case: tuple[int, int, int, int, str, int]) -> None:
    assert digest(case) == json.loads(GOLDEN.read_text())[str(list(case))]


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/ops/vq/test_vq_golden.py --update")
    GOLDEN.write_text(json.dumps({str(list(case)): digest(case) for case in CASES}, indent=2) + "\n")
