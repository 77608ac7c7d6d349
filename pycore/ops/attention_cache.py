# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.pycore.lambda_cache_append`, which puts tokens into the rows of a `LambdaKVCache`."""

from __future__ import annotations

import torch
from torch import Tensor

from pycore._load import load_ops
from pycore._tensors import check_devices

load_ops()

__all__ = ["lambda_cache_append"]


def lambda_cache_append(
    key_cache: Tensor, value_cache: Tensor, lengths: Tensor, key: Tensor, value: Tensor, starts: Tensor | None,
    sink_size: int, most: int = -1, op: str = "lambda_cache_append",
) -> None:  # fmt: skip
    """Writes key and value [B, Hkv, n, channels] to where they lie in the caches, and counts them in lengths [B].

    Args:
        key_cache: [B, Hkv, rows, D], or by channel [B, Hkv, tiles, D, 64].
        starts: int64 [B], the tokens at the front of the chunk that are padding and are left out.
        sink_size: rows before the ring; a multiple of 64 where keys lie by channel.
        most: tokens that a row of the batch may have; -1: any number, the newest over the oldest.
        op: the public function called.
    """
    torch.ops.pycore.lambda_cache_append(key_cache, value_cache, lengths, key, value, starts, sink_size, most, op)
    if not torch.compiler.is_compiling() and not lengths.is_inference():
        # The op does not: autograd would read rows that were written over, for queries that are still to learn.
        torch.autograd.graph.increment_version((key_cache, value_cache, lengths))


@torch.library.register_fake("pycore::lambda_cache_append")
def _append_fake(
    key_cache: Tensor, value_cache: Tensor, lengths: Tensor, key: Tensor, value: Tensor, starts: Tensor | None,
    sink_size: int, most: int = -1, op: str = "lambda_cache_append",
) -> None:  # fmt: skip
    check_devices(
        op, key=key, key_cache=key_cache, value_cache=value_cache, lengths=lengths, value=value,
        starts=starts,
    )  # fmt: skip
