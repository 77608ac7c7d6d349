# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.pycore.attention_append`: a cache takes new tokens and their queries are attended to, in one call."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pycore._checks import check_bool, check_int
from pycore._load import load_ops
from pycore._schema import Schema
from pycore._tangents import forward_mode
from pycore._tensors import as_table, check_devices, check_tensor, graph_numbers
from pycore.ops.attention_call import NO_LIMIT, AttentionOptions, factor, rope_tables
from pycore.ops.linear_pointwise import rotate
from pycore.schedules import Schedule

load_ops()

__all__ = ["Again", "append_and_attend", "check_rotated", "fuses", "turned_back"]

_APPEND = Schema("attention_append")
_grad_enabled, _autocasts = torch.is_grad_enabled, torch.is_autocast_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_append = torch.ops.pycore.attention_append.default._op  # a frame less


def fuses(query: Any, key: Any, options: AttentionOptions) -> bool:
    """Whether one call will do: on the CPU, without autocast, and where nothing learns."""
    if not isinstance(query, Tensor) or not isinstance(key, Tensor) or forward_mode():
        return False
    if query.device.type != "cpu" or key.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if not torch.is_grad_enabled():
        return True
    learning = (query, options.distance_bias, options.alibi_slopes, options.sink_logits, options.scale, options.softcap)
    return not any(isinstance(x, Tensor) and x.requires_grad for x in learning)


class Again:
    """A call of `append_and_attend` that was taken: one like it needs no checks in Python, which cost as much again.

    What the op reads it checks itself, every time.

    Attributes:
        args: the op's arguments behind `starts`.
    """

    __slots__ = ("_like", "_names", "_options", "_schedule", "args")

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], schedule: Schedule, args: Any
    ) -> None:
        self._like = (query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype)
        self._options, self._schedule, self.args = options, schedule, args
        self._names = tuple(options)

    def __deepcopy__(self, memo: Any) -> None:
        """Nothing: the copy of a cache has its own first call."""

    def __reduce__(self) -> Any:
        return (type(None), ())

    def fits_tensors(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the tensors are of the same kind, and nothing learns."""
        if not type(query) is type(key) is type(value) is Tensor or _grad_enabled():
            return False
        if (query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype) != self._like:
            return False
        if not (query.is_cpu and key.is_cpu and value.is_cpu) or _autocasts("cpu"):
            return False
        return not (forward_ad._current_level >= 0 or _transforms_active())  # forward_mode()

    def fits(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], schedule: Schedule | None = None
    ) -> bool:
        """Whether this is a call like it: tensors of the same kind, options that are the same objects or numbers."""
        if not self.fits_tensors(query, key, value):
            return False
        if schedule is not None and schedule is not self._schedule:
            return False
        if tuple(options) == self._names and all(map(operator.is_, options.values(), self._options.values())):
            return True
        if len(options) != len(self._options):
            return False
        for name, given in options.items():
            if name not in self._options:
                return False
            before = self._options[name]
            if given is before or (type(given) is type(before) and type(given) in (int, float) and given == before):
                continue
            pairs = type(given) is type(before) is tuple and len(given) == len(before)
            if not pairs or not all(x is y for x, y in zip(given, before, strict=True)):
                return False
        return True

    def call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        held: tuple[Tensor, Tensor, Tensor],
        rotated: tuple[Tensor, ...],
    ) -> Any:
        """The op, without a word of padding: the output, or that and lse. `rotated`: checked tables, or ()."""
        out, lse = _append(query, key, value, *held, None, *self.args, *rotated)
        if not held[2].is_inference():
            torch.autograd.graph.increment_version(held)
        return (out, lse) if self._options.get("return_lse") else out


def check_rotated(op: str, rotated: Any) -> tuple[Tensor, ...]:
    """The tables, or none."""
    if rotated is None:
        return ()
    if not isinstance(rotated, tuple | list) or len(rotated) != 2:
        raise TypeError(f"{op}: rotated is a {type(rotated).__name__} and must be a tuple of cos and sin")
    for name, table in zip(("cos", "sin"), rotated, strict=True):
        check_tensor(op, f"rotated's {name}", table)
    return tuple(rotated)


def turned_back(op: str, rotated: Any, *given: Any) -> tuple[Any, ...]:
    """Query and key as they were before tables turned them; as they are given, where there are no tables."""
    if rotated is None:
        return given
    cos, sin = check_rotated(op, rotated)
    return tuple(rotate(x, cos, sin, inverse=True) for x in given)


def append_and_attend(
    append_op: str,
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    held: tuple[Tensor, Tensor, Tensor],
    starts: Tensor | None,
    schedule: Schedule,
    options: AttentionOptions,
    sink_size: int = 0,
    key_ring: int = 0,
    most: int = -1,
    rotated: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | tuple[Tensor, Tensor], tuple[Any, ...] | None]:
    """`lambda_cache_append` under the name `append_op`, then attention over `held` under the name `op`.

    Args:
        query: [B, H, n, D], a row for each token.
        key, value: [B, Hkv, n, channels].
        held: key, value and lengths of the cache, which are written to.
        sink_size: rows before the ring that tokens are appended to.
        key_ring: the ring that attention sees.
        most: tokens that a row of the batch may have, or -1.
        rotated: tables that query and key were turned by, see `turned_back`; None where they were not.

    Returns:
        What `attend` does, and the arguments of `Again` where tables went in as they were given.
    """
    for name, table in (("distance_bias", options.distance_bias), ("alibi_slopes", options.alibi_slopes),
                        ("sink_logits", options.sink_logits)):  # fmt: skip
        if table is not None:
            check_tensor(op, name, table)
    cos, sin = rope_tables(op, options.rope)
    check_bool(op, "interleaved", options.interleaved)
    check_bool(op, "return_lse", options.return_lse)
    scale = None if options.scale is None else factor(op, "scale", options.scale)
    softcap, limit, numbers = factor(op, "softcap", options.softcap), NO_LIMIT, None
    if options.distance_limit is not None:
        check_int(op, "distance_limit", options.distance_limit, 0)
        limit = options.distance_limit
    if isinstance(scale, Tensor) or isinstance(softcap, Tensor) or (
        torch.compiler.is_compiling() and (scale is not None or softcap != 0)
    ):  # fmt: skip
        numbers = graph_numbers(1.0 if scale is None else scale, softcap)
        scale, softcap = scale if scale is None else 1.0, 0.0
    given = (cos, sin, options.distance_bias, options.alibi_slopes, options.sink_logits)
    tables = tuple(x if x is None else as_table(x, query) for x in given)
    args = (
        *tables, append_op, op, schedule.kind, schedule.args, bool(options.interleaved), limit, scale, softcap,
        sink_size, key_ring, most, numbers,
    )  # fmt: skip
    turned = check_rotated(op, rotated)
    out, lse = torch.ops.pycore.attention_append(query, key, value, *held, starts, *args, *turned)
    if not torch.compiler.is_compiling() and not held[2].is_inference():
        # The op does not: autograd would read rows that were written over, for queries that are still to learn.
        torch.autograd.graph.increment_version(held)
    as_given = numbers is None and all(x is y for x, y in zip(tables, given, strict=True))
    repeatable = as_given and not torch.compiler.is_compiling()
    return (out, lse) if options.return_lse else out, args if repeatable else None


@torch.library.register_fake("pycore::attention_append")
def _fake(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    call = _APPEND.named(args) | options
    query, value = call["query"], call["value_cache"]
    check_devices(call["op"], **{name: call[name] for name in _APPEND.tensors if name != "numbers"})
    batch, heads, length, _ = query.shape
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        query.new_empty(batch, heads, length, value.shape[3]),
        query.new_empty(batch, heads, length, dtype=sums),
    )
