# SPDX-License-Identifier: Apache-2.0
"""The documentation is true: its code runs, and the files, links and make targets it names are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import report

ROOT = Path(__file__).resolve().parent.parent
FIXED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md", "bench/README.md", "examples/README.md")
DOCUMENTS = [*(ROOT / name for name in FIXED), *sorted(ROOT.glob("docs/**/*.md"))]
# Written by a build or a run, so not in every checkout.
GENERATED = (
    "pycore/_C.abi3.so",
    "pycore/build_info.json",
    "build/native/",
    "build/smollm2/",
    "build/models",
    "examples/out/",
    "dist/",
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_blocks() -> list[tuple[str, str]]:
    """(where, code) of every Python block; the code starts at its line in the document, for the traceback."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start(1))
            found.append((f"{name_of(path)}:{line + 1}", "\n" * line + match[1]))
    return found


BLOCKS = python_blocks()


def test_there_are_blocks() -> None:
    """One for each layer, and the same bits, in the README; fences of another form would go unseen."""
    assert sum(where.startswith("README.md:") for where, _ in BLOCKS) >= 5
    for path in DOCUMENTS:
        fences = re.findall(r"^[ \t]*```.*$", path.read_text(), re.MULTILINE)
        assert set(fences) <= {"```python", "```"}, f"{name_of(path)} has a fence this test does not understand"


@pytest.mark.parametrize("where, code", BLOCKS, ids=[where for where, _ in BLOCKS])
def test_block_runs(where: str, code: str) -> None:
    """Each by itself: a reader copies one block, not the page."""
    exec(compile(code, where.rpartition(":")[0], "exec"), {"__name__": "__main__"})


def named_paths(text: str) -> set[str]:
    """Inline code that is a path of this repository: it has a slash, or is a file with a known ending."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = set()
    for code in re.findall(r"`([^`\s]+)`", prose):
        if "<" in code or "*" in code or "…" in code or "$" in code:
            continue  # a pattern, not a path
        if re.fullmatch(r"\.?[\w./-]+\.(py|pyi|cpp|h|cu|cuh|md|txt|toml|sh|json|so)", code) or code.endswith("/"):
            found.add(code)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_named_files_exist(path: Path) -> None:
    """A name may be relative to the root, to its document, to csrc, or to a folder of kernels or shared headers."""
    csrc = ROOT / "csrc"
    bases = (ROOT, path.parent, csrc, csrc / "include" / "pycore", csrc / "cpu", csrc / "cuda")
    names = {name for name in named_paths(path.read_text()) if not name.startswith(GENERATED)}
    known = {"build.ninja", "libpycore.so", "torch/extension.h", "torch/all.h"}
    assert not [name for name in sorted(names - known) if not any((base / name).exists() for base in bases)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    assert not [link for link in links if "://" not in link and not (path.parent / link).exists()]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        commands = re.findall(r"(?:`|^    )(?:[A-Z]+=\S+ )*make ([a-z]+)", path.read_text(), re.MULTILINE)
        assert set(commands) <= targets, name_of(path)


def test_results_tables_are_what_their_file_holds() -> None:
    """They are generated, never typed."""
    assert report.main(["--check"]) == 0
