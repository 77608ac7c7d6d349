# SPDX-License-Identifier: Apache-2.0
"""Modules on pairwise reductions: `pycore.ops.contrastive_loss`, `pairwise_min` and `maxsim`."""

from pycore.nn.pairwise.contrastive import ContrastiveLoss
from pycore.nn.pairwise.late_interaction import LateInteraction
from pycore.nn.pairwise.prototypes import PrototypeLayer

__all__ = ["ContrastiveLoss", "LateInteraction", "PrototypeLayer"]
