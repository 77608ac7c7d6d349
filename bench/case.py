# SPDX-License-Identifier: Apache-2.0
"""What one benchmark is: a workload, the contenders that do it, and how their results are checked."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Outputs = Sequence[torch.Tensor]
# Takes the inputs, does what a user would do once (masks, compilation), returns what is timed.
Prepare = Callable[[Any], Callable[[], Outputs]]


def layers_of(total_bytes: int, layer_bytes: int) -> int:
    """How many layers take about so many bytes together; two at least."""
    return max(2, round(total_bytes / layer_bytes))


def through_layers(layers: int, one: Prepare) -> Prepare:
    """As a model's layers, one after another, each prepared anew.

    A single call would be timed with its threads asleep, and one layer again and again with its numbers in the
    processor's caches. On a GPU the clock sees to both, and one layer will do.
    """

    def prepare(inputs: Any) -> Callable[[], Outputs]:
        steps = [one(inputs) for _ in range(layers)]
        return lambda: [out for step in steps for out in step()]

    return prepare


@dataclass(frozen=True)
class Options:
    """What cases(options) may depend on."""

    quick: bool = True
    device: str = "cpu"


@dataclass(frozen=True)
class Case:
    """One workload. The first contender is the subject; the others are its peers.

    Attributes:
        name: unique in its file; shown in the table.
        group: cases of one group make one block of the table, and one plot when they carry an axis.
        inputs: makes the inputs, the same every time; called once per process, outside every measurement.
        contenders: name -> Prepare.
        check: takes the inputs, computes the reference once, and returns a function from a contender's outputs to its
            error (largest absolute error over the reference's largest absolute value).
        tolerance: largest error at which a contender's time counts.
        flops: useful floating-point operations, by the convention in bench/README.md; 0 if the notion does not apply.
        axis: ("length", 8192.0) for a point of a sweep.
        bytes: bytes that have to move at least, where they and not the arithmetic are the limit; then flops is 0.
        limit: the one of the machine's limits (bench/machine.py) that flops are held against; see gemm_limit. Bytes
            are held against reading memory, on a GPU against copying it.
        tolerances: of contenders that are held to another than `tolerance`.
        error: what an error is, where the pages show it: "nats from SDPA's prediction"; empty where they do not.
        memory: contenders whose peak memory is measured (in a process of its own).
        device: "cpu" or "cuda".
        before: calls before each timed one, where calls follow one another, as steps of decoding do: another
            contender's turn and the pause behind it leave threads asleep. On a CPU.
    """

    name: str
    group: str
    inputs: Callable[[], Any]
    contenders: Mapping[str, Prepare]
    check: Callable[[Any], Callable[[Outputs], float]]
    tolerance: float
    flops: float = 0.0
    axis: tuple[str, float] | None = None
    bytes: float = 0.0
    limit: str = "gemm_gflops"
    tolerances: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    memory: Sequence[str] = ()
    device: str = "cpu"
    before: int = 0


def gemm_limit(dtype: torch.dtype, device: str) -> str:
    """The matrix product whose speed bounds work in `dtype`: on a CPU, half precision is computed in float32."""
    return "gemm_gflops" if device == "cpu" or dtype == torch.float32 else "gemm_bf16_gflops"


def stems() -> list[str]:
    """Names of all benchmark modules: bench_<stem>.py in this folder."""
    return sorted(path.stem for path in pathlib.Path(__file__).parent.glob("bench_*.py"))


def load(stem: str, options: Options, only: str = "") -> list[Case]:
    """The cases of a benchmark module: all if it is bench_<only>, none if another is, else those named so in part."""
    if f"bench_{only}" in stems():
        if stem != f"bench_{only}":
            return []
        only = ""
    return [case for case in importlib.import_module(f"bench.{stem}").cases(options) if only in case.name]


def largest_error(outputs: Outputs, reference: Outputs) -> float:
    """Largest |output - reference| / max|reference| over pairs of tensors; inf for NaN or a wrong shape."""
    worst = 0.0
    for output, expected in zip(outputs, reference, strict=True):
        if output.shape != expected.shape:
            return float("inf")
        error = (output.double() - expected).abs().max() / expected.abs().max()
        worst = max(worst, error.item() if torch.isfinite(error) else float("inf"))
    return worst
