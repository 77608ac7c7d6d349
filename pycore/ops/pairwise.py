# SPDX-License-Identifier: Apache-2.0
"""Scores of the rows of x against the rows of y, reduced as they are made: the matrix never exists.

A row's result has the same bits alone, in any batch and on any number of threads: every score is summed in one order,
and the rows of y are reduced in segments cut by position (csrc/include/pycore/pairwise/pairwise.h). The ops are
csrc/torch/pairwise.cpp, which run csrc/cpu/pairwise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_int, check_number
from pycore._tensors import as_index, check_tensor, short_name
from pycore.ops._pairwise import batched, check_score, lead_of, per_row, scaled, unit_rows, widened

__all__ = ["pairwise_logsumexp", "pairwise_min", "pairwise_topk"]


def pairwise_logsumexp(
    x: Tensor, y: Tensor, *, scale: float | Tensor = 1.0, x_bias: Tensor | None = None, y_bias: Tensor | None = None,
    target: Tensor | None = None, score: str = "dot",
) -> Any:  # fmt: skip
    """Log sum over j of e^(scale s(x_i, y_j) + x_bias_i + y_bias_j), for every row of x.

    Args:
        x: [..., N, D], float32, bfloat16 or float16 (widened to float32); float64 runs plain loops.
        y: [..., M, D]. Leading dimensions broadcast.
        scale: a number. A tensor of no dimensions has a gradient too, with "dot" and "cosine".
        x_bias: [..., N], or None.
        y_bias: [..., M], or None; -inf leaves a row of y out.
        target: [..., N] integers: the row of y that belongs to each row of x, -1 for none.
        score: "dot", the product; "cosine", the product of rows of length 1 (zeros stay); or "euclidean", the squared
            distance, positive as it is: nearness is a negative scale.

    Returns:
        lse [..., N], -inf where there is no row of y. With `target`, (lse, logit): the target's term of the sum before
        the exponential, scale and biases in it, so that lse - logit is a cross entropy; 0 for -1. float32, or float64.
        Differentiable once in x, y and both biases; nothing of size N x M exists in the gradient either.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
        IndexError: a target that is no row of y.
        TypeError: an argument of the wrong type.

    Source: Feydy et al., "Fast geometric learning with symbolic matrices" (KeOps).
    """
    op = "pairwise_logsumexp"
    check_score(op, score)
    for name, tensor in (("x_bias", x_bias), ("y_bias", y_bias), ("target", target)):
        check_tensor(op, name, tensor, optional=True)
        if tensor is not None and tensor.dtype.is_complex:
            wanted = "int64" if name == "target" else "float32"
            raise ValueError(f"{op}: {name} has dtype {short_name(tensor.dtype)} and must have {wanted}")
    x, y = widened(op, x=x, y=y)
    lead, n, m = lead_of(op, x, y), x.shape[-2], y.shape[-2]
    if score == "cosine":
        x, y = unit_rows(x), unit_rows(y)
    if isinstance(scale, Tensor) and scale.dim() == 0 and score != "euclidean":
        x, scale = scaled(op, x, scale), 1.0
    factor = check_number(op, "scale", scale)
    y_rows = None if y_bias is None else per_row(op, "y_bias", y_bias.to(y.dtype), lead, m)
    targets = None if target is None else per_row(op, "target", as_index(target), lead, n)
    lse, logit, _ = torch.ops.pycore.pairwise_logsumexp(
        batched(x, lead, 2), batched(y, lead, 2), y_rows, targets, score == "euclidean", factor, 0.0, -1, False, op
    )
    if x_bias is not None:
        x_rows = per_row(op, "x_bias", x_bias.to(x.dtype), lead, n)
        lse = lse + x_rows
        logit = logit if targets is None else logit + torch.where(targets == -1, 0.0, x_rows)
    lse = lse.reshape(*lead, n)
    return lse if target is None else (lse, logit.reshape(*lead, n))


def _lengths(op: str, name: str, lengths: Tensor | None, lead: tuple[int, ...]) -> Tensor | None:
    check_tensor(op, name, lengths, optional=True)
    if lengths is None:
        return None
    try:
        return as_index(lengths).expand(lead).reshape(math.prod(lead))
    except RuntimeError:
        raise ValueError(
            f"{op}: {name} has shape {list(lengths.shape)} and must broadcast to {list(lead)}, the leading dimensions"
        ) from None


def pairwise_topk(
    x: Tensor, y: Tensor, k: int, *, score: str = "dot", x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The best k rows of y for every row of x, the best first; of equal scores the lowest index.

    Exact: by the scores as float32 sums them in one order. Distances are sums of squared differences, found by the
    search that `vq_encode` has, with its indices.

    Args:
        x: [..., N, D], float32, bfloat16 or float16 (widened to float32); float64 runs plain loops.
        y: [..., M, D]. Leading dimensions broadcast.
        k: 1 to M.
        score: "dot", "cosine" (rows over their length, zeros stay): the largest first; "euclidean", the squared
            distance: the smallest first.
        x_lengths: [...] integers: how many rows of x count. The others are not read, and have none.
        y_lengths: [...] integers: how many rows of y count.

    Returns:
        scores [..., N, k], differentiable once in x and y, and indices, int64 [..., N, k]. Where fewer than k rows
        count, the rest has index -1 and score -inf (inf for distances).

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; NaN or an infinity in a row that counts; scores
            that float32 does not hold.
        TypeError: an argument of the wrong type.

    Source: Johnson et al., "Billion-scale similarity search with GPUs" (faiss' flat index).
    """
    op = "pairwise_topk"
    check_score(op, score)
    check_int(op, "k", k)
    return _topk(op, x, y, k, score, x_lengths, y_lengths)


def _topk(
    op: str, x: Tensor, y: Tensor, k: int, score: str, x_lengths: Tensor | None, y_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, y = widened(op, x=x, y=y)
    lead, n = lead_of(op, x, y), x.shape[-2]
    lengths = _lengths(op, "x_lengths", x_lengths, lead), _lengths(op, "y_lengths", y_lengths, lead)
    if score == "cosine":
        x, y = unit_rows(x), unit_rows(y)
    scores, indices = torch.ops.pycore.pairwise_topk(
        batched(x, lead, 2), batched(y, lead, 2), k, score == "euclidean", *lengths, op
    )
    return scores.reshape(*lead, n, k), indices.reshape(*lead, n, k)


def pairwise_min(x: Tensor, y: Tensor, *, score: str = "euclidean") -> tuple[Tensor, Tensor]:
    """The least score of every row of x, and of every row of y.

    With distances, what the losses of prototype networks are made of: how far an example is from its nearest prototype,
    and a prototype from its nearest example.

    Args:
        x: [..., N, D], float32, bfloat16 or float16 (widened to float32); float64 runs plain loops. N >= 1.
        y: [..., M, D], M >= 1. Leading dimensions broadcast.
        score: "euclidean" (squared), "dot" or "cosine".

    Returns:
        [..., N] and [..., M]. Differentiable once in x and y, at the pair that is least (of equal ones the first).

    Raises:
        ValueError: a shape, dtype or device that does not fit; NaN or an infinity.
        TypeError: an argument of the wrong type.

    Source: Li et al., "Deep Learning for Case-Based Reasoning through Prototypes".
    """
    op = "pairwise_min"
    check_score(op, score)
    check_tensor(op, "x", x)
    check_tensor(op, "y", y)
    for name, rows in (("x", x), ("y", y)):
        if rows.dim() >= 2 and rows.shape[-2] == 0:
            raise ValueError(f"{op}: {name} has shape {list(rows.shape)} and must have a row")
    if score == "euclidean":
        of_x, of_y = _topk(op, x, y, 1, score, None, None)[0], _topk(op, y, x, 1, score, None, None)[0]
    else:
        of_x, of_y = -_topk(op, -x, y, 1, score, None, None)[0], -_topk(op, -y, x, 1, score, None, None)[0]
    return of_x.squeeze(-1), of_y.squeeze(-1)
