# SPDX-License-Identifier: Apache-2.0
"""Rows and keys that nothing is kept of: out 0, lse -inf and gradients 0, whatever else is in the call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pycore import native
from pycore.ops import attention, lambda_attention
from pycore.ops.attention_middle import merged
from pycore.reference import attention as reference
from pycore.schedules import Causal, Full, KeySubset, Lambda, Schedule
from tests.support.attention_inputs import lengths, qkv, tables

F32, F64, INF = torch.float32, torch.float64, torch.inf
DTYPES = [F32, F64, torch.bfloat16]


def learned(bias: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tables in the dtype that accumulates, as leaves."""
    wide = F64 if dtype == F64 else F32
    given = {"distance_bias": bias, "sink_logits": sinks}
    return {name: x.to(wide, copy=True).requires_grad_() for name, x in given.items() if x is not None}


def results(f: Any, inputs: list[Tensor], options: dict[str, Any], tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Out, lse and all gradients, through both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in zip("qkv", inputs, strict=False)}
    out, lse = f(*leaves.values(), **options, **tables)
    grad_lse = torch.linspace(-1, 1, lse.numel()).view(lse.shape).to(lse.dtype)
    found = torch.autograd.grad((out, lse), [*leaves.values(), *tables.values()], (inputs[3], grad_lse))
    return {"out": out, "lse": lse} | dict(zip((*leaves, *tables), found, strict=True))


def with_lse(*args: Any, **options: Any) -> Any:
    return attention(*args, **options, return_lse=True)


def falls_off(length: int, heads: int, kind: str) -> Tensor:
    """A distance_bias [heads, length] of which some entries are -inf, other ones for each head."""
    bias = torch.linspace(-1, 1, heads * length).view(heads, length).clone()
    if kind == "all":
        bias[0] = -INF
    elif kind == "self":  # the first query, which keeps itself alone, has nothing left
        bias[0, 0] = -INF
    elif kind == "near":  # so have the first 40
        bias[0, :40] = -INF
        bias[1, :7] = -INF
    elif kind == "segment":  # of 1024 keys, between others that have weights
        bias[:, 1000:2100] = -INF
    return bias


CASES: dict[str, dict[str, Any]] = {
    "all": {"shape": (70, 70), "kind": "all"},
    "self": {"shape": (70, 70), "kind": "self"},
    "near": {"shape": (131, 131), "kind": "near", "schedule": Lambda(3, 50)},
    "full": {"shape": (30, 70), "kind": "all", "schedule": Full()},
    "decode": {"shape": (1, 300), "kind": "all"},
    "few": {"shape": (3, 5), "kind": "near"},
    "segment": {"shape": (2, 3000), "kind": "segment"},
    "segments-all": {"shape": (2, 3000), "kind": "all"},
    "rope": {"shape": (70, 70), "kind": "near", "rope": tables(134, 16, F64), "distance_limit": 50},
    "softcap": {"shape": (70, 70), "kind": "near", "softcap": 3.0},
    "subset": {"shape": (70, 131), "kind": "all", "schedule": KeySubset(lengths(0, 64, 65, 100, 130))},
    "lengths": {
        "shape": (30, 70), "kind": "near", "key_starts": lengths(3), "key_lengths": lengths(33),
        "query_lengths": lengths(29), "key_offset": lengths(2),
    },
}  # fmt: skip
SINKS = {"no-sinks": None, "sinks": [0.5, 2.0, -INF, -INF], "no-sink-at-all": [-INF] * 4}


@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_logits_of_minus_infinity(dtype: torch.dtype, name: str, sinks: str, isa: str, threads: None) -> None:
    """As the reference in float64 has it; rows without weights give nothing, whatever their gradients are."""
    case = dict(CASES[name])
    (queries, keys), kind = case.pop("shape"), case.pop("kind")
    inputs = [*qkv(1, 4, 2, queries, keys, 16, dtype=dtype), torch.randn(1, 4, queries, 16).to(dtype)]
    bias = falls_off(keys, 4, kind)
    logits = None if SINKS[sinks] is None else torch.tensor(SINKS[sinks])
    expected = results(reference.attention, [x.double() for x in inputs], case, learned(bias, logits, F64))
    empty = expected["lse"] == -INF
    assert sinks == "sinks" or name == "segment" or empty.any()
    inputs[3][empty] = torch.nan
    if "rope" in case and dtype != F64:
        case["rope"] = tuple(x.float() for x in case["rope"])
    actual = results(with_lse, inputs, case, learned(bias, logits, dtype))
    assert actual["out"][empty].count_nonzero() == 0 and actual["q"][empty].count_nonzero() == 0
    for what, x in actual.items():
        tolerance = 1e-9 if dtype == F64 else 3e-2 if dtype == torch.bfloat16 else 2e-5
        assert torch.equal(x == -INF, expected[what] == -INF), what
        torch.testing.assert_close(
            x.double(), expected[what], rtol=tolerance, atol=tolerance, msg=lambda m, w=what: w + m
        )


@pytest.fixture(params=[1, 3], ids=["thread", "threads"])
def threads(request: Any) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("sink", [-INF, 1.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("schedule", [Causal(), Lambda(1, 1), Full()], ids=str)
def test_a_query_before_the_first_key(schedule: Schedule, dtype: torch.dtype, sink: float, isa: str) -> None:
    """One key and two queries: the first keeps none but under Full, and a sink of -inf is none either."""
    inputs = [*qkv(1, 2, 1, 2, 3, 8, dtype=dtype), torch.ones(1, 2, 2, 8, dtype=dtype)]
    tables = learned(torch.zeros(2, 3), torch.full([2], sink), dtype)
    found = results(with_lse, inputs, {"schedule": schedule, "key_lengths": lengths(1)}, tables)
    first = found["lse"][:, :, 0]
    assert torch.equal(first, torch.full_like(first, sink)) or isinstance(schedule, Full)
    if not isinstance(schedule, Full):
        assert found["out"][:, :, 0].count_nonzero() == 0 and found["q"][:, :, 0].count_nonzero() == 0
    if sink == -INF:
        # One key has all the weight.
        torch.testing.assert_close(found["out"][0, :, 1], inputs[2][0, :, 0].expand(2, 8), rtol=0, atol=0)
        assert found["sink_logits"].count_nonzero() == 0
    assert all(x.isfinite().all() for name, x in found.items() if name != "lse")


def test_with_dropout(isa: str) -> None:
    """A row without weights has none to drop; the others' gradients are finite, and as many weights are dropped."""
    inputs = [*qkv(2, 4, 2, 131, 131, 16), torch.randn(2, 4, 131, 16)]
    tables = learned(falls_off(131, 4, "near"), torch.full([4], -INF), F32)
    found = results(with_lse, inputs, {"dropout_p": 0.4}, tables)
    empty = found["lse"] == -INF
    assert torch.equal(empty.sum((0, 2)), torch.tensor([80, 14, 0, 0]))
    assert found["out"][empty].count_nonzero() == 0 and found["q"][empty].count_nonzero() == 0
    assert all(x.isfinite().all() for name, x in found.items() if name != "lse")


@pytest.mark.parametrize("given", [False, True], ids=["lse", "lse-and-low"])
def test_native(given: bool, isa: str) -> None:
    q, k, v, grad_out = (x.numpy() for x in (*qkv(1, 4, 2, 70, 70, 8), torch.randn(1, 4, 70, 8)))
    tables = {"distance_bias": falls_off(70, 4, "near").numpy(), "sink_logits": np.full(4, -np.inf, np.float32)}
    low = {"lse_low": np.full((1, 4, 70), np.nan, np.float32)} if given else {}
    out, lse = native.attention(q, k, v, **tables, **low)
    empty = np.isneginf(lse)
    assert empty.sum((0, 2)).tolist() == [40, 7, 0, 0] and not out[empty].any()
    assert not given or (low["lse_low"][empty] == 0).all()
    grad_out[empty] = np.nan
    grads = native.attention_backward(grad_out, None, out, lse, q, k, v, **tables, **low)
    assert all(np.isfinite(x).all() for x in grads) and not grads[0][empty].any()


def test_merged_rows_without_weights() -> None:
    """Of two sets of keys of which neither has a weight."""
    parts = [[torch.zeros(1, 2, 1, 4), torch.full((1, 2, 1), -INF)] for _ in range(2)]
    parts[0][1][0, 1] = 0.25
    parts[0][0][0, 1] = 1.0
    leaves = [x.requires_grad_() for part in parts for x in part]
    out, lse = merged(*(tuple(part) for part in parts))
    assert torch.equal(lse, torch.tensor([[[-INF], [0.25]]])) and torch.equal(out[0, :, 0, 0], torch.tensor([0.0, 1.0]))
    found = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    assert all(x.isfinite().all() for x in found)
    assert torch.equal(found[1], torch.tensor([[[0.0], [1.0]]])) and found[3].count_nonzero() == 0


def test_middle_tokens_of_rows_without_weights(isa: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 2, 1, 200, 16))
    bias = falls_off(200, 4, "all").requires_grad_()
    out, lse = lambda_attention(
        q, k, v, sink_size=2, window_size=20, distance_bias=bias, middle_topk=5, return_lse=True
    )  # fmt: skip
    assert torch.equal(lse[0, :, 0] == -INF, torch.tensor([True, False, False, False]))
    assert out[0, 0].count_nonzero() == 0
    found = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert all(x.isfinite().all() for x in found) and found[0][0, 0].count_nonzero() == 0


# ---- gradients of what nothing visits ------------------------------------------------------------------------------


def poisoned(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return np.full(shape, np.nan, dtype)


EMPTY = {
    "no-heads": ((1, 0, 4, 8), (1, 2, 70, 8), {"key_lengths": [3]}),
    "no-heads-long": ((2, 0, 4, 8), (2, 1, 200, 8), {}),
    "no-queries": ((2, 4, 0, 8), (2, 2, 70, 8), {"key_lengths": [3, 70]}),
    "no-keys": ((2, 4, 5, 8), (2, 2, 0, 8), {}),
    "no-batch": ((0, 4, 5, 8), (0, 2, 70, 8), {}),
    "no-valid-keys": ((2, 4, 5, 8), (2, 2, 70, 8), {"key_lengths": [0, 9], "key_starts": [0, 9]}),
    "no-valid-queries": ((2, 4, 5, 8), (2, 2, 70, 8), {"query_lengths": [0, 0]}),
    "some": ((2, 4, 5, 8), (2, 2, 200, 8), {"key_starts": [70, 3], "key_lengths": [150, 4], "query_lengths": [2, 5]}),
    "ragged-window": ((1, 4, 2, 8), (1, 2, 300, 8), {"schedule": "lambda", "schedule_args": [3, 9]}),
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", EMPTY)
def test_every_gradient_is_written(name: str, dtype: Any, threads: int, isa: str) -> None:
    """Into arrays of NaN: rows that no query visits, and all where there are no queries, heads or keys, get zeros."""
    shape, key_shape, options = EMPTY[name]
    options = {n: np.array(x, np.int64) if n.endswith(("s", "starts")) and n != "schedule_args" else x
               for n, x in options.items()}  # fmt: skip
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s).astype(dtype) for s in (shape, key_shape, (*key_shape[:3], 6)))
    heads = shape[1]
    into = {"grad_query": poisoned(q.shape, dtype), "grad_key": poisoned(k.shape, dtype)}
    into["grad_value"] = poisoned(v.shape, dtype)
    if heads:
        options |= {"distance_bias": np.zeros((heads, 7), dtype), "sink_logits": np.zeros(heads, dtype)}
        into |= {"grad_bias": poisoned((heads, 7), dtype), "grad_sink_logits": poisoned((heads,), dtype)}
    out, lse = native.attention(q, k, v, **options)
    native.attention_backward(np.ones_like(out), None, out, lse, q, k, v, **options, **into, threads=threads)
    for what, x in into.items():
        assert np.isfinite(x).all(), what
    starts, ends = (options.get(n, np.full(shape[0], d)) for n, d in (("key_starts", 0), ("key_lengths", key_shape[2])))
    for b in range(shape[0]):
        outside = np.ones(key_shape[2], bool)
        outside[starts[b] : ends[b]] = False
        assert not into["grad_key"][b, :, outside].any() and not into["grad_value"][b, :, outside].any()
    if not np.prod(shape[:3]) or name == "no-valid-queries":
        assert not any(x.any() for x in into.values())


@pytest.mark.parametrize("dtype", [F32, F64, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(1, 0, 4), (1, 4, 0), (0, 4, 4)], ids=str)
def test_gradients_of_keys_without_queries(shape: tuple[int, int, int], dtype: torch.dtype, isa: str) -> None:
    """Through torch, whose allocator hands out memory that was used before."""
    batch, heads, queries = shape
    torch.full((1 << 16,), 3.14, dtype=F64)  # freed at once
    query = torch.randn(batch, heads, queries, 8, dtype=dtype).requires_grad_()
    key, value = (torch.randn(batch, 2, 70, 8, dtype=dtype).requires_grad_() for _ in range(2))
    key_lengths = torch.full((batch,), 3, dtype=torch.int64)
    attention(query, key, value, key_lengths=key_lengths).sum().backward()
    assert key.grad.count_nonzero() == 0 and value.grad.count_nonzero() == 0
