# SPDX-License-Identifier: Apache-2.0
"""Modules on pycore's ops."""

from pycore.nn.attention import LambdaAttention

__all__ = ["LambdaAttention"]
