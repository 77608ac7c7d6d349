# SPDX-License-Identifier: Apache-2.0
"""The gradients of attention, which `torch.ops.pycore.attention_backward` computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycore._schema import Schema
from pycore.ops._autograd import no_second_derivative, register_derivatives
from pycore.ops.attention_jvp import attention_jvp

__all__: list[str] = []

_FORWARD, _BACKWARD = Schema("attention"), Schema("attention_backward")
_OPTIONS = [name for name in _FORWARD.names if name not in _FORWARD.tensors and name in _BACKWARD.places]
# What the backward pass is told to compute, and whose gradient it then returns after those of query, key and value.
_WANTED = {
    "distance_bias": "bias_gradient", "sink_logits": "sink_gradient", "alibi_slopes": "slopes_gradient",
    "numbers": "numbers_gradient",
}  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    call = dict(zip(_FORWARD.names, inputs, strict=True))
    ctx.options = {name: call[name] for name in _OPTIONS}
    ctx.save_for_backward(*output, *(call[name] for name in _FORWARD.tensors))


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    grads: dict[str, Tensor | None] = dict.fromkeys(_FORWARD.names)
    if grad_out is None and grad_lse is None:
        return tuple(grads.values())
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if grad_lse is not None and grad_lse.dim() == 4:
        grad_lse = grad_lse[0]
    call = {"grad_out": grad_out, "grad_lse": grad_lse, "out": out, "lse": lse} | ctx.options
    call |= zip(_FORWARD.tensors, tensors, strict=True)
    wanted = {name: ctx.needs_input_grad[_FORWARD.places[name]] for name in _WANTED}
    call |= {flag: wanted[name] for name, flag in _WANTED.items()}
    query, key, value, *others = _BACKWARD.call(call)
    grads |= {"query": query.to(out.dtype), "key": key.to(out.dtype), "value": value.to(out.dtype)}
    for name, gradient in zip(_WANTED, others, strict=True):
        if wanted[name]:
            grads[name] = gradient.to("cpu") if name == "numbers" else gradient
    return tuple(grads.values())


register_derivatives("attention", _backward, _setup_context, attention_jvp)
no_second_derivative("attention_backward", lambda inputs: _BACKWARD.get(inputs, "op"))
