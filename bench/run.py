# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks and prints one table: `python -m bench.run --quick` (what `make bench` does) or `--full`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
from typing import Any

import pytest
import torch

from bench import machine, memory, report
from bench.case import Options, stems

FOLDER = pathlib.Path(__file__).resolve().parent
QUICK_SECONDS = 280.0  # on a machine so slow that a quick run takes longer, memory is measured as far as it gets

# What holds all of the process to one instruction set: pycore, torch's own kernels and compiler, and the libraries
# behind torch.mm. Libraries read it when they are loaded, so the run starts over with it.
ISA_ENVIRONMENT = {
    isa: {
        "PYCORE_CPU_ISA": isa,
        "ATEN_CPU_CAPABILITY": isa,
        "MKL_ENABLE_INSTRUCTIONS": isa.upper(),
        "ONEDNN_MAX_CPU_ISA": {"avx2": "AVX2", "avx512": "AVX512_CORE"}[isa],
    }
    for isa in ("avx2", "avx512")
}


class Collector:
    """pytest plugin: keeps the records, and says on stderr which case is running."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.start = time.monotonic()
        self.stream = os.fdopen(os.dup(2), "w")  # pytest captures what goes to stderr while a test runs

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def say(self, text: str) -> None:
        print(f"[{self.seconds():4.0f} s] {text}", file=self.stream, flush=True)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        case = getattr(item, "callspec", None)
        name = case.params["case"].name if case and "case" in case.params else item.name
        self.say(name)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else str(report.longrepr)
            self.failures.append(reason.strip().splitlines()[0][:300])
        elif report.when == "call":
            self.records += [value for name, value in report.user_properties if name == "record"]

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str]:
        return report.outcome, "", ""  # no dots: the table at the end says what failed


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="seven minutes on two cores (default)")
    size.add_argument("--full", action="store_true", help="all lengths and windows, more rounds")
    parser.add_argument("--only", default="", help="cases whose name contains this text, or of one file (pairwise)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument(
        "--isa", choices=tuple(ISA_ENVIRONMENT), help="hold pycore, torch and its libraries to this one"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the memory measurements out")
    parser.add_argument("--peers-only", action="store_true", help="run where pycore cannot: times the peers alone")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER / "results", help="folder for JSON and plots")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.isa and os.environ.get("PYCORE_CPU_ISA") != chosen.isa:
        command = [sys.executable, "-m", "bench.run", *(sys.argv[1:] if arguments is None else arguments)]
        # torch.compile's cache does not know the instruction set: what it holds for another one computes nonsense.
        cache = pathlib.Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}_{chosen.isa}")
        isa = {**ISA_ENVIRONMENT[chosen.isa], "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        os.execve(sys.executable, command, {**os.environ, **isa})
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda needs a GPU that torch can use; there is none here", file=sys.stderr)
        return 2
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if not chosen.peers_only:
        try:
            import pycore.ops  # noqa: F401
        except ImportError as error:
            print(f"bench: pycore cannot be imported ({error}); build it first: pip install -e .", file=sys.stderr)
            return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was measured by then is reported
    options = Options(quick=not chosen.full, device=chosen.device)
    about = machine.describe(chosen.device)
    collector = Collector()
    collector.say("the machine's limits")
    limits = machine.limits(chosen.device)
    command = ["-c", str(FOLDER / "pytest.ini"), str(FOLDER), "-qq", "--benchmark-quiet", "--no-header", "--no-summary"]
    command += ["-p", "no:warnings", "--tb=short", "--device", chosen.device]
    command += ["--full"] if chosen.full else []
    command += ["--peers-only"] if chosen.peers_only else []
    command += ["--only", chosen.only] if chosen.only else []
    status = pytest.main(command, plugins=[collector])
    if status == pytest.ExitCode.INTERRUPTED and collector.records:
        collector.failures.append("stopped before the end")
    elif status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not collector.failures:
        return int(status)
    elif not chosen.no_memory:
        try:
            _add_memory(collector, options, chosen)
        except KeyboardInterrupt:
            collector.failures.append("stopped while peak memory was measured")

    run = {
        "version": 1,
        "quick": options.quick,
        "machine": about,
        "limits": {name: round(value, 2) for name, value in limits.items()},
        "gemm_flops": machine.GEMM_FLOPS,
        "read_bytes": machine.read_bytes(),
        "cases": collector.records,
        "failures": collector.failures,
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    stem = f"{about['date'][:10]}-{machine.label(about)}" + ("-quick" if options.quick else "")
    stem += "-part" if chosen.only else ""
    path = chosen.out / f"{stem}.json"
    path.write_text(to_json(run))
    drawn = report.plots(run, chosen.out, stem)
    print(f"\n{report.text_table(run)}\n\n{path}")
    for plot in drawn:
        print(plot)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (pip install 'pycore-kernels[bench]')")
    return 1 if collector.failures else 0


def to_json(run: dict[str, Any]) -> str:
    """Indented JSON whose lists of numbers stay on one line, so that a committed file reads and diffs well."""
    lists: list[str] = []

    def fold(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fold(item) for key, item in value.items()}
        if isinstance(value, list) and all(isinstance(item, (int, float, str)) for item in value):
            lists.append(json.dumps(value, ensure_ascii=False))
            return f"@list {len(lists) - 1}@"
        if isinstance(value, list):
            return [fold(item) for item in value]
        return value

    text = json.dumps(fold(run), indent=1, ensure_ascii=False)
    for index, line in enumerate(lists):
        text = text.replace(f'"@list {index}@"', line)
    return text + "\n"


def _add_memory(collector: Collector, options: Options, chosen: argparse.Namespace) -> None:
    records = {(record["stem"], record["name"]): record for record in collector.records}
    for stem in stems():
        if not any(of == stem for of, _ in records):
            continue
        collector.say(f"peak memory, {stem}")
        timeout = max(20.0, QUICK_SECONDS - collector.seconds()) if options.quick else 1800.0
        for measured in memory.measure_stem(stem, options, timeout, chosen.only, chosen.threads):
            record = records.get((stem, measured["case"]))
            if record and measured["contender"] in record["results"]:
                record["results"][measured["contender"]]["peak_bytes"] = measured["bytes"]


if __name__ == "__main__":
    sys.exit(main())
