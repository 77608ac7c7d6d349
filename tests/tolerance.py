# SPDX-License-Identifier: Apache-2.0
"""How far a result may lie from the truth: the one tolerance of this test suite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["assert_as_accurate", "ulp"]


def ulp(x: float, dtype: torch.dtype) -> float:
    """The distance from |x| to the next larger number of `dtype`."""
    info = torch.finfo(dtype)
    exponent = math.frexp(max(abs(x), info.smallest_normal))[1] - 1
    return info.eps * 2.0**exponent


def assert_as_accurate(actual: Tensor, exact: Tensor, plain: Tensor, what: str = "result") -> None:
    """Asserts that `actual` is about as near to the truth as plain torch is.

    The largest error of `actual` may be at most twice that of `plain`, plus 4 ulp of the largest output. What is
    infinite in `exact` must be the same infinity in `actual`, and NaN is never accepted.

    Args:
        actual: the result under test.
        exact: the same in float64, from the same inputs.
        plain: the same in plain torch, in actual's dtype.
        what: opens the message.
    """
    assert exact.dtype == torch.float64, "the truth is computed in float64"
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype} is not {plain.dtype}"
    assert actual.shape == exact.shape == plain.shape, f"{what}: {actual.shape}, {exact.shape}, {plain.shape}"
    assert not exact.isnan().any() and not plain.isnan().any(), f"{what}: the expectation itself is NaN"
    finite = exact.isfinite()
    assert torch.equal(actual.to(torch.float64)[~finite], exact[~finite]), f"{what}: infinities differ"
    if not finite.any():
        return
    error = (actual.to(torch.float64) - exact)[finite].abs()
    plain_error = (plain.to(torch.float64) - exact)[finite].abs().max().item()
    largest = exact[finite].abs().max().item()
    bound = 2 * plain_error + 4 * ulp(largest, actual.dtype)
    # NaN and an infinity out of place compare as false, so they fail too.
    if not bool((error <= bound).all()):
        worst = error.nan_to_num(nan=math.inf).max().item()
        raise AssertionError(
            f"{what}: error {worst:.3g} exceeds {bound:.3g} (twice plain torch's {plain_error:.3g} and 4 ulp of "
            f"{largest:.3g}) at {int((~(error <= bound)).sum())} of {error.numel()} elements"
        )
