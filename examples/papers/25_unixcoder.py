# SPDX-License-Identifier: Apache-2.0
"""Guo et al., "UniXcoder: Unified Cross-Modal Pre-training for Code Representation" (arXiv 2203.03850).

One transformer is an encoder, a decoder, or an encoder-decoder: a token in front says which, and the schedule of
attention is `Full`, `Causal` or `Prefix` (`pycore.schedules`).
"""

import torch
from bytes_text import MASK, MODES, behind, bits, model, windows
from paper import Figures, Paper, Run, main
from torch import Tensor

from pycore.models.transformer import Transformer
from pycore.schedules import Causal, Full, Prefix, Schedule

PAPER = Paper(
    25,
    "UniXcoder: Unified Cross-Modal Pre-training for Code Representation",
    "one model whose mask of attention is chosen by a prefix serves masked, causal and prefix-to-rest prediction,"
    " each about as well as a model of its own",
    "bytes of the standard library's sources, 64 at a time, 2 blocks of width 64: one model for 900 steps on three"
    " tasks in turn against three models for 300 steps on one; bits per byte of held-out text",
)
LENGTH, COUNT = 64, 16
TASKS = ("masked", "causal", "prefix")


def task_loss(run: Run, net: Transformer, task: str, text: Tensor, schedule: Schedule | None = None) -> Tensor:
    """The loss of one of the three tasks; another schedule than its own may be asked for."""
    n, length = text.shape
    if task == "masked":
        hidden = run.uniform(n, length) < 0.15
        tokens = behind(MODES, text.masked_fill(hidden, MASK))
        states = net(tokens, schedule=schedule or Full())[:, 1:]
        return net.loss(states, text.masked_fill(~hidden, -100))
    if task == "causal":
        states = net(behind(MODES + 1, text)[:, :-1], schedule=schedule or Causal())
        return net.loss(states, text)
    given = run.integers(length * 3 // 4, n, low=length // 4)
    states = net(behind(MODES + 2, text)[:, :-1], schedule=schedule or Prefix(given + 1))
    return net.loss(states, text.masked_fill(torch.arange(length) < given[:, None], -100))


def trained(run: Run, name: str, tasks: tuple[str, ...], steps: int) -> Transformer:
    """A model that learns the tasks in turn."""
    net = model()
    run.fit(
        name, net, lambda step: task_loss(run, net, tasks[step % len(tasks)], windows(run, COUNT, LENGTH)), steps,
        learning_rate=4e-3,
    )  # fmt: skip
    return net


def experiment(run: Run) -> dict[str, float]:
    """Bits per byte of each task."""
    held_out = windows(run, run.pick(256, 16), LENGTH, held_out=True)
    together = trained(run, "one model", TASKS, 900)
    figures: dict[str, float] = {}
    with torch.no_grad():
        for task in TASKS:
            figures[f"one model, {task}"] = bits(task_loss(run, together, task, held_out))
        figures["one model, masked, causal mask"] = bits(task_loss(run, together, "masked", held_out, Causal()))
    for task in TASKS:
        own = trained(run, task, (task,), 300)
        with torch.no_grad():
            figures[f"own model, {task}"] = bits(task_loss(run, own, task, held_out))
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """A third of the parameters, and as many steps of each task."""
    each = ", ".join(f"{task} {f[f'one model, {task}']:.2f} ({f[f'own model, {task}']:.2f})" for task in TASKS)
    return [
        (
            all(f[f"one model, {task}"] < 1.05 * f[f"own model, {task}"] for task in TASKS),
            f"bits per byte of one model (of a model of its own): {each}",
        ),
        (
            f.above("one model, masked, causal mask", "one model, masked", 0.1),
            f"masked bytes under the causal mask {f['one model, masked, causal mask']:.2f}: the mask matters",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
