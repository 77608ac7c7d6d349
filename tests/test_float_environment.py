# SPDX-License-Identifier: Apache-2.0
"""Bits do not depend on the floating-point environment of the thread that calls, and it gets its own back.

A caller may flush subnormal numbers or round otherwise; a pool's threads do neither. Each call is made once as ever,
and then in each environment on one thread and on several; inputs are small enough for their products to be subnormal.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from pycore import native, ops, schedules

LIBM = ctypes.CDLL("libm.so.6")
ROUNDING = {"upward": 0x800, "downward": 0x400, "towards zero": 0xC00}  # fenv.h on x86-64
ALL_FLAGS, INEXACT, DIVIDE = 0x3D, 0x20, 0x04


@contextmanager
def environment(name: str) -> Iterator[None]:
    try:
        if name == "flush":
            torch.set_flush_denormal(True)
        else:
            assert LIBM.fesetround(ROUNDING[name]) == 0
        yield
    finally:
        torch.set_flush_denormal(False)
        LIBM.fesetround(0)


def tiny(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of all sizes down to subnormal ones, and products of two that are."""
    size = {torch.float16: 2.0**-12, torch.bfloat16: 2.0**-66, torch.float32: 2.0**-66, torch.float64: 2.0**-515}
    x = torch.randn(shape, dtype=torch.float64) * torch.where(torch.rand(shape) < 0.3, size[dtype] ** 2, size[dtype])
    return x.to(dtype)


def attention_of(dtype: torch.dtype, queries: int, **options: object) -> Callable[[int], list[Tensor]]:
    q, k = tiny(2, 4, queries, 24, dtype=dtype), torch.randn(2, 2, 1100, 24).to(dtype)
    v = tiny(2, 2, 1100, 24, dtype=dtype)

    def call(threads: int) -> list[Tensor]:
        out, lse = ops.attention(q, k, v, return_lse=True, **options)
        faces = native.attention(
            q, k, v, threads=threads, out=torch.empty_like(q), scale=24**-0.5, softcap=options.get("softcap", 0.0)
        )
        return [out, lse, faces[0]]

    return call


def backward_of(dtype: torch.dtype) -> Callable[[int], list[Tensor]]:
    q, k, v = (tiny(1, 4, 150, 24, dtype=dtype), torch.randn(1, 2, 150, 24).to(dtype), tiny(1, 2, 150, 24, dtype=dtype))
    bias, sinks, grad = torch.randn(4, 80, dtype=dtype), torch.randn(4, dtype=dtype), tiny(1, 4, 150, 24, dtype=dtype)

    def call(threads: int) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v, bias, sinks)]
        out = ops.attention(*leaves[:3], distance_bias=leaves[3], sink_logits=leaves[4], softcap=5.0)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return call


def linear_of(dtype: torch.dtype) -> Callable[[int], list[Tensor]]:
    x, weight, bias = tiny(300, 70, dtype=dtype), tiny(90, 70, dtype=dtype), tiny(90, dtype=dtype)
    grad, scale = tiny(300, 90, dtype=dtype), torch.randn(70, dtype=dtype)

    def call(threads: int) -> list[Tensor]:
        results = [ops.invariant_linear(x, weight, bias), ops.rms_norm(x, scale, eps=0.0)]
        results += torch.ops.pycore.invariant_linear_backward(grad, x, weight, True, True, True)
        results += torch.ops.pycore.rms_norm_backward(grad[:, :70], x, scale, 1e-30, True, True)
        results.append(ops.layer_norm(x, scale, scale, eps=0.0))
        results += torch.ops.pycore.layer_norm_backward(grad[:, :70], x, scale, 1e-30, True, True, True)
        results += [ops.silu_mul(x, grad[:, :70]), ops.gelu_mul(x, grad[:, :70])]
        out = torch.empty(300, 90, dtype=dtype)
        native.invariant_linear(x, weight, bias, out=out, threads=threads)
        return [*results, out]

    return call


def coder_of(dtype: torch.dtype) -> Callable[[int], list[Tensor]]:
    # Rows whose largest entry is subnormal, in half precision too, and rows of logits between two points of the grid.
    smallest = torch.finfo(dtype).smallest_normal / 64
    probs = (torch.randint(1, 60, (700, 50), dtype=torch.float64) * smallest).to(dtype)
    logits = (torch.randn(700, 50, dtype=torch.float64) * 8).to(dtype)
    symbols = torch.randint(50, (7, 100))

    def call(threads: int) -> list[Tensor]:
        streams = ops.ac_encode_logits(symbols, logits.view(7, 100, 50))
        assert torch.equal(ops.ac_decode_logits(streams, logits.view(7, 100, 50)), symbols)
        sums, faults = native.window_counts(probs, threads=threads)
        return [
            *(ops.quantize_cdf(probs), ops.quantize_cdf(logits=logits), streams.data),
            *(torch.from_numpy(sums), torch.from_numpy(faults)),
            torch.from_numpy(native.quantize_cdf(probs, threads=threads)),
        ]

    return call


def blocks_of(family: str, parameter: float) -> Callable[[int], list[Tensor]]:
    seed, round_ = np.array([5]), np.array(0)

    def call(threads: int) -> list[Tensor]:
        results: list[Tensor] = []
        for rows in (None, 3):
            drawn = native.attention_blocks(
                seed=seed, round=round_, batch=1, heads=2, query_length=3000, key_length=3000, family=family,
                parameter=parameter, wide=True, correction="none" if rows else "importance", blocks_per_row=rows,
                threads=threads,
            )  # fmt: skip
            results += map(torch.from_numpy, drawn)
        return results

    return call


def thresholds() -> Callable[[int], list[Tensor]]:
    # A probability that is subnormal still draws a block now and then: its threshold is 1 and not 0.
    probs = torch.full((40,), 2.0**-1070, dtype=torch.float64)

    def call(threads: int) -> list[Tensor]:
        return [ops.pr_block_mask(batch=1, heads=64, query_blocks=40, key_blocks=40, distance_probs=probs, seed=1)]

    return call


CALLS: dict[str, Callable[[], Callable[[int], list[Tensor]]]] = {
    "attention float32": lambda: attention_of(torch.float32, 130),
    "attention float64": lambda: attention_of(torch.float64, 130),
    "attention float16": lambda: attention_of(torch.float16, 130),
    "attention bfloat16": lambda: attention_of(torch.bfloat16, 130),
    "decode float32": lambda: attention_of(torch.float32, 1),
    "decode float16": lambda: attention_of(torch.float16, 1, softcap=3.0),
    "backward float32": lambda: backward_of(torch.float32),
    "backward float64": lambda: backward_of(torch.float64),
    "linear float32": lambda: linear_of(torch.float32),
    "linear float64": lambda: linear_of(torch.float64),
    "linear float16": lambda: linear_of(torch.float16),
    "linear bfloat16": lambda: linear_of(torch.bfloat16),
    "coder float16": lambda: coder_of(torch.float16),
    "coder bfloat16": lambda: coder_of(torch.bfloat16),
    "coder float32": lambda: coder_of(torch.float32),
    "coder float64": lambda: coder_of(torch.float64),
    "blocks geometric": lambda: blocks_of("geometric", 0.83),
    "blocks power law": lambda: blocks_of("power_law", 0.7),
    "blocks gaussian": lambda: blocks_of("gaussian", 9.1),
    "thresholds": thresholds,
}


def bits(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, 1).clone().view(torch.uint8)


@pytest.mark.parametrize("mode", ["flush", *ROUNDING])
@pytest.mark.parametrize("name", CALLS)
def test_bits(isa: str, threads: None, name: str, mode: str) -> None:
    call = CALLS[name]()
    torch.set_num_threads(1)
    expected = call(1)
    for count in (1, 3):
        torch.set_num_threads(count)
        with environment(mode):
            given = call(count)
        for i, (x, y) in enumerate(zip(given, expected, strict=True)):
            assert torch.equal(bits(x), bits(y)), f"result {i} on {count} threads"


def test_such_inputs_show_it() -> None:
    """The test above can fail: what torch computes itself depends on the environment."""
    x, weight = tiny(300, 70), tiny(90, 70)
    before = x @ weight.T
    for mode in ("flush", "upward"):
        with environment(mode):
            after = x @ weight.T
        assert not torch.equal(before, after)


def test_the_caller_keeps_its_environment(threads: None) -> None:
    torch.set_num_threads(2)
    call = CALLS["attention float32"]()
    for mode, value in ROUNDING.items():
        with environment(mode):
            call(2)
            assert LIBM.fegetround() == value
    with environment("flush"):
        call(2)
        assert 5e-324 * float("1") == 0.0
    assert 5e-324 * float("1") == 5e-324
    # The flags are those that the caller raised: division by zero, and nothing that the kernel rounded or overflowed.
    call(2)
    q = torch.randn(1, 1, 100, 8)
    out = torch.empty_like(q).numpy()
    for raised in (0, DIVIDE):
        LIBM.feclearexcept(ALL_FLAGS)
        LIBM.feraiseexcept(raised)
        native.attention(q, q, q, out=out, scale=0.3, threads=1)
        assert LIBM.fetestexcept(ALL_FLAGS) == raised


def test_an_error_gives_the_environment_back() -> None:
    q = torch.randn(1, 1, 8, 8)
    with environment("upward"):
        with pytest.raises(ValueError, match="^attention: softcap is"):
            ops.attention(q, q, q, softcap=-1.0)
        with pytest.raises(ValueError, match="^attention: softcap is"):
            native.attention(q, q, q, softcap=-1.0)
        assert LIBM.fegetround() == ROUNDING["upward"]


def test_streams_of_half_precision(threads: None) -> None:
    """What was seen first: rows of subnormal halves, coded on one thread and decoded on another."""
    probs = (torch.randint(1, 60, (512, 20)).double() * 2.0**-24).half()
    cdf, symbols = ops.quantize_cdf(probs), torch.randint(20, (1, 512))
    torch.set_num_threads(4)
    with environment("flush"):
        for _ in range(20):
            assert torch.equal(ops.quantize_cdf(probs), cdf)
        streams = ops.ac_encode(symbols, ops.quantize_cdf(probs))
    assert torch.equal(ops.ac_decode(streams, cdf), symbols)


def test_schedules_have_no_part_in_it() -> None:
    q, k, v = tiny(1, 2, 90, 24), torch.randn(1, 2, 90, 24), tiny(1, 2, 90, 24)
    for schedule in (schedules.Full(), schedules.Lambda(3, 20), schedules.Prefix(torch.tensor([30]))):
        expected = ops.attention(q, k, v, schedule=schedule)
        for mode in ("flush", *ROUNDING):
            with environment(mode):
                assert torch.equal(ops.attention(q, k, v, schedule=schedule), expected)
