# SPDX-License-Identifier: Apache-2.0
"""Schedules as values, as masks, and as the tiles the kernels walk."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable

import pytest
import torch

from pycore import schedules
from pycore.ops import attention
from pycore.reference.attention import keep_mask
from pycore.schedules import Causal, Constant, Full, KeySubset, Lambda, Prefix, Probabilistic, Schedule, Segments, Tree

ALL = [
    Full(), Causal(), Lambda(0, 1), Lambda(4, 8), Lambda(100, 3), Lambda(3, 100), Lambda(2**62, 2**62), Lambda(4, 8, 2),
    Lambda(0, 8, 70),
]  # fmt: skip


def test_public_names() -> None:
    kinds = {"Causal", "Full", "KeySubset", "Lambda", "Prefix", "Probabilistic", "Schedule", "Segments", "Tree"}
    families = {"Constant", "DistanceFamily", "Gaussian", "Geometric", "Harmonic", "PowerLaw"}
    assert set(schedules.__all__) == kinds | families | {"expected_density", "to_flex_block_mask"}


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_schedules_are_frozen_values(schedule: Schedule) -> None:
    again = type(schedule)(*schedule.args)
    assert schedule == again and hash(schedule) == hash(again)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert isinstance(schedule, Schedule) and dataclasses.is_dataclass(schedule)
    assert sum(schedule == other for other in ALL) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.sink_size = 3  # type: ignore[misc]


def test_schedules_of_tensors_are_themselves_alone() -> None:
    """Tensors have no truth value to compare by, so these are equal to nothing but themselves."""
    numbers = torch.tensor([0, 3, 9])
    for schedule in (Prefix(numbers), Segments(numbers), Segments(numbers, causal=False)):
        again = type(schedule)(schedule.tensor)
        assert schedule == schedule and schedule != again and len({schedule, again}) == 2
        with pytest.raises(dataclasses.FrozenInstanceError):
            schedule.boundaries = numbers  # type: ignore[misc]
    assert (Prefix(numbers).kind, Prefix(numbers).args) == ("prefix", []) and Prefix(numbers).tensor is numbers
    assert (Segments(numbers).kind, Segments(numbers).args) == ("segments", [1]) and Segments(numbers).causal
    assert Segments(numbers, False).args == [0] and Segments(numbers).tensor is numbers
    assert Segments(numbers, True, 8, 2).args == [1, 8, 2, 0] and Segments(numbers, False, 8).args == [0, 8, 0, 2**62]
    assert Segments(numbers, False, right=5).args == [0, 2**62, 0, 5]
    assert all(schedule.tensor is None for schedule in ALL)
    for schedule in (KeySubset(numbers), KeySubset(numbers, False), Tree(numbers - 1)):
        assert schedule == schedule and schedule != dataclasses.replace(schedule) and schedule.tensor is None
    assert (KeySubset(numbers).kind, KeySubset(numbers).args) == ("key_subset", [1])
    assert KeySubset(numbers, False).args == [0] and KeySubset(numbers).causal
    assert (Tree(numbers).kind, Tree(numbers).args) == ("tree", [])


@pytest.mark.parametrize(
    "schedule, rows",
    [
        (Prefix(torch.tensor([3])), ["###...", "###...", "###...", "####..", "#####.", "######"]),
        (Segments(torch.tensor([1, 3, 3, 5])), ["......", ".#....", ".##...", "...#..", "...##.", "......"]),
        (Segments(torch.tensor([1, 3, 5]), False), ["......", ".##...", ".##...", "...##.", "...##.", "......"]),
        (Segments(torch.tensor([0, 0, 5, 6]), True, 2), ["#.....", "##....", ".##...", "..##..", "...##.", ".....#"]),
        (Segments(torch.tensor([1, 6]), True, 2, 1), ["......", ".#....", ".##...", ".###..", ".#.##.", ".#..##"]),
        (Segments(torch.tensor([1, 6]), False, 2), ["......", ".#####", ".#####", "..####", "...###", "....##"]),
        (Segments(torch.tensor([0, 6]), False, 2, 1, 1), ["##....", "###...", "####..", "#.###.", "#..###", "#...##"]),
        (Lambda(0, 2, 1), ["##....", "###...", ".###..", "..###.", "...###", "....##"]),
        (Lambda(3, 1, 1), ["##....", "###...", "####..", "#####.", "###.##", "###..#"]),
        (Lambda(1, 2, None), ["######", "######", "######", "#.####", "#..###", "#...##"]),
        (KeySubset(torch.tensor([4, 1])), ["......", ".#....", ".#....", ".#....", ".#..#.", ".#..#."]),
        (KeySubset(torch.arange(6) % 3 == 1, False), [".#..#."] * 6),
        (Tree(torch.tensor([-1, 0, 0, -1])), ["#.....", "##....", "###...", "####..", "###.#.", "##...#"]),
    ],
    ids=[
        "prefix",
        "segments",
        "segments-not-causal",
        "segments-window",
        "segments-sink",
        "segments-window-left",
        "segments-both-sides",
        "lambda-right",
        "lambda-sinks-right",
        "lambda-all-right",
        "keys",
        "keys-not-causal",
        "tree",
    ],
)
def test_masks_by_hand(schedule: Schedule, rows: list[str], isa: str) -> None:
    """The reference's, and what the kernels keep."""
    position = torch.arange(6)
    mask = keep_mask(schedule, position[:, None], position[None])
    assert ["".join(".#"[int(x)] for x in row) for row in mask] == rows
    zeros = torch.zeros(1, 1, 6, 1)
    assert torch.equal(attention(zeros, zeros, torch.eye(6)[None, None], schedule=schedule)[0, 0] > 0, mask)


def test_what_the_kernels_see() -> None:
    assert (Full().kind, Full().args) == ("full", [])
    assert (Causal().kind, Causal().args) == ("causal", [])
    assert (Lambda(4, 8).kind, Lambda(4, 8).args) == ("lambda", [4, 8])
    assert Lambda(sink_size=4, window_size=8) == Lambda(4, 8)
    assert Lambda(4, 8, right=3).args == [4, 8, 3] and Lambda(4, 8, right=None).args == [4, 8, 2**62]


def test_lambda_by_hand() -> None:
    """Two sinks and a window of two, the query's own token in it."""
    position = torch.arange(6)
    rows = ["#.....", "##....", "###...", "####..", "##.##.", "##..##"]
    mask = keep_mask(Lambda(2, 2), position[:, None], position[None])
    assert ["".join(".#"[int(x)] for x in row) for row in mask] == rows


def test_mask_of_an_unknown_schedule() -> None:
    with pytest.raises(TypeError, match="must be one of pycore.schedules"):
        keep_mask(Schedule(), torch.zeros(1, 1), torch.zeros(1, 1))


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_kernels_keep_what_the_mask_says(schedule: Schedule, isa: str) -> None:
    """Equal scores and one-hot values: the output is the mask, each row divided by what it keeps."""
    length = 150
    out, lse = attention(
        torch.zeros(1, 1, length, 1), torch.zeros(1, 1, length, 1), torch.eye(length)[None, None], schedule=schedule,
        return_lse=True,
    )  # fmt: skip
    position = torch.arange(length)
    mask = keep_mask(schedule, position[:, None], position[None])
    assert torch.equal(out[0, 0] > 0, mask)
    torch.testing.assert_close(out[0, 0], mask / mask.sum(1, keepdim=True), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse[0, 0], mask.sum(1).float().log(), rtol=1e-6, atol=1e-6)


def test_tile_functions_agree_with_the_definition(run_native: Callable[..., None]) -> None:
    """tests/native/tile_schedule.cpp: random schedules, and the tiles a Λ walk visits far down a stream."""
    run_native("tile_schedule", "--quick")


def test_threads_share_the_work_evenly(run_native: Callable[..., None]) -> None:
    """tests/native/attention_balance.cpp: the busiest of 2 and of 16 simulated threads has at most 1.1 of the mean."""
    run_native("attention_balance", sources=("cpu/attention/blocks.cpp", "cpu/cpu_isa.cpp"))


@pytest.mark.parametrize("seed", [0, 3, 2**62 + 5, 2**63 - 1])
def test_seeds_of_layers_are_the_same_as_ints_and_in_a_tensor(seed: int) -> None:
    for layer in (0, 1, 2, 31, 1000):
        alone = Probabilistic(Constant(0.5), seed).for_layer(layer).seed
        folded = Probabilistic(Constant(0.5), torch.tensor([seed, 3])).for_layer(layer).seed
        assert isinstance(alone, int) and isinstance(folded, torch.Tensor)
        assert 0 <= alone < 2**63 and folded.dtype == torch.int64 and int(folded[0]) == alone
        assert int(folded[1]) == Probabilistic(Constant(0.5), 3).for_layer(layer).seed
    small = Probabilistic(Constant(0.5), torch.tensor([3], dtype=torch.int32)).for_layer(7).seed
    assert isinstance(small, torch.Tensor) and int(small[0]) == Probabilistic(Constant(0.5), 3).for_layer(7).seed


def test_a_negative_seed_stays_negative() -> None:
    """Folding a layer in would hide it: the op refuses it."""
    q = torch.zeros(2, 1, 20, 8)
    schedule = Probabilistic(Constant(0.5), torch.tensor([3, -3]), block_size=16).for_layer(2)
    with pytest.raises(ValueError, match="^attention: seed is -3 and must be at least 0$"):
        attention(q, q, q, schedule=schedule)
    with pytest.raises(ValueError, match=r"^Probabilistic.for_layer: seed is -3 and must be at least 0$"):
        Probabilistic(Constant(0.5), -3).for_layer(2)
