# SPDX-License-Identifier: Apache-2.0
"""What a broken build environment or a foreign library gets: one sentence that ends with the remedy."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pycore

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_support import settings  # noqa: E402

PACKAGE = Path(pycore.__file__).parent


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CXX", "CUDA_HOME", "MAX_JOBS", "PYCORE_CUDA", "PYCORE_CUDA_ARCH_LIST", "PYCORE_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)


def program(folder: Path, text: str) -> str:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def fails(match: str) -> pytest.RaisesContext[SystemExit]:
    return pytest.raises(SystemExit, match=f"^pycore: .*{match}.*\\.$")


# ---- the build -------------------------------------------------------------------------------------------------------


def test_the_settings_of_this_machine() -> None:
    s = settings.read_settings()
    assert s.compiler.startswith("g++ ")
    assert s.jobs >= 1


@pytest.mark.parametrize("system, machine", [("Darwin", "arm64"), ("Linux", "aarch64"), ("Windows", "AMD64")])
def test_other_platforms(system: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with fails(f"this is {system} on {machine}; pycore is built for Linux on x86-64 only"):
        settings.read_settings()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-g++")
    with fails(r"the C\+\+ compiler 'no-such-g\+\+' cannot be run: install g\+\+ 11 or newer .* and point CXX at it"):
        settings.find_compiler()


def test_old_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    macros = "#define __GNUC__ 9\n#define __GNUC_MINOR__ 4\n#define __GNUC_PATCHLEVEL__ 0"
    monkeypatch.setenv("CXX", program(tmp_path, f"echo '{macros}'"))
    with fails(r"is g\+\+ 9\.4\.0, too old for C\+\+20: install g\+\+ 11 or newer"):
        settings.find_compiler()


def test_clang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", program(tmp_path, "echo '#define __GNUC__ 4\n#define __clang__ 1'"))
    with fails(r"is clang, which does not know the kernels' '#pragma GCC target': install g\+\+ 11"):
        settings.find_compiler()


def test_cuda_without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(settings, "device_arches", lambda: ("8.6",))
    assert settings.find_cuda("auto", None) == (None, "", "", (), "no nvcc on PATH; install the CUDA toolkit")
    with fails("PYCORE_CUDA=on, but nvcc was not found: install the CUDA toolkit .*, or build .* with PYCORE_CUDA=off"):
        settings.find_cuda("on", None)


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A CUDA toolkit that consists of nvcc's answers and an empty runtime."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcudart_static.a").touch()
    nvcc = program(tmp_path / "bin", f"echo 'Cuda compilation tools, release 13.0'; echo 'TOP={tmp_path}' >&2")
    Path(nvcc).rename(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "mode, devices, listed, arches, why",
    [
        ("auto", "", None, (), "no NVIDIA device here; PYCORE_CUDA=on builds without one"),
        ("auto", "", "8.0", (), "no NVIDIA device here; PYCORE_CUDA=on builds without one"),
        ("auto", "9.0", None, ("9.0a",), ""),
        ("auto", "8.6\n8.6\n8.0", None, ("8.0", "8.6"), ""),
        ("auto", "8.6", "8.0+PTX", ("8.0+PTX",), ""),
        ("on", "", None, ("8.0+PTX", "9.0a"), ""),
        ("on", "8.6", "9.0a", ("9.0a",), ""),
        ("off", "9.0", None, (), "PYCORE_CUDA=off"),
    ],
)
def test_cuda_is_built_where_it_can_run(
    mode: str, devices: str, listed: str | None, arches: tuple[str, ...], why: str, toolkit: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    smi = Path(program(toolkit, f"echo '{devices}'")).rename(toolkit / "nvidia-smi")
    monkeypatch.setenv("PATH", str(smi.parent), prepend=":")
    nvcc, version, lib, found, reason = settings.find_cuda(mode, listed)
    assert (found, reason) == (arches, why)
    if arches:
        assert (nvcc, version, lib) == (str(toolkit / "bin" / "nvcc"), "13.0", str(toolkit / "lib64"))
    else:
        assert nvcc is None


def test_cuda_without_static_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = program(tmp_path / "bin", f"echo 'Cuda compilation tools, release 13.0'; echo 'TOP={tmp_path}' >&2")
    Path(nvcc).rename(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with fails(r"has no libcudart_static\.a beside it: install .*, or build for the CPU with PYCORE_CUDA=off"):
        settings.find_cuda("on", None)


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("PYCORE_CUDA", "yes", "PYCORE_CUDA is 'yes' and must be auto, on or off"),
        ("PYCORE_CUDA_ARCH_LIST", "sm_90", "PYCORE_CUDA_ARCH_LIST names 'sm_90', which must look like 8.0"),
        ("MAX_JOBS", "many", "MAX_JOBS is 'many' and must be a positive number"),
        ("MAX_JOBS", "0", "MAX_JOBS is '0' and must be a positive number"),
        ("PYCORE_LAUNCHER", "no-such-cache", "PYCORE_LAUNCHER is 'no-such-cache', which is not on PATH"),
    ],
)
def test_wrong_switches(name: str, value: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with fails(match):
        settings.read_settings()


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    with fails(r"needs torch, which this Python does not have: run `pip install torch==2\.13\.0` first"):
        settings.find_torch()


def test_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings.importlib.metadata, "version", lambda name: "2.9.1+cu128")
    with fails(r"needs torch 2\.10 or newer and found 2\.9\.1\+cu128: run `pip install torch==2\.13\.0` first"):
        settings.find_torch()


def test_build_command_ends_with_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user meets it: no traceback, the sentence last, exit status 1."""
    monkeypatch.setenv("CXX", "no-such-g++")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("pycore: the C++ compiler 'no-such-g++' cannot be run: install g++")


# ---- the import ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the installed package, to be broken."""
    shutil.copytree(PACKAGE, tmp_path / "pycore", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "pycore"


def last_line(copy: Path, code: str) -> str:
    # An editable install would find in the checkout what the copy lacks.
    only_here = "import sys; sys.meta_path = [f for f in sys.meta_path if not f.__module__.startswith('__editable__')]"
    command = [sys.executable, "-c", f"{only_here}\n{code}"]
    done = subprocess.run(command, cwd=copy.parent, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


NATIVE = "import pycore; pycore.native"
OPS = "import pycore._load; pycore._load.load_ops()"
REMEDY = r"build it again, with `pip install --no-build-isolation --force-reinstall --no-deps \.` in its checkout\.$"


def native_library(copy: Path) -> Path:
    return next(copy.glob("native.*.so"))


def test_nothing_was_built(copy: Path) -> None:
    for path in [*copy.glob("*.so"), copy / "build_info.json"]:
        path.unlink()
    assert re.match(f"ImportError: pycore has no native libraries beside .*: {REMEDY}", last_line(copy, NATIVE))


def test_other_python(copy: Path) -> None:
    native_library(copy).rename(copy / "native.cpython-38-x86_64-linux-gnu.so")
    message = last_line(copy, NATIVE)
    assert re.match(rf"ImportError: pycore\.native was built for Python \S+, and this is Python .*: {REMEDY}", message)


@pytest.mark.parametrize("stem, code", [("native", NATIVE), ("_C", OPS)])
def test_missing_face(stem: str, code: str, copy: Path) -> None:
    next(copy.glob(f"{stem}.*.so")).unlink()
    assert re.match(rf"ImportError: pycore\.{stem} is missing from .*: {REMEDY}", last_line(copy, code))


@pytest.mark.parametrize("stem, code", [("native", NATIVE), ("_C", OPS)])
def test_missing_kernels(stem: str, code: str, copy: Path) -> None:
    (copy / "libpycore.so").unlink()
    message = last_line(copy, code)
    assert re.match(rf"ImportError: pycore\.{stem} needs libpycore\.so, which is missing from .*: {REMEDY}", message)


@pytest.mark.parametrize("stem, code", [("native", NATIVE), ("_C", OPS)])
def test_undefined_symbol(stem: str, code: str, copy: Path) -> None:
    """A libpycore of another version."""
    empty = copy / "empty.cpp"
    empty.write_text("")
    soname = "-Wl,-soname,libpycore.so"
    subprocess.run(["g++", "-shared", "-fPIC", soname, str(empty), "-o", str(copy / "libpycore.so")], check=True)
    pattern = rf"ImportError: pycore\.{stem} was built for something else \(.*\) and does not load here "
    assert re.match(rf"{pattern}\(.*undefined symbol: \w+\): {REMEDY}", last_line(copy, code))


def test_not_a_library(copy: Path) -> None:
    native_library(copy).write_text("version https://git-lfs.github.com/spec/v1\n" * 8)
    message = last_line(copy, NATIVE)
    assert re.match(rf"ImportError: pycore\.native was built for something else .*: {REMEDY}", message)


@pytest.mark.parametrize(
    "code, match",
    [
        ("sys.modules['torch'] = None", "pycore.ops needs torch, which this Python does not have: run `pip install"),
        ("import torch; torch.__version__ = '2.9.1'", "pycore.ops needs torch 2.10 or newer and found 2.9.1: run `pip"),
    ],
)
def test_torch_of_the_user(code: str, match: str, copy: Path) -> None:
    assert last_line(copy, f"import sys; {code}; {OPS}").startswith(f"ImportError: {match}")
