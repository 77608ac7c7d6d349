# SPDX-License-Identifier: Apache-2.0
"""Modules on pycore's ops."""

from pycore.nn.attention import LambdaAttention
from pycore.nn.probabilistic import ProbabilisticAttention

__all__ = ["LambdaAttention", "ProbabilisticAttention"]
