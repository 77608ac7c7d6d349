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
    sink_size: int,
) -> None:  # fmt: skip
    """Writes key and value [B, Hkv, n, channels] to where they lie in the caches, and counts them in lengths [B].

    Args:
        starts: int64 [B], the tokens at the front of the chunk that are padding and are left out.
    """
    torch.ops.pycore.lambda_cache_append(key_cache, value_cache, lengths, key, value, starts, sink_size)
    if not torch.compiler.is_compiling() and not lengths.is_inference():
        # The op does not: autograd would read rows that were written over, for queries that are still to learn.
        torch.autograd.graph.increment_version((key_cache, value_cache, lengths))


@torch.library.register_fake("pycore::lambda_cache_append")
def _append_fake(
    key_cache: Tensor, value_cache: Tensor, lengths: Tensor, key: Tensor, value: Tensor, starts: Tensor | None,
    sink_size: int,
) -> None:  # fmt: skip
    check_devices(
        "lambda_cache_append", key=key, key_cache=key_cache, value_cache=value_cache, lengths=lengths, value=value,
        starts=starts,
    )  # fmt: skip
