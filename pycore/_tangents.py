# SPDX-License-Identifier: Apache-2.0
"""Tensors that carry a tangent, in forward mode: of torch.func.jvp or torch.autograd.forward_ad.

torch has one level of tangents, 0; torch.func's transforms nest by wrapping tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["dual", "forward_mode", "refuse_tangents", "unpacked"]


def forward_mode() -> bool:
    """Whether a tensor may carry a tangent: a dual level is open, or a transform of torch.func runs.

    In a graph that torch.compile takes down, the level is open for torch alone and `_current_level` does not say so.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def unpacked(x: Any) -> tuple[Any, Tensor | None]:
    """What is no dual tensor, and a tangent or None. x is at the level of transforms that the dispatcher is at."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x, None
    pair = forward_ad.unpack_dual(x, level=0)
    return pair.primal, pair.tangent


def dual(output: Any, tangents: Any) -> Any:
    """A tensor, or a tuple of them, with tangents."""
    if isinstance(output, Tensor):
        return forward_ad.make_dual(output, tangents.to(output.dtype), level=0)
    return tuple(dual(x, tangent) for x, tangent in zip(output, tangents, strict=True))


def refuse_tangents(op: str, **tensors: Any) -> None:
    """For what has no rule for tangents, and would lose them without a word. To be called where tensors are checked."""
    if not forward_mode():
        return
    for name, x in tensors.items():
        if isinstance(x, Tensor) and _carries(x):
            raise NotImplementedError(f"{op}: {name} carries a tangent, and has no forward-mode derivative")


def _carries(x: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(x):  # vmap has no rule for unpacking
        x = functorch.get_unwrapped(x)
    return unpacked(x)[1] is not None
