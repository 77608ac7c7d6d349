# SPDX-License-Identifier: Apache-2.0
"""Row-invariant linear layers and RMS norm: a row's result has the same bits whatever it is computed with.

`torch.nn.functional.linear` picks a summation order by the shape of the whole product, so the same row gives other bits
alone than in a batch. Here every sum has one order (csrc/include/pycore/linear/linear.h writes it down), which extends
what `pycore.ops.attention` promises to a whole model. `torch.ops.pycore` has the ops (csrc/torch/linear.cpp), which run
csrc/cpu/linear/dispatch.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_number
from pycore._schema import Schema
from pycore._tensors import check_devices, check_tensor, graph_numbers
from pycore.ops._autograd import no_second_derivative, register_derivatives

__all__ = ["invariant_linear", "rms_norm"]


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies by weight^T and adds bias, as `torch.nn.functional.linear`, every row with one order of summation.

    Computing rows together, one at a time, in a larger batch, on one thread or on many gives bitwise equal rows. So do
    the instruction sets of a CPU. The gradients are deterministic, and the gradient of x is row-invariant too.

    Args:
        x: [..., K], float32 or float64, on the CPU. Any strides; a contiguous last dimension is read in place.
        weight: [N, K], of x's dtype.
        bias: [N], of x's dtype, or None.

    Returns:
        [..., N], contiguous. Differentiable once, in all three arguments. float64 is for checking gradients: it runs
        plain loops. Under autocast the arguments are cast to float32.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the sentence names it.
        TypeError: an argument that is no tensor.

    Example:
        >>> x, weight = torch.randn(64, 128), torch.randn(256, 128)
        >>> together = pycore.ops.invariant_linear(x, weight)
        >>> torch.equal(together[:1], pycore.ops.invariant_linear(x[:1], weight))
        True
    """
    check_tensor("invariant_linear", "x", x)
    check_tensor("invariant_linear", "weight", weight)
    check_tensor("invariant_linear", "bias", bias, optional=True)
    return torch.ops.pycore.invariant_linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMS norm of the last dimension, x / sqrt(mean(x^2) + eps) * weight, every row with one order of summation.

    Args:
        x: [..., C], float32 or float64, on the CPU. Any strides; a contiguous last dimension is read in place.
        weight: [C], of x's dtype, or None for ones.
        eps: finite and not negative.

    Returns:
        [..., C], contiguous. Differentiable once, in x and weight. A row's result and its gradient of x do not depend
        on the other rows; the gradient of weight does not depend on the threads. Under autocast: float32.

    Raises:
        ValueError: a shape, dtype, device or eps that does not fit; the sentence names it.
        TypeError: an argument that is no tensor.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization".
    """
    check_tensor("rms_norm", "x", x)
    check_tensor("rms_norm", "weight", weight, optional=True)
    eps = check_number("rms_norm", "eps", eps)
    if torch.compiler.is_compiling() and eps != 1e-6:
        return torch.ops.pycore.rms_norm(x, weight, 0.0, graph_numbers(eps))
    return torch.ops.pycore.rms_norm(x, weight, eps)


# ---- fake kernels ----------------------------------------------------------------------------------------------------


def _empty_if(wanted: bool, tensor: Tensor, *shape: int) -> Tensor:
    return tensor.new_empty(shape if wanted else (0,))


@torch.library.register_fake("pycore::invariant_linear")
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_devices("invariant_linear", x=x, weight=weight, bias=bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("pycore::invariant_linear_backward")
def _linear_backward_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("invariant_linear_backward", x=x, weight=weight, grad_out=grad_out)
    return (
        _empty_if(need_x, x, *x.shape),
        _empty_if(need_weight, x, *weight.shape),
        _empty_if(need_bias, x, weight.shape[0]),
    )


@torch.library.register_fake("pycore::rms_norm")
def _norm_fake(x: Tensor, weight: Tensor | None, eps: float, numbers: Tensor | None = None) -> Tensor:
    check_devices("rms_norm", x=x, weight=weight)
    return x.new_empty(x.shape)


@torch.library.register_fake("pycore::rms_norm_backward")
def _norm_backward_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor | None, eps: float, need_x: bool, need_weight: bool,
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_devices("rms_norm_backward", x=x, weight=weight, grad_out=grad_out)
    return _empty_if(need_x, x, *x.shape), _empty_if(need_weight, x, x.shape[-1])


# ---- autograd --------------------------------------------------------------------------------------------------------


_LINEAR, _NORM = Schema("invariant_linear"), Schema("rms_norm")


def _gradients(schema: Schema, given: Iterable[Tensor], need: dict[str, bool]) -> tuple[Tensor | None, ...]:
    """The gradient or None of every argument, from those of the arguments in `need`."""
    grads: dict[str, Tensor | None] = dict.fromkeys(schema.names)
    grads |= {name: grad for (name, needed), grad in zip(need.items(), given, strict=True) if needed}
    return tuple(grads.values())


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    call = _LINEAR.named(inputs)
    ctx.save_for_backward(call["x"], call["weight"])


def _linear_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    need = {name: ctx.needs_input_grad[_LINEAR.places[name]] for name in ("x", "weight", "bias")}
    grads = torch.ops.pycore.invariant_linear_backward(grad_out, *ctx.saved_tensors, *need.values())
    return _gradients(_LINEAR, grads, need)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    call = _NORM.named(inputs)
    ctx.eps = call["eps"]
    ctx.save_for_backward(call["x"], call["weight"], call["numbers"])


def _norm_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    need = {name: ctx.needs_input_grad[_NORM.places[name]] for name in ("x", "weight")}
    x, weight, numbers = ctx.saved_tensors
    grads = torch.ops.pycore.rms_norm_backward(grad_out, x, weight, ctx.eps, *need.values(), numbers)
    return _gradients(_NORM, grads, need)


def _linear_jvp(inputs: Sequence[Any], tangents: list[Tensor | None], output: Tensor) -> Tensor:
    call, moving = _LINEAR.named(inputs), _LINEAR.named(tangents)
    x, weight = call["x"], call["weight"]
    x_tangent, weight_tangent, bias_tangent = moving["x"], moving["weight"], moving["bias"]
    op = torch.ops.pycore.invariant_linear
    if x_tangent is not None:
        tangent = op(x_tangent, weight, bias_tangent)
        return tangent if weight_tangent is None else tangent + op(x, weight_tangent, None)
    if weight_tangent is not None:
        return op(x, weight_tangent, bias_tangent)
    assert bias_tangent is not None
    return bias_tangent.expand_as(output)


def _norm_jvp(inputs: Sequence[Any], tangents: list[Tensor | None], output: Tensor) -> Tensor:
    """Of r x w with r = 1 / sqrt(mean(x^2) + eps), whose own tangent is -r^3 mean(x x')."""
    call, moving = _NORM.named(inputs), _NORM.named(tangents)
    x, weight, eps, numbers = call["x"], call["weight"], call["eps"], call["numbers"]
    x_tangent, weight_tangent = moving["x"], moving["weight"]
    factor = (x.square().mean(-1, keepdim=True) + (eps if numbers is None else numbers[0])).rsqrt()
    tangent = torch.zeros_like(output)
    if x_tangent is not None:
        tangent = factor * (x_tangent - x * factor.square() * (x * x_tangent).mean(-1, keepdim=True))
        tangent = tangent if weight is None else tangent * weight
    return tangent if weight_tangent is None else tangent + factor * x * weight_tangent


register_derivatives("invariant_linear", _linear_backward, _linear_setup, _linear_jvp)
register_derivatives("rms_norm", _norm_backward, _norm_setup, _norm_jvp)
no_second_derivative("invariant_linear_backward", lambda inputs: "invariant_linear")
no_second_derivative("rms_norm_backward", lambda inputs: "rms_norm")


# ---- autocast and vmap -----------------------------------------------------------------------------------------------

torch.library.register_autocast("pycore::invariant_linear", "cpu", torch.float32)
torch.library.register_autocast("pycore::rms_norm", "cpu", torch.float32)


def _one_by_one(op: Callable[..., Any]) -> Callable[..., Any]:
    """Samples run one after another. Where there are none, one of zeros says what their results' shapes would be."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        given = list(zip(args, in_dims, strict=True))
        if info.batch_size == 0:
            shape = [arg if dim is None else arg.new_zeros(arg.movedim(dim, 0).shape[1:]) for arg, dim in given]
            result = op(*shape)
            if isinstance(result, Tensor):
                return result.new_empty(0, *result.shape), 0
            return tuple(x.new_empty(0, *x.shape) for x in result), (0,) * len(result)
        samples = [
            op(*(arg if dim is None else arg.select(dim, i) for arg, dim in given)) for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(torch.stack(results) for results in zip(*samples, strict=True)), (0,) * len(samples[0])

    return rule


def _as_rows(op: Callable[..., Any]) -> Callable[..., Any]:
    """A batch of x alone is more rows of x."""

    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *args: Any) -> tuple[Any, Any]:
        if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]) or x.dim() < 2:
            return _one_by_one(op)(info, in_dims, x, *args)
        return op(x.movedim(in_dims[0], 0), *args), 0

    return rule


_ops = torch.ops.pycore
torch.library.register_vmap("pycore::invariant_linear", _as_rows(_ops.invariant_linear))
torch.library.register_vmap("pycore::rms_norm", _as_rows(_ops.rms_norm))
torch.library.register_vmap("pycore::invariant_linear_backward", _one_by_one(_ops.invariant_linear_backward))
torch.library.register_vmap("pycore::rms_norm_backward", _one_by_one(_ops.rms_norm_backward))
