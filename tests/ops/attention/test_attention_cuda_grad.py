# SPDX-License-Identifier: Apache-2.0
"""The gradients of attention on CUDA: the reference, the same bits, and what they do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pycore.ops import attention, pr_flash_attention
from pycore.reference.attention import attention as reference
from pycore.schedules import Causal, Full, Harmonic, KeySubset, Lambda, Probabilistic, Schedule, Tree
from tests.support.attention_inputs import lengths, qkv, random_tree, tables
from tests.support.cuda_inputs import DTYPES, HALVES, SCHEDULES, doubled, narrowed, on_device
from tests.support.tolerance import assert_as_accurate

pytestmark = pytest.mark.cuda
LEARNED = ("sink_logits", "distance_bias")
Tensors = tuple[torch.Tensor, ...]


def gradients(
    call: Callable[..., Any], tensors: Tensors, grad: torch.Tensor, options: dict[str, Any], lse_too: bool = False
) -> list[torch.Tensor]:
    """Of query, key, value and the learned tables, through out, and through lse as well if `lse_too`."""
    inputs = [t.detach().clone().requires_grad_() for t in tensors]
    learned = {name: options[name].detach().clone().requires_grad_() for name in LEARNED if name in options}
    out, lse = call(*inputs, **(options | learned))
    total = (out * grad).sum() + (lse.masked_fill(lse.isinf(), 0).sum() if lse_too else 0)
    return list(torch.autograd.grad(total, [*inputs, *learned.values()]))


def ours(*tensors: torch.Tensor, **options: Any) -> Any:
    return attention(*tensors, return_lse=True, **options)


def assert_accurate(tensors: Tensors, options: dict[str, Any], lse_too: bool = False) -> None:
    """As near to the reference in float64 as the reference in the tensors' own dtype is, twice over."""
    grad = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3]).to(tensors[0].dtype)
    exact = gradients(reference, tuple(t.double() for t in tensors), grad.double(), doubled(options), lse_too)
    plain = gradients(reference, tensors, grad, narrowed(options, tensors[0].dtype), lse_too)
    moved = {name: on_device(value) for name, value in options.items()}
    actual = gradients(ours, on_device(tensors), grad.cuda(), moved, lse_too)
    names = ["query", "key", "value", *(name for name in LEARNED if name in options)]
    for name, gradient, truth, other in zip(names, actual, exact, plain, strict=True):
        assert_as_accurate(gradient.cpu(), truth, other.to(gradient.dtype), f"the gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("shape", "head_dim"), [((97, 203), 64), ((70, 70), 40), ((17, 339), 128)], ids=str)
def test_schedules(shape: tuple[int, int], head_dim: int, schedule: Schedule, dtype: torch.dtype) -> None:
    assert_accurate(tuple(t.to(dtype) for t in qkv(2, 4, 2, *shape, head_dim)), {"schedule": schedule})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(96, 96), (111, 111), (256, 256), (200, 40), (24, 130)], ids=str)
def test_channels(head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    tensors = tuple(t.to(dtype) for t in qkv(1, 3, 1, 80, 150, head_dim, value_dim))
    assert_accurate(tensors, {"schedule": Lambda(5, 60)})


OPTIONS = [
    pytest.param({"softcap": 3.0}, id="softcap"),
    pytest.param({"sink_logits": torch.tensor([0.3, -2.0, 5.0, 0.0])}, id="sink_logits"),
    pytest.param({"distance_bias": torch.linspace(-2, 1, 4 * 50).reshape(4, 50)}, id="distance_bias"),
    pytest.param({"distance_bias": torch.linspace(-2, 1, 4 * 300).reshape(4, 300), "softcap": 2.0}, id="bias-softcap"),
    pytest.param({"alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0])}, id="alibi_slopes"),
    pytest.param({"scale": -0.1}, id="negative-scale"),
    pytest.param({"rope": tables(300, 64)}, id="rope"),
    pytest.param({"rope": tables(300, 64), "distance_limit": 60}, id="rope-limit"),
    pytest.param({"rope": tables(300, 22), "distance_limit": 70, "interleaved": True}, id="rope-interleaved-partial"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lse_too", [False, True], ids=["out", "out-and-lse"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: dict[str, Any], lse_too: bool, dtype: torch.dtype) -> None:
    tensors = tuple(t.to(dtype) for t in qkv(2, 4, 2, 97, 203, 64))
    assert_accurate(tensors, {"schedule": Lambda(5, 60), **options}, lse_too)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("correction", ["none", "importance"])
def test_probabilistic(correction: str, block_size: int, dtype: torch.dtype) -> None:
    tensors = tuple(t.to(dtype) for t in qkv(2, 4, 2, 300, 300, 64))
    schedule = Probabilistic(Harmonic(1.5), 7, 3, block_size=block_size, sink_size=3, correction=correction)
    assert_accurate(tensors, {"schedule": schedule})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trees(dtype: torch.dtype) -> None:
    tensors = tuple(t.to(dtype) for t in qkv(2, 4, 2, 90, 300, 64))
    options = {
        "schedule": Tree(torch.stack([random_tree(80, 1), random_tree(80, 2)])), "rope": tables(300, 64),
        "distance_limit": 150, "distance_bias": torch.linspace(-2, 1, 4 * 50).reshape(4, 50),
    }  # fmt: skip
    assert_accurate(tensors, options)


def test_lengths_and_eviction() -> None:
    options = {
        "schedule": Lambda(4, 30), "key_starts": lengths(3, 0), "key_lengths": lengths(80, 90),
        "key_offset": lengths(1000, 0), "query_lengths": lengths(20, 7), "rope": tables(200, 64), "distance_limit": 50,
    }  # fmt: skip
    assert_accurate(qkv(2, 2, 1, 20, 90, 64), options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"rope": tables(700, 64), "distance_limit": 420}, {"softcap": 4.0}],
    ids=["plain", "rope", "softcap"],
)
def test_same_bits_alone_and_together(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Of a batch row all gradients, of a few queries theirs; and of a second call everything."""
    query, key, value = (t.to(dtype) for t in on_device(qkv(3, 4, 2, 190, 530, 64)))
    grad = torch.randn_like(query)
    options = {"schedule": Lambda(8, 420), **{name: on_device(value) for name, value in options.items()}}
    together = gradients(ours, (query, key, value), grad, options)
    for first, second in zip(together, gradients(ours, (query, key, value), grad, options), strict=True):
        assert torch.equal(first, second)
    for b in range(3):
        row = gradients(ours, tuple(x[b : b + 1] for x in (query, key, value)), grad[b : b + 1], options)
        for alone, whole in zip(row, together, strict=True):
            assert torch.equal(alone[0], whole[b])
    for count in (1, 3, 100):
        some = gradients(ours, (query[:, :, -count:], key, value), grad[:, :, -count:], options)
        assert torch.equal(some[0], together[0][:, :, -count:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_where_it_is_kept(dtype: torch.dtype) -> None:
    """A key and a value that only the last query keeps, and a query whose keys are all but the last."""
    query, key, value = (t.to(dtype) for t in on_device(qkv(1, 1, 1, 100, 100, 64)))
    grad = torch.randn_like(query)
    key[0, 0, 99, 3] = value[0, 0, 99, 5] = torch.nan
    grads = gradients(ours, (query, key, value), grad, {"schedule": Causal()})
    assert grads[0][0, 0, :99].isfinite().all()
    key[0, 0, 99, 3] = value[0, 0, 99, 5] = 0
    query[0, 0, 50, 7] = grad[0, 0, 50, 9] = torch.nan
    grads = gradients(ours, (query, key, value), grad, {"schedule": Causal()})
    for gradient in grads[1:]:
        assert gradient[0, 0, 51:].isfinite().all()
        assert gradient[0, 0, :51].isnan().any(dim=-1).all()


def test_nobody_waits_for_the_device() -> None:
    """Forward, backward and a round's blocks are launched without reading anything back."""
    tensors = tuple(t.bfloat16().requires_grad_() for t in on_device(qkv(2, 4, 2, 200, 200, 64)))
    numbers = {"seed": torch.tensor([5, 6]).cuda(), "round": torch.tensor(0).cuda()}

    def step() -> None:
        out = pr_flash_attention(*tensors, distance_probs=Harmonic(2.0), sink_size=1, **numbers)
        torch.autograd.grad(out.sum(), tensors)
        out = attention(*tensors, schedule=Lambda(4, 40), key_lengths=lengths_on_device)
        torch.autograd.grad(out.sum(), tensors)

    lengths_on_device = torch.tensor([200, 170]).cuda()
    step()  # a family's table travels at first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_replayed_graph_trains_on_new_rounds(dtype: torch.dtype) -> None:
    tensors = tuple(t.to(dtype).requires_grad_() for t in on_device(qkv(1, 2, 2, 512, 512, 64)))
    grad, round = torch.randn(1, 2, 512, 64).to(dtype).cuda(), torch.tensor([0]).cuda()

    def step() -> tuple[torch.Tensor, ...]:
        out = pr_flash_attention(*tensors, distance_probs=Harmonic(2.0), seed=5, round=round, sink_size=1)
        return torch.autograd.grad(out, tensors, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    seen = []
    for n in range(2):
        round.fill_(n)
        graph.replay()
        seen.append([g.clone() for g in out])
        for replayed, eager in zip(seen[n], step(), strict=True):
            assert torch.equal(replayed, eager)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_runs_on_the_current_stream() -> None:
    """Both passes: inputs that a late kernel of the stream makes are waited for."""
    query, key, value = (t.half() for t in on_device(qkv(1, 2, 2, 300, 300, 64)))
    grad = torch.randn_like(query)
    expected = gradients(ours, (query, key, value), grad, {})
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = tuple(t * 1.0 for t in (query, key, value))
        actual = gradients(ours, late, grad, {})
    stream.synchronize()
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_compiles_whole() -> None:
    tensors = tuple(t.bfloat16().requires_grad_() for t in on_device(qkv(1, 4, 2, 128, 128, 64)))

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        return attention(*inputs, schedule=Lambda(4, 40)).float().square().sum()

    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*tensors), tensors)
    for one, other in zip(compiled, torch.autograd.grad(loss(*tensors), tensors), strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_drops_alike_in_both_passes() -> None:
    """With values of one and a gradient of one, grad_value is the sum of the weights that each key kept."""
    query, key, _ = on_device(qkv(1, 2, 2, 256, 256, 64))
    value = torch.eye(256).expand(1, 2, 256, 256).contiguous().cuda().requires_grad_()  # so that out is the weights
    weights = attention(query, key, value, schedule=Full(), dropout_p=0.3)
    (grad_value,) = torch.autograd.grad(weights, value, torch.ones_like(weights))
    torch.testing.assert_close(grad_value[..., 0], weights.sum(dim=2), rtol=1e-4, atol=1e-4)
    assert 0.25 < (weights == 0).float().mean().item() < 0.35


def test_memory_is_that_of_the_gradients() -> None:
    """No allocation of a number for each pair, and none that grows but with the tensors."""
    tensors = tuple(t.half().requires_grad_() for t in on_device(qkv(1, 1, 1, 8192, 8192, 64)))
    out = attention(*tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 8 * 3 * 4 * 8192 * 64


def test_a_key_that_no_query_keeps_gets_zeros() -> None:
    tensors = on_device(qkv(1, 2, 1, 50, 200, 64))
    grads = gradients(ours, tensors, torch.ones(1, 2, 50, 64).cuda(), {"schedule": KeySubset(lengths(3, 90).cuda())})
    kept = torch.zeros(200, dtype=torch.bool)
    kept[[3, 90]] = True
    for gradient in grads[1:]:
        rows = gradient[0, 0].cpu().abs().sum(dim=1) > 0
        assert torch.equal(rows, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [None, 2], ids=["slopes for all", "slopes of each row"])
@pytest.mark.parametrize("schedule", [Causal(), Lambda(4, 40)], ids=str)
def test_slopes_scale_and_softcap(schedule: Schedule, rows: int | None, dtype: torch.dtype) -> None:
    """The CPU's, which has its own tests, to within a small part of what the sums are made of; the same bits again."""
    tensors = tuple(t.to(dtype) for t in qkv(2, 4, 2, 97, 203, 40))
    shape = (4,) if rows is None else (rows, 4)
    numbers = (torch.rand(shape) / 8, torch.tensor(0.2), torch.tensor(3.0))

    def gradient(device: str) -> list[torch.Tensor]:
        slopes, scale, softcap = (x.to(device).requires_grad_() for x in numbers)
        options = {"alibi_slopes": slopes, "scale": scale, "softcap": softcap, "schedule": schedule}
        out = attention(*(t.to(device) for t in tensors), sink_logits=torch.zeros(4, device=device), **options)
        return [x.cpu() for x in torch.autograd.grad(out.float().square().sum(), (slopes, scale, softcap))]

    actual, again, expected = gradient("cuda"), gradient("cuda"), gradient("cpu")
    for mine, repeated, other in zip(actual, again, expected, strict=True):
        assert torch.equal(mine, repeated)
        part = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(mine, other, rtol=part, atol=part * 97 * 2)
