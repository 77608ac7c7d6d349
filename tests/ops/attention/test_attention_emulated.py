# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of attention, run on the CPU: tests/native/attention_cuda.cpp under cuda_emulation.h."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[3] / "csrc"


@pytest.mark.slow
def test_cuda_kernels_on_the_cpu(run_native: Callable[..., None]) -> None:
    """Every schedule and option against the scalar kernels; the same bits in any company; the CPU's blocks."""
    kernels = [path.relative_to(CSRC) for path in CSRC.glob("cpu/attention/*.cpp")]
    run_native("attention_cuda", "25", sources=(*map(str, kernels), "cpu/cpu_isa.cpp"))
