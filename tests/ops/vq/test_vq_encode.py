# SPDX-License-Identifier: Apache-2.0
"""vq_encode and rvq_encode: the codes of the definition, whatever they are computed with."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pycore
from pycore import ops
from pycore.reference import vq as reference

# (rows, codes, channels): empty, one, around the panels (16 and 64 codes), the chunk (1024), the lanes, small channels.
SHAPES = [
    (0, 5, 3), (1, 1, 1), (3, 7, 2), (3, 100, 70), (17, 97, 5), (33, 130, 8), (50, 64, 9), (97, 339, 17), (101, 63, 16),
    (129, 1025, 40), (64, 2100, 128), (20, 33, 257), (7, 65, 1023), (200, 17, 1), (9, 1024, 4),
]  # fmt: skip


def lane_distances(x: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """The distance of csrc/include/pycore/vq/vq.h, step by step; an FMA of float32 is one of float64 rounded once."""
    difference = (x[:, None, :] - codebook[None]).astype(np.float32)
    lanes = np.zeros((*difference.shape[:2], 16), dtype=np.float32)
    for i in range(difference.shape[-1]):
        square = difference[..., i].astype(np.longdouble) ** 2
        lanes[..., i % 16] = (lanes[..., i % 16].astype(np.longdouble) + square).astype(np.float32)
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    return lanes[..., 0]


def nearest(x: Tensor, codebook: Tensor, topk: int = 1) -> Tensor:
    distances = torch.from_numpy(lane_distances(x.numpy(), codebook.numpy()))
    return distances.sort(dim=-1, stable=True).indices[:, :topk]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("offset", [0.0, 1000.0], ids=["centred", "offset"])
def test_codes_are_those_of_the_definition(isa: str, shape: tuple[int, int, int], offset: float) -> None:
    rows, codes, channels = shape
    x, codebook = torch.randn(rows, channels) + offset, torch.randn(codes, channels) + offset
    topk = min(codes, 5)
    found = ops.vq_encode(x, codebook, topk=topk)
    assert found.dtype == torch.int64 and found.shape == (rows, topk)
    assert torch.equal(found, nearest(x, codebook, topk))
    assert torch.equal(ops.vq_encode(x, codebook), found[:, :1])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_cosine(isa: str, shape: tuple[int, int, int]) -> None:
    rows, codes, channels = shape
    x, codebook = torch.randn(rows, channels) * 3, torch.randn(codes, channels) * torch.rand(codes, 1)
    codebook[0] = 0
    found = ops.vq_encode(x, codebook, metric="cosine")[:, 0]
    exact = reference.distances(x.double(), codebook.double(), "cosine")
    assert bool((exact.gather(-1, found[:, None])[:, 0] - exact.amin(-1) <= 1e-6).all())
    unit = [reference.unit(t.double()).float() for t in (x, codebook)]
    assert torch.equal(found, nearest(*unit)[:, 0])


def test_reference_is_brute_force() -> None:
    x, codebook = torch.randn(40, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    assert torch.equal(reference.vq_encode(x, codebook)[:, 0], torch.cdist(x, codebook).argmin(-1))
    similarity = torch.nn.functional.cosine_similarity(x[:, None], codebook[None], dim=-1)
    assert torch.equal(reference.vq_encode(x, codebook, metric="cosine")[:, 0], similarity.argmax(-1))


# ---- what peers get wrong --------------------------------------------------------------------------------------------


def test_a_code_beside_another(isa: str) -> None:
    """A clamp of distances before their root makes all below 1e-4 equal, and the lower index wins."""
    codebook = torch.randn(64, 8)
    codebook[2] = codebook[3] + 1e-5
    x = codebook[3].repeat(9, 1)
    assert ops.vq_encode(x, codebook).tolist() == [[3]] * 9


@pytest.mark.parametrize("offset", [100.0, 1000.0, 1e5])
def test_offset_of_the_data(isa: str, offset: float) -> None:
    """|x|^2 - 2xc + |c|^2 in float32 is wrong for 95 % of the rows at an offset of 1000."""
    x, codebook = torch.randn(300, 32) + offset, torch.randn(500, 32) + offset
    assert torch.equal(ops.vq_encode(x, codebook), nearest(x, codebook))
    exact = reference.vq_encode(x.double(), codebook.double())
    assert (ops.vq_encode(x, codebook) == exact).float().mean() >= 0.99


def test_spread_of_the_codebook(isa: str) -> None:
    """Codes at +-1000, one far outlier, and data that is not where the codebook is."""
    codebook = torch.randn(300, 16) + 1000 * torch.randint(0, 2, (300, 1)) * 2 - 1000
    codebook[7] = 1e6
    for x in (codebook[torch.randint(0, 300, (50,))] + torch.randn(50, 16), torch.randn(50, 16) + 1000):
        assert torch.equal(ops.vq_encode(x, codebook, topk=3), nearest(x, codebook, 3))


def test_ties_go_to_the_lowest_index(isa: str) -> None:
    """Across vectors, panels, chunks and threads: duplicates, zeros, one code."""
    book = torch.randn(40, 12)
    codebook = book.repeat(60, 1)
    x = book[torch.randint(0, 40, (70,))] + 0.1 * torch.randn(70, 12)
    found = ops.vq_encode(x, codebook, topk=3)
    assert torch.equal(found[:, 0], ops.vq_encode(x, book)[:, 0])
    assert torch.equal(found[:, 1], found[:, 0] + 40) and torch.equal(found[:, 2], found[:, 0] + 80)
    assert not ops.vq_encode(torch.zeros(20, 5), torch.zeros(200, 5)).any()
    assert ops.vq_encode(torch.zeros(9, 5), torch.zeros(200, 5), topk=4).tolist() == [[0, 1, 2, 3]] * 9
    assert not ops.vq_encode(torch.randn(20, 5), torch.randn(1, 5)).any()


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e-12, 1e12, 1e17])
def test_scales(isa: str, scale: float) -> None:
    """Scores that would underflow or overflow prune nothing."""
    x, codebook = torch.randn(50, 16) * scale, torch.randn(100, 16) * scale
    assert torch.equal(ops.vq_encode(x, codebook), nearest(x, codebook))


# ---- the same bits ---------------------------------------------------------------------------------------------------


def per_isa(compute) -> list[Tensor]:  # noqa: ANN001
    before, results = pycore.native.cpu_isa(), []
    for name in pycore.native.available_isas():
        pycore.native.set_cpu_isa(name)
        results.append(compute())
    pycore.native.set_cpu_isa(before)
    return results


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("channels", [3, 8, 50])
def test_instruction_sets_agree(metric: str, channels: int) -> None:
    """On near ties too: many codes are one rounding apart."""
    codebook = torch.randn(20, channels).repeat(10, 1) * (1 + 2e-7 * torch.randn(200, channels))
    x = codebook[::3] * (1 + 2e-7 * torch.randn(67, channels))
    one, *others = per_isa(lambda: ops.vq_encode(x, codebook, metric=metric, topk=4))
    assert all(torch.equal(one, other) for other in others)
    books = torch.stack([codebook, codebook * 1e-3, codebook * 1e-6])
    for beam in (1, 4):
        one, *others = per_isa(lambda: ops.rvq_encode(x, books, metric=metric, beam_size=beam))  # noqa: B023
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("seed", range(40))
def test_instruction_sets_agree_on_hostile_data(seed: int) -> None:
    """Random sizes, offsets, scales, spreads and near ties; scores prune on two of the three, and must never decide."""
    draw = random.Random(seed)
    rows, codes = draw.choice([1, 5, 13, 40, 97]), draw.choice([1, 16, 63, 130, 700, 1025])
    channels, stages = draw.choice([1, 2, 5, 8, 9, 17, 33, 100]), draw.choice([1, 2, 3])
    x, books = torch.randn(rows, channels), torch.randn(stages, codes, channels)
    kind = seed % 8
    if kind == 1:
        books = torch.randn(stages, 1, channels) + books * 10 ** draw.uniform(-8, -3)
    elif kind == 2:
        x, books = torch.randint(-2, 3, x.shape).float(), torch.randint(-2, 3, books.shape).float()
    elif kind == 3:
        books = books * 10.0 ** torch.randint(-6, 6, (stages, codes, 1)).float()
    elif kind == 4:
        books[:, draw.randrange(codes)] = 1e8
    elif kind == 5:
        x = books[0, torch.randint(0, codes, (rows,))] * (1 + 1e-6 * x)
    elif kind == 6:
        x = x * 10.0 ** torch.randint(-6, 6, (rows, 1)).float()
    offset, scale = draw.choice([0.0, 100.0, 1e6]), 10.0 ** draw.choice([-20, -5, 0, 0, 5])
    x, books = (x + offset * draw.choice([0, 1])) * scale, (books + offset) * scale
    metric, beam, topk = draw.choice(["euclidean", "cosine"]), draw.choice([1, 3, 16]), draw.choice([1, min(codes, 7)])
    one, *others = per_isa(lambda: ops.rvq_encode(x, books, metric=metric, beam_size=beam))
    assert all(torch.equal(one, other) for other in others)
    one, *others = per_isa(lambda: ops.vq_encode(x, books[0], metric=metric, topk=topk))
    assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("beam_size", [1, 5])
def test_company_and_threads_change_nothing(isa: str, beam_size: int, threads: None) -> None:
    x = torch.randn(300, 24)
    books = torch.randn(3, 150, 24) * torch.tensor([1.0, 0.5, 0.25])[:, None, None]
    together = ops.rvq_encode(x, books, beam_size=beam_size)
    alone = torch.cat([ops.rvq_encode(row, books, beam_size=beam_size) for row in x.split(1)])
    assert torch.equal(together, alone)
    assert torch.equal(together, torch.cat([ops.rvq_encode(part, books, beam_size=beam_size) for part in x.split(7)]))
    torch.set_num_threads(1)
    assert torch.equal(together, ops.rvq_encode(x, books, beam_size=beam_size))
    assert torch.equal(together, ops.rvq_encode(x, books.repeat(2, 1, 1), num_quantizers=3, beam_size=beam_size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(isa: str, dtype: torch.dtype) -> None:
    x, codebook = torch.randn(60, 24).to(dtype), torch.randn(2, 90, 24).to(dtype)
    wide = ops.rvq_encode(x.float(), codebook.float())
    assert torch.equal(ops.rvq_encode(x, codebook), wide)
    assert torch.equal(ops.rvq_encode(x, codebook.float()), wide)
    assert torch.equal(ops.vq_encode(x, codebook[0]), wide[:, :1])


def test_strides(isa: str) -> None:
    x, codebook = torch.randn(4, 24, 30), torch.randn(50, 48)
    expected = ops.vq_encode(x.mT.contiguous(), codebook[:, :24].contiguous())
    assert torch.equal(ops.vq_encode(x.mT, codebook[:, :24]), expected)
    rows = torch.randn(5, 6, 24)[:, ::2]
    assert torch.equal(ops.vq_encode(rows, codebook[::2, :24]), ops.vq_encode(rows.clone(), codebook[::2, :24].clone()))
    one = torch.randn(24).expand(8, 3, 24)
    assert (ops.vq_encode(one, codebook[:, :24]) == ops.vq_encode(one[0, 0], codebook[:, :24])).all()


def test_batch_of_books(isa: str) -> None:
    x, codebook = torch.randn(5, 7, 6, 10), torch.randn(6, 40, 10)
    found = ops.vq_encode(x, codebook, topk=2)
    assert found.shape == (5, 7, 6, 2)
    for book in range(6):
        assert torch.equal(found[..., book, :], ops.vq_encode(x[..., book, :], codebook[book], topk=2))
    assert ops.vq_encode(torch.randn(0, 6, 10), codebook).shape == (0, 6, 1)


# ---- residual quantization -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beam_size", [1, 2, 5, 16])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_rvq(isa: str, beam_size: int, metric: str) -> None:
    x = torch.randn(60, 24)
    books = [torch.randn(size, 24) * 0.7**q for q, size in enumerate((5, 70, 200, 64))]
    found = ops.rvq_encode(x, books, metric=metric, beam_size=beam_size)
    exact = reference.rvq_encode(x.double(), [b.double() for b in books], metric=metric, beam_size=beam_size)
    assert torch.equal(found, exact)


def test_greedy_stages_are_searches_of_the_residual(isa: str) -> None:
    x, books = torch.randn(200, 40), torch.randn(6, 333, 40) * torch.logspace(0, -2, 6)[:, None, None]
    found, residual = ops.rvq_encode(x, books), x
    for q, book in enumerate(books):
        assert torch.equal(found[:, q], ops.vq_encode(residual, book)[:, 0])
        residual = residual - book[found[:, q]]
    for stages in (1, 4, 6):
        assert torch.equal(ops.rvq_encode(x, books, num_quantizers=stages), found[:, :stages])


@pytest.mark.parametrize("beam_size", [1, 3])
def test_channel_masks(isa: str, beam_size: int) -> None:
    """As in Language-Codec: masked stages see x, the residual starts after them, codes are not masked."""
    x, books = torch.randn(50, 12), torch.randn(5, 60, 12) * 0.5
    masks = torch.zeros(3, 12, dtype=torch.bool)
    masks[0, :4] = masks[1, 4:8] = masks[2, 8:] = True
    found = ops.rvq_encode(x, books, channel_masks=masks, beam_size=beam_size)
    for q in range(3):
        assert torch.equal(found[:, q], ops.vq_encode(x * masks[q], books[q])[:, 0])
    left = x - books[0][found[:, 0]] - books[1][found[:, 1]] - books[2][found[:, 2]]
    assert torch.equal(found[:, 3:], ops.rvq_encode(left, books[3:], beam_size=beam_size))
    assert torch.equal(found[:, :2], ops.rvq_encode(x, books, channel_masks=masks, num_quantizers=2))
    exact = reference.rvq_encode(x.double(), list(books.double()), channel_masks=masks, beam_size=beam_size)
    assert torch.equal(found, exact)


def test_a_wider_beam_is_nearer(isa: str) -> None:
    x, books = torch.randn(400, 16), torch.randn(4, 64, 16) * 0.6
    error = [
        float((ops.rvq_decode(ops.rvq_encode(x, books, beam_size=b), books) - x).square().mean()) for b in (1, 4, 16)
    ]
    assert error[0] > error[1] > error[2]


def test_one_codebook_for_all_stages(isa: str) -> None:
    x, codebook = torch.randn(40, 10), torch.randn(80, 10)
    assert torch.equal(ops.rvq_encode(x, codebook.expand(4, 80, 10)), ops.rvq_encode(x, codebook.repeat(4, 1, 1)))


def test_decode(isa: str) -> None:
    books = [torch.randn(size, 70) for size in (5, 9, 3)]
    codes = torch.stack([torch.randint(-1, size, (4, 6)) for size in (5, 9, 3)], -1)
    assert torch.equal(ops.rvq_decode(codes, books), reference.rvq_decode(codes, books))
    assert torch.equal(ops.rvq_decode(codes[..., :2], books), reference.rvq_decode(codes[..., :2], books[:2]))
    assert torch.equal(ops.rvq_decode(codes.to(torch.int32), books), ops.rvq_decode(codes, books))
    assert not ops.rvq_decode(torch.full((4, 3), -1), books).any()
    assert ops.rvq_decode(codes[..., :0], books).shape == (4, 6, 70)
    masks = torch.ones(2, 70, dtype=torch.bool)
    assert torch.equal(ops.rvq_decode(codes, books, channel_masks=masks), ops.rvq_decode(codes, books))
    half = [book.bfloat16() for book in books]
    assert torch.equal(ops.rvq_decode(codes, half), ops.rvq_decode(codes, [book.float() for book in half]).bfloat16())


def test_statistics(isa: str, threads: None) -> None:
    x, codes = torch.randn(7, 90, 150), torch.randint(-1, 40, (7, 90))
    counts, sums = ops.vq_statistics(x, codes, 41)
    exact_counts, exact_sums = reference.vq_statistics(x.double(), codes, 41)
    assert torch.equal(counts.double(), exact_counts)
    assert torch.equal(sums, exact_sums.float())
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip((counts, sums), ops.vq_statistics(x, codes, 41), strict=True))
    wide = ops.vq_statistics(x.double(), codes, 41)
    assert wide[0].dtype == wide[1].dtype == torch.float64
    torch.testing.assert_close(wide[1], exact_sums)
    counts, sums = ops.vq_statistics(x[:0], codes[:0], 3)
    assert not counts.any() and not sums.any() and sums.shape == (3, 150)


# In a process of its own: a process's peak says nothing about what comes after its highest moment.
LARGE_SEARCH = """
import resource, torch
from pycore import ops
x, codebook = torch.randn(65536, 4), torch.randn(65536, 4)
ops.vq_encode(x[:8], codebook)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
codes = ops.vq_encode(x, codebook)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
some = torch.randint(65536, (20,))
assert torch.equal(codes[some, 0], (x[some, None] - codebook).square().sum(-1).argmin(1))
"""


def test_large_search_makes_no_matrix() -> None:
    """65536 x 65536 in float32 would be 16 gigabytes."""
    pytest.importorskip("resource")
    environment = {**os.environ, "PYTHONPATH": str(Path(pycore.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", LARGE_SEARCH], capture_output=True, text=True, env=environment, check=True
    )
    assert int(done.stdout) < 64 * 1024  # kilobytes


def test_native_face(isa: str) -> None:
    x, codebook = torch.randn(20, 12), torch.randn(3, 30, 12)
    found = pycore.native.rvq_encode(x.numpy(), codebook.numpy(), beam_size=2, threads=2)
    assert np.array_equal(found, ops.rvq_encode(x, codebook, beam_size=2).numpy())
    out = np.empty((20, 2), dtype=np.int64)
    assert pycore.native.vq_encode(x.numpy(), codebook[0].numpy(), topk=2, out=out) is out
    assert np.array_equal(out, ops.vq_encode(x, codebook[0], topk=2).numpy())
    assert np.array_equal(
        pycore.native.rvq_decode(found, codebook.numpy()), ops.rvq_decode(torch.from_numpy(found), codebook)
    )
    counts, sums = pycore.native.vq_statistics(x.numpy(), found[:, 0].copy(), 30)
    for mine, theirs in zip(
        (counts, sums), ops.vq_statistics(x, torch.from_numpy(found[:, 0].copy()), 30), strict=True
    ):
        assert np.array_equal(mine, theirs.numpy())
    sizes = pycore.native.rvq_encode(x.numpy(), codebook.numpy(), sizes=[30, 4, 1])
    assert (sizes < np.array([30, 4, 1])).all()
    masks = np.ones((1, 12), dtype=np.float32)
    assert np.array_equal(pycore.native.rvq_encode(x.numpy(), codebook.numpy(), channel_masks=masks)[:, :1], out[:, :1])
