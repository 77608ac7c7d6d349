# SPDX-License-Identifier: Apache-2.0
"""Probabilistic attention by density: beside its own dense form, and compiled FlexAttention on the same block mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench.case import Case, Options, Outputs, largest_error

HEADS, LENGTH, HEAD_DIM, BLOCK, SEED = 8, 8192, 64, 64, 1
BLOCKS = LENGTH // BLOCK
DENSITIES = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
QUICK = (1.0, 0.3, 0.1)
ROWS = (0, LENGTH // 2, LENGTH - BLOCK)  # stretches of a block that are checked
FORWARD_TOLERANCE, BACKWARD_TOLERANCE = 1e-5, 5e-5

Inputs = tuple[torch.Tensor, ...]


def _probs(density: float) -> Any:
    """The constant whose expected density, with the window's block, is `density`."""
    from pycore.schedules import Constant

    own = 2 / (BLOCKS + 1)  # of all blocks J <= I, the share of the queries' own
    return Constant(min(1.0, max(0.0, (density - own) / (1 - own))))


def _mask(density: float) -> torch.Tensor:
    from pycore.ops import pr_block_mask

    return pr_block_mask(
        batch=1, heads=HEADS, query_blocks=BLOCKS, key_blocks=BLOCKS, distance_probs=_probs(density), seed=SEED
    )


def _inputs(backward: bool) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    tensors = tuple(torch.randn(1, HEADS, LENGTH, HEAD_DIM, generator=generator) for _ in range(4))
    for x in tensors[:3]:
        x.requires_grad_(backward)
    return tensors


def _contender(backward: bool, attend: Callable[..., torch.Tensor]) -> Callable[[Inputs], Callable[[], Outputs]]:
    def prepare(tensors: Inputs) -> Callable[[], Outputs]:
        query, key, value, grad = tensors

        def forward() -> Outputs:
            with torch.no_grad():
                return (attend(query, key, value),)

        def forward_and_backward() -> Outputs:
            out = attend(query, key, value)
            return (out.detach(), *torch.autograd.grad(out, (query, key, value), grad))

        return forward_and_backward if backward else forward

    return prepare


def _pycore(density: float) -> Callable[..., torch.Tensor]:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        from pycore.ops import pr_flash_attention

        return pr_flash_attention(query, key, value, distance_probs=_probs(density), seed=SEED, block_size=BLOCK)

    return attend


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
    from pycore.ops import attention

    return attention(query, key, value)


def _flex(density: float) -> Callable[[Inputs], Callable[[], Outputs]]:
    """torch.compile(flex_attention) with the round's blocks as its block mask, built once and not timed."""

    def prepare(tensors: Inputs) -> Callable[[], Outputs]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        taken = _mask(density)[0]

        def rule(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return (i >= j) & taken[h, i // BLOCK, j // BLOCK]

        block_mask = create_block_mask(rule, 1, HEADS, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=BLOCK)
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: (compiled(*tensors[:3], block_mask=block_mask),)

    return prepare


def _check(density: float, backward: bool) -> Callable[[Inputs], Callable[[Outputs], float]]:
    """Three stretches of rows in float64 plain torch, and for gradients the query's."""

    def check(tensors: Inputs) -> Callable[[Outputs], float]:
        taken = _mask(density)[0]
        outs, grads = [], []
        for first in ROWS:
            rows, columns = torch.arange(first, first + BLOCK), torch.arange(first + BLOCK)
            query = tensors[0][:, :, rows].detach().double().requires_grad_(backward)
            key, value = (x[:, :, columns].detach().double() for x in tensors[1:3])
            keep = taken[:, rows // BLOCK][:, :, columns // BLOCK] & (rows[:, None] >= columns)
            scores = (query @ key.mT * HEAD_DIM**-0.5).masked_fill(~keep, -torch.inf)
            out = scores.softmax(dim=-1) @ value
            outs.append(out.detach())
            if backward:
                grads.append(torch.autograd.grad(out, query, tensors[3][:, :, rows].double())[0])
        expected = [torch.cat(x, dim=2) for x in ((outs, grads) if backward else (outs,))]
        rows = torch.cat([torch.arange(first, first + BLOCK) for first in ROWS])
        return lambda outputs: largest_error([x[:, :, rows] for x in outputs[: len(expected)]], expected)

    return check


def cases(options: Options) -> Iterable[Case]:
    """A sweep of densities forward, and forward with backward, which FlexAttention does not have on the CPU."""
    if options.device != "cpu":
        return
    for backward in (False, True):
        for density in QUICK if options.quick else DENSITIES:
            taken = _mask(density)
            # Of a query's own block it keeps what is not after it, of others all.
            own = HEADS * BLOCKS
            pairs = (int(taken.sum()) - own) * BLOCK**2 + own * BLOCK * (BLOCK + 1) // 2
            contenders = {"pycore": _contender(backward, _pycore(density))}
            if density == 1.0:
                contenders["pycore, causal"] = _contender(backward, _dense)
            if not backward:
                contenders["compiled FlexAttention"] = _flex(density)
            what = "forward + backward" if backward else "forward"
            yield Case(
                name=f"probabilistic {what}, L {LENGTH}, density {density}",
                group=f"probabilistic {what} by density (L {LENGTH})",
                inputs=lambda backward=backward: _inputs(backward),
                contenders=contenders,
                check=_check(density, backward),
                tolerance=BACKWARD_TOLERANCE if backward else FORWARD_TOLERANCE,
                flops=(14.0 if backward else 4.0) * HEAD_DIM * pairs,
                axis=("density", float(taken.sum()) / (HEADS * BLOCKS * (BLOCKS + 1) / 2)),
            )


def bench_attention_probabilistic(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
