# SPDX-License-Identifier: Apache-2.0
"""Timing of one case: contenders take turns, so that noise on the machine hits all of them alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench import machine
from bench.case import Case, Outputs
from bench.clock import cuda_seconds, host_seconds

# Worker threads of the previous contender's pool may spin for a few milliseconds after its last parallel region.
SETTLE_SECONDS = 0.01


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds of timed work per contender, and the number of rounds that must and may fit."""

    seconds: float
    least: int
    most: int


QUICK = Effort(seconds=2.5, least=3, most=11)
LATE = Effort(seconds=0.5, least=2, most=11)  # what a quick run turns to when a slow or busy machine has used its time
LATE_SECONDS = 150.0
SLOW_SECONDS = 15.0  # what takes longer runs three times in all
FULL = Effort(seconds=12.0, least=5, most=31)


class Timer:
    """Runs one contender once and keeps its seconds; `before` calls run first, outside the clock."""

    def __init__(self, call: Callable[[], Any], device: str) -> None:
        self.call = call
        self.device = device
        self.before = 0
        self.seconds: list[float] = []

    def __call__(self) -> Any:
        if self.device == "cuda":
            seconds, result = cuda_seconds(self.call)
        else:
            time.sleep(SETTLE_SECONDS)
            for _ in range(self.before):
                self.call()
            seconds, result = host_seconds(self.call)
        self.seconds.append(seconds)
        return result


def rounds_for(seconds: float, effort: Effort) -> int:
    """Rounds that fit the effort for a contender that takes `seconds`; two of one that takes very long."""
    if seconds > SLOW_SECONDS:
        return 2
    return max(effort.least, min(effort.most, int(effort.seconds / max(seconds, 1e-9))))


def turn(round_index: int, rounds: int, total: int) -> bool:
    """Whether a contender with `rounds` rounds takes part in this one of `total`, spread evenly."""
    return (round_index + 1) * rounds // total > round_index * rounds // total


def run_case(case: Case, benchmark: Any, effort: Effort, peers_only: bool = False) -> dict[str, Any]:
    """Checks and times every contender of a case and returns its record.

    The subject is timed by pytest-benchmark's pedantic mode; each of its rounds is preceded, outside the clock, by the
    turns of its peers, in another order each time, and one matrix product or one read of memory, the machine's limit at
    that moment.

    Raises:
        AssertionError: the subject's output is off by more than the tolerance, or nothing could run. (A peer that is
            off or cannot run is left out and named.)
    """
    inputs = case.inputs()
    check = case.check(inputs)
    subject = next(iter(case.contenders))
    timers: dict[str, Timer] = {}
    errors: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name, prepare in case.contenders.items():
        try:
            timer = Timer(prepare(inputs), case.device)
            outputs: Outputs = timer()
        except Exception as error:
            if name == subject and not peers_only:
                raise
            # A peer that this machine lacks (no compiler, no memory) is named in the results; it does not stop the run.
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            skipped[name] = f"{type(error).__name__}: {reason}"[:200]
            continue
        errors[name] = check(outputs)
        del outputs
        allowed = case.tolerances.get(name, case.tolerance)
        if not errors[name] <= allowed:  # a wrong result has no time
            off = f"off by {errors[name]:.1e} {case.error or 'of the largest output'}, allowed {allowed:.0e}"
            assert name != subject, f"{case.name}: {name} is {off}"
            skipped[name] = off
            continue
        timer.before = case.before
        timers[name] = timer
    assert timers, f"{case.name}: no contender could run: {skipped}"
    if subject not in timers:
        subject = next(iter(timers))
    bounds: dict[str, Callable[[], Any]] = {}  # the machine's limits, which take turns like contenders
    if case.device == "cpu" and case.flops:
        bounds["gemm"] = machine.sgemm()
    elif case.device == "cpu" and case.bytes:
        bounds["read"] = machine.memory_read()
    for name, call in bounds.items():
        timers[name] = Timer(call, "cpu")
        timers[name]()
    for timer in timers.values():
        if timer.seconds[-1] <= SLOW_SECONDS:
            timer()  # the first call may have compiled or grown pools; the second one says how many rounds fit
    rounds = {name: rounds_for(timer.seconds[-1], effort) for name, timer in timers.items()}
    total = max(count for name, count in rounds.items() if name not in bounds)
    rounds = {name: min(count, total) for name, count in rounds.items()} | {subject: total}
    for timer in timers.values():
        timer.seconds.clear()
    state = {"round": 0}
    peers, order = [name for name in timers if name != subject], random.Random(0)

    def peers_turn() -> None:
        order.shuffle(peers)  # else one and the same of them leaves the subject its threads and caches every time
        for name in peers:
            if turn(state["round"], rounds[name], total):
                timers[name]()
        state["round"] += 1

    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(timers[subject], setup=peers_turn, rounds=total)
    finally:
        gc.enable()
    bound_ms = {name: [round(s * 1e3, 4) for s in timers.pop(name).seconds] for name in bounds}
    return {
        "name": case.name,
        "group": case.group,
        "device": case.device,
        "axis": list(case.axis) if case.axis else None,
        "flops": case.flops,
        "bytes": case.bytes,
        "limit": case.limit,
        "tolerance": case.tolerance,
        "error_is": case.error,
        "subject": subject,
        "gemm_ms": bound_ms.get("gemm"),
        "read_ms": bound_ms.get("read"),
        "results": {
            name: {"error": errors[name], "ms": [round(s * 1e3, 4) for s in timer.seconds]}
            for name, timer in timers.items()
        },
        "skipped": skipped,
    }
