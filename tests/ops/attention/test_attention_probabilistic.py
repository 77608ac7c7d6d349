# SPDX-License-Identifier: Apache-2.0
"""`pr_flash_attention`: values and gradients against the reference, the same bits, and what is never read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import pycore
from pycore import native
from pycore.ops import attention, lambda_attention, pr_flash_attention
from pycore.reference import attention as reference
from pycore.schedules import Causal, Constant, Gaussian, Geometric, Harmonic, PowerLaw, Probabilistic
from tests.support.attention_inputs import lengths, qkv, tables
from tests.support.tolerance import assert_as_accurate

F32, F64 = torch.float32, torch.float64
BIAS, SINKS, SLOPES = torch.linspace(-1, 1, 48).view(4, 12), torch.tensor([0.5, -1.0, 3.0, 0.0]), torch.rand(4)
ROUND = {"distance_probs": Harmonic(1.5), "seed": 7, "round": 3}

# Query and key length, then what makes the round.
CASES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "plain": (339, 339, {}, {}),
    "sinks": (200, 200, {"sink_size": 5}, {}),
    "blocks-of-16": (113, 130, {"block_size": 16, "sink_size": 3}, {}),
    "blocks-of-32": (97, 97, {"block_size": 32}, {}),
    "blocks-of-256": (300, 700, {"block_size": 256}, {}),
    "one-query": (1, 1025, {"sink_size": 1}, {}),
    "more-queries-than-keys": (130, 97, {"block_size": 16, "sink_size": 17}, {}),
    "no-window": (200, 200, {"window_blocks": 0, "block_size": 16}, {}),
    "window-of-3": (200, 200, {"window_blocks": 3, "block_size": 16}, {}),
    "diagonal": (200, 230, {"pattern": "diagonal", "block_size": 16}, {}),
    "importance": (200, 230, {"correction": "importance", "block_size": 16, "sink_size": 20, "window_blocks": 2}, {}),
    "importance-of-heads": (
        150, 150,
        {"correction": "importance", "distance_probs": torch.rand(4, 3, generator=torch.Generator().manual_seed(3))},
        {},
    ),
    "importance-diagonal-softcap-bias": (
        130, 130, {"correction": "importance", "pattern": "diagonal", "block_size": 16},
        {"softcap": 4.0, "distance_bias": BIAS},
    ),
    "per-row": (200, 200, {"blocks_per_row": 2, "block_size": 16}, {}),
    "per-row-diagonal": (200, 200, {"blocks_per_row": 3, "block_size": 16, "pattern": "diagonal"}, {}),
    "rope-limit": (200, 230, {"sink_size": 70}, {"rope": tables(300, 16), "distance_limit": 90}),
    "sink-logits": (130, 130, {"block_size": 16}, {"sink_logits": SINKS, "alibi_slopes": SLOPES}),
    "lengths": (
        130, 150, {"block_size": 16, "sink_size": 3, "seed": lengths(1, 2**62 + 9)},
        {"key_starts": lengths(0, 17), "key_lengths": lengths(140, 150), "query_lengths": lengths(130, 40)},
    ),
    "evicted": (40, 100, {"block_size": 16, "sink_size": 9}, {"key_offset": lengths(1000, 37)}),
}  # fmt: skip
FAMILIES = [Geometric(0.7), PowerLaw(0.5), Harmonic(2), Gaussian(2.5), Constant(0.4), torch.linspace(1, 0, 5)]


def cast(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The floating-point tables of the call in another dtype."""
    tables = {}
    for name, x in options.items():
        if isinstance(x, tuple):
            tables[name] = tuple(t.to(dtype) for t in x)
        else:
            tables[name] = x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
    return tables


def from_reference(inputs: tuple[Tensor, ...], weights: Tensor, made: dict[str, Any], options: dict[str, Any]) -> Any:
    """out, lse and the gradients of the reference, in the dtype of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = reference.attention(*leaves, schedule=Probabilistic(**made), **cast(options, inputs[0].dtype))
    return out, lse, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("isa")
def test_values_and_gradients(name: str) -> None:
    query_length, key_length, made, options = CASES[name]
    made = ROUND | made
    inputs = qkv(2, 4, 2, query_length, key_length, 40, 24)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, lse = pr_flash_attention(*leaves, **made, **options, return_lse=True)
    weights = torch.randn_like(out)
    actual = (out, lse, *torch.autograd.grad((out * weights).sum(), leaves))
    exact = from_reference(tuple(x.double() for x in inputs), weights, made, options)
    plain = from_reference(inputs, weights, made, options)
    for what, x, y, z in zip(("out", "lse", "query", "key", "value"), actual, exact, plain, strict=True):
        assert_as_accurate(x, y, z, what)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.usefixtures("isa")
def test_families_in_16_bits(family: Any, dtype: torch.dtype) -> None:
    made = {"distance_probs": family, "seed": 1, "block_size": 16, "sink_size": 1}
    inputs = qkv(1, 2, 1, 111, 111, 32, dtype=dtype)
    out = pr_flash_attention(*inputs, **made)
    exact, _ = reference.attention(*(x.double() for x in inputs), schedule=Probabilistic(**made))
    plain, _ = reference.attention(*inputs, schedule=Probabilistic(**made))
    assert_as_accurate(out, exact, plain)


GRADCHECK = {
    "sinks": {"sink_size": 2},
    "importance": {"correction": "importance", "sink_size": 2},
    "diagonal": {"pattern": "diagonal", "window_blocks": 2},
    "per-row": {"blocks_per_row": 2},
}


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name: str) -> None:
    made = ROUND | {"block_size": 16} | GRADCHECK[name]
    inputs = [x.requires_grad_() for x in qkv(2, 2, 1, 40, 50, 4, 3, dtype=F64)]
    bias, sinks = torch.randn(2, 30, dtype=F64).requires_grad_(), torch.randn(2, dtype=F64).requires_grad_()

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Any:
        return pr_flash_attention(q, k, v, **made, distance_bias=bias, sink_logits=sinks, softcap=3.0, return_lse=True)

    assert torch.autograd.gradcheck(f, (*inputs, bias, sinks), fast_mode=True)


# ---- the same bits -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa")
def test_probability_one_is_causal_attention() -> None:
    results = []
    for f in (lambda *x: pr_flash_attention(*x, distance_probs=Constant(1), seed=0), attention):
        torch.manual_seed(0)
        leaves = [x.requires_grad_() for x in qkv(1, 4, 2, 339, 339, 40)]
        out = f(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.usefixtures("isa")
def test_probability_zero_is_a_window_of_blocks() -> None:
    """Sinks and the query's own block; for queries at a block's end that is Λ's window."""
    inputs = qkv(1, 2, 2, 256, 256, 32)
    out = pr_flash_attention(*inputs, distance_probs=Constant(0), seed=0, sink_size=3)
    window = lambda_attention(*inputs, sink_size=3, window_size=64, distance_limit=2**62)
    assert torch.equal(out[:, :, 63::64], window[:, :, 63::64])
    assert not torch.equal(out, window)


@pytest.mark.parametrize("name", ["plain", "importance", "per-row", "diagonal"])
@pytest.mark.usefixtures("isa")
def test_chunks_batches_and_single_queries_have_the_same_bits(name: str) -> None:
    _, _, made, options = CASES[name]
    made = ROUND | made
    q, k, v = qkv(3, 4, 2, 230, 230, 32)
    whole = pr_flash_attention(q, k, v, **made, **options)
    for b in range(3):
        alone = pr_flash_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], **made, **options)
        assert torch.equal(alone, whole[b : b + 1])
    for first, last in ((0, 50), (50, 51), (51, 200), (200, 230)):
        chunk = pr_flash_attention(q[:, :, first:last], k[:, :, :last], v[:, :, :last], **made, **options)
        assert torch.equal(chunk, whole[:, :, first:last])


def test_seeds_belong_to_rows() -> None:
    """A row's blocks follow from its seed, wherever it stands in the batch, and padding does not matter."""
    made = ROUND | {"block_size": 16, "sink_size": 1}
    q, k, v = (x.expand(3, -1, -1, -1) for x in qkv(1, 2, 1, 150, 150, 16))
    out = pr_flash_attention(q, k, v, **made | {"seed": lengths(4, 5, 4)})
    assert torch.equal(out[0], out[2]) and not torch.equal(out[0], out[1])
    assert torch.equal(out[1:2], pr_flash_attention(q[:1], k[:1], v[:1], **made | {"seed": 5}))
    padded_key, padded_value = (torch.cat([torch.full_like(x[:1, :, :9], torch.nan), x[:1]], dim=2) for x in (k, v))
    padded = pr_flash_attention(q[:1], padded_key, padded_value, **made | {"seed": 4}, key_starts=lengths(9))
    assert torch.equal(padded, out[:1])


@pytest.mark.usefixtures("isa", "threads")
def test_threads_do_not_matter() -> None:
    results = []
    for threads in (1, 3, 16):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        leaves = [x.requires_grad_() for x in qkv(1, 4, 2, 500, 500, 32)]
        out = pr_flash_attention(*leaves, **ROUND, correction="importance", distance_bias=BIAS)
        step = pr_flash_attention(
            leaves[0][:, :, -1:], *leaves[1:], **ROUND, correction="importance", distance_bias=BIAS
        )
        assert torch.equal(step, out[:, :, -1:])
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_dropout_is_that_of_attention() -> None:
    results = []
    for f in (lambda *x: pr_flash_attention(*x, distance_probs=Constant(1), seed=0, dropout_p=0.3),
              lambda *x: attention(*x, dropout_p=0.3)):  # fmt: skip
        torch.manual_seed(0)
        leaves = [x.requires_grad_() for x in qkv(1, 2, 1, 100, 100, 16)]
        out = f(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


# ---- what takes no part --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("pattern", ["independent", "diagonal"])
@pytest.mark.usefixtures("isa")
def test_poison_in_blocks_that_take_no_part(block_size: int, pattern: str) -> None:
    """NaN in all that some row does not keep never reaches that row, nor its gradients."""
    made = {"distance_probs": Constant(0.3), "seed": 3, "block_size": block_size, "pattern": pattern, "sink_size": 2}
    length = 5 * block_size + 7
    q, k, v = qkv(1, 2, 1, length, length, 16)
    whole = pr_flash_attention(q, k, v, **made)
    schedule = Probabilistic(**made)
    rows = torch.arange(length)[:, None]
    for h in range(2):
        kept = reference.keep_mask(schedule, rows, torch.arange(length)[None, :], 0, h)
        for row in (0, block_size, 3 * block_size + 1, length - 1):
            taken = kept[row]
            assert taken.sum() < row + 1 or row < 2 * block_size
            poisoned = [x.masked_fill(~taken[:, None], torch.nan).requires_grad_() for x in (k, v)]
            query = q.clone().requires_grad_()
            out = pr_flash_attention(query, *poisoned, **made)
            assert torch.equal(out[0, h, row], whole[0, h, row])
            grads = torch.autograd.grad(out[0, h, row].sum(), (query, *poisoned))
            assert grads[0][0, h, row].isfinite().all()


GUARDED = """
import ctypes, mmap, sys
import torch
import pycore
from pycore.ops import pr_block_mask, pr_flash_attention
from pycore.schedules import Constant

pycore.native.set_cpu_isa(sys.argv[1])
block_size = int(sys.argv[2])
head_dim = mmap.PAGESIZE // (4 * block_size)  # a block is a page
blocks = 24
length = blocks * block_size
round = dict(distance_probs=Constant(0.02), seed=5)
drawn = pr_block_mask(batch=1, heads=2, query_blocks=4, key_blocks=blocks, **round)[0].any(0).any(0)
unread = (~drawn).nonzero().flatten().tolist()
assert 10 <= len(unread) <= 20
torch.manual_seed(0)
query, grad = torch.randn(2, 1, 2, 4 * block_size, head_dim)
key, value = torch.randn(2, 1, 1, length, head_dim)
libc = ctypes.CDLL(None)

def guarded(x):
    memory = mmap.mmap(-1, x.numel() * 4)
    copy = torch.frombuffer(memory, dtype=torch.float32, count=x.numel()).view(x.shape)
    copy.copy_(x)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for block in unread:
        page = ctypes.c_void_p(address + block * mmap.PAGESIZE)
        assert libc.mprotect(page, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return copy

results = []
for k, v in ((key, value), (guarded(key), guarded(value))):
    leaves = [query.clone().requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    out = pr_flash_attention(*leaves, **round, block_size=block_size)
    results.append((out, *torch.autograd.grad(out, leaves, grad)))
assert all(torch.equal(x, y) for x, y in zip(*results))
print("survived")
"""


@pytest.mark.parametrize("block_size", [16, 64])
def test_blocks_that_take_no_part_are_never_read(block_size: int, isa: str) -> None:
    """Their memory cannot be read at all, in the forward and in the backward pass."""
    result = subprocess.run(
        [sys.executable, "-c", GUARDED, isa, str(block_size)], capture_output=True, text=True, check=False,
        cwd=Path(pycore.__file__).parents[1],
    )  # fmt: skip
    assert result.stdout.strip() == "survived", result.stderr[-2000:]


# ---- torch ---------------------------------------------------------------------------------------------------------


def test_rounds_compile_once() -> None:
    """Twenty training steps: a graph, and new blocks in each; the backward pass uses its own step's."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(q: Tensor, k: Tensor, v: Tensor, round: Tensor) -> Tensor:
        return pr_flash_attention(
            q, k, v, distance_probs=Geometric(0.6), seed=1, round=round, block_size=16, sink_size=1
        )

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    inputs = qkv(1, 2, 2, 150, 150, 16)
    seen = []
    for number in range(20):
        results = []
        for f in (compiled, step):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = f(*leaves, torch.tensor(number))
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
        assert all(not torch.equal(results[0][0], other) for other in seen)
        seen.append(results[0][0])
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_lengths_compile_twice_at_most() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def f(q: Tensor, k: Tensor, v: Tensor, seed: Tensor) -> Tensor:
        schedule = Probabilistic(Harmonic(2), seed, block_size=16, correction="importance")
        return attention(q, k, v, schedule=schedule)

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for length in (150, 151, 64, 700):
        inputs = qkv(3, 2, 2, length, length, 16)
        assert torch.equal(compiled(*inputs, lengths(1, 2, 3)), f(*inputs, lengths(1, 2, 3)))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("correction", ["none", "importance"])
def test_opcheck(correction: str) -> None:
    probs = torch.tensor([[1.0, 0.5, 0.2], [1.0, 0.3, 0.3]], dtype=F64)
    numbers = (2, 2, 40, 60, 16, 1, 1, -1, False)
    tensors = (lengths(3, 4), torch.tensor(2), probs, None, lengths(60, 50), None, None)
    arguments = (*tensors, "pr_flash_attention", "table", 0.0, "independent", correction, *numbers)
    torch.library.opcheck(torch.ops.pycore.attention_blocks.default, arguments)
    family = (*tensors[:2], None, *tensors[3:], "attention", "harmonic", 2.0, "diagonal", correction, *numbers)
    torch.library.opcheck(torch.ops.pycore.attention_blocks.default, family)
    blocks, added = torch.ops.pycore.attention_blocks(*arguments)
    inputs = [x.requires_grad_() for x in qkv(2, 2, 1, 40, 60, 8)]
    others = (*[None] * 6, lengths(60, 50), None, None, blocks, None, added if correction == "importance" else None)
    torch.library.opcheck(
        torch.ops.pycore.attention.default,
        (*inputs, *others, "pr_flash_attention", "blocks", [16, 1, 1], False, -1, 0.3, 0.0, 0.0),
    )


@pytest.mark.parametrize("seeds", [False, True], ids=["one-seed", "seeds"])
def test_vmap(seeds: bool) -> None:
    """The folded dimension draws what each of its entries would alone."""
    q, k, v = (torch.stack([x, x + 1]) for x in qkv(2, 2, 1, 60, 60, 8))
    seed = torch.tensor([[1, 2], [3, 4]])

    def f(q: Tensor, k: Tensor, v: Tensor, seed: Tensor) -> Tensor:
        return pr_flash_attention(q, k, v, distance_probs=Constant(0.4), seed=seed, block_size=16, sink_size=1)

    if seeds:
        out = torch.vmap(f)(q, k, v, seed)
        expected = torch.stack([f(q[i], k[i], v[i], seed[i]) for i in range(2)])
    else:
        out = torch.vmap(f, in_dims=(0, 0, 0, None))(q, k, v, seed[0])
        expected = torch.stack([f(q[i], k[i], v[i], seed[0]) for i in range(2)])
    assert torch.equal(out, expected)


def test_autocast_leaves_the_round_alone() -> None:
    inputs = qkv(1, 2, 2, 100, 100, 16)
    made = ROUND | {"block_size": 16, "distance_probs": torch.tensor([1.0, 0.3], dtype=F32)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = pr_flash_attention(*inputs, **made)
    assert torch.equal(out, pr_flash_attention(*(x.bfloat16() for x in inputs), **made))


def test_attention_takes_the_schedule() -> None:
    inputs = qkv(1, 2, 2, 100, 100, 16)
    made = ROUND | {"block_size": 16, "sink_size": 1}
    out = attention(*inputs, schedule=Probabilistic(**made))
    assert torch.equal(out, pr_flash_attention(*inputs, **made))
    assert not torch.equal(out, attention(*inputs, schedule=Causal()))


def test_native_face() -> None:
    """NumPy in, the same bits out, for any number of threads."""
    inputs = qkv(2, 4, 2, 150, 170, 16)
    made = {"block_size": 16, "sink_size": 3, "correction": "importance"}
    seeds = lengths(8, 9)
    expected, expected_lse = pr_flash_attention(
        *inputs, distance_probs=Harmonic(2), seed=seeds, round=4, **made, return_lse=True
    )
    arrays = [x.numpy() for x in inputs]
    for threads in (1, 4):
        blocks, added = native.attention_blocks(
            seed=seeds.numpy(), round=torch.tensor([4]).numpy(), batch=2, heads=4, query_length=150, key_length=170,
            family="harmonic", parameter=2.0, threads=threads, **made,
        )  # fmt: skip
        out, lse = native.attention(
            *arrays, schedule="blocks", schedule_args=[16, 3, 1], schedule_tensor=blocks, block_bias=added,
            threads=threads,
        )  # fmt: skip
        assert torch.equal(torch.from_numpy(out), expected) and torch.equal(torch.from_numpy(lse), expected_lse)


def test_evicted_keys_that_no_row_draws_change_nothing() -> None:
    """A window of blocks on a cache that kept it: the bits of the whole sequence."""
    length, block = 400, 16
    q, k, v = qkv(1, 2, 2, length, length, 16)
    made = {"distance_probs": Constant(0), "seed": 0, "block_size": block, "window_blocks": 2, "sink_size": 4}
    whole = pr_flash_attention(q, k, v, **made)
    first = (length - 1) // block * block - block  # of the window of the last query
    kept = torch.cat([torch.arange(4), torch.arange(first, length)])
    offset = lengths(first - 4)
    step = pr_flash_attention(q[:, :, -1:], k[:, :, kept], v[:, :, kept], **made, key_offset=offset)
    assert torch.equal(step, whole[:, :, -1:])


def test_empty_problems() -> None:
    for shape in ((0, 2, 2, 5, 5), (1, 2, 2, 0, 5), (1, 2, 2, 5, 0)):
        out, lse = pr_flash_attention(*qkv(*shape, 8), **ROUND, return_lse=True)
        assert out.shape == (shape[0], 2, shape[3], 8)
        assert not out.any() and (lse == -torch.inf).all()
