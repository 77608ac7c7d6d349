# SPDX-License-Identifier: Apache-2.0
"""Vector quantizers: modules on `pycore.ops.vq_encode`, `rvq_encode`, `rvq_decode`, `vq_statistics` and `vq_rotate`."""

from pycore.nn.vq.bottleneck import DiscreteKeyValueBottleneck
from pycore.nn.vq.codebook_features import CodebookFeatures
from pycore.nn.vq.grouped import GroupedResidualVQ
from pycore.nn.vq.gumbel import GumbelVectorQuantizer
from pycore.nn.vq.masked import MaskedChannelRVQ
from pycore.nn.vq.quantize import LossBreakdown, VectorQuantize
from pycore.nn.vq.residual import ResidualVQ

__all__ = [
    "CodebookFeatures",
    "DiscreteKeyValueBottleneck",
    "GroupedResidualVQ",
    "GumbelVectorQuantizer",
    "LossBreakdown",
    "MaskedChannelRVQ",
    "ResidualVQ",
    "VectorQuantize",
]
