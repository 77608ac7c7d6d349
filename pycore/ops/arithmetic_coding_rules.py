# SPDX-License-Identifier: Apache-2.0
"""What torch asks of the coder's ops besides their kernels: results in shapes and dtypes alone, and vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pycore._load import load_ops

load_ops()

__all__: list[str] = []

# ---- fake kernels ----------------------------------------------------------------------------------------------------


@torch.library.register_fake("pycore::quantize_cdf")
def _quantize_fake(values: Tensor, logits: bool, precision: int | None) -> Tensor:
    return values.new_empty((*values.shape[:-1], values.shape[-1] + 1), dtype=torch.int32)


def _encode_fake(symbols: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    offsets = symbols.new_empty((symbols.shape[0] + 1,), dtype=torch.int64)
    return symbols.new_empty((size,), dtype=torch.uint8), offsets


def _decode_fake(data: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    length = torch.library.get_ctx().new_dynamic_size()
    return data.new_empty((offsets.shape[0] - 1, length), dtype=torch.int64)


@torch.library.register_fake("pycore::ac_decode_bytes")
def _decode_bytes_fake(data: Tensor, offsets: Tensor) -> Tensor:
    return data.new_empty((offsets.shape[0] - 1, torch.library.get_ctx().new_dynamic_size()))


for _name in ("ac_encode", "ac_encode_bytes", "ac_encode_logits"):
    torch.library.register_fake(f"pycore::{_name}", _encode_fake)
for _name in ("ac_decode", "ac_decode_logits"):
    torch.library.register_fake(f"pycore::{_name}", _decode_fake)


@torch.library.register_fake("pycore::torchac_encode")
def _torchac_encode_fake(cdf: Tensor, sym: Tensor) -> Tensor:
    return cdf.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.uint8)


@torch.library.register_fake("pycore::torchac_decode")
def _torchac_decode_fake(cdf: Tensor, byte_stream: Tensor) -> Tensor:
    return cdf.new_empty(cdf.shape[:-1], dtype=torch.int16)


# ---- vmap ------------------------------------------------------------------------------------------------------------


def _quantize_rows(info: Any, in_dims: tuple[int | None, ...], values: Tensor, *args: Any) -> tuple[Tensor, int]:
    dim = in_dims[0]
    assert dim is not None
    return torch.ops.pycore.quantize_cdf(values.movedim(dim, 0), *args), 0


def _no_vmap(name: str) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        raise ValueError(f"{name}: vmap would give streams of different lengths; put the samples into rows of symbols")

    return rule


torch.library.register_vmap("pycore::quantize_cdf", _quantize_rows)
for _name in (
    *("ac_encode", "ac_encode_bytes", "ac_encode_logits"),
    *("ac_decode", "ac_decode_bytes", "ac_decode_logits"),
):
    torch.library.register_vmap(f"pycore::{_name}", _no_vmap(_name))
