# SPDX-License-Identifier: Apache-2.0
"""The vq ops under torch: opcheck, compile, export, gradients, vmap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pycore import ops

kernels = torch.ops.pycore
X, BOOKS = torch.randn(7, 6), torch.randn(3, 5, 6)
CODES = torch.randint(-1, 5, (7, 3))

SAMPLES = [
    (kernels.vq_encode, (X, BOOKS[0], "euclidean", 2)),
    (kernels.vq_encode, (torch.randn(2, 3, 6), BOOKS, "cosine", 1)),
    (kernels.rvq_encode, (X, BOOKS, None, None, "euclidean", 1, None)),
    (kernels.rvq_encode, (X, BOOKS, [5, 2, 3], 2, "euclidean", 4, torch.ones(1, 6))),
    (kernels.rvq_decode, (CODES, BOOKS.clone().requires_grad_(), None)),
    (kernels.rvq_decode, (CODES[:, :2], BOOKS.double().requires_grad_(), None)),
    (kernels.vq_statistics, (X.clone().requires_grad_(), CODES[:, 0], 5)),
    (kernels.vq_statistics, (X[:0], CODES[:0, 0], 5)),
]


@pytest.mark.parametrize("op, args", SAMPLES, ids=[f"{op.__name__}{i}" for i, (op, _) in enumerate(SAMPLES)])
def test_opcheck(op, args: tuple) -> None:  # noqa: ANN001
    torch.library.opcheck(op.default, args)


def test_gradients() -> None:
    books = BOOKS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda b: ops.rvq_decode(CODES, b), books, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda b: ops.rvq_decode(CODES, b), books)
    sizes = [torch.randn(size, 6, dtype=torch.float64, requires_grad=True) for size in (5, 2, 3)]
    few = CODES.clamp(max=1)
    assert torch.autograd.gradcheck(lambda *b: ops.rvq_decode(few, b), sizes)
    x = X.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.vq_statistics(x, CODES[:, 0], 5)[1], x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: ops.vq_statistics(x, CODES[:, 0], 5)[1], x)


def test_half_precision_gradient_is_summed_wide() -> None:
    books = torch.zeros(1, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    ops.rvq_decode(torch.zeros(1000, 1, dtype=torch.int64), books).sum().backward()
    assert books.grad.unique().tolist() == [1000.0]  # added in bfloat16, it would stand still at 256


def test_compile_with_changing_rows() -> None:
    def both(x: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
        codes = ops.rvq_encode(x, books, beam_size=2)
        return codes, ops.rvq_decode(codes, books)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=counter)
    for rows in (2, 3, 40, 77):
        x = torch.randn(rows, 6)
        for mine, theirs in zip(compiled(x, BOOKS), both(x, BOOKS), strict=True):
            assert torch.equal(mine, theirs)
    assert counter.frame_count == 1


def test_export() -> None:
    class Encoder(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.vq_encode(x, BOOKS[0], topk=2)

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Encoder(), (X,), dynamic_shapes=({0: rows},))
    x = torch.randn(30, 6)
    assert torch.equal(program.module()(x), ops.vq_encode(x, BOOKS[0], topk=2))


def test_vmap() -> None:
    x = torch.randn(4, 7, 6)
    assert torch.equal(torch.vmap(lambda x: ops.vq_encode(x, BOOKS[0]))(x), ops.vq_encode(x, BOOKS[0]))
    each = torch.stack([ops.vq_encode(X, book) for book in BOOKS])
    assert torch.equal(torch.vmap(lambda book: ops.vq_encode(X, book))(BOOKS), each)
    codes = torch.randint(0, 5, (4, 7, 3))
    assert torch.equal(torch.vmap(lambda c: ops.rvq_decode(c, BOOKS))(codes), ops.rvq_decode(codes, BOOKS))
    pairs = torch.vmap(lambda x, c: ops.vq_statistics(x, c, 5))(x, codes[..., 0])
    for i in range(4):
        alone = ops.vq_statistics(x[i], codes[i, :, 0], 5)
        assert all(torch.equal(mine[i], theirs) for mine, theirs in zip(pairs, alone, strict=True))
    assert torch.vmap(lambda book: ops.vq_encode(X, book))(BOOKS[:0]).shape == (0, 7, 1)
