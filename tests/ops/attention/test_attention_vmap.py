# SPDX-License-Identifier: Apache-2.0
"""vmap at its edges: samples of one batch row, no samples at all, and dropout's randomness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore.ops import attention, invariant_linear, pr_flash_attention, quantize_cdf, rms_norm
from pycore.schedules import Constant, KeySubset, Prefix, Segments, Tree
from tests.support.attention_inputs import lengths, qkv

TIMES, H, N, D = 3, 4, 9, 8


def samples(batch: int, times: int = TIMES) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.view(times, batch, *x.shape[1:]) for x in qkv(times * batch, H, 2, N, N, D))
    return q, k, v


def shared(batch: int) -> dict[str, dict[str, Any]]:
    """Options that all samples share."""
    counts = lengths(*range(4, 4 + batch))
    drawn = {"distance_probs": Constant(0.5), "block_size": 16}
    return {
        "key_lengths": {"key_lengths": counts},
        "key_starts": {"key_starts": counts},
        "key_offset": {"key_offset": counts},
        "query_lengths": {"query_lengths": counts},
        "prefix": {"schedule": Prefix(counts)},
        "segments": {"schedule": Segments(lengths(0, 4, 9))},
        "segments-of-rows": {"schedule": Segments(torch.stack([lengths(0, 4 - b, 9) for b in range(batch)]))},
        "keys": {"schedule": KeySubset(torch.arange(batch * N).view(batch, N) % 3 > 0)},
        "tree": {"schedule": Tree(torch.stack([lengths(-1, 0, b) for b in range(batch)]))},
        "slopes-of-rows": {"alibi_slopes": torch.rand(batch, H)},
        "seed": drawn | {"seed": counts},
        "seed-and-lengths": drawn | {"seed": counts, "key_lengths": counts},
    }


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", shared(1))
def test_options_that_samples_share(name: str, batch: int) -> None:
    """Samples of one row are those whose shared rows get strides of 0."""
    options = shared(batch)[name]
    op: Any = pr_flash_attention if "seed" in options else attention

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return op(q, k, v, **options)

    q, k, v = samples(batch)
    wanted = torch.stack([f(q[n], k[n], v[n]) for n in range(TIMES)])
    assert torch.equal(torch.vmap(f)(q, k, v), wanted)
    alone = torch.stack([f(q[n], k[0], v[0]) for n in range(TIMES)])
    assert torch.equal(torch.vmap(f, (0, None, None))(q, k[0], v[0]), alone)


@pytest.mark.parametrize("name", ["key_lengths", "key_starts", "key_offset", "query_lengths"])
def test_lengths_of_samples_of_one_row(name: str) -> None:
    q, k, v = samples(1)
    counts = lengths(4, 5, 6)[:, None]
    wanted = torch.stack([attention(q[0], k[0], v[0], **{name: counts[n]}) for n in range(TIMES)])
    assert torch.equal(torch.vmap(lambda x: attention(q[0], k[0], v[0], **{name: x}))(counts), wanted)


ONE = [x[0] for x in samples(2)]
EMPTY: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[int, ...]]] = {
    "attention": (attention, tuple(x[:0] for x in samples(2)), (2, H, N, D)),
    "dropout": (lambda *x: attention(*x, dropout_p=0.5), tuple(x[:0] for x in samples(2)), (2, H, N, D)),
    "lengths": (lambda x: attention(*ONE, key_lengths=x), (lengths()[:, None].expand(0, 2),),
                (2, H, N, D)),
    "seeds": (lambda x: pr_flash_attention(*ONE, distance_probs=Constant(0.5), seed=x),
              (lengths()[:, None],), (2, H, N, D)),
    "linear": (lambda x: invariant_linear(x, torch.ones(5, 4)), (torch.ones(0, 3, 4),), (3, 5)),
    "linear-weight": (lambda w: invariant_linear(torch.ones(3, 4), w), (torch.ones(0, 5, 4),), (3, 5)),
    "rms_norm": (rms_norm, (torch.ones(0, 3, 4),), (3, 4)),
    "rms_norm-weight": (lambda w: rms_norm(torch.ones(3, 4), w), (torch.ones(0, 4),), (3, 4)),
    "quantize_cdf": (quantize_cdf, (torch.ones(0, 3, 4),), (3, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_no_samples(name: str) -> None:
    f, args, shape = EMPTY[name]
    randomness = "different" if name == "dropout" else "error"
    assert torch.vmap(f, randomness=randomness)(*args).shape == (0, *shape)


# ---- dropout -------------------------------------------------------------------------------------------------------


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, dropout_p=0.5)


def torch_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.dropout(q, 0.5)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, None, 0)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_dropout_that_is_the_same(batch: int, in_dims: tuple[int | None, ...]) -> None:
    """Every sample drops what a call by itself drops after the same seed."""
    args = [x if dim == 0 else x[0] for x, dim in zip(samples(batch), in_dims, strict=True)]
    torch.manual_seed(5)
    mapped = torch.vmap(dropped, in_dims, randomness="same")(*args)
    for n in range(TIMES):
        torch.manual_seed(5)
        alone = dropped(*(x[n] if dim == 0 else x for x, dim in zip(args, in_dims, strict=True)))
        assert torch.equal(mapped[n], alone)


@pytest.mark.parametrize("batch", [1, 2])
def test_dropout_that_is_different(batch: int) -> None:
    """Every sample has a mask of its own, also where nothing else tells the samples apart."""
    q, k, v = (x[:1].expand_as(x) for x in samples(batch))
    torch.manual_seed(5)
    mapped = torch.vmap(dropped, randomness="different")(q, k, v)
    inner = torch.vmap(lambda q: dropped(q, k[0], v[0]), randomness="different")(q)
    for out in (mapped, inner):
        assert not any(torch.equal(out[a], out[b]) for a in range(TIMES) for b in range(a))
    ones = torch.ones(1)
    unmapped = torch.vmap(lambda x: dropped(q[0], k[0], v[0]) * x, randomness="different")(ones.expand(TIMES, 1))
    assert not torch.equal(unmapped[0], unmapped[1])
    torch.manual_seed(5)
    again = torch.vmap(dropped, randomness="different")(q, k, v)
    assert torch.equal(mapped, again)


def test_dropout_that_is_an_error() -> None:
    """What torch's own dropout raises, in its words."""
    for f in (dropped, torch_dropped):
        with pytest.raises(RuntimeError, match="vmap: called random operation while in randomness error mode"):
            torch.vmap(f)(*samples(1))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_gradient_of_dropout_through_vmap(randomness: str) -> None:
    """Weights and values enter linearly, so the gradient of value tells the mask that the output had."""
    q, k, v = samples(2)
    v.requires_grad_()
    out = torch.vmap(dropped, randomness=randomness)(q, k, v)
    weights = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, v, weights)
    by_sample = [x.double().sum((1, 2, 3, 4)) for x in (out * weights, v * grad)]
    torch.testing.assert_close(*by_sample, rtol=1e-4, atol=1e-4)


def test_batched_gradients_of_dropout() -> None:
    """Several gradients of one output are of one mask: that of the forward pass."""
    leaves = [x[0].requires_grad_() for x in samples(2)]
    out = dropped(*leaves)
    weights = torch.randn(TIMES, *out.shape)
    together = torch.autograd.grad(out, leaves, weights, is_grads_batched=True, retain_graph=True)
    for n in range(TIMES):
        alone = torch.autograd.grad(out, leaves, weights[n], retain_graph=True)
        assert all(torch.equal(x[n], y) for x, y in zip(together, alone, strict=True))
