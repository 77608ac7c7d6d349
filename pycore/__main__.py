# SPDX-License-Identifier: Apache-2.0
"""`python -m pycore` prints a diagnosis: what is installed, what it was built for, and whether it works here."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import pycore
from pycore import _load


def _libraries() -> str:
    folder = Path(pycore.__file__).parent
    return ", ".join(sorted(path.name for path in folder.glob("*.so"))) or f"none in {folder}"


def _build() -> str:
    info = pycore.build_info()
    cuda = info["cuda"] and f"CUDA {info['cuda']} for {' '.join(info['cuda_arches'])}"
    cuda = cuda or f"CPU only ({info['no_cuda']})"
    return f"{info['compiler']}, {cuda}, torch {info['torch']}, Python {info['python']}, commit {info['commit']}"


def _torch() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"{torch.__version__}, {torch.get_num_threads()} threads, {device}"


def _ops() -> str:
    import torch

    _load.load_ops()
    names = {schema.name.partition("::")[2] for schema in torch._C._jit_get_all_schemas() if _is_ours(schema.name)}
    return ", ".join(sorted(names)) or "none registered"


def _is_ours(name: str) -> bool:
    return name.startswith("pycore::")


def main() -> int:
    """Prints one line per question; returns 1 if any of them has no answer, with the reason and the remedy."""
    failures = 0
    questions: list[tuple[str, Callable[[], str]]] = [
        ("pycore", lambda: f"{pycore.__version__} in {Path(pycore.__file__).parent}"),
        ("python", lambda: f"{platform.python_version()} on {platform.platform()}"),
        ("libraries", _libraries),
        ("built with", _build),
        ("cpu isa", lambda: f"{pycore.cpu_isa()} of {', '.join(pycore.native.available_isas())}"),
        ("settings", lambda: ", ".join(f"{k}={v}" for k, v in os.environ.items() if k.startswith("PYCORE_")) or "none"),
        ("torch", _torch),
        ("torch ops", _ops),
    ]
    for name, answer in questions:
        try:
            text = answer()
        except (ImportError, ValueError) as error:
            failures += 1
            text = f"FAILED: {error}"
        print(f"{name:<11} {text}")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
