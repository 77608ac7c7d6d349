# SPDX-License-Identifier: Apache-2.0
# The types of the pybind11 module (csrc/python). Arrays are NumPy arrays or DLPack tensors.
from collections.abc import Sequence
from typing import Any

def cpu_isa() -> str: ...
def set_cpu_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...
def build_info() -> dict[str, object]: ...
def quantize_cdf(
    values: Any, *, logits: bool = False, precision: int | None = 16, out: Any = None, threads: int | None = None
) -> Any: ...
def ac_encode(
    symbols: Any, cdf: Any, *, model_id: int | None = None, lanes: int = 1, threads: int | None = None
) -> tuple[Any, Any]: ...
def ac_decode(
    data: Any, offsets: Any, cdf: Any, *, model_id: int | None = None, out: Any = None, threads: int | None = None
) -> Any: ...
def ac_encode_logits(
    symbols: Any, logits: Any, *, precision: int | None = 16, model_id: int | None = None, threads: int | None = None
) -> tuple[Any, Any]: ...
def ac_decode_logits(
    data: Any,
    offsets: Any,
    logits: Any,
    *,
    precision: int | None = 16,
    model_id: int | None = None,
    out: Any = None,
    threads: int | None = None,
) -> Any: ...
def ac_encode_bytes(data: Any, *, order: int = 0, threads: int | None = None) -> tuple[Any, Any]: ...
def ac_decode_bytes(data: Any, offsets: Any, *, out: Any = None, threads: int | None = None) -> Any: ...
def torchac_encode(cdf: Any, sym: Any) -> Any: ...
def torchac_decode(cdf: Any, byte_stream: Any, *, out: Any = None) -> Any: ...
def window_counts(probs: Any, *, threads: int | None = None) -> tuple[Any, Any]: ...
def window_encode(
    cumulative: Any, rows: Any, start: Any, size: Any, symbols: Any, *, bits: int, threads: int | None = None
) -> tuple[Any, Any, Any]: ...
def window_decode(
    cumulative: Any, rows: Any, start: Any, size: Any, tokens: Any, *, bits: int, threads: int | None = None
) -> tuple[Any, Any, Any]: ...
def pack_equal_info(strings: Sequence[bytes]) -> bytes: ...

class EqualInfoTrie:
    def __init__(self, file: bytes) -> None: ...
    def encode(self, data: bytes, *, fewest: bool = False) -> Any: ...
    def decode(self, tokens: Any) -> bytes: ...
    def strings(self) -> list[bytes]: ...
    @property
    def bits(self) -> int: ...
    @property
    def trie_bytes(self) -> int: ...

class BitstreamError(ValueError): ...

class ArithmeticEncoder:
    def __init__(self, *, model_id: int | None = None) -> None: ...
    def encode(self, symbols: Any, cdf: Any) -> ArithmeticEncoder: ...
    def finish(self) -> bytes: ...
    @property
    def position(self) -> int: ...
    def __len__(self) -> int: ...

class ArithmeticDecoder:
    def __init__(self, data: bytes, *, model_id: int | None = None) -> None: ...
    @property
    def position(self) -> int: ...
    @property
    def remaining(self) -> int: ...
    def decode(self, cdf: Any, count: int | None = None) -> Any: ...
    def finish(self) -> None: ...
    def __len__(self) -> int: ...

def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    rope_cos: Any = None,
    rope_sin: Any = None,
    distance_bias: Any = None,
    alibi_slopes: Any = None,
    symmetric_bias: bool = False,
    sink_logits: Any = None,
    key_starts: Any = None,
    key_lengths: Any = None,
    key_offset: Any = None,
    query_lengths: Any = None,
    schedule: str = "causal",
    schedule_args: Sequence[int] = [],
    schedule_tensor: Any = None,
    interleaved: bool = False,
    distance_limit: int | None = None,
    key_ring: int = 0,
    key_layout: str = "rows",
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Any = None,
    block_bias: Any = None,
    out: Any = None,
    lse: Any = None,
    lse_low: Any = None,
    threads: int | None = None,
    stream: int = 0,
) -> tuple[Any, Any]: ...
def attention_append(
    query: Any,
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    lengths: Any,
    *,
    starts: Any = None,
    sink_size: int = 0,
    most: int = -1,
    rope_cos: Any = None,
    rope_sin: Any = None,
    distance_bias: Any = None,
    alibi_slopes: Any = None,
    symmetric_bias: bool = False,
    sink_logits: Any = None,
    query_lengths: Any = None,
    schedule: str = "causal",
    schedule_args: Sequence[int] = [],
    schedule_tensor: Any = None,
    interleaved: bool = False,
    distance_limit: int | None = None,
    key_ring: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Any = None,
    block_bias: Any = None,
    out: Any = None,
    lse: Any = None,
    threads: int | None = None,
) -> tuple[Any, Any]: ...
def attention_backward(
    grad_out: Any,
    grad_lse: Any,
    out: Any,
    lse: Any,
    query: Any,
    key: Any,
    value: Any,
    *,
    rope_cos: Any = None,
    rope_sin: Any = None,
    distance_bias: Any = None,
    alibi_slopes: Any = None,
    symmetric_bias: bool = False,
    sink_logits: Any = None,
    key_starts: Any = None,
    key_lengths: Any = None,
    key_offset: Any = None,
    query_lengths: Any = None,
    schedule: str = "causal",
    schedule_args: Sequence[int] = [],
    schedule_tensor: Any = None,
    interleaved: bool = False,
    distance_limit: int | None = None,
    key_ring: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Any = None,
    block_bias: Any = None,
    lse_low: Any = None,
    grad_query: Any = None,
    grad_key: Any = None,
    grad_value: Any = None,
    grad_bias: Any = None,
    grad_sink_logits: Any = None,
    grad_alibi_slopes: Any = None,
    grad_numbers: Any = None,
    threads: int | None = None,
    stream: int = 0,
) -> tuple[Any, Any, Any, Any, Any]: ...
def attention_blocks(
    *,
    seed: Any,
    round: Any,
    batch: int,
    heads: int,
    query_length: int,
    key_length: int,
    block_size: int = 64,
    distance_probs: Any = None,
    family: str = "table",
    parameter: float = 0.0,
    pattern: str = "independent",
    correction: str = "none",
    sink_size: int = 0,
    window_blocks: int = 1,
    blocks_per_row: int | None = None,
    key_starts: Any = None,
    key_lengths: Any = None,
    key_offset: Any = None,
    query_lengths: Any = None,
    wide: bool = False,
    threads: int | None = None,
) -> tuple[Any, Any]: ...
def lambda_cache_append(
    key_cache: Any,
    value_cache: Any,
    lengths: Any,
    key: Any,
    value: Any,
    starts: Any = None,
    *,
    sink_size: int,
    most: int = -1,
    threads: int | None = None,
    stream: int = 0,
) -> None: ...
def invariant_linear(x: Any, weight: Any, bias: Any = None, *, out: Any = None, threads: int | None = None) -> Any: ...
def invariant_linears(
    x: Any, weights: Sequence[Any], biases: Sequence[Any] | None = None, *, out: Any = None, threads: int | None = None
) -> Any: ...
def invariant_linear_backward(
    grad_out: Any,
    x: Any,
    weight: Any,
    *,
    need_x: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    grad_x: Any = None,
    grad_weight: Any = None,
    grad_bias: Any = None,
    threads: int | None = None,
) -> tuple[Any, Any, Any]: ...
def pairwise_logsumexp(
    x: Any,
    y: Any,
    y_bias: Any = None,
    target: Any = None,
    *,
    euclidean: bool = False,
    scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -1,
    need_sum: bool = False,
    threads: int | None = None,
) -> tuple[Any, Any, Any]: ...
def pairwise_logsumexp_gradients(
    x: Any,
    y: Any,
    y_bias: Any,
    target: Any,
    weights: Any,
    *,
    euclidean: bool = False,
    scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -1,
    threads: int | None = None,
) -> tuple[Any, Any, Any, Any, Any, Any]: ...
def pairwise_logsumexp_both(
    x: Any, y: Any, target: Any = None, *, scale: float = 1.0, threads: int | None = None
) -> tuple[Any, Any, Any]: ...
def pairwise_logsumexp_both_backward(
    x: Any,
    y: Any,
    target: Any,
    weights: Any,
    column_weights: Any,
    column_lse: Any,
    *,
    scale: float = 1.0,
    threads: int | None = None,
) -> tuple[Any, Any]: ...
def pairwise_topk(
    x: Any,
    y: Any,
    k: int,
    *,
    euclidean: bool = False,
    x_lengths: Any = None,
    y_lengths: Any = None,
    threads: int | None = None,
) -> tuple[Any, Any]: ...
def pairwise_distances_at(x: Any, y: Any, indices: Any, *, threads: int | None = None) -> Any: ...
def pairwise_pairs_backward(
    grad: Any, x: Any, y: Any, indices: Any, *, euclidean: bool = False, threads: int | None = None
) -> tuple[Any, Any]: ...
def hamming_topk(x: Any, y: Any, k: int, *, threads: int | None = None) -> tuple[Any, Any]: ...
def rms_norm(
    x: Any,
    weight: Any = None,
    eps: float = 1e-6,
    plus_one: bool = False,
    *,
    out: Any = None,
    threads: int | None = None,
) -> Any: ...
def rotary_tables(
    positions: Any,
    frequencies: Any,
    wide: bool = False,
    *,
    cos: Any = None,
    sin: Any = None,
    threads: int | None = None,
) -> tuple[Any, Any]: ...
def rotate(
    x: Any, cos: Any, sin: Any, inverse: bool = False, *, out: Any = None, threads: int | None = None
) -> Any: ...
def softcap(x: Any, cap: float, *, out: Any = None, threads: int | None = None) -> Any: ...
def softcap_backward(grad_out: Any, x: Any, cap: float, *, grad_x: Any = None, threads: int | None = None) -> Any: ...
def rms_norm_backward(
    grad_out: Any,
    x: Any,
    weight: Any = None,
    eps: float = 1e-6,
    plus_one: bool = False,
    *,
    need_x: bool = True,
    need_weight: bool = True,
    grad_x: Any = None,
    grad_weight: Any = None,
    threads: int | None = None,
) -> tuple[Any, Any]: ...
def ngram_update(keys: Any, successors: Any, scores: Any, trigrams: Any, weights: Any) -> Any: ...
def ngram_lookup(keys: Any, successors: Any, scores: Any, contexts: Any) -> tuple[Any, Any]: ...
def ngram_draft(
    keys: Any, successors: Any, scores: Any, first: int, second: int, *, nodes: int = 64, depth: int = 8
) -> tuple[Any, Any]: ...
def staircase_quantize(
    x: Any,
    *,
    bits: int,
    group_size: int,
    dim: int,
    grid: str = "embedded",
    codes: Any = None,
    lo: Any = None,
    hi: Any = None,
    centers: Any = None,
    threads: int | None = None,
) -> tuple[Any, Any, Any, Any]: ...
def staircase_dequantize(
    codes: Any,
    lo: Any,
    hi: Any,
    centers: Any = None,
    *,
    bits: int,
    group_size: int,
    dim: int,
    grid: str = "embedded",
    out: Any = None,
    threads: int | None = None,
) -> Any: ...
def staircase_attention(
    query: Any,
    key_storage: Sequence[Any],
    value_storage: Sequence[Any],
    ends: Any,
    *,
    distance_bias: Any = None,
    sink_logits: Any = None,
    key_bits: Sequence[int],
    value_bits: Sequence[int],
    sink_size: int,
    step: int,
    group_size: int = 64,
    grid: str = "embedded",
    schedule: str = "causal",
    schedule_args: Sequence[int] = ...,
    scale: float | None = None,
    softcap: float = 0.0,
    out: Any = None,
    threads: int | None = None,
) -> tuple[Any, Any]: ...
def staircase_cache_append(
    key_storage: Sequence[Any],
    value_storage: Sequence[Any],
    lengths: Any,
    key: Any,
    value: Any,
    starts: Any = None,
    *,
    key_bits: Sequence[int],
    value_bits: Sequence[int],
    sink_size: int,
    step: int,
    group_size: int,
    grid: str = "embedded",
    threads: int | None = None,
) -> None: ...
def staircase_cache_read(
    storage: Sequence[Any],
    positions: Any,
    ends: Any,
    *,
    bits: Sequence[int],
    by_token: bool,
    sink_size: int,
    step: int,
    group_size: int,
    grid: str = "embedded",
    tokens: int,
    wide: bool = False,
    out: Any = None,
    threads: int | None = None,
) -> Any: ...
def vq_encode(
    x: Any, codebook: Any, *, metric: str = "euclidean", topk: int = 1, out: Any = None, threads: int | None = None
) -> Any: ...
def rvq_encode(
    x: Any,
    codebooks: Any,
    *,
    sizes: list[int] | None = None,
    num_quantizers: int | None = None,
    metric: str = "euclidean",
    beam_size: int = 1,
    channel_masks: Any = None,
    out: Any = None,
    threads: int | None = None,
) -> Any: ...
def rvq_decode(
    codes: Any, codebooks: Any, *, sizes: list[int] | None = None, out: Any = None, threads: int | None = None
) -> Any: ...
def vq_statistics(
    x: Any, codes: Any, codebook_size: int, *, counts: Any = None, sums: Any = None, threads: int | None = None
) -> tuple[Any, Any]: ...
def vq_rotate(
    v: Any, x: Any, code: Any, *, transpose: bool = False, out: Any = None, threads: int | None = None
) -> Any: ...
def layer_norm(
    x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *, out: Any = None, threads: int | None = None
) -> Any: ...
def layer_norm_backward(
    grad_out: Any,
    x: Any,
    weight: Any = None,
    eps: float = 1e-5,
    *,
    need_x: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    grad_x: Any = None,
    grad_weight: Any = None,
    grad_bias: Any = None,
    threads: int | None = None,
) -> tuple[Any, Any, Any]: ...
def silu_mul(gate: Any, up: Any, *, out: Any = None, threads: int | None = None) -> Any: ...
def silu_mul_backward(
    grad_out: Any,
    gate: Any,
    up: Any,
    *,
    need_gate: bool = True,
    need_up: bool = True,
    grad_gate: Any = None,
    grad_up: Any = None,
    threads: int | None = None,
) -> tuple[Any, Any]: ...
def gelu_mul(gate: Any, up: Any, approximate: str = "none", *, out: Any = None, threads: int | None = None) -> Any: ...
def gelu_mul_backward(
    grad_out: Any,
    gate: Any,
    up: Any,
    approximate: str = "none",
    *,
    need_gate: bool = True,
    need_up: bool = True,
    grad_gate: Any = None,
    grad_up: Any = None,
    threads: int | None = None,
) -> tuple[Any, Any]: ...
