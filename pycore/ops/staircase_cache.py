# SPDX-License-Identifier: Apache-2.0
"""The rules of the ops behind `StaircaseKVCache`: csrc/torch/staircase_cache.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from pycore._load import load_ops
from pycore._tensors import check_devices

load_ops()

__all__: list[str] = []


@torch.library.register_fake("pycore::staircase_cache_append")
def _append_fake(
    key_storage: list[Tensor], value_storage: list[Tensor], lengths: Tensor, key: Tensor, value: Tensor,
    starts: Tensor | None, key_bits: list[int], value_bits: list[int], sink_size: int, step: int, group_size: int,
    grid: str,
) -> None:  # fmt: skip
    check_devices(
        "staircase_cache_append", key=key, value=value, lengths=lengths, starts=starts, storage=key_storage[0]
    )


@torch.library.register_fake("pycore::staircase_cache_read")
def _read_fake(
    storage: list[Tensor], positions: Tensor, ends: Tensor, bits: list[int], by_token: bool, sink_size: int, step: int,
    group_size: int, grid: str, tokens: int, wide: bool,
) -> Tensor:  # fmt: skip
    full = storage[0]
    return full.new_empty(
        (full.shape[0], full.shape[1], tokens, full.shape[3]), dtype=torch.float32 if wide else full.dtype
    )
