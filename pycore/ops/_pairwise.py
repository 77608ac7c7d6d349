# SPDX-License-Identifier: Apache-2.0
"""The ops behind `pycore.ops.pairwise`, on x [batch, N, D] and y [batch, M, D]: fake kernels, autograd, vmap.

And what the public functions share: rows in one shape and dtype, and cosines as products of unit rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_str
from pycore._load import load_ops
from pycore._tensors import check_devices, check_tensor, short_name
from pycore.ops._autograd import no_second_derivative, register_derivatives

load_ops()

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


# ---- what the public functions share ---------------------------------------------------------------------------------


def check_score(op: str, score: Any) -> None:
    """Refuses what is none of the three scores."""
    check_str(op, "score", score)
    if score not in ("dot", "cosine", "euclidean"):
        raise ValueError(f"{op}: score is '{score}' and must be dot, cosine or euclidean")


def widened(op: str, **rows: Tensor) -> list[Tensor]:
    """In float32, or float64 where all are. Every argument has rows [..., n, D]; the channels must agree."""
    (first_name, first), *_ = rows.items()
    for name, x in rows.items():
        check_tensor(op, name, x)
        if x.dtype not in _FLOATS:
            raise ValueError(f"{op}: {name} has dtype {str(x.dtype)[6:]} and must have float32, bfloat16 or float16")
        if (x.dtype == torch.float64) != (first.dtype == torch.float64):
            raise ValueError(
                f"{op}: {name} has dtype {str(x.dtype)[6:]} and must have {first_name}'s {str(first.dtype)[6:]}"
            )
        if x.dim() < 2:
            raise ValueError(f"{op}: {name} has shape {list(x.shape)} and must be [..., rows, channels]")
        if x.shape[-1] != first.shape[-1]:
            raise ValueError(f"{op}: {name} has {x.shape[-1]} channels and must have {first_name}'s {first.shape[-1]}")
        if x.device != first.device:
            raise ValueError(f"{op}: {name} is on {x.device} and must be on {first.device}, where {first_name} is")
    return [x if x.dtype == torch.float64 else x.float() for x in rows.values()]


def lead_of(op: str, x: Tensor, y: Tensor) -> tuple[int, ...]:
    """The leading dimensions of both, broadcast."""
    try:
        return tuple(torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]))
    except RuntimeError:
        raise ValueError(
            f"{op}: y has leading dimensions {list(y.shape[:-2])} and must have ones that broadcast with x's "
            f"{list(x.shape[:-2])}"
        ) from None


def batched(x: Tensor, lead: tuple[int, ...], last: int) -> Tensor:
    """Leading dimensions as one batch; the `last` dimensions stay."""
    kept = x.shape[x.dim() - last :]
    return x.expand(*lead, *kept).reshape(math.prod(lead), *kept)


def per_row(op: str, name: str, values: Tensor, lead: tuple[int, ...], count: int) -> Tensor:
    """A number for each row, [..., count], as [batch, count]."""
    if values.dim() < 1 or values.shape[-1] != count:
        raise ValueError(f"{op}: {name} has shape {list(values.shape)} and must be [..., {count}]")
    try:
        expanded = values.expand(*lead, count)
    except RuntimeError:
        raise ValueError(
            f"{op}: {name} has shape {list(values.shape)} and must broadcast to {[*lead, count]}"
        ) from None
    return expanded.reshape(math.prod(lead), count)


def scaled(op: str, x: Tensor, scale: Tensor) -> Tensor:
    """Rows times a tensor of no dimensions, which may have a gradient."""
    if scale.dtype.is_complex or scale.dtype == torch.bool:
        raise ValueError(f"{op}: scale has dtype {short_name(scale.dtype)} and must have float32")
    if scale.device != x.device and scale.device.type != "cpu":  # torch takes one number from the CPU anywhere
        raise ValueError(f"{op}: scale is on {scale.device} and must be on {x.device}, where the rows are")
    return x * scale.to(x.dtype)


def unit_rows(x: Tensor) -> Tensor:
    """Rows over their length, zeros stay: every row by itself, in one order of summation.

    A power of two brings the largest channel near 1 first, so that no square overflows or vanishes.
    """
    if x.shape[-1] == 0:
        return x
    largest = x.detach().abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent.clamp(-120, 120)
    scaled = x * torch.ldexp(torch.ones_like(largest), -exponent)
    nothing = largest == 0
    unit = torch.ops.pycore.rms_norm(torch.where(nothing, 1.0, scaled), None, 0.0) / math.sqrt(x.shape[-1])
    return torch.where(nothing, 0.0, unit)


# ---- fake kernels ----------------------------------------------------------------------------------------------------


def _empty_if(wanted: bool, tensor: Tensor, *shape: int) -> Tensor:
    return tensor.new_empty(shape if wanted else (0,))


@torch.library.register_fake("pycore::pairwise_logsumexp")
def _logsumexp_fake(
    x: Tensor, y: Tensor, y_bias: Tensor | None, target: Tensor | None, euclidean: bool, scale: float, softcap: float,
    ignore_index: int, need_sum: bool, op: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_devices(op, x=x, y=y, y_bias=y_bias, target=target)
    shape = x.shape[:2]
    return x.new_empty(shape), _empty_if(target is not None, x, *shape), _empty_if(need_sum, x, *shape)


@torch.library.register_fake("pycore::pairwise_logsumexp_gradients")
def _gradients_fake(
    x: Tensor, y: Tensor, y_bias: Tensor | None, target: Tensor | None, weights: Tensor, euclidean: bool, scale: float,
    softcap: float, ignore_index: int, need_x: bool, need_y: bool, need_bias: bool, op: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_devices(op, x=x, y=y, y_bias=y_bias, target=target, weights=weights)
    shape = x.shape[:2]
    return (
        x.new_empty(shape), x.new_empty(shape), x.new_empty(shape), _empty_if(need_x, x, *x.shape),
        _empty_if(need_y, x, *y.shape), _empty_if(need_bias, x, *y.shape[:2]),
    )  # fmt: skip


@torch.library.register_fake("pycore::pairwise_logsumexp_both")
def _both_fake(x: Tensor, y: Tensor, target: Tensor | None, scale: float, op: str) -> tuple[Tensor, Tensor, Tensor]:
    check_devices(op, x=x, y=y, target=target)
    return x.new_empty(x.shape[:2]), x.new_empty(y.shape[:2]), _empty_if(target is not None, x, *x.shape[:2])


@torch.library.register_fake("pycore::pairwise_logsumexp_both_backward")
def _both_backward_fake(
    x: Tensor, y: Tensor, target: Tensor | None, weights: Tensor, column_weights: Tensor, column_lse: Tensor,
    scale: float, need_x: bool, need_y: bool, op: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_devices(op, x=x, y=y, target=target, weights=weights, column_weights=column_weights, column_lse=column_lse)
    return _empty_if(need_x, x, *x.shape), _empty_if(need_y, x, *y.shape)


@torch.library.register_fake("pycore::pairwise_topk")
def _topk_fake(
    x: Tensor, y: Tensor, k: int, euclidean: bool, x_lengths: Tensor | None, y_lengths: Tensor | None, op: str
) -> tuple[Tensor, Tensor]:
    check_devices(op, x=x, y=y, x_lengths=x_lengths, y_lengths=y_lengths)
    shape = (*x.shape[:2], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("pycore::pairwise_distances_at")
def _distances_fake(x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
    check_devices("pairwise_distances_at", x=x, y=y, indices=indices)
    return x.new_empty(indices.shape)


@torch.library.register_fake("pycore::pairwise_pairs_backward")
def _pairs_backward_fake(grad: Tensor, x: Tensor, y: Tensor, indices: Tensor, euclidean: bool) -> tuple[Tensor, Tensor]:
    check_devices("pairwise_pairs_backward", x=x, y=y, grad=grad, indices=indices)
    return x.new_empty(x.shape), y.new_empty(y.shape)


@torch.library.register_fake("pycore::hamming_topk")
def _hamming_fake(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check_devices("hamming_topk", x=x, y=y)
    shape = (*x.shape[:2], k)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.int64)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _logsumexp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, y_bias, target, ctx.euclidean, ctx.scale, ctx.softcap, ctx.ignore_index, ctx.need_sum, ctx.op = inputs
    ctx.save_for_backward(x, y, y_bias, target, output[0])


def _logsumexp_backward(ctx: Any, grad: Tensor, grad_target: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
    x, y, y_bias, target, lse = ctx.saved_tensors
    nothing = torch.zeros_like(lse)
    grad = nothing if grad is None else grad
    of_target = nothing if target is None or grad_target is None else grad_target
    of_sum = grad_sum if ctx.need_sum and grad_sum is not None else nothing
    need_x, need_y, need_bias = ctx.needs_input_grad[:3]
    if ctx.euclidean and y.shape[1]:  # distances are the same from anywhere; small numbers lose less
        middle = (y.amax(1, keepdim=True) + y.amin(1, keepdim=True)) / 2
        x, y = x - middle, y - middle
    weights = torch.stack([grad, nothing, of_target, of_sum], -1)
    *_, grad_x, grad_y, grad_bias = torch.ops.pycore.pairwise_logsumexp_gradients(
        x, y, y_bias, target, weights, ctx.euclidean, ctx.scale, ctx.softcap, ctx.ignore_index, need_x, need_y,
        need_bias or (ctx.euclidean and need_y), ctx.op,
    )  # fmt: skip
    if ctx.euclidean:  # the gradient of (x - y)^2 is 2 (x - y)
        rows = torch.where(lse > -math.inf, grad, 0.0) + of_sum * y.shape[1]
        rows = rows if target is None else rows + torch.where(target == ctx.ignore_index, 0.0, of_target)
        if need_x:
            grad_x = 2 * (ctx.scale * rows.unsqueeze(-1) * x - grad_x)
        if need_y:
            grad_y = 2 * (ctx.scale * grad_bias.unsqueeze(-1) * y - grad_y)
    return (
        grad_x if need_x else None, grad_y if need_y else None, grad_bias if need_bias else None,
        None, None, None, None, None, None, None,
    )  # fmt: skip


def _both_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, target, ctx.scale, ctx.op = inputs
    ctx.save_for_backward(x, y, target, output[0], output[1])


def _both_backward(
    ctx: Any, grad: Tensor | None, grad_columns: Tensor | None, grad_target: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, y, target, lse, column_lse = ctx.saved_tensors
    nothing = torch.zeros_like(lse)
    of_target = nothing if target is None or grad_target is None else grad_target
    weights = torch.stack([nothing if grad is None else grad, nothing, of_target, nothing], -1)
    of_columns = torch.zeros_like(column_lse) if grad_columns is None else grad_columns
    need_x, need_y = ctx.needs_input_grad[:2]
    grad_x, grad_y = torch.ops.pycore.pairwise_logsumexp_both_backward(
        x, y, target, weights, of_columns, column_lse, ctx.scale, need_x, need_y, ctx.op
    )
    return grad_x if need_x else None, grad_y if need_y else None, None, None, None


def _no_tangents(op: str) -> Callable[..., Any]:
    def refuse(inputs: Sequence[Any], tangents: list[Tensor | None], output: Any) -> Any:
        raise NotImplementedError(f"{op}: forward-mode derivatives are not available")

    return refuse


def _pairs_setup(ctx: Any, x: Tensor, y: Tensor, indices: Tensor, euclidean: bool) -> None:
    ctx.save_for_backward(x, y, indices)
    ctx.euclidean = euclidean


def _pairs_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, y, indices = ctx.saved_tensors
    grad_x, grad_y = torch.ops.pycore.pairwise_pairs_backward(grad, x, y, indices, ctx.euclidean)
    return grad_x if ctx.needs_input_grad[0] else None, grad_y if ctx.needs_input_grad[1] else None


def _topk_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, _, euclidean, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    _pairs_setup(ctx, x, y, output[1], euclidean)


def _topk_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_pairs_backward(ctx, grad), None, None, None, None, None)


def _distances_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, indices = inputs
    _pairs_setup(ctx, x, y, indices, True)


def _distances_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_pairs_backward(ctx, grad), None)


register_derivatives("pairwise_logsumexp", _logsumexp_backward, _logsumexp_setup, _no_tangents("pairwise_logsumexp"))
register_derivatives("pairwise_logsumexp_both", _both_backward, _both_setup, _no_tangents("contrastive_loss"))
register_derivatives("pairwise_topk", _topk_backward, _topk_setup, _no_tangents("pairwise_topk"))
register_derivatives(
    "pairwise_distances_at", _distances_backward, _distances_setup, _no_tangents("pairwise_distances_at")
)
no_second_derivative("pairwise_logsumexp_gradients", lambda inputs: str(inputs[-1]))
no_second_derivative("pairwise_logsumexp_both_backward", lambda inputs: str(inputs[-1]))
no_second_derivative("pairwise_pairs_backward", lambda inputs: "pairwise_topk")


# ---- vmap: a batch more ----------------------------------------------------------------------------------------------


def _register_vmap(name: str) -> None:
    op = getattr(torch.ops.pycore, name)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def merged(x: Any, dim: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            whole = x.movedim(dim, 0) if isinstance(dim, int) else x.expand(info.batch_size, *x.shape)
            return whole.reshape(whole.shape[0] * whole.shape[1], *whole.shape[2:])

        batch = args[0].shape[0 if not isinstance(in_dims[0], int) or in_dims[0] > 0 else 1]
        results = op(*map(merged, args, in_dims))
        single = isinstance(results, Tensor)
        apart = [
            x.new_empty(info.batch_size, 0) if x.dim() == 1 else x.reshape(info.batch_size, batch, *x.shape[1:])
            for x in ((results,) if single else results)
        ]
        return (apart[0], 0) if single else (tuple(apart), (0,) * len(apart))

    torch.library.register_vmap(f"pycore::{name}", rule)


for _name in (
    "pairwise_logsumexp", "pairwise_logsumexp_gradients", "pairwise_logsumexp_both", "pairwise_logsumexp_both_backward",
    "pairwise_topk", "pairwise_distances_at", "pairwise_pairs_backward", "hamming_topk",
):  # fmt: skip
    _register_vmap(_name)
