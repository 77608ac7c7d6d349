# SPDX-License-Identifier: Apache-2.0
"""The bytes of a cache, against digests that were written once: another machine, compiler or version has the same.

`python tests/ops/staircase/test_staircase_golden.py --update` writes them anew, which is a change of format.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from pycore import Staircase, StaircaseKVCache

GOLDEN = Path(__file__).parents[2] / "golden" / "staircase.json"
LADDERS = ((16, 8, 4), (16, 8, 4, 2), (16, 2))


def numbers(tokens: int, channels: int, salt: int) -> Tensor:
    """[1, 2, tokens, channels] between -2 and 2, from integers alone."""
    i = torch.arange(2 * tokens * channels, dtype=torch.int64) + salt
    return (((i * 2654435761) % 2**32).float() * 2.0**-30 - 2).view(1, 2, tokens, channels)


def digests() -> dict[str, str]:
    found = {}
    for bits in LADDERS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            cache = StaircaseKVCache(Staircase(bits), batch=1, kv_heads=2, head_dim=80, capacity=700, dtype=dtype)
            cache.append(numbers(677, 80, 1).to(dtype), numbers(677, 80, 2).to(dtype))
            state = cache.state_dict()
            whole = hashlib.sha256()
            for x in (*state["key"], *state["value"], cache.keys(), cache.values()):
                whole.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            found[f"{'/'.join(map(str, bits))} {str(dtype)[6:]}"] = whole.hexdigest()
    return found


def test_bytes_are_as_they_were(isa: str) -> None:
    assert digests() == json.loads(GOLDEN.read_text())


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/ops/staircase/test_staircase_golden.py --update")
    GOLDEN.write_text(json.dumps(digests(), indent=1) + "\n")
