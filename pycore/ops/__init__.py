# SPDX-License-Identifier: Apache-2.0
"""All ops, as functions. Each is also an op of `torch.ops.pycore`."""

from pycore.ops.attention import attention, lambda_attention

__all__ = ["attention", "lambda_attention"]
