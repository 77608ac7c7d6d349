# SPDX-License-Identifier: Apache-2.0
"""Tables and biases by which attention learns where a key stands."""

from __future__ import annotations

import decimal
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_int, check_number
from pycore._load import load_ops
from pycore._tensors import check_tensor

__all__ = ["alibi_slopes", "clipped_bias", "rope_alibi_harmonic", "rope_attention_factor", "rope_tables", "t5_bias"]


def rope_tables(
    n: int,
    dim: int,
    *,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary tables: row d holds the cosines and sines of d times each pair's frequency, theta^(-2i/dim), i < dim/2.

    Attention rotates by distance, relative to a tile of keys, so the table has to reach the largest distance that
    is not cut off by ``distance_limit`` plus one tile of 64, however long the text is.

    The frequencies are computed in float64 and rounded to float32, as checkpoints of RoPE models expect. The angles
    are exact products of these, so a far row is as accurate as a near one, and a longer table begins with the
    shorter one. A table has the same bits on every machine: powers and logarithms are decimal arithmetic, cosines and
    sines those of `pycore.ops.rotary_tables`.

    Args:
        n: rows, at least 0.
        dim: rotated channels of a head, even.
        theta: base of the frequencies.
        scaling: how a checkpoint's frequencies were stretched for longer texts, as its configuration in transformers
            has it (``rope_scaling``, ``rope_parameters``). By ``rope_type``: ``default``; ``linear`` (factor);
            ``dynamic``, NTK-aware scaling for texts of one length (factor, max_position_embeddings, length, n by
            default); ``yarn`` (factor, original_max_position_embeddings, beta_fast, beta_slow, truncate; see also
            :func:`rope_attention_factor`); ``llama3`` (factor, low_freq_factor, high_freq_factor,
            original_max_position_embeddings). An entry rope_theta goes before ``theta``.
        device: where the tables are put.

    Returns:
        ``(cos, sin)``, float32 ``[n, dim / 2]``, for pairs ``(i, i + dim / 2)`` or, interleaved, ``(2i, 2i + 1)``.

    Raises:
        ValueError: n is negative, dim is odd or not positive, theta is not positive and finite, or scaling is of a
            type not named above, lacks an entry, or has one that is not positive and finite.

    Source: Su et al., RoFormer (arXiv 2104.09864); Peng et al., YaRN (arXiv 2309.00071), section 3, also for linear and
    NTK-aware scaling; Llama 3.1's model code for ``llama3``.
    """
    check_int("rope_tables", "n", n, 0)
    check_int("rope_tables", "dim", dim)
    if dim <= 0 or dim % 2 != 0:
        raise ValueError(f"rope_tables: dim is {dim} and must be a positive even number")
    load_ops()
    cos, sin = torch.ops.pycore.rotary_tables(torch.arange(n), rope_frequencies(n, dim, theta, scaling or {}))
    return cos.to(device), sin.to(device)


def rope_attention_factor(scaling: Mapping[str, Any] | None) -> float:
    """What YaRN multiplies query and key by, each; 1.0 for the other types of :func:`rope_tables`.

    The tables rotate and do not scale, because a distance limit leaves keys un-rotated: pass
    ``scale=head_dim**-0.5 * rope_attention_factor(scaling)**2`` to the attention ops.

    Args:
        scaling: as in :func:`rope_tables`; entries attention_factor, or factor, mscale and mscale_all_dim.

    Raises:
        ValueError: an entry is missing, or not positive and finite.

    Source: Peng et al., YaRN, section 3.4.
    """
    scaling = scaling or {}
    if _rope_type(scaling) != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return _entry(scaling, "attention_factor")
    factor = _entry(scaling, "factor")

    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * _log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return grown(_entry(scaling, "mscale")) / grown(_entry(scaling, "mscale_all_dim"))
    return grown(1.0)


def _rope_type(scaling: Mapping[str, Any]) -> str:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    known = ("default", "linear", "dynamic", "yarn", "llama3")
    if kind not in known:
        raise ValueError(f"rope_tables: scaling's rope_type is {kind!r} and must be one of {', '.join(known)}")
    return str(kind)


def _entry(scaling: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = scaling.get(name)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"rope_tables: scaling has no {name}, which {_rope_type(scaling)} needs")
    label = ("scaling's " if name in scaling else "") + name.removeprefix("rope_")
    number: float = check_number("rope_tables", label, value)
    if not 0.0 < number < float("inf"):
        raise ValueError(f"rope_tables: {label} is {value} and must be positive and finite")
    return number


_DIGITS = decimal.Context(prec=40)


def _power(base: float, exponent: decimal.Decimal) -> float:
    return float(_DIGITS.power(decimal.Decimal(base), exponent))


def _log(x: float) -> float:
    return float(_DIGITS.ln(decimal.Decimal(x)))


@functools.lru_cache(maxsize=64)
def _powers(theta: float, dim: int) -> Tensor:
    """theta^(-2i/dim), float64 [dim / 2], correctly rounded: the C library's powers differ from machine to machine."""
    two = decimal.Decimal(-2)
    return torch.tensor([_power(theta, _DIGITS.divide(two * i, decimal.Decimal(dim))) for i in range(dim // 2)],
                        dtype=torch.float64)  # fmt: skip


def rope_frequencies(n: int, dim: int, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """Radians a token by pair, float64 [dim / 2] of float32 numbers; the arguments are those of `rope_tables`."""
    theta = _entry(scaling, "rope_theta", theta)
    if not 0.0 < theta < float("inf"):
        raise ValueError(f"rope_tables: theta is {theta} and must be positive and finite")
    return _frequencies(n, dim, theta, scaling).to(torch.float32).to(torch.float64)


def _frequencies(n: int, dim: int, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """Radians a token by pair, float64 [dim / 2]."""
    kind = _rope_type(scaling)
    if kind == "dynamic":
        most, factor = _entry(scaling, "max_position_embeddings"), _entry(scaling, "factor")
        length = max(_entry(scaling, "length", max(n, 1)), most)
        grown = factor * length / most - (factor - 1)
        theta *= _power(grown, _DIGITS.divide(decimal.Decimal(dim), decimal.Decimal(dim - 2))) if dim > 2 else 1.0
    pair = torch.arange(dim // 2, dtype=torch.float64)
    frequency = _powers(theta, dim)
    if kind in ("default", "dynamic"):
        return frequency
    factor = _entry(scaling, "factor")
    if kind == "linear":
        return frequency / factor
    trained = _entry(scaling, "original_max_position_embeddings")
    if kind == "llama3":
        # Pairs that turn often in the trained length stay, those that hardly turn are stretched, between them a blend.
        low, high = _entry(scaling, "low_freq_factor"), _entry(scaling, "high_freq_factor")
        turns = trained * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        # The same idea, the blend linear in the number of the pair.
        def pair_that_turns(times: float) -> float:
            return dim * _log(trained / (times * 2 * math.pi)) / (2 * _log(theta))

        first = pair_that_turns(_entry(scaling, "beta_fast", 32.0))
        last = pair_that_turns(_entry(scaling, "beta_slow", 1.0))
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        kept = 1 - ((pair - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    return frequency * kept + frequency / factor * (1 - kept)


def alibi_slopes(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """The slopes of ALiBi: head h adds -slope[h] times the distance to its logits.

    For a power of two, 2^(-8/heads), its square, its cube, ...; for other numbers those of the power of two below,
    then every second one of the power of two above, as checkpoints of ALiBi models expect.

    Args:
        heads: at least 1.
        device: where the slopes are put.

    Returns:
        float32 ``[heads]``, the ``alibi_slopes`` of the attention ops.

    Raises:
        ValueError: heads is less than 1.

    Source: Press et al., "Train Short, Test Long" (arXiv 2108.12409), section 3.
    """
    check_int("alibi_slopes", "heads", heads, 1)
    below = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / below) for h in range(below)]
    slopes += [2 ** (-8 * (2 * h + 1) / (2 * below)) for h in range(heads - below)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def t5_bias(weight: Tensor, n: int, *, max_distance: int = 128) -> Tensor:
    """The relative position bias of T5's decoder as a table by distance.

    Half of the buckets hold one distance each; the other half grow logarithmically up to ``max_distance``, from where
    on every distance is in the last one. So ``n = max_distance + 1`` rows serve any length.

    Args:
        weight: ``[buckets, heads]``, as in T5's ``relative_attention_bias.weight``; float32 or float64.
        n: distances, at least 1.
        max_distance: first distance of the last bucket, more than half the number of buckets.

    Returns:
        ``[heads, n]`` in weight's dtype, the ``distance_bias`` of the attention ops. Differentiable in weight. T5 does
        not scale its scores: pass ``scale=1.0`` for its checkpoints.

    Raises:
        ValueError: weight is no matrix with at least 2 buckets, n is less than 1, or max_distance too small.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning" (arXiv 1910.10683), section 2.1.
    """
    check_tensor("t5_bias", "weight", weight)
    if weight.dim() != 2 or weight.shape[0] < 2:
        raise ValueError(f"t5_bias: weight has shape {list(weight.shape)} and must be [buckets >= 2, heads]")
    check_int("t5_bias", "n", n, 1)
    check_int("t5_bias", "max_distance", max_distance)
    buckets = weight.shape[0]
    exact = buckets // 2
    if max_distance <= exact:
        raise ValueError(f"t5_bias: max_distance is {max_distance} and must be more than half of {buckets} buckets")
    distance = torch.arange(n, device=weight.device)
    # In float32, in this order: the border of a bucket lies where the checkpoints' own code puts it.
    grown = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    bucket = torch.where(distance < exact, distance, (exact + grown.clamp(min=0).long()).clamp(max=buckets - 1))
    return weight[bucket].t().contiguous()


def clipped_bias(weight: Tensor, n: int) -> Tensor:
    """A learned bias for each distance up to a limit, beyond which all share the last one, as a table by distance.

    Args:
        weight: ``[clip + 1, heads]``, the bias of distances 0 .. clip; float32 or float64.
        n: distances, at least 1. The attention ops clip at the end of a table by themselves, so ``n = clip + 1`` serves
            any length.

    Returns:
        ``[heads, n]`` in weight's dtype, the ``distance_bias`` of the attention ops. Differentiable in weight.

    Raises:
        ValueError: weight is no matrix with a row, or n is less than 1.

    Source: Shaw et al., "Self-Attention with Relative Position Representations" (arXiv 1803.02155), section 3.2: the
    clipping, here of a bias and not of a vector.
    """
    check_tensor("clipped_bias", "weight", weight)
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise ValueError(f"clipped_bias: weight has shape {list(weight.shape)} and must be [clip + 1 >= 1, heads]")
    check_int("clipped_bias", "n", n, 1)
    distance = torch.arange(n, device=weight.device).clamp(max=weight.shape[0] - 1)
    return weight[distance].t().contiguous()


def rope_alibi_harmonic(
    n: int, dim: int, heads: int, *, theta: float = 10000.0, device: torch.device | str | None = None
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """RoPE, and ALiBi whose penalty grows as a harmonic series: a step from distance d - 1 to d costs slope / d.

    A pair at distance d is rotated as by :func:`rope_tables`, and head h adds ``-slope[h] * (1 + 1/2 + ... + 1/d)`` to
    its logit, with the slopes of :func:`alibi_slopes`. Near tokens are told apart as by ALiBi, far ones pay only
    logarithmically more, so that the softmax weights fall by a power of the distance, d^-slope, and not exponentially.

    This is our reading. The paper names "a factored combination of rotary positional encoding and attention with
    linear biases with a harmonic series"; of its formula only that sentence is known to us.

    Args:
        n: rows of the tables, see :func:`rope_tables`; distances beyond are penalised as n - 1.
        dim: rotated channels of a head, even.
        heads: at least 1.
        theta: base of the frequencies.
        device: where the tables are put.

    Returns:
        ``(rope, distance_bias)`` for the attention ops: float32 ``[n, dim / 2]`` twice, and ``[heads, n]``.

    Raises:
        ValueError: n is less than 1, or one of the errors of rope_tables and alibi_slopes.

    Source: after Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI"
    (arXiv 2410.18441), abstract.
    """
    check_int("rope_alibi_harmonic", "n", n, 1)
    harmonic = torch.cat([torch.zeros(1, dtype=torch.float64), (1 / torch.arange(1, n, dtype=torch.float64)).cumsum(0)])
    bias = -alibi_slopes(heads).double()[:, None] * harmonic
    return rope_tables(n, dim, theta=theta, device=device), bias.to(device, torch.float32)
