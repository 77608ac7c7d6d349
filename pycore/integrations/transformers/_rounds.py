# SPDX-License-Identifier: Apache-2.0
"""The rounds that a model's layers count where probabilistic attention is registered."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from pycore.nn.probabilistic import advance
from pycore.schedules import Probabilistic

_ROUND = "pycore_round"  # the buffer of a layer that draws blocks


def round_of(module: nn.Module) -> Tensor | None:
    """The round that a layer reads, int64 of no dimensions, once it has run."""
    return getattr(module, _ROUND, None)


def take_back_round(module: nn.Module) -> None:
    """What was refused was no round."""
    round = round_of(module)
    if round is not None and not torch.compiler.is_compiling():
        round.sub_(1)


def draw_round(draw: Probabilistic, module: nn.Module, device: torch.device) -> tuple[Probabilistic, bool]:
    """The layer's blocks for this pass, and whether it counts as a round."""
    round = round_of(module)
    if round is None:
        with torch.inference_mode(False):  # where no training could count on
            round = torch.zeros((), dtype=torch.int64, device=device)
        module.register_buffer(_ROUND, round, persistent=False)
    counted = advance(round, module.training)
    layer = getattr(module, "layer_idx", None)
    return dataclasses.replace(draw, round=round).for_layer(layer or 0), counted
