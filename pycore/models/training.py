# SPDX-License-Identifier: Apache-2.0
"""One training loop: AdamW, warm-up and cosine, gradients of length 1 at most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pycore._checks import check_int

__all__ = ["fit"]


def fit(
    parameters: nn.Module | Iterable[nn.Parameter],
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float = 2e-3,
    warmup: int = 20,
    weight_decay: float = 0.01,
    report: Callable[[int, str], None] | None = None,
) -> float:
    """Trains in place and returns the mean loss of the last tenth of the steps.

    Args:
        parameters: a module, or what is to be learned of it.
        loss_of: the loss of a step, which draws its own batch.
        steps: how many.
        learning_rate: after ``warmup`` steps, from where it falls to zero as a cosine.
        warmup: steps over which the learning rate rises.
        weight_decay: AdamW's.
        report: told after every step how many are done, and the loss: a progress bar's ``update``.

    Raises:
        ArithmeticError: the loss is no longer finite; nothing is learned from it.
    """
    check_int("fit", "steps", steps, 1)
    learned = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    last: list[float] = []
    for step in range(steps):
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / warmup) * cosine
        loss = loss_of(step)
        value = loss.item()
        if not math.isfinite(value):
            raise ArithmeticError(f"fit: the loss of step {step} was {value} and must be finite")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        if step >= steps - max(1, steps // 10):
            last.append(value)
        if report is not None:
            report(step + 1, f"loss {value:.3f}")
    return sum(last) / len(last)
