# SPDX-License-Identifier: Apache-2.0
"""Row-invariant linear layers, norms and gated activations: a row has the same bits whatever it is computed with.

`torch.nn.functional.linear` picks a summation order by the shape of the whole product, so the same row gives other bits
alone than in a batch. Here every sum has one order (csrc/include/pycore/linear/linear.h writes it down) and every
function one formula, which extends what `pycore.ops.attention` promises to a whole model. `torch.ops.pycore` has the
ops (csrc/torch/linear.cpp), which run csrc/cpu/linear/dispatch.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_bool, check_number
from pycore._schema import Schema
from pycore._tensors import check_devices, check_tensor, graph_numbers
from pycore.ops._autograd import call, no_second_derivative, register_composite, register_derivatives

__all__ = ["gelu_mul", "invariant_linear", "invariant_linears", "layer_norm", "rms_norm", "silu_mul"]


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies by weight^T and adds bias, as `torch.nn.functional.linear`, every row with one order of summation.

    Computing rows together, one at a time, in a larger batch, on one thread or on many gives bitwise equal rows. So do
    the instruction sets of a CPU. The gradients are deterministic, and the gradient of x is row-invariant too.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64, on the CPU. Any strides; a contiguous last dimension is read
            in place.
        weight: [N, K], of x's dtype.
        bias: [N], of x's dtype, or None.

    Returns:
        [..., N], contiguous, of x's dtype. bfloat16 and float16 are summed in float32, in the same order, bias
        included, and rounded once. Differentiable once, in all three arguments; gradients are summed and rounded the
        same way; bfloat16 takes float32 numbers below 2**-126 in its sums as zero. float64 is for checking gradients:
        it runs plain loops. Under autocast the arguments are cast to float32.

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
    return call(torch.ops.pycore.invariant_linear.default, x, weight, bias)  # type: ignore[no-any-return]


def invariant_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> Tensor:
    """Several linear layers of one x, their results side by side, every row with one order of summation.

    The bits are those of `invariant_linear` with each weight, and of one layer that has all of their rows. One call
    reads what three or two would have read one after another (query, key and value; gate and up): a call takes as long
    as a hundred kilobytes take to be read.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64, on the CPU. Any strides; a contiguous last dimension is read
            in place.
        weights: a list or tuple of at least one, each [N_i, K], of x's dtype.
        biases: a list or tuple of one [N_i] for each weight, or None.

    Returns:
        [..., N_1 + N_2 + ...], contiguous, of x's dtype; `.split([N_1, N_2, ...], -1)` takes it apart. Rounded and
        differentiated as `invariant_linear`. Under autocast the arguments are cast to float32.

    Raises:
        ValueError: no weights, more or fewer biases than weights, or a shape, dtype or device that does not fit.
        TypeError: an argument that is no tensor, or weights or biases that are no list or tuple.

    Example:
        >>> query, key, value = invariant_linears(x, [w_q, w_k, w_v]).split([576, 192, 192], -1)
    """
    check_tensor("invariant_linears", "x", x)
    bias_list = () if biases is None else biases  # which an op that is given none takes
    for name, tensors in (("weights", weights), ("biases", bias_list)):
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"invariant_linears: {name} is a {type(tensors).__name__} and must be a list of tensors")
        for tensor in tensors:
            check_tensor("invariant_linears", name, tensor)
    if not weights:
        raise ValueError("invariant_linears: weights is empty and must have at least one weight")
    if biases is not None and len(bias_list) != len(weights):
        raise ValueError(
            f"invariant_linears: biases has {len(bias_list)} tensors and must have one for each of the {len(weights)} "
            "weights, or be None"
        )
    return call(torch.ops.pycore.invariant_linears.default, x, weights, bias_list)  # type: ignore[no-any-return]


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, plus_one: bool = False) -> Tensor:
    """RMS norm of the last dimension, x / sqrt(mean(x^2) + eps) * weight, every row with one order of summation.

    Args:
        x: [..., C], float32, bfloat16, float16 or float64, on the CPU. Any strides; a contiguous last dimension is read
            in place.
        weight: [C], of x's dtype, or None for ones.
        eps: finite and not negative.
        plus_one: the factor is 1 + weight, as in Gemma; that sum too is computed in float32.

    Returns:
        [..., C], contiguous, of x's dtype. bfloat16 and float16 are computed in float32, the weight's product included,
        and rounded once, as `torch.nn.functional.rms_norm` does; transformers' LlamaRMSNorm also rounds before that
        product. Differentiable once, in x and weight. A row's result and its gradient of x do not depend
        on the other rows; the gradient of weight does not depend on the threads. Under autocast: float32.

    Raises:
        ValueError: a shape, dtype, device or eps that does not fit; the sentence names it.
        TypeError: an argument that is no tensor.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization".
    """
    check_tensor("rms_norm", "x", x)
    check_tensor("rms_norm", "weight", weight, optional=True)
    eps = check_number("rms_norm", "eps", eps)
    check_bool("rms_norm", "plus_one", plus_one)
    if torch.compiler.is_compiling() and eps != 1e-6:
        return torch.ops.pycore.rms_norm(x, weight, 0.0, graph_numbers(eps), plus_one)
    return call(torch.ops.pycore.rms_norm.default, x, weight, eps, None, plus_one)  # type: ignore[no-any-return]


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer norm of the last dimension, (x - mean) / sqrt(variance + eps) * weight + bias, with one order of summation.

    Args:
        x: [..., C], float32, bfloat16, float16 or float64, on the CPU. Any strides; a contiguous last dimension is read
            in place.
        weight: [C], of x's dtype, or None for ones.
        bias: [C], of x's dtype, or None for zeros.
        eps: finite and not negative. The variance is the mean of the squared deviations.

    Returns:
        [..., C], contiguous, of x's dtype; bfloat16 and float16 are computed in float32 and rounded once.
        Differentiable once, in x, weight and bias. A row's result and its gradient of x do not depend on the other
        rows; the gradients of weight and bias do not depend on the threads. Under autocast: float32.

    Raises:
        ValueError: a shape, dtype, device or eps that does not fit; the sentence names it.
        TypeError: an argument that is no tensor.

    Source: Ba, Kiros and Hinton, "Layer Normalization".
    """
    check_tensor("layer_norm", "x", x)
    check_tensor("layer_norm", "weight", weight, optional=True)
    check_tensor("layer_norm", "bias", bias, optional=True)
    eps = check_number("layer_norm", "eps", eps)
    if torch.compiler.is_compiling() and eps != 1e-5:
        return torch.ops.pycore.layer_norm(x, weight, bias, 0.0, graph_numbers(eps))
    return call(torch.ops.pycore.layer_norm.default, x, weight, bias, eps)  # type: ignore[no-any-return]


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Multiplies silu(gate) = gate / (1 + exp(-gate)) by up, element by element: the middle of a SwiGLU layer.

    An element has the same bits in any company, at any place in a row and on AVX2 and AVX-512: torch's own functions
    compute what is left over beside whole vectors with other code.

    Args:
        gate: [..., C], float32, bfloat16, float16 or float64, on the CPU. Any strides; a contiguous last dimension is
            read in place, as the halves of one projection have it.
        up: gate's shape and dtype.

    Returns:
        gate's shape and dtype, contiguous; bfloat16 and float16 are computed in float32 and rounded once, after the
        product. Differentiable once, in both. Under autocast: float32.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the sentence names it.
        TypeError: an argument that is no tensor.

    Source: Shazeer, "GLU Variants Improve Transformer".
    """
    check_tensor("silu_mul", "gate", gate)
    check_tensor("silu_mul", "up", up)
    return call(torch.ops.pycore.silu_mul.default, gate, up)  # type: ignore[no-any-return]


def gelu_mul(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """Multiplies gelu(gate) by up, element by element: the middle of a GeGLU layer.

    gelu(x) is x times the normal distribution up to x, x (1 + erf(x / sqrt 2)) / 2, to a few units in the last place of
    the result even where it is tiny, or with approximate="tanh" x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2. An
    element has the same bits in any company, at any place in a row and on AVX2 and AVX-512.

    Args:
        gate: [..., C], float32, bfloat16, float16 or float64, on the CPU. Any strides; a contiguous last dimension is
            read in place.
        up: gate's shape and dtype.
        approximate: "none" or "tanh".

    Returns:
        gate's shape and dtype, contiguous; bfloat16 and float16 are computed in float32 and rounded once, after the
        product. Differentiable once, in both. Under autocast: float32.

    Raises:
        ValueError: a shape, dtype, device or approximate that does not fit; the sentence names it.
        TypeError: an argument that is no tensor, or an approximate that is no str.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units"; Shazeer, "GLU Variants Improve Transformer".
    """
    check_tensor("gelu_mul", "gate", gate)
    check_tensor("gelu_mul", "up", up)
    if not isinstance(approximate, str):
        raise TypeError(f"gelu_mul: approximate is a {type(approximate).__name__} and must be 'none' or 'tanh'")
    return call(torch.ops.pycore.gelu_mul.default, gate, up, approximate)  # type: ignore[no-any-return]


# ---- fake kernels ----------------------------------------------------------------------------------------------------


def _empty_if(wanted: bool, tensor: Tensor, *shape: int) -> Tensor:
    return tensor.new_empty(shape if wanted else (0,))


@torch.library.register_fake("pycore::invariant_linear")
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_devices("invariant_linear", x=x, weight=weight, bias=bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("pycore::invariant_linears")
def _linears_fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    for weight in weights:
        check_devices("invariant_linears", x=x, weight=weight)
    for bias in biases:
        check_devices("invariant_linears", x=x, bias=bias)
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


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
def _norm_fake(
    x: Tensor, weight: Tensor | None, eps: float, numbers: Tensor | None = None, plus_one: bool = False
) -> Tensor:
    check_devices("rms_norm", x=x, weight=weight)
    return x.new_empty(x.shape)


@torch.library.register_fake("pycore::rms_norm_backward")
def _norm_backward_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor | None, eps: float, need_x: bool, need_weight: bool,
    numbers: Tensor | None = None, plus_one: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_devices("rms_norm_backward", x=x, weight=weight, grad_out=grad_out)
    return _empty_if(need_x, x, *x.shape), _empty_if(need_weight, x, x.shape[-1])


@torch.library.register_fake("pycore::layer_norm")
def _layer_norm_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, numbers: Tensor | None = None
) -> Tensor:
    check_devices("layer_norm", x=x, weight=weight, bias=bias)
    return x.new_empty(x.shape)


@torch.library.register_fake("pycore::layer_norm_backward")
def _layer_norm_backward_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor | None, eps: float, need_x: bool, need_weight: bool, need_bias: bool,
    numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_devices("layer_norm_backward", x=x, weight=weight, grad_out=grad_out)
    return (
        _empty_if(need_x, x, *x.shape),
        _empty_if(need_weight, x, x.shape[-1]),
        _empty_if(need_bias, x, x.shape[-1]),
    )


@torch.library.register_fake("pycore::silu_mul")
def _silu_mul_fake(gate: Tensor, up: Tensor) -> Tensor:
    check_devices("silu_mul", gate=gate, up=up)
    return gate.new_empty(gate.shape)


@torch.library.register_fake("pycore::silu_mul_backward")
def _silu_mul_backward_fake(
    grad_out: Tensor, gate: Tensor, up: Tensor, need_gate: bool, need_up: bool
) -> tuple[Tensor, Tensor]:
    check_devices("silu_mul_backward", gate=gate, up=up, grad_out=grad_out)
    return _empty_if(need_gate, gate, *gate.shape), _empty_if(need_up, gate, *gate.shape)


@torch.library.register_fake("pycore::gelu_mul")
def _gelu_mul_fake(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    check_devices("gelu_mul", gate=gate, up=up)
    return gate.new_empty(gate.shape)


@torch.library.register_fake("pycore::gelu_mul_backward")
def _gelu_mul_backward_fake(
    grad_out: Tensor, gate: Tensor, up: Tensor, approximate: str, need_gate: bool, need_up: bool
) -> tuple[Tensor, Tensor]:
    check_devices("gelu_mul_backward", gate=gate, up=up, grad_out=grad_out)
    return _empty_if(need_gate, gate, *gate.shape), _empty_if(need_up, gate, *gate.shape)


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
    ctx.eps, ctx.plus_one = call["eps"], call["plus_one"]
    ctx.save_for_backward(call["x"], call["weight"], call["numbers"])


def _norm_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    need = {name: ctx.needs_input_grad[_NORM.places[name]] for name in ("x", "weight")}
    x, weight, numbers = ctx.saved_tensors
    grads = torch.ops.pycore.rms_norm_backward(grad_out, x, weight, ctx.eps, *need.values(), numbers, ctx.plus_one)
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
        tangent = tangent if weight is None else tangent * (weight + 1 if call["plus_one"] else weight)
    return tangent if weight_tangent is None else tangent + factor * x * weight_tangent


def _layer_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.eps, numbers = inputs
    ctx.save_for_backward(x, weight, numbers)


def _layer_norm_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad[:3]
    x, weight, numbers = ctx.saved_tensors
    grads = torch.ops.pycore.layer_norm_backward(grad_out, x, weight, ctx.eps, *need, numbers)
    return (*(grad if needed else None for grad, needed in zip(grads, need, strict=True)), None, None)


def _layer_norm_jvp(inputs: Sequence[Any], tangents: list[Tensor | None], output: Tensor) -> Tensor:
    """Of y w + b with y = (x - mean) r, whose own tangent is r (x' - mean(x') - y mean(y x'))."""
    (x, weight, _, eps, numbers), (x_tangent, weight_tangent, bias_tangent) = inputs, tangents[:3]
    factor = (x.var(-1, correction=0, keepdim=True) + (eps if numbers is None else numbers[0])).rsqrt()
    normal = (x - x.mean(-1, keepdim=True)) * factor
    tangent = torch.zeros_like(output)
    if x_tangent is not None:
        centred = x_tangent - x_tangent.mean(-1, keepdim=True)
        tangent = factor * (centred - normal * (normal * x_tangent).mean(-1, keepdim=True))
        tangent = tangent if weight is None else tangent * weight
    if weight_tangent is not None:
        tangent = tangent + normal * weight_tangent
    return tangent if bias_tangent is None else tangent + bias_tangent


def _gated_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *ctx.rest = inputs
    ctx.save_for_backward(gate, up)


def _gated_rules(name: str) -> None:
    op, gradients = getattr(torch.ops.pycore, name), getattr(torch.ops.pycore, f"{name}_backward")

    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:2]
        grads = gradients(grad_out, *ctx.saved_tensors, *ctx.rest, *need)
        return (
            *(grad if needed else None for grad, needed in zip(grads, need, strict=True)),
            *(None for _ in ctx.rest),
        )

    def jvp(inputs: Sequence[Any], tangents: list[Tensor | None], output: Tensor) -> Tensor:
        """Element by element, what is a gradient of gate in one direction is a tangent in the other."""
        (gate, up, *rest), (gate_tangent, up_tangent) = inputs, tangents[:2]
        tangent = torch.zeros_like(output)
        if gate_tangent is not None:
            tangent = gradients(gate_tangent, gate, up, *rest, True, False)[0]
        return tangent if up_tangent is None else tangent + op(gate, up_tangent, *rest)

    register_derivatives(name, backward, _gated_setup, jvp)
    no_second_derivative(f"{name}_backward", lambda inputs: name)


def _linears_of_one(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The same by `invariant_linear`, which has derivatives and a rule for batches."""
    op = torch.ops.pycore.invariant_linear
    given: Sequence[Tensor | None] = biases or [None] * len(weights)
    pairs = zip(weights, given, strict=True)
    with _named_linears():
        return torch.cat([op(x, weight, bias) for weight, bias in pairs], -1)


@contextmanager
def _named_linears() -> Iterator[None]:
    """Messages name the op that was called."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("invariant_linear:", "invariant_linears:", 1)) from None


register_composite("invariant_linears", _linears_of_one)
register_derivatives("invariant_linear", _linear_backward, _linear_setup, _linear_jvp)
register_derivatives("rms_norm", _norm_backward, _norm_setup, _norm_jvp)
register_derivatives("layer_norm", _layer_norm_backward, _layer_norm_setup, _layer_norm_jvp)
no_second_derivative("layer_norm_backward", lambda inputs: "layer_norm")
_gated_rules("silu_mul")
_gated_rules("gelu_mul")
no_second_derivative("invariant_linear_backward", lambda inputs: "invariant_linear")
no_second_derivative("rms_norm_backward", lambda inputs: "rms_norm")


# ---- autocast and vmap -----------------------------------------------------------------------------------------------

for _name in __all__:
    torch.library.register_autocast(f"pycore::{_name}", "cpu", torch.float32)


def one_by_one(op: Callable[..., Any]) -> Callable[..., Any]:
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
            return one_by_one(op)(info, in_dims, x, *args)
        return op(x.movedim(in_dims[0], 0), *args), 0

    return rule


def _linears_rule(info: Any, in_dims: tuple[Any, ...], x: Tensor, weights: Any, biases: Any) -> tuple[Any, Any]:
    """Layer by layer."""
    rule, (x_dim, weight_dims, bias_dims) = _as_rows(torch.ops.pycore.invariant_linear), in_dims
    if not biases:
        biases = bias_dims = [None] * len(weights)
    layers = zip(weights, biases, weight_dims, bias_dims, strict=True)
    with _named_linears():
        outs = [rule(info, (x_dim, w_dim, b_dim), x, weight, bias)[0] for weight, bias, w_dim, b_dim in layers]
    return torch.cat(outs, -1), 0


def elementwise(op: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """A batch of all tensors is one dimension more; what has none is expanded."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if any(arg.dim() - (dim is not None) < 1 for arg, dim in zip(args[:tensors], in_dims, strict=False)):
            return one_by_one(op)(info, in_dims, *args)
        given = [
            arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            for arg, dim in zip(args[:tensors], in_dims, strict=False)
        ]
        result = op(*given, *args[tensors:])
        return result, 0 if isinstance(result, Tensor) else (0,) * len(result)

    return rule


_ops = torch.ops.pycore
torch.library.register_vmap("pycore::invariant_linear", _as_rows(_ops.invariant_linear))
torch.library.register_vmap("pycore::invariant_linears", _linears_rule)
torch.library.register_vmap("pycore::rms_norm", _as_rows(_ops.rms_norm))
torch.library.register_vmap("pycore::invariant_linear_backward", one_by_one(_ops.invariant_linear_backward))
torch.library.register_vmap("pycore::rms_norm_backward", one_by_one(_ops.rms_norm_backward))
torch.library.register_vmap("pycore::layer_norm", _as_rows(_ops.layer_norm))
torch.library.register_vmap("pycore::layer_norm_backward", one_by_one(_ops.layer_norm_backward))
for _name in ("silu_mul", "gelu_mul"):
    torch.library.register_vmap(f"pycore::{_name}", elementwise(getattr(_ops, _name), 2))
    _gradient_op = getattr(_ops, f"{_name}_backward")
    torch.library.register_vmap(f"pycore::{_name}_backward", one_by_one(_gradient_op))
