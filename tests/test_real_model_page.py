# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/real_model.md and of the README are those of the committed results."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import report
from tests.test_examples import EXAMPLES

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]


def result(name: str) -> Any:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def between(page: str, marker: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {marker} -->\n(.*?)\n<!-- /{marker} -->", text, re.DOTALL)
    assert found, f"{page} has no {marker}"
    return found[1].strip()


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], str]]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    length, parts = (importlib.import_module(name) for name in ("past_its_length", "real_model_parts"))
    return {
        "past_its_length": lambda: length.table(result("past_its_length")),
        "needles": lambda: length.needle_table(result("past_its_length")),
        **{
            name: lambda name=name: parts.TABLES[name](result("real_model_parts")[name]["rows"]) for name in parts.PARTS
        },
    }


@pytest.mark.parametrize(
    "page, marker",
    [
        ("README.md", "past_its_length"),
        ("docs/real_model.md", "past_its_length"),
        ("docs/real_model.md", "needles"),
        ("docs/real_model.md", "token"),
        ("docs/real_model.md", "training"),
        ("docs/real_model.md", "probabilistic"),
        ("docs/real_model.md", "codebook"),
    ],
)
def test_tables(page: str, marker: str, tables: dict[str, Callable[[], str]]) -> None:
    assert between(page, marker) == tables[marker]()


def test_benchmark_tables() -> None:
    page = (ROOT / "docs" / "real_model.md").read_text(encoding="utf-8")
    sources = re.findall(r"<!-- bench:start \w+ (\S+) -->", page)
    assert len(sources) == 2 and report.renewed(page) == page
    for source in sources:
        assert not json.loads((ROOT / source).read_text(encoding="utf-8"))["failures"]


def test_results_are_of_one_machine_and_commit() -> None:
    names = ["2026-11-29-amd-epyc-2t-avx512-model", "2026-11-29-amd-epyc-2t-avx512-model-quantized"]
    benchmarks = [result(name)["machine"] for name in names]
    parts = [result("real_model_parts")[name] for name in ("token", "training", "probabilistic", "codebook")]
    length = result("past_its_length")
    commits = {x["commit"][:12] for x in benchmarks + parts} | {x[:12] for x in length["commits"]}
    machines = {(x["cpu"], x["cores"]) for x in benchmarks + [y["machine"] for y in [*parts, length]]}
    assert len(commits) == 1 and len(machines) == 1


def test_what_the_pages_say_holds() -> None:
    """The plain model's loss rises by more than 0.8 nats, on every text, and Λ's does not; curves agree."""
    held = result("past_its_length")
    rows = {row["name"]: row for row in held["rows"]}
    assert held["held"] and held["trained"] == 8192 and held["tokens"] == 16384
    assert min(rows["plain"]["behind"]) > 0.8 and min(rows["Λ 1024, no limit"]["behind"]) > 0.8
    for name in ("Λ 1024", "Λ 4096"):
        assert all(a - b <= 0.1 for a, b in zip(rows[name]["behind"], rows[name]["before"], strict=True))
    theirs, ours = (row["losses"] for row in result("real_model_parts")["training"]["rows"])
    assert max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) < 1e-4
