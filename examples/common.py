# SPDX-License-Identifier: Apache-2.0
"""What the examples share: the text they read, progress, plots, the facts a result is stored with, and errors."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

import pycore


class UserError(Exception):
    """What the user can put right, in one sentence."""


class Progress:
    """A bar on a terminal; elsewhere (a log, a test) a line for every tenth."""

    def __init__(self, label: str, total: int, stream: TextIO = sys.stderr) -> None:
        self.label, self.total, self.stream = label, total, stream
        self.bar = stream.isatty()
        self.started = time.monotonic()
        self.tenths = 0

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` of the total are done."""
        tenths = 10 * done // self.total
        left = (time.monotonic() - self.started) * (self.total - done) / max(done, 1)
        if self.bar:
            filled = 30 * done // self.total
            bar = "#" * filled + "." * (30 - filled)
            text = f"\r{self.label} [{bar}] {done}/{self.total}  {note}  {left:.0f} s left"
            print(text.ljust(90), end="\n" if done == self.total else "", file=self.stream, flush=True)
        elif tenths > self.tenths:
            print(f"{self.label} {done}/{self.total}  {note}", file=self.stream, flush=True)
        self.tenths = tenths


def read_corpus() -> tuple[bytes, list[bytes], str]:
    """The standard library's source text, without its tests and whatever was installed beside it.

    Returns:
        the training text, the held-out files (every 20th), and a fingerprint of both.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = sorted(
        path.relative_to(root).as_posix()
        for pattern in ("*.py", "*/*.py")
        for path in root.glob(pattern)
        if not left_out & set(path.relative_to(root).parts)
    )
    files = [(root / name).read_bytes() for name in names]
    held_out = files[::20]
    train = b"".join(data for i, data in enumerate(files) if i % 20 != 0)
    if len(train) < 1_000_000:
        raise UserError(f"the standard library at {root} has {len(train)} bytes of Python source, too few to train on")
    digest = hashlib.sha256(train)
    for data in held_out:
        digest.update(data)
    return train, held_out, digest.hexdigest()


def figure_class() -> Any:
    """The Figure of matplotlib, which needs no display. Imported late: everything but the plot does without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the plot needs matplotlib; pip install pycore-kernels[examples], or pass --no-plot") from error
    return Figure


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # only a label
    return {"cpu": cpu, "cores": os.cpu_count(), "isa": pycore.cpu_isa(), "system": platform.system()}


def commit() -> str | None:
    """The commit of the tree this script stands in, if it stands in one."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def make_folder(out: Path) -> None:
    """Makes the folder for results, before anything that takes long."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made a folder: {error.strerror}") from error


def facts() -> dict[str, Any]:
    """What a stored result names: when, where, and with what."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def write(result: dict[str, Any], stem: Path, plot: Callable[[Path], None] | None, *, quiet: bool = False) -> None:
    """Writes STEM.json, and STEM.png unless there is nothing to plot with; says so unless it is to be quiet."""
    try:
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        stem.with_suffix(".json").write_text(text, encoding="utf-8")
        if plot is not None:
            plot(stem.with_suffix(".png"))
    except OSError as error:
        raise UserError(f"--out {stem.parent} cannot be written to: {error.strerror}") from error
    if not quiet:
        print(f"written: {stem}.json" + ("" if plot is None else " and .png"))


def run_main(name: str, run: Callable[[], int]) -> int:
    """Runs an example; what the user can put right becomes one sentence and exit status 2."""
    try:
        return run()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
