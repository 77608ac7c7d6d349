# SPDX-License-Identifier: Apache-2.0
"""What a number among the arguments must be, one rule for every public function and class. Loads no torch.

A bool is no number here: `rollback=True` is a slip, and what it was meant to say is not `rollback=1`. torch.compile
traces these functions, so they ask for the plain types first, which is what it takes symbolic numbers for.
"""

from __future__ import annotations

import numbers
from typing import Any

__all__ = [
    "check_bool", "check_bytes", "check_int", "check_number", "check_str", "check_unmasked", "check_whole", "is_bool",
]  # fmt: skip

_MOST = 2**63 - 1  # the kernels count in int64


def is_bool(value: Any) -> bool:
    """Whether it is a bool, Python's or NumPy's."""
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")


def check_whole(op: str, name: str, value: Any) -> None:
    """Refuses what is no int, whatever its size."""
    whole = isinstance(value, int) or isinstance(value, numbers.Integral) or type(value).__name__ == "SymInt"
    if not whole or is_bool(value):
        raise TypeError(f"{op}: {name} is a {type(value).__name__} and must be an int")


def check_int(op: str, name: str, value: Any, least: int | None = None, most: int = _MOST) -> None:
    """Refuses what is no int (TypeError), is less than `least` or more than `most` (ValueError).

    `least` is None where the op's own check names the least: only what int64 does not hold is refused then.
    """
    check_whole(op, name, value)
    if least is not None and value < least:
        raise ValueError(f"{op}: {name} is {value} and must be at least {least}")
    if least is None and value < -_MOST - 1:
        raise ValueError(f"{op}: {name} is {value} and must be at least -2**63")
    if value > most:
        bound = "less than 2**63" if most == _MOST else f"at most {most}"
        raise ValueError(f"{op}: {name} is {value} and must be {bound}")


def check_number(op: str, name: str, value: Any) -> Any:
    """The number as a float, or what stands for one in a graph. TypeError for what is none.

    A NaN or an infinity passes: which numbers an argument may be is the op's to say.
    """
    if isinstance(value, float):
        return value
    if is_bool(value) or not (isinstance(value, int) or isinstance(value, numbers.Real) or _converts(value)):
        raise TypeError(f"{op}: {name} is a {type(value).__name__} and must be a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} is an int of more than 1024 bits and must be finite as a float") from None


def _converts(value: Any) -> bool:
    """Whether it is a number in another guise: a SymFloat, or an array of one number and no dimensions."""
    if type(value).__name__ in ("SymInt", "SymFloat"):
        return True
    if str(getattr(value, "dtype", "")).endswith("bool"):
        return False
    return getattr(value, "shape", None) == () and hasattr(value, "__float__")


def check_bool(op: str, name: str, value: Any) -> None:
    """Refuses what is neither True nor False."""
    if not is_bool(value):
        raise TypeError(f"{op}: {name} is a {type(value).__name__} and must be a bool")


def check_str(op: str, name: str, value: Any) -> None:
    """Refuses what is no str."""
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} is a {type(value).__name__} and must be a str")


def check_bytes(op: str, name: str, value: Any) -> None:
    """Refuses what is not bytes-like."""
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(f"{op}: {name} is a {type(value).__name__} and must be bytes")


def check_unmasked(op: str, name: str, value: Any) -> None:
    """Refuses NumPy's masked arrays, whose mask nothing here sees."""
    if any(kind.__name__ == "MaskedArray" for kind in type(value).__mro__):
        raise TypeError(
            f"{op}: {name} is a masked array, whose mask no kernel sees, and must be a plain one: call filled()"
        )
