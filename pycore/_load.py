# SPDX-License-Identifier: Apache-2.0
"""Loads the native libraries, and says in one sentence what is wrong and what to do when one cannot be loaded."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import json
import platform
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGE = Path(__file__).resolve().parent
_REMEDY = "build it again, with `pip install --no-build-isolation --force-reinstall --no-deps .` in its checkout"
_OLDEST_TORCH = (2, 10)


def build_info() -> dict[str, Any]:
    """What this installation was built from and for. Loads neither torch nor a native library.

    Returns:
        A dictionary with `version`, `commit`, `compiler`, `cuda` (the toolkit's version, or None for a CPU build),
        `cuda_arches`, `no_cuda` (why it is a CPU build, or None), `torch` and `python` (the versions built with),
        `extension_suffix`, `debug` and `sanitize`.
    """
    try:
        info: dict[str, Any] = json.loads((_PACKAGE / "build_info.json").read_text())
    except FileNotFoundError:
        raise ImportError(f"pycore has no native libraries beside {_PACKAGE / '__init__.py'}: {_REMEDY}.") from None
    return info


def cpu_isa() -> str:
    """The instruction set the CPU kernels use: "scalar", "avx2" or "avx512".

    It is the best this machine has, unless the environment variable PYCORE_CPU_ISA lowers it.
    """
    name: str = native().cpu_isa()
    return name


@functools.cache
def native() -> ModuleType:
    """Imports pycore.native, the kernels without torch."""
    module = _import("pycore.native")
    module.cpu_isa()  # a PYCORE_CPU_ISA that cannot be had is raised here, before any kernel runs
    return module


@functools.cache
def load_ops() -> None:
    """Loads pycore._C, which registers torch.ops.pycore."""
    try:
        import torch
    except ModuleNotFoundError:
        raise ImportError(
            "pycore.ops needs torch, which this Python does not have: run `pip install 'torch>=2.10'`."
        ) from None
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _OLDEST_TORCH:
        raise ImportError(
            f"pycore.ops needs torch 2.10 or newer and found {torch.__version__}: run `pip install 'torch>=2.10'`."
        )
    _import("pycore._C")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(diagnose(name, error)) from None


def diagnose(name: str, error: ImportError) -> str:
    """One sentence for a native module that did not import: what is wrong with it, and the remedy."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"pycore runs on Linux on x86-64 only, and this is {platform.system()} on {platform.machine()}."
    info = build_info()
    stem = name.rpartition(".")[2]
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    if not any((_PACKAGE / f"{stem}{suffix}").exists() for suffix in suffixes):
        if any(_PACKAGE.glob(f"{stem}.*.so")):
            running = f"{platform.python_version()} ({sys.implementation.cache_tag})"
            return f"{name} was built for Python {info['python']}, and this is Python {running}: {_REMEDY}."
        return f"{name} is missing from {_PACKAGE}: {_REMEDY}."
    if not (_PACKAGE / "libpycore.so").exists():
        return f"{name} needs libpycore.so, which is missing from {_PACKAGE}: {_REMEDY}."
    reason = str(error).replace(f"{_PACKAGE}/", "").rstrip(".")
    built = f"{info['compiler']}, torch {info['torch']}"
    return f"{name} was built for something else ({built}) and does not load here ({reason}): {_REMEDY}."
