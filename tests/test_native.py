# SPDX-License-Identifier: Apache-2.0
"""pycore.native: every kernel is in it, its stub is true, and its arrays, threads and instruction sets behave."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pycore
from pycore import _load, native

# Every public kernel entry point. A new op adds its kernels here.
KERNELS = [
    "ac_decode",
    "ac_decode_bytes",
    "ac_decode_logits",
    "ac_encode",
    "ac_encode_bytes",
    "ac_encode_logits",
    "attention",
    "attention_append",
    "attention_backward",
    "attention_blocks",
    "gelu_mul",
    "gelu_mul_backward",
    "lambda_cache_append",
    "layer_norm",
    "layer_norm_backward",
    "hamming_topk",
    "invariant_linear",
    "invariant_linear_backward",
    "invariant_linears",
    "ngram_draft",
    "ngram_lookup",
    "ngram_update",
    "pack_equal_info",
    "pairwise_distances_at",
    "pairwise_logsumexp",
    "pairwise_logsumexp_both",
    "pairwise_logsumexp_both_backward",
    "pairwise_logsumexp_gradients",
    "pairwise_pairs_backward",
    "pairwise_topk",
    "quantize_cdf",
    "rms_norm",
    "rms_norm_backward",
    "rotary_tables",
    "rotate",
    "softcap",
    "softcap_backward",
    "staircase_attention",
    "staircase_cache_append",
    "staircase_cache_read",
    "staircase_dequantize",
    "staircase_quantize",
    "rvq_decode",
    "rvq_encode",
    "silu_mul",
    "silu_mul_backward",
    "torchac_decode",
    "torchac_encode",
    "vq_encode",
    "vq_rotate",
    "vq_statistics",
    "window_counts",
    "window_decode",
    "window_encode",
]


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_there(name: str) -> None:
    function = getattr(native, name)
    assert callable(function)
    assert function.__doc__


def test_every_torch_op_has_its_kernel() -> None:
    _load.load_ops()
    ops = {s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith("pycore::")}
    assert ops <= set(KERNELS), "a torch op computes nothing itself: its kernel belongs in pycore.native too"


def test_stub_names_what_the_module_has() -> None:
    tree = ast.parse((Path(pycore.__file__).parent / "native.pyi").read_text())
    named = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert named == {name for name in dir(native) if not name.startswith("_")}


@pytest.mark.parametrize("name", ["philox", "dtype"])
def test_headers_by_themselves(name: str, run_native: Callable[..., None]) -> None:
    """tests/native: Philox's known answers, and every float16 and bfloat16 by its definition."""
    run_native(name)


def test_instruction_sets() -> None:
    available = native.available_isas()
    assert available == ["scalar", "avx2", "avx512"][: len(available)]
    before = native.cpu_isa()
    for name in available:
        native.set_cpu_isa(name)
        assert native.cpu_isa() == pycore.cpu_isa() == name
    native.set_cpu_isa(before)


def test_instruction_set_errors() -> None:
    with pytest.raises(ValueError, match=r"^set_cpu_isa: name is 'sse9' and must be scalar, avx2 or avx512$"):
        native.set_cpu_isa("sse9")
    if "avx512" not in native.available_isas():
        with pytest.raises(ValueError, match=r"^set_cpu_isa: name is 'avx512', but this machine has \w+ at most$"):
            native.set_cpu_isa("avx512")


@pytest.mark.parametrize("value, expected", [("scalar", "scalar"), ("", None), ("avx9", "must be scalar, avx2 or")])
def test_environment_lowers_the_instruction_set(
    value: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first use, in both faces: an instruction set that cannot be had is an error, never a quiet fallback."""
    monkeypatch.setenv("PYCORE_CPU_ISA", value)
    best = native.available_isas()[-1]
    for use in ("print(pycore.cpu_isa())", "pycore._load.load_ops(); print(pycore.cpu_isa())"):
        done = subprocess.run([sys.executable, "-c", f"import pycore; {use}"], capture_output=True, text=True)
        if value == "avx9":
            assert done.returncode == 1
            assert done.stderr.splitlines()[-1] == f"ValueError: PYCORE_CPU_ISA is 'avx9' and {expected} avx512"
        else:
            assert done.stdout.strip() == (expected or best), done.stderr
