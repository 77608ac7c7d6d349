# SPDX-License-Identifier: Apache-2.0
"""The schemas of torch.ops.pycore, which are the library's binary interface: tests/schemas.txt is the list of them.

A change shows up in review as a changed line. `python tests/test_schemas.py --update` rewrites the list.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from pycore import _load
from pycore._schema import Schema

GOLDEN = Path(__file__).parent / "schemas.txt"


def registered() -> list[str]:
    _load.load_ops()
    schemas = [str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("pycore::")]
    return sorted(set(schemas))


def test_schemas_match_the_list() -> None:
    assert GOLDEN.read_text().splitlines() == registered(), "run `make schemas` if the change is meant"


def test_counts_are_symbolic() -> None:
    """An `int` in a schema recompiles per value under torch.compile, so every count is a SymInt."""
    for schema in registered():
        assert " int " not in schema.replace("(", " ").replace(",", " "), schema


def test_ops_are_pure_or_marked() -> None:
    """What an op returns is not an alias of what it writes to (torch.library's rule)."""
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("pycore::"):
            assert all(value.alias_info is None for value in schema.returns), str(schema)


def test_places_by_name() -> None:
    """pycore._schema, by which the rules of an op find its arguments, against the list's text."""
    for line in GOLDEN.read_text().splitlines():
        name, arguments = re.fullmatch(r"pycore::(\w+)\((.*)\) -> .*", line).groups()  # type: ignore[union-attr]
        schema = Schema(name)
        parts = [part.split("=")[0].split() for part in arguments.split(", ")]
        assert list(schema.names) == [argument for _, argument in parts]
        assert list(schema.tensors) == [argument for kind, argument in parts if kind.startswith("Tensor")]
        args = [f"argument {place}" for place in range(len(parts))]
        given = args[: len(parts) - line.count("=")]  # the dispatcher leaves defaults out
        named = schema.named(given)
        assert list(named) == list(schema.names) and list(named.values())[: len(given)] == given
        assert all(schema.get(args, argument) == args[place] for argument, place in schema.places.items())
        assert [schema.get(given, argument) for argument in schema.names] == schema.full(given)


def test_a_default_by_name() -> None:
    schema = Schema("rms_norm")
    x, weight, eps = torch.ones(2, 3), torch.ones(3), 0.0
    expected = {"x": x, "weight": weight, "eps": eps, "numbers": None, "plus_one": False}
    assert schema.named([x, weight, eps]) == expected
    assert torch.equal(
        schema.call({"numbers": None, "eps": eps, "weight": weight, "x": x, "plus_one": False, "more": 1}), x
    )
    assert Schema("attention").get([], "symmetric_bias") is False


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/test_schemas.py --update")
    GOLDEN.write_text("\n".join(registered()) + "\n")
    print(f"{GOLDEN}: {len(registered())} schemas")
