# SPDX-License-Identifier: Apache-2.0
"""Derivatives of an op in both directions, under every transform of torch.func.

`torch.library.register_autograd` knows the reverse direction only: a tangent is lost without a word, and under
torch.func's transforms it refuses. What it registers is a kernel for the dispatcher's Autograd key, and so is what
stands here: where a tensor carries a tangent the op's `jvp` answers, and elsewhere autograd records the op, at the one
level of torch.func's transforms that the dispatcher is at. Other levels are the dispatcher's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from pycore._schema import Schema
from pycore._tangents import dual, forward_mode, unpacked

__all__ = ["call", "no_second_derivative", "register_composite", "register_derivatives"]

Tangents = list[Tensor | None]
Jvp = Callable[[Sequence[Any], Tangents, Any], Any]

_AUTOGRAD = torch._C.DispatchKey.AutogradCPU  # excluding it excludes autograd on every device
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active

_library = torch.library.Library("pycore", "IMPL")  # what it registers lasts as long as it does


def register_derivatives(name: str, backward: Callable[..., Any], setup_context: Callable[..., None], jvp: Jvp) -> None:
    """Registers what `torch.library.register_autograd` does, and a rule for tangents.

    Args:
        name: of the op in torch.ops.pycore.
        backward: backward(ctx, *grads), a gradient or None for each of the op's arguments.
        setup_context: setup_context(ctx, inputs, output), with all arguments of the schema as inputs.
        jvp: jvp(inputs, tangents, output) with a tangent or None for each input, none of which is left out: what
            tangents output has, as one tensor or a tuple. May raise, where there is no rule.
    """
    schema = Schema(name)
    op = schema.op

    def below(keyset: Any, args: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Recorded(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args
            with _modes_of_outer_levels():
                output = below(keyset, inputs)
            setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            ctx.needs_input_grad = ctx.needs_input_grad[: len(schema.names)]  # without the keyset
            given = backward(ctx, *grads)
            return (*given, None) if isinstance(given, tuple) else (given, None)

    Recorded.__name__ = f"{name}Backward"
    apply: Callable[..., Any] = getattr(Recorded, "apply")  # noqa: B009 - torch's own types leave it out

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_mode():
            inputs = schema.full(args)
            pairs = [unpacked(x) for x in inputs]
            tangents = [tangent for _, tangent in pairs]
            if any(tangent is not None for tangent in tangents):
                primals = [primal for primal, _ in pairs]
                output = op(*primals)
                return dual(output, jvp(primals, tangents, output))
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            given = (*schema.full(args), keyset)
            if not torch._C._are_functorch_transforms_active():
                return apply(*given)
            with _single_level():
                return apply(*given)
        return below(keyset, args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def register_composite(name: str, function: Callable[..., Any]) -> None:
    """Gives an op of lists of tensors the derivatives of ops that it is made of: function(*args), with its bits.

    Runs in its place where a tensor carries a tangent or is recorded.
    """
    op = Schema(name).op

    def kernel(keyset: Any, *args: Any) -> Any:
        tensors = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        moves = forward_mode() and any(unpacked(x)[1] is not None for x in tensors)
        if moves or (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)):
            return function(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def call(op: Any, *args: Any) -> Any:
    """`op(*args)` for an op with derivatives, past the kernel in Python where nothing is recorded.

    It takes as long as a decoding step's smaller layers do, and so would a guard of torch's: an object for every call.
    """
    if _grad_enabled() or torch.compiler.is_compiling() or forward_ad._current_level >= 0 or _transforms_active():
        return op(*args)
    if _is_excluded(_AUTOGRAD):  # inference mode
        return op._op(*args)
    _exclude(_AUTOGRAD, True)
    try:
        return op._op(*args)
    finally:
        _exclude(_AUTOGRAD, False)


def no_second_derivative(name: str, op_of: Callable[[Sequence[Any]], str]) -> None:
    """For an op that computes gradients. Without this, torch would only warn and leave the second derivative out.

    Args:
        name: of the op in torch.ops.pycore.
        op_of: how the message calls the op of an argument list.
    """

    def refuse(op: str) -> None:
        raise NotImplementedError(f"{op}: second derivatives are not available")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = op_of(inputs)

    register_derivatives(
        name, lambda ctx, *grads: refuse(ctx.op), setup, lambda inputs, tangents, output: refuse(op_of(inputs))
    )


@contextmanager
def _modes_of_outer_levels() -> Iterator[None]:
    """Within the forward of an autograd function nothing is recorded, which is meant for its own level alone."""
    if not torch._C._are_functorch_transforms_active():
        yield
        return
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


@contextmanager
def _single_level() -> Iterator[None]:
    """Lets autograd record at the level of torch.func's transforms that the dispatcher is at, as it does C++ ops."""
    functorch = torch._C._functorch
    before = functorch.get_single_level_autograd_function_allowed()
    functorch.set_single_level_autograd_function_allowed(True)
    try:
        yield
    finally:
        functorch.set_single_level_autograd_function_allowed(before)
