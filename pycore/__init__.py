# SPDX-License-Identifier: Apache-2.0
"""Attention, quantization and coding kernels for long-context and compressed-context models.

Three names: `pycore-kernels` is the distribution (what pip installs), `pycore` is this package, and `torch.ops.pycore`
is the namespace of its ops in torch. The kernels themselves are in `libpycore.so`, with two faces: `pycore._C`
registers them with torch, and `pycore.native` offers them for NumPy arrays and DLPack tensors.

Importing pycore loads neither torch nor a native library; each submodule is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pycore._load import build_info, cpu_isa

if TYPE_CHECKING:
    from pycore import compat, integrations, models, native, nn, ops, positions, reference, schedules
    from pycore.cache import KVCache, LambdaKVCache
    from pycore.cache.staircase_cache import Staircase, StaircaseKVCache
    from pycore.coding.arithmetic_coding_table import EqualInfoTable
    from pycore.coding.arithmetic_coding_windows import EqualInfoWindows
    from pycore.coding.bitstreams import Bitstreams
    from pycore.native import ArithmeticDecoder, ArithmeticEncoder, BitstreamError

__version__ = "0.1.0"

__all__ = [
    "ArithmeticDecoder",
    "ArithmeticEncoder",
    "BitstreamError",
    "Bitstreams",
    "EqualInfoTable",
    "EqualInfoWindows",
    "KVCache",
    "LambdaKVCache",
    "Staircase",
    "StaircaseKVCache",
    "__version__",
    "build_info",
    "compat",
    "cpu_isa",
    "integrations",
    "models",
    "native",
    "nn",
    "ops",
    "positions",
    "reference",
    "schedules",
]

# Where the classes are that `pycore` itself exports.
_HOMES = {
    "ArithmeticDecoder": "native",
    "ArithmeticEncoder": "native",
    "BitstreamError": "native",
    "Bitstreams": "coding.bitstreams",
    "EqualInfoTable": "coding.arithmetic_coding_table",
    "EqualInfoWindows": "coding.arithmetic_coding_windows",
    "KVCache": "cache",
    "LambdaKVCache": "cache",
    "Staircase": "cache.staircase",
    "StaircaseKVCache": "cache.staircase_cache",
}


def __getattr__(name: str) -> Any:
    if name == "native":
        from pycore import _load

        return _load.native()
    if name in _HOMES:
        home = _HOMES[name]
        return getattr(__getattr__("native") if home == "native" else importlib.import_module(f"pycore.{home}"), name)
    if name in __all__:
        return importlib.import_module(f"pycore.{name}")
    raise AttributeError(f"module 'pycore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
