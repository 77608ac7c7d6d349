# SPDX-License-Identifier: Apache-2.0
"""Attention with tables and options in every dtype: our results and the reference's, with all gradients."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from pycore.ops import attention, lambda_attention
from pycore.reference import attention as reference
from pycore.schedules import Lambda
from tests.support.attention_inputs import Case

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
TABLES = ("distance_bias", "sink_logits")
# A table has a handful of entries, and the largest error among so few says little about an implementation: their
# gradients are compared for this many losses at once.
DRAWS = 8


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ours(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of the op that has these options."""
    if "alibi_slopes" not in options or not isinstance(options["schedule"], Lambda):
        return attention(q, k, v, **options, return_lse=True)
    sizes = dataclasses.asdict(options.pop("schedule"))
    if options.get("distance_limit") is None:
        options["distance_limit"] = 2**62  # none, as in attention
    return lambda_attention(q, k, v, **sizes, **options, return_lse=True)


def results(function: Any, case: Case, dtype: torch.dtype, compute: torch.dtype, table: torch.dtype) -> list[Tensor]:
    """(out, lse, gradients of query, key, value, and of distance_bias and sink_logits where there are some).

    The inputs are rounded to `dtype` and the tables to float32 (float64 for float64); both then go to `function` as
    `compute` and `table`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if function is reference.attention else threads)  # many small operations
    exact_table = F64 if dtype == F64 else F32
    options = case.options(exact_table, exact_table)
    for name, x in options.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            options[name] = x.to(table).requires_grad_(name in TABLES)
    if "rope" in options:
        options["rope"] = tuple(x.to(table) for x in options["rope"])
    inputs = [x.to(compute).requires_grad_() for x in case.inputs(dtype)]
    out, lse = function(*inputs, **options)
    leaves = inputs + [options[name] for name in TABLES if name in options]
    generator = torch.Generator().manual_seed(1)
    draws: list[list[Tensor]] = []
    for _ in range(DRAWS if len(leaves) > 3 else 1):
        weights = [torch.randn(x.shape, generator=generator).to(dtype).to(x.dtype) for x in (out, lse)]
        gradients = torch.autograd.grad((out, lse), leaves, weights, allow_unused=True, retain_graph=True)
        draws.append([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)])
    torch.set_num_threads(threads)
    tables_of_draws = [torch.stack(x) for x in list(zip(*draws, strict=True))[3:]]
    return [out.detach(), lse.detach(), *draws[0][:3], *tables_of_draws]


NAMES = ["out", "lse", "grad_query", "grad_key", "grad_value", "first table's gradient", "second table's gradient"]


@functools.cache
def expected(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The reference's results: in float64, and in plain torch of this dtype."""
    exact = results(reference.attention, case, dtype, F64, F64)
    plain = results(reference.attention, case, dtype, dtype, dtype)
    if dtype in (F16, BF16):
        # Stricter than the rule asks: out is computed in float32 and rounded once, lse is float32.
        out, lse, *_ = results(reference.attention, case, dtype, F32, F32)
        plain[:2] = out.to(dtype), lse
    return exact, plain


def assert_same(actual: tuple[Tensor, ...], expected_ones: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(actual, expected_ones, strict=True))
