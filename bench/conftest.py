# SPDX-License-Identifier: Apache-2.0
"""pytest side of the suite: options, one test per case, and the records that bench.run turns into a report."""

from __future__ import annotations

import time
from typing import Any

import pytest

from bench import measure
from bench.case import Case, Options, load

_START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pycore benchmarks")
    group.addoption("--full", action="store_true", help="all lengths and more rounds (default: quick)")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device of the cases to run")
    group.addoption("--only", default="", help="cases whose name contains this text")
    group.addoption("--peers-only", action="store_true", help="time the peers where the subject cannot run")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        config = metafunc.config
        options = Options(quick=not config.getoption("--full"), device=config.getoption("--device"))
        cases = load(metafunc.module.__name__.split(".")[-1], options, config.getoption("--only"))
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture
def measure_case(benchmark: Any, request: pytest.FixtureRequest) -> Any:
    """Call it with the case: checks, times, and hands the record to bench.run."""

    def run(case: Case) -> None:
        config = request.config
        benchmark.group = case.group
        late = time.monotonic() - _START > measure.LATE_SECONDS
        quick = measure.LATE if late else measure.QUICK
        effort = measure.FULL if config.getoption("--full") else quick
        record = measure.run_case(case, benchmark, effort, config.getoption("--peers-only"))
        record["stem"] = request.module.__name__.rpartition(".")[2]
        benchmark.extra_info["record"] = record
        request.node.user_properties.append(("record", record))

    return run
