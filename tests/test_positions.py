# SPDX-License-Identifier: Apache-2.0
"""Position tables against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pycore.positions import (
    alibi_slopes,
    clipped_bias,
    rope_alibi_harmonic,
    rope_attention_factor,
    rope_tables,
    t5_bias,
)


def test_rope_tables_formula() -> None:
    cos, sin = rope_tables(5000, 32)
    assert cos.shape == sin.shape == (5000, 16) and cos.dtype == sin.dtype == torch.float32
    assert cos[0].tolist() == [1.0] * 16 and sin[0].tolist() == [0.0] * 16
    for d in (1, 2, 127, 4999):
        for i in range(16):
            frequency = torch.tensor(10000.0 ** (-2 * i / 32), dtype=torch.float32).item()
            assert cos[d, i].item() == pytest.approx(math.cos(d * frequency), abs=1e-7)
            assert sin[d, i].item() == pytest.approx(math.sin(d * frequency), abs=1e-7)


def test_rope_tables_extend_each_other() -> None:
    short, long = rope_tables(97, 6, theta=500.0), rope_tables(1023, 6, theta=500.0)
    assert all(torch.equal(a, b[:97]) for a, b in zip(short, long, strict=True))
    assert rope_tables(0, 2)[0].shape == (0, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n": -1, "dim": 4}, "n is -1 and must be at least 0"),
        ({"n": 4, "dim": 5}, "dim is 5 and must be a positive even number"),
        ({"n": 4, "dim": 0}, "dim is 0 and must be a positive even number"),
        ({"n": 4, "dim": 4, "theta": 0.0}, "theta is 0.0 and must be positive and finite"),
        ({"n": 4, "dim": 4, "theta": math.nan}, "theta is nan and must be positive and finite"),
    ],
)
def test_rope_tables_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"rope_tables: {message}"):
        rope_tables(**arguments)


SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "yarn, betas": {
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 512, "beta_fast": 20.0,
        "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False,
    },
    "yarn, factor": {
        "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 512, "attention_factor": 1.7,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}  # fmt: skip


@pytest.mark.parametrize("dim", [32, 80, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_scaled_frequencies_are_those_of_transformers(scaling: dict[str, Any], theta: float, dim: int) -> None:
    """Theirs are computed in float32, ours rounded to it."""
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
    rope = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = transformers.LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=1024,
        rope_parameters={**scaling, "rope_theta": theta},
    )  # fmt: skip
    rotary = rope.LlamaRotaryEmbedding(config)
    length = 3000
    table, _ = rotary(torch.zeros(1), torch.tensor([[length - 1]]))  # lets dynamic scaling see the length
    given = {**scaling, "max_position_embeddings": 1024, "rope_theta": theta}
    cos, sin = rope_tables(length, dim, theta=1.0, scaling=given)
    frequency = torch.atan2(sin[1].double(), cos[1].double())  # below pi, so nothing is lost
    torch.testing.assert_close(frequency, rotary.inv_freq.double(), rtol=2e-6, atol=1e-9)
    assert rope_attention_factor(given) == pytest.approx(rotary.attention_scaling, rel=1e-12)
    expected = table[0, 0, : dim // 2] / rotary.attention_scaling
    torch.testing.assert_close(cos[-1], expected, rtol=0, atol=2e-3)  # their angles are rounded to float32


def test_scaling_formulas() -> None:
    plain = rope_tables(100, 16)
    stretched = rope_tables(400, 16, scaling=SCALINGS["linear"])
    for ours, theirs in zip(stretched, plain, strict=True):
        torch.testing.assert_close(ours[::4], theirs, rtol=0, atol=1e-6)
    same = {**SCALINGS["dynamic"], "max_position_embeddings": 100}
    assert all(torch.equal(a, b) for a, b in zip(rope_tables(100, 16, scaling=same), plain, strict=True))
    scaled, unscaled = rope_tables(2, 64, scaling=SCALINGS["llama3"])[1][1], rope_tables(2, 64)[1][1]
    assert scaled[0] == unscaled[0] and scaled[-1].item() == pytest.approx(unscaled[-1].item() / 8, rel=1e-6)
    assert rope_attention_factor(None) == rope_attention_factor(SCALINGS["llama3"]) == 1.0
    assert rope_attention_factor(SCALINGS["yarn"]) == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    "scaling, message",
    [
        ({"rope_type": "longrope"}, "scaling's rope_type is 'longrope' and must be one of default, linear"),
        ({"rope_type": "linear"}, "scaling has no factor, which linear needs"),
        ({"rope_type": "linear", "factor": 0.0}, "scaling's factor is 0.0 and must be positive and finite"),
        ({"rope_type": "yarn", "factor": 2.0}, "scaling has no original_max_position_embeddings, which yarn needs"),
        ({"rope_theta": -1.0}, "scaling's theta is -1.0 and must be positive and finite"),
    ],
)
def test_scaling_errors(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"rope_tables: {message}"):
        rope_tables(4, 8, scaling=scaling)


def test_clipped_bias() -> None:
    weight = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    bias = clipped_bias(weight, 9)
    assert torch.equal(bias, weight[[0, 1, 2, 3, 4, 4, 4, 4, 4]].t()) and bias.is_contiguous()
    assert torch.equal(clipped_bias(weight, 3), weight[:3].t())
    assert torch.autograd.gradcheck(lambda w: clipped_bias(w, 9), weight)
    with pytest.raises(ValueError, match=r"clipped_bias: weight has shape \[0, 2\] and must be"):
        clipped_bias(torch.zeros(0, 2), 3)
    with pytest.raises(ValueError, match="clipped_bias: n is 0 and must be at least 1"):
        clipped_bias(weight, 0)


def test_rope_alibi_harmonic() -> None:
    (cos, sin), bias = rope_alibi_harmonic(2000, 16, 3)
    assert all(torch.equal(a, b) for a, b in zip((cos, sin), rope_tables(2000, 16), strict=True))
    assert bias.shape == (3, 2000) and bias.dtype == torch.float32
    slopes = alibi_slopes(3).tolist()
    for h in range(3):
        for d in (0, 1, 2, 17, 1999):
            assert bias[h, d].item() == pytest.approx(-slopes[h] * sum(1 / m for m in range(1, d + 1)), rel=1e-6)
    assert rope_alibi_harmonic(1, 4, 2)[1].tolist() == [[0.0], [0.0]]
    with pytest.raises(ValueError, match="rope_alibi_harmonic: n is 0 and must be at least 1"):
        rope_alibi_harmonic(0, 4, 2)


def test_alibi_slopes_formula() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert alibi_slopes(12).tolist()[:8] == alibi_slopes(8).tolist()
    assert alibi_slopes(12).tolist()[8:] == alibi_slopes(16).tolist()[0:8:2]
    assert alibi_slopes(5).dtype == torch.float32
    with pytest.raises(ValueError, match="alibi_slopes: heads is 0 and must be at least 1"):
        alibi_slopes(0)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20, 64, 71])
def test_alibi_slopes_are_those_of_bloom(heads: int) -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom", reason="transformers is not installed")
    mask = torch.ones(1, 2)
    expected = bloom.build_alibi_tensor(mask, heads, torch.float32)[:, 0, 1]
    # There a base rounded to float32 is raised to powers up to `heads`, and its error with it.
    torch.testing.assert_close(alibi_slopes(heads), expected, rtol=heads * 2.0**-23, atol=0)


def test_t5_bias_formula() -> None:
    """The first half of the buckets exactly, and the borders of the others where the logarithm puts them."""
    weight = torch.arange(8.0)[:, None] + torch.tensor([0.0, 100.0])
    bias = t5_bias(weight, 70, max_distance=64)
    assert bias.shape == (2, 70) and bias.is_contiguous()
    assert torch.equal(bias[1], bias[0] + 100)
    assert bias[0, :4].tolist() == [0, 1, 2, 3]
    for d in range(4, 70):
        assert bias[0, d] == min(7, 4 + int(math.log(d / 4) / math.log(64 / 4) * 4 + 1e-6)), d


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 100), (33, 257), (2, 10)])
def test_t5_buckets_are_those_of_transformers(buckets: int, max_distance: int) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="transformers is not installed")
    weight = torch.randn(buckets, 3)
    distance = torch.arange(2000)
    expected = weight[
        t5.T5Attention._relative_position_bucket(-distance, False, buckets, max_distance)  # key minus query
    ]
    assert torch.equal(t5_bias(weight, 2000, max_distance=max_distance), expected.t())


def test_t5_bias_is_differentiable() -> None:
    weight = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: t5_bias(w, 40, max_distance=20), weight)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(8), 4, 128), r"weight has shape \[8\] and must be \[buckets >= 2, heads\]"),
        ((torch.zeros(1, 8), 4, 128), r"weight has shape \[1, 8\] and must be"),
        ((torch.zeros(8, 2), 0, 128), "n is 0 and must be at least 1"),
        ((torch.zeros(32, 2), 4, 16), "max_distance is 16 and must be more than half of 32 buckets"),
    ],
)
def test_t5_bias_errors(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"t5_bias: {message}"):
        t5_bias(arguments[0], arguments[1], max_distance=arguments[2])
