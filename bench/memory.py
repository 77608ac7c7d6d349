# SPDX-License-Identifier: Apache-2.0
"""Peak memory of each contender beyond its inputs and outputs: `python -m bench.memory bench_<stem> [--full]`.

On a CPU it is what the kernel accounts to the process: resident memory that the prepared contender keeps (a mask), plus
the peak during one call over the level before it, less the outputs. That covers every allocator, not only torch's. The
call before the measured one compiles and loads code. The process must run with ENVIRONMENT, which makes malloc return
every block over 64 KiB to the system at once, so that memory freed earlier hides nothing. Resolution: about 1 MiB.
On CUDA it is the peak of torch's allocator.

One JSON line per measurement: {"case": …, "contender": …, "bytes": …}.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import torch

from bench.case import Case, Options, Prepare, load

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def measure_stem(
    stem: str, options: Options, timeout: float, only: str = "", threads: int | None = None
) -> list[dict[str, Any]]:
    """Runs this module in a process of its own; after `timeout` seconds, what it had measured by then."""
    command = [sys.executable, "-m", "bench.memory", stem, "--device", options.device]
    command += [] if options.quick else ["--full"]
    command += ["--only", only] if only else []
    command += ["--threads", str(threads)] if threads else []
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(pathlib.Path(__file__).resolve().parent.parent)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    lines = output.decode().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def peak_bytes(prepare: Prepare, inputs: Any, device: str) -> int:
    """Peak beyond inputs and outputs of one call of one contender."""
    level, reset, peak = _CUDA if device == "cuda" else _CPU
    prepare(inputs)  # imports what preparing needs
    gc.collect()
    before = level()
    call = prepare(inputs)
    gc.collect()
    held = level() - before
    call()
    gc.collect()
    before = level()
    reset()
    outputs = call()
    highest = peak()
    returned = sum(output.numel() * output.element_size() for output in outputs)
    return max(0, held) + max(0, highest - before - returned)


def _status(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _reset_cuda_peak() -> None:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()


_CPU = (
    lambda: _status("VmRSS"),
    lambda: pathlib.Path("/proc/self/clear_refs").write_text("5"),  # sets VmHWM back to VmRSS
    lambda: _status("VmHWM"),
)
_CUDA = (lambda: torch.cuda.memory_allocated(), _reset_cuda_peak, lambda: torch.cuda.max_memory_allocated())


def _measure(cases: Iterable[Case]) -> None:
    for case in cases:
        inputs = case.inputs() if case.memory else None
        for name in case.memory:
            try:
                result = {"bytes": peak_bytes(case.contenders[name], inputs, case.device)}
            except Exception as error:  # reported; the run goes on with the other contenders
                result = {"bytes": None, "reason": f"{type(error).__name__}: {error}"[:200]}
            print(json.dumps({"case": case.name, "contender": name, **result}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stem")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    options = Options(quick=not arguments.full, device=arguments.device)
    _measure(load(arguments.stem, options, arguments.only))


if __name__ == "__main__":
    main()
