// SPDX-License-Identifier: Apache-2.0
// Attention over any schedule: softmax(scale * q k^T, on the kept pairs) v, with rotary embedding applied inside.
//
// Positions. Of batch row b the keys are rows key_starts[b] <= r < key_lengths[b]. Key r has position
// j = r - key_starts[b], plus key_offset[b] (tokens evicted) for rows past the sinks. Query row i < query_lengths[b]
// has position p = (key_lengths - key_starts + key_offset)[b] - query_lengths[b] + i: bottom-right alignment.
// A row that keeps no key gives zeros and lse = -inf.
//
// A ring (key_ring > 0, a multiple of the key tile): what an evicting cache keeps in place. The last key_ring rows hold
// position j in row j % key_ring of them, the rows before them each their own position, the sinks among them;
// key_lengths counts all tokens seen. A tile of positions is still a run of rows.
//
// Keys by channel (key_channel_stride > 0, CPU): key is [batch, kv_heads, tiles, head_dim, 64], row r being column r %
// 64 of tile r / 64: what the tile product wants to read, so that a step of decoding transposes nothing. Tiles of rows
// are then tiles of positions: there are no key_starts and no key_offset, and a ring begins at a whole tile. The bits
// are those of the same keys in rows. Columns of rows that are not there may be read, though never used.
//
// Rotary embedding. The pair (x, y) of a query at distance d from a key is rotated by d' = min(d, distance_limit),
// relative to the key tile: for d <= limit the query is rotated by p - base and the key by j - base, with base the
// tile's first position; beyond the limit the query is rotated by `limit` and the key not at all. So a table needs
// only the largest distance plus a tile.
//
// Distances. d is p - j, but a tree's node stands behind the context at its depth (TileSchedule::place): for rotations,
// biases and distance_limit d is place(p) - place(j), so that each branch is seen as a text of its own.
//
// A logit is softcap(scale <q, k>) + bias: softcap(s) = cap tanh(s / cap), and the bias either distance_bias[h][min(d',
// n-1)] or -alibi_slopes[h] d' (for keys after the query d' is 0, or with symmetric_bias min(-d, distance_limit)).
// sink_logits[h] joins the softmax and carries no value. Dropout multiplies weight (b, h, p, j) by 0 or 1 / (1 -
// dropout_p), after the softmax's sum is taken.
#pragma once

#include <pycore/attention/tile_schedule.h>
#include <pycore/cpu_isa.h>
#include <pycore/export.h>
#include <pycore/parallel.h>
#include <pycore/status.h>
#include <pycore/tensor_view.h>

#include <cstdint>

namespace pycore {

// Strides in elements of [batch, heads, length, channel]; the channel stride is 1.
struct AttentionStrides {
  int64_t batch = 0, head = 0, row = 0;
};

struct StaircasePlanes;

struct AttentionParams {
  CpuIsa isa = cpu_isa();         // of the whole call, asked once: scratch and kernel must agree
  DType dtype = DType::kFloat32;  // of query, key, value and out; everything is accumulated in float32 (or float64)
  int64_t batch = 0, heads = 0, kv_heads = 0;
  int64_t query_length = 0, key_length = 0;
  int64_t head_dim = 0, value_dim = 0;

  const void* query = nullptr;  // [batch, heads, query_length, head_dim]
  const void* key = nullptr;    // [batch, kv_heads, key_length, head_dim]
  const void* value = nullptr;  // [batch, kv_heads, key_length, value_dim]
  AttentionStrides query_strides, key_strides, value_strides;
  int64_t key_channel_stride = 0;  // not 0: keys by channel, and key_strides.row is from one tile to the next
  void* out = nullptr;             // [batch, heads, query_length, value_dim], contiguous
  void* lse = nullptr;  // [batch, heads, query_length], contiguous; float32 (float64 for float64), natural log
  // Like lse, or null: what rounding lse to its dtype left out. Where |lse| is large, weights recomputed from lse alone
  // are off by its rounding error, while the forward pass's own know only that of differences.
  void* lse_low = nullptr;

  TileSchedule schedule;
  const int64_t* prefix_lengths = nullptr;  // [batch]: schedule.prefix by batch row, for the prefix schedule
  // For the blocks schedule, schedule.blocks is [batch, heads, block_rows, block_words]; row_map binds a row and head.
  // For segments, key_subset and tree, schedule.boundaries, .keys and .tree are the first batch row's.
  int64_t bitmap_stride = 0;  // from one batch row's to the next; 0: one for all
  double scale = 1.0;

  const void* rope_cos = nullptr;  // [rope_rows, rope_dim / 2], row stride rope_stride; float32 (float64 for float64)
  const void* rope_sin = nullptr;
  int64_t rope_rows = 0, rope_dim = 0, rope_stride = 0;
  bool rope_interleaved = false;  // pairs (2i, 2i + 1) instead of (i, i + rope_dim / 2)
  int64_t distance_limit = kFar;

  // Tables: float32 (float64 for float64), null where there is none.
  const void* distance_bias = nullptr;  // [heads, bias_length], row stride bias_stride
  int64_t bias_length = 0, bias_stride = 0;
  const void* alibi_slopes = nullptr;  // [heads], or for each batch row its own
  int64_t slopes_stride = 0;           // from one batch row's to the next; 0: one for all
  bool symmetric_bias = false;         // keys after the query have the bias of those as far before it
  const void* sink_logits = nullptr;   // [heads]
  const void* block_bias = nullptr;    // [heads, block_bias_length] by block distance, row stride block_bias_stride
  int64_t block_bias_length = 0, block_bias_stride = 0;  // (0: one row for all heads); blocks schedule only
  double softcap = 0.0;                                  // 0: none
  double dropout_p = 0.0;                                // in [0, 1)
  const int64_t* dropout_seed = nullptr;                 // one number, read when dropout_p > 0

  const int64_t* key_starts = nullptr;     // [batch] or null: 0
  const int64_t* key_lengths = nullptr;    // [batch] or null: key_length
  const int64_t* key_offset = nullptr;     // [batch] or null: 0
  const int64_t* query_lengths = nullptr;  // [batch] or null: query_length
  int64_t key_ring = 0;                    // rows of the ring, 0: rows lie in order

  // Keys and values in a staircase cache, in place of key and value (staircase/attention.h); forward on the CPU alone.
  const StaircasePlanes* planes = nullptr;
};

struct AttentionBackwardParams {
  // out, lse and lse_low hold the forward pass's results. Without lse_low the CPU recomputes it, where lse is of these
  // keys alone, and CUDA goes without.
  AttentionParams forward;
  const void* grad_out = nullptr;  // [batch, heads, query_length, value_dim]
  AttentionStrides grad_out_strides;
  const void* grad_lse = nullptr;  // [batch, heads, query_length], contiguous, or null
  void* delta = nullptr;           // [batch, heads, query_length], scratch of lse's dtype
  // Contiguous, of the accumulation dtype (float32, or float64 for float64).
  void* grad_query = nullptr;        // [batch, heads, query_length, head_dim]
  void* grad_key = nullptr;          // [batch, kv_heads, key_length, head_dim]
  void* grad_value = nullptr;        // [batch, kv_heads, key_length, value_dim]
  void* grad_bias = nullptr;         // [heads, bias_length] or null: not wanted
  void* grad_sink_logits = nullptr;  // [heads] or null: not wanted
  void* grad_slopes = nullptr;       // [slope_rows, heads], of alibi_slopes, or null: not wanted
  int64_t slope_rows = 1;            // of alibi_slopes: 1, or batch
  double* grad_numbers = nullptr;    // [2], of scale and of softcap, or null: not wanted
};

// How the rows of one batch row map to positions, and what they keep.
struct RowMap {
  TileSchedule schedule;
  int64_t start = 0;    // first valid key row; of the ring, where there is one
  int64_t keys = 0;     // valid key rows
  int64_t sinks = 0;    // of which this many stand before the gap left by eviction
  int64_t offset = 0;   // evicted tokens
  int64_t queries = 0;  // valid query rows
  int64_t ring = 0;     // rows of the ring that positions past the sinks lie in; 0: none

  PYCORE_HOST_DEVICE int64_t positions() const { return keys + offset; }
  PYCORE_HOST_DEVICE int64_t query_position(int64_t i) const { return positions() - queries + i; }
  // The row of a position that is present.
  PYCORE_HOST_DEVICE int64_t key_row(int64_t j) const {
    if (ring > 0) return j < start ? j : start + j % ring;
    return start + (j < sinks ? j : j - offset);
  }
  PYCORE_HOST_DEVICE uint64_t present_bits(int64_t tile) const {
    const int64_t base = tile * kKeyTile;
    if (offset == 0) return tile_bits(base, 0, keys);
    return tile_bits(base, 0, sinks) | tile_bits(base, sinks + offset, keys + offset);
  }
  PYCORE_HOST_DEVICE int64_t tiles() const { return (positions() + kKeyTile - 1) / kKeyTile; }
  // Eviction leaves a gap in the positions: tiles sink_tiles() .. after_gap() - 1 hold no key.
  PYCORE_HOST_DEVICE int64_t sink_tiles() const { return offset == 0 ? 0 : (sinks + kKeyTile - 1) / kKeyTile; }
  PYCORE_HOST_DEVICE int64_t after_gap() const {
    const int64_t tile = offset == 0 ? 0 : (sinks + offset) / kKeyTile;
    return tile > sink_tiles() ? tile : sink_tiles();
  }
  // Tiles outside the gap, in order.
  PYCORE_HOST_DEVICE int64_t present_tiles() const {
    const int64_t rest = tiles() - after_gap();
    return sink_tiles() + (rest > 0 ? rest : 0);
  }
  PYCORE_HOST_DEVICE int64_t present_tile(int64_t index) const {
    return index < sink_tiles() ? index : after_gap() + index - sink_tiles();
  }
  // The first tile >= `tile` outside the gap that some row of p_lo..p_hi may visit; kNoTile if there is none.
  PYCORE_HOST_DEVICE int64_t next_tile(int64_t p_lo, int64_t p_hi, int64_t tile) const {
    for (;;) {
      if (tile >= sink_tiles() && tile < after_gap()) tile = after_gap();
      const int64_t next = schedule.next_tile(p_lo, p_hi, tile);
      if (next >= tiles()) return kNoTile;
      if (next < sink_tiles() || next >= after_gap()) return next;
      tile = next;
    }
  }
  // True if the tile's present positions lie in consecutive rows.
  PYCORE_HOST_DEVICE bool contiguous(int64_t tile) const {
    const int64_t base = tile * kKeyTile;
    const int64_t edge = ring > 0 ? start : sinks;
    return (offset == 0 && ring == 0) || base >= edge || base + kKeyTile <= edge;
  }
};

// The bitmap of head h, for the blocks schedule; other schedules are the same for all heads.
PYCORE_HOST_DEVICE inline void bind_head(const AttentionParams& params, int64_t b, int64_t h, RowMap* map) {
  const TileSchedule& all = params.schedule;
  if (all.blocks) map->schedule.blocks = all.blocks + (b * params.heads + h) * all.block_rows * all.block_words;
}

// A row map's numbers, from the four lengths.
PYCORE_HOST_DEVICE inline RowMap row_numbers(const AttentionParams& params, int64_t b) {
  RowMap map;
  map.start = params.key_starts ? params.key_starts[b] : 0;
  const int64_t end = params.key_lengths ? params.key_lengths[b] : params.key_length;
  map.keys = end > map.start ? end - map.start : 0;
  map.offset = params.key_offset ? params.key_offset[b] : 0;
  map.queries = params.query_lengths ? params.query_lengths[b] : params.query_length;
  if (params.key_ring > 0) {
    const int64_t held = params.schedule.sink_size + params.key_ring;
    map.offset = end > held ? end - held : 0;
    map.keys = end - map.offset;
    map.ring = params.key_ring;
    map.start = params.key_length - params.key_ring;
  }
  map.sinks = params.schedule.sink_size < map.keys ? params.schedule.sink_size : map.keys;
  return map;
}

// The schedule of batch row b and head h, to a map with numbers.
PYCORE_HOST_DEVICE inline void bind_schedule(const AttentionParams& params, int64_t b, int64_t h, RowMap* map) {
  TileSchedule& schedule = map->schedule;
  schedule = params.schedule;
  if (params.prefix_lengths) schedule.prefix = params.prefix_lengths[b];
  if (schedule.kind == ScheduleKind::kBlocks) {
    // Keys before an evicted gap are sinks, which need no block.
    schedule.block_row0 = map->query_position(0) >> schedule.block_shift;
    schedule.block_column0 = map->offset == 0 ? 0 : (map->sinks + map->offset) >> schedule.block_shift;
    bind_head(params, b, h, map);
  }
  if (schedule.kind == ScheduleKind::kSegments) schedule.boundaries += b * params.bitmap_stride;
  if (schedule.kind == ScheduleKind::kKeySubset) schedule.keys += b * params.bitmap_stride;
  if (schedule.kind == ScheduleKind::kTree) {
    schedule.tree += b * params.bitmap_stride;
    schedule.tree_start = map->positions() - schedule.tree_nodes;
  }
}

PYCORE_HOST_DEVICE inline RowMap row_map(const AttentionParams& params, int64_t b, int64_t h = 0) {
  RowMap map = row_numbers(params, b);
  bind_schedule(params, b, h, &map);
  return map;
}

// CPU. `scratch` holds attention_*_scratch(params, threads) bytes, 64-byte aligned.
PYCORE_API int64_t attention_forward_scratch(const AttentionParams& params, int64_t threads);
PYCORE_API Status attention_forward(const AttentionParams& params, const Parallel& parallel, void* scratch);
PYCORE_API int64_t attention_backward_scratch(const AttentionBackwardParams& params, int64_t threads);
PYCORE_API Status attention_backward(const AttentionBackwardParams& params, const Parallel& parallel, void* scratch);

// CUDA: every pointer is a device pointer, `scratch` of as many bytes as launch_attention_…_scratch says. The forward
// pass does without (null), with less parallelism and the same bits.
PYCORE_API int64_t launch_attention_forward_scratch(const AttentionParams& params);
PYCORE_API Status launch_attention_forward(const AttentionParams& params, void* scratch, void* stream);
PYCORE_API int64_t launch_attention_backward_scratch(const AttentionBackwardParams& params);
PYCORE_API Status launch_attention_backward(const AttentionBackwardParams& params, void* scratch, void* stream);

}  // namespace pycore
