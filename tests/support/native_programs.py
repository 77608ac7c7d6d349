# SPDX-License-Identifier: Apache-2.0
"""Programs of tests/native, built by ninja in build/tests: what two of them share is compiled once, and what is up to
date is not compiled again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from build_support.settings import find_ninja

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("build/tests")
FLAGS = "-std=c++17 -O1 -ffp-contract=off -pthread -Icsrc/include"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(name: str, sources: tuple[str, ...] = ()) -> Path:
    """The program tests/native/<name>.cpp, linked with sources of csrc."""
    lines = [
        "rule cxx",
        f"  command = {compiler()} {FLAGS} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler()} -pthread $in -o $out",
        f"builddir = {FOLDER}",
    ]
    objects = []
    for source in (f"tests/native/{name}.cpp", *(f"csrc/{source}" for source in sources)):
        objects.append(f"{FOLDER}/{source}.o")
        lines.append(f"build {objects[-1]}: cxx {source}")
    lines.append(f"build {FOLDER}/{name}: link {' '.join(objects)}")
    (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
    with open(ROOT / FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        file = FOLDER / "build.ninja"
        (ROOT / file).write_text("\n".join(lines) + "\n")
        done = subprocess.run([find_ninja(), "-f", str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / FOLDER / name


def run(name: str, *arguments: str, sources: tuple[str, ...] = ()) -> None:
    done = subprocess.run([str(build(name, sources)), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
