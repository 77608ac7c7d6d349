# SPDX-License-Identifier: Apache-2.0
"""The gradients of attention, which `torch.ops.pycore.attention_backward` computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycore._schema import Schema
from pycore.ops._autograd import no_second_derivative, register_derivatives
from pycore.ops.attention_jvp import attention_jvp
from pycore.ops.key_tiles import rows_of_tiles, tiles_of_rows

__all__: list[str] = []

_FORWARD, _BACKWARD = Schema("attention"), Schema("attention_backward")
# What the backward pass is told to compute, and whose gradient it then returns after those of query, key and value.
_WANTED = {
    "distance_bias": "bias_gradient", "sink_logits": "sink_gradient", "alibi_slopes": "slopes_gradient",
    "numbers": "numbers_gradient",
}  # fmt: skip
# Places are looked up here and not at every call.
_TENSORS = [_FORWARD.places[name] for name in _FORWARD.tensors]
_OPTIONS = [place for name, place in _FORWARD.places.items() if name in _BACKWARD.places and place not in _TENSORS]
_INPUTS = [_FORWARD.places[name] for name in ("query", "key", "value")]
_DIFFERENTIABLE = [_FORWARD.places[name] for name in _WANTED]
_NUMBERS = _FORWARD.places["numbers"]
_KEY, _VALUE = (list(_FORWARD.tensors).index(name) for name in ("key", "value"))  # among what is kept
_GIVEN = ("grad_out", "grad_lse", "out", "lse", *_FORWARD.tensors, *(_FORWARD.names[place] for place in _OPTIONS))
_ORDER = [(*_GIVEN, *_WANTED.values()).index(name) for name in _BACKWARD.names]  # from what _backward has to a call


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.options = [inputs[place] for place in _OPTIONS]
    ctx.tiles = _FORWARD.get(inputs, "key_layout") == "tiles"
    ctx.save_for_backward(*output, *[inputs[place] for place in _TENSORS])


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * len(_FORWARD.names)
    if grad_out is None and grad_lse is None:
        return tuple(grads)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if grad_lse is not None and grad_lse.dim() == 4:
        grad_lse = grad_lse[0]
    if ctx.tiles:  # the backward pass reads rows
        tensors[_KEY] = rows_of_tiles(tensors[_KEY], tensors[_VALUE].shape[2])
    wanted = [ctx.needs_input_grad[place] for place in _DIFFERENTIABLE]
    given = (grad_out, grad_lse, out, lse, *tensors, *ctx.options, *wanted)
    gradients = torch.ops.pycore.attention_backward(*[given[place] for place in _ORDER])
    for place, gradient in zip(_INPUTS, gradients, strict=False):
        grads[place] = gradient.to(out.dtype)
    if ctx.tiles:
        place = _FORWARD.places["key"]
        grads[place] = tiles_of_rows(gradients[1].to(out.dtype)) if ctx.needs_input_grad[place] else None
    for place, wants, gradient in zip(_DIFFERENTIABLE, wanted, gradients[len(_INPUTS) :], strict=True):
        if wants:
            grads[place] = gradient.to("cpu") if place == _NUMBERS else gradient
    return tuple(grads)


register_derivatives("attention", _backward, _setup_context, attention_jvp)
no_second_derivative("attention_backward", lambda inputs: _BACKWARD.get(inputs, "op"))
