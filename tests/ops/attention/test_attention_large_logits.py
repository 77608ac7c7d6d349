# SPDX-License-Identifier: Apache-2.0
"""Gradients where logits and their log-sum-exp are large: to recompute weights, lse in one float is not enough."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pycore import native
from pycore.ops import attention
from pycore.reference import attention as reference
from pycore.reference.attention import _rotated_scores, keep_mask
from pycore.schedules import Causal, Full, Lambda, Schedule, Segments
from tests.support.attention_inputs import lengths, qkv, tables
from tests.support.tolerance import assert_as_accurate

F32, F64 = torch.float32, torch.float64
HEADS, DIM = 4, 32


def ramp(length: int, factor: float) -> Tensor:
    """A distance_bias that grows with the distance: the oldest keys have all the weight."""
    return (factor * torch.arange(float(length))).expand(HEADS, length).clone()


def high(length: int, offset: float) -> Tensor:
    """A distance_bias that lifts all logits, and leaves the weights as even as they were."""
    return offset + torch.linspace(-1, 1, HEADS * length).view(HEADS, length)


def problem(length: int, queries: int = 0, factor: float = 1.0) -> list[Tensor]:
    """Query, key, value and the gradient of out."""
    inputs = list(qkv(1, HEADS, 2, queries or length, length, DIM))
    return [factor * inputs[0], *inputs[1:], torch.randn(1, HEADS, queries or length, DIM)]


# Where one key has all the weight, gradients of logits are differences of nearly equal numbers: only the value's are
# looked at.
PEAKED: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "bias-64": ([64], {"distance_bias": ramp(64, 10.0)}),
    "bias-131": ([131], {"distance_bias": ramp(131, 10.0), "schedule": Lambda(3, 70)}),
    "bias-512": ([512], {"distance_bias": ramp(512, 10.0)}),
    "falling-bias": ([131], {"distance_bias": -1000 - ramp(131, 10.0)}),
    "bias-of-segments": ([2500, 3], {"distance_bias": ramp(2500, 7.0)}),  # of keys, three of them
    "alibi": ([131], {"alibi_slopes": torch.tensor([-10.0, -3.0, -20.0, 0.1])}),
    "queries": ([128, 0, 1000.0], {}),
    "softcap": ([128, 0, 300.0], {"softcap": 900.0}),
    "rope": ([131, 0, 1000.0], {"rope": tables(131, 16), "schedule": Lambda(5, 40), "distance_limit": 40}),
    "texts": ([131], {"distance_bias": ramp(131, 30.0), "schedule": Segments(lengths(0, 50, 131))}),
}  # fmt: skip
EVEN: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "high": ([128], {"distance_bias": high(128, 5000.0)}),
    "low": ([131], {"distance_bias": high(131, -9000.0), "schedule": Lambda(3, 70)}),
    "high-segments": ([2500, 3], {"distance_bias": high(2500, 3000.0)}),
    "high-rows": ([300, 170], {"distance_bias": high(300, 2000.0), "schedule": Full()}),
    "sinks": ([70], {"sink_logits": torch.full([HEADS], 1501.0), "distance_bias": high(70, 1500.0)}),
    "alibi": ([131], {"alibi_slopes": torch.tensor([0.01, 0.1, 0.5, 0.0]), "sink_logits": torch.full([HEADS], 900.0)}),
    "softcap": ([128, 0, 3.0], {"softcap": 4.0, "distance_bias": high(128, 700.0)}),
    "negative-scale": ([128], {"scale": -3.0}),
    "rope": (
        [131],
        {"rope": tables(131, 16), "schedule": Lambda(5, 40), "distance_limit": 40, "distance_bias": high(131, 4000.0)},
    ),
    "lengths": (
        [131, 90],
        {
            "distance_bias": high(131, 2000.0), "key_starts": lengths(4), "key_lengths": lengths(120),
            "query_lengths": lengths(80), "key_offset": lengths(7),
        },
    ),
}  # fmt: skip


def cast(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def one(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(one(y) for y in x)
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: one(x) for name, x in options.items()}


def gradients(f: Any, tensors: list[Tensor], options: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Of query, key, value and, where there are any, distance_bias and sink_logits."""
    inputs = {name: x.to(dtype, copy=True).requires_grad_() for name, x in zip("qkv", tensors, strict=False)}
    options = cast(options, dtype)
    for name in ("distance_bias", "sink_logits"):
        if name in options:
            inputs[name] = options[name] = options[name].clone().requires_grad_()
    out = f(inputs["q"], inputs["k"], inputs["v"], **options)
    found = torch.autograd.grad(out, list(inputs.values()), tensors[3].to(dtype))
    return dict(zip(inputs, found, strict=True))


def exactly(*args: Any, **options: Any) -> Tensor:
    """The reference, for float64: in float32 its weights, exp(logit - lse), have the error that is looked for here."""
    return reference.attention(*args, **options)[0]


def plain(q: Tensor, k: Tensor, v: Tensor, schedule: Schedule = Causal(), **options: Any) -> Tensor:  # noqa: B008
    """As a torch user would: a masked softmax. One batch row."""
    (start, end, queries, offset) = (
        int(options.get(name, torch.tensor([default])))
        for name, default in (
            ("key_starts", 0), ("key_lengths", k.shape[2]), ("query_lengths", q.shape[2]), ("key_offset", 0),
        )
    )  # fmt: skip
    k, v = (x[:, :, start:end].repeat_interleave(2, 1) for x in (k, v))
    j = torch.arange(end - start)[None] + offset
    p = (end - start + offset - queries + torch.arange(queries))[:, None]
    keep = keep_mask(schedule, p, j)
    d = (p - j).clamp(max=options.get("distance_limit", 2**62))
    scores = q[:, :, :queries] @ k.mT
    if "rope" in options:
        pairs = zip(q[0, :, :queries], k[0], strict=True)
        scores = torch.stack([_rotated_scores(*pair, d * keep, options["rope"], False) for pair in pairs])[None]
    scores = scores * options.get("scale", DIM**-0.5)
    if "softcap" in options:
        scores = options["softcap"] * (scores / options["softcap"]).tanh()
    if "distance_bias" in options:
        bias = options["distance_bias"]
        scores = scores + bias[:, d.clamp(0, bias.shape[1] - 1)]
    if "alibi_slopes" in options:
        scores = scores - options["alibi_slopes"][:, None, None] * d
    scores = scores.masked_fill(~keep, -torch.inf)
    if "sink_logits" in options:
        scores = torch.cat([scores, options["sink_logits"][None, :, None, None].expand(-1, -1, queries, -1)], -1)
    out = scores.softmax(-1)[..., : end - start] @ v
    return torch.cat([out, out.new_zeros(*out.shape[:2], q.shape[2] - queries, v.shape[3])], 2)


def check(case: tuple[list[Any], dict[str, Any]], threads: int, wanted: tuple[str, ...]) -> None:
    shape, options = case
    tensors = problem(*shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    actual = gradients(attention, tensors, options, F32)
    torch.set_num_threads(before)
    exact, expected = gradients(exactly, tensors, options, F64), gradients(plain, tensors, options, F32)
    for name in wanted or actual:
        assert_as_accurate(actual[name], exact[name], expected[name], name)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", PEAKED)
def test_grad_value_of_peaked_weights(name: str, threads: int, isa: str) -> None:
    check(PEAKED[name], threads, ("v",))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", EVEN)
def test_gradients_of_even_weights(name: str, threads: int, isa: str) -> None:
    check(EVEN[name], threads, ())


@pytest.mark.parametrize("through", ["lse", "both"])
def test_gradients_through_lse(through: str, isa: str) -> None:
    """The public lse is one tensor, and its gradient has the accuracy of the others."""
    tensors, bias = problem(131), high(131, 3000.0)
    grad_lse = torch.randn(1, HEADS, 131)

    def found(f: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x.to(dtype).requires_grad_() for x in tensors[:3]]
        out, lse = f(*inputs, distance_bias=bias.to(dtype))
        assert lse.shape == grad_lse.shape and lse.dtype == dtype
        grads = [tensors[3].to(dtype), grad_lse.to(dtype)]
        results = [out, lse]
        if through == "lse":
            del grads[0], results[0]
        return torch.autograd.grad(results, inputs, grads, allow_unused=True, materialize_grads=True)

    def softmax(q: Tensor, k: Tensor, v: Tensor, distance_bias: Tensor) -> tuple[Tensor, Tensor]:
        out = plain(q, k, v, distance_bias=distance_bias)
        # As torch's kernels have it: of a logsumexp, the gradient is a softmax.
        rest = plain(q, k, torch.eye(131).expand(1, 2, -1, -1), distance_bias=distance_bias).detach()
        d = (torch.arange(131)[:, None] - torch.arange(131)).clamp(min=0)
        scores = q @ k.repeat_interleave(2, 1).mT * DIM**-0.5 + distance_bias[:, d]
        return out, (rest * scores).sum(-1)

    actual = found(lambda *x, **options: attention(*x, **options, return_lse=True), F32)
    for name, x, y, z in zip("qkv", actual, found(reference.attention, F64), found(softmax, F32), strict=True):
        assert_as_accurate(x, y, z, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(dtype: torch.dtype, isa: str) -> None:
    """Rounded inputs, exact weights: grad_value is within the dtype's own rounding of that of the rounded inputs."""
    tensors = [x.to(dtype).float() for x in problem(131)]
    bias = ramp(131, 10.0)
    inputs = [x.to(dtype).requires_grad_() for x in tensors[:3]]
    actual = torch.autograd.grad(attention(*inputs, distance_bias=bias), inputs, tensors[3].to(dtype))
    exact = gradients(exactly, tensors, {"distance_bias": bias}, F64)["v"]
    assert bool((actual[2].double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max())


@pytest.mark.parametrize("given", [False, True], ids=["recomputed", "given"])
@pytest.mark.parametrize("threads", [1, 3])
def test_native(threads: int, given: bool, isa: str) -> None:
    """With lse_low and without: the bits of the torch op's gradients."""
    *inputs, grad_out = problem(131)
    options = {"distance_bias": ramp(131, 10.0), "sink_logits": torch.tensor([0.0, 1000.0, -5.0, 1200.0])}
    wanted = gradients(attention, [*inputs, grad_out], options, F32)
    low = {"lse_low": np.empty((1, HEADS, 131), np.float32)} if given else {}
    arrays = [x.numpy() for x in inputs]
    out, lse = native.attention(*arrays, **options, **low, threads=threads)
    assert not given or np.abs(low["lse_low"]).max() > 0
    found = native.attention_backward(grad_out.numpy(), None, out, lse, *arrays, **options, **low, threads=threads)
    for x, (name, y) in zip(found, wanted.items(), strict=True):
        assert torch.equal(torch.from_numpy(x), y), name


def test_native_with_the_lse_of_more_keys(isa: str) -> None:
    """Keys in two calls, whose results merge: gradients by the whole lse are those of one call."""
    q, k, v, grad_out = (x[:, :2].numpy() for x in problem(90, 40))
    out, lse = native.attention(q, k, v, schedule="full")
    whole = native.attention_backward(grad_out, None, out, lse, q, k, v, schedule="full")
    parts = [
        native.attention_backward(grad_out, None, out, lse, q, k[:, :, rows], v[:, :, rows], schedule="full")
        for rows in (slice(0, 30), slice(30, 90))
    ]
    np.testing.assert_allclose(parts[0][0] + parts[1][0], whole[0], rtol=0, atol=2e-6)
    for n in (1, 2):
        np.testing.assert_allclose(np.concatenate([x[n] for x in parts], 2), whole[n], rtol=0, atol=2e-6)


@pytest.mark.parametrize("low", [torch.zeros(1, HEADS, 9), torch.zeros(1, HEADS, 8, dtype=F64)], ids=["shape", "dtype"])
def test_native_refuses_another_lse_low(low: Tensor) -> None:
    *inputs, grad_out = problem(8)
    with pytest.raises(ValueError, match=r"^attention: lse_low "):
        native.attention(*inputs, lse_low=low)
    out, lse = native.attention(*inputs)
    with pytest.raises(ValueError, match=r"^attention_backward: lse_low "):
        native.attention_backward(grad_out, None, out, lse, *inputs, lse_low=low)


@pytest.mark.parametrize("wrap", [torch.compile, torch.vmap], ids=["compile", "vmap"])
def test_transforms_keep_both_parts(wrap: Any) -> None:
    """Compiled and mapped gradients have the bits of plain ones."""
    *inputs, grad_out = problem(70)
    bias, mapped = ramp(70, 10.0), wrap is torch.vmap

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, distance_bias=bias)

    def found(f: Any, mapped: bool) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = f(*(x[None] for x in leaves))[0] if mapped else f(*leaves)
        return torch.autograd.grad(out, leaves, grad_out)

    wrapped = torch.vmap(f) if mapped else torch.compile(f, backend="aot_eager", fullgraph=True)
    for x, y in zip(found(wrapped, mapped), found(f, False), strict=True):
        assert torch.equal(x, y)
