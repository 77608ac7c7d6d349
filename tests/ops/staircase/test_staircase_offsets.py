# SPDX-License-Identifier: Apache-2.0
"""The table of docs/ops/staircase.md is what the committed file holds, and what it says of the grid is so."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tools import staircase_offsets as tool

ROOT = Path(__file__).parents[3]
FOUND = json.loads((ROOT / "bench" / "results" / "staircase_offsets_cpu.json").read_text())


def test_the_page_shows_the_file() -> None:
    page = (ROOT / "docs" / "ops" / "staircase.md").read_text()
    assert f"{tool.BEGIN}\n{tool.table(FOUND['results'])}\n{tool.END}" in page
    shown = f"{tool.ROTATIONS_BEGIN}\n{tool.rotation_table(FOUND['rotations'])}\n{tool.ROTATIONS_END}"
    assert shown in page
    assert {"machine", "threads", "torch", "commit"} <= FOUND.keys()


def test_drawn_data_measures_as_it_did() -> None:
    """The first rows again, to the accuracy that the order of sums in torch leaves."""
    name, query, key, value = next(tool.synthetic())
    again = tool.errors(query, key, value)
    for bits, row in FOUND["results"][name].items():
        for candidate, figure in row.items():
            assert abs(again[bits][candidate] - figure) <= 1e-6 * figure, (bits, candidate)


def test_candidates_are_what_their_names_say() -> None:
    x = torch.randn(1, 64, 3)
    step = (x.amax(1) - x.amin(1))[0] / 4
    low, middle, mean = (tool.dequantized(x, 2, 1, name) for name in ("low", "middle", "mean"))
    assert ((middle - low)[0] - step / 2).abs().max() < 1e-6
    assert (mean - x).mean(1).abs().max() <= step.max() / 256
