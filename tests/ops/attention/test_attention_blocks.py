# SPDX-License-Identifier: Apache-2.0
"""The blocks of a round: masks against the reference, density, the importance estimator, and what bad input gets."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore import native
from pycore.ops import attention, pr_block_mask, pr_flash_attention
from pycore.reference.attention_blocks import block_mask, philox
from pycore.schedules import (
    Constant,
    Gaussian,
    Geometric,
    Harmonic,
    PowerLaw,
    Probabilistic,
    expected_density,
)
from tests.support.attention_inputs import lengths, qkv

F64 = torch.float64
FAMILIES = [
    Geometric(0.7), PowerLaw(0.5), Harmonic(2), Gaussian(3.0), Constant(0.3), torch.linspace(1, 0, 6),
    torch.rand(2, 9, generator=torch.Generator().manual_seed(1)),
]  # fmt: skip

# ---- masks ---------------------------------------------------------------------------------------------------------


def test_philox_of_the_reference() -> None:
    """Random123's known answers; tests/native/philox.cpp has them for the kernels."""
    ones = 0xFFFFFFFF
    digits_of_pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0xA4093822 | 0x299F31D0 << 32
    for (counter, key), answer in {
        ((0, 0, 0, 0), 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((ones,) * 4, ones | ones << 32): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    }.items():
        assert tuple(int(word) for word in philox(counter, key)) == answer
    pi_key = 0xA4093822 | 0x299F31D0 << 32
    assert digits_of_pi[1] == pi_key
    words = philox(digits_of_pi[0], pi_key)
    assert tuple(int(word) for word in words) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_known_blocks() -> None:
    """A mask worked out in Python integers from the definition alone."""
    seed, round, head, p = 2**40 + 12345, 9, 1, 0.37
    mask = pr_block_mask(
        batch=1, heads=2, query_blocks=6, key_blocks=6, distance_probs=Constant(p), seed=seed, round=round
    )
    for i in range(6):
        for j in range(6):
            a, b, c, d = j, i, head, round
            low, high = seed % 2**32, seed >> 32
            for _ in range(10):
                first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
                a, b, c, d = (second >> 32) ^ b ^ low, second % 2**32, (first >> 32) ^ d ^ high, first % 2**32
                low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
            assert mask[0, head, i, j] == (i == j or (i > j and a >> 8 < math.ceil(p * 2**24)))


@pytest.mark.parametrize("family", FAMILIES, ids=range(len(FAMILIES)))
@pytest.mark.parametrize("pattern", ["independent", "diagonal"])
@pytest.mark.parametrize("blocks_per_row", [None, 1, 4])
def test_mask_is_the_reference(family: Any, pattern: str, blocks_per_row: int | None) -> None:
    seeds = lengths(5, 2**62 + 7)
    made = {"seed": seeds, "round": 3, "pattern": pattern, "blocks_per_row": blocks_per_row}
    for query_blocks, key_blocks in ((9, 9), (3, 70), (5, 2), (1, 1)):
        mask = pr_block_mask(
            batch=2, heads=2, query_blocks=query_blocks, key_blocks=key_blocks, distance_probs=family, **made
        )
        assert mask.shape == (2, 2, query_blocks, key_blocks) and mask.dtype == torch.bool
        rows = torch.arange(key_blocks - query_blocks, key_blocks)[:, None]
        for b in range(2):
            for h in range(2):
                expected = block_mask(Probabilistic(family, **made), rows, torch.arange(key_blocks)[None, :], b, h)
                assert torch.equal(mask[b, h], expected)


@pytest.mark.parametrize("pattern", ["independent", "diagonal"])
def test_rounds_heads_and_seeds_differ(pattern: str) -> None:
    masks = [
        pr_block_mask(
            batch=1, heads=2, query_blocks=40, key_blocks=40, distance_probs=Constant(0.5), seed=seed, round=round,
            pattern=pattern,
        )
        for seed in (0, 1, 2**32)
        for round in (0, 1, 2**32 - 1)
    ]  # fmt: skip
    heads = [mask[0, h] for mask in masks for h in range(2)]
    for i, x in enumerate(heads):
        assert all(not torch.equal(x, y) for y in heads[:i])
        diagonals = [x.diagonal(-d) for d in range(40)]
        assert all(len(set(d.tolist())) == 1 for d in diagonals) == (pattern == "diagonal")


def test_blocks_per_row_is_exact() -> None:
    for window, k in ((1, 1), (1, 5), (3, 4), (0, 2), (2, 100)):
        mask = pr_block_mask(
            batch=1, heads=3, query_blocks=30, key_blocks=30, distance_probs=Harmonic(1), seed=2, window_blocks=window,
            blocks_per_row=k,
        )  # fmt: skip
        assert torch.equal(mask.sum(3), torch.arange(1, 31).clamp(max=k).expand(1, 3, 30))
        assert mask.tril(-30).sum() == mask.triu(1).sum() == 0
    never = pr_block_mask(
        batch=1, heads=1, query_blocks=9, key_blocks=9, distance_probs=torch.tensor([1.0, 0, 1, 0]), seed=2,
        blocks_per_row=9,
    )  # fmt: skip
    assert [never[0, 0].diagonal(-d).any().item() for d in range(9)] == [True, False, True] + [False] * 6


def test_blocks_per_row_chooses_in_proportion() -> None:
    """One draw of a row: its chances are the probabilities over their sum. Chi-square, 3 degrees of freedom, 99.9 %."""
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    draws = 4000
    mask = pr_block_mask(
        batch=draws, heads=1, query_blocks=1, key_blocks=4, distance_probs=weights, seed=torch.arange(draws),
        window_blocks=0, blocks_per_row=1,
    )  # fmt: skip
    counts = mask[:, 0, 0].sum(0).flip(0)
    assert counts.sum() == draws
    assert float(((counts - draws * weights) ** 2 / (draws * weights)).sum()) < 16.27


def test_threads_and_instruction_sets_draw_the_same() -> None:
    results = []
    before = native.cpu_isa()
    for name in native.available_isas():
        native.set_cpu_isa(name)
        for threads in (1, 2, 7):
            for k in (None, 6):
                blocks, _ = native.attention_blocks(
                    seed=lengths(3, 4).numpy(), round=lengths(1).numpy(), batch=2, heads=3, query_length=9000,
                    key_length=9000, family="power_law", parameter=0.4, blocks_per_row=k, threads=threads,
                )  # fmt: skip
                results.append((k, torch.from_numpy(blocks)))
    native.set_cpu_isa(before)
    for k, blocks in results:
        assert torch.equal(blocks, next(other for key, other in results if key == k))
    assert results[0][1].count_nonzero() > 100


# ---- density and the estimator -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("family", FAMILIES, ids=range(len(FAMILIES)))
def test_expected_density_is_the_mean(family: Any, window: int) -> None:
    """Within 4 standard errors, the variance worked out from the probabilities: false alarms 1 in 16,000."""
    blocks, rounds = 24, 300
    mask = pr_block_mask(
        batch=rounds, heads=2, query_blocks=blocks, key_blocks=blocks, distance_probs=family, window_blocks=window,
        seed=torch.arange(rounds) + 1000,
    )  # fmt: skip
    pairs = blocks * (blocks + 1) // 2
    density = mask.sum((2, 3)).double() / pairs
    distance = (torch.arange(blocks)[:, None] - torch.arange(blocks)[None, :]).tril()
    if isinstance(family, Tensor):
        p = torch.atleast_2d(family).double()[:, distance.clamp(max=family.shape[-1] - 1)]
    else:
        p = torch.tensor([family.probability(d) for d in range(blocks)], dtype=F64)[distance][None]
    p = p.expand(2, blocks, blocks).tril().masked_fill(distance < window, 0)
    error = float((p * (1 - p)).sum()) ** 0.5 / (2 * pairs * rounds**0.5)
    assert (
        abs(float(density.mean()) - expected_density(family, blocks=blocks, window_blocks=window)) <= 4 * error + 1e-12
    )


def test_expected_density_of_rows() -> None:
    for table in (torch.ones(3), torch.tensor([1.0, 0, 1, 0])):
        mask = pr_block_mask(
            batch=1, heads=1, query_blocks=20, key_blocks=20, distance_probs=table, seed=1, blocks_per_row=5
        )
        expected = expected_density(table, blocks=20, blocks_per_row=5)
        assert float(mask.sum()) / 210 == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("pattern", ["independent", "diagonal"])
def test_importance_is_unbiased(pattern: str) -> None:
    """Numerator and denominator of the softmax converge to dense attention's as 1 / sqrt(rounds).

    2048 rounds of fixed seeds. Every mean lies within 5.5 standard errors, estimated from the rounds themselves, of the
    dense value (about 4000 numbers: false alarms less than 1 in 1000). The error of means of 128 rounds, over the 16
    there are, is a quarter of that of means of 8, within a factor of 1.5.
    """
    length, rounds, sink = 96, 2048, 3
    torch.manual_seed(5)
    q, k, v = qkv(1, 2, 1, length, length, 8, dtype=F64)
    wide = [x.expand(rounds, -1, -1, -1) for x in (q, k, v)]
    out, lse = pr_flash_attention(
        *wide, distance_probs=PowerLaw(0.7), seed=torch.arange(rounds), block_size=16, sink_size=sink, pattern=pattern,
        correction="importance", return_lse=True,
    )  # fmt: skip
    exact_out, exact_lse = attention(q, k, v, return_lse=True)
    estimates = torch.cat([out * lse.exp()[..., None], lse.exp()[..., None]], dim=3)
    exact = torch.cat([exact_out * exact_lse.exp()[..., None], exact_lse.exp()[..., None]], dim=3)[0]
    drawn = torch.arange(length) >= 16  # earlier rows have no block but their own
    error = (estimates.mean(0) - exact)[:, drawn]
    deviation = estimates.std(0)[:, drawn]
    assert float(deviation.min()) > 0
    assert float((error.abs() / (deviation / rounds**0.5)).max()) < 5.5
    torch.testing.assert_close(estimates[:, :, ~drawn], exact[:, ~drawn].expand(rounds, -1, -1, -1))
    few, many = ((estimates.view(-1, n, *exact.shape).mean(1) - exact)[:, :, drawn] for n in (8, 128))
    ratio = float(few.square().mean().sqrt() / many.square().mean().sqrt())
    assert 4 / 1.5 < ratio < 4 * 1.5
    plain, plain_lse = pr_flash_attention(
        *wide, distance_probs=PowerLaw(0.7), seed=torch.arange(rounds), block_size=16, sink_size=sink, pattern=pattern,
        return_lse=True,
    )  # fmt: skip
    biased = plain_lse.exp().mean(0)[:, drawn] / exact_lse[0].exp()[:, drawn]
    assert float(biased.mean()) < 0.95  # what the correction mends


# ---- errors --------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"distance_probs": Constant(0.5), "seed": 1}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "probability": (
        {"distance_probs": torch.tensor([1.0, 1.5])}, "distance_probs[1] is 1.5 and must be between 0 and 1",
    ),
    "negative-probability": (
        {"distance_probs": torch.tensor([[1.0, 0.0], [-0.25, 0.0]])},
        "distance_probs[1, 0] is -0.25 and must be between 0 and 1",
    ),
    "nan": (
        {"distance_probs": torch.tensor([1.0, 0.5, torch.nan])}, "distance_probs[2] is nan and must be between 0 and 1",
    ),
    "heads": (
        {"distance_probs": torch.ones(3, 5)},
        "distance_probs has shape [3, 5] and must be [n] or [heads, n], with 2 heads and n at least 1",
    ),
    "no-probability": (
        {"distance_probs": torch.ones(0)},
        "distance_probs has shape [0] and must be [n] or [heads, n], with 2 heads and n at least 1",
    ),
    "integer-probability": (
        {"distance_probs": torch.ones(3, dtype=torch.int64)}, "distance_probs is int64 and must be floating-point",
    ),
    "seed": ({"seed": -1}, "seed is -1 and must be at least 0"),
    "seed-of-a-row": ({"seed": lengths(3, -4)}, "seed is -4 and must be at least 0"),
    "seeds": ({"seed": lengths(3, 4, 5)}, "seed has shape [3] and must be one number or [batch]"),
    "large-seed": ({"seed": 2**63}, f"seed is {2**63} and must be less than 2**63"),
    "float-seed": ({"seed": torch.tensor(1.0)}, "seed must be an int64 tensor on the CPU"),
    "round": ({"round": -1}, "round is -1 and must be between 0 and 2**32 - 1"),
    "large-round": ({"round": torch.tensor(2**32)}, f"round is {2**32} and must be between 0 and 2**32 - 1"),
    "rounds": ({"round": lengths(1, 2)}, "round has shape [2] and must be one number"),
    "window": ({"window_blocks": -1}, "window_blocks is -1 and must be at least 0"),
    "pattern": ({"pattern": "plaid"}, 'pattern is "plaid" and must be "independent" or "diagonal"'),
    "no-blocks": ({"blocks_per_row": 0}, "blocks_per_row is 0 and must be at least 1"),
    "fewer-blocks-than-the-window": (
        {"blocks_per_row": 2, "window_blocks": 3}, "blocks_per_row is 2 and must be at least 3, with window_blocks 3",
    ),
}  # fmt: skip
BAD_ATTENTION: dict[str, tuple[dict[str, Any], str]] = {
    "block-size": ({"block_size": 48}, "block_size is 48 and must be a power of two between 16 and 2**30"),
    "small-block": ({"block_size": 8}, "block_size is 8 and must be a power of two between 16 and 2**30"),
    "block-of-one": ({"block_size": 1}, "block_size is 1 and must be a power of two between 16 and 2**30"),
    "negative-block": ({"block_size": -64}, "block_size is -64 and must be a power of two between 16 and 2**30"),
    "sink": ({"sink_size": -1}, "sink_size is -1 and must be at least 0"),
    "correction": ({"correction": "some"}, 'correction is "some" and must be "none" or "importance"'),
    "correction-of-rows": (
        {"correction": "importance", "blocks_per_row": 3},
        'correction is "importance" and must be "none" with blocks_per_row',
    ),
    "lengths": ({"key_lengths": lengths(9, 41)}, "key_lengths[1] is 41 and must be between 0 and key's length, 40"),
}


@pytest.mark.parametrize("name", BAD | BAD_ATTENTION)
def test_bad_rounds(name: str) -> None:
    changes, message = (BAD | BAD_ATTENTION)[name]
    with pytest.raises(ValueError, match=f"^{re.escape(f'pr_flash_attention: {message}')}$"):
        pr_flash_attention(*qkv(2, 2, 1, 30, 40, 8), **GOOD | changes)
    if name in BAD:
        with pytest.raises(ValueError, match=f"^{re.escape(f'pr_block_mask: {message}')}$"):
            pr_block_mask(batch=2, heads=2, query_blocks=3, key_blocks=4, **GOOD | changes)


def test_what_a_mask_needs() -> None:
    for name in ("batch", "heads", "query_blocks", "key_blocks"):
        counts = {"batch": 1, "heads": 1, "query_blocks": 2, "key_blocks": 2} | {name: -1}
        with pytest.raises(ValueError, match=rf"^pr_block_mask: {name} is -1 and must be at least 0$"):
            pr_block_mask(**counts, **GOOD)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"distance_probs": 0.5}, "distance_probs is a float and must be a Tensor or a family of pycore.schedules"),
        ({"seed": 1.5}, "seed is a float and must be an int"),
        ({"round": "1"}, "round is a str and must be an int"),
        ({"block_size": 64.0}, "block_size is a float and must be an int"),
        ({"window_blocks": None}, "window_blocks is a NoneType and must be an int"),
        ({"blocks_per_row": 1.0}, "blocks_per_row is a float and must be an int"),
        ({"pattern": None}, "pattern is a NoneType and must be a str"),
    ],
    ids=["probs", "seed", "round", "block-size", "window", "per-row", "pattern"],
)
def test_wrong_types(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(f'pr_flash_attention: {message}')}$"):
        pr_flash_attention(*qkv(2, 2, 1, 30, 40, 8), **GOOD | changes)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Geometric(1.5), "Geometric: rho is 1.5 and must be between 0 and 1"),
        (lambda: Geometric(math.nan), "Geometric: rho is nan and must be between 0 and 1"),
        (lambda: PowerLaw(-1), "PowerLaw: alpha is -1 and must be finite and at least 0"),
        (lambda: Harmonic(math.inf), "Harmonic: c is inf and must be finite and at least 0"),
        (lambda: Gaussian(0.0), "Gaussian: sigma is 0 and must be greater than 0"),
        (lambda: Constant(-0.1), "Constant: p is -0.1 and must be between 0 and 1"),
        (lambda: expected_density(Constant(1), blocks=0), "expected_density: blocks is 0 and must be at least 1"),
        (
            lambda: expected_density(torch.tensor([2.0]), blocks=4),
            "expected_density: distance_probs has entries outside [0, 1], where all must be",
        ),
        (
            lambda: expected_density(torch.ones(0), blocks=4),
            "expected_density: distance_probs has shape [0] and must be [n] or [heads, n]",
        ),
    ],
)
def test_bad_families(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_native_refuses_too() -> None:
    numbers = {"seed": lengths(1).numpy(), "round": lengths(0).numpy(), "batch": 1, "heads": 1}
    shape = {"query_length": 30, "key_length": 30}
    for changes, message in (
        ({"family": "wavy"}, 'family is "wavy" and must be "table", "geometric", '),
        ({"family": "geometric", "parameter": 2.0}, "rho is 2 and must be between 0 and 1"),
        ({"family": "gaussian", "parameter": 0.0}, "sigma is 0 and must be greater than 0"),
        ({}, "distance_probs must be a tensor of probabilities"),
        ({"family": "constant", "blocks_per_row": 0}, "blocks_per_row is 0 and must be at least 1"),
        ({"family": "constant", "query_length": -1}, "query's length is -1 and must be at least 0"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'attention_blocks: {message}')}"):
            native.attention_blocks(**numbers | shape | changes)
