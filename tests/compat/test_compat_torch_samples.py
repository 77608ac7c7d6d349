# SPDX-License-Identifier: Apache-2.0
"""The calls that torch's own tests make of scaled_dot_product_attention, collected from the installed torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from pycore.compat.torch import scaled_dot_product_attention
from tests.support.tolerance import assert_as_accurate

pytest.importorskip("expecttest", reason="torch's testing package needs it")
# What torch's own tests of these samples allow, absolute and relative; None: the defaults of torch.testing.
TOLERANCES = {torch.float64: None, torch.float32: (5e-5, 5e-6)}
DRAWS = 300


def samples(dtype: torch.dtype) -> list[Any]:
    """The sample inputs that have no mask."""
    from torch.testing._internal.common_methods_invocations import op_db

    (op,) = (x for x in op_db if x.name == "nn.functional.scaled_dot_product_attention")
    found = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    return [x for x in found if x.kwargs.get("attn_mask") is None]


def test_there_are_samples_of_every_kind() -> None:
    collected = samples(torch.float32)
    kinds = {(x.input.dim(), x.args[0].dim(), x.kwargs["is_causal"], x.kwargs["dropout_p"] > 0) for x in collected}
    assert len(collected) >= 24 and len(kinds) >= 12


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_values_and_gradients_of_torchs_samples(dtype: torch.dtype) -> None:
    for sample in samples(dtype):
        tensors = [sample.input, *sample.args]
        options = sample.kwargs | {"dropout_p": 0.0}
        ours = scaled_dot_product_attention(*tensors, **options)
        theirs = functional.scaled_dot_product_attention(*tensors, **options)
        weight = torch.randn_like(theirs)
        gradients = [torch.autograd.grad(x, tensors, weight) for x in (ours, theirs)]
        allowed = TOLERANCES[dtype]
        close = {} if allowed is None else {"atol": allowed[0], "rtol": allowed[1]}
        for mine, expected in zip((ours, *gradients[0]), (theirs, *gradients[1]), strict=True):
            torch.testing.assert_close(mine, expected, **close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_of_torchs_samples_in_half_precision(dtype: torch.dtype) -> None:
    for sample in samples(dtype):
        tensors = [x.detach() for x in (sample.input, *sample.args)]
        options = sample.kwargs | {"dropout_p": 0.0}
        exact = functional.scaled_dot_product_attention(*(x.double() for x in tensors), **options)
        plain = functional.scaled_dot_product_attention(*tensors, **options)
        assert_as_accurate(scaled_dot_product_attention(*tensors, **options), exact, plain)


def test_dropout_of_torchs_samples_leaves_the_mean() -> None:
    for sample in samples(torch.float64):
        if not sample.kwargs["dropout_p"] > 0:
            continue
        tensors = [x.detach() for x in (sample.input, *sample.args)]
        draws = torch.stack([scaled_dot_product_attention(*tensors, **sample.kwargs) for _ in range(DRAWS)])
        full = functional.scaled_dot_product_attention(*tensors, **sample.kwargs | {"dropout_p": 0.0})
        assert draws.shape[1:] == full.shape and not torch.equal(draws[0], draws[1])
        # A weight near 1 makes the spread itself a matter of chance: never below that of one weight.
        spread = draws.std(0).clamp(min=0.1 * full.abs().max().item()) / DRAWS**0.5
        assert ((draws.mean(0) - full).abs() < 6 * spread).all()
