# SPDX-License-Identifier: Apache-2.0
"""Plain decoding, which drafts are compared with."""

from __future__ import annotations

import torch

from pycore.models.language import LanguageModel


def greedy(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens, one at a time."""
    state, out = model.state(), []
    logits = model.logits(torch.tensor([[model.bos, *prompt]]), state)
    for _ in range(count):
        out.append(int(logits[0, -1].argmax()))
        logits = model.logits(torch.tensor([[out[-1]]]), state)
    return out
