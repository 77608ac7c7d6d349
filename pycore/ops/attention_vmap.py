# SPDX-License-Identifier: Apache-2.0
"""vmap over attention: samples join the batch, which changes no row's bits, or run one after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycore._schema import Schema

__all__: list[str] = []

_FORWARD, _BACKWARD = Schema("attention"), Schema("attention_backward")
_ROWS = {"query", "key", "value", "key_starts", "key_lengths", "key_offset", "query_lengths"}  # one for each of a batch
_OF_OUTPUT = {"grad_out", "grad_lse", "out", "lse"}  # so are these, which the backward pass is given
_NOT_OVER_TABLES = "attention: vmap may run over query, key, value and the lengths, not over tables"


def _mapped(call: dict[str, Any]) -> tuple[set[str], str | None]:
    """What has a row for each of the batch, and the bitmap that may have one for all."""
    names = _ROWS | _OF_OUTPUT
    if call["schedule"] in ("prefix", "blocks"):
        names.add("schedule_tensor")
    return names, "schedule_tensor" if call["schedule"] in ("segments", "key_subset", "tree") else None


def _batch(call: dict[str, Any], dims: dict[str, int | None]) -> int:
    """The batch of one sample."""
    query, dim = call["query"], dims["query"]
    batch: int = query.shape[0] if dim is None else query.movedim(dim, 0).shape[1]
    return batch


def _fold(size: int, call: dict[str, Any], dims: dict[str, int | None]) -> dict[str, Any]:
    """The arguments with vmap's dimension, of `size` samples, folded into the batch."""
    folded = dict(call)
    batched, bitmap = _mapped(call)
    batch = _batch(call, dims)
    for name, arg in call.items():
        if not isinstance(arg, Tensor):
            continue
        dim = dims.get(name)
        if name == bitmap and call["schedule"] == "segments" and arg.dim() == (1 if dim is None else 2):
            arg, dim = (arg, dim) if dim is None else (arg.movedim(dim, 0), 0)
            arg = arg.unsqueeze(-2)
        if name == "alibi_slopes" and dim is not None and arg.dim() == 2:  # [H] of each sample
            arg, dim = arg.movedim(dim, 0).unsqueeze(1), 0
        per_row = name == "alibi_slopes" and arg.dim() > 1
        if name == bitmap or per_row:  # one for all rows, or one for each
            if dim is not None or arg.shape[0] != 1:
                rows = arg[None] if dim is None else arg.movedim(dim, 0)
                rows = rows.expand(size, batch, *rows.shape[2:])
                folded[name] = rows.flatten(0, 1).contiguous()
        elif name == "lse" and arg.dim() == (4 if dim is None else 5):  # in two parts, in front of the batch
            arg = arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            folded[name] = arg.movedim(0, 1).flatten(1, 2).contiguous()
        elif name in batched:
            arg = arg.unsqueeze(0).expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            folded[name] = arg.flatten(0, 1)
        elif name == "dropout_seed":  # of no samples
            folded[name] = arg.new_zeros(1)
        elif dim is not None:
            raise NotImplementedError(_NOT_OVER_TABLES)
    return folded


def _one_by_one(
    schema: Schema, size: int, call: dict[str, Any], dims: dict[str, int | None]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Samples one after another, for dropout: what a row drops depends on its place in the batch of its own sample.

    vmap's randomness then does to masks what it does to torch's: a seed for all samples where it is "same", one for
    each where it is "different"; where it is "error", drawing the seed has raised.
    """
    names, bitmap = _mapped(call)
    names |= {"dropout_seed", "alibi_slopes"} | ({bitmap} if bitmap else set())
    mapped = {name: dim for name, dim in dims.items() if isinstance(call[name], Tensor) and dim is not None}
    if not names.issuperset(mapped):
        raise NotImplementedError(_NOT_OVER_TABLES)
    samples = []
    for n in range(size):
        chosen = {name: call[name].select(dim, n) for name, dim in mapped.items()}
        chosen |= {name: chosen[name].contiguous() for name in chosen.keys() & _OF_OUTPUT}
        samples.append(schema.call(call | chosen))
    stacked = tuple(torch.stack(results) for results in zip(*samples, strict=True))
    return stacked, (0,) * len(stacked)


@torch.library.register_vmap("pycore::attention")
def _attention_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    call, dims = _FORWARD.named(args), dict(zip(_FORWARD.names, in_dims, strict=False))
    if call["dropout_seed"] is not None and info.batch_size > 0:
        return _one_by_one(_FORWARD, info.batch_size, call, dims)
    out, lse = _FORWARD.call(_fold(info.batch_size, call, dims))
    batch, rows = lse.dim() - 3, (info.batch_size, _batch(call, dims))
    return (out.unflatten(0, rows), lse.unflatten(batch, rows)), (0, batch)


@torch.library.register_vmap("pycore::attention_backward")
def _attention_backward_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    call, dims = _BACKWARD.named(args), dict(zip(_BACKWARD.names, in_dims, strict=False))
    # What a table gathers is that of all rows, so each sample needs a call of its own.
    tables = any(call[name] for name in _BACKWARD.names if name.endswith("_gradient"))
    if (tables or call["dropout_seed"] is not None) and info.batch_size > 0:
        return _one_by_one(_BACKWARD, info.batch_size, call, dims)
    outputs = _BACKWARD.call(_fold(info.batch_size, call, dims))
    grads = tuple(x.unflatten(0, (info.batch_size, _batch(call, dims))) for x in outputs[:3])
    others = tuple(x.expand(info.batch_size, *x.shape) for x in outputs[3:])
    return (*grads, *others), (0,) * len(outputs)
