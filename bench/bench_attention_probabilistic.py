# SPDX-License-Identifier: Apache-2.0
"""Probabilistic attention by density: beside its own dense form, and compiled FlexAttention on the same block mask."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from bench import captured, inputs, peers
from bench.bench_attention import TOLERANCES, contender
from bench.case import Case, Options, Outputs, gemm_limit, largest_error

SEED = 1
DENSITIES = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
QUICK = (1.0, 0.3, 0.1)


@dataclass(frozen=True)
class Round:
    """One round: its shape, and the density that its blocks are expected to have."""

    density: float
    backward: bool = False
    length: int = 8192
    block: int = 64
    heads: int = 8
    head_dim: int = 64
    batch: int = 1
    source: str = inputs.RANDOM
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def blocks(self) -> int:
        return self.length // self.block

    @property
    def probs(self) -> Any:
        """The constant whose expected density, with the window's block, is `density`."""
        from pycore.schedules import Constant

        own = 2 / (self.blocks + 1)  # of all blocks J <= I, the share of the queries' own
        return Constant(min(1.0, max(0.0, (self.density - own) / (1 - own))))

    @functools.cached_property
    def taken(self) -> torch.Tensor:
        """Bool [1, heads, blocks, blocks], on the CPU: the blocks that take part."""
        from pycore.ops import pr_block_mask

        sizes = {"query_blocks": self.blocks, "key_blocks": self.blocks}
        return pr_block_mask(batch=1, heads=self.heads, **sizes, distance_probs=self.probs, seed=SEED)

    @property
    def flops(self) -> float:
        """Of a query's own block it keeps what is not after it, of others all."""
        own = self.heads * self.blocks
        pairs = (int(self.taken.sum()) - own) * self.block**2 + own * self.block * (self.block + 1) // 2
        return (14.0 if self.backward else 4.0) * self.head_dim * pairs * self.batch

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """query, key, value, and the gradient of the output."""
        shape = (self.heads, self.length, self.head_dim)
        tensors = inputs.attention_inputs(self.source, *shape, True, self.device, self.dtype)
        for x in tensors[:3]:
            x.requires_grad_(self.backward)
        return tensors


def _pycore(work: Round) -> Callable[..., Callable[[], Any]]:
    from pycore.ops import pr_flash_attention

    options = {"distance_probs": work.probs, "seed": SEED, "block_size": work.block}
    return lambda *tensors: lambda: pr_flash_attention(*tensors, **options)


def _dense(*tensors: torch.Tensor) -> Callable[[], Any]:
    from pycore.ops import attention

    return lambda: attention(*tensors)


def _flex(work: Round) -> Callable[..., Callable[[], torch.Tensor]]:
    """torch.compile(flex_attention) with the round's blocks as its block mask, built once and not timed.

    The rule is asked in a query's own block alone; the others are whole, and FlexAttention does not look into them.
    Rounds differ in tensors alone, so they share one compilation.
    """

    def make(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        from torch.nn.attention.flex_attention import BlockMask

        taken = work.taken.to(query.device)
        own = torch.eye(work.blocks, dtype=torch.bool, device=query.device).expand_as(taken)

        def listed(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """How many key blocks each query block has, and which: theirs first."""
            kept = kept.int()
            return kept.sum(dim=-1, dtype=torch.int32), kept.argsort(dim=-1, descending=True, stable=True).int()

        block, seen = work.block, taken[0]

        def rule(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return (i >= j) & seen[h, i // block, j // block]

        sizes = (work.length, work.length)
        block_mask = BlockMask.from_kv_blocks(
            *listed(own), *listed(taken & ~own), BLOCK_SIZE=block, mask_mod=rule, seq_lengths=sizes
        )
        compiled = peers.compile_flex()
        return lambda: compiled(query, key, value, block_mask=block_mask)

    return make


def _check(work: Round) -> Callable[[Any], Callable[[Outputs], float]]:
    """Three stretches of a block's rows in float64 plain torch, and for gradients the query's."""
    block = work.block

    def check(tensors: tuple[torch.Tensor, ...]) -> Callable[[Outputs], float]:
        device = tensors[0].device
        taken = work.taken[0].to(device)
        outs, grads, stretches = [], [], []
        for first in (0, work.length // 2, work.length - block):
            rows = torch.arange(first, first + block, device=device)
            columns = torch.arange(first + block, device=device)
            query = tensors[0][:, :, rows].detach().double().requires_grad_(work.backward)
            key, value = (x[:, :, columns].detach().double() for x in tensors[1:3])
            keep = taken[:, rows // block][:, :, columns // block] & (rows[:, None] >= columns)
            scores = (query @ key.mT * work.head_dim**-0.5).masked_fill(~keep, -torch.inf)
            out = scores.softmax(dim=-1) @ value
            outs.append(out.detach())
            if work.backward:
                grads.append(torch.autograd.grad(out, query, tensors[3][:, :, rows].double())[0])
            stretches.append(rows)
        expected = [torch.cat(x, dim=2) for x in ((outs, grads) if work.backward else (outs,))]
        chosen = torch.cat(stretches)
        return lambda outputs: largest_error([x[:, :, chosen] for x in outputs[: len(expected)]], expected)

    return check


def round_case(name: str, group: str, work: Round, with_flex: bool = True) -> Case:
    """A point of a sweep over density; where all blocks take part, also beside causal attention."""
    makers: dict[str, Callable[..., Callable[[], Any]]] = {"pycore": _pycore(work)}
    if work.density == 1.0:
        makers["pycore, causal"] = _dense
    if with_flex:
        makers["compiled FlexAttention"] = _flex(work)
    return Case(
        name=name,
        group=group,
        inputs=work.inputs,
        contenders={name: contender(work.backward, make) for name, make in makers.items()},
        check=_check(work),
        tolerance=TOLERANCES[work.dtype][work.backward],
        flops=work.flops,
        limit=gemm_limit(work.dtype, work.device),
        axis=("density", float(work.taken.sum()) / (work.heads * work.blocks * (work.blocks + 1) / 2)),
        device=work.device,
    )


def cases(options: Options) -> Iterable[Case]:
    """A sweep of densities forward, and forward with backward, which FlexAttention does not have on the CPU."""
    if options.device != "cpu":
        return
    for backward in (False, True):
        for density in QUICK if options.quick else DENSITIES:
            work = Round(density, backward)
            what = "forward + backward" if backward else "forward"
            yield round_case(
                f"probabilistic {what}, L {work.length}, density {density}",
                f"probabilistic {what} by density (L {work.length})",
                work,
                with_flex=not backward,
            )
    if captured.present():
        real = {"source": captured.NAME, "heads": captured.HEADS, "head_dim": captured.HEAD_DIM}
        work = Round(0.25, length=captured.TOKENS, **real, batch=len(captured.LAYERS))
        name = f"L {work.length}, {captured.NAME}, B{work.batch} H{work.heads} D{work.head_dim}"
        yield round_case(
            f"probabilistic forward, {name}, density 0.25", f"probabilistic forward ({name})", work, not options.quick
        )


def bench_attention_probabilistic(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
