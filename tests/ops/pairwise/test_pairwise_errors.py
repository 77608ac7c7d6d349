# SPDX-License-Identifier: Apache-2.0
"""What the pairwise ops refuse: one sentence that names the op, the argument, what it was and what it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pycore import native, ops

X, Y = torch.randn(4, 3), torch.randn(5, 3)
NAN = X.clone().index_fill(0, torch.tensor(2), torch.nan)
T4 = torch.zeros(4, dtype=torch.int64)
BYTES = torch.zeros(4, 3, dtype=torch.uint8)

CASES: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, "pairwise_logsumexp: x is a list and must be a Tensor", lambda: ops.pairwise_logsumexp([1], Y)),
    (TypeError, "pairwise_logsumexp: scale is a str and must be a number",
     lambda: ops.pairwise_logsumexp(X, Y, scale="1")),
    (ValueError, "pairwise_logsumexp: scale is inf and must be finite",
     lambda: ops.pairwise_logsumexp(X, Y, scale=float("inf"))),
    (ValueError, "pairwise_logsumexp: score is 'l2' and must be dot, cosine or euclidean",
     lambda: ops.pairwise_logsumexp(X, Y, score="l2")),
    (ValueError, "pairwise_logsumexp: y has 2 channels and must have x's 3",
     lambda: ops.pairwise_logsumexp(X, Y[:, :2])),
    (ValueError, "pairwise_logsumexp: x has dtype int64 and must have float32, bfloat16 or float16",
     lambda: ops.pairwise_logsumexp(X.long(), Y)),
    (ValueError, "pairwise_logsumexp: y has dtype float64 and must have x's float32",
     lambda: ops.pairwise_logsumexp(X, Y.double())),
    (ValueError, "pairwise_logsumexp: x has shape [3] and must be [..., rows, channels]",
     lambda: ops.pairwise_logsumexp(X[0], Y)),
    (ValueError, "pairwise_logsumexp: y has leading dimensions [3] and must have ones that broadcast with x's [2]",
     lambda: ops.pairwise_logsumexp(X.expand(2, 4, 3), Y.expand(3, 5, 3))),
    (ValueError, "pairwise_logsumexp: y_bias has shape [4] and must be [..., 5]",
     lambda: ops.pairwise_logsumexp(X, Y, y_bias=torch.zeros(4))),
    (ValueError, "pairwise_logsumexp: x_bias has shape [2, 4] and must broadcast to [4]",
     lambda: ops.pairwise_logsumexp(X, Y, x_bias=torch.zeros(2, 4))),
    (IndexError, "pairwise_logsumexp: target has 5 and must have 0 to 4, or -1 for none",
     lambda: ops.pairwise_logsumexp(X, Y, target=T4 + 5)),
    (ValueError, "pairwise_logsumexp: target has dtype float32 and must have int64",
     lambda: ops.pairwise_logsumexp(X, Y, target=torch.zeros(4))),
    (ValueError, "pairwise_topk: k is 6 and must be 1 to y's 5 rows", lambda: ops.pairwise_topk(X, Y, 6)),
    (ValueError, "pairwise_topk: k is 0 and must be 1 to y's 5 rows", lambda: ops.pairwise_topk(X, Y, 0)),
    (TypeError, "pairwise_topk: k is a float and must be an int", lambda: ops.pairwise_topk(X, Y, 2.0)),
    (ValueError, "pairwise_topk: x has a NaN or an infinity in row 2 and must have none",
     lambda: ops.pairwise_topk(NAN, Y, 1)),
    (ValueError, "pairwise_topk: y has a NaN or an infinity in row 2 and must have none",
     lambda: ops.pairwise_topk(X, NAN, 1, score="euclidean")),
    (ValueError, "pairwise_topk: x has scores that its dtype does not hold in row 0 and must have none",
     lambda: ops.pairwise_topk(torch.tensor([[1e30, -1e30]]), torch.full((1, 2), 1e30), 1)),
    (ValueError, "pairwise_topk: x has scores that its dtype does not hold in row 0 and must have none",
     lambda: ops.pairwise_topk(torch.tensor([[1e30]]), torch.tensor([[-1e30]]), 1, score="euclidean")),
    (ValueError, "pairwise_topk: y_lengths has 6 and must have 0 to 5",
     lambda: ops.pairwise_topk(X, Y, 1, y_lengths=torch.tensor(6))),
    (ValueError, "pairwise_topk: x_lengths has shape [2] and must broadcast to [], the leading dimensions",
     lambda: ops.pairwise_topk(X, Y, 1, x_lengths=torch.tensor([1, 1]))),
    (ValueError, "pairwise_min: y has shape [0, 3] and must have a row", lambda: ops.pairwise_min(X, Y[:0])),
    (ValueError, "pairwise_min: x has a NaN or an infinity in row 2 and must have none",
     lambda: ops.pairwise_min(NAN, Y)),
    (ValueError, "linear_cross_entropy: weight has 2 channels and must have x's 3",
     lambda: ops.linear_cross_entropy(X, Y[:, :2], T4)),
    (ValueError, "linear_cross_entropy: target has shape [3] and must have x's [4]",
     lambda: ops.linear_cross_entropy(X, Y, T4[:3])),
    (ValueError, "linear_cross_entropy: target has dtype float32 and must have int64",
     lambda: ops.linear_cross_entropy(X, Y, torch.zeros(4))),
    (IndexError, "linear_cross_entropy: target has -1 and must have 0 to 4, or -100 for none",
     lambda: ops.linear_cross_entropy(X, Y, T4 - 1)),
    (ValueError, "linear_cross_entropy: bias has shape [4] and must have [5], a class each",
     lambda: ops.linear_cross_entropy(X, Y, T4, bias=torch.zeros(4))),
    (ValueError, "linear_cross_entropy: reduction is 'max' and must be mean, sum or none",
     lambda: ops.linear_cross_entropy(X, Y, T4, reduction="max")),
    (ValueError, "linear_cross_entropy: label_smoothing is 1.5 and must be 0 to 1",
     lambda: ops.linear_cross_entropy(X, Y, T4, label_smoothing=1.5)),
    (ValueError, "linear_cross_entropy: softcap is -1 and must be finite and not negative",
     lambda: ops.linear_cross_entropy(X, Y, T4, softcap=-1)),
    (ValueError, "linear_cross_entropy: z_loss is nan and must be finite",
     lambda: ops.linear_cross_entropy(X, Y, T4, z_loss=float("nan"))),
    (ValueError, "contrastive_loss: b has 5 rows and must have a's 4, unless positives are given",
     lambda: ops.contrastive_loss(X, Y, scale=1.0)),
    (ValueError, "contrastive_loss: scale is inf and must be finite",
     lambda: ops.contrastive_loss(X, X, scale=float("inf"))),
    (ValueError, "contrastive_loss: scale has dtype complex64 and must have float32",
     lambda: ops.contrastive_loss(X, X, scale=torch.tensor(2j))),
    (ValueError, "contrastive_loss: scale is on meta and must be on cpu, where the rows are",
     lambda: ops.contrastive_loss(X, X, scale=torch.tensor(2.0, device="meta"))),
    (ValueError, "contrastive_loss: positives has dtype float32 and must have int64",
     lambda: ops.contrastive_loss(X, Y, scale=1.0, positives=T4.float())),
    (ValueError, "pairwise_logsumexp: scale has dtype bool and must have float32",
     lambda: ops.pairwise_logsumexp(X, Y, scale=torch.tensor(True))),
    (ValueError, "pairwise_logsumexp: y_bias has dtype complex64 and must have float32",
     lambda: ops.pairwise_logsumexp(X, Y, y_bias=torch.zeros(5) * 1j)),
    (TypeError, "contrastive_loss: symmetric is a int and must be a bool",
     lambda: ops.contrastive_loss(X, X, scale=1.0, symmetric=1)),
    (IndexError, "contrastive_loss: positives has 5 and must have 0 to 4, or -1 for none",
     lambda: ops.contrastive_loss(X, Y, scale=1.0, positives=T4 + 5)),
    (ValueError, "maxsim: document_lengths has 6 and must have 0 to 5",
     lambda: ops.maxsim(X, Y, document_lengths=torch.tensor([6]))),
    (ValueError, "maxsim: query has a NaN or an infinity in row 0 and must have none",
     lambda: ops.maxsim(torch.full_like(X, torch.nan), Y)),
    (ValueError, "maxsim: document has a NaN or an infinity in row 0 and must have none",
     lambda: ops.maxsim(X, torch.full_like(Y, torch.inf))),
    (ValueError, "sinkhorn: a has a negative weight and must have none",
     lambda: ops.sinkhorn(X, Y, epsilon=1.0, iterations=1, a=torch.linspace(-0.1, 1, X.shape[-2]))),
    (ValueError, "kmeans: init has a NaN or an infinity and must have none",
     lambda: ops.kmeans(X, 1, init=torch.full_like(X[:1], torch.nan))),
    (ValueError, "maxsim: query_lengths has shape [2] and must have [1]",
     lambda: ops.maxsim(X, Y, query_lengths=torch.tensor([1, 1]))),
    (ValueError, "sinkhorn: epsilon is 0.0 and must be finite and more than 0",
     lambda: ops.sinkhorn(X, Y, epsilon=0.0, iterations=1)),
    (ValueError, "sinkhorn: iterations is -1 and must be at least 0",
     lambda: ops.sinkhorn(X, Y, epsilon=1.0, iterations=-1)),
    (ValueError, "sinkhorn: y has no rows and must have one",
     lambda: ops.sinkhorn(X, Y[:0], epsilon=1.0, iterations=1)),
    (ValueError, "sinkhorn: a has shape [5] and must be [..., 4]",
     lambda: ops.sinkhorn(X, Y, epsilon=1.0, iterations=1, a=torch.ones(5))),
    (ValueError, "kmeans: k is 5 and must be 1 to x's 4 rows", lambda: ops.kmeans(X, 5)),
    (ValueError, "kmeans: init is 'best' and must be kmeans++ or random, or a tensor of centroids",
     lambda: ops.kmeans(X, 2, init="best")),
    (ValueError, "kmeans: x has a NaN or an infinity and must have none", lambda: ops.kmeans(NAN, 2)),
    (ValueError, "kmeans: init has shape [5, 3] and must have [2, 3]", lambda: ops.kmeans(X, 2, init=Y)),
    (ValueError, "pack_bits: x is a scalar and must have shape [..., D]", lambda: ops.pack_bits(torch.tensor(1.0))),
    (ValueError, "hamming_topk: x has dtype float32 and must have uint8", lambda: ops.hamming_topk(X, BYTES, 1)),
    (ValueError, "hamming_topk: y has 2 bytes a row and must have x's 3",
     lambda: ops.hamming_topk(BYTES, BYTES[:, :2], 1)),
    (ValueError, "hamming_topk: k is 5 and must be 1 to y's 4 rows", lambda: ops.hamming_topk(BYTES, BYTES, 5)),
]  # fmt: skip


@pytest.mark.parametrize(
    "error, message, call", CASES, ids=[f"{i}-{m.split(' ')[0]}" for i, (_, m, _) in enumerate(CASES)]
)
def test_errors(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error and str(raised.value) == message


def test_native_errors() -> None:
    x, y = np.zeros((1, 4, 3), np.float32), np.zeros((1, 5, 3), np.float32)
    cases = [
        ("x has shape [4, 3] and must be [batch, rows, channels]", lambda: native.pairwise_topk(x[0], y, 1)),
        ("y has 2 batches and must have x's 1", lambda: native.pairwise_topk(x, np.zeros((2, 5, 3), np.float32), 1)),
        ("y is float64 and must be float32 like x", lambda: native.pairwise_topk(x, y.astype(float), 1)),
        ("x has dtype float16 and must have float32 or float64",
         lambda: native.pairwise_topk(x.astype(np.float16), y.astype(np.float16), 1)),
        ("k is 6 and must be 1 to y's 5 rows", lambda: native.pairwise_topk(x, y, 6)),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(ValueError) as raised:
            call()
        assert str(raised.value) == f"pairwise_topk: {message}"
    with pytest.raises(IndexError, match="^pairwise_distances_at: indices has 5 and must have -1 to 4, a row of y$"):
        native.pairwise_distances_at(x, y, np.full((1, 4, 1), 5))
    with pytest.raises(ValueError, match=r"^pairwise_logsumexp_gradients: weights has shape \[1, 4, 3\] and must have"):
        native.pairwise_logsumexp_gradients(x, y, None, None, np.zeros((1, 4, 3), np.float32))
