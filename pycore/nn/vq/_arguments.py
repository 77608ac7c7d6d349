# SPDX-License-Identifier: Apache-2.0
"""What every quantizer asks of its arguments; those of vector-quantize-pytorch without a counterpart are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pycore._tensors import check_tensor

__all__ = ["check_floating", "check_range", "refuse"]


def refuse(owner: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Passes what is in `defaults` and has its default; TypeError for a name in neither, ValueError for the rest."""
    for name, value in given.items():
        if name not in defaults:
            raise TypeError(f"{owner}: {name} is no argument of it, and must be one")
        default = defaults[name]
        plain = value is None or isinstance(value, (bool, int, float, str, dict))
        if not plain or isinstance(value, bool) != isinstance(default, bool) or value != default:
            raise ValueError(f"{owner}: {name} is {value!r}, which is not available, and must be {default!r}")


def check_range(owner: str, name: str, value: float, least: float, most: float) -> None:
    """Refuses a number outside [least, most], NaN too."""
    if not least <= value <= most:
        raise ValueError(f"{owner}: {name} is {value} and must be {least} to {most}")


def check_floating(owner: str, x: Any) -> None:
    """An input must be a tensor of floating point."""
    check_tensor(owner, "x", x)
    if not x.is_floating_point():
        raise ValueError(f"{owner}: x has dtype {x.dtype} and must be floating point")
