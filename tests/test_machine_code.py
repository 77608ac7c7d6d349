# SPDX-License-Identifier: Apache-2.0
"""The reader of disassemblies on an invented one, and what the built CUDA kernels must be made of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import pycore
from tools import machine_code, sass

NAME = "_ZN5outer12_GLOBAL__N_110mma_kernelINS0_8BFloat16ELi128ELb0ELNS_4KindEn2EEEvNS_6ParamsE"

# A loop from 0x30 to 0x100, with one inside it that has no HMMA, and a branch to code behind the end, which returns.
# What BRA.DIV leads to returns as well, but is not the loop's: neither the shuffle's twin there nor the STL.
SASS = f"""
Fatbin elf code:
identifier = csrc/cuda/invented.cu

	code for sm_90a
		Function : {NAME}
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;    /* 0x0000000000007947 */
                                                                          /* 0x000fe20003800000 */
        /*0010*/                   STL.64 [R1], R4 ;                      /* 0x0000000000007947 */
        /*0020*/              @!P1 EXIT ;                                 /* 0x0000000000007947 */
        /*0030*/                   LDSM.16.M88.4 R8, [R2+0x10] ;          /* 0x0000000000007947 */
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R4, R4 ;   /* 0x0000000000007947 */
        /*0050*/              @!P2 BRA 0x140 ;                            /* 0x0000000000007947 */
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R4, R4 ;   /* 0x0000000000007947 */
        /*0070*/                   LDS.128 R4, [R2] ;                     /* 0x0000000000007947 */
        /*0080*/               @P3 BRA 0x70 ;                             /* 0x0000000000007947 */
        /*0090*/                   BRA.DIV UR4, 0x180 ;                   /* 0x0000000000007947 */
        /*00a0*/                   SHFL.BFLY PT, R5, R4, 0x1, 0x1f ;      /* 0x0000000000007947 */
        /*00b0*/                   MUFU.EX2 R4, R5 ;                      /* 0x0000000000007947 */
        /*00c0*/                   MUFU.RCP R4, R5 ;                      /* 0x0000000000007947 */
        /*00d0*/                   LDS.U8 R4, [R2] ;                      /* 0x0000000000007947 */
        /*00e0*/                   REDUX.SUM UR4, R4 ;                    /* 0x0000000000007947 */
        /*00f0*/                   BAR.RED.OR.DEFER_BLOCKING 0x0, P0 ;    /* 0x0000000000007947 */
        /*0100*/               @P0 BRA 0x30 ;                             /* 0x0000000000007947 */
        /*0110*/                   RED.E.ADD.STRONG.GPU [R4.64], R5 ;     /* 0x0000000000007947 */
        /*0120*/                   ATOMS.ADD R4, [R2], R5 ;               /* 0x0000000000007947 */
        /*0130*/                   EXIT ;                                 /* 0x0000000000007947 */
        /*0140*/                   LDL R5, [R1] ;                         /* 0x0000000000007947 */
        /*0150*/                   CALL.REL.NOINC 0x1b0 ;                 /* 0x0000000000007947 */
        /*0160*/                   STL [R1], R5 ;                         /* 0x0000000000007947 */
        /*0170*/                   BRA 0x60 ;                             /* 0x0000000000007947 */
        /*0180*/                   STL [R1], R4 ;                         /* 0x0000000000007947 */
        /*0190*/                   SHFL.BFLY PT, R5, R4, 0x1, 0x1f ;      /* 0x0000000000007947 */
        /*01a0*/                   BRA 0xb0 ;                             /* 0x0000000000007947 */
        /*01b0*/                   FFMA R4, R4, R4, R4 ;                  /* 0x0000000000007947 */
        /*01c0*/                   RET.REL.NODEC R20 0x0 ;                /* 0x0000000000007947 */
        /*01d0*/                   BRA 0x1d0;                             /* 0x0000000000007947 */
        /*01e0*/                   NOP;                                   /* 0x0000000000007947 */
"""


def invented() -> dict[str, Any]:
    [(source, name, code)] = sass.functions(SASS.splitlines())
    assert (source, name) == ("csrc/cuda/invented.cu", NAME) and code[-1].address == 0x1D0
    return machine_code.kernel_figures(code)


def test_a_kernel_is_counted_by_kind() -> None:
    found = invented()
    assert found["counts"] == {
        **{"HMMA": 2, "LDSM": 1, "LDGSTS": 1, "LDS.32": 1, "LDS.128": 1, "FFMA": 1, "MUFU.EX2": 1, "MUFU": 1},
        **{"SHFL": 2, "BAR": 1, "LDL": 1, "STL": 3, "CALL": 1, "ATOM": 2},
    }
    assert found["total"] == 30 and found["work_per_load"] == 2.0


def test_the_hottest_loop_is_a_cycle_of_the_flow_graph() -> None:
    found = invented()
    inside = {"HMMA": 2, "LDSM": 1, "LDS.32": 1, "LDS.128": 1, "MUFU.EX2": 1, "MUFU": 1, "SHFL": 1, "BAR": 1}
    assert found["at"] == "0x0030"
    assert found["loop"]["counts"] == {**inside, "LDL": 1, "STL": 1, "CALL": 1}
    assert found["loop"]["total"] == 18 and found["loop"]["others_per_work"] == 8.0
    assert found["round"]["counts"] == inside, "the shortest round leaves out the branch that loads and stores"
    assert found["round"]["total"] == 14


def test_no_hottest_loop_without_work() -> None:
    [(_, _, code)] = sass.functions(SASS.replace("HMMA", "HADD2").splitlines())
    found = machine_code.kernel_figures(code)
    assert found["work"] == "FFMA" and found["loop"] is None and found["round"] is None


def test_the_innermost_loop_with_most_work_is_taken() -> None:
    """0 … 5 in two loops, 1 … 4, in one of which the other, 2 … 3, is; entered at 1, left from 4."""
    edges = [{1}, {2}, {3}, {2, 4}, {1, 5}, set()]
    assert sorted(sass.loops(edges)) == [(1, {1, 2, 3, 4}), (2, {2, 3})]


def test_a_jump_table_leads_to_the_next_block_and_those_nothing_else_leads_to() -> None:
    lines = ("BRA.DIV UR4, 0x50", "BRX R4 -0x20", "MOV R1, R2", "BRA 0x0", "BRA 0x0", "MOV R1, R3", "BRA 0x20")
    code = [sass.Instruction(16 * i, "", *line.split(" ", 1)) for i, line in enumerate(lines)]
    blocks, edges = sass.flow(code)
    assert [block[0].address for block in blocks] == [0x00, 0x10, 0x20, 0x40, 0x50]
    assert edges == [{1}, {2, 3}, {0}, {0}, {2}]


def test_tables_name_each_kernel_three_times_and_always_show_atomics() -> None:
    kernel = {"name": "a_kernel", "registers": 8, "stack": 0, "shared": 0, **invented()}
    text = machine_code.table([kernel])
    assert text.count("a_kernel") == 3 and text.count("ATOM") == 3 and "STG" not in text


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        (NAME, "mma<bfloat16, 128, false, -2>"),
        ("_Z12plain_kernelIfmEvT_T0_", "plain<float, unsigned long>"),
        ("_ZN6pycore12_GLOBAL__N_117sum_chunks_kernelEPKdllPf", "sum_chunks"),
        ("no_cpp_kernel", "no_cpp"),
    ],
)
def test_short_names(mangled: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sass.short_names([mangled]) == [name]
    monkeypatch.setenv("PATH", "")  # no c++filt
    assert sass.short_names([mangled]) == [name]


def test_without_a_disassembler_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUOBJDUMP", "/nowhere/cuobjdump")
    assert machine_code.main([__file__]) == 2
    assert "CUOBJDUMP is '/nowhere/cuobjdump', which is no program" in capsys.readouterr().err


# ---- the built library -----------------------------------------------------------------------------------------------


def expected(kernel: str) -> tuple[set[str], set[str]]:
    """The kinds that the kernel of this name must have, and those that it must not."""
    half = "float16" in kernel  # bfloat16, too
    in_tiles = kernel.startswith(("forward<", "grad_query<", "grad_key<", "grad_bias<"))
    if half and in_tiles:
        return {"HMMA", "LDSM", "LDGSTS"}, {"ATOM"}
    if "<float" in kernel and not half:
        # No matrix instruction at all: for float32 it would be TF32.
        return {"FFMA", "LDGSTS"} if in_tiles else set(), {"ATOM", "HMMA", "HGMMA"}
    return set(), {"ATOM"}


def built() -> Iterable[dict[str, Any]]:
    info = pycore.build_info()
    if info["cuda"] is None:
        pytest.skip("pycore was built without CUDA")
    if info["debug"]:
        pytest.skip("a debug build is never shipped, and its kernels are not optimized")
    try:
        machine_code.find_tools()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    newest = max(info["cuda_arches"], key=lambda arch: float(arch.rstrip("afPTX+")))
    arch = "sm_" + newest.replace(".", "").removesuffix("+PTX")
    return machine_code.kernels(Path(pycore.__file__).with_name("libpycore.so"), arch)


@pytest.mark.slow
def test_built_kernels_are_made_of_what_they_should_be() -> None:
    """Instructions that the speed rests on are there, and no atomics, with which a sum would have no order."""
    wrong, halves = [], 0
    for kernel in built():
        needed, forbidden = expected(kernel["name"])
        has = set(kernel["counts"])
        halves += "HMMA" in needed
        wrong += [f"{kernel['name']} has no {kind}" for kind in sorted(needed - has)]
        wrong += [f"{kernel['name']} has {kind}" for kind in sorted(forbidden & has)]
    assert not wrong
    assert halves, "no kernel is named as `expected` thinks a tile kernel for half precision is"


def docs_row(kernel: dict[str, Any]) -> str:
    """A kernel as docs/ops/attention_cuda.md has it: the whole kernel's registers, and its shortest round."""
    round_, work = kernel["round"], kernel["work"]
    loads = sum(n for kind, n in round_["counts"].items() if kind.startswith("LDSM" if work == "HMMA" else "LDS"))
    local = round_["counts"].get("LDL", 0) + round_["counts"].get("STL", 0)
    cells = (kernel["registers"], f"{round_['counts'][work]} {work}", loads, round_["total"], local)
    return f"| `{kernel['name']}` | {' | '.join(map(str, cells))} |"


def test_the_docs_table_is_its_files() -> None:
    """No figure of the page is anything but the file's."""
    root = Path(__file__).resolve().parents[1]
    page = (root / "docs/ops/attention_cuda.md").read_text()
    rows = re.findall(
        r"^\| `[a-z_]+<.*$", page.partition("<!-- machine code -->")[2].partition("<!-- end -->")[0], re.M
    )
    name = re.search(r"bench/results/\S+-machine-code\.json", page)
    assert name and rows
    found = json.loads((root / name[0]).read_text())
    assert set(rows) <= {docs_row(kernel) for kernel in found["kernels"] if kernel["round"]}
