# SPDX-License-Identifier: Apache-2.0
"""A call leaves nothing behind: after thousands of them as many bytes are in use as before.

A few dozen bytes a call are soon hundreds of megabytes, because they lie where a freed tensor would have to fit again.
Torch hands texts, lists and optional arguments over on the heap: each op with a text is called, and most others.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pycore import KVCache, LambdaKVCache, Staircase, StaircaseKVCache, ops
from pycore.schedules import Geometric, Probabilistic

SCHEMAS = Path(__file__).parent / "schemas.txt"
ROUNDS = 300
FEW = 4.0  # bytes a call that are none: less than any text takes

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone says how many bytes are in use")


class _Usage(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def in_use() -> int:
    """Bytes of the main heap and of its maps."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _Usage
    usage = libc.mallinfo2()
    return int(usage.uordblks + usage.hblkhd)


def growth(call: Callable[[], Any]) -> float:
    """Bytes a call. The smallest of three, if not a few at once: what a pool or a cache takes once is none."""
    found: list[float] = []
    while len(found) < 3 and min(found, default=FEW) >= FEW:
        for _ in range(20):
            call()
        gc.collect()
        before = in_use()
        for _ in range(ROUNDS):
            call()
        gc.collect()
        found.append((in_use() - before) / ROUNDS)
    return min(found)


@pytest.fixture(autouse=True)
def small_heap() -> Iterator[None]:
    """What the tests before this one have left is no garbage of ours, and takes seconds to look through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def calls() -> dict[str, Callable[[], Any]]:
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    q, x, y, codebook = randn(1, 2, 70, 8), randn(5, 16), randn(8, 16), randn(4, 8, 16)
    learned, gate, targets = q.clone().requires_grad_(), x.clone().requires_grad_(), torch.arange(5)
    lengths, cdf = torch.tensor([60]), torch.arange(0, 65537, 8192, dtype=torch.int32)
    symbols = torch.randint(0, 8, (2, 20), generator=draw)
    grid = ops.staircase_quantize(q, bits=4, group_size=8, dim=-1)
    stream = ops.ac_encode(symbols, cdf)
    caches = [
        KVCache(),
        LambdaKVCache(4, 16),
        StaircaseKVCache(Staircase(rollback=64), batch=1, kv_heads=2, head_dim=8, dtype=torch.float32),
    ]
    for cache in caches:
        cache.append(q, q)
    one = q[:, :, :1]

    def turn(cache: Any) -> None:
        cache.append(one, one)
        cache.attend(one)
        cache.crop(1)

    def backward(make: Callable[[], torch.Tensor], of: torch.Tensor) -> None:
        of.grad = None
        make().sum().backward()

    return {
        "attention": lambda: ops.attention(q, q, q, key_lengths=lengths, return_lse=True),
        "attention, backward": lambda: backward(lambda: ops.attention(learned, q, q), learned),
        "lambda_attention": lambda: ops.lambda_attention(q, q, q, sink_size=2, window_size=8),
        "pr_flash_attention": lambda: ops.attention(q, q, q, schedule=Probabilistic(Geometric(0.5), seed=0)),
        "KVCache": lambda: turn(caches[0]),
        "KVCache, one call": lambda: (caches[0].append_and_attend(one, one, one), caches[0].crop(1)),
        "LambdaKVCache": lambda: caches[1].append_and_attend(one, one, one),
        "LambdaKVCache, two calls": lambda: (caches[1].append(one, one), caches[1].attend(one)),
        "StaircaseKVCache": lambda: turn(caches[2]),
        "StaircaseKVCache.keys": lambda: caches[2].keys(),
        "staircase_quantize": lambda: ops.staircase_quantize(q, bits=4, group_size=8, dim=-1),
        "staircase_dequantize": lambda: ops.staircase_dequantize(*grid, bits=4, group_size=8, dim=-1),
        "gelu_mul, backward": lambda: backward(lambda: ops.gelu_mul(gate, x), gate),
        "invariant_linear, backward": lambda: backward(lambda: ops.invariant_linear(gate, y), gate),
        "layer_norm": lambda: ops.layer_norm(x),
        "pairwise_logsumexp, backward": lambda: backward(lambda: ops.pairwise_logsumexp(gate, y), gate),
        "pairwise_topk": lambda: ops.pairwise_topk(x, y, 2),
        "linear_cross_entropy": lambda: backward(lambda: ops.linear_cross_entropy(gate, y, targets), gate),
        "contrastive_loss": lambda: backward(lambda: ops.contrastive_loss(gate, x, scale=1.0), gate),
        "maxsim": lambda: ops.maxsim(q[:, 0], q[:, 0]),
        "vq_encode": lambda: ops.vq_encode(x, y),
        "rvq_encode": lambda: ops.rvq_encode(x, codebook),
        "ac_encode": lambda: ops.ac_encode(symbols, cdf),
        "ac_decode": lambda: ops.ac_decode(stream, cdf),
        "ac_encode_logits": lambda: ops.ac_encode_logits(targets[None], x[None, :, :8]),
        "quantize_cdf": lambda: ops.quantize_cdf(torch.full((5, 8), 0.125)),
    }


def test_calls_leave_nothing() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # workers have heaps of their own
    try:
        found = {name: growth(call) for name, call in calls().items()}
    finally:
        torch.set_num_threads(threads)
    assert {name: bytes_ for name, bytes_ in found.items() if bytes_ >= FEW} == {}


def test_a_leak_is_seen() -> None:
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype = ctypes.c_void_p
    assert growth(lambda: libc.malloc(40)) >= 40


def test_every_op_with_text_is_called() -> None:
    seen: set[str] = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(str(func.overloadpacket).replace(".", "::"))
            return func(*args, **(kwargs or {}))

    with Seen():
        for call in calls().values():
            call()
    lines = SCHEMAS.read_text().splitlines()
    wanted = {line.split("(")[0] for line in lines if line.startswith("pycore::") and re.search(r"\bstr ", line)}
    assert len(wanted) > 10
    assert wanted <= seen
