# SPDX-License-Identifier: Apache-2.0
"""What the environment asks of the build and what the machine has. Whatever is missing ends it with one sentence."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = (2, 10)  # TORCH_TARGET_VERSION in setup.py's table says the same
OLDEST_GXX = 11
DEFAULT_ARCHES = "8.0+PTX;9.0a"  # sm_80 with PTX for everything newer, and a cubin for the H100


def fail(sentence: str) -> NoReturn:
    """Ends the build with one sentence; a traceback would bury it in pip's output."""
    sys.exit(f"pycore: {sentence}")


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


@dataclass(frozen=True)
class Settings:
    """Every environment variable the build reads is read in `read_settings`, and nowhere else."""

    cxx: str
    compiler: str
    nvcc: str | None
    nvcc_version: str
    cuda_lib: str
    no_cuda: str  # why there is no CUDA in the build; empty where there is
    arches: tuple[str, ...]
    debug: bool
    sanitize: str
    launcher: str
    jobs: int

    @property
    def variant(self) -> str:
        """Builds that share no command line get a folder each, so that switching between them rebuilds nothing."""
        kind = "debug" if self.debug else "release"
        return "-".join(filter(None, [kind, "cuda" if self.nvcc else "cpu", self.sanitize.replace(",", "-")]))


def find_compiler() -> tuple[str, str]:
    cxx = os.environ.get("CXX", "g++")
    macros = dict(re.findall(r"#define (\w+) (.*)", output_of(*shlex.split(cxx), "-dM", "-E", "-x", "c++", os.devnull)))
    remedy = f"install g++ {OLDEST_GXX} or newer (apt-get install g++) and point CXX at it"
    if "__GNUC__" not in macros:
        fail(f"the C++ compiler {cxx!r} cannot be run: {remedy}.")
    if "__clang__" in macros:
        fail(f"the C++ compiler {cxx!r} is clang, which does not know the kernels' '#pragma GCC target': {remedy}.")
    version = ".".join(macros[f"__GNUC{part}__"] for part in ("", "_MINOR", "_PATCHLEVEL"))
    if int(macros["__GNUC__"]) < OLDEST_GXX:
        fail(f"the C++ compiler {cxx!r} is g++ {version}, too old for C++20: {remedy}.")
    return cxx, f"g++ {version}"


def find_nvcc(mode: str) -> tuple[str | None, str, str]:
    """Returns nvcc, its version and the folder of its static runtime; None where there is none and none is demanded."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else [os.environ.get("PATH"), "/usr/local/cuda/bin"]
    nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    version = re.search(r"release ([\d.]+)", output_of(nvcc, "--version")) if nvcc else None
    if version is None:
        if mode == "on":
            fail("PYCORE_CUDA=on, but nvcc was not found: install the CUDA toolkit and put nvcc on PATH (or set "
                 "CUDA_HOME), or build for the CPU with PYCORE_CUDA=off.")  # fmt: skip
        return None, "", ""
    # nvcc may be a wrapper script far from its toolkit, so it is asked where the toolkit is.
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(.*)", dry_run)
    top_path = Path(top[1].strip() if top else Path(nvcc).resolve().parent.parent)
    for lib in ("targets/x86_64-linux/lib", "lib64", "lib"):
        if (top_path / lib / "libcudart_static.a").exists():
            return nvcc, version[1], str((top_path / lib).resolve())
    fail(f"{nvcc} has no libcudart_static.a beside it: install the CUDA runtime's static library (cuda-cudart-dev), or "
         "build for the CPU with PYCORE_CUDA=off.")  # fmt: skip


def device_arches() -> tuple[str, ...]:
    """The architectures of this machine's NVIDIA devices, as PYCORE_CUDA_ARCH_LIST names them."""
    found = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
    capabilities = sorted({capability for capability in found if re.fullmatch(r"\d+\.\d", capability)})
    return tuple("9.0a" if capability == "9.0" else capability for capability in capabilities)


def find_cuda(mode: str, listed: str | None) -> tuple[str | None, str, str, tuple[str, ...], str]:
    """Decides for or against CUDA: nvcc, its version, its runtime's folder, the architectures, and why not.

    Compiling the kernels takes longer than all the rest of the build, so `auto` does it only where they can run.
    """
    if mode not in ("auto", "on", "off"):
        fail(f"PYCORE_CUDA is {mode!r} and must be auto, on or off.")
    arches = tuple(re.split(r"[;,\s]+", listed.strip())) if listed else ()
    for arch in arches:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            fail(f"PYCORE_CUDA_ARCH_LIST names {arch!r}, which must look like 8.0, 8.0+PTX or 9.0a.")
    if mode == "off":
        return None, "", "", (), "PYCORE_CUDA=off"
    devices = device_arches() if mode == "auto" else tuple(DEFAULT_ARCHES.split(";"))
    if not devices:
        return None, "", "", (), "no NVIDIA device here; PYCORE_CUDA=on builds without one"
    nvcc, version, lib = find_nvcc(mode)
    if nvcc is None:
        return None, "", "", (), "no nvcc on PATH; install the CUDA toolkit"
    return nvcc, version, lib, arches or devices, ""


def read_settings() -> Settings:
    env = os.environ.get
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        fail(f"this is {platform.system()} on {platform.machine()}; pycore is built for Linux on x86-64 only.")
    cxx, compiler = find_compiler()
    nvcc, nvcc_version, cuda_lib, arches, no_cuda = find_cuda(
        env("PYCORE_CUDA", "auto").lower(), env("PYCORE_CUDA_ARCH_LIST")
    )
    jobs = env("MAX_JOBS", "") or str(len(os.sched_getaffinity(0)))
    if not jobs.isdigit() or jobs == "0":
        fail(f"MAX_JOBS is {jobs!r} and must be a positive number.")
    debug = env("PYCORE_DEBUG", "0") not in ("", "0")
    sanitize = env("PYCORE_SANITIZE", "")
    launcher = env("PYCORE_LAUNCHER", "")
    if launcher and not shutil.which(launcher):
        fail(f"PYCORE_LAUNCHER is {launcher!r}, which is not on PATH: install it or unset the variable.")
    return Settings(cxx, compiler, nvcc, nvcc_version, cuda_lib, no_cuda, arches, debug, sanitize, launcher, int(jobs))


def find_torch() -> tuple[Path, str]:
    """Finds torch's headers without importing it, which would cost two seconds of every rebuild."""
    remedy = "run `pip install torch==2.13.0` first, then `pip install --no-build-isolation .`"
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail(f"the build needs torch, which this Python does not have: {remedy}.")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        fail(f"the build needs torch 2.10 or newer and found {version}: {remedy}.")
    return Path(spec.origin).parent, version


def find_pybind11() -> str:
    try:
        import pybind11
    except ImportError:
        fail("the build needs pybind11, which this Python does not have: run `pip install pybind11 ninja` first.")
    return pybind11.get_include()


def find_ninja() -> str:
    # The environment's own ninja before the system's: an older one does not understand the other's log of what was
    # built, and starts over.
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    found = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    if found is None:
        fail("the build needs ninja, which is neither in this Python nor on PATH: run `pip install ninja` first.")
    return found
