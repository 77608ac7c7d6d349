# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of attention, run on the CPU: tests/native/attention_cuda.cpp under cuda_emulation.h."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_cuda_kernels_on_the_cpu(tmp_path: Path) -> None:
    """Every schedule and option against the scalar kernels, the same bits in any company, the CPU's blocks."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "attention_cuda"
    flags = ["-std=c++17", "-O1", "-march=x86-64", "-ffp-contract=off", "-pthread", f"-I{ROOT / 'csrc' / 'include'}"]
    kernels = ROOT / "csrc" / "cpu"
    source = ROOT / "tests" / "native" / "attention_cuda.cpp"
    sources = [source, *kernels.glob("attention*.cpp"), kernels / "cpu_isa.cpp"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([str(program), "60"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
