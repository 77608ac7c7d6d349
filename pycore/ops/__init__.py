# SPDX-License-Identifier: Apache-2.0
"""All ops, as functions. Each is also an op of `torch.ops.pycore`."""

from pycore.ops.arithmetic_coding import (
    ac_decode,
    ac_decode_bytes,
    ac_decode_logits,
    ac_encode,
    ac_encode_bytes,
    ac_encode_logits,
    quantize_cdf,
)
from pycore.ops.attention import attention, lambda_attention
from pycore.ops.attention_blocks import pr_block_mask
from pycore.ops.attention_probabilistic import pr_flash_attention
from pycore.ops.linear import gelu_mul, invariant_linear, invariant_linears, layer_norm, rms_norm, silu_mul
from pycore.ops.linear_pointwise import rotary_tables, rotate, softcap
from pycore.ops.ngram import ngram_draft, ngram_lookup, ngram_update
from pycore.ops.pairwise import pairwise_logsumexp, pairwise_min, pairwise_topk
from pycore.ops.pairwise_clusters import hamming_topk, kmeans, pack_bits, sinkhorn
from pycore.ops.pairwise_losses import contrastive_loss, linear_cross_entropy, maxsim
from pycore.ops.staircase import staircase_dequantize, staircase_quantize, staircase_rotation
from pycore.ops.staircase_attention import staircase_attention
from pycore.ops.vq import rvq_decode, rvq_encode, vq_encode, vq_rotate, vq_statistics

__all__ = [
    "ac_decode",
    "ac_decode_bytes",
    "ac_decode_logits",
    "ac_encode",
    "ac_encode_bytes",
    "ac_encode_logits",
    "attention",
    "gelu_mul",
    "contrastive_loss",
    "hamming_topk",
    "invariant_linear",
    "invariant_linears",
    "kmeans",
    "lambda_attention",
    "layer_norm",
    "linear_cross_entropy",
    "maxsim",
    "ngram_draft",
    "ngram_lookup",
    "ngram_update",
    "pack_bits",
    "pairwise_logsumexp",
    "pairwise_min",
    "pairwise_topk",
    "pr_block_mask",
    "pr_flash_attention",
    "quantize_cdf",
    "rms_norm",
    "rotary_tables",
    "rotate",
    "staircase_attention",
    "staircase_dequantize",
    "staircase_quantize",
    "staircase_rotation",
    "rvq_decode",
    "rvq_encode",
    "sinkhorn",
    "vq_encode",
    "vq_rotate",
    "vq_statistics",
    "silu_mul",
    "softcap",
]
