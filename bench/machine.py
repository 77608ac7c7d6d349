# SPDX-License-Identifier: Apache-2.0
"""The machine: what it is, and how fast it can be at all, measured without pycore."""

from __future__ import annotations

import ctypes
import datetime
import functools
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from bench.clock import cuda_seconds, median_seconds

ROOT = pathlib.Path(__file__).resolve().parent.parent
GEMM_SIZE = 2048  # three 16 MiB operands: large enough for full speed, 0.1 s on two cores

# Twelve independent chains hide the latency of any FMA unit; eight running sums keep a read at memory speed.
_PROBE = r"""
typedef float Vector __attribute__((vector_size(WIDTH)));
enum { kLanes = WIDTH / 4, kChains = 12, kSums = 8 };

float fma_chains(long steps) {
  Vector chain[kChains], factor, addend;
  for (int i = 0; i < kLanes; i++) { factor[i] = 0.999f; addend[i] = 0.001f; }
  for (int c = 0; c < kChains; c++) chain[c] = addend * (float)c;
  for (long s = 0; s < steps; s++) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; c++) chain[c] = chain[c] * factor + addend;
  }
  float total = 0;
  for (int c = 0; c < kChains; c++) for (int i = 0; i < kLanes; i++) total += chain[c][i];
  return total;
}

float read_sum(const float* data, long vectors) {
  const Vector* in = (const Vector*)data;
  Vector sum[kSums] = {};
  for (long v = 0; v + kSums <= vectors; v += kSums) {
#pragma GCC unroll 8
    for (int s = 0; s < kSums; s++) sum[s] += in[v + s];
  }
  float total = 0;
  for (int s = 0; s < kSums; s++) for (int i = 0; i < kLanes; i++) total += sum[s][i];
  return total;
}
"""


def describe(device: str = "cpu") -> dict[str, Any]:
    """Processor, threads, versions, commit and date; nothing that names the host or its user."""
    info = _cpuinfo()
    features = info.get("flags", "").split()
    machine: dict[str, Any] = {
        "cpu": info.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu_features": [name for name in ("avx2", "fma", "avx512f", "avx512bw") if name in features],
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
        machine["cuda"] = torch.version.cuda
    try:
        import pycore

        machine["pycore_isa"] = pycore.cpu_isa()
    except ImportError:
        machine["pycore_isa"] = None
    return machine


def label(machine: dict[str, Any]) -> str:
    """A short file name for a machine: "amd-epyc-2t-avx512"."""
    name = machine.get("gpu") or re.sub(r"\(\w+\)|\bCPU\b|@.*|\d+-Core|Processor", "", machine["cpu"])
    parts = [name, f"{machine['threads']}t"]
    if machine.get("pycore_isa"):
        parts.append(machine["pycore_isa"])
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def sgemm() -> Callable[[], torch.Tensor]:
    """One float32 matrix product of GEMM_SIZE; the limit that attention is held against."""
    a = torch.randn(GEMM_SIZE, GEMM_SIZE)
    b = torch.randn(GEMM_SIZE, GEMM_SIZE)
    out = torch.empty(GEMM_SIZE, GEMM_SIZE)
    return lambda: torch.mm(a, b, out=out)


GEMM_FLOPS = 2.0 * GEMM_SIZE**3


def limits(device: str = "cpu", rounds: int = 7) -> dict[str, Any]:
    """GEMM and FMA rate in GFLOP/s and memory read rate in GB/s, each the median of `rounds`."""
    if device == "cuda":
        return _cuda_limits(rounds)
    product = sgemm()
    product()
    measured: dict[str, Any] = {"gemm_gflops": GEMM_FLOPS / median_seconds(product, rounds) / 1e9}
    threads = torch.get_num_threads()
    probe = _probe()
    if probe is not None:
        library, width = probe
        steps = 20_000_000 // (width // 4)
        with ThreadPoolExecutor(threads) as pool:
            seconds = median_seconds(lambda: list(pool.map(library.fma_chains, [steps] * threads)), rounds)
            measured["fma_gflops"] = 2.0 * 12 * (width // 4) * steps * threads / seconds / 1e9
    measured["read_gbs"] = read_bytes() / median_seconds(memory_read(), rounds) / 1e9
    return measured


def read_bytes() -> int:
    """What `memory_read` reads: 128 MiB a thread."""
    return torch.get_num_threads() * 128 * 2**20


def memory_read() -> Callable[[], Any]:
    """One read of a block of memory on all threads; the limit that work bound by bytes is held against."""
    data = torch.ones(torch.get_num_threads(), read_bytes() // torch.get_num_threads() // 4)
    probe = _probe()
    if probe is None:
        return data.sum
    library, width = probe
    vectors, pool = data.shape[1] * 4 // width, ThreadPoolExecutor(len(data))
    return lambda: list(pool.map(lambda row: library.read_sum(row.data_ptr(), vectors), data))


def _cuda_limits(rounds: int) -> dict[str, Any]:
    measured = {}
    for name, dtype, size in (("gemm_gflops", torch.float32, 4096), ("gemm_bf16_gflops", torch.bfloat16, 8192)):
        a = torch.randn(size, size, device="cuda", dtype=dtype)
        b = torch.randn(size, size, device="cuda", dtype=dtype)
        for _ in range(3):
            a @ b
        seconds = median_seconds(lambda a=a, b=b: a @ b, rounds, cuda_seconds)
        measured[name] = 2.0 * size**3 / seconds / 1e9
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), rounds, cuda_seconds)
    measured["copy_gbs"] = 2.0 * source.numel() * 4 / seconds / 1e9  # bytes read and bytes written
    return measured


@functools.cache
def _probe() -> tuple[ctypes.CDLL, int] | None:
    """The C probe, compiled for this processor, and its vector width in bytes; None without a C compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return None
    width = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "probe.c")
        source.write_text(_PROBE)
        binary = source.with_suffix(".so")
        command = [
            compiler,
            "-O3",
            "-march=native",
            "-ffast-math",
            f"-DWIDTH={width}",
            f"-mprefer-vector-width={width * 8}",
            "-shared",
            "-fPIC",
        ]
        done = subprocess.run([*command, str(source), "-o", str(binary)], capture_output=True, check=False)
        if done.returncode != 0:
            return None
        library = ctypes.CDLL(str(binary))
    library.fma_chains.argtypes = [ctypes.c_long]
    library.fma_chains.restype = ctypes.c_float
    library.read_sum.argtypes = [ctypes.c_void_p, ctypes.c_long]
    library.read_sum.restype = ctypes.c_float
    return library, width


def _cpuinfo() -> dict[str, str]:
    pairs: dict[str, str] = {}
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        pairs.setdefault(name.strip(), value.strip())
    return pairs


def _commit() -> str | None:
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        # Results and plots change with every run; only what runs makes a tree dirty.
        dirty = git("status", "--porcelain", "--", "csrc", "pycore", "bench/*.py", "setup.py")
    except FileNotFoundError:
        return None
    return f"{commit}+local changes" if commit and dirty else commit
