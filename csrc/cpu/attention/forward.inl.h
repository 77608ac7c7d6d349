// SPDX-License-Identifier: Apache-2.0
// The forward pass in vectors. A tile of query rows walks its key tiles in order; for each tile, blocks of
// kProductRows rows do scores, softmax and values back to back, so that a block's scores live in L1. The softmax is in
// base 2: 2^(factor (x - max)), with the logit's scale, if that is all there is to it, in the factor. The difference
// comes first, so that a row's largest weight is 1 to the bit, and where it has all the weight, its value the result.
//
// Floors for one block against one full tile, D channels: 2 * 6 * 64 * D FMAs (3072 cycles at D = 64 with two 8-lane or
// one 16-lane FMA a cycle) against 6 * 64 exponentials (about 20 instructions a vector). The tile's own bytes are
// shared by all blocks. Include after logits.inl.h and few_rows.inl.h.

constexpr float kInfinity = __builtin_inff();

struct ForwardBuffers {
  float* query = nullptr;        // [rows, padded D] unrotated
  float* query_far = nullptr;    // [rows, padded D] rotated by the distance limit
  float* query_block = nullptr;  // [6, padded D] a block rotated for one tile
  float* key_columns = nullptr;  // [padded D, 64] keys, rotated by place in the tile
  float* key_far = nullptr;      // [padded D, 64] keys, unrotated
  float* key_rows = nullptr;     // [64, padded D] rotated rows on their way to key_columns
  float* key_copy = nullptr;     // [64, padded D] keys converted to float32
  float* strips = nullptr;       // [heads of the tile, strip_length] biases
  float* value_rows = nullptr;   // [64, padded Dv]
  float* scores = nullptr;       // [6, 64]
  float* scores_far = nullptr;   // [6, 64]
  float* max = nullptr;          // [rows] of the open segment; scores, or logits
  float* sum = nullptr;          // [rows, width] of the open segment, by lane
  float* accumulator = nullptr;  // [rows, padded Dv] of the open segment
  float* total_max = nullptr;    // the segments merged so far
  float* total_sum = nullptr;    // [rows]
  float* total = nullptr;        // [rows, padded Dv]

  int64_t bind(const AttentionParams& params, void* memory) {
    const int64_t d = padded(params.head_dim), dv = padded(params.value_dim);
    const bool rope = params.rope_cos != nullptr;
    Scratch scratch{static_cast<char*>(memory)};
    query = scratch.take(kForwardRows * d);
    key_columns = scratch.take(d * kKeyTile);
    value_rows = scratch.take(kKeyTile * dv);
    scores = scratch.take(kProductRows * kKeyTile);
    max = scratch.take(kForwardRows);
    sum = scratch.take(kForwardRows * Vec::kWidth);
    accumulator = scratch.take(kForwardRows * dv);
    total_max = scratch.take(kForwardRows);
    total_sum = scratch.take(kForwardRows);
    total = scratch.take(kForwardRows * dv);
    if (params.dtype != DType::kFloat32) key_copy = scratch.take(kKeyTile * d);
    // heads * count <= kForwardRows
    if (has_bias(params)) strips = scratch.take(kForwardRows * (kKeyTile + params.schedule.tree_nodes));
    if (rope) {
      query_far = scratch.take(kForwardRows * d);
      query_block = scratch.take(kProductRows * d);
      key_far = scratch.take(d * kKeyTile);
      key_rows = scratch.take(kKeyTile * d);
      scores_far = scratch.take(kProductRows * kKeyTile);
    }
    return scratch.used;
  }
};

// One vector of 2^(x - shift) for the whole row, the same function the weights use.
PYCORE_INLINE float exp2_of(float x) {
  float lanes[Vec::kWidth];
  Vec::broadcast(x).exp2().store(lanes);
  return lanes[0];
}

PYCORE_INLINE void scale_row(float* row, int64_t n, Vec factor) {
  for (int64_t d = 0; d < n; d += Vec::kWidth) (Vec::load(row + d) * factor).store(row + d);
}

// The maximum of one row's scores (columns begin..end-1, whole vectors; what is not kept becomes -inf) joins the row's
// open segment, which is rescaled when it grows.
PYCORE_INLINE void update_max(float* scores, int64_t begin, int64_t end, uint64_t kept, bool masked, float factor,
                              float* max, float* sum, float* accumulator, int64_t dv) {
  const Vec nothing = Vec::broadcast(-kInfinity);
  Vec row_max = nothing;
  if (masked) {
    for (int64_t c = begin; c < end; c += Vec::kWidth) {
      const Vec x = Vec::load(scores + c).select(kept >> c, nothing);
      x.store(scores + c);
      row_max = Vec::max(row_max, x);
    }
  } else {
    for (int64_t c = begin; c < end; c += Vec::kWidth) row_max = Vec::max(row_max, Vec::load(scores + c));
  }
  const float tile_max = row_max.reduce_max();
  if (!(tile_max > *max) && tile_max == tile_max) return;  // NaN enters, and stays
  if (*max != -kInfinity) {                                // else there is nothing to rescale yet
    const Vec shrunk = Vec::broadcast(exp2_of((*max - tile_max) * factor));
    scale_row(accumulator, dv, shrunk);
    (Vec::load(sum) * shrunk).store(sum);
  }
  *max = tile_max;
}

// Scores of one row in place -> weights 2^(factor (s - max)), which join the row's sum.
PYCORE_INLINE void weigh_row(float* scores, int64_t begin, int64_t end, float factor, float* max, float* sum) {
  if (*max == -kInfinity) {  // nothing kept so far, or NaN, which a maximum may drop
    Vec seen = Vec::zero();
    for (int64_t c = begin; c < end; c += Vec::kWidth) {
      const Vec weight = Vec::load(scores + c).exp2();
      weight.store(scores + c);
      seen = seen + weight;
    }
    const float total = seen.reduce_add();
    if (total == 0) return;
    *max = total;
    Vec::broadcast(total).store(sum);  // also where dropout leaves no weight that says so
    return;
  }
  const Vec power = Vec::broadcast(factor), largest = Vec::broadcast(*max);
  Vec row_sum = Vec::load(sum);
  for (int64_t c = begin; c < end; c += Vec::kWidth) {
    const Vec weight = ((Vec::load(scores + c) - largest) * power).exp2();
    weight.store(scores + c);
    row_sum = row_sum + weight;
  }
  row_sum.store(sum);
}

// The factors by which the totals of kWidth rows, and states that join them, shrink to the larger of their maxima: of
// rows whose total and state both hold something.
struct MergeFactors {
  float max[Vec::kWidth], total[Vec::kWidth], state[Vec::kWidth];

  PYCORE_INLINE MergeFactors(Vec total_max, Vec state_max, float factor) {
    const Vec largest = Vec::max(state_max, total_max), power = Vec::broadcast(factor);
    largest.store(max);
    ((total_max - largest) * power).exp2().store(total);
    ((state_max - largest) * power).exp2().store(state);
  }
};

// Row r after a later segment joins its total; `lane` is its place in the factors.
PYCORE_INLINE void merge_row(const ForwardBuffers& buffers, int64_t r, float max, float sum, const float* accumulator,
                             int64_t dv, const MergeFactors& factors, int64_t lane) {
  if (max == -kInfinity) return;
  float* total = buffers.total + r * dv;
  if (buffers.total_max[r] == -kInfinity) {
    buffers.total_max[r] = max;
    buffers.total_sum[r] = sum;
    copy_row(accumulator, dv, total);
    return;
  }
  const Vec old_factor = Vec::broadcast(factors.total[lane]), factor = Vec::broadcast(factors.state[lane]);
  buffers.total_sum[r] = __builtin_fmaf(sum, factors.state[lane], buffers.total_sum[r] * factors.total[lane]);
  buffers.total_max[r] = factors.max[lane];
  for (int64_t d = 0; d < dv; d += Vec::kWidth) {
    Vec::fma(Vec::load(accumulator + d), factor, Vec::load(total + d) * old_factor).store(total + d);
  }
}

// The open segment joins the total, and a new one opens. Factors come for a vector of rows at a time: where few tiles
// of a segment are visited, merging is a good part of the time.
PYCORE_INLINE void merge_segment(const ForwardBuffers& buffers, int64_t rows, int64_t dv, float factor) {
  for (int64_t first = 0; first < rows; first += Vec::kWidth) {
    const MergeFactors factors(Vec::load(buffers.total_max + first), Vec::load(buffers.max + first), factor);
    for (int64_t r = first; r < first + Vec::kWidth && r < rows; ++r) {
      if (buffers.max[r] == -kInfinity) continue;
      float* accumulator = buffers.accumulator + r * dv;
      merge_row(buffers, r, buffers.max[r], Vec::load(buffers.sum + r * Vec::kWidth).reduce_add(), accumulator, dv,
                factors, r - first);
      buffers.max[r] = -kInfinity;
      Vec::zero().store(buffers.sum + r * Vec::kWidth);
      zero_rows(accumulator, dv);
    }
  }
}

// One key tile, loaded for every block of the query tile.
struct LoadedTile {
  int64_t tile;
  uint64_t present;
  bool near, far;  // whether some pair is within, or beyond, the distance limit
  const float* value;
  int64_t value_stride;
  // With no more rows than a block, the rows of the tile themselves, in dtype `key_dtype`; else not filled.
  bool few = false;
  DType key_dtype = DType::kFloat32;
  TilePointers keys, far_keys, values;
};

// Makes the keys and values of a tile ready for its blocks: one block reads them where they lie, several share a
// transposed copy.
PYCORE_INLINE void load_tile(const AttentionParams& params, const RowMap& map, const QueryTile& queries,
                             const ForwardBuffers& buffers, bool few, LoadedTile* loaded) {
  const int64_t d = padded(params.head_dim), b = queries.batch, kv_head = queries.kv_head;
  const bool rope = params.rope_cos != nullptr;
  TileRows keys, values, rotated;
  loaded->few = few;
  if (few) {
    loaded->values.fill(params, params.value, params.value_strides, map, b, kv_head, loaded->tile, loaded->present);
    TilePointers* unrotated = rope ? &loaded->far_keys : &loaded->keys;
    unrotated->fill(params, params.key, params.key_strides, map, b, kv_head, loaded->tile, loaded->present);
    loaded->key_dtype = rope ? DType::kFloat32 : params.dtype;
    loaded->value = nullptr;
    if (rope && loaded->near) {
      tile_rows(params, params.key, params.key_strides, map, b, kv_head, loaded->tile, loaded->present, params.head_dim,
                buffers.key_copy, &keys);
      rotate_rows(params, map.schedule, loaded->tile, keys, d, buffers.key_rows, &rotated);
      loaded->keys.fill(buffers.key_rows, d, loaded->present);
    }
    return;
  }
  tile_rows(params, params.key, params.key_strides, map, b, kv_head, loaded->tile, loaded->present, params.head_dim,
            buffers.key_copy, &keys);
  tile_rows(params, params.value, params.value_strides, map, b, kv_head, loaded->tile, loaded->present,
            params.value_dim, buffers.value_rows, &values);
  if (loaded->far) transpose_rows(keys, params.head_dim, buffers.key_far);
  if (loaded->near) {
    if (rope) rotate_rows(params, map.schedule, loaded->tile, keys, d, buffers.key_rows, &rotated);
    transpose_rows(rope ? rotated : keys, params.head_dim, buffers.key_columns);
  }
  loaded->value = matrix_rows(params, values, loaded->present, map.contiguous(loaded->tile), params.value_strides.row,
                              params.value_dim, buffers.value_rows, &loaded->value_stride);
}

// Starts loading the key and the value at a position. A schedule that leaves tiles out jumps, and the processor's own
// guess of what is read next goes wrong at every jump.
PYCORE_INLINE void fetch_key(const AttentionParams& params, const RowMap& map, const QueryTile& queries,
                             int64_t position) {
  const int64_t row = map.key_row(position), size = dtype_size(params.dtype);
  const auto fetch = [&](const void* data, const AttentionStrides& strides, int64_t channels) {
    const char* x = row_of(params, data, strides, queries.batch, queries.kv_head, row);
    for (int64_t at = 0; at < channels * size; at += 64) __builtin_prefetch(x + at, 0, 2);
  };
  fetch(params.key, params.key_strides, params.head_dim);
  fetch(params.value, params.value_strides, params.value_dim);
}

// `positions` and `places`: the block's rows, and where they stand for distances; `span` is the whole query tile's.
PYCORE_INLINE void forward_block(const AttentionParams& params, const RowMap& map, const QueryTile& queries,
                                 const LoadedTile& loaded, const int64_t* positions, const int64_t* places,
                                 const Places& span, const ForwardBuffers& buffers, int64_t row, int64_t rows) {
  const int64_t d = padded(params.head_dim), dv = padded(params.value_dim);
  BlockKeeps keeps;
  uint64_t far[kProductRows];
  uint64_t any_far = 0, any_near = 0;
  // Not where the block goes from one head to the next: its positions then start again.
  const bool alike = positions[rows - 1] - positions[0] == rows - 1 &&
                     map.schedule.keep_alike(positions[0], positions[rows - 1], loaded.tile);
  uint64_t bits = 0;
  for (int m = 0; m < rows; ++m) {
    if (m == 0 || !alike) bits = map.schedule.keep_bits(positions[m], loaded.tile) & loaded.present;
    if (alike && bits == 0) return;
    keeps.set(m, bits);
    far[m] = loaded.far ? far_bits(params, map.schedule, places[m], loaded.tile) : 0;
    any_far |= keeps.bits[m] & far[m];
    any_near |= keeps.bits[m] & ~far[m];
  }
  if (keeps.any == 0) return;
  const int64_t begin = keeps.first() / Vec::kWidth * Vec::kWidth, end = round_up(keeps.end(), Vec::kWidth);
  const float* query = buffers.query + row * d;
  if (any_near) {
    if (params.rope_cos) {
      for (int m = 0; m < rows; ++m) {
        // A row that keeps no near key may stand too far from the tile for the table; its scores are masked anyway.
        if ((keeps.bits[m] & ~far[m]) == 0) continue;
        rotate(params, query + m * d, places[m] - loaded.tile * kKeyTile, buffers.query_block + m * d);
      }
      query = buffers.query_block;
    }
    if (loaded.few) {
      score_few(loaded.key_dtype, rows, loaded.keys, params.head_dim, query, d, begin, end, buffers.scores);
    } else {
      tile_product<false>(rows, params.head_dim, query, d, buffers.key_columns, kKeyTile, begin, end,
                          StoreBlock{buffers.scores, kKeyTile});
    }
  }
  if (any_far) {
    float* scores = any_near ? buffers.scores_far : buffers.scores;
    if (loaded.few) {
      score_few(params.dtype, rows, loaded.far_keys, params.head_dim, buffers.query_far + row * d, d, begin, end,
                scores);
    } else {
      tile_product<false>(rows, params.head_dim, buffers.query_far + row * d, d, buffers.key_far, kKeyTile, begin, end,
                          StoreBlock{scores, kKeyTile});
    }
    for (int m = 0; m < rows && any_near; ++m) {
      float* near_scores = buffers.scores + m * kKeyTile;
      for (int64_t c = begin; c < end; c += Vec::kWidth) {
        Vec::load(scores + m * kKeyTile + c).select(far[m] >> c, Vec::load(near_scores + c)).store(near_scores + c);
      }
    }
  }
  const float factor = base2_factor(params);
  for (int m = 0; m < rows && !plain_logits(params); ++m) {
    const int64_t head = (row + m) / queries.count;
    float biases[kKeyTile];
    const float* strip = nullptr;
    if (buffers.strips && map.schedule.in_place(loaded.tile)) {
      strip = buffers.strips + head * strip_length(span.count()) + span.hi - places[m];
    } else if (buffers.strips) {
      fill_biases(params, map.schedule, queries.batch, queries.head + head, places[m], loaded.tile, biases);
      strip = biases;
    }
    logits_of(params, buffers.scores + m * kKeyTile, begin, end, strip, nullptr);
    if (params.block_bias) {
      add_block_bias(params, queries.head + head, positions[m], loaded.tile, buffers.scores + m * kKeyTile, begin, end);
    }
  }
  const uint64_t columns = bit_range(begin, end);
  for (int m = 0; m < rows; ++m) {
    const bool masked = (keeps.bits[m] & columns) != columns;
    update_max(buffers.scores + m * kKeyTile, begin, end, keeps.bits[m], masked, factor, buffers.max + row + m,
               buffers.sum + (row + m) * Vec::kWidth, buffers.accumulator + (row + m) * dv, dv);
  }
  for (int m = 0; m < rows; ++m) {
    weigh_row(buffers.scores + m * kKeyTile, begin, end, factor, buffers.max + row + m,
              buffers.sum + (row + m) * Vec::kWidth);
    if (params.dropout_p > 0) {
      const int64_t h = queries.head + (row + m) / queries.count;
      drop_out(params, buffers.scores + m * kKeyTile, begin, end,
               dropped_keys(params, queries.batch, h, positions[m], loaded.tile, keeps.bits[m]));
    }
  }
  if (loaded.few) {
    // Rows that keep the same keys go together, the others one by one.
    const bool same = keeps.any == keeps.all;
    for (int64_t m = 0; m < rows; m += same ? rows : 1) {
      accumulate_few(params.dtype, same ? rows : 1, loaded.values, keeps.bits[m], buffers.scores + m * kKeyTile,
                     params.value_dim, buffers.accumulator + (row + m) * dv, dv);
    }
    return;
  }
  accumulate_kept<false>(rows, keeps, buffers.scores, kKeyTile, loaded.value, loaded.value_stride, params.value_dim,
                         buffers.accumulator + row * dv, dv);
}

// The rows' results from their totals.
PYCORE_INLINE void finish_rows(const AttentionParams& params, const QueryTile& queries, const ForwardBuffers& buffers) {
  const int64_t dv = padded(params.value_dim);
  const double factor = base2_factor(params), natural = natural_factor(params);
  for (int64_t r = 0; r < queries.rows(); ++r) {
    const int64_t h = queries.head + r / queries.count;
    const int64_t index = row_index(params, queries.batch, h, queries.first + r % queries.count);
    double max = buffers.total_max[r] * factor;  // in base 2 from here on
    float sum = buffers.total_sum[r];
    const float sink = params.sink_logits ? static_cast<const float*>(params.sink_logits)[h] : -kInfinity;
    if (sink != -kInfinity) {  // which adds nothing, and has no distance to a row without a key
      const double sink2 = sink / natural, larger = max > sink2 ? max : sink2;
      const float shrunk = exp2_of(static_cast<float>(max - larger));
      sum = sum * shrunk + exp2_of(static_cast<float>(sink2 - larger));
      max = larger;
      scale_row(buffers.total + r * dv, dv, Vec::broadcast(shrunk));
    }
    // A row that kept no key has an accumulator of zeros, and without a sink a sum of 0; NaN goes through.
    scale_row(buffers.total + r * dv, dv, Vec::broadcast(sum == 0 ? 0.0f : 1.0f / sum));
    store_row(params.dtype, buffers.total + r * dv, params.value_dim,
              static_cast<char*>(params.out) + index * params.value_dim * dtype_size(params.dtype));
    const double lse = (max + __builtin_log(static_cast<double>(sum)) / kLn2) * natural;
    const float rounded = static_cast<float>(lse);
    static_cast<float*>(params.lse)[index] = rounded;
    if (params.lse_low) {
      // Of an infinity or NaN, nothing is left.
      static_cast<float*>(params.lse_low)[index] = lse - lse == 0 ? static_cast<float>(lse - rounded) : 0.0f;
    }
  }
}

// A row's state in a partial: its largest logit, its sum, and dv accumulated values.
PYCORE_INLINE int64_t state_floats(const AttentionParams& params) { return 2 + padded(params.value_dim); }

void forward(const AttentionParams& params, const RowMap& map, const QueryTile& queries, SegmentRange segments,
             void* memory, void* partial) {
  ForwardBuffers buffers;
  buffers.bind(params, memory);
  const int64_t d = padded(params.head_dim), dv = padded(params.value_dim), rows = queries.rows();
  const int64_t p_lo = map.query_position(queries.first), p_hi = p_lo + queries.count - 1;
  const bool rope = params.rope_cos != nullptr;
  const float factor = base2_factor(params);
  int64_t positions[kForwardRows], places[kForwardRows];
  const Places span(map, queries.first, queries.count, places);
  const bool reaches_far = rope && params.distance_limit < span.hi;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t h = queries.head + r / queries.count, i = queries.first + r % queries.count;
    positions[r] = map.query_position(i);
    if (r >= queries.count) places[r] = places[r - queries.count];
    load_row(params.dtype, row_of(params, params.query, params.query_strides, queries.batch, h, i), params.head_dim,
             buffers.query + r * d);
    if (reaches_far) rotate(params, buffers.query + r * d, params.distance_limit, buffers.query_far + r * d);
    buffers.max[r] = buffers.total_max[r] = -kInfinity;
    buffers.total_sum[r] = 0;
  }
  zero_rows(buffers.sum, rows * Vec::kWidth);
  zero_rows(buffers.accumulator, rows * dv);
  zero_rows(buffers.total, rows * dv);

  int64_t open_segment = segments.first;
  for (int64_t tile = map.next_tile(p_lo, p_hi, segments.first * kSegmentTiles);
       tile != kNoTile && tile / kSegmentTiles < segments.last; tile = map.next_tile(p_lo, p_hi, tile + 1)) {
    LoadedTile loaded;
    loaded.tile = tile;
    loaded.present = map.present_bits(tile) & map.schedule.reach_bits(p_lo, p_hi, tile);
    if (loaded.present == 0 || map.schedule.cover(p_lo, p_hi, tile) == Cover::kNone) continue;
    if (tile / kSegmentTiles != open_segment) {
      merge_segment(buffers, rows, dv, factor);
      open_segment = tile / kSegmentTiles;
    }
    const int64_t base = tile * kKeyTile;
    const bool in_place = map.schedule.in_place(tile);
    loaded.far = reaches_far && (!in_place || span.hi - base > params.distance_limit);
    loaded.near = !loaded.far || !in_place || span.lo - (base + kKeyTile - 1) <= params.distance_limit;
    for (int64_t h = 0; h < queries.heads && buffers.strips && in_place; ++h) {
      fill_strip(params, queries.batch, queries.head + h, span, tile, buffers.strips + h * strip_length(span.count()));
    }
    load_tile(params, map, queries, buffers, rows <= kProductRows, &loaded);
    const int64_t next = map.next_tile(p_lo, p_hi, tile + 1);
    const uint64_t wanted = next == kNoTile || loaded.few ? 0 : map.present_bits(next);
    for (int64_t row = 0, count, fetched = 0; row < rows; row += count) {
      count = map.schedule.rows_alike(positions[row], rows - row < kProductRows ? rows - row : kProductRows);
      // The next tile's share, so that its keys and values are under way while this tile's products run.
      for (const int64_t until = (row + count) * kKeyTile / rows; fetched < until; ++fetched) {
        if (wanted >> fetched & 1) fetch_key(params, map, queries, next * kKeyTile + fetched);
      }
      forward_block(params, map, queries, loaded, positions + row, places + row, span, buffers, row, count);
    }
  }
  merge_segment(buffers, rows, dv, factor);
  if (partial == nullptr) return finish_rows(params, queries, buffers);
  float* state = static_cast<float*>(partial);
  for (int64_t r = 0; r < rows; ++r, state += state_floats(params)) {
    state[0] = buffers.total_max[r];
    state[1] = buffers.total_sum[r];
    copy_row(buffers.total + r * dv, dv, state + 2);
  }
}

int64_t forward_partial(const AttentionParams& params, int64_t rows) {
  return round_up(rows * state_floats(params) * static_cast<int64_t>(sizeof(float)), 64);
}

void forward_merge(const AttentionParams& params, const QueryTile& queries, const void* partials, int64_t stride,
                   int64_t count, void* memory) {
  ForwardBuffers buffers;
  buffers.bind(params, memory);
  const int64_t dv = padded(params.value_dim), rows = queries.rows();
  const float factor = base2_factor(params);
  zero_rows(buffers.total, rows * dv);
  for (int64_t r = 0; r < rows; ++r) {
    buffers.total_max[r] = -kInfinity;
    buffers.total_sum[r] = 0;
  }
  for (int64_t n = 0; n < count; ++n) {
    const float* state = reinterpret_cast<const float*>(static_cast<const char*>(partials) + n * stride);
    for (int64_t r = 0; r < rows; ++r, state += state_floats(params)) {
      const MergeFactors factors(Vec::broadcast(buffers.total_max[r]), Vec::broadcast(state[0]), factor);
      merge_row(buffers, r, state[0], state[1], state + 2, dv, factors, 0);
    }
  }
  finish_rows(params, queries, buffers);
}

int64_t forward_scratch(const AttentionParams& params) {
  ForwardBuffers buffers;
  return buffers.bind(params, nullptr);
}
