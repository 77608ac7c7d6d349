# SPDX-License-Identifier: Apache-2.0
"""The clocks: seconds of one call on the host, and on a CUDA device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

L2_BYTES = 128 * 2**20  # more than any GPU's last-level cache
HEAD_START = 2_000_000  # clock cycles, about a millisecond: the launches of one call are queued in less


def host_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock time of one call, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def cuda_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Device time of one call by events, from a cold L2 cache, and what it returned.

    The device is kept busy while the host queues the call. Else a kernel of some microseconds would be timed together
    with the Python before its launch.
    """
    torch.cuda._sleep(HEAD_START)
    torch.empty(L2_BYTES, dtype=torch.int8, device="cuda").zero_()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    result = work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3, result


def median_seconds(
    work: Callable[[], Any], rounds: int, clock: Callable[[Callable[[], Any]], tuple[float, Any]] = host_seconds
) -> float:
    """The median of `rounds` calls, after one that is not counted."""
    work()
    return statistics.median(clock(work)[0] for _ in range(rounds))
