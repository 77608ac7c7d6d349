# SPDX-License-Identifier: Apache-2.0
"""The ops under the cache, given storage that no cache made: refused in one sentence, with nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore import Staircase, StaircaseKVCache

BITS = [16, 8, 4, 2]


def state() -> dict[str, Any]:
    stairs = Staircase(BITS, step=32, sink_size=3, group_size=16, rollback=20)
    cache = StaircaseKVCache(stairs, batch=2, kv_heads=2, head_dim=20, capacity=64)
    cache.append(torch.randn(2, 2, 40, 20), torch.randn(2, 2, 40, 20))
    return cache.state_dict()


def append(held: dict[str, Any], tokens: int = 3, **change: Any) -> None:
    new = torch.randn(2, 2, tokens, 20)
    given = {
        "key_storage": held["key"], "value_storage": held["value"], "lengths": held["lengths"], "key": new,
        "value": new, "starts": None, "key_bits": BITS, "value_bits": BITS, "sink_size": 3, "step": 32,
        "group_size": 16, "grid": "embedded",
    }  # fmt: skip
    torch.ops.pycore.staircase_cache_append(*(given | change).values())


def read(held: dict[str, Any], **change: Any) -> Tensor:
    given = {
        "storage": held["key"], "positions": held["lengths"] - 1, "ends": held["lengths"], "bits": BITS,
        "by_token": False, "sink_size": 3, "step": 32, "group_size": 16, "grid": "embedded", "tokens": 40,
        "wide": False,
    }  # fmt: skip
    result: Tensor = torch.ops.pycore.staircase_cache_read(*(given | change).values())
    return result


def swapped(storage: list[Tensor], i: int, x: Tensor) -> list[Tensor]:
    return [x if j == i else each for j, each in enumerate(storage)]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda s: {"key_storage": s["key"][:8]}, "key_storage has 8 tensors and must have 9"),
        (lambda s: {"key_bits": [8, 16]}, "key_bits[1] is 16 and must be at most 8, the step before"),
        (lambda s: {"value_bits": [16, 4, 8]}, "value_bits[2] is 8 and must be at most 4, the step before"),
        (lambda s: {"key_bits": [16, 5]}, "key_bits[1] is 5 and must be 16, 8, 4 or 2"),
        (lambda s: {"key_bits": []}, "key_bits has 0 entries and must have between 1 and 32"),
        (lambda s: {"step": 30}, "step is 30 and must be a multiple of group_size, 16"),
        (lambda s: {"group_size": 0}, "group_size is 0 and must be between 1 and 256"),
        (lambda s: {"group_size": 257, "step": 257}, "group_size is 257 and must be between 1 and 256"),
        (lambda s: {"sink_size": -1}, "sink_size is -1 and must be at least 0"),
        (lambda s: {"sink_size": 4}, "key_storage[0], full, has 63 rows past the sinks and must have a multiple of "
                                     "group_size, 16"),
        (lambda s: {"grid": "minmax"}, "key_bits[1] is 8 and must be 16 or 2: the min-max grid has one width"),
        (lambda s: {"key_storage": swapped(s["key"], 1, s["key"][1].int())},
         "key_storage[1], plane2, has dtype int32 and must have uint8"),
        (lambda s: {"key_storage": swapped(s["key"], 2, s["key"][2][..., :-1])},
         "key_storage[2], plane4, has shape [2, 2, 4, 79] and must be [2, 2, tiles, 80]"),
        (lambda s: {"key_storage": swapped(s["key"], 4, s["key"][4][:, :, :-1].contiguous())},
         "key_storage[4], lo, has shape [2, 2, 3, 20] and must have plane2's tiles"),
        (lambda s: {"value_storage": swapped(s["value"], 8, s["value"][8][:, :, :1].contiguous())},
         "value_storage[8], centers8, has shape [2, 2, 1, 32] and must have plane8's tiles"),
        (lambda s: {"value_bits": [16, 4, 2]}, "value_storage[3], plane8, has shape [2, 2, 4, 160] and must have no "
                                               "elements"),
        (lambda s: {"lengths": torch.tensor([40, 62])}, "lengths[1] is 62 and the storage holds 64 tokens, which must "
                                                        "have room for 3 more"),
        (lambda s: {"lengths": torch.tensor([-1, 40])}, "lengths[0] is -1 and must be at least 0"),
        (lambda s: {"starts": torch.tensor([0, 4])}, "starts[1] is 4 and must be between 0 and key's 3 tokens"),
        (lambda s: {"key": torch.zeros(2, 2, 3, 21)}, "key has shape [2, 2, 3, 21] and must be [2, 2, 3, 20]"),
        (lambda s: {"value": torch.zeros(2, 2, 3, 20).half()}, "value has dtype float16 and must have float32"),
        (lambda s: {"key": s["key"][0][:, :, :3]}, "full overlaps key and must have memory of its own"),
    ],
)  # fmt: skip
def test_append_refuses(change: Callable[[dict[str, Any]], dict[str, Any]], sentence: str) -> None:
    held = state()
    before = [x.clone() for x in (*held["key"], *held["value"], held["lengths"])]
    changed = change(held)
    with pytest.raises(ValueError) as error:
        append(held, **changed)
    assert str(error.value) == f"staircase_cache_append: {sentence}"
    assert all(torch.equal(a, b) for a, b in zip(before, (*held["key"], *held["value"], held["lengths"]), strict=True))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"tokens": 65}, "tokens is 65 and must be between 0 and 64, what the storage holds"),
        ({"tokens": -1}, "tokens is -1 and must be between 0 and 64, what the storage holds"),
        ({"positions": torch.tensor([3, -2])}, "positions[1] is -2 and must be at least -1"),
        ({"ends": torch.tensor([3])}, "ends is int64 [1] and must be int64 [2]"),
        ({"ends": torch.tensor([3.0, 1.0])}, "ends is float32 [2] and must be int64 [2]"),
        ({"bits": [16, 1]}, "bits[1] is 1 and must be 16, 8, 4 or 2"),
    ],
)
def test_read_refuses(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        read(state(), **change)
    assert str(error.value) == f"staircase_cache_read: {sentence}"


def test_bytes_of_any_kind_are_read_in_bounds() -> None:
    """Storage full of what no append wrote, positions far away, ends past what was appended: numbers, and no crash."""
    held = state()
    for x in held["key"]:
        if x.dtype == torch.uint8:
            x.copy_(torch.randint(0, 256, x.shape))
    far = torch.tensor([2**40, 5])
    assert read(held, positions=far, ends=torch.tensor([64, 10**9]), tokens=64).shape == (2, 2, 64, 20)
    assert not read(held, ends=torch.zeros(2, dtype=torch.int64)).any()
