# SPDX-License-Identifier: Apache-2.0
"""The pairwise ops under torch: opcheck, compile, export, vmap, torch.func, autocast; and beside pycore.native."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from pycore import native, ops

kernels = torch.ops.pycore
X, Y = torch.randn(2, 7, 6), torch.randn(2, 9, 6)
BIAS, TARGET = torch.randn(2, 9), torch.randint(-1, 9, (2, 7))
INDICES = torch.randint(-1, 9, (2, 7, 3))
OP = "pairwise_logsumexp"


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


SAMPLES = [
    (kernels.pairwise_logsumexp, (leaf(X), leaf(Y), leaf(BIAS), TARGET, False, 0.7, 3.0, -1, True, OP)),
    (kernels.pairwise_logsumexp, (leaf(X), leaf(Y), None, None, True, -0.7, 0.0, -1, False, OP)),
    (kernels.pairwise_logsumexp, (X.double(), leaf(Y.double()), None, TARGET, False, 1.0, 0.0, -1, False, OP)),
    (kernels.pairwise_logsumexp_gradients,
     (X, Y, BIAS, TARGET, torch.randn(2, 7, 4), False, 0.7, 0.0, -1, True, False, True, OP)),
    (kernels.pairwise_logsumexp_both, (leaf(X), leaf(Y), TARGET, 0.7, "contrastive_loss")),
    (kernels.pairwise_logsumexp_both, (X, leaf(Y), None, 0.7, "contrastive_loss")),
    (kernels.pairwise_logsumexp_both_backward,
     (X, Y, TARGET, torch.randn(2, 7, 4), torch.randn(2, 9), torch.randn(2, 9), 0.7, True, False, "contrastive_loss")),
    (kernels.pairwise_topk, (leaf(X), leaf(Y), 3, False, None, torch.tensor([9, 2]), "pairwise_topk")),
    (kernels.pairwise_topk, (leaf(X), leaf(Y), 2, True, torch.tensor([7, 0]), None, "pairwise_topk")),
    (kernels.pairwise_distances_at, (leaf(X), leaf(Y), INDICES)),
    (kernels.pairwise_pairs_backward, (torch.randn(2, 7, 3), X, Y, INDICES, True)),
    (kernels.hamming_topk, (X.to(torch.uint8), Y.to(torch.uint8), 4)),
]  # fmt: skip


@pytest.mark.parametrize("op, args", SAMPLES, ids=[f"{op.__name__}{i}" for i, (op, _) in enumerate(SAMPLES)])
def test_opcheck(op, args: tuple) -> None:  # noqa: ANN001
    torch.library.opcheck(op.default, args)


def training(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """A bit of everything that has a gradient."""
    rows = torch.arange(x.shape[0], device=x.device) % y.shape[0]
    lse, logit = ops.pairwise_logsumexp(x, y, scale=-0.5, target=rows, score="euclidean")
    loss = ops.linear_cross_entropy(x, y, rows, label_smoothing=0.1)
    near, _ = ops.pairwise_topk(x, y, 2, score="cosine")
    of_x, of_y = ops.pairwise_min(x, y)
    total = (lse - logit).sum() + loss + near.sum() + of_x.sum() + of_y.sum()
    return (total + ops.contrastive_loss(x, x + 1, scale=0.3) + ops.maxsim(x, y),)


def test_compile_with_changing_rows() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(training, fullgraph=True, dynamic=True, backend=counter)
    for rows in (10, 12, 40, 77):
        grads = []
        for function in (compiled, training):
            x, y = leaf(torch.linspace(-1, 1, rows * 6).sin().reshape(rows, 6)), leaf(Y[0])
            (total,) = function(x, y)
            grads.append((total.detach(), *torch.autograd.grad(total, (x, y))))
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2  # a number of the schema starts the first trace again


def test_export() -> None:
    class Search(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return ops.pairwise_logsumexp(x, Y[0]), ops.pairwise_topk(x, Y[0], 3)[1]

    program = torch.export.export(Search(), (X[0],), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    x = torch.randn(30, 6)
    assert all(map(torch.equal, program.module()(x), Search()(x)))


def test_vmap() -> None:
    cases = [
        lambda x, y: ops.pairwise_logsumexp(x, y, score="cosine"),
        lambda x, y: ops.pairwise_topk(x, y, 2, score="euclidean")[1],
        lambda x, y: ops.pairwise_min(x, y)[1],
        lambda x, y: ops.maxsim(x, y),
        lambda x, y: ops.linear_cross_entropy(x, y, torch.arange(7)),
        lambda x, y: ops.contrastive_loss(x, y, scale=0.5, positives=torch.arange(7)),
    ]
    for case in cases:
        together = torch.vmap(case)(X, Y)
        assert torch.equal(together, torch.stack([case(x, y) for x, y in zip(X, Y, strict=True)]))
        shared = torch.vmap(case, in_dims=(0, None))(X, Y[0])
        assert torch.equal(shared, torch.stack([case(x, Y[0]) for x in X]))
    for case in cases[:3]:
        assert torch.vmap(case, in_dims=(0, None))(X[:0], Y[0]).shape == (0, *case(X[0], Y[0]).shape)
    bits, others = X.to(torch.uint8), Y.to(torch.uint8)
    assert torch.equal(torch.vmap(lambda x, y: ops.hamming_topk(x, y, 2)[1])(bits, others),
                       ops.hamming_topk(bits, others, 2)[1])  # fmt: skip


def test_func_grad_and_per_sample_gradients() -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return ops.linear_cross_entropy(x, y, torch.arange(7), z_loss=0.1) + ops.pairwise_logsumexp(x, y).sum()

    for i, per_sample in enumerate(torch.vmap(torch.func.grad(loss))(X, Y)):
        x = leaf(X[i])
        torch.testing.assert_close(per_sample, torch.autograd.grad(loss(x, Y[i]), x)[0])


def test_second_derivatives_are_refused() -> None:
    x = leaf(X)
    (grad,) = torch.autograd.grad(ops.pairwise_logsumexp(x, Y).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="^pairwise_logsumexp: second derivatives are not available$"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(ops.contrastive_loss(x, Y + 0 * x.sum(), scale=0.5, positives=TARGET), x,
                                  torch.ones(2), create_graph=True)  # fmt: skip
    with pytest.raises(NotImplementedError, match="^contrastive_loss: second derivatives are not available$"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="^contrastive_loss: forward-mode derivatives are not available$"):
        torch.func.jvp(lambda x: ops.contrastive_loss(x, X[:, :7], scale=0.5), (X,), (X,))
    with pytest.raises(NotImplementedError, match="^pairwise_logsumexp: forward-mode derivatives are not available$"):
        torch.func.jvp(lambda x: ops.pairwise_logsumexp(x, Y), (X,), (X,))


def test_autocast_changes_nothing() -> None:
    plain = ops.pairwise_logsumexp(X, Y, score="cosine")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.pairwise_logsumexp(X, Y, score="cosine"), plain)
        assert torch.equal(ops.linear_cross_entropy(X[0].bfloat16(), Y[0], TARGET[0].clamp(min=0)),
                           ops.linear_cross_entropy(X[0].bfloat16(), Y[0], TARGET[0].clamp(min=0)))  # fmt: skip


def test_strides() -> None:
    x = torch.randn(6, 7, 2).permute(2, 1, 0)
    y = torch.randn(9, 12)[:, ::2].expand(2, 9, 6)
    dense = x.contiguous(), y.contiguous()
    assert torch.equal(ops.pairwise_logsumexp(x, y), ops.pairwise_logsumexp(*dense))
    assert torch.equal(ops.pairwise_topk(x, y, 2)[0], ops.pairwise_topk(*dense, 2)[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threads", [1, 3])
def test_native_gives_the_same(dtype: type, threads: int) -> None:
    x, y, bias = (part.numpy().astype(dtype) for part in (X, Y, BIAS))
    tensors = [torch.from_numpy(part) for part in (x, y, bias)]
    weights = torch.randn(2, 7, 4).numpy().astype(dtype)

    def same(mine: tuple, theirs: tuple) -> None:
        for a, b in zip(mine, theirs, strict=True):
            assert np.array_equal(a, b.numpy())

    same(
        native.pairwise_logsumexp(x, y, bias, TARGET.numpy(), scale=0.5, softcap=4.0, need_sum=True, threads=threads),
        kernels.pairwise_logsumexp(*tensors, TARGET, False, 0.5, 4.0, -1, True, OP),
    )
    same(
        native.pairwise_logsumexp_gradients(
            x, y, bias, TARGET.numpy(), weights, euclidean=True, scale=-0.5, threads=threads
        ),
        kernels.pairwise_logsumexp_gradients(
            *tensors, TARGET, torch.from_numpy(weights), True, -0.5, 0.0, -1, True, True, True, OP
        ),
    )
    mine = native.pairwise_logsumexp_both(x, y, TARGET.numpy(), scale=0.5, threads=threads)
    same(mine, kernels.pairwise_logsumexp_both(*tensors[:2], TARGET, 0.5, OP))
    same(
        native.pairwise_logsumexp_both_backward(
            x, y, TARGET.numpy(), weights, bias, mine[1], scale=0.5, threads=threads
        ),
        kernels.pairwise_logsumexp_both_backward(
            *tensors[:2], TARGET, torch.from_numpy(weights), tensors[2], torch.from_numpy(mine[1]), 0.5, True, True, OP
        ),
    )
    for euclidean in (False, True):
        same(
            native.pairwise_topk(x, y, 3, euclidean=euclidean, y_lengths=np.array([9, 2]), threads=threads),
            kernels.pairwise_topk(*tensors[:2], 3, euclidean, None, torch.tensor([9, 2]), "pairwise_topk"),
        )
    index = INDICES.numpy()
    same(
        (native.pairwise_distances_at(x, y, index, threads=threads),),
        (kernels.pairwise_distances_at(*tensors[:2], INDICES),),
    )
    grad = np.ones((2, 7, 3), dtype)
    same(
        native.pairwise_pairs_backward(grad, x, y, index, euclidean=True, threads=threads),
        kernels.pairwise_pairs_backward(torch.from_numpy(grad), *tensors[:2], INDICES, True),
    )
    bits = [part.astype(np.uint8) for part in (x, y)]
    same(native.hamming_topk(*bits, 4, threads=threads), kernels.hamming_topk(*map(torch.from_numpy, bits), 4))
