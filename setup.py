# SPDX-License-Identifier: Apache-2.0
"""Builds the native half of pycore: one table (folder -> compiler, flags) becomes one build.ninja.

A folder of csrc/ is a set of allowed includes, so the folder decides everything: which compiler a source goes through,
its flags, and the library it ends up in. Adding a source means adding a file. Objects, depfiles and build.ninja live in
build/native/<variant>/, which outlives pip's temporary folders: a second build compiles what changed and no more.

torch.utils.cpp_extension is not used: it has one flag set per extension, and no CUDA where torch itself has none.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip's build backend does not

from build_support.settings import (  # noqa: E402
    Settings,
    fail,
    find_ninja,
    find_pybind11,
    find_torch,
    output_of,
    read_settings,
)

EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """All sources under csrc/<name> with this suffix go through one compiler with its flags into one library."""

    name: str
    suffix: str
    library: str
    flags: list[str]


@dataclass(frozen=True)
class Library:
    """One link edge. `needs` are libraries of this build that it links to."""

    file: str
    flags: list[str]
    needs: tuple[str, ...] = ()


def gencode(arch: str) -> list[str]:
    number = arch.removesuffix("+PTX").replace(".", "")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    if arch.endswith("+PTX"):
        flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def table(s: Settings) -> tuple[list[Folder], list[Library]]:
    torch, _ = find_torch()
    python = ["-isystem", sysconfig.get_path("include")]
    defines = ["-DPYCORE_WITH_CUDA"] if s.nvcc else []
    if "9.0a" in s.arches:
        defines.append("-DPYCORE_WITH_SM90A")
    sanitize = [f"-fsanitize={s.sanitize}", "-fno-omit-frame-pointer", "-g"] if s.sanitize else []
    # Baseline flags for all host code: a wider target belongs in a `#pragma GCC target` region of the source, because
    # -mavx* on a command line would leak into weak symbols of the C++ library that baseline code then shares.
    host = ["-march=x86-64", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread",
            "-Icsrc/include", *defines, *sanitize]  # fmt: skip

    def optimized(level: str) -> list[str]:
        if s.debug:
            return ["-O0", "-g", "-Werror"]
        return ["-O1" if s.sanitize else level, "-DNDEBUG"]  # instrumented kernels take minutes at -O3

    # Compressed, the device code is a quarter as large.
    device = ["-std=c++17", "-O3", "-fmad=false", "-lineinfo", "-Xfatbin=-compress-all", *(["-g"] if s.debug else []),
              "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off", "-ccbin", shlex.split(s.cxx)[-1],
              "-Icsrc/include", *defines]  # fmt: skip
    everywhere = [flag for arch in s.arches for flag in gencode(arch)]
    stable_abi = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
    folders = [
        # gcc 12 warns about the undefined registers of its own intrinsics (gcc.gnu.org/PR105593).
        Folder("cpu", ".cpp", "libpycore.so",
               [*host, *optimized("-O3"), "-std=c++17", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]),
        Folder("torch", ".cpp", "_C.abi3.so",
               [*host, *optimized("-O2"), "-std=c++20", *stable_abi, "-isystem", f"{torch}/include", *python]),
        Folder("python", ".cpp", f"native{EXT_SUFFIX}",
               [*host, *optimized("-O1"), "-std=c++17", "-isystem", find_pybind11(), *python]),
    ]  # fmt: skip
    cuda_link = []
    if s.nvcc:
        folders.append(Folder("cuda", ".cu", "libpycore.so", [*device, *everywhere]))
        if "9.0a" in s.arches:
            folders.append(Folder("cuda", ".sm90a.cu", "libpycore.so", [*device, *gencode("9.0a")]))
        cuda_link = [f"-L{s.cuda_lib}", "-lcudart_static", "-ldl", "-lrt"]
    whole = [] if s.sanitize else ["-Wl,--no-undefined"]  # a kernel without a definition fails here, not at import
    beside = ["-Wl,-rpath,$ORIGIN", *sanitize]
    libraries = [
        Library("libpycore.so", ["-Wl,-soname,libpycore.so", *whole, *cuda_link, "-lpthread", *beside]),
        # The umbrella libtorch is what pulls in libtorch_cuda, where the weak symbol of csrc/torch/stream.h lives.
        Library("_C.abi3.so", [f"-L{torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", *beside],
                ("libpycore.so",)),
        Library(f"native{EXT_SUFFIX}", beside, ("libpycore.so",)),
    ]  # fmt: skip
    return folders, libraries


# ---- build.ninja -----------------------------------------------------------------------------------------------------


def sources_of(folder: Folder) -> list[Path]:
    found = sorted(ROOT.glob(f"csrc/{folder.name}/**/*{folder.suffix}"))
    if folder.suffix == ".cu":  # *.sm90a.cu has a row of its own
        found = [path for path in found if not path.name.endswith(".sm90a.cu")]
    return [path.relative_to(ROOT) for path in found]


def ninja_text(s: Settings, out: Path) -> tuple[str, list[str]]:
    def quoted(flags: list[str]) -> str:
        return shlex.join(flags).replace("$", "$$")

    def escaped(path: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    folders, libraries = table(s)
    cxx = f"{s.launcher} {s.cxx}".strip()
    lines = [
        "ninja_required_version = 1.8",
        f"builddir = {escaped(out)}",
        "rule cxx",
        f"  command = {cxx} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++  $in",
        "rule nvcc",
        f"  command = {s.launcher} {s.nvcc} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule link",
        f"  command = {s.cxx} -shared $in -o $out $flags",
        "  description = link $out",
    ]
    objects: dict[str, list[str]] = {library.file: [] for library in libraries}
    for folder in folders:
        flags_name = f"flags_{folder.name}{folder.suffix.replace('.', '_')}"
        lines.append(f"{flags_name} = {quoted(folder.flags)}")
        for source in sources_of(folder):
            target = out / "obj" / source.relative_to("csrc").with_suffix(".o")
            objects[folder.library].append(str(target))
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            lines += [f"build {escaped(target)}: {rule} {escaped(source)}", f"  flags = ${flags_name}"]
    products = []
    for library in libraries:
        needed = [str(out / name) for name in library.needs]
        inputs = " ".join(map(escaped, [*objects[library.file], *needed]))
        lines += [f"build {escaped(out / library.file)}: link {inputs}", f"  flags = {quoted(library.flags)}"]
        products.append(library.file)
    lines.append("default " + " ".join(escaped(out / name) for name in products))
    return "\n".join(lines) + "\n", products


def build_info(s: Settings) -> dict[str, object]:
    commit = output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").strip()
    return {
        "version": re.search(r'__version__ = "(.*)"', (ROOT / "pycore/__init__.py").read_text())[1],
        "commit": commit if (ROOT / ".git").exists() and commit else None,
        "compiler": s.compiler,
        "cuda": s.nvcc_version if s.nvcc else None,
        "cuda_arches": list(s.arches),
        "no_cuda": s.no_cuda or None,
        "torch": find_torch()[1],
        "python": platform.python_version(),
        "extension_suffix": EXT_SUFFIX,
        "debug": s.debug,
        "sanitize": s.sanitize or None,
    }


def build_native() -> list[Path]:
    """Brings the three libraries up to date and returns their paths, with that of build_info.json."""
    s = read_settings()
    out = Path("build/native") / s.variant
    text, products = ninja_text(s, out)
    info = build_info(s)
    rows = {"folder": out, "compiler": s.compiler, "torch": info["torch"], "jobs": s.jobs,
            "CUDA": f"{s.nvcc_version} for {' '.join(s.arches)}" if s.nvcc else f"off: {s.no_cuda}",
            "debug": s.debug, "sanitize": s.sanitize or "-", "launcher": s.launcher or "-"}  # fmt: skip
    print("pycore build\n" + "\n".join(f"  {name:<9} {value}" for name, value in rows.items()), flush=True)
    (ROOT / out).mkdir(parents=True, exist_ok=True)
    with open(ROOT / out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds in one folder would tread on each other's objects
        (ROOT / out / "build.ninja").write_text(text)
        (ROOT / out / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        ninja = [find_ninja(), "-f", str(out / "build.ninja"), "-j", str(s.jobs), "-k", "0"]
        if subprocess.run(ninja, cwd=ROOT).returncode != 0:
            fail("the native build failed; the compiler's messages are above.")
    return [ROOT / out / name for name in [*products, "build_info.json"]]


# ---- setuptools ------------------------------------------------------------------------------------------------------


class NinjaBuild(build_ext):
    """build_ext with ninja in its place: what it copies is what the table made."""

    def run(self) -> None:
        package = ROOT / "pycore" if self.inplace else Path(self.build_lib) / "pycore"
        package.mkdir(parents=True, exist_ok=True)
        for product in build_native():
            # Replaced in one step: a process that has the old library mapped keeps it.
            shutil.copy2(product, package / f".{product.name}.new")
            os.replace(package / f".{product.name}.new", package / product.name)

    def get_outputs(self) -> list[str]:
        names = ["libpycore.so", "_C.abi3.so", f"native{EXT_SUFFIX}", "build_info.json"]
        return [] if self.inplace else [str(Path(self.build_lib) / "pycore" / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class FreshBuildPy(build_py):
    """build_py into an empty folder: setuptools never removes there what the source tree no longer has."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "pycore", ignore_errors=True)
        super().run()


# The extension has no sources: it only tells setuptools that the wheel belongs to one platform and one Python.
setup(
    license="Apache-2.0",
    ext_modules=[Extension("pycore.native", sources=[])],
    cmdclass={"build_ext": NinjaBuild, "build_py": FreshBuildPy},
)
