# SPDX-License-Identifier: Apache-2.0
"""`to_flex_block_mask`: the reference's mask as FlexAttention's, for every schedule."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from pycore.ops import attention
from pycore.reference.attention import keep_mask
from pycore.schedules import (
    Causal,
    Constant,
    Full,
    Geometric,
    KeySubset,
    Lambda,
    Prefix,
    Probabilistic,
    Schedule,
    Segments,
    Tree,
    to_flex_block_mask,
)  # fmt: skip
from tests.support.attention_inputs import lengths, qkv, random_tree

BATCH, HEADS = 2, 3
GENERATOR = torch.Generator().manual_seed(3)
SCHEDULES: dict[str, Schedule] = {
    "full": Full(),
    "causal": Causal(),
    "lambda": Lambda(5, 20),
    "prefix": Prefix(lengths(7, 90)),
    "segments": Segments(lengths(3, 20, 20, 77)),
    "segments-not-causal": Segments(lengths(0, 20, 50, 300), False),
    "segments-of-rows": Segments(lengths(0, 30, 90, 90, 5, 5, 60, 200).view(2, 4), False),
    "segments-window": Segments(lengths(0, 7, 60, 200), window_size=9, sink_size=3),
    "segments-both-sides": Segments(lengths(3, 3, 55, 99, 0, 50, 80, 80).view(2, 4), False, 9, 3, 4),
    "lambda-both-sides": Lambda(3, 9, right=4),
    "blocks": Probabilistic(Constant(0.4), 7, block_size=16, window_blocks=2),
    "blocks-sinks": Probabilistic(Geometric(0.8), lengths(7, 8), 3, block_size=32, sink_size=19),
    "blocks-per-row": Probabilistic(torch.rand(HEADS, 9, generator=GENERATOR), 5, block_size=16, blocks_per_row=3),
    "keys": KeySubset(torch.rand(150, generator=GENERATOR) < 0.2),
    "keys-of-rows": KeySubset(torch.rand(BATCH, 60, generator=GENERATOR) < 0.2, causal=False),
    "key-positions": KeySubset(lengths(3, 17, 3, 90, 1000)),
    "tree": Tree(random_tree(40)),
    "tree-of-rows": Tree(torch.stack([random_tree(17, 1), random_tree(17, 2)])),
    "tree-of-nothing": Tree(lengths()),
    "tree-with-a-window": Tree(random_tree(40), 3, 9),
    "tree-of-nothing-with-a-window": Tree(lengths(), 3, 9),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def expected(schedule: Schedule, query_length: int, key_length: int) -> Tensor:
    """Bool [B, H, Lq, Lk] from the reference."""
    j = torch.arange(key_length)[None]
    p = torch.arange(key_length - query_length, key_length)[:, None]
    masks = [torch.stack([keep_mask(schedule, p, j, b, h) for h in range(HEADS)]) for b in range(BATCH)]
    return torch.stack(masks)


@pytest.mark.parametrize("shape", [(100, 100), (37, 150), (90, 41), (1, 64)], ids=str)
@every_schedule
def test_keeps_what_the_reference_keeps(name: str, shape: tuple[int, int]) -> None:
    query_length, key_length = shape
    block_mask = to_flex_block_mask(
        SCHEDULES[name], batch=BATCH, heads=HEADS, query_length=query_length, key_length=key_length, block_size=32
    )
    wanted = expected(SCHEDULES[name], *shape)
    b, h, q, j = torch.meshgrid(*(torch.arange(n) for n in wanted.shape), indexing="ij")
    assert torch.equal(block_mask.mask_mod(b, h, q, j).expand_as(wanted), wanted)
    blocks = torch.nn.functional.pad(wanted, (0, -key_length % 32, 0, -query_length % 32))
    blocks = blocks.unflatten(3, (-1, 32)).unflatten(2, (-1, 32)).any(5).any(3)
    assert torch.equal(block_mask.to_dense().bool().expand_as(blocks), blocks)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@every_schedule
def test_flex_attention_gives_what_attention_gives(name: str) -> None:
    """Where a row keeps a key."""
    q, k, v = qkv(BATCH, HEADS, HEADS, 70, 100, 16)
    schedule = SCHEDULES[name]
    block_mask = to_flex_block_mask(schedule, batch=BATCH, heads=HEADS, query_length=70, key_length=100)
    some = expected(schedule, 70, 100).any(3)
    assert some.any()
    out, flex = attention(q, k, v, schedule=schedule), flex_attention(q, k, v, block_mask=block_mask)
    torch.testing.assert_close(out[some], flex[some], rtol=1e-5, atol=1e-5)


def test_one_row_where_all_are_the_same() -> None:
    sizes = {"batch": 4, "heads": 8, "query_length": 10, "key_length": 10}
    assert to_flex_block_mask(Causal(), **sizes).shape == (1, 1, 10, 10)
    assert to_flex_block_mask(KeySubset(lengths(1)), **sizes).shape == (1, 1, 10, 10)
    assert to_flex_block_mask(Tree(lengths(-1, 0)), **sizes).shape == (1, 1, 10, 10)
    assert to_flex_block_mask(Prefix(lengths(1, 2, 3, 4)), **sizes).shape == (4, 1, 10, 10)
    assert to_flex_block_mask(Segments(lengths(0, 4, 10)[None]), **sizes).shape == (1, 1, 10, 10)
    assert to_flex_block_mask(Segments(lengths(0, 4, 10).repeat(4, 1)), **sizes).shape == (4, 1, 10, 10)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "batch": ({"batch": 0}, "batch is 0 and must be at least 1"),
    "length": ({"key_length": -3}, "key_length is -3 and must be at least 1"),
    "block-size": ({"block_size": 0}, "block_size is 0 and must be at least 1"),
    "prefix": (
        {"schedule": Prefix(lengths(1, 2, 3))},
        "prefix_lengths has 3 rows and must have one for each of 2 batch rows",
    ),
    "keys": (
        {"schedule": KeySubset(torch.zeros(3, 5, dtype=torch.bool))},
        "keys has 3 rows and must have one, or one for each of 2 batch rows",
    ),
    "boundaries": (
        {"schedule": Segments(lengths(0, 9).repeat(3, 1))},
        "boundaries has 3 rows and must have one, or one for each of 2 batch rows",
    ),
    "keys-negative": ({"schedule": KeySubset(lengths(4, -1))}, "keys has position -1, where all must be at least 0"),
    "parents": (
        {"schedule": Tree(lengths(-1, 1))},
        "parents has an entry that is less than -1 or not less than its own index",
    ),
    "parents-count": (
        {"schedule": Tree(random_tree(11))},
        "parents has 11 nodes and there are 10 keys; the nodes are the last",
    ),
    "blocks": ({"schedule": Probabilistic(Constant(0.5), -1)}, "seed is -1 and must be at least 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str) -> None:
    changes, message = BAD[name]
    arguments = {"schedule": Causal(), "batch": 2, "heads": 2, "query_length": 10, "key_length": 10} | changes
    with pytest.raises(ValueError, match=f"^{re.escape(f'to_flex_block_mask: {message}')}"):
        to_flex_block_mask(**arguments)


def test_type_errors() -> None:
    for schedule, message in (
        (Schedule(), "schedule is a Schedule and must be one of pycore.schedules"),
        (KeySubset([1, 2]), "keys is a list and must be a Tensor"),
    ):
        with pytest.raises(TypeError, match=f"^to_flex_block_mask: {message}$"):
            to_flex_block_mask(schedule, batch=1, heads=1, query_length=4, key_length=4)
