# SPDX-License-Identifier: Apache-2.0
"""The arguments of an op by name, read from the schema that pycore._C registered.

The dispatcher hands its rules (fake kernels, derivatives, vmap) positional arguments. What stands where is in the
schema alone, so that an argument more in csrc/torch moves no number here. Read once, when a module of ops is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pycore._load import load_ops

load_ops()

__all__ = ["Schema"]


class Schema:
    """The arguments of an op of torch.ops.pycore.

    Attributes:
        op: the op.
        names: of its arguments, in their order.
        tensors: the names of those that are tensors, or tensors or None.
        places: of each argument, by name.
        defaults: of each argument; None for one without.
    """

    def __init__(self, name: str) -> None:
        self.op: Any = getattr(torch.ops.pycore, name).default
        arguments = self.op._schema.arguments
        self.names: tuple[str, ...] = tuple(argument.name for argument in arguments)
        self.tensors = tuple(argument.name for argument in arguments if "Tensor" in str(argument.type))
        self.places = {each: place for place, each in enumerate(self.names)}
        self.defaults = [argument.default_value for argument in arguments]

    def full(self, args: Sequence[Any]) -> list[Any]:
        """All arguments: the dispatcher leaves out those at the end that have their default value."""
        return [*args, *self.defaults[len(args) :]]

    def named(self, args: Sequence[Any]) -> dict[str, Any]:
        """All arguments by name, in their order: `op(*named.values())` is the call."""
        return dict(zip(self.names, self.full(args), strict=True))

    def get(self, args: Sequence[Any], name: str) -> Any:
        """One argument of a call."""
        place = self.places[name]
        return args[place] if place < len(args) else self.defaults[place]

    def call(self, named: Mapping[str, Any]) -> Any:
        """What the op returns for arguments by name, all of them and perhaps others."""
        return self.op(*[named[name] for name in self.names])
