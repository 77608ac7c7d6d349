# SPDX-License-Identifier: Apache-2.0
"""The staircase benchmark: its contenders compute what they are compared for, and its bytes are those of the format."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import bench_staircase, staircase_peers
from bench.bench_staircase import HEAD_DIM, KV_HEADS, append_case, binds_case, decode_case, packed_bytes, peers_case
from bench.memory import ENVIRONMENT


@pytest.mark.parametrize(
    "case",
    [
        decode_case((16, 8, 4, 2), 600),
        binds_case((16, 8, 4), 600, KV_HEADS),
        peers_case(600, 8, 2),
        peers_case(600, 4, 2),
        append_case(576),
    ],
    ids=lambda case: case.name,
)
def test_contenders_are_within_the_tolerance_twice(case: Any) -> None:
    for name, prepare in case.contenders.items():
        inputs = case.inputs()
        error, call = case.check(inputs), prepare(inputs)
        assert error(call()) <= case.tolerance, name
        assert error(call()) <= case.tolerance, name


def test_what_is_not_installed_is_named_and_left_out() -> None:
    absent = staircase_peers.missing()
    for bits in (8, 4):
        present = staircase_peers.available(bits)
        assert (f"onnxruntime int{bits}" in present) == (not {"onnxruntime", "onnx"} & {*absent})
        assert ("OpenVINO u8" in present) == (bits == 8 and "openvino" not in absent)
        assert {*present} <= {*peers_case(600, bits, 2).contenders}


def test_bytes() -> None:
    """600 tokens are four steps of 128 and 88 tokens; sinks are in the oldest."""
    token = 2 * KV_HEADS * HEAD_DIM / 8  # bytes a bit
    scales = 8 * 5 / 64
    expected = 88 * 16 + 128 * (8 + scales) + (2 * 128 + 124) * (4 + scales) + 4 * 16
    assert packed_bytes((16, 8, 4), 600) == pytest.approx(token * expected)
    assert packed_bytes((16,), 600) == pytest.approx(token * 600 * 16)


# In a process whose allocator gives freed memory back, as bench.memory needs it. What unpacks shows that it is seen.
PEAKS = """
from bench.bench_staircase import _filled
from bench.memory import peak_bytes
cache, query = _filled((16, 8, 4), 32768)
inputs = cache, query
decoded = peak_bytes(lambda x: lambda: (x[0].attend(x[1]),), inputs, "cpu")
unpacked = peak_bytes(lambda x: lambda: (x[0].keys() + 1,), inputs, "cpu")
print(cache.nbytes, decoded, unpacked)
"""


def test_decoding_needs_the_packed_bytes_and_little_more() -> None:
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(bench_staircase.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, env=environment, check=True)
    packed, decoded, unpacked = map(int, done.stdout.split())
    assert decoded <= 0.05 * packed
    assert unpacked > 0.5 * packed


def test_bytes_are_nearly_what_the_cache_keeps() -> None:
    """Which has room for tokens to be taken back, too."""
    cache, _ = bench_staircase._filled((16, 4), 8192)
    read = packed_bytes((16, 4), 8192)
    assert read < cache.nbytes < 1.15 * read
