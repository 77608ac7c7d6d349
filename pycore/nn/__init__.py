# SPDX-License-Identifier: Apache-2.0
"""Modules on pycore's ops."""

from pycore.nn.attention import LambdaAttention
from pycore.nn.pairwise import ContrastiveLoss, LateInteraction, PrototypeLayer
from pycore.nn.probabilistic import ProbabilisticAttention
from pycore.nn.vq import (
    CodebookFeatures,
    DiscreteKeyValueBottleneck,
    GroupedResidualVQ,
    GumbelVectorQuantizer,
    MaskedChannelRVQ,
    ResidualVQ,
    VectorQuantize,
)

__all__ = [
    "CodebookFeatures",
    "ContrastiveLoss",
    "DiscreteKeyValueBottleneck",
    "GroupedResidualVQ",
    "GumbelVectorQuantizer",
    "LambdaAttention",
    "LateInteraction",
    "MaskedChannelRVQ",
    "ProbabilisticAttention",
    "PrototypeLayer",
    "ResidualVQ",
    "VectorQuantize",
]
