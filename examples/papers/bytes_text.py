# SPDX-License-Identifier: Apache-2.0
"""What the papers on byte models share: windows of the standard library's sources, and tokens beside the 256 bytes."""

from __future__ import annotations

import math

import torch
from paper import Run, corpus
from torch import Tensor

from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer

SHAPE = BytelmConfig(layers=2, dim=64, heads=4, kv_heads=4, max_distance=512)
MASK, MODES = 256, 257  # MODES, MODES + 1, ... name what is asked for
VOCABULARY = 262


def windows(run: Run, count: int, length: int, held_out: bool = False) -> Tensor:
    """int64 [count, length], bytes from random places of the text to learn from, or of held-out files."""
    text, files = corpus()
    data = torch.frombuffer(bytearray(b"".join(files) if held_out else text), dtype=torch.uint8)
    return data[run.integers(len(data) - length + 1, count, 1) + torch.arange(length)].long()


def model() -> Transformer:
    """Bytes, a mask, and names of modes."""
    return Transformer(SHAPE, vocabulary=VOCABULARY)


def bits(loss: Tensor) -> float:
    """Nats to bits."""
    return loss.item() / math.log(2)


def behind(name: int, tokens: Tensor) -> Tensor:
    """The tokens after one that names a mode."""
    return torch.cat([torch.full((len(tokens), 1), name), tokens], dim=1)
