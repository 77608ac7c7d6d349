// SPDX-License-Identifier: Apache-2.0
// The forward pass in vectors. A tile of query rows walks its key tiles in order; for each tile, blocks of
// kProductRows rows do scores, softmax and values back to back, so that a block's scores live in L1.
//
// Floors for one block against one full tile, D channels: 2 * 6 * 64 * D FMAs (3072 cycles at D = 64 with two 8-lane or
// one 16-lane FMA a cycle) against 6 * 64 exponentials (about 20 instructions a vector). The tile's own bytes are
// shared by all blocks.
#pragma once

#include <pycore/attention/rows.h>
#include <pycore/portable_math.h>

#include <cstdint>

#include "../staircase/loader.inl.h"
#include "kernels.h"
#include "logits.inl.h"
#include "row_loader.inl.h"
#include "tile_loader.inl.h"

struct ForwardBuffers {
  float* query = nullptr;        // [rows, padded D] unrotated
  float* query_far = nullptr;    // [rows, padded D] rotated by the distance limit
  float* query_block = nullptr;  // [6, padded D] a block rotated for one tile
  float* strips = nullptr;       // [heads of the tile, strip_length] biases
  float* scores = nullptr;       // [6, 64]
  float* scores_far = nullptr;   // [6, 64]
  SoftmaxRows softmax;
  LoaderBuffers rows;
  TileBuffers tiles;
  StaircaseBuffers planes;

  int64_t bind(const AttentionParams& params, void* memory) {
    const int64_t d = padded(params.head_dim);
    Scratch scratch{static_cast<char*>(memory)};
    query = scratch.take(kForwardRows * d);
    if (params.planes) {
      planes.bind(params, &scratch);
    } else if (params.key_channel_stride) {
      tiles.bind(params, &scratch);
    } else {
      rows.bind(params, params.dtype, &scratch);
    }
    scores = scratch.take(kProductRows * kKeyTile);
    softmax.bind(&scratch, kForwardRows, padded(params.value_dim));
    // heads * count <= kForwardRows
    if (has_bias(params)) strips = scratch.take(kForwardRows * (kKeyTile + params.schedule.tree_nodes));
    if (params.rope_cos) {
      query_far = scratch.take(kForwardRows * d);
      query_block = scratch.take(kProductRows * d);
      scores_far = scratch.take(kProductRows * kKeyTile);
    }
    return scratch.used;
  }
};

// A query tile on its way over key tiles.
struct ForwardRows {
  const AttentionParams& params;
  const RowMap& map;
  const QueryTile& queries;
  const ForwardBuffers& buffers;
  int64_t positions[kForwardRows], places[kForwardRows];  // of each row; where it stands for distances
  Places span;
  bool reaches_far;  // whether some query has keys beyond the distance limit

  PYCORE_INLINE ForwardRows(const AttentionParams& problem, const RowMap& row_map, const QueryTile& tile,
                            const ForwardBuffers& memory)
      : params(problem), map(row_map), queries(tile), buffers(memory), span(map, tile.first, tile.count, places) {
    const int64_t d = padded(params.head_dim);
    reaches_far = params.rope_cos != nullptr && params.distance_limit < span.hi;
    for (int64_t r = 0; r < queries.rows(); ++r) {
      const int64_t h = head(r), i = queries.first + r % queries.count;
      positions[r] = map.query_position(i);
      if (r >= queries.count) places[r] = places[r - queries.count];
      load_row(params.dtype, row_of(params, params.query, params.query_strides, queries.batch, h, i), params.head_dim,
               buffers.query + r * d);
      if (reaches_far) rotate(params, buffers.query + r * d, params.distance_limit, buffers.query_far + r * d);
    }
  }

  PYCORE_INLINE int64_t head(int64_t r) const { return queries.head + r / queries.count; }
  PYCORE_INLINE int64_t lowest() const { return map.query_position(queries.first); }
  PYCORE_INLINE int64_t highest() const { return lowest() + queries.count - 1; }

  // False if no row keeps a key of the tile.
  PYCORE_INLINE bool visit(int64_t index, KeyTile* tile) const {
    const int64_t lo = lowest(), hi = highest(), base = index * kKeyTile;
    tile->index = index;
    tile->present = map.present_bits(index) & map.schedule.reach_bits(lo, hi, index);
    if (tile->present == 0 || map.schedule.cover(lo, hi, index) == Cover::kNone) return false;
    const bool in_place = map.schedule.in_place(index);
    tile->far = reaches_far && (!in_place || span.hi - base > params.distance_limit);
    tile->near = !tile->far || !in_place || span.lo - (base + kKeyTile - 1) <= params.distance_limit;
    for (int64_t h = 0; h < queries.heads && buffers.strips && in_place; ++h) {
      fill_strip(params, queries.batch, queries.head + h, span, index, strip_of(h));
    }
    return true;
  }

  PYCORE_INLINE float* strip_of(int64_t h) const { return buffers.strips + h * strip_length(span.count()); }
};

// A block of up to kProductRows rows, from `row` on, against the loader's tile.
template <class Loader>
struct ForwardBlock {
  const ForwardRows& all;
  const KeyTile& tile;
  const Loader& loader;
  const int64_t row, rows;
  BlockKeeps keeps;
  uint64_t far[kProductRows];  // keys beyond the distance limit
  uint64_t any_far, any_near;
  int64_t begin, end;  // columns that some row keeps, in whole vectors

  PYCORE_INLINE ForwardBlock(const ForwardRows& query_tile, const KeyTile& key_tile, const Loader& keys, int64_t first,
                             int64_t count)
      : all(query_tile), tile(key_tile), loader(keys), row(first), rows(count) {}

  PYCORE_INLINE void run() {
    if (!find_keys()) return;
    score();
    if (!plain_logits(all.params)) bend_scores();
    weigh();
    const SoftmaxRows& softmax = all.buffers.softmax;
    loader.accumulate(rows, keeps, all.buffers.scores, softmax.accumulator + row * softmax.width, softmax.width);
  }

  // False if the block keeps nothing of the tile.
  PYCORE_INLINE bool find_keys() {
    const TileSchedule& schedule = all.map.schedule;
    const int64_t* const positions = all.positions + row;
    // Not where the block goes from one head to the next: its positions then start again.
    const bool alike = positions[rows - 1] - positions[0] == rows - 1 &&
                       schedule.keep_alike(positions[0], positions[rows - 1], tile.index);
    uint64_t bits = 0;
    any_far = any_near = 0;
    for (int m = 0; m < rows; ++m) {
      if (m == 0 || !alike) bits = schedule.keep_bits(positions[m], tile.index) & tile.present;
      if (alike && bits == 0) return false;
      keeps.set(m, bits);
      far[m] = tile.far ? far_bits(all.params, schedule, all.places[row + m], tile.index) : 0;
      any_far |= keeps.bits[m] & far[m];
      any_near |= keeps.bits[m] & ~far[m];
    }
    if (keeps.any == 0) return false;
    begin = keeps.first() / Vec::kWidth * Vec::kWidth;
    end = round_up(keeps.end(), Vec::kWidth);
    return true;
  }

  // buffers.scores: <query, key>, rotated by their distance or, where that is beyond the limit, by the limit.
  PYCORE_INLINE void score() const {
    const ForwardBuffers& buffers = all.buffers;
    const int64_t d = padded(all.params.head_dim);
    if (any_near) loader.score(rows, near_query(), d, begin, end, buffers.scores);
    if (!any_far) return;
    float* const scores = any_near ? buffers.scores_far : buffers.scores;
    loader.score_far(rows, buffers.query_far + row * d, d, begin, end, scores);
    for (int m = 0; m < rows && any_near; ++m) {
      float* near_scores = buffers.scores + m * kKeyTile;
      for (int64_t c = begin; c < end; c += Vec::kWidth) {
        Vec::load(scores + m * kKeyTile + c).select(far[m] >> c, Vec::load(near_scores + c)).store(near_scores + c);
      }
    }
  }

  PYCORE_INLINE const float* near_query() const {
    const int64_t d = padded(all.params.head_dim);
    const float* const query = all.buffers.query + row * d;
    if (!all.params.rope_cos) return query;
    float* const block = all.buffers.query_block;
    for (int m = 0; m < rows; ++m) {
      // A row that keeps no near key may stand too far from the tile for the table; its scores are masked anyway.
      if ((keeps.bits[m] & ~far[m]) == 0) continue;
      rotate(all.params, query + m * d, all.places[row + m] - tile.index * kKeyTile, block + m * d);
    }
    return block;
  }

  // Scores in place -> logits.
  PYCORE_INLINE void bend_scores() const {
    const AttentionParams& params = all.params;
    const TileSchedule& schedule = all.map.schedule;
    for (int m = 0; m < rows; ++m) {
      const int64_t h = all.head(row + m), place = all.places[row + m];
      float* const scores = all.buffers.scores + m * kKeyTile;
      float biases[kKeyTile];
      const float* strip = nullptr;
      if (all.buffers.strips && schedule.in_place(tile.index)) {
        strip = all.strip_of(h - all.queries.head) + all.span.hi - place;
      } else if (all.buffers.strips) {
        fill_biases(params, schedule, all.queries.batch, h, place, tile.index, biases);
        strip = biases;
      }
      logits_of(params, scores, begin, end, strip, nullptr);
      if (params.block_bias) add_block_bias(params, h, all.positions[row + m], tile.index, scores, begin, end);
    }
  }

  // Logits in place -> weights. The maxima of all rows first: row by row, each would wait for a reduction across lanes.
  PYCORE_INLINE void weigh() const {
    const AttentionParams& params = all.params;
    const SoftmaxRows& softmax = all.buffers.softmax;
    const float factor = base2_factor(params);
    const uint64_t columns = bit_range(begin, end);
    for (int m = 0; m < rows; ++m) {
      const bool masked = (keeps.bits[m] & columns) != columns;
      softmax.update_max(row + m, all.buffers.scores + m * kKeyTile, begin, end, keeps.bits[m], masked, factor);
    }
    for (int m = 0; m < rows; ++m) {
      float* const scores = all.buffers.scores + m * kKeyTile;
      softmax.weigh(row + m, scores, begin, end, factor);
      if (params.dropout_p > 0) {
        drop_out(params, scores, begin, end,
                 dropped_keys(params, all.queries.batch, all.head(row + m), all.positions[row + m], tile.index,
                              keeps.bits[m]));
      }
    }
  }
};

// Of a sum of weights: it may be zero, or NaN. A float32 number is a normal float64 one.
PYCORE_INLINE double log_of(float sum) { return sum > 0 ? portable_log(sum) : __builtin_log(sum); }

// The rows' results from their totals.
PYCORE_INLINE void finish_rows(const AttentionParams& params, const QueryTile& queries, const SoftmaxRows& softmax) {
  const int64_t dv = padded(params.value_dim);
  const double factor = base2_factor(params), natural = natural_factor(params);
  for (int64_t r = 0; r < queries.rows(); ++r) {
    const int64_t h = queries.head + r / queries.count;
    const int64_t index = row_index(params, queries.batch, h, queries.first + r % queries.count);
    double max = softmax.total_max[r] * factor;  // in base 2 from here on
    float sum = softmax.total_sum[r];
    float* const total = softmax.total + r * dv;
    const float sink = params.sink_logits ? static_cast<const float*>(params.sink_logits)[h] : -kInfinity;
    if (sink != -kInfinity) {  // which adds nothing, and has no distance to a row without a key
      const double sink2 = sink / natural, larger = max > sink2 ? max : sink2;
      const float shrunk = exp2_of(static_cast<float>(max - larger));
      sum = sum * shrunk + exp2_of(static_cast<float>(sink2 - larger));
      max = larger;
      scale_row(total, dv, Vec::broadcast(shrunk));
    }
    // A row that kept no key has an accumulator of zeros, and without a sink a sum of 0; NaN goes through.
    scale_row(total, dv, Vec::broadcast(sum == 0 ? 0.0f : 1.0f / sum));
    store_row(params.dtype, total, params.value_dim,
              static_cast<char*>(params.out) + index * params.value_dim * dtype_size(params.dtype));
    const double lse = (max + log_of(sum) / kLn2) * natural;
    const float rounded = static_cast<float>(lse);
    static_cast<float*>(params.lse)[index] = rounded;
    if (params.lse_low) {
      // Of an infinity or NaN, nothing is left.
      static_cast<float*>(params.lse_low)[index] = lse - lse == 0 ? static_cast<float>(lse - rounded) : 0.0f;
    }
  }
}

// All blocks of the query tile against the loader's tile; the keys of tile `next` are asked for meanwhile.
template <class Loader>
PYCORE_INLINE void forward_blocks(const ForwardRows& all, const KeyTile& tile, const Loader& loader, int64_t next) {
  const int64_t rows = all.queries.rows();
  const uint64_t wanted = next == kNoTile || !loader.prefetches() ? 0 : all.map.present_bits(next);
  for (int64_t row = 0, count, fetched = 0; row < rows; row += count) {
    count = all.map.schedule.rows_alike(all.positions[row], smaller(rows - row, kProductRows));
    // The next tile's share, so that its keys and values are under way while this tile's products run.
    for (const int64_t until = wanted ? (row + count) * kKeyTile / rows : 0; fetched < until; ++fetched) {
      if (wanted >> fetched & 1) loader.prefetch(next * kKeyTile + fetched);
    }
    ForwardBlock<Loader>(all, tile, loader, row, count).run();
  }
}

// The rows of `all` over the key tiles of segments.first .. last - 1, in order: their totals are what they come to.
template <class Loader>
PYCORE_INLINE void forward_tiles(const ForwardRows& all, Loader* loader, SegmentRange segments) {
  const RowMap& map = all.map;
  const SoftmaxRows& softmax = all.buffers.softmax;
  const int64_t lo = all.lowest(), hi = all.highest(), rows = all.queries.rows();
  const float factor = base2_factor(all.params);
  softmax.open(rows);
  int64_t open_segment = segments.first;
  for (int64_t index = map.next_tile(lo, hi, segments.first * kSegmentTiles);
       index != kNoTile && index / kSegmentTiles < segments.last; index = map.next_tile(lo, hi, index + 1)) {
    KeyTile tile;
    if (!all.visit(index, &tile)) continue;
    if (index / kSegmentTiles != open_segment) {
      softmax.close_segment(rows, factor);
      open_segment = index / kSegmentTiles;
    }
    loader->load(tile);
    forward_blocks(all, tile, *loader, map.next_tile(lo, hi, index + 1));
  }
  softmax.close_segment(rows, factor);
}

void forward(const AttentionParams& params, const RowMap& map, const QueryTile& queries, SegmentRange segments,
             void* memory, void* partial) {
  ForwardBuffers buffers;
  buffers.bind(params, memory);
  const ForwardRows all(params, map, queries, buffers);
  if (params.planes) {
    StaircaseLoader loader(params, map, queries, buffers.planes);
    forward_tiles(all, &loader, segments);
  } else if (params.key_channel_stride) {
    TileLoader loader(params, key_tiles_of(params, queries.batch, queries.kv_head, map),
                      value_rows_of(params, queries.batch, queries.kv_head, map), queries.rows(), buffers.tiles);
    forward_tiles(all, &loader, segments);
  } else {
    RowLoader loader(params, key_rows_of(params, queries.batch, queries.kv_head, map),
                     value_rows_of(params, queries.batch, queries.kv_head, map), queries.rows(), buffers.rows);
    forward_tiles(all, &loader, segments);
  }
  if (partial == nullptr) return finish_rows(params, queries, buffers.softmax);
  const int64_t floats = SoftmaxRows::state_floats(buffers.softmax.width);
  for (int64_t r = 0; r < queries.rows(); ++r) {
    buffers.softmax.store_state(r, static_cast<float*>(partial) + r * floats);
  }
}

int64_t forward_partial(const AttentionParams& params, int64_t rows) {
  const int64_t floats = rows * SoftmaxRows::state_floats(padded(params.value_dim));
  return round_up(floats * static_cast<int64_t>(sizeof(float)), 64);
}

void forward_merge(const AttentionParams& params, const QueryTile& queries, const void* partials, int64_t stride,
                   int64_t count, void* memory) {
  ForwardBuffers buffers;
  buffers.bind(params, memory);
  const SoftmaxRows& softmax = buffers.softmax;
  const int64_t rows = queries.rows(), floats = SoftmaxRows::state_floats(softmax.width);
  const float factor = base2_factor(params);
  softmax.open_totals(rows);
  for (int64_t n = 0; n < count; ++n) {
    const float* states = reinterpret_cast<const float*>(static_cast<const char*>(partials) + n * stride);
    for (int64_t r = 0; r < rows; ++r) softmax.merge_state(r, states + r * floats, factor);
  }
  finish_rows(params, queries, softmax);
}

int64_t forward_scratch(const AttentionParams& params) {
  ForwardBuffers buffers;
  return buffers.bind(params, nullptr);
}
