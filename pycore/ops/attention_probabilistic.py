# SPDX-License-Identifier: Apache-2.0
"""`pr_flash_attention`: attention over the blocks that a round draws."""

from __future__ import annotations

from torch import Tensor

from pycore.ops.attention_call import AttentionOptions, call_attention
from pycore.schedules import DistanceFamily, Probabilistic

__all__ = ["pr_flash_attention"]


def pr_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    distance_probs: DistanceFamily | Tensor,
    seed: int | Tensor,
    round: int | Tensor = 0,
    block_size: int = 64,
    sink_size: int = 0,
    window_blocks: int = 1,
    pattern: str = "independent",
    correction: str = "none",
    blocks_per_row: int | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    distance_limit: int | None = None,
    distance_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    scale: float | Tensor | None = None,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_offset: Tensor | None = None,
    query_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Probabilistic FlashAttention: a distribution over block distances decides which key blocks a round reads.

    Query block I = p // block_size and key block J = j // block_size, D = I - J, take part when 24 random bits of
    (seed, round, head, I, J) are below ceil(distance_probs(D) * 2**24). keep(i, j) = d >= 0 and (block (I, J) takes
    part or j < sink_size). A block that takes no part is never read, and time follows the density (`expected_density`).
    Only the paper's abstract is known; this is our reading of it, written down in docs/ops/attention.md.

    Blocks do not depend on the batch slot, the chunking, the number of threads or the instruction set; the backward
    pass uses those of the forward pass. Their bitmap takes a bit for block_size ** 2 pairs.

    Args:
        distance_probs: `Geometric`, `PowerLaw`, `Harmonic`, `Gaussian` or `Constant` of pycore.schedules, or a tensor
            [n] or [H, n] of probabilities by D, the last holding beyond n. It has no gradient.
        seed: an int, or int64 [B] for a seed of its own for each row, at least 0.
        round: an int, or an int64 tensor of no dimensions (under torch.compile, so that rounds need no new graph),
            from 0 to 2**32 - 1. Every round has blocks of its own.
        block_size: a power of two, at least 16.
        sink_size: tokens at the start that every query keeps, at least 0. Use at least one: without, the method fails.
        window_blocks: blocks D < window_blocks always take part; 1 is the query's own block.
        pattern: "independent": a decision for each block; "diagonal": one for each distance.
        correction: "none", or "importance": drawn blocks' logits grow by -log p (those of sinks and window blocks do
            not), which makes the softmax's numerator and denominator unbiased over rounds. Not with blocks_per_row.
        blocks_per_row: exactly so many blocks a row, or all where it has fewer, window blocks counted in; the others
            drawn without replacement (Gumbel top-k). At least window_blocks.

    The other arguments, the return value and the other errors are those of `attention`.

    Raises:
        ValueError: a probability outside [0, 1] or NaN, a negative seed or round, a block size that is no power of two
            or less than 16, window_blocks < 0, sink_size < 0, importance with blocks_per_row, ...
        TypeError: distance_probs that is neither a tensor nor a family.

    Source: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI"
        (arXiv 2410.18441), abstract.
    """
    schedule = Probabilistic(
        distance_probs, seed, round, block_size, sink_size, window_blocks, pattern, correction, blocks_per_row
    )
    options = AttentionOptions(
        rope, interleaved, distance_limit, distance_bias, alibi_slopes, False, sink_logits, softcap, dropout_p, scale,
        key_starts, key_lengths, key_offset, query_lengths, return_lse,
    )  # fmt: skip
    return call_attention("pr_flash_attention", query, key, value, schedule, options)
