# SPDX-License-Identifier: Apache-2.0
"""One block of query rows (decoding) reads keys and values in place, its own way: the bits of a prompt's last query.

A prompt's rows share copies of a tile in float32 and multiply them by another product, so what is compared here has
nothing in common but the order of its sums.
"""

from __future__ import annotations

import pytest
import torch

from pycore.ops import attention
from pycore.ops.key_tiles import tiles_of_rows
from pycore.schedules import Causal, KeySubset, Schedule

KEYS, PROMPT = 203, 70
VALUE_DIMS = [0, 1, 16, 24, 64, 80, 96, 111, 128, 256]


def runs_of_keys() -> KeySubset:
    """Runs of one to five keys between one or two that take no part."""
    pattern = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0])
    return KeySubset(pattern.repeat(KEYS // len(pattern) + 1)[:KEYS].bool())


SCHEDULES: dict[str, Schedule] = {"causal": Causal(), "runs": runs_of_keys()}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("rows", range(1, 7))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_of_a_prompt(dtype: torch.dtype, rows: int, schedule: Schedule, isa: str) -> None:
    generator = torch.Generator().manual_seed(rows)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(1, *size, generator=generator).to(dtype)

    for dim, value_dim in ((37 + value_dim, value_dim) for value_dim in VALUE_DIMS):
        query, key, value = draw(rows, PROMPT, dim), draw(1, KEYS, dim), draw(1, KEYS, value_dim)
        if isinstance(schedule, KeySubset):
            unread = ~schedule.keys
            key[:, :, unread], value[:, :, unread] = torch.nan, torch.nan  # is not touched
        expected = attention(query, key, value, schedule=schedule, return_lse=True)
        newest = query[:, :, -1:]
        for given, layout in ((key, "rows"), (tiles_of_rows(key), "tiles")):
            found = attention(newest, given, value, schedule=schedule, return_lse=True, key_layout=layout)
            for x, y in zip(found, expected, strict=True):
                assert torch.equal(x, y[:, :, -1:]), (dim, value_dim, layout)
