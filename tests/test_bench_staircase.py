# SPDX-License-Identifier: Apache-2.0
"""The staircase benchmark: its contenders compute what they are compared for, and its bytes are those of the format."""

from __future__ import annotations

from typing import Any

import pytest

from bench import bench_staircase, staircase_peers
from bench.bench_staircase import HEAD_DIM, KV_HEADS, append_case, binds_case, decode_case, packed_bytes, peers_case


@pytest.mark.parametrize(
    "case",
    [decode_case((16, 8, 4, 2), 600), binds_case((16, 8, 4), 600, KV_HEADS), peers_case(600), append_case(576)],
    ids=lambda case: case.group,
)
def test_contenders_are_within_the_tolerance_twice(case: Any) -> None:
    for name, prepare in case.contenders.items():
        inputs = case.inputs()
        error, call = case.check(inputs), prepare(inputs)
        assert error(call()) <= case.tolerance, name
        assert error(call()) <= case.tolerance, name


def test_what_is_not_installed_is_named_and_left_out() -> None:
    absent, present = staircase_peers.missing(), staircase_peers.available()
    assert ("onnxruntime int8" in present) == (not {"onnxruntime", "onnx"} & {*absent})
    assert ("OpenVINO u8" in present) == ("openvino" not in absent)
    assert {*present} <= {*peers_case(600).contenders}


def test_bytes() -> None:
    """600 tokens are four steps of 128 and 88 tokens; sinks are in the oldest."""
    token = 2 * KV_HEADS * HEAD_DIM / 8  # bytes a bit
    scales = 8 * 5 / 64
    expected = 88 * 16 + 128 * (8 + scales) + (2 * 128 + 124) * (4 + scales) + 4 * 16
    assert packed_bytes((16, 8, 4), 600) == pytest.approx(token * expected)
    assert packed_bytes((16,), 600) == pytest.approx(token * 600 * 16)


def test_bytes_are_nearly_what_the_cache_keeps() -> None:
    """Which has room for tokens to be taken back, too."""
    cache, _ = bench_staircase._filled((16, 4), 8192)
    read = packed_bytes((16, 4), 8192)
    assert read < cache.nbytes < 1.15 * read
