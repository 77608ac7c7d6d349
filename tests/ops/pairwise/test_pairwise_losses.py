# SPDX-License-Identifier: Apache-2.0
"""Cross entropy of a linear layer, contrastive loss and late interaction beside plain torch, and without the matrix."""

from __future__ import annotations

import math
import resource
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pycore import ops
from pycore.reference import pairwise as reference
from tests.support.tolerance import assert_as_accurate


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "z_loss": 0.01},
    {"softcap": 3.0},
    {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 10.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("n, v, d", [(5, 17, 3), (130, 2050, 48)])
def test_linear_cross_entropy(isa: str, n: int, v: int, d: int, with_bias: bool, options: dict) -> None:
    inputs = [rows(n, d), rows(v, d) * 0.3] + [rows(v)] * with_bias
    target = torch.arange(n) * 7 % v
    target[2] = -100

    def run(function, dtype: torch.dtype) -> list[Tensor]:  # noqa: ANN001
        leaves = [part.to(dtype).requires_grad_() for part in inputs]
        bias = leaves[2] if with_bias else None
        loss = function(leaves[0], leaves[1], target, bias=bias, **options)
        grad = torch.linspace(0.5, 2, n, dtype=dtype) if options.get("reduction") == "none" else None
        return [loss.detach(), *torch.autograd.grad(loss, leaves, grad)]

    actual = run(ops.linear_cross_entropy, torch.float32)
    exact, plain = (
        run(reference.linear_cross_entropy, torch.float64),
        run(reference.linear_cross_entropy, torch.float32),
    )
    for mine, truth, theirs, name in zip(actual, exact, plain, ("loss", "x", "weight", "bias"), strict=False):
        assert_as_accurate(mine, truth, theirs, name)
    with torch.no_grad():  # without a gradient there is another pass, and the same loss
        bias = inputs[2] if with_bias else None
        assert torch.equal(ops.linear_cross_entropy(inputs[0], inputs[1], target, bias=bias, **options), actual[0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_twice_through_one_graph(reduction: str) -> None:
    """The first pass gives its gradients away, where they are then changed; the second makes the same ones anew."""
    x, weight, bias = rows(70, 24).requires_grad_(), rows(300, 24).requires_grad_(), rows(300).requires_grad_()
    target = torch.arange(70) * 11 % 300
    loss = ops.linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction) * 0.37
    first = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    for again in range(2):
        grads = torch.autograd.grad(loss, (x, weight, bias), retain_graph=again == 0)
        assert all(torch.equal(grad, own) for grad, own in zip(grads, kept, strict=True))
    whole = F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction) * 0.37
    for grad, own in zip(torch.autograd.grad(whole, (x, weight, bias)), kept, strict=True):
        torch.testing.assert_close(grad, own, rtol=1e-4, atol=1e-6 * float(grad.abs().max()))


def test_linear_cross_entropy_gives_its_gradients_away() -> None:
    """So there is one of each, which the parameter keeps."""
    x, weight = rows(40, 16), rows(500, 16).requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, torch.arange(40))
    made = loss.grad_fn.parts[1].data_ptr()  # type: ignore[union-attr]
    (0.5 * loss).backward()
    assert weight.grad is not None and weight.grad.data_ptr() == made


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_linear_cross_entropy_gradcheck(options: dict) -> None:
    leaves = [part.double().requires_grad_() for part in (rows(4, 3), rows(6, 3), rows(6))]
    target = torch.tensor([5, 0, -100, 2])
    assert torch.autograd.gradcheck(lambda x, w, b: ops.linear_cross_entropy(x, w, target, bias=b, **options), leaves)


def test_linear_cross_entropy_follows_torch() -> None:
    x, weight, target = rows(2, 3, 8), rows(11, 8), torch.tensor([[1, 10, 0], [4, 4, 7]])
    assert ops.linear_cross_entropy(x, weight, target, reduction="none").shape == (2, 3)
    for options in ({}, {"ignore_index": 4}, {"reduction": "sum", "label_smoothing": 1.0}):
        theirs = F.cross_entropy(F.linear(x, weight).flatten(0, 1), target.flatten(), **options)
        torch.testing.assert_close(ops.linear_cross_entropy(x, weight, target, **options), theirs)
    one = ops.linear_cross_entropy(x[0, 0], weight, torch.tensor(3))
    torch.testing.assert_close(one, F.cross_entropy(F.linear(x[0, 0], weight), torch.tensor(3)))
    frozen = weight.clone().requires_grad_()
    ops.linear_cross_entropy(x, frozen, target).backward(torch.tensor(3.0))
    theirs = weight.clone().requires_grad_()
    F.cross_entropy(F.linear(x, theirs).flatten(0, 1), target.flatten()).backward(torch.tensor(3.0))
    torch.testing.assert_close(frozen.grad, theirs.grad)


def test_linear_cross_entropy_of_ignored_rows() -> None:
    x, weight = rows(3, 4).requires_grad_(), rows(5, 4).requires_grad_()
    nothing = torch.full((3,), -100)
    loss = ops.linear_cross_entropy(x, weight, nothing)
    loss.backward()
    assert loss.isnan() and F.cross_entropy(x @ weight.T, nothing).isnan()
    assert x.grad.abs().max() == 0 and weight.grad.abs().max() == 0
    assert ops.linear_cross_entropy(x, weight, nothing, reduction="sum") == 0
    assert ops.linear_cross_entropy(x[:0], weight, nothing[:0], reduction="none").shape == (0,)


def test_linear_cross_entropy_rows_have_the_same_bits_alone() -> None:
    x, weight, target = rows(200, 40), rows(3000, 40), torch.arange(200)
    whole = ops.linear_cross_entropy(x, weight, target, reduction="none", label_smoothing=0.1)
    for i in (0, 95, 199):
        alone = ops.linear_cross_entropy(x[i : i + 1], weight, target[i : i + 1], reduction="none", label_smoothing=0.1)
        assert torch.equal(whole[i : i + 1], alone)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_has_no_second_derivative(reduction: str) -> None:
    x, weight = rows(3, 4).requires_grad_(), rows(5, 4)
    loss = ops.linear_cross_entropy(x, weight, torch.arange(3), reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not available$"):
        grad.sum().backward()


@pytest.mark.parametrize("symmetric", [True, False])
def test_contrastive_loss(isa: str, symmetric: bool) -> None:
    a, b = rows(150, 24), rows(150, 24, seed=1)
    exact = reference.contrastive_loss(a.double(), b.double(), 0.4, symmetric)
    plain = reference.contrastive_loss(a, b, 0.4, symmetric)
    assert_as_accurate(ops.contrastive_loss(a, b, scale=0.4, symmetric=symmetric), exact, plain)
    order = torch.randperm(150)
    shuffled = ops.contrastive_loss(a, b[order], scale=0.4, symmetric=symmetric, positives=order.argsort())
    torch.testing.assert_close(shuffled, plain)


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 3), (96, 16, 8), (97, 17, 300), (1700, 1025, 5), (40, 2100, 24)])
def test_both_directions_of_one_pass(isa: str, n: int, m: int, d: int) -> None:
    """Rows have the bits of a pass of their own; columns, blocks of rows merged, the accuracy of one and fixed bits."""
    x, y = rows(1, n, d).requires_grad_(), rows(1, m, d, seed=1).requires_grad_()
    target = torch.arange(n).unsqueeze(0) * 7 % (m + 1) - 1
    grads = rows(1, n, seed=2), rows(1, m, seed=3), rows(1, n, seed=4)

    def run() -> tuple[Tensor, ...]:
        made = torch.ops.pycore.pairwise_logsumexp_both(x, y, target, 0.5, "op")
        return *made, *torch.autograd.grad(made, (x, y), grads)

    def of(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        logits = 0.5 * x @ y.mT
        logit = torch.where(target < 0, 0.0, logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1))
        made = logits.logsumexp(2), logits.logsumexp(1), logit
        return *made, *torch.autograd.grad(made, (x, y), [grad.to(x.dtype) for grad in grads])

    made = run()
    alone = torch.ops.pycore.pairwise_logsumexp(x, y, None, target, False, 0.5, 0.0, -1, False, "op")
    assert torch.equal(made[0], alone[0]) and torch.equal(made[2], alone[1])
    exact = of(*(side.detach().double().requires_grad_() for side in (x, y)))
    for mine, wanted, plain in zip(made, exact, of(x, y), strict=True):
        assert_as_accurate(mine, wanted, plain)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert all(map(torch.equal, run(), made))
    finally:
        torch.set_num_threads(threads)


def test_contrastive_loss_of_few_numbers_and_of_none() -> None:
    a, b = rows(3, 4).requires_grad_(), rows(3, 4, seed=1)
    wide, other = (side.detach().double().requires_grad_() for side in (a, b))
    exact, plain = reference.contrastive_loss(wide, other, 1e4), reference.contrastive_loss(a, b, 1e4)
    loss = ops.contrastive_loss(a, b, scale=1e4)  # a scale that leaves one term of each sum
    assert_as_accurate(loss, exact, plain)
    of = (torch.autograd.grad(made, x)[0] for made, x in ((loss, a), (exact, wide), (plain, a)))
    assert_as_accurate(*of)
    assert ops.contrastive_loss(a[:0], b[:0], scale=1.0).isnan() and F.cross_entropy(b[:0], torch.arange(0)).isnan()
    empty = ops.contrastive_loss(a[:0], b, scale=1.0, positives=torch.arange(0))
    assert torch.equal(torch.autograd.grad(empty, a)[0], torch.zeros(3, 4))
    for bad in (math.nan, math.inf):
        assert not ops.contrastive_loss(torch.full((3, 4), bad), b, scale=1.0).isfinite()


def test_contrastive_loss_gradients() -> None:
    a, b = (rows(5, 3, seed=i).double().requires_grad_() for i in range(2))
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, s: ops.contrastive_loss(a, b, scale=s), (a, b, scale))
    positives = torch.tensor([3, -1, 0])
    few = lambda a, b: ops.contrastive_loss(a[:3], b, scale=0.5, positives=positives)  # noqa: E731
    assert torch.autograd.gradcheck(few, (a, b))
    logits = 0.5 * a[[0, 2]] @ b.T
    forth = F.cross_entropy(logits, torch.tensor([3, 0]))
    columns = (0.5 * b @ a[:3].T).logsumexp(1)[[3, 0]] - logits[[0, 1], [3, 0]]
    torch.testing.assert_close(few(a, b), (forth + columns.mean()) / 2)


def test_maxsim(isa: str) -> None:
    query, document = rows(3, 5, 16), rows(4, 70, 16)
    exact = reference.maxsim(query.double(), document.double())
    scores = ops.maxsim(query, document)
    assert_as_accurate(scores, exact, reference.maxsim(query, document))
    assert torch.equal(ops.maxsim(query[0], document), scores[0])
    assert torch.equal(ops.maxsim(query, document[1]), scores[:, 1])
    assert torch.equal(ops.maxsim(query[2], document[3]), scores[2, 3])
    pairs = ops.maxsim(query, document[None, :2].expand(3, 2, 70, 16))
    assert torch.equal(pairs, scores[:, :2])


@pytest.mark.parametrize("pairs", [False, True])
def test_maxsim_lengths(pairs: bool) -> None:
    query, document = rows(3, 5, 16), rows(4, 70, 16)
    q_lengths, d_lengths = torch.tensor([5, 2, 0]), torch.tensor([70, 1, 0, 33])
    if pairs:
        document, d_lengths = document.expand(3, 4, 70, 16), d_lengths.expand(3, 4)
    scores = ops.maxsim(query, document, query_lengths=q_lengths, document_lengths=d_lengths)
    for i, n in enumerate(q_lengths.tolist()):
        for j, m in enumerate([70, 1, 0, 33]):
            each = document[i, j] if pairs else document[j]
            if n and m:
                assert torch.equal(scores[i, j], ops.maxsim(query[i, :n], each[:m]))
            else:
                assert scores[i, j] == (0 if n == 0 else -torch.inf)


def test_maxsim_gradients() -> None:
    query, document = rows(2, 3, 4).double().requires_grad_(), rows(3, 5, 4).double().requires_grad_()
    lengths = torch.tensor([3, 1])
    assert torch.autograd.gradcheck(lambda q, d: ops.maxsim(q, d, query_lengths=lengths), (query, document))


MEMORY = """
import resource, sys, torch
from pycore import ops
x, y = torch.randn(32768, 8), torch.randn(32768, 8)
target = torch.arange(32768)
x.requires_grad_(), y.requires_grad_()
ops.linear_cross_entropy(x[:512], y, target[:512]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.linear_cross_entropy(x, y, target).backward()
ops.contrastive_loss(x, y, scale=0.5).backward()
with torch.no_grad():
    ops.pairwise_logsumexp(x, y)
    ops.pairwise_topk(x, y, 3)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_no_matrix_is_allocated() -> None:
    """32,768 rows against 32,768: the matrix would be 4 GiB. Forward and backward add less than 100 MiB."""
    limit = resource.getrlimit(resource.RLIMIT_AS)
    assert limit[0] == resource.RLIM_INFINITY or limit[0] > 2**33
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100


VOCABULARY = """
import resource, torch
from pycore import ops
x, weight, target = torch.randn(2048, 16), torch.randn(151936, 16), torch.randint(0, 151936, (2048,))
x.requires_grad_(), weight.requires_grad_()
ops.linear_cross_entropy(x[:8], weight[:4096], target[:8] % 4096).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.linear_cross_entropy(x, weight, target).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_no_logits_of_a_large_vocabulary_are_allocated() -> None:
    """2,048 tokens and 151,936 classes: the logits would be 1.2 GiB. Two gradients and the scratch are 80 MiB."""
    done = subprocess.run([sys.executable, "-c", VOCABULARY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 120
