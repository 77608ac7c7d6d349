# SPDX-License-Identifier: Apache-2.0
"""The schemas of torch.ops.pycore, which are the library's binary interface: tests/schemas.txt is the list of them.

A change shows up in review as a changed line. `python tests/test_schemas.py --update` rewrites the list.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pycore import _load

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


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/test_schemas.py --update")
    GOLDEN.write_text("\n".join(registered()) + "\n")
    print(f"{GOLDEN}: {len(registered())} schemas")
