# SPDX-License-Identifier: Apache-2.0
"""The CUDA forward kernel against the reference, the same bits on the device, and the stream it runs on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pycore.ops import attention
from pycore.reference.attention import attention as reference
from pycore.schedules import Causal, Full, KeySubset, Lambda, Prefix, Schedule, Segments, Tree
from tests.attention_inputs import lengths, qkv, random_tree, tables
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.cuda

SCHEDULES = [
    pytest.param(Causal(), id="causal"),
    pytest.param(Full(), id="full"),
    pytest.param(Lambda(4, 40), id="lambda"),
    pytest.param(Lambda(70, 10), id="lambda-sink-tile"),
    pytest.param(Prefix(lengths(5, 90)), id="prefix"),
    pytest.param(Segments(lengths(0, 30, 100, 1100)), id="segments"),
    pytest.param(KeySubset(torch.arange(1100) % 7 == 2), id="keys"),
    pytest.param(KeySubset(torch.arange(0, 1100, 9), causal=False), id="keys-not-causal"),
    pytest.param(Tree(lengths(-1)), id="tree"),
]


def on_device(value: Any) -> Any:
    """Tensors, also those of a schedule or a pair of tables, on the GPU."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, tuple):
        return tuple(on_device(x) for x in value)
    if isinstance(value, Prefix):
        return Prefix(value.prefix_lengths.cuda())
    if isinstance(value, Segments):
        return Segments(value.boundaries.cuda(), value.causal)
    if isinstance(value, KeySubset):
        return KeySubset(value.keys.cuda(), value.causal)
    if isinstance(value, Tree):
        return Tree(value.parents.cuda())
    return value


@pytest.mark.parametrize("rope", [False, True], ids=lambda r: f"rope={r}")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("shape", "head_dim"),
    [((1, 1), 64), ((17, 97), 40), ((113, 203), 128), ((130, 1100), 64), ((70, 70), 256)],
    ids=str,
)
def test_values(shape: tuple[int, int], head_dim: int, schedule: Schedule, rope: bool) -> None:
    tensors = qkv(2, 4, 2, *shape, head_dim)
    options: dict[str, Any] = {"schedule": schedule}
    if rope and isinstance(schedule, Tree):
        pytest.skip("the kernel does not rotate a tree by depth")
    if rope:
        options |= {"rope": tables(max(shape) + 64, head_dim), "distance_limit": 60}
    out, lse = attention(*on_device(tensors), return_lse=True, **{k: on_device(v) for k, v in options.items()})
    plain = reference(*tensors, **options)
    doubled = options | ({"rope": tuple(t.double() for t in options["rope"])} if rope else {})
    exact = reference(*(t.double() for t in tensors), **doubled)
    assert_as_accurate(out.cpu(), exact[0], plain[0], "out")
    assert_as_accurate(lse.cpu(), exact[1], plain[1], "lse")


def test_trees() -> None:
    """Of batch rows; with rotation they are refused."""
    tensors = qkv(2, 4, 2, 90, 300, 64)
    schedule = Tree(torch.stack([random_tree(80, 1), random_tree(80, 2)]))
    out = attention(*on_device(tensors), schedule=on_device(schedule))
    exact = reference(*(t.double() for t in tensors), schedule=schedule)[0]
    assert_as_accurate(out.cpu(), exact, reference(*tensors, schedule=schedule)[0])
    with pytest.raises(ValueError, match="^attention: rope, distance_bias and alibi_slopes with a tree"):
        attention(*on_device(tensors), schedule=on_device(schedule), rope=on_device(tables(300, 64)))


def test_lengths_and_eviction() -> None:
    tensors = qkv(2, 2, 1, 20, 90, 64)
    options = {
        "schedule": Lambda(4, 30), "key_starts": lengths(3, 0), "key_lengths": lengths(80, 90),
        "key_offset": lengths(1000, 0), "query_lengths": lengths(20, 7),
    }  # fmt: skip
    out = attention(*on_device(tensors), **{k: on_device(v) for k, v in options.items()})
    exact = reference(*(t.double() for t in tensors), **options)[0]
    assert_as_accurate(out.cpu(), exact, reference(*tensors, **options)[0])


def test_same_bits_alone_and_together() -> None:
    query, key, value = on_device(qkv(3, 4, 2, 90, 1300, 64))
    rope = on_device(tables(1364, 64))
    together = attention(query, key, value, schedule=Lambda(8, 1100), rope=rope)
    for b in range(3):
        row = attention(*(x[b : b + 1] for x in (query, key, value)), schedule=Lambda(8, 1100), rope=rope)
        assert torch.equal(row[0], together[b])
    last = attention(query[:, :, -1:], key, value, schedule=Lambda(8, 1100), rope=rope)
    assert torch.equal(last, together[:, :, -1:])


def test_runs_on_the_current_stream() -> None:
    query, key, value = on_device(qkv(1, 2, 2, 64, 64, 64))
    expected = attention(query, key, value)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        doubled = query * 1.0
        out = attention(doubled, key, value)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param({"softcap": 3.0}, "softcap", id="softcap"),
        pytest.param({"sink_logits": torch.zeros(2)}, "sink_logits", id="sink_logits"),
        pytest.param({"distance_bias": torch.zeros(2, 4)}, "distance_bias", id="distance_bias"),
    ],
)
def test_what_the_kernel_does_not_have_is_refused(options: dict[str, Any], reason: str) -> None:
    tensors = on_device(qkv(1, 2, 2, 8, 8, 16))
    with pytest.raises(RuntimeError, match=f"^attention: the CUDA kernel takes no .*{reason}"):
        attention(*tensors, **{k: on_device(v) for k, v in options.items()})
