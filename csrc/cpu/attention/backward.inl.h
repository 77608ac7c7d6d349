// SPDX-License-Identifier: Apache-2.0
// The backward pass in vectors. One step takes up to kBackwardRows queries of a head against one key tile:
//   p = 2^(s - lse),  g = grad_out v^T,  ds = p (g - delta) scale   (times softcap's slope)
//   grad_query += ds k,  grad_key += ds^T q,  grad_value += p^T grad_out
// Steps run in a fixed order (keys ascending for a query, heads then queries ascending for a key), and what each adds
// does not depend on who runs it, so that one pass and two passes, and any number of threads, give the same bits. With
// rotation, ds k and ds^T q are taken in the tile's rotated frame and turned back before they are added. Include after
// forward.inl.h.

// A key's gradients are summed over this many steps, and those sums over all: a sink has as many queries as the
// sequence, and one chain over them would lose accuracy.
constexpr int64_t kSumSteps = 4;

struct BackwardBuffers {
  // The key tile.
  float* key_columns = nullptr;    // [padded D, 64] as in the forward pass
  float* key_far = nullptr;        // [padded D, 64]
  float* value_columns = nullptr;  // [padded Dv, 64]
  float* key_rows = nullptr;       // [64, padded D] rotated
  float* key_copy = nullptr;       // [64, padded D] unrotated, where the rows themselves will not do
  float* value_copy = nullptr;     // [64, padded Dv] converted to float32
  float* grad_key = nullptr;       // [64, padded D] of the open steps
  float* grad_value = nullptr;     // [64, padded Dv], right behind it
  float* grad_key_far = nullptr;   // [64, padded D], right behind that
  float* totals = nullptr;         // the three, of the steps before
  // The queries.
  float* query = nullptr;          // [64, padded D] rotated for the tile, or a copy
  float* query_far = nullptr;      // [64, padded D] rotated by the limit
  float* grad_query = nullptr;     // [6, padded D] in the rotated frame
  float* weights = nullptr;        // [64, 64] p
  float* grad_scores = nullptr;    // [64, 64] ds
  float* scores_far = nullptr;     // [6, 64]
  float* query_copy = nullptr;     // [64, padded D] converted to float32
  float* grad_out_copy = nullptr;  // [64, padded Dv]
  float* slopes = nullptr;         // [6, 64] of softcap
  float* strip = nullptr;          // [strip_length] biases
  float* grad_strip = nullptr;     // [strip_length] their gradient

  // Floats of grad_key, grad_value and, where there is rotation, grad_key_far.
  static int64_t sums(const AttentionParams& params) {
    return kKeyTile * (padded(params.head_dim) * (params.rope_cos ? 2 : 1) + padded(params.value_dim));
  }

  int64_t bind(const AttentionParams& params, void* memory) {
    const int64_t d = padded(params.head_dim), dv = padded(params.value_dim);
    const bool rope = params.rope_cos != nullptr;
    Scratch scratch{static_cast<char*>(memory)};
    key_columns = scratch.take(d * kKeyTile);
    value_columns = scratch.take(dv * kKeyTile);
    key_copy = scratch.take(kKeyTile * d);
    grad_key = scratch.take(sums(params));
    grad_value = grad_key + kKeyTile * d;
    grad_key_far = grad_value + kKeyTile * dv;
    totals = scratch.take(sums(params));
    grad_query = scratch.take(kProductRows * d);
    weights = scratch.take(kBackwardRows * kKeyTile);
    grad_scores = scratch.take(kBackwardRows * kKeyTile);
    query = scratch.take(kBackwardRows * d);
    if (params.dtype != DType::kFloat32) {
      value_copy = scratch.take(kKeyTile * dv);
      query_copy = scratch.take(kBackwardRows * d);
      grad_out_copy = scratch.take(kBackwardRows * dv);
    }
    if (params.softcap > 0) slopes = scratch.take(kProductRows * kKeyTile);
    if (has_bias(params)) {
      strip = scratch.take(strip_length(most_places(params, kBackwardRows)));
      grad_strip = scratch.take(strip_length(most_places(params, kBackwardRows)));
    }
    if (rope) {
      key_far = scratch.take(d * kKeyTile);
      key_rows = scratch.take(kKeyTile * d);
      query_far = scratch.take(kBackwardRows * d);
      scores_far = scratch.take(kProductRows * kKeyTile);
    }
    return scratch.used;
  }
};

// Row-major keys for grad_query, beside what the forward pass loads.
struct BackwardTile {
  int64_t tile;
  uint64_t present;
  const float* key;  // unrotated
  int64_t key_stride;
};

// `reached`: keys that some query keeps; others are not read.
PYCORE_INLINE BackwardTile load_backward_tile(const AttentionParams& params, const RowMap& map, int64_t b,
                                              int64_t kv_head, int64_t tile, uint64_t reached,
                                              const BackwardBuffers& buffers) {
  BackwardTile loaded;
  loaded.tile = tile;
  loaded.present = map.present_bits(tile) & reached;
  if (loaded.present == 0) return loaded;
  TileRows keys, values, rotated;
  tile_rows(params, params.key, params.key_strides, map, b, kv_head, tile, loaded.present, params.head_dim,
            buffers.key_copy, &keys);
  tile_rows(params, params.value, params.value_strides, map, b, kv_head, tile, loaded.present, params.value_dim,
            buffers.value_copy, &values);
  loaded.key = matrix_rows(params, keys, loaded.present, map.contiguous(tile), params.key_strides.row, params.head_dim,
                           buffers.key_copy, &loaded.key_stride);
  transpose_rows(values, params.value_dim, buffers.value_columns);
  if (params.rope_cos) {
    rotate_rows(params, map.schedule, tile, keys, padded(params.head_dim), buffers.key_rows, &rotated);
    transpose_rows(rotated, params.head_dim, buffers.key_columns);
    if (params.distance_limit < map.positions()) transpose_rows(keys, params.head_dim, buffers.key_far);
  } else {
    transpose_rows(keys, params.head_dim, buffers.key_columns);
  }
  return loaded;
}

// Bit r of out[c] is bit c of in[r].
PYCORE_INLINE void transpose_bits(const uint64_t* in, int64_t rows, uint64_t* out) {
  for (int64_t c = 0; c < kKeyTile; ++c) out[c] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (uint64_t bits = in[r]; bits; bits &= bits - 1) out[__builtin_ctzll(bits)] |= uint64_t{1} << r;
  }
}

// grad[c] += sum over kept rows r of A[r][c] B[r], for the tile's 64 keys.
PYCORE_INLINE void accumulate_columns(const uint64_t* row_bits, int64_t rows, const float* a, const float* b,
                                      int64_t b_row, int64_t n, float* grad, int64_t grad_row) {
  uint64_t columns[kKeyTile], all = ~uint64_t{0}, any = 0;
  for (int64_t r = 0; r < rows; ++r) {
    all &= row_bits[r];
    any |= row_bits[r];
  }
  if (any == 0) return;
  const bool full = all == ~uint64_t{0};
  if (!full) transpose_bits(row_bits, rows, columns);
  for (int64_t c = 0; c < kKeyTile; c += kProductRows) {
    const int64_t count = kKeyTile - c < kProductRows ? kKeyTile - c : kProductRows;
    BlockKeeps keeps;
    for (int m = 0; m < count; ++m) keeps.set(m, full ? bit_range(0, rows) : columns[c + m]);
    accumulate_kept<true>(count, keeps, a + c, kKeyTile, b, b_row, n, grad + c * grad_row, grad_row);
  }
}

// `count` rows of query or grad_out in float32: where they lie, or converted into `copy`.
PYCORE_INLINE const float* query_rows(const AttentionParams& params, const void* data, const AttentionStrides& strides,
                                      int64_t b, int64_t h, int64_t first, int64_t count, int64_t n, float* copy,
                                      int64_t* stride) {
  const char* rows = row_of(params, data, strides, b, h, first);
  *stride = params.dtype == DType::kFloat32 ? strides.row : padded(n);
  if (params.dtype == DType::kFloat32) return reinterpret_cast<const float*>(rows);
  for (int64_t r = 0; r < count; ++r) {
    load_row(params.dtype, row_of(params, data, strides, b, h, first + r), n, copy + r * *stride);
  }
  return copy;
}

// out += x.
PYCORE_INLINE void add_row(const float* x, int64_t n, float* out) {
  int64_t at = 0;
  for (; at + Vec::kWidth <= n; at += Vec::kWidth) (Vec::load(out + at) + Vec::load(x + at)).store(out + at);
  if (at < n) (Vec::load_first(out + at, n - at) + Vec::load_first(x + at, n - at)).store_first(out + at, n - at);
}

// Rows first..first+count-1 of head h against the loaded tile.
__attribute__((noinline)) void backward_step(const AttentionBackwardParams& params, const RowMap& map, int64_t b,
                                             int64_t h, int64_t first, int64_t count, const BackwardTile& loaded,
                                             BackwardParts parts, const BackwardBuffers& buffers) {
  const AttentionParams& forward = params.forward;
  const int64_t d = padded(forward.head_dim), dv = padded(forward.value_dim), tile = loaded.tile;
  const int64_t base = tile * kKeyTile, p_first = map.query_position(first);
  const bool rope = forward.rope_cos != nullptr;
  uint64_t near_bits[kBackwardRows], far[kBackwardRows], kept[kBackwardRows];
  uint64_t any_near = 0, any_far = 0;
  int64_t places[kBackwardRows];
  const Places span(map, first, count, places);
  const bool in_place = map.schedule.in_place(tile);
  const bool alike = map.schedule.keep_alike(p_first, p_first + count - 1, tile);
  const int64_t index = row_index(forward, b, h, first);
  const float* lse = static_cast<const float*>(forward.lse) + index;
  const float* lse_low = static_cast<const float*>(forward.lse_low) + index;
  uint64_t bits = 0;
  for (int64_t r = 0; r < count; ++r) {
    if (r == 0 || !alike) bits = map.schedule.keep_bits(p_first + r, tile) & loaded.present;
    kept[r] = lse[r] == -kInfinity ? 0 : bits;  // a row whose logits are all -inf has no weights
    const uint64_t beyond = far_bits(forward, map.schedule, places[r], tile);
    far[r] = kept[r] & beyond;
    near_bits[r] = kept[r] & ~beyond;
    any_near |= near_bits[r];
    any_far |= far[r];
  }
  if (!(any_near | any_far)) return;

  int64_t query_stride, grad_out_stride;
  const float* queries = query_rows(forward, forward.query, forward.query_strides, b, h, first, count, forward.head_dim,
                                    buffers.query_copy, &query_stride);
  const float* grad_out = query_rows(forward, params.grad_out, params.grad_out_strides, b, h, first, count,
                                     forward.value_dim, buffers.grad_out_copy, &grad_out_stride);
  const float* query_near = queries;
  int64_t near_stride = query_stride;
  if (rope) {
    for (int64_t r = 0; r < count; ++r) {
      const float* query = queries + r * query_stride;
      if (near_bits[r]) rotate(forward, query, places[r] - base, buffers.query + r * d);
      if (far[r]) rotate(forward, query, forward.distance_limit, buffers.query_far + r * d);
    }
    query_near = buffers.query;
    near_stride = d;
  }
  const float* delta = static_cast<const float*>(params.delta) + index;
  const Vec factor = Vec::broadcast(base2_factor(forward));
  const double natural = natural_factor(forward);
  const Vec scale = Vec::broadcast(static_cast<float>(forward.scale));
  const bool plain = plain_logits(forward);
  if (buffers.strip && in_place) fill_strip(forward, b, h, span, tile, buffers.strip);
  if (parts.bias) zero_rows(buffers.grad_strip, round_up(strip_length(span.count()), Vec::kWidth));

  for (int64_t row = 0; row < count; row += kProductRows) {
    const int64_t rows = count - row < kProductRows ? count - row : kProductRows;
    BlockKeeps keeps, keeps_near, keeps_far;
    for (int m = 0; m < rows; ++m) {
      keeps.set(m, kept[row + m]);
      keeps_near.set(m, near_bits[row + m]);
      keeps_far.set(m, far[row + m]);
    }
    if (keeps.any == 0) continue;
    const int64_t begin = keeps.first() / Vec::kWidth * Vec::kWidth, end = round_up(keeps.end(), Vec::kWidth);
    float* weights = buffers.weights + row * kKeyTile;
    float* grad_scores = buffers.grad_scores + row * kKeyTile;
    if (keeps_near.any) {
      tile_product<false>(rows, forward.head_dim, query_near + row * near_stride, near_stride, buffers.key_columns,
                          kKeyTile, begin, end, StoreBlock{weights, kKeyTile});
    }
    if (keeps_far.any) {
      float* scores = keeps_near.any ? buffers.scores_far : weights;
      tile_product<false>(rows, forward.head_dim, buffers.query_far + row * d, d, buffers.key_far, kKeyTile, begin, end,
                          StoreBlock{scores, kKeyTile});
      for (int m = 0; m < rows && keeps_near.any; ++m) {
        for (int64_t c = begin; c < end; c += Vec::kWidth) {
          const int64_t at = m * kKeyTile + c;
          Vec::load(scores + at).select(far[row + m] >> c, Vec::load(weights + at)).store(weights + at);
        }
      }
    }
    tile_product<false>(rows, forward.value_dim, grad_out + row * grad_out_stride, grad_out_stride,
                        buffers.value_columns, kKeyTile, begin, end, StoreBlock{grad_scores, kKeyTile});
    for (int m = 0; m < rows; ++m) {
      // lse in base 2 as a sum of two floats: rounded to one, it would be the largest error of every weight.
      const double exact = (static_cast<double>(lse[row + m]) + lse_low[row + m]) / natural;
      const float rounded = static_cast<float>(exact);
      const Vec row_lse = Vec::broadcast(-rounded), row_rest = Vec::broadcast(static_cast<float>(exact - rounded));
      const Vec row_delta = Vec::broadcast(delta[row + m]);
      float* row_weights = weights + m * kKeyTile;
      float* row_grads = grad_scores + m * kKeyTile;
      float* row_slopes = buffers.slopes ? buffers.slopes + m * kKeyTile : nullptr;
      const int64_t behind = span.hi - places[row + m];  // places of this step after this query's
      float biases[kKeyTile];
      const float* row_biases = buffers.strip ? buffers.strip + behind : nullptr;
      if (buffers.strip && !in_place) {
        fill_biases(forward, map.schedule, b, h, places[row + m], tile, biases);
        row_biases = biases;
      }
      float products[kKeyTile], grads[kKeyTile];
      if (parts.rows) copy_row(row_weights + begin, end - begin, products + begin);
      // Columns that are not kept may hold anything here; accumulate_kept never reads them.
      if (!plain) {
        logits_of(forward, row_weights, begin, end, row_biases, row_slopes);
        if (forward.block_bias) add_block_bias(forward, h, p_first + row + m, tile, row_weights, begin, end);
      }
      uint64_t dropped = 0;
      if (forward.dropout_p > 0) {
        dropped = dropped_keys(forward, b, h, p_first + row + m, tile, keeps.bits[m]);
        drop_out(forward, row_grads, begin, end, dropped);
      }
      if (parts.rows) copy_row(row_grads + begin, end - begin, grads + begin);
      for (int64_t c = begin; c < end; c += Vec::kWidth) {
        const Vec score = Vec::load(row_weights + c);
        const Vec p = (Vec::fma(score, factor, row_lse) - row_rest).exp2();
        p.store(row_weights + c);
        Vec grad = p * (Vec::load(row_grads + c) - row_delta);
        if (parts.bias && in_place) {
          float* sum = buffers.grad_strip + behind + c;
          (Vec::load(sum) + grad.select(keeps.bits[m] >> c, Vec::zero())).store(sum);
        } else if (parts.bias) {
          grad.store(biases + c);
        }
        if (row_slopes) grad = grad * Vec::load(row_slopes + c);
        (grad * scale).store(row_grads + c);
      }
      if (parts.rows) {
        add_row_sums(forward, map.schedule, places[row + m] - base, tile, products, row_weights, grads, begin, end,
                     keeps.bits[m], parts.rows + row + m);
      }
      if (forward.dropout_p > 0) drop_out(forward, row_weights, begin, end, dropped);
      for (uint64_t left = parts.bias && !in_place ? keeps.bits[m] : 0; left; left &= left - 1) {
        const int64_t c = __builtin_ctzll(left), distance = places[row + m] - base - key_turn(map.schedule, tile, c);
        parts.bias[bias_index(forward, distance)] += biases[c];
      }
    }
    if (!parts.query) continue;
    float* grad_query = static_cast<float*>(params.grad_query) + (index + row) * forward.head_dim;
    // The tile's share is one chain of FMAs, turned back and then added to what earlier tiles gave.
    const auto add_share = [&](const BlockKeeps& part, const float* key, int64_t key_stride, bool is_far) {
      zero_rows(buffers.grad_query, rows * d);
      accumulate_kept<false>(rows, part, grad_scores, kKeyTile, key, key_stride, forward.head_dim, buffers.grad_query,
                             d);
      for (int m = 0; m < rows; ++m) {
        if (part.bits[m] == 0) continue;
        float* share = buffers.grad_query + m * d;
        if (rope) rotate(forward, share, is_far ? -forward.distance_limit : base - places[row + m], share);
        add_row(share, forward.head_dim, grad_query + m * forward.head_dim);
      }
    };
    if (keeps_near.any) {
      add_share(keeps_near, rope ? buffers.key_rows : loaded.key, rope ? d : loaded.key_stride, false);
    }
    if (keeps_far.any) add_share(keeps_far, loaded.key, loaded.key_stride, true);
  }

  if (parts.bias && in_place) {
    const int64_t distance = span.hi - base;
    for (int64_t t = 0; t < strip_length(span.count()); ++t) {
      parts.bias[bias_index(forward, distance - t)] += buffers.grad_strip[t];
    }
  }
  if (!parts.key_value) return;
  accumulate_columns(kept, count, buffers.weights, grad_out, grad_out_stride, forward.value_dim, buffers.grad_value,
                     dv);
  if (any_near) {
    accumulate_columns(near_bits, count, buffers.grad_scores, query_near, near_stride, forward.head_dim,
                       buffers.grad_key, d);
  }
  if (any_far) {
    accumulate_columns(far, count, buffers.grad_scores, buffers.query_far, d, forward.head_dim, buffers.grad_key_far,
                       d);
  }
}

void delta(const AttentionBackwardParams& params, int64_t b, int64_t h, int64_t first, int64_t count, void* memory) {
  const AttentionParams& forward = params.forward;
  const int64_t n = forward.value_dim;
  BackwardBuffers buffers;
  buffers.bind(forward, memory);
  AttentionStrides out_strides;
  out_strides.row = n;
  out_strides.head = n * forward.query_length;
  out_strides.batch = out_strides.head * forward.heads;
  // A lane a row, and one chain of FMAs over the channels as in <grad_out, v>: where a row keeps one key, the two then
  // cancel as they should.
  for (int64_t i = first; i < first + count; i += Vec::kWidth) {
    const int64_t lanes = first + count - i < Vec::kWidth ? first + count - i : Vec::kWidth;
    const int64_t row = row_index(forward, b, h, i);
    int64_t grad_stride, out_stride;
    const float* grad_out = query_rows(forward, params.grad_out, params.grad_out_strides, b, h, i, lanes, n,
                                       buffers.grad_out_copy, &grad_stride);
    const float* out =
        query_rows(forward, forward.out, out_strides, b, h, i, lanes, n, buffers.value_copy, &out_stride);
    Vec sum = Vec::zero();
    for (int64_t c = 0; c < n; c += Vec::kWidth) {
      const int64_t channels = n - c < Vec::kWidth ? n - c : Vec::kWidth;
      Vec x[Vec::kWidth], y[Vec::kWidth];
      for (int64_t r = 0; r < Vec::kWidth; ++r) {
        x[r] = r < lanes ? Vec::load_first(grad_out + r * grad_stride + c, channels) : Vec::zero();
        y[r] = r < lanes ? Vec::load_first(out + r * out_stride + c, channels) : Vec::zero();
      }
      transpose(x);
      transpose(y);
      for (int64_t d = 0; d < channels; ++d) sum = Vec::fma(x[d], y[d], sum);
    }
    if (params.grad_lse) sum = sum - Vec::load_first(static_cast<const float*>(params.grad_lse) + row, lanes);
    sum.store_first(static_cast<float*>(params.delta) + row, lanes);
  }
}

void grad_query(const AttentionBackwardParams& params, const RowMap& map, const QueryTile& queries, BackwardParts parts,
                void* memory) {
  const AttentionParams& forward = params.forward;
  BackwardBuffers buffers;
  buffers.bind(forward, memory);
  const int64_t p_lo = map.query_position(queries.first), p_hi = p_lo + queries.count - 1;
  for (int64_t tile = map.next_tile(p_lo, p_hi, 0); tile != kNoTile; tile = map.next_tile(p_lo, p_hi, tile + 1)) {
    if (map.schedule.cover(p_lo, p_hi, tile) == Cover::kNone) continue;
    const BackwardTile loaded = load_backward_tile(forward, map, queries.batch, queries.kv_head, tile,
                                                   map.schedule.reach_bits(p_lo, p_hi, tile), buffers);
    if (loaded.present == 0) continue;
    backward_step(params, map, queries.batch, queries.head, queries.first, queries.count, loaded, parts, buffers);
  }
}

void grad_key_value(const AttentionBackwardParams& params, const RowMap& map, int64_t b, int64_t kv_head, int64_t tile,
                    BackwardParts parts, void* memory) {
  const AttentionParams& forward = params.forward;
  BackwardBuffers buffers;
  buffers.bind(forward, memory);
  const int64_t d = padded(forward.head_dim), dv = padded(forward.value_dim);
  const int64_t group = forward.heads / forward.kv_heads;
  const bool rope = forward.rope_cos != nullptr;
  int64_t lo, hi;
  map.schedule.query_range(tile, &lo, &hi);
  const int64_t p0 = map.query_position(0);
  const int64_t first = lo > p0 ? lo - p0 : 0;
  const int64_t last = hi - p0 < map.queries - 1 ? hi - p0 : map.queries - 1;
  if (first > last) return;  // no query reaches the tile: its gradients stay zeros
  uint64_t reached = 0;
  RowMap head_map = map;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    bind_head(forward, b, h, &head_map);
    reached |= head_map.schedule.reach_bits(p0 + first, p0 + last, tile);
  }
  const BackwardTile loaded = load_backward_tile(forward, map, b, kv_head, tile, reached, buffers);
  if (loaded.present == 0) return;
  const int64_t sums = BackwardBuffers::sums(forward);
  zero_rows(buffers.grad_key, sums);
  zero_rows(buffers.totals, sums);
  const auto close_steps = [&]() {
    add_row(buffers.grad_key, sums, buffers.totals);
    zero_rows(buffers.grad_key, sums);
  };

  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    bind_head(forward, b, h, &head_map);
    int64_t open = 0;
    bool added = false;  // a step that keeps no key adds zeros, and so do sums of such steps
    for (int64_t i = first; i <= last; i += kBackwardRows) {
      const int64_t count = last - i + 1 < kBackwardRows ? last - i + 1 : kBackwardRows;
      if (head_map.schedule.cover(p0 + i, p0 + i + count - 1, tile) != Cover::kNone) {
        backward_step(params, head_map, b, h, i, count, loaded, parts, buffers);
        added = true;
      }
      if (++open % kSumSteps == 0 && added) {
        close_steps();
        added = false;
      }
    }
    close_steps();
  }
  float* key = buffers.totals;
  const float* value = key + kKeyTile * d;
  const float* key_far = value + kKeyTile * dv;
  for (int64_t c = 0; c < kKeyTile; ++c) {
    if (!(loaded.present >> c & 1)) continue;
    const int64_t row = key_row_index(forward, b, kv_head, map.key_row(tile * kKeyTile + c));
    if (rope) {
      rotate(forward, key + c * d, -key_turn(map.schedule, tile, c), key + c * d);
      add_row(key_far + c * d, d, key + c * d);
    }
    copy_row(key + c * d, forward.head_dim, static_cast<float*>(params.grad_key) + row * forward.head_dim);
    copy_row(value + c * dv, forward.value_dim, static_cast<float*>(params.grad_value) + row * forward.value_dim);
  }
}

int64_t backward_scratch(const AttentionBackwardParams& params) {
  BackwardBuffers buffers;
  return buffers.bind(params.forward, nullptr);
}
