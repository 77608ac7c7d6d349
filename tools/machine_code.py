# SPDX-License-Identifier: Apache-2.0
"""What the compiler made of the CUDA kernels: registers, stack and instructions by kind, whole and in the hottest loop.

python -m tools.machine_code                        the built libpycore.so, its code for sm_90a
python -m tools.machine_code LIBRARY --arch sm_80   another library, another architecture
python -m tools.machine_code --only "forward<"      kernels whose name contains a text, which is much faster
python -m tools.machine_code --json FILE            also as a file: a line per kernel, kinds that are 0 left out

A source can say neither that an array stayed in registers, nor that a copy was one instruction, nor how much surrounds
a matrix product; all of that can be read without a GPU. cuobjdump, which runs nvdisasm, is taken from the variables
CUOBJDUMP and NVDISASM, from PATH, or from the triton package, which torch's CUDA builds bring.

Three tables:

- the whole kernel. Shared memory is the static part, with the 1 KiB that sm_90 reserves;
- its hottest loop: of the loops (sass.py says what one is) that have matrix instructions, or FFMA where the kernel has
  none, and hold no other such loop, the one with most. Counts are of code: both sides of a branch, rare ones included;
- the shortest round of that loop that meets as many matrix instructions as a round can: no rare branch, no copy that is
  made under a condition. LDL or STL there are spills that cost; in the loop they may be a rare branch's.

In all, of a subroutine (a division) only the CALL counts, and loops within count once. HMMA:LDSM is matrix instructions
per load of their operands (FFMA:LDS without), others/HMMA the further instructions for each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pycore
from tools import sass

# LD and ST: of no known address space. LDS.32: or less. MUFU: the others. ATOM: every atomic, RED included.
KINDS = (
    *("HMMA", "HGMMA", "LDSM", "LDGSTS", "LDG", "STG", "LD", "ST", "LDS.32", "LDS.64", "LDS.128", "STS", "FFMA"),
    *("MUFU.EX2", "MUFU", "SHFL", "BAR", "LDL", "STL", "CALL", "ATOM"),
)
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")


def figures(count: Counter[str], work: str, load: str) -> dict[str, Any]:
    """Counts by kind and the two ratios."""
    total, loads = count.total(), sum(n for kind, n in count.items() if kind.partition(".")[0] == load)
    return {
        "total": total,
        "counts": {kind: count[kind] for kind in KINDS if count[kind]},
        "work_per_load": round(count[work] / loads, 2) if loads else None,
        "others_per_work": round((total - count[work]) / count[work], 2) if count[work] else None,
    }


def kernel_figures(code: Sequence[sass.Instruction]) -> dict[str, Any]:
    """Figures of the whole kernel, its hottest "loop" and that loop's shortest "round"; None where no loop has work."""
    whole = Counter(instruction.kind for instruction in code)
    work, load = next((pair for pair in (("HGMMA", "LDSM"), ("HMMA", "LDSM")) if whole[pair[0]]), ("FFMA", "LDS"))
    found = {**figures(whole, work, load), "work": work, "loop": None, "round": None}
    blocks, edges = sass.flow(code)
    counts = [Counter(instruction.kind for instruction in block) for block in blocks]
    busy = [(header, body) for header, body in sass.loops(edges) if any(counts[block][work] for block in body)]
    inner = [(header, body) for header, body in busy if not any(other < body for _, other in busy)]
    if inner:
        header, body = max(inner, key=lambda loop: sum(counts[block][work] for block in loop[1]))
        way = sass.shortest_round(header, body, edges, [count[work] for count in counts], [len(b) for b in blocks])
        found["at"] = f"{blocks[header][0].address:#06x}"
        for name, chosen in (("loop", body), ("round", way)):
            found[name] = figures(sum((counts[block] for block in chosen), Counter()), work, load)
    return found


def find_tool(name: str, *folders: str) -> str:
    """Where a disassembler is; `folders` are looked at last.

    Raises:
        FileNotFoundError: it is nowhere, or its variable names no program.
    """
    asked = os.environ.get(name.upper())
    triton = importlib.util.find_spec("triton")
    wheels = [f"{folder}/backends/nvidia/bin" for folder in (triton and triton.submodule_search_locations) or ()]
    places = os.pathsep.join([os.environ.get("PATH", ""), *wheels, *folders])
    found = shutil.which(asked or name, path=places)
    if found is None:
        wrong = f"{name.upper()} is {asked!r}, which is no program" if asked else f"no {name} was found"
        raise FileNotFoundError(f"{wrong}: point {name.upper()} at it, put it on PATH, or run `pip install triton`")
    return found


def find_tools() -> tuple[str, str]:
    """cuobjdump, and the nvdisasm that it will run."""
    cuobjdump = find_tool("cuobjdump")
    return cuobjdump, find_tool("nvdisasm", str(pathlib.Path(cuobjdump).parent))


def cuobjdump(library: pathlib.Path, *options: str) -> Iterator[str]:
    """The lines it prints."""
    tool, nvdisasm = find_tools()
    path = os.pathsep.join([str(pathlib.Path(nvdisasm).parent), os.environ.get("PATH", "")])
    with tempfile.TemporaryFile("w+") as errors:  # a pipe could fill up: it warns of each function that a cubin lacks
        command, environment = [tool, *options, str(library)], {**os.environ, "PATH": path}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            assert process.stdout is not None
            yield from process.stdout
        if process.returncode != 0:
            errors.seek(0)
            raise ValueError(f"{tool} refused {library}: {errors.read().strip()}")


def kernels(library: pathlib.Path, arch: str, only: str = "") -> Iterator[dict[str, Any]]:
    """What there is to say of each kernel, in the library's order.

    Raises:
        FileNotFoundError: no disassembler, or no library.
        ValueError: the library has no code for `arch`, or no kernel so named.
    """
    if not library.exists():
        raise FileNotFoundError(f"there is no {library}; build it first: make build")
    usage = {m[1]: m for m in _USAGE.finditer("".join(cuobjdump(library, "-arch", arch, "-res-usage")))}
    if not usage:
        has = sorted(set(re.findall(r"\.(sm_\w+)\.cubin", "".join(cuobjdump(library, "-lelf")))))
        raise ValueError(f"{library} has no code for {arch}, but for {', '.join(has) or 'no GPU at all'}")
    names = dict(zip(usage, sass.short_names(list(usage)), strict=True))
    chosen = [mangled for mangled, name in names.items() if only in name]
    if not chosen:
        raise ValueError(f"{library} has no kernel whose name contains {only!r}")
    functions = ["-fun", ",".join(chosen)] if only else []
    for source, mangled, code in sass.functions(cuobjdump(library, "-arch", arch, "-sass", *functions)):
        registers, stack, shared = map(int, usage[mangled].groups()[1:])
        yield {
            "name": names[mangled],
            "source": source,
            "registers": registers,
            "stack": stack,
            "shared": shared,
            **kernel_figures(code),
        }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The three tables for a terminal, without the kinds that no kernel has."""
    kinds = [kind for kind in KINDS if kind == "ATOM" or any(kind in kernel["counts"] for kernel in found)]
    lines = []
    for part, title in ((None, "whole kernel"), ("loop", "hottest loop"), ("round", "shortest round of it")):
        sizes = ("at",) if part else ("registers", "stack", "shared")
        rows = [(title, *sizes, *kinds, "total", "HMMA:LDSM", "others/HMMA")]
        for kernel in found:
            of = kernel[part] if part else kernel
            if of:
                ratios = ("" if value is None else value for value in (of["work_per_load"], of["others_per_work"]))
                cells = (of["counts"].get(kind, 0) for kind in kinds)
                rows.append((kernel["name"], *(kernel[size] for size in sizes), *cells, of["total"], *ratios))
        if len(rows) == 1:
            continue
        widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
        for name, *row in rows:
            aligned = (f"{cell:>{width}}" for cell, width in zip(row, widths[1:], strict=True))
            lines.append("  ".join([f"{name:<{widths[0]}}", *aligned]))
        lines.append("")
    return "\n".join(lines[:-1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    built = pathlib.Path(pycore.__file__).with_name("libpycore.so")
    parser.add_argument("library", nargs="?", type=pathlib.Path, default=built)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name contains this")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    try:
        found = list(kernels(options.library, options.arch, options.only))
    except (FileNotFoundError, ValueError) as error:
        print(f"tools.machine_code: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if options.json:
        about = options.library.with_name("build_info.json")  # the build leaves it beside the library
        build = json.loads(about.read_text()) if about.exists() else None
        head = {"version": 1, "arch": options.arch, "commit": build and build["commit"], "build": build}
        lines = ",\n".join(f"  {json.dumps(kernel)}" for kernel in found)
        options.json.write_text(json.dumps(head, indent=1)[:-2] + f',\n "kernels": [\n{lines}\n ]\n}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
