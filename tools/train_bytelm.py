# SPDX-License-Identifier: Apache-2.0
"""Trains the byte model that pycore ships (pycore/models/data/bytelm.pt), on the text of Python's standard library.

    python -m tools.train_bytelm --state build/bytelm.state                 # a few minutes; call it until it is done
    python -m tools.train_bytelm --state build/bytelm.state --write FILE    # and once more, for the checkpoint

The text is every source and text file of the standard library that runs the script, but its tests: of Python 3.11.7
for the shipped weights. Files whose path has a hash below 13/256 are held out, whatever else is there, so that anybody
can say which files the model has not seen (`held_out`). One thread and a fixed seed.

Matrices are trained with Muon (momentum, made orthogonal by five Newton-Schulz steps), which needs about half of
AdamW's steps at this size; the embedding and the norms with AdamW. The rate is constant and falls to zero over the last
steps, so that a run can be made longer while it lasts. Weights are rounded to float16 at the end, which costs less than
0.001 bits a byte and half of the file; they are widened to float32, exactly, when they are loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pycore.models.bytelm import BOS, Bytelm, BytelmConfig
from pycore.models.language import save_bytelm
from pycore.schedules import Lambda

CONFIG = BytelmConfig(layers=3, dim=128, heads=4, kv_heads=2, position="alibi")
LENGTH, BATCH, SEED = 512, 8, 0
MATRIX_RATE, OTHER_RATE, WARMUP = 0.02, 4e-3, 50
SUFFIXES = {".py", ".txt", ".rst", ".html"}
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def held_out(name: str) -> bool:
    """Whether the file of this path below the standard library's folder is never trained on."""
    return hashlib.sha256(name.encode()).digest()[0] < 13


def corpus() -> tuple[bytes, list[tuple[str, bytes]]]:
    """The text to train on, and the held-out files by name. A text that stands in both is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path
        for path in root.rglob("*")
        if path.suffix in SUFFIXES and path.is_file() and not LEFT_OUT & set(path.relative_to(root).parts)
    )
    files = [(path.relative_to(root).as_posix(), path.read_bytes()) for path in paths]
    kept = [(name, data) for name, data in files if held_out(name)]
    seen = {data for _, data in kept}
    train: list[bytes] = []
    for name, data in files:
        if not held_out(name) and data not in seen:
            seen.add(data)
            train.append(data)
    return b"".join(train), kept


class Muon:
    """Momentum whose step on each matrix is made orthogonal (Jordan et al., 2024), in float32."""

    def __init__(self, matrices: list[Tensor], momentum: float = 0.95) -> None:
        self.matrices, self.momentum = matrices, momentum
        self.velocity = [torch.zeros_like(x) for x in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step; the gradients stand at the matrices."""
        for weight, velocity in zip(self.matrices, self.velocity, strict=True):
            assert weight.grad is not None
            velocity.lerp_(weight.grad, 1 - self.momentum)
            x = weight.grad.lerp(velocity, self.momentum)
            tall = x.shape[0] > x.shape[1]
            x = (x.T if tall else x) / (x.norm() + 1e-7)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
            x = x.T if tall else x
            weight.add_(x, alpha=-rate * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)


class Run:
    """A training run that can be put on disk and taken up again."""

    def __init__(self, text: bytes) -> None:
        torch.manual_seed(SEED)
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.model = Bytelm(CONFIG)
        matrices = [x for name, x in self.model.named_parameters() if x.dim() == 2 and name != "embedding"]
        others = [x for name, x in self.model.named_parameters() if x.dim() == 1 or name == "embedding"]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(SEED)
        self.step, self.seconds, self.bits = 0, 0.0, 8.0

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "model": self.model.state_dict(), "velocity": self.muon.velocity, "adam": self.adam.state_dict(),
            "generator": self.generator.get_state(), "numbers": (self.step, self.seconds, self.bits),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        self.muon.velocity = state["velocity"]
        self.generator.set_state(state["generator"])
        self.step, self.seconds, self.bits = state["numbers"]

    def advance(self, scale: float) -> None:
        """One step on samples that start with BOS, which makes it the sink."""
        starts = torch.randint(len(self.data) - LENGTH + 1, (BATCH, 1), generator=self.generator)
        target = self.data[starts + torch.arange(LENGTH)].long()
        logits = self.model(torch.cat([torch.full((BATCH, 1), BOS), target[:, :-1]], dim=1))
        loss = functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        self.muon.step(MATRIX_RATE * scale)
        for group in self.adam.param_groups:
            group["lr"] = OTHER_RATE * scale
        self.adam.step()
        bits = loss.item() / math.log(2)
        if not math.isfinite(bits):
            raise SystemExit(f"train_bytelm: diverged at step {self.step}")
        self.bits = bits if self.step == 0 else 0.98 * self.bits + 0.02 * bits
        self.step += 1


@torch.no_grad()
def bits_per_byte(model: Bytelm, files: list[tuple[str, bytes]], size: int, count: int) -> float:
    """Mean over `count` records of `size` bytes, spread evenly over the files, each read as a text of its own."""
    records = [data[at : at + size] for _, data in files for at in range(0, len(data) - size + 1, size)]
    total = 0.0
    for i in range(count):
        target = torch.tensor(list(records[i * len(records) // count]))[None]
        logits = model(torch.cat([torch.tensor([[BOS]]), target[:, :-1]], dim=1), schedule=Lambda(4, LENGTH))
        total += functional.cross_entropy(logits[0], target[0]).item() / math.log(2)
    return total / count


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit status is 0 once the run is at its end, and 3 while it is not."""
    parser = argparse.ArgumentParser(prog="train_bytelm", description=__doc__.split("\n")[0])
    parser.add_argument("--state", type=Path, required=True, help="where an unfinished run is kept")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--decay", type=int, default=600, help="the last steps, over which the rate falls to zero")
    parser.add_argument("--minutes", type=float, default=3.5, help="stop after so many and keep the state")
    parser.add_argument("--write", type=Path, help="write the checkpoint of a finished run to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    text, kept = corpus()
    run = Run(text)
    if options.state.exists():
        run.load(torch.load(options.state, weights_only=True))
    until = time.monotonic() + 60 * options.minutes
    while run.step < options.steps and time.monotonic() < until:
        started = time.process_time()
        run.advance(min(1.0, (run.step + 1) / WARMUP, (options.steps - run.step) / options.decay))
        run.seconds += time.process_time() - started
    part = options.state.with_name(options.state.name + ".part")
    torch.save(run.state(), part)
    os.replace(part, options.state)
    print(f"step {run.step} of {options.steps}, {run.seconds:.0f} s of one core, {run.bits:.3f} bits/byte", flush=True)
    if run.step < options.steps:
        return 3
    whole = bits_per_byte(run.model, kept, 2048, 100)
    state = {name: x.half() for name, x in run.model.state_dict().items()}
    run.model.load_state_dict({name: x.float() for name, x in state.items()})
    rounded = bits_per_byte(run.model, kept, 2048, 100)
    print(f"held out: {whole:.4f} bits/byte in records of 2048, {rounded:.4f} in float16")
    if options.write is not None:
        facts = {
            "python": platform.python_version(), "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest(),
            "steps": run.step, "decay": options.decay, "seconds": round(run.seconds),
            "bits_per_byte": round(rounded, 4),
        }  # fmt: skip
        save_bytelm(run.model, options.write, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
