# SPDX-License-Identifier: Apache-2.0
"""The tolerance itself: what it accepts, and what it must not."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.tolerance import assert_as_accurate, assert_model_as_accurate, ulp

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x", [1.0, 1.5, -2.0, 3.9, 1024.0, 0.3])
def test_ulp_is_the_distance_to_the_next_number(x: float, dtype: torch.dtype) -> None:
    value = torch.tensor(abs(x), dtype=dtype)
    following = torch.nextafter(value, torch.tensor(INF, dtype=dtype))
    assert ulp(x, dtype) == following.item() - value.item()


def test_ulp_of_zero_is_positive() -> None:
    assert 0 < ulp(0.0, torch.float32) < 1e-44


def test_bound_is_twice_plain_torch_and_four_ulp() -> None:
    exact = torch.tensor([1.0, -3.0], dtype=torch.float64)  # ulp of the largest: 2**-22
    plain = torch.tensor([1.0 + 2**-10, -3.0])
    bound = 2 * 2**-10 + 4 * 2**-22
    assert_as_accurate(torch.tensor([1.0 + bound, -3.0]), exact, plain)
    with pytest.raises(AssertionError, match=r"^out: error .* exceeds .* at 1 of 2 elements$"):
        assert_as_accurate(torch.tensor([1.0 + bound + 2**-22, -3.0]), exact, plain, "out")


def test_four_ulp_where_plain_torch_is_exact() -> None:
    exact = torch.tensor([1.0], dtype=torch.float64)
    plain = exact.float()
    assert_as_accurate(plain + 4 * 2**-23, exact, plain)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_as_accurate(plain + 5 * 2**-23, exact, plain)


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_not_finite_where_the_truth_is(bad: float) -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_as_accurate(torch.tensor([1.0, bad]), exact, exact.float())


@pytest.mark.parametrize("bad", [NAN, INF, 0.0], ids=str)
def test_infinities_must_agree(bad: float) -> None:
    exact = torch.tensor([1.0, -INF], dtype=torch.float64)
    assert_as_accurate(exact.float(), exact, exact.float())
    with pytest.raises(AssertionError, match="infinities differ"):
        assert_as_accurate(torch.tensor([1.0, bad]), exact, exact.float())


def test_expectation_must_not_be_nan() -> None:
    exact = torch.tensor([NAN], dtype=torch.float64)
    with pytest.raises(AssertionError, match="expectation itself"):
        assert_as_accurate(exact.float(), exact, exact.float())


def test_shape_and_dtype_must_agree() -> None:
    exact = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(AssertionError, match="torch.Size"):
        assert_as_accurate(torch.zeros(2), exact, exact.float())
    with pytest.raises(AssertionError, match="float64 is not torch.float32"):
        assert_as_accurate(exact, exact, exact.float())
    with pytest.raises(AssertionError, match="float64"):
        assert_as_accurate(exact.float(), exact.float(), exact.float())


def test_empty_results_agree() -> None:
    exact = torch.zeros(2, 0, dtype=torch.float64)
    assert_as_accurate(exact.float(), exact, exact.float())
    with pytest.raises(AssertionError, match="torch.Size"):
        assert_as_accurate(torch.zeros(0, 2), exact, exact.float())


def noisy(seed: int, scale: float) -> torch.Tensor:
    """Ones [8, 1000] in float32, each wrong by up to `scale`."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + scale * (2 * torch.rand(8, 1000, generator=generator) - 1)


def test_models_are_compared_by_their_mean_square() -> None:
    exact, plain = torch.ones(8, 1000, dtype=torch.float64), noisy(0, 2**-12)
    assert_model_as_accurate(noisy(1, 2**-12), exact, plain)
    assert_model_as_accurate(noisy(1, 1.2 * 2**-12), exact, plain)
    with pytest.raises(AssertionError, match=r"^logits: error .* 1.25"):
        assert_model_as_accurate(noisy(1, 1.3 * 2**-12), exact, plain, "logits")


def test_models_and_one_error_that_is_too_large() -> None:
    exact, plain = torch.ones(8, 1000, dtype=torch.float64), noisy(0, 2**-12)
    actual = noisy(1, 2**-12)
    actual[3, 5] = 1 + 3.9 * 2**-12
    assert_model_as_accurate(actual, exact, plain)
    for bad in (1 + 4.1 * 2**-12, INF, NAN):
        actual[3, 5] = bad
        with pytest.raises(AssertionError, match="more than 1.25 and 4 times"):
            assert_model_as_accurate(actual, exact, plain)


def test_models_and_infinities() -> None:
    exact = torch.tensor([[1.0, -INF]], dtype=torch.float64)
    plain = torch.tensor([[1.5, -INF]])
    assert_model_as_accurate(plain, exact, plain)
    with pytest.raises(AssertionError, match="infinities differ"):
        assert_model_as_accurate(torch.tensor([[1.0, 0.0]]), exact, plain)
