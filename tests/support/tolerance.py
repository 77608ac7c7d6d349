# SPDX-License-Identifier: Apache-2.0
"""How far a result may lie from the truth: one tolerance for ops, one for whole models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["assert_as_accurate", "assert_model_as_accurate", "ulp"]


def ulp(x: float, dtype: torch.dtype) -> float:
    """The distance from |x| to the next larger number of `dtype`."""
    info = torch.finfo(dtype)
    exponent = math.frexp(max(abs(x), info.smallest_normal))[1] - 1
    return info.eps * 2.0**exponent


def _errors(actual: Tensor, exact: Tensor, plain: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """The absolute errors of `actual` and `plain` where `exact` is finite, once everything else has been checked."""
    assert exact.dtype == torch.float64, "the truth is computed in float64"
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype} is not {plain.dtype}"
    assert actual.shape == exact.shape == plain.shape, f"{what}: {actual.shape}, {exact.shape}, {plain.shape}"
    assert not exact.isnan().any() and not plain.isnan().any(), f"{what}: the expectation itself is NaN"
    finite = exact.isfinite()
    assert torch.equal(actual.to(torch.float64)[~finite], exact[~finite]), f"{what}: infinities differ"
    return tuple((x.to(torch.float64) - exact)[finite].abs() for x in (actual, plain))


def assert_as_accurate(actual: Tensor, exact: Tensor, plain: Tensor, what: str = "result") -> None:
    """Asserts that `actual`, the result of an op, is about as near to the truth as plain torch is.

    The largest error of `actual` may be at most twice that of `plain`, plus 4 ulp of the largest output. What is
    infinite in `exact` must be the same infinity in `actual`, and NaN is never accepted.

    Args:
        actual: the result under test.
        exact: the same in float64, from the same inputs.
        plain: the same in plain torch, in actual's dtype.
        what: opens the message.
    """
    error, plain_error = _errors(actual, exact, plain, what)
    if not error.numel():
        return
    largest = exact[exact.isfinite()].abs().max().item()
    plain_worst = plain_error.max().item()
    bound = 2 * plain_worst + 4 * ulp(largest, actual.dtype)
    # NaN and an infinity out of place compare as false, so they fail too.
    if not bool((error <= bound).all()):
        worst = error.nan_to_num(nan=math.inf).max().item()
        raise AssertionError(
            f"{what}: error {worst:.3g} exceeds {bound:.3g} (twice plain torch's {plain_worst:.3g} and 4 ulp of "
            f"{largest:.3g}) at {int((~(error <= bound)).sum())} of {error.numel()} elements"
        )


def assert_model_as_accurate(actual: Tensor, exact: Tensor, plain: Tensor, what: str = "result") -> None:
    """Asserts that `actual`, the logits of a model for several texts, is about as near to the truth as plain torch is.

    Layers enlarge the rounding errors of the layers before them, at some positions far more than at others, so the
    largest error of a model is one draw from a wide distribution: from one pair of texts to the next its ratio to
    plain torch's goes from a half to 2.7 where both are equally good. The root mean square is an average over all
    positions: over eight texts of 40 tokens, its ratio stayed below 1.17 in every float32 model of the tests. It may be
    at most 1.25; attention with an added relative error of 2**-20 gives 1.3 and more. The largest error may be at most
    four times plain torch's, so that no single position is far off.

    Arguments are those of `assert_as_accurate`.
    """
    error, plain_error = _errors(actual, exact, plain, what)
    rms, plain_rms = (x.pow(2).mean().sqrt().item() for x in (error, plain_error))
    worst, plain_worst = error.nan_to_num(nan=math.inf).max().item(), plain_error.max().item()
    if not rms <= 1.25 * plain_rms or not worst <= 4 * plain_worst:
        raise AssertionError(
            f"{what}: error {rms:.3g} (root mean square) and {worst:.3g} (largest) where plain torch has "
            f"{plain_rms:.3g} and {plain_worst:.3g}: more than 1.25 and 4 times as much"
        )
