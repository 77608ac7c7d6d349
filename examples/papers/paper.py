# SPDX-License-Identifier: Apache-2.0
"""What the papers' models share: seeds, arguments, results, the verdict, and data that is there without a network."""

from __future__ import annotations

import argparse
import ast
import collections
import functools
import math
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
from common import Parser, Progress, UserError, facts, make_folder, read_corpus, run_main, write  # noqa: E402

from pycore.models.training import fit as fit_loop  # noqa: E402

OUT = Path(__file__).resolve().parents[1] / "out" / "papers"


@dataclass(frozen=True)
class Paper:
    """What a script is about.

    Attributes:
        number: of the paper in docs/papers.md.
        title: the paper's.
        claim: what the paper says, as far as it is tried here.
        setting: what is trained and measured instead of the paper's models and data.
    """

    number: int
    title: str
    claim: str
    setting: str


@dataclass(frozen=True)
class Run:
    """One run of an experiment: everything random comes from its seed."""

    seed: int
    quick: bool
    generator: torch.Generator

    def pick(self, full: int, quick: int) -> int:
        """A size: that of a full run, or of a quick one."""
        return quick if self.quick else full

    def fit(self, label: str, parameters: Any, loss_of: Callable[[int], Tensor], steps: int, **options: Any) -> float:
        """Trains for so many steps (two where it is quick) with a progress bar; returns the last losses' mean."""
        steps = self.pick(steps, 2)
        progress = Progress(f"seed {self.seed}, {label}", steps)
        return fit_loop(parameters, loss_of, steps=steps, report=progress.update, **options)

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        """Random integers, low to high - 1."""
        return torch.randint(low, high, shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        """Random numbers of variance 1."""
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        """Random numbers between 0 and 1."""
        return torch.rand(*shape, generator=self.generator)

    def permutation(self, n: int) -> Tensor:
        """0 to n - 1 in a random order."""
        return torch.randperm(n, generator=self.generator)


class Figures:
    """What was measured: for each name the values of all seeds."""

    def __init__(self, runs: list[dict[str, float]]) -> None:
        self.each = {name: [run[name] for run in runs] for name in runs[0]}

    def __getitem__(self, name: str) -> float:
        return sum(self.each[name]) / len(self.each[name])

    def spread(self, name: str) -> float:
        """The standard deviation over the seeds."""
        mean, values = self[name], self.each[name]
        return math.sqrt(sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1))

    def above(self, better: str, worse: str, by: float = 0.0) -> bool:
        """Whether one is larger than the other by that much, with every seed."""
        return all(a > b + by for a, b in zip(self.each[better], self.each[worse], strict=True))


Experiment = Callable[[Run], dict[str, float]]
Checks = Callable[[Figures], list[tuple[bool, str]]]


def main(paper: Paper, script: str, experiment: Experiment, checks: Checks, arguments: list[str] | None = None) -> int:
    """Runs an experiment once for each seed, prints and writes what came out.

    Returns:
        0 if the claim held (or --quick), 1 if not, 2 after an error.
    """
    name = Path(script).stem
    parser = Parser(prog=name, description=f"{paper.title}: {paper.claim}")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed: only to see that it runs")
    parser.add_argument("--seeds", type=int, help="how many; 3 by default")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the result")
    options = parser.parse_args(arguments)
    return run_main(name, lambda: _run(paper, name, experiment, checks, options))


def _run(paper: Paper, name: str, experiment: Experiment, checks: Checks, options: argparse.Namespace) -> int:
    seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    if seeds < 1:
        raise UserError(f"--seeds is {seeds} and must be at least 1")
    make_folder(options.out)
    runs: list[dict[str, float]] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        runs.append(experiment(Run(seed, options.quick, torch.Generator().manual_seed(seed))))
    figures = Figures(runs)
    print(f"{paper.number}  {paper.title}\nclaim    {paper.claim}\nsetting  {paper.setting}")
    width = max(len(row) for row in figures.each)
    for row in figures.each:
        print(f"  {row:<{width}}  {figures[row]:9.4f}  ± {figures.spread(row):.4f}")
    results = checks(figures)
    for held, sentence in results:
        print(("yes" if held else "NO ").ljust(4), sentence)
    verdict = verdict_of(results)
    result = {
        **asdict(paper),
        "quick": options.quick,
        "seeds": seeds,
        "figures": {row: {"mean": figures[row], "each": values} for row, values in figures.each.items()},
        "checks": [{"held": held, "sentence": sentence} for held, sentence in results],
        "verdict": verdict,
        **facts(),
    }
    write(result, options.out / (f"{name}_quick" if options.quick else name), None)
    if options.quick:
        print("--quick: nothing is really trained, so these figures mean nothing")
        return 0
    print(verdict)
    return 0 if verdict == "reproduced" else 1


def verdict_of(checks: list[tuple[bool, str]]) -> str:
    """Whether all, some or none of the checks hold."""
    held = [held for held, _ in checks]
    return "reproduced" if all(held) else "partly reproduced" if any(held) else "not reproduced"


def digits() -> tuple[Tensor, Tensor]:
    """1797 handwritten digits: float32 [1797, 64] from 0 to 1, and what they are."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits need scikit-learn; pip install pycore-kernels[examples]") from error
    data = load_digits()
    return torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target, dtype=torch.int64)


def split_digits(run: Run, test: int = 597) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The digits in a random order: images and labels to learn from, and `test` of each to be asked."""
    images, labels = digits()
    order = run.permutation(len(images))
    images, labels = images[order], labels[order]
    return images[test:], labels[test:], images[:test], labels[:test]


@functools.cache
def corpus() -> tuple[bytes, list[bytes]]:
    """The standard library's source text, and held-out files."""
    train, held_out, _ = read_corpus()
    return train, held_out


@functools.cache
def functions() -> list[tuple[str, str, str]]:
    """Name, first sentence of the docstring, and source without it of the standard library's documented functions."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, tuple[str, str, str]] = {}
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        if {"test", "tests", "site-packages", "dist-packages", "idle_test"} & set(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            found.update({row[1]: row for row in _documented(source)})
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # a template, or an old encoding
    return list(found.values())


def _documented(source: str) -> Iterator[tuple[str, str, str]]:
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        sentence = " ".join((docstring or "").split("\n\n")[0].split())
        if len(sentence) >= 20 and node.end_lineno is not None:
            code = "\n".join([lines[node.lineno - 1], *lines[node.body[1].lineno - 1 : node.end_lineno]])
            yield node.name, sentence, code


def words_of(text: str) -> list[str]:
    """Lower-case words of prose or code; identifiers fall apart at _ and before capitals."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]", text)]


class Words:
    """Tokens of words: 0 is padding, 1 what is rare, the others are the most frequent words of some texts."""

    def __init__(self, texts: list[str], size: int = 1500) -> None:
        counts = collections.Counter(word for text in texts for word in words_of(text))
        self.index = {word: i + 2 for i, (word, _) in enumerate(counts.most_common(size - 2))}
        self.size = size

    def tokens(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """int64 [texts, length] of first words, and how many count of each (at least one)."""
        rows = [[self.index.get(word, 1) for word in words_of(text)][:length] or [1] for text in texts]
        padded = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return padded, torch.tensor([len(row) for row in rows])

    def bags(self, texts: list[str]) -> Tensor:
        """How often each word comes, weighted by how few texts it comes in, at length 1: [texts, size]."""
        bags = torch.zeros(len(texts), self.size)
        for row, text in zip(bags, texts, strict=True):
            for word in words_of(text):
                row[self.index.get(word, 1)] += 1
        bags = bags * torch.log(len(texts) / (1 + (bags > 0).sum(0)))
        return torch.nn.functional.normalize(bags, dim=-1)
