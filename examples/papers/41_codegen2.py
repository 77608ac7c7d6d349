# SPDX-License-Identifier: Apache-2.0
"""Nijkamp et al., "CodeGen2: Lessons for Training LLMs on Programming and Natural Languages" (arXiv 2305.02309).

Causal language modelling alone, a prefix-LM (`pycore.schedules.Prefix`), and causal language modelling mixed with
infilling, all for the same number of steps.
"""

import torch
from bytes_text import MASK, MODES, bits, model, windows
from paper import Figures, Paper, Run, main
from torch import Tensor

from pycore.models.transformer import Transformer
from pycore.schedules import Prefix

PAPER = Paper(
    41,
    "CodeGen2: Lessons for Training LLMs on Programming and Natural Languages",
    "infilling is no free lunch: half the batches of it cost causal modelling something, but one model then does both;"
    " and a prefix-LM is no better than a causal decoder",
    "bytes of the standard library's sources, 64 at a time, 2 blocks of width 64, 500 steps of 16; infilling moves 12"
    " bytes behind the rest; bits per byte of held-out text",
)
LENGTH, COUNT, SPAN = 64, 16, 12


def infilling(run: Run, text: Tensor) -> tuple[Tensor, Tensor]:
    """<mask> in place of a span, which follows behind <sep>; and what is to be predicted (the span)."""
    n = len(text)
    start = run.integers(LENGTH - SPAN, n, low=8)[:, None]
    place = torch.arange(LENGTH - SPAN + 1)
    kept = text.gather(1, torch.where(place < start, place, (place + SPAN - 1).clamp(max=LENGTH - 1)))
    kept = torch.where(place == start, MASK, kept)
    span = text.gather(1, start + torch.arange(SPAN))
    tokens = torch.cat([kept, torch.full((n, 1), MODES), span], 1)
    target = torch.cat([torch.full_like(kept, -100), span], 1)
    return tokens[:, :-1], target


def causal(net: Transformer, text: Tensor, ignored: int = 0) -> Tensor:
    """Next-byte prediction, of the bytes after the first ones."""
    target = text[:, 1:].masked_fill(torch.arange(1, LENGTH) < ignored, -100)
    return net.loss(net(text[:, :-1]), target)


def prefix(run: Run, net: Transformer, text: Tensor) -> Tensor:
    """The same behind a prefix of random length in which every byte sees every other."""
    given = run.integers(LENGTH // 2, len(text))
    states = net(text[:, :-1], schedule=Prefix(given))
    return net.loss(states, text[:, 1:].masked_fill(torch.arange(1, LENGTH) < given[:, None], -100))


def step_loss(run: Run, name: str, net: Transformer, step: int) -> Tensor:
    """One step of a way to train."""
    text = windows(run, COUNT, LENGTH)
    if name == "prefix":
        return prefix(run, net, text)
    if name == "mixed" and step % 2 == 1:
        tokens, target = infilling(run, text)
        return net.loss(net(tokens), target)
    return causal(net, text)


def experiment(run: Run) -> dict[str, float]:
    """Bits per byte of the second half of a window, and of a span from both sides and from before alone."""
    held_out = windows(run, run.pick(512, 16), LENGTH, held_out=True)
    figures: dict[str, float] = {}
    tokens, target = infilling(run, held_out)
    for name in ("causal", "prefix", "mixed"):
        torch.manual_seed(run.seed)
        net = model()
        run.fit(name, net, lambda step, name=name, net=net: step_loss(run, name, net, step), 500, learning_rate=4e-3)
        with torch.no_grad():
            if name == "prefix":
                half = torch.full((len(held_out),), LENGTH // 2)
                states = net(held_out[:, :-1], schedule=Prefix(half))
                target_half = held_out[:, 1:].masked_fill(torch.arange(1, LENGTH) < LENGTH // 2, -100)
                figures["prefix, second half"] = bits(net.loss(states, target_half))
            else:
                figures[f"{name}, second half"] = bits(causal(net, held_out, LENGTH // 2))
            if name != "prefix":
                figures[f"{name}, infilling"] = bits(net.loss(net(tokens), target))
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The paper's lessons, as far as they show at this size."""
    half = {name: f[f"{name}, second half"] for name in ("causal", "prefix", "mixed")}
    return [
        (
            f.above("mixed, second half", "causal, second half"),
            f"infilling costs: causal bits per byte {half['mixed']:.2f} after the mixture, {half['causal']:.2f} after "
            "causal modelling alone",
        ),
        (
            f.above("causal, infilling", "mixed, infilling", 0.1),
            f"and brings: a missing span costs {f['mixed, infilling']:.2f} bits a byte, {f['causal, infilling']:.2f} "
            "by the causal model, which never saw that format",
        ),
        (
            half["prefix"] > half["causal"] - 0.02,
            f"the prefix-LM is no better: {half['prefix']:.2f} bits per byte behind a prefix of half the window",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
