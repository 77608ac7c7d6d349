# SPDX-License-Identifier: Apache-2.0
"""Seeds, the `cuda` marker, and the `isa` fixture, which runs a test once on every instruction set of this machine."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import pycore
from tests.support import native_programs

# Inductor's cache does not know which instruction set it compiled for, and temporary files may outlive a machine.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"pycore-inductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"),
)


def pytest_report_header(config: pytest.Config) -> str:
    """The facts a failure report needs first."""
    isas = ", ".join(pycore.native.available_isas())
    return f"pycore: {isas} available, {pycore.cpu_isa()} in use; CUDA in the build: {pycore.build_info()['cuda']}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none, or where the build has no CUDA kernels."""
    if not torch.cuda.is_available():
        reason = "no CUDA device"
    elif pycore.build_info()["cuda"] is None:
        reason = "pycore was built without CUDA"
    else:
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=pycore.native.available_isas(), ids=lambda name: f"isa={name}")
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with the CPU kernels of one instruction set, and gives its name."""
    before = pycore.native.cpu_isa()
    pycore.native.set_cpu_isa(request.param)
    yield request.param
    pycore.native.set_cpu_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_native() -> Callable[..., None]:
    """Builds tests/native/<name>.cpp, with sources of csrc, and runs it: it ends with 0 when all is well."""
    if native_programs.compiler() is None:
        pytest.skip("no C++ compiler")
    return native_programs.run
