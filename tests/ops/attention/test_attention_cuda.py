# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of attention: the reference, gradients, the same bits on the device, streams, graphs and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pycore.ops import attention, pr_flash_attention
from pycore.reference.attention import attention as reference
from pycore.schedules import Full, Geometric, Harmonic, Lambda, Probabilistic, Schedule, Tree
from pycore.schedules.attention_blocks import draw_blocks
from tests.support.attention_inputs import lengths, qkv, random_tree, tables
from tests.support.cuda_inputs import DTYPES, SCHEDULES, doubled, fitting, narrowed, on_device
from tests.support.tolerance import assert_as_accurate

pytestmark = pytest.mark.cuda


def assert_accurate(tensors: tuple[torch.Tensor, ...], options: dict[str, Any]) -> None:
    """The device's output and lse against the reference, on the CPU."""
    out, lse = attention(*on_device(tensors), return_lse=True, **{k: on_device(v) for k, v in options.items()})
    plain = reference(*tensors, **narrowed(options, tensors[0].dtype))
    exact = reference(*(t.double() for t in tensors), **doubled(options))
    assert_as_accurate(out.cpu(), exact[0], plain[0], "out")
    assert_as_accurate(lse.cpu(), exact[1], plain[1].to(lse.dtype), "lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rope", [False, True], ids=lambda r: f"rope={r}")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("shape", "head_dim"),
    [((1, 1), 64), ((17, 97), 40), ((113, 203), 128), ((130, 1100), 64), ((70, 70), 256), ((65, 339), 96)],
    ids=str,
)
def test_values(shape: tuple[int, int], head_dim: int, schedule: Schedule, rope: bool, dtype: torch.dtype) -> None:
    tensors = tuple(t.to(dtype) for t in qkv(2, 4, 2, *shape, head_dim))
    options: dict[str, Any] = {"schedule": fitting(schedule, shape[1])}
    if rope:
        options |= {"rope": tables(max(shape) + 64, head_dim), "distance_limit": 60}
    assert_accurate(tensors, options)


OPTIONS = [
    pytest.param({"softcap": 3.0}, id="softcap"),
    pytest.param({"sink_logits": torch.tensor([0.3, -2.0, 5.0, 0.0])}, id="sink_logits"),
    pytest.param({"distance_bias": torch.linspace(-2, 1, 4 * 50).reshape(4, 50)}, id="distance_bias"),
    pytest.param({"scale": -0.1}, id="negative-scale"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = tuple(t.to(dtype) for t in qkv(2, 4, 2, 97, 203, 64))
    assert_accurate(tensors, {"schedule": Lambda(5, 60), **options})


def test_dropout_keeps_the_mean() -> None:
    query, key, _ = on_device(qkv(1, 2, 2, 256, 256, 64))
    ones = torch.ones_like(key)
    out = attention(query, key, ones, schedule=Full(), dropout_p=0.25)
    assert abs(out.mean().item() - 1) < 0.02
    assert out.std().item() > 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("far", [False, True], ids=lambda far: f"far={far}")
def test_trees(far: bool, dtype: torch.dtype) -> None:
    """Of batch rows, with places by depth: rotation, with and without far pairs, and biases."""
    tensors = tuple(t.to(dtype) for t in qkv(2, 4, 2, 90, 300, 64))
    options: dict[str, Any] = {
        "schedule": Tree(torch.stack([random_tree(80, 1), random_tree(80, 2)])), "rope": tables(300, 64),
        "distance_bias": torch.linspace(-2, 1, 4 * 50).reshape(4, 50),
    }  # fmt: skip
    assert_accurate(tensors, options | ({"distance_limit": 150} if far else {}))


def test_lengths_and_eviction() -> None:
    tensors = qkv(2, 2, 1, 20, 90, 64)
    options = {
        "schedule": Lambda(4, 30), "key_starts": lengths(3, 0), "key_lengths": lengths(80, 90),
        "key_offset": lengths(1000, 0), "query_lengths": lengths(20, 7),
    }  # fmt: skip
    out = attention(*on_device(tensors), **{k: on_device(v) for k, v in options.items()})
    exact = reference(*(t.double() for t in tensors), **options)[0]
    assert_as_accurate(out.cpu(), exact, reference(*tensors, **options)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_rope", [False, True], ids=lambda r: f"rope={r}")
def test_same_bits_alone_and_together(dtype: torch.dtype, with_rope: bool) -> None:
    """Whole, a batch row, the last rows, and one row, whose segments are blocks of their own."""
    query, key, value = (t.to(dtype) for t in on_device(qkv(3, 4, 2, 190, 5300, 64)))
    options = {"schedule": Lambda(8, 4200), "rope": on_device(tables(5400, 64)) if with_rope else None}
    together = attention(query, key, value, **options)
    for b in range(3):
        row = attention(*(x[b : b + 1] for x in (query, key, value)), **options)
        assert torch.equal(row[0], together[b])
    for count in (1, 3, 100):
        assert torch.equal(attention(query[:, :, -count:], key, value, **options), together[:, :, -count:])


@pytest.mark.parametrize("family", [Harmonic(2.5), Geometric(0.9), torch.rand(4, 7).double()], ids=["h", "g", "table"])
@pytest.mark.parametrize("blocks_per_row", [None, 5])
@pytest.mark.parametrize("pattern", ["independent", "diagonal"])
def test_blocks_are_the_cpus(family: Any, blocks_per_row: int | None, pattern: str) -> None:
    made = Probabilistic(
        family, lengths(7, 2**40), 3, block_size=16, sink_size=3, window_blocks=2, pattern=pattern,
        blocks_per_row=blocks_per_row, correction="none" if blocks_per_row else "importance",
    )  # fmt: skip
    rows = (lengths(3, 0), lengths(900, 1000), lengths(0, 4000), lengths(200, 300))
    expected = draw_blocks("test", made, (2, 4, 300, 1000), rows, torch.device("cpu"))
    moved = tuple(x.cuda() for x in rows)
    actual = draw_blocks("test", made, (2, 4, 300, 1000), moved, torch.device("cuda"))  # type: ignore[arg-type]
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.is_cuda and torch.equal(ours.cpu(), theirs))


def test_a_replayed_graph_draws_anew() -> None:
    query, key, value = (t.half() for t in on_device(qkv(1, 2, 2, 512, 512, 64)))
    seed, round = torch.tensor([5]).cuda(), torch.tensor([0]).cuda()

    def step() -> torch.Tensor:
        return pr_flash_attention(query, key, value, distance_probs=Harmonic(2.0), seed=seed, round=round, sink_size=1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    seen = []
    for n in range(3):
        round.fill_(n)
        graph.replay()
        seen.append(out.clone())
        assert torch.equal(seen[n], step())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_compiles_whole() -> None:
    query, key, value = (t.bfloat16() for t in on_device(qkv(1, 4, 2, 128, 128, 64)))
    compiled = torch.compile(lambda q: attention(q, key, value, schedule=Lambda(4, 40)) * 2, fullgraph=True)
    assert torch.equal(compiled(query), attention(query, key, value, schedule=Lambda(4, 40)) * 2)


def test_no_memory_of_all_pairs() -> None:
    """Beside its output, a call takes far less than a byte a pair of a query and a key."""
    query, key, value = (t.half().requires_grad_() for t in on_device(qkv(1, 1, 1, 8192, 8192, 64)))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(query, key, value).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8192 * 8192 / 2


def test_what_the_kernels_do_not_have_is_refused() -> None:
    with pytest.raises(RuntimeError, match="^attention: the CUDA kernels take a head_dim of at most 256$"):
        attention(*on_device(qkv(1, 2, 2, 8, 8, 257)))
    with pytest.raises(RuntimeError, match="^attention: the CUDA kernels take float32, float16 and bfloat16$"):
        attention(*(t.double() for t in on_device(qkv(1, 2, 2, 8, 8, 16))))
