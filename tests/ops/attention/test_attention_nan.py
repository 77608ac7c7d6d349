# SPDX-License-Identifier: Apache-2.0
"""NaN stays NaN: it reaches every row that keeps it and no other, whatever takes a maximum or a minimum on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pycore.ops import attention
from pycore.reference.attention import keep_mask
from pycore.schedules import Causal, Full, Lambda, Probabilistic, Schedule, Segments
from tests.support.attention_inputs import qkv, tables

F32, F64 = torch.float32, torch.float64
DTYPES = [F32, F64, torch.float16, torch.bfloat16]
HEADS = 4


def options(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    wide = F64 if dtype == F64 else F32
    bias = torch.linspace(-1, 1, HEADS * 150, dtype=wide).view(HEADS, 150)
    return {
        "plain": {},
        "softcap": {"softcap": 7.0},
        "steep-softcap": {"softcap": 0.01},
        "softcap-bias-sinks": {"softcap": 7.0, "distance_bias": bias, "sink_logits": torch.zeros(HEADS, dtype=wide)},
        "high-sinks": {"sink_logits": torch.full([HEADS], 80.0, dtype=wide)},
        "no-sinks": {"sink_logits": torch.full([HEADS], -torch.inf, dtype=wide)},
        "alibi": {"alibi_slopes": torch.linspace(0, 1, HEADS, dtype=wide)},
        "negative-scale": {"scale": -0.3},
        "rope-softcap": {"softcap": 5.0, "rope": tables(214, 16, wide), "distance_limit": 70},
    }


@pytest.mark.parametrize("name", options(F32))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("schedule", "queries", "keys"),
    [
        (Causal(), 150, 150),
        (Lambda(3, 37), 150, 150),
        (Full(), 2, 150),
        (Causal(), 1, 2500),
        (Lambda(70, 60), 5, 150),
    ],
    ids=str,
)
@pytest.mark.parametrize("what", ["key", "query", "value"])
def test_nan_reaches_the_rows_that_keep_it(
    what: str, schedule: Schedule, queries: int, keys: int, dtype: torch.dtype, name: str, isa: str
) -> None:
    """In one channel, of either sign; gradients too."""
    q, k, v = qkv(1, HEADS, 2, queries, keys, 16, dtype=dtype)
    row = {"key": 113, "value": 113, "query": queries // 2}[what]
    bad = torch.tensor(torch.nan, dtype=dtype)
    {"key": k, "value": v, "query": q}[what][0, :, row, 3] = -bad if row % 2 else bad
    p, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None]
    keep = keep_mask(schedule, p, j)
    reached = torch.arange(queries) == row if what == "query" else keep[:, row]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, schedule=schedule, **options(dtype)[name], return_lse=True)
    assert torch.equal(out.isnan().any(-1), reached.expand(1, HEADS, -1))
    assert not out[:, :, ~reached].isinf().any()
    if what != "value":
        assert torch.equal(lse.isnan(), reached.expand(1, HEADS, -1))
    grad_query, grad_key, _ = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert torch.equal(grad_query.isnan().any(-1), reached.expand(1, HEADS, -1))
    assert torch.equal(grad_key.isnan().any(-1), keep[reached].any(0).expand(1, 2, -1))


@pytest.mark.parametrize("count", [37, 40, 150])
@pytest.mark.parametrize("softcap", [0.0, 0.5, 30.0])
def test_as_many_rows_with_softcap_as_without(softcap: float, count: int, isa: str) -> None:
    q, k, v = qkv(1, 2, 1, 150, 150, 24)
    k[0, 0, 150 - count] = torch.nan
    out = attention(q, k, v, softcap=softcap)
    assert out.isnan().all(-1).sum((0, 2)).tolist() == [count, count] and out.isnan().sum() == 2 * count * 24


@pytest.mark.parametrize("which", ["distance_bias", "sink_logits", "alibi_slopes"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_nan_in_a_table(dtype: torch.dtype, softcap: float, which: str, isa: str) -> None:
    """Of one head, and of a bias one distance."""
    q, k, v = qkv(1, 2, 1, 100, 100, 8, dtype=dtype)
    table = torch.zeros(2, 60, dtype=dtype) if which == "distance_bias" else torch.zeros(2, dtype=dtype)
    if which == "distance_bias":
        table[1, 33] = torch.nan
    else:
        table[1] = torch.nan
    out, lse = attention(q, k, v, softcap=softcap, **{which: table}, return_lse=True)
    expected = torch.zeros(1, 2, 100, dtype=torch.bool)
    expected[0, 1, 33 if which == "distance_bias" else 0 :] = True
    assert torch.equal(out.isnan().all(-1), expected) and torch.equal(lse.isnan(), expected)
    assert out[~expected].isfinite().all()


def rows_with_one_key(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x[:, :, :1] for x in qkv(1, 2, 1, 1, 1, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_row_of_nothing_but_nan(softcap: float, dtype: torch.dtype, isa: str) -> None:
    """Also where dropout takes the weight away."""
    q, k, v = rows_with_one_key(dtype)
    for p in (0.0, 0.999):
        out, lse = attention(q, k * torch.nan, v, softcap=softcap, dropout_p=p, return_lse=True)
        assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(
    "schedule", [Probabilistic(torch.ones(1), seed=0, block_size=16), Segments(torch.tensor([0, 40, 150]))]
)
def test_other_schedules(schedule: Schedule, softcap: float, isa: str) -> None:
    q, k, v = qkv(1, 2, 1, 150, 150, 16)
    k[0, 0, 113] = torch.nan
    out = attention(q, k, v, schedule=schedule, softcap=softcap)
    assert torch.equal(out.isnan().all(-1), (torch.arange(150) >= 113).expand(1, 2, -1))
    assert out[:, :, :113].isfinite().all()
