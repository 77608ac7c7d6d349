# SPDX-License-Identifier: Apache-2.0
"""Layering, instruction sets and imports: what has to hold of the tree and of the compiled objects."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pycore
from pycore import _limits

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))

# A folder is a set of allowed includes: what each of these may see, anywhere else may not.
OWNERS = {
    "torch": (re.compile(r"(torch|ATen|c10)/"), {"torch"}),
    "pybind11": (re.compile(r"pybind11/"), {"python"}),
    "CPython": (re.compile(r"Python\.h"), {"torch", "python"}),
    "CUDA": (re.compile(r"cuda|cub/|cooperative_groups|mma\.h"), {"cuda"}),
}
SLOW = re.compile(r"torch/(extension|all)\.h|torch/torch\.h")


def includes(path: Path) -> list[str]:
    return re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("what", OWNERS)
def test_includes_stay_in_their_folder(what: str) -> None:
    pattern, owners = OWNERS[what]
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        for name in includes(path)
        if pattern.match(name) and path.relative_to(CSRC).parts[0] not in owners
    ]
    assert not wrong


# Which folders of csrc/ a source may include by a path relative to its own, beside its own folder and include/.
MAY_SEE = {"torch": {"host"}, "python": {"host"}}


def test_host_is_seen_by_the_faces_alone() -> None:
    """What throws or owns memory lives in host/, so a kernel that cannot see it does neither."""
    wrong = []
    for path in SOURCES:
        folder = path.relative_to(CSRC).parts[0]
        for name in includes(path):
            if name.startswith("pycore/"):
                seen = "include"
                assert (CSRC / "include" / name).is_file(), f"{path.relative_to(ROOT)} includes {name}"
            elif (path.parent / name).is_file():
                seen = (path.parent / name).resolve().relative_to(CSRC).parts[0]
            else:
                continue  # a header of the system, or of a library that OWNERS knows
            if seen not in {folder, "include", *MAY_SEE.get(folder, ())}:
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong


@pytest.mark.parametrize("folder", ["include", "cpu", "cuda"])
def test_kernels_neither_throw_nor_own(folder: str) -> None:
    owning = re.compile(r"\bthrow\b|\bnew \w|\bmalloc\(|std::(vector|string|map|function|unique_ptr|shared_ptr)\b")
    wrong = []
    for path in SOURCES:
        if path.relative_to(CSRC).parts[0] == folder:
            code = re.sub(r"//.*", "", path.read_text())
            wrong += [f"{path.relative_to(ROOT)}: {found.group()}" for found in owning.finditer(code)]
    assert not wrong


def test_only_the_stable_abi() -> None:
    """One torch/extension.h costs a minute of compilation and ties the binary to one torch."""
    assert not [path for path in SOURCES for name in includes(path) if SLOW.match(name)]


def test_intrinsics_stay_in_instruction_set_files() -> None:
    """What includes intrinsics is compiled for one instruction set: avx2.cpp, avx512.cpp and their headers."""
    wrong = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(name.endswith("intrin.h") for name in includes(path)) and "avx" not in path.name
    ]
    assert not wrong


WIDE = sorted(path for path in CSRC.glob("cpu/*/*.cpp") if "kernels.inl.h" in path.read_text())


def seen_from(path: Path, name: str, seen: set[Path]) -> set[Path]:
    """The file that `path` includes as `name`, with all that it includes in turn; nothing for the system's headers."""
    file = CSRC / "include" / name if name.startswith("pycore/") else (path.parent / name).resolve()
    if file.is_file() and file not in seen:
        seen.add(file)
        for inner in includes(file):
            seen_from(file, inner, seen)
    return seen


@pytest.mark.parametrize("path", WIDE, ids=lambda path: "-".join(path.parts[-2:]))
def test_regions_open_after_their_headers(path: Path) -> None:
    """Code for one instruction set stands in a namespace: a header that it is the first to include would too."""
    before, inside = set[Path](), set[Path]()
    for name in includes(path):
        seen_from(path, name, inside if name == "kernels.inl.h" else before)
    assert any(file.name.endswith(".inl.h") for file in inside)
    late = [
        f"{file.relative_to(CSRC)} includes {name}"
        for file in inside - before
        for name in includes(file)
        if name.startswith("pycore/") and CSRC / "include" / name not in before
    ]
    headers = {name for file in (path, *before) for name in includes(file)}
    late += [
        f"{file.relative_to(CSRC)} includes <{name}>"
        for file in inside - before
        for name in includes(file)
        if not name.startswith("pycore/") and not (file.parent / name).is_file() and name not in headers
    ]
    assert not late


def test_inner_files_name_what_they_include() -> None:
    """An editor, or a reader, can follow an .inl.h from its first lines."""
    files = [path for path in SOURCES if path.name.endswith(".inl.h")]
    assert not [str(path.relative_to(ROOT)) for path in files if "#pragma once" not in path.read_text()]


def test_files_stay_readable() -> None:
    paths = [
        *SOURCES,
        *ROOT.glob("pycore/**/*.py"),
        *ROOT.glob("bench/*.py"),
        *ROOT.glob("tools/*.py"),
        ROOT / "setup.py",
    ]
    assert not [str(path.relative_to(ROOT)) for path in paths if len(path.read_text().splitlines()) > 600]


# ---- modules of Python -----------------------------------------------------------------------------------------------

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "pycore").rglob("*.py"))
}


def above(name: str) -> set[str]:
    """The packages that a module is in, itself not among them."""
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def imported(name: str) -> set[str]:
    """Modules of pycore that a module imports, anywhere in it, and the packages that are imported with them."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{name}: relative imports hide from this test"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    found |= {package for each in found for package in above(each) - above(name) - {name}}
    return found & MODULES.keys() - {"pycore", name}  # pycore itself imports lazily, by name


GRAPH = {name: imported(name) for name in MODULES}


def test_no_circle_between_modules() -> None:
    left = dict(GRAPH)
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in a circle, or behind one: {left}"


# What of pycore/ may not see what, directly or through others.
MAY_NOT_SEE = {
    "ops": {"nn", "models", "integrations", "cache", "compat"},
    "schedules": {"ops", "coding", "nn", "models", "integrations", "cache", "compat"},
    "positions": {"ops", "schedules", "coding", "nn", "models", "integrations", "cache", "compat"},
    "coding": {"ops", "schedules", "nn", "models", "integrations", "cache", "compat"},
    "cache": {"nn", "models", "integrations", "compat"},
    "nn": {"models", "integrations", "compat"},
    "models": {"integrations", "compat"},
    "reference": {"ops", "coding", "nn", "models", "integrations", "cache", "compat"},
}


def part(name: str) -> str:
    return name.split(".")[1] if "." in name else name


@pytest.mark.parametrize("layer", MAY_NOT_SEE)
def test_layers(layer: str) -> None:
    assert any(part(name) == layer for name in MODULES)
    seen, waiting = set(), {name for name in MODULES if part(name) == layer}
    while waiting:
        seen |= waiting
        waiting = {needed for name in waiting for needed in GRAPH[name]} - seen
    assert not {name for name in seen if part(name) in MAY_NOT_SEE[layer]}


def test_rules_of_ops_stand_with_the_ops() -> None:
    """Fake kernels, vmap, derivatives and autocast. That of drawing blocks is with the schedules, which trace alone."""
    rule = re.compile(r"torch\.library\.(register_|Library\()|^register_derivatives\(", re.MULTILINE)
    holders = {name for name, path in MODULES.items() if rule.search(path.read_text())}
    assert {part(name) for name in holders - {"pycore.schedules.attention_blocks"}} == {"ops"}


def test_numbers_of_the_kernels() -> None:
    """pycore._limits repeats what headers of csrc fix."""
    headers = ("key_tile.h", "attention/tile_schedule.h")
    header = "".join((CSRC / "include/pycore" / name).read_text() for name in headers)
    fixed = dict(re.findall(r"inline constexpr int64_t (\w+) =\s*([^;]+);", header))
    values = {name: eval(text.replace("INT64_MAX", str(2**63 - 1)).replace("/", "//")) for name, text in fixed.items()}
    assert (_limits.KEY_TILE, _limits.FAR) == (values["kKeyTile"], values["kFar"])


# ---- the compiled objects --------------------------------------------------------------------------------------------


def objects() -> list[Path]:
    """The objects of csrc/cpu that the installed library was linked from."""
    info = pycore.build_info()
    if info["debug"] or info["sanitize"]:
        return []
    folders = [
        path.parent for path in ROOT.glob("build/native/*/build_info.json") if json.loads(path.read_text()) == info
    ]
    found = [(path, folder / "obj") for folder in folders for path in folder.glob("obj/cpu/**/*.o")]
    return sorted(path for path, top in found if (CSRC / path.relative_to(top)).with_suffix(".cpp").exists())


def is_wide(path: Path) -> bool:
    return path.stem.startswith("avx")


def object_name(path: Path) -> str:
    variant = path.parts.index("obj") - 1
    return "-".join((path.parts[variant], *path.parts[variant + 3 :]))


def test_objects_are_there() -> None:
    info = pycore.build_info()
    if info["debug"] or info["sanitize"]:
        pytest.skip("a debug or sanitizer build is never shipped, and its unoptimized objects share what they inline")
    assert any(is_wide(path) for path in objects()), "run `make build`: the audit below needs the objects"


@pytest.mark.parametrize("path", [p for p in objects() if is_wide(p)], ids=object_name)
def test_wide_objects_define_no_weak_symbol(path: Path) -> None:
    """The linker keeps one copy of a weak symbol: were it this object's, baseline code would run wide instructions."""
    table = subprocess.run(["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    assert not [line for line in table.splitlines() if re.search(r" [WVu] ", line) and "DW.ref" not in line]


@pytest.mark.parametrize("path", [p for p in objects() if not is_wide(p)], ids=object_name)
def test_baseline_objects_have_no_wide_instruction(path: Path) -> None:
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not re.findall(r".*%[yz]mm.*", code)[:3]


# ---- imports ---------------------------------------------------------------------------------------------------------


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment or None)


def test_import_is_light() -> None:
    done = run_python(
        "import sys, pycore; pycore.build_info(); pycore.cpu_isa(); pycore.native.available_isas(); dir(pycore)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'import pycore loads torch or numpy'"
    )
    assert done.returncode == 0, done.stderr


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'pycore' has no attribute 'atention'"):
        _ = pycore.atention


def test_build_info() -> None:
    info = pycore.build_info()
    native = pycore.native.build_info()
    assert set(info) == {
        *("version", "commit", "compiler", "cuda", "cuda_arches", "no_cuda", "torch", "python"),
        *("extension_suffix", "debug", "sanitize"),
    }
    assert info["version"] == pycore.__version__
    assert info["compiler"] == native["compiler"]
    assert info["python"].rpartition(".")[0] == str(native["python"]).rpartition(".")[0]
    assert (info["cuda"] is not None) == native["cuda"] == (info["no_cuda"] is None)
    assert json.loads(json.dumps(info)) == info


def test_diagnosis_command() -> None:
    done = subprocess.run([sys.executable, "-m", "pycore"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^cpu isa +(scalar|avx2|avx512) of scalar", done.stdout, re.MULTILINE)
    assert "rms_norm" in done.stdout


def test_needed_libraries() -> None:
    """The static CUDA runtime, no libtorch_cuda and no libpython: that is what lets one binary load everywhere."""
    package = Path(pycore.__file__).parent
    ours = "libpycore|libtorch|libtorch_cpu|libc10"
    system = r"libstdc\+\+|libgcc_s|libm|libc|ld-linux-x86-64|libpthread|libdl|librt"
    for library in package.glob("*.so"):
        table = subprocess.run(["objdump", "-p", str(library)], capture_output=True, text=True, check=True).stdout
        needed = re.findall(r"NEEDED +(\S+)", table)
        assert not [name for name in needed if not re.match(rf"({ours}|{system})\.so", name)], library.name
        assert library.name == "libpycore.so" or "libpycore.so" in needed
        assert ("libtorch.so" in needed) == library.name.startswith("_C")
        assert set(re.findall(r"R(?:UN)?PATH +(\S+)", table)) == {"$ORIGIN"}


def test_stable_face_is_for_every_python() -> None:
    assert (Path(pycore.__file__).parent / "_C.abi3.so").exists()
    assert shutil.which("nm")
    command = ["nm", "-D", "--undefined-only", str(Path(pycore.__file__).parent / "_C.abi3.so")]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in names if re.match(r"_Z.*(at|c10|torch)[0-9]", name)], "C++ symbols of torch are no ABI"
