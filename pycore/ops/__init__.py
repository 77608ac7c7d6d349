# SPDX-License-Identifier: Apache-2.0
"""All ops, as functions. Each is also an op of `torch.ops.pycore`."""

from pycore.ops.attention import attention, lambda_attention
from pycore.ops.attention_blocks import pr_block_mask
from pycore.ops.attention_probabilistic import pr_flash_attention
from pycore.ops.linear import invariant_linear, rms_norm

__all__ = [
    "attention", "invariant_linear", "lambda_attention", "pr_block_mask", "pr_flash_attention", "rms_norm",
]  # fmt: skip
