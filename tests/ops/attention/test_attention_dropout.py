# SPDX-License-Identifier: Apache-2.0
"""Dropout: Philox's mask as specified, its share and expectation, and the same mask in the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pycore.ops import attention
from pycore.schedules import Causal, Full, Lambda, Segments
from tests.support.attention_inputs import lengths, qkv
from tests.support.tolerance import assert_as_accurate

F64 = torch.float64
SEED = 0x1234567890ABCDEF


def op(
    q: Tensor, k: Tensor, v: Tensor, p: float, seed: int = SEED, schedule: str = "full", numbers: tuple[int, ...] = (),
    **tensors: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch.ops.pycore.attention with a seed that does not change."""
    names = ("rope_cos", "rope_sin", "distance_bias", "alibi_slopes", "sink_logits", "key_starts", "key_lengths",
             "key_offset", "query_lengths", "schedule_tensor")  # fmt: skip
    given = [tensors.get(name) for name in names]
    number = torch.tensor([seed])
    return torch.ops.pycore.attention(
        q, k, v, *given, number, None, "attention", schedule, list(numbers), False, -1, q.shape[3] ** -0.5, 0.0, p
    )


def philox(counter: list[int], key: int) -> list[int]:
    """Philox4x32-10 of one counter, in Python integers. tests/native/philox.cpp has Random123's vectors."""
    low, high = key & 0xFFFFFFFF, key >> 32
    a, b, c, d = counter
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ low, second & 0xFFFFFFFF, first >> 32 ^ d ^ high, first & 0xFFFFFFFF
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def mask_of(out: Tensor) -> Tensor:
    """What is kept, where values are one-hot."""
    return out > 0


def one_hot(batch: int, heads: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Equal scores, and values that show each key's weight in a channel of its own."""
    zeros = torch.zeros(batch, heads, queries, 1), torch.zeros(batch, heads, keys, 1)
    return *zeros, torch.eye(keys).expand(batch, heads, -1, -1)


def test_philox_itself() -> None:
    assert philox([0, 0, 0, 0], 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1, -1], ids=hex)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mask_is_philoxs(p: float, seed: int, isa: str) -> None:
    """Word j % 4 of counter (j / 4, p, head, batch) below p 2^32: dropped. The others are 1 / (1 - p) times larger."""
    batch, heads, length = 2, 3, 70
    out, lse = op(*one_hot(batch, heads, length, length), p, seed)
    key = seed % 2**64
    dropped = torch.zeros(out.shape, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(0, length, 7):
                words = [w for quad in range(length // 4 + 1) for w in philox([quad, i, h, b], key)][:length]
                dropped[b, h, i] = torch.tensor([w < int(p * 2**32) for w in words])
    rows = slice(0, length, 7)
    assert torch.equal(mask_of(out)[:, :, rows], ~dropped[:, :, rows])
    kept = out[mask_of(out)]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p) / length), rtol=1e-6, atol=0)
    # The softmax's sum is taken before anything is dropped.
    torch.testing.assert_close(lse, torch.full_like(lse, length).log(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9])
def test_share_of_dropped(p: float) -> None:
    """Within five standard deviations, whole and for any key, query, head or batch row."""
    out, _ = op(*one_hot(4, 4, 128, 128), p)
    dropped = (~mask_of(out)).double()
    for dims in [(0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3), (2, 3)]:
        share, count = dropped.mean(dim=dims), dropped.numel() / dropped.mean(dim=dims).numel()
        assert bool(((share - p).abs() < 5 * (p * (1 - p) / count) ** 0.5 + 2 / count).all()), dims
    # Neighbours are dropped independently of each other.
    for a, b in [(dropped[..., 1:], dropped[..., :-1]), (dropped[:, :, 1:], dropped[:, :, :-1]),
                 (dropped[:, 1:], dropped[:, :-1]), (dropped[1:], dropped[:-1])]:  # fmt: skip
        assert abs((a * b).mean() - p * p) < 5 * (p * p * (1 - p * p) / a.numel()) ** 0.5 * 2


def test_expectation_is_attention_without() -> None:
    q, k, v = qkv(1, 1, 1, 5, 40, 16)
    exact = attention(q, k, v, schedule=Full())
    draws = torch.stack([op(q, k, v, 0.4, seed)[0] for seed in range(4000)])
    error, deviation = draws.mean(dim=0) - exact, draws.std(dim=0) / 4000**0.5
    assert bool((error.abs() < 5 * deviation).all()) and bool((deviation < 0.02).all())


def test_seeds_and_generators() -> None:
    """torch.manual_seed decides; every call draws anew; no dropout touches no generator."""
    inputs = qkv(1, 2, 1, 30, 40, 16)
    torch.manual_seed(3)
    first, second = attention(*inputs, dropout_p=0.5), attention(*inputs, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(attention(*inputs, dropout_p=0.5), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    attention(*inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(op(*inputs, 0.5, 1)[0], op(*inputs, 0.5, 1 << 32)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("schedule, numbers", [("full", ()), ("causal", ()), ("lambda", (70, 100))])
def test_the_mask_depends_on_positions_alone(
    schedule: str, numbers: tuple[int, ...], dtype: torch.dtype, isa: str, threads: None
) -> None:
    """Chunks, single rows, evicted and padded caches and threads: the same bits."""
    q, k, v = qkv(1, 4, 2, 300, 300, 40, 24, dtype=dtype)

    def run(q: Tensor, k: Tensor, v: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        return op(q, k, v, 0.3, SEED, schedule, numbers, **tensors)

    torch.set_num_threads(1)
    out, lse = run(q, k, v)
    torch.set_num_threads(3)
    assert all(torch.equal(x, y) for x, y in zip(run(q, k, v), (out, lse), strict=True))
    if schedule == "full":
        return
    for start, end in [(0, 97), (97, 98), (98, 257), (257, 300), (299, 300)]:
        part = run(q[:, :, start:end], k[:, :, :end], v[:, :, :end])
        assert torch.equal(part[0], out[:, :, start:end]) and torch.equal(part[1], lse[:, :, start:end])
    pad = [torch.cat([torch.full_like(x[:, :, :9], torch.nan), x], dim=2) for x in (k, v)]
    assert torch.equal(run(q, *pad, key_starts=lengths(9))[0], out)
    if schedule == "lambda":
        k2, v2 = (torch.cat([x[:, :, :70], x[:, :, 180:]], dim=2) for x in (k, v))
        assert torch.equal(run(q[:, :, 280:], k2, v2, key_offset=lengths(110))[0], out[:, :, 280:])


# ---- backward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["out", "both"])
@pytest.mark.parametrize("schedule, numbers", [("full", ()), ("causal", ()), ("lambda", (2, 3))])
def test_gradcheck_with_one_seed(schedule: str, numbers: tuple[int, ...], through: str, threads: None) -> None:
    """Finite differences agree only if the backward pass drops what the forward pass dropped."""
    torch.set_num_threads(1)
    bias, sinks = torch.randn(2, 4, dtype=F64), torch.randn(2, dtype=F64)
    inputs = [x.requires_grad_() for x in (*qkv(2, 2, 1, 6, 9, 4, 3, dtype=F64), bias, sinks)]

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        out, lse = op(q, k, v, 0.4, SEED, schedule, numbers, distance_bias=bias, sink_logits=sinks)
        return (out,) if through == "out" else (out, lse)

    assert torch.autograd.gradcheck(f, inputs)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[3] ** -0.5
    keep = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]) > 0
    return (scores.masked_fill(~keep, -torch.inf).softmax(dim=3) * factor) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_values_and_gradients_with_the_mask(dtype: torch.dtype, isa: str) -> None:
    """Every instruction set, against plain torch in float64 with the mask read off one-hot values."""
    queries, keys = 130, 203
    hot = one_hot(2, 2, queries, keys)
    factor = mask_of(op(*hot, 0.3)[0]).double() / 0.7
    inputs = [x.requires_grad_() for x in qkv(2, 2, 2, queries, keys, 40, 24, dtype=dtype)]
    weights = torch.randn(2, 2, queries, 24).to(dtype)

    def plain(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = masked_attention(*leaves, factor.to(dtype))
        return out.detach(), *torch.autograd.grad(out, leaves, weights.to(dtype))

    out = op(*inputs, 0.3, schedule="causal")[0]
    results = (out.detach(), *torch.autograd.grad(out, inputs, weights))
    for name, x, y, z in zip(("out", "query", "key", "value"), results, plain(F64), plain(dtype), strict=True):
        assert_as_accurate(x, y, z, name)


@pytest.mark.parametrize(
    "options",
    [{"schedule": Causal()}, {"schedule": Lambda(5, 40)}, {"schedule": Segments(lengths(0, 50, 97))}],
    ids=["causal", "lambda", "segments"],
)
def test_gradients_are_linear_in_values(options: dict[str, Any], isa: str) -> None:
    """Out is linear in value: out . w = value . grad_value, with the mask of the call itself."""
    q, k, v = qkv(2, 4, 2, 97, 97, 40, 24)
    v.requires_grad_()
    out = attention(q, k, v, dropout_p=0.5, **options)
    weights = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, v, weights)
    torch.testing.assert_close((out.double() * weights).sum(), (v.double() * grad).sum(), rtol=1e-5, atol=1e-4)
