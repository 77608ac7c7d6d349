# SPDX-License-Identifier: Apache-2.0
"""Log-sum-exp, the best k and the least of pairwise scores: values, gradients, the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pycore import native, ops
from pycore.reference import pairwise as reference
from tests.support.tolerance import assert_as_accurate

SCORES = ["dot", "cosine", "euclidean"]
SIZES = [(1, 1, 1), (7, 13, 5), (17, 97, 32), (100, 1025, 33), (6, 2049, 300), (5, 64, 513)]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def scale_of(score: str, dim: int) -> float:
    return -2.0 / dim if score == "euclidean" else 1.3 / dim**0.5


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("n, m, d", SIZES)
def test_logsumexp(isa: str, score: str, n: int, m: int, d: int) -> None:
    x, y, x_bias, y_bias = rows(n, d), rows(m, d, seed=1), rows(n), rows(m)
    scale = scale_of(score, d)
    actual = ops.pairwise_logsumexp(x, y, scale=scale, x_bias=x_bias, y_bias=y_bias, score=score)
    doubles = [part.double() for part in (x, y)]
    exact = reference.pairwise_logsumexp(*doubles, scale, x_bias.double(), y_bias.double(), score)
    assert_as_accurate(actual, exact, reference.pairwise_logsumexp(x, y, scale, x_bias, y_bias, score))


def test_logsumexp_target_is_a_term_of_the_sum(isa: str) -> None:
    x, y, x_bias, y_bias = rows(9, 40), rows(1500, 40), rows(9), rows(1500)
    target = torch.tensor([0, 1499, 1023, 1024, 7, 63, 64, -1, 2])
    lse, logit = ops.pairwise_logsumexp(x, y, scale=0.3, x_bias=x_bias, y_bias=y_bias, target=target)
    logits = 0.3 * x.double() @ y.double().T + y_bias.double() + x_bias.double().unsqueeze(1)
    expected = torch.where(target < 0, 0.0, logits.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1))
    torch.testing.assert_close(logit.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), logits.logsumexp(1), rtol=0, atol=2e-6)


def test_logsumexp_of_nothing_and_of_masked_rows(isa: str) -> None:
    x, y = rows(3, 4), rows(70, 4)
    assert ops.pairwise_logsumexp(x, y[:0]).tolist() == [-torch.inf] * 3
    assert ops.pairwise_logsumexp(x[:0], y).shape == (0,)
    assert ops.pairwise_logsumexp(x, y, y_bias=torch.full((70,), -torch.inf)).tolist() == [-torch.inf] * 3
    few = torch.where(torch.arange(70) < 5, 0.0, -torch.inf)
    torch.testing.assert_close(ops.pairwise_logsumexp(x, y, y_bias=few), ops.pairwise_logsumexp(x, y[:5]))
    assert ops.pairwise_logsumexp(x[:, :0], y[:, :0]).tolist() == pytest.approx([4.2484952] * 3)  # log 70
    large = ops.pairwise_logsumexp(torch.full((1, 1), 3e4), torch.tensor([[1.0], [1.0]]))
    assert large.item() == pytest.approx(3e4 + 0.6931, abs=4e-3)


def test_logsumexp_keeps_nan(isa: str) -> None:
    x, y = rows(3, 4), rows(1100, 4)
    x[1, 2] = torch.nan
    assert ops.pairwise_logsumexp(x, y).isnan().tolist() == [False, True, False]
    assert ops.pairwise_logsumexp(x[:1], y.index_fill(0, torch.tensor(7), torch.nan)).isnan().all()


@pytest.mark.parametrize("score", SCORES)
def test_masked_rows_have_no_gradient(isa: str, score: str) -> None:
    """A row of lse -inf, and rows of y left out: zeros, not NaN."""
    x, y = rows(4, 3).requires_grad_(), rows(6, 3).requires_grad_()
    ops.pairwise_logsumexp(x, y, y_bias=torch.full((6,), -torch.inf), score=score).sum().backward()
    assert x.grad.abs().max() == 0 and y.grad.abs().max() == 0


@pytest.mark.parametrize("score", SCORES)
def test_gradients_in_float64(score: str) -> None:
    make = [(2, 5, 4), (2, 6, 4), (5,), (2, 6)]
    inputs = [rows(*shape).double().requires_grad_() for shape in make]
    target = torch.tensor([[0, 1, 5, -1, 2]] * 2)
    scale = scale_of(score, 4)

    def function(x: Tensor, y: Tensor, x_bias: Tensor, y_bias: Tensor) -> tuple[Tensor, Tensor]:
        return ops.pairwise_logsumexp(x, y, scale=scale, x_bias=x_bias, y_bias=y_bias, target=target, score=score)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradcheck(lambda x, y: ops.pairwise_topk(x, y, 3, score=score)[0], inputs[:2])
    assert torch.autograd.gradcheck(lambda x, y: ops.pairwise_min(x, y, score=score), inputs[:2])


def test_gradient_of_a_scale() -> None:
    x, y = rows(5, 4).double(), rows(6, 4).double()
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: ops.pairwise_logsumexp(x, y, scale=s, score="cosine"), scale)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("n, m, d", [(7, 13, 5), (197, 1100, 33), (100, 2049, 300)])
def test_gradients(isa: str, score: str, n: int, m: int, d: int) -> None:
    inputs, scale = [rows(n, d) + 3, rows(m, d, seed=1) + 3, rows(m)], scale_of(score, d)
    grad = rows(n)

    def gradients(function, dtype: torch.dtype) -> tuple[Tensor, ...]:  # noqa: ANN001
        leaves = [part.to(dtype).requires_grad_() for part in inputs]
        lse = function(leaves[0], leaves[1], scale=scale, y_bias=leaves[2], score=score)
        return torch.autograd.grad(lse, leaves, grad.to(dtype))

    actual = gradients(ops.pairwise_logsumexp, torch.float32)
    exact = gradients(reference.pairwise_logsumexp, torch.float64)
    plain = gradients(reference.pairwise_logsumexp, torch.float32)
    for mine, truth, theirs, name in zip(actual, exact, plain, ("x", "y", "y_bias"), strict=True):
        assert_as_accurate(mine, truth, theirs, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    x, y = rows(9, 40).to(dtype).requires_grad_(), rows(70, 40).to(dtype)
    lse = ops.pairwise_logsumexp(x, y)
    assert torch.equal(lse, ops.pairwise_logsumexp(x.float(), y.float()))
    lse.sum().backward()
    assert x.grad.dtype == dtype
    assert torch.equal(ops.pairwise_topk(x, y, 3)[1], ops.pairwise_topk(x.float(), y.float(), 3)[1])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("n, m, d", SIZES)
def test_topk(isa: str, score: str, n: int, m: int, d: int) -> None:
    x, y = rows(n, d), rows(m, d, seed=1)
    k = min(m, 11)
    scores, indices = ops.pairwise_topk(x, y, k, score=score)
    exact, order = reference.pairwise_topk(x.double(), y.double(), k, score)
    assert torch.equal(indices, order)
    assert_as_accurate(scores, exact, reference.pairwise_topk(x, y, k, score)[0])


@pytest.mark.parametrize("score", SCORES)
def test_topk_ties_go_to_the_lowest_index(isa: str, score: str) -> None:
    y = rows(5, 8).repeat(300, 1)  # every row three hundred times
    scores, indices = ops.pairwise_topk(rows(9, 8), y, 301, score=score)
    _, best = reference.pairwise_topk(rows(9, 8).double(), y[:5].double(), 2, score)
    assert torch.equal(indices[:, :300], best[:, :1] + 5 * torch.arange(300))
    assert torch.equal(indices[:, 300], best[:, 1])
    assert torch.equal(scores[:, 0], scores[:, 299])


def test_topk_of_distances_is_the_search_of_vq(isa: str) -> None:
    x, y = rows(50, 24) + 1000, rows(900, 24) + 1000
    assert torch.equal(ops.pairwise_topk(x, y, 4, score="euclidean")[1], ops.vq_encode(x, y, topk=4))


@pytest.mark.parametrize("score", SCORES)
def test_topk_lengths(isa: str, score: str) -> None:
    x, y = rows(3, 8, 6), rows(3, 20, 6)
    x_lengths, y_lengths = torch.tensor([8, 3, 0]), torch.tensor([2, 20, 5])
    for b in range(3):  # what does not count is not read
        x[b, x_lengths[b] :] = torch.nan
        y[b, y_lengths[b] :] = torch.nan
    scores, indices = ops.pairwise_topk(x, y, 4, score=score, x_lengths=x_lengths, y_lengths=y_lengths)
    for b, (n, m) in enumerate(zip(x_lengths.tolist(), y_lengths.tolist(), strict=True)):
        k = min(4, m)
        alone = ops.pairwise_topk(x[b, :n], y[b, :m], k, score=score)
        assert torch.equal(scores[b, :n, :k], alone[0]) and torch.equal(indices[b, :n, :k], alone[1])
        nothing = torch.ones(8, 4, dtype=torch.bool)
        nothing[:n, :k] = False
        assert (indices[b][nothing] == -1).all()
        assert (scores[b][nothing] == (torch.inf if score == "euclidean" else -torch.inf)).all()
    assert ops.pairwise_topk(x[:, :0], y, 1, y_lengths=y_lengths)[0].shape == (3, 0, 1)


def test_leading_dimensions_broadcast() -> None:
    x, y = rows(2, 1, 5, 4), rows(3, 6, 4)
    lse, (scores, _) = ops.pairwise_logsumexp(x, y), ops.pairwise_topk(x, y, 2, score="euclidean")
    assert lse.shape == (2, 3, 5) and scores.shape == (2, 3, 5, 2)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(lse[i, j], ops.pairwise_logsumexp(x[i, 0], y[j]))
        assert torch.equal(scores[i, j], ops.pairwise_topk(x[i, 0], y[j], 2, score="euclidean")[0])


@pytest.mark.parametrize("score", SCORES)
def test_min(isa: str, score: str) -> None:
    x, y = rows(30, 12), rows(70, 12)
    for mine, theirs in zip(
        ops.pairwise_min(x, y, score=score), reference.pairwise_min(x.double(), y.double(), score), strict=True
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-6)


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
def test_same_bits_alone_in_a_batch_and_on_threads(isa: str, score: str) -> None:
    x, y, grad = rows(2, 113, 40), rows(2, 1300, 40), rows(2, 113)
    scale = scale_of(score, 40)

    def results(x: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        x = x.clone().requires_grad_()
        lse = ops.pairwise_logsumexp(x, y, scale=scale, score=score)
        (of_x,) = torch.autograd.grad(lse, x, grad)
        return lse.detach(), of_x, *ops.pairwise_topk(x.detach(), y, 3, score=score)

    threads = torch.get_num_threads()
    whole = results(x, y, grad)
    try:
        torch.set_num_threads(1)
        assert all(map(torch.equal, whole, results(x, y, grad)))
    finally:
        torch.set_num_threads(threads)
    for i in (0, 5, 112):
        alone = results(x[1, i : i + 1], y[1], grad[1, i : i + 1])
        assert all(torch.equal(all_[1, i : i + 1], one) for all_, one in zip(whole, alone, strict=True))


def test_same_bits_of_the_gradient_of_y_on_threads(isa: str) -> None:
    x, y = rows(500, 40), rows(1300, 40).requires_grad_()
    threads = torch.get_num_threads()
    grads = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            grads.append(torch.autograd.grad(ops.pairwise_logsumexp(x, y).sum(), y)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("k", [1, 40])
def test_same_bits_of_few_rows_on_threads(isa: str, k: int) -> None:
    """One row against many: threads take columns each."""
    x, y = rows(1, 40), rows(40, 40).repeat(500, 1)  # ties in every part
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append((*ops.pairwise_topk(x, y, k), ops.pairwise_logsumexp(x, y)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))
    assert torch.equal(results[0][1], reference.pairwise_topk(x.double(), y.double(), k)[1])


@pytest.mark.skipif("avx512" not in native.available_isas(), reason="one set of vectors only")
@pytest.mark.parametrize("score", SCORES)
def test_same_bits_on_vectors_of_eight_and_sixteen(score: str) -> None:
    x, y, bias = rows(101, 43), rows(1301, 43), rows(1301)
    before, results = native.cpu_isa(), []
    try:
        for name in ("avx2", "avx512"):
            native.set_cpu_isa(name)
            leaves = [part.clone().requires_grad_() for part in (x, y, bias)]
            lse = ops.pairwise_logsumexp(leaves[0], leaves[1], scale=-0.05, y_bias=leaves[2], score=score)
            results.append([lse, *torch.autograd.grad(lse.sum(), leaves), *ops.pairwise_topk(x, y, 5, score=score)])
            loss = ops.linear_cross_entropy(
                leaves[0], leaves[1], torch.arange(101), bias=leaves[2], label_smoothing=0.1, softcap=20.0
            )
            results[-1] += [loss, *torch.autograd.grad(loss, leaves)]
    finally:
        native.set_cpu_isa(before)
    assert all(map(torch.equal, *results))
