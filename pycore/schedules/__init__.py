# SPDX-License-Identifier: Apache-2.0
"""Schedules: which keys each query of an attention op attends to.

A query stands at position p, a key at position j, and d = p - j. A schedule is a small frozen value; the kernels see
its `kind`, its numbers and its tensor (csrc/include/pycore/attention/tile_schedule.h).
"""

from pycore.schedules.attention_flex import to_flex_block_mask
from pycore.schedules.distances import (
    Constant,
    DistanceFamily,
    Gaussian,
    Geometric,
    Harmonic,
    PowerLaw,
    expected_density,
)
from pycore.schedules.kinds import Causal, Full, KeySubset, Lambda, Prefix, Schedule, Segments, Tree
from pycore.schedules.probabilistic import Probabilistic

__all__ = [
    "Causal", "Constant", "DistanceFamily", "Full", "Gaussian", "Geometric", "Harmonic", "KeySubset", "Lambda",
    "PowerLaw", "Prefix", "Probabilistic", "Schedule", "Segments", "Tree", "expected_density", "to_flex_block_mask",
]  # fmt: skip

# What a pickle and a repr call them, wherever in the package they are.
for _public in (
    *(Causal, Full, KeySubset, Lambda, Prefix, Probabilistic, Schedule, Segments, Tree),
    *(Constant, DistanceFamily, Gaussian, Geometric, Harmonic, PowerLaw),
):
    _public.__module__ = __name__
