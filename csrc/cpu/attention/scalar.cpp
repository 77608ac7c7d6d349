// SPDX-License-Identifier: Apache-2.0
// Attention in plain loops, one query row at a time: the definition every faster kernel is tested against.
//   s_j = softcap(scale * <q rotated, k_j rotated>) + bias,  p_j = exp(s_j - lse),  out = sum_j p_j v_j
// The softmax runs online: a key tile at a time inside a segment, then the segments' (max, sum, accumulator) merge
// in order. Backward recomputes p from lse, kept in two parts:  ds_j = p_j (<grad_out, v_j> - delta).
#include <pycore/attention/rows.h>

#include <cmath>
#include <initializer_list>
#include <limits>

#include "kernels.h"

namespace pycore {
namespace scalar {
namespace {

constexpr int64_t kRows = 64;
// A key's gradients are summed over this many queries, and those sums over all.
constexpr int64_t kSumQueries = 256;

template <class T>
T dot(const T* x, const T* y, int64_t n) {
  T sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

template <class T>
void add_scaled(T* y, T a, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

template <class T>
void clear(T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0;
}

// A row in the accumulation dtype: itself, or converted into `copy`.
template <class T>
const T* load_row(DType dtype, const char* row, int64_t n, T* copy) {
  if (dtype == DType::kFloat32 || dtype == DType::kFloat64) return reinterpret_cast<const T*>(row);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(row);
  for (int64_t i = 0; i < n; ++i) {
    copy[i] = dtype == DType::kFloat16 ? float_from_float16(halves[i]) : float_from_bfloat16(halves[i]);
  }
  return copy;
}

template <class T>
void store_row(DType dtype, const T* x, int64_t n, char* row) {
  for (int64_t i = 0; i < n; ++i) {
    if (dtype == DType::kFloat16) {
      reinterpret_cast<uint16_t*>(row)[i] = float16_from_float(static_cast<float>(x[i]));
    } else if (dtype == DType::kBFloat16) {
      reinterpret_cast<uint16_t*>(row)[i] = bfloat16_from_float(static_cast<float>(x[i]));
    } else {
      reinterpret_cast<T*>(row)[i] = x[i];
    }
  }
}

// Rows of scratch, in the accumulation dtype. The first five belong to RowTile.
template <class T>
struct Rows {
  T *query, *query_near, *query_far, *key, *key_near, *value;
  T *accumulator, *total;                // forward
  T *grad_out, *grad_near, *grad_far;    // backward: this row's
  T *tile_near, *tile_far, *tile_value;  // backward: the key tile's, 64 rows each, one behind the other
  T* tile_totals;                        // the same three, of queries whose sums are closed

  static int64_t tile_sums(const AttentionParams& params) {
    return kKeyTile * (2 * params.head_dim + params.value_dim);
  }

  int64_t bind(const AttentionParams& params, void* memory) {
    const int64_t n = params.head_dim, m = params.value_dim;
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      T* row = static_cast<T*>(memory) + used;
      used += count;
      return row;
    };
    for (T** row : {&query, &query_near, &query_far, &key, &key_near, &grad_near, &grad_far}) *row = take(n);
    for (T** row : {&value, &accumulator, &total, &grad_out}) *row = take(m);
    tile_near = take(kKeyTile * n);
    tile_far = take(kKeyTile * n);
    tile_value = take(kKeyTile * m);
    tile_totals = take(tile_sums(params));
    return (used * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }
};

template <class T>
int64_t scratch_bytes(const AttentionParams& params) {
  return Rows<T>().bind(params, nullptr);
}

// One query row against one key tile: the keys as this row sees them, and their logits.
template <class T>
struct RowTile {
  const AttentionParams& params;
  const RowMap& map;
  const Rows<T>& rows;
  int64_t b, h, kv_head, p, place, tile;
  uint64_t kept, far, dropped = 0;
  const T* query = nullptr;  // unrotated

  RowTile(const AttentionParams& params, const RowMap& map, int64_t b, int64_t h, int64_t i, int64_t tile,
          const Rows<T>& rows)
      : params(params),
        map(map),
        rows(rows),
        b(b),
        h(h),
        kv_head(h / (params.heads / params.kv_heads)),
        p(map.query_position(i)),
        place(map.schedule.place(p)),
        tile(tile) {
    kept = map.schedule.keep_bits(p, tile) & map.present_bits(tile);
    far = far_bits(params, map.schedule, place, tile);
    if (kept == 0) return;
    if (params.dropout_p > 0) dropped = dropped_keys(params, b, h, p, tile, kept);
    query = load_row(params.dtype, row_of(params, params.query, params.query_strides, b, h, i), params.head_dim,
                     rows.query);
    if (!params.rope_cos) return;
    if (kept & ~far) rotate_row<T>(params, query, place - tile * kKeyTile, rows.query_near);
    if (kept & far) rotate_row<T>(params, query, params.distance_limit, rows.query_far);
  }

  bool keeps(int64_t c) const { return kept >> c & 1; }
  bool is_far(int64_t c) const { return far >> c & 1; }
  int64_t key_row(int64_t c) const { return map.key_row(tile * kKeyTile + c); }
  int64_t distance(int64_t c) const { return place - tile * kKeyTile - key_turn(map.schedule, tile, c); }
  // What dropout makes of a weight.
  T keep_factor(int64_t c) const {
    return dropped >> c & 1 ? T(0) : params.dropout_p > 0 ? T(1 / (1 - params.dropout_p)) : T(1);
  }

  // These rows stay valid until the next call.
  const T* value(int64_t c) const {
    if (params.planes) return unpacked(true, c, rows.value);
    const char* row = row_of(params, params.value, params.value_strides, b, kv_head, key_row(c));
    return load_row(params.dtype, row, params.value_dim, rows.value);
  }
  // The query and key whose dot product is the score.
  const T* seen_query(int64_t c) const {
    if (!params.rope_cos) return query;
    return is_far(c) ? rows.query_far : rows.query_near;
  }
  const T* seen_key(int64_t c) const {
    if (params.planes) return unpacked(false, c, rows.key);
    const T* key = held_key(c);
    if (!params.rope_cos || is_far(c)) return key;
    rotate_row<T>(params, key, key_turn(map.schedule, tile, c), rows.key_near);
    return rows.key_near;
  }
  const T* held_key(int64_t c) const {
    if (params.key_channel_stride == 0) {
      const char* row = row_of(params, params.key, params.key_strides, b, kv_head, key_row(c));
      return load_row(params.dtype, row, params.head_dim, rows.key);
    }
    const int64_t row = key_row(c), size = dtype_size(params.dtype);
    const char* tile = row_of(params, params.key, params.key_strides, b, kv_head, row / kKeyTile);
    for (int64_t d = 0; d < params.head_dim; ++d) {
      const char* at = tile + (d * params.key_channel_stride + row % kKeyTile) * size;
      rows.key[d] = *load_row<T>(params.dtype, at, 1, rows.key + d);
    }
    return rows.key;
  }
  // A key or value of a staircase cache.
  const T* unpacked(bool value, int64_t c, T* out) const {
    const StaircasePlanes& planes = *params.planes;
    const StaircaseSide& side = value ? planes.value : planes.key;
    const int64_t j = tile * kKeyTile + c, pair = b * planes.kv_heads + kv_head;
    const StaircaseTile packed(planes, value, pair, tile, map.positions() - 1);
    if (j < planes.sinks || packed.bits == 16) {
      const int64_t row = j < planes.sinks ? j : planes.sinks + j % side.full_rows;
      const int64_t first = (pair * (planes.sinks + side.full_rows) + row) * side.channels;
      for (int64_t d = 0; d < side.channels; ++d) out[d] = staircase_element(planes.dtype, side.full, first + d);
      return out;
    }
    const int64_t groups = token_groups(side, kPackedGroup);
    for (int64_t d = 0; d < side.channels; ++d) {
      const int64_t g = value ? d / kPackedGroup : d, at = value ? d % kPackedGroup : c;
      float step, base;
      packed.grid(value ? c * groups + g : g, &step, &base);
      const int32_t code = packed.code(packed.offset(value ? c : 0, g), packed.count(g), at);
      out[d] = base + static_cast<float>(code) * step;
    }
    return out;
  }
  // The logit, and its derivative by <q, k>.
  T logit(int64_t c, T* slope) const { return logit_of(c, dot(seen_query(c), seen_key(c), params.head_dim), slope); }
  T logit_of(int64_t c, T product, T* slope) const {
    T s = product * static_cast<T>(params.scale);
    *slope = static_cast<T>(params.scale);
    if (params.softcap > 0) {
      const T cap = static_cast<T>(params.softcap), bent = std::tanh(s / cap);
      s = cap * bent;
      *slope *= 1 - bent * bent;
    }
    if (has_bias(params)) s += bias_of<T>(params, b, h, distance(c));
    return params.block_bias ? s + block_bias_of<T>(params, h, p, tile * kKeyTile + c) : s;
  }
};

// A pair with this <q, k> joins its query's sums.
template <class T>
void add_row_sums(const AttentionParams& params, int64_t distance, T product, T weight, T grad, RowSums* sums) {
  const double weighted = static_cast<double>(weight) * grad;
  sums->weight += weight;
  sums->grad += weighted;
  T by_scale = product;
  if (params.softcap > 0) {
    const T x = product * static_cast<T>(params.scale) / static_cast<T>(params.softcap), bent = std::tanh(x);
    sums->softcap.add(weight, weighted, bent - x * (1 - bent * bent));
    by_scale *= 1 - bent * bent;
  }
  sums->scale.add(weight, weighted, by_scale);
  if (params.alibi_slopes) sums->slope.add(weight, weighted, -static_cast<double>(seen_distance(params, distance)));
}

template <class T>
struct SoftmaxState {
  T max = -std::numeric_limits<T>::infinity();
  T sum = 0;
  T* accumulator = nullptr;

  void restart(int64_t n) {
    max = -std::numeric_limits<T>::infinity();
    sum = 0;
    clear(accumulator, n);
  }
  void rescale(T new_max, int64_t n) {
    const T factor = std::exp(max - new_max);
    max = new_max;
    sum *= factor;
    for (int64_t d = 0; d < n; ++d) accumulator[d] *= factor;
  }
  // Adds another state, a later segment's.
  void merge(const SoftmaxState& other, int64_t n) {
    if (other.sum == 0) return;
    if (other.max > max) rescale(other.max, n);
    const T factor = std::exp(other.max - max);  // NaN if both are -inf: then the sum is NaN
    sum += factor * other.sum;
    add_scaled(accumulator, factor, other.accumulator, n);
  }
};

template <class T>
void forward_row(const AttentionParams& params, const RowMap& map, int64_t b, int64_t h, int64_t i,
                 const Rows<T>& rows) {
  const int64_t n = params.value_dim, p = map.query_position(i);
  SoftmaxState<T> total, segment;
  total.accumulator = rows.total;
  segment.accumulator = rows.accumulator;
  total.restart(n);
  segment.restart(n);
  int64_t open_segment = 0;
  for (int64_t tile = map.next_tile(p, p, 0); tile != kNoTile; tile = map.next_tile(p, p, tile + 1)) {
    const RowTile<T> row(params, map, b, h, i, tile, rows);
    if (row.kept == 0) continue;
    if (tile / kSegmentTiles != open_segment) {
      total.merge(segment, n);
      segment.restart(n);
      open_segment = tile / kSegmentTiles;
    }
    T logits[kKeyTile], slope;
    T tile_max = -std::numeric_limits<T>::infinity();
    for (int64_t c = 0; c < kKeyTile; ++c) {
      if (!row.keeps(c)) continue;
      logits[c] = row.logit(c, &slope);
      if (logits[c] > tile_max) tile_max = logits[c];
    }
    if (tile_max > segment.max) segment.rescale(tile_max, n);
    const T shift = segment.max == -std::numeric_limits<T>::infinity() ? 0 : segment.max;  // so that only NaN gives NaN
    for (int64_t c = 0; c < kKeyTile; ++c) {
      if (!row.keeps(c)) continue;
      const T weight = std::exp(logits[c] - shift);
      segment.sum += weight;
      if (!(row.dropped >> c & 1)) add_scaled(segment.accumulator, weight * row.keep_factor(c), row.value(c), n);
    }
  }
  total.merge(segment, n);
  const T none = -std::numeric_limits<T>::infinity();
  const T sink = params.sink_logits ? static_cast<const T*>(params.sink_logits)[h] : none;
  if (sink != none) {  // which adds nothing, and has no distance to a row without a key
    if (sink > total.max) total.rescale(sink, n);
    total.sum += std::exp(sink - total.max);
  }
  for (int64_t d = 0; d < n; ++d) total.accumulator[d] = total.sum != 0 ? total.accumulator[d] / total.sum : 0;
  const int64_t index = row_index(params, b, h, i);
  store_row(params.dtype, total.accumulator, n, static_cast<char*>(params.out) + index * n * dtype_size(params.dtype));
  const double max = total.max, rest = std::log(static_cast<double>(total.sum)), sum = max + rest;
  const T lse = static_cast<T>(sum);
  static_cast<T*>(params.lse)[index] = lse;
  if (params.lse_low) {
    // What rounding to T left out, and before it the addition; of an infinity or NaN, nothing.
    const double seen = sum - max, low = (sum - lse) + ((max - (sum - seen)) + (rest - seen));
    static_cast<T*>(params.lse_low)[index] = static_cast<T>(sum - sum == 0 ? low : 0.0);
  }
}

template <class T>
void forward(const AttentionParams& params, const RowMap& map, const QueryTile& tile, SegmentRange, void* scratch,
             void*) {
  Rows<T> rows;
  rows.bind(params, scratch);
  for (int64_t h = tile.head; h < tile.head + tile.heads; ++h) {
    for (int64_t i = tile.first; i < tile.first + tile.count; ++i) {
      forward_row<T>(params, map, tile.batch, h, i, rows);
    }
  }
}

template <class T>
int64_t backward_scratch(const AttentionBackwardParams& params) {
  return scratch_bytes<T>(params.forward);
}

template <class T>
void delta(const AttentionBackwardParams& params, int64_t b, int64_t h, int64_t first, int64_t count, void* scratch) {
  const AttentionParams& forward = params.forward;
  const int64_t n = forward.value_dim;
  Rows<T> rows;
  rows.bind(forward, scratch);
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t index = row_index(forward, b, h, i);
    const T* grad_out =
        load_row(forward.dtype, row_of(forward, params.grad_out, params.grad_out_strides, b, h, i), n, rows.grad_out);
    const char* out_row = static_cast<const char*>(forward.out) + index * n * dtype_size(forward.dtype);
    const T sum = dot(grad_out, load_row(forward.dtype, out_row, n, rows.value), n);
    static_cast<T*>(params.delta)[index] = sum - (params.grad_lse ? static_cast<const T*>(params.grad_lse)[index] : 0);
  }
}

// One row against one tile: adds to what `parts` names.
template <class T>
void backward_row(const AttentionBackwardParams& params, const RowMap& map, int64_t b, int64_t h, int64_t i,
                  int64_t tile, BackwardParts parts, const Rows<T>& rows) {
  const AttentionParams& forward = params.forward;
  const int64_t n = forward.head_dim, m = forward.value_dim;
  const RowTile<T> row(forward, map, b, h, i, tile, rows);
  const int64_t index = row_index(forward, b, h, i);
  // A row whose logits are all -inf has no weights.
  if (row.kept == 0 || static_cast<const T*>(forward.lse)[index] == -std::numeric_limits<T>::infinity()) return;
  clear(rows.grad_near, n);
  clear(rows.grad_far, n);
  const T lse = static_cast<const T*>(forward.lse)[index], lse_low = static_cast<const T*>(forward.lse_low)[index];
  const T row_delta = static_cast<const T*>(params.delta)[index];
  const T* grad_out =
      load_row(forward.dtype, row_of(forward, params.grad_out, params.grad_out_strides, b, h, i), m, rows.grad_out);
  for (int64_t c = 0; c < kKeyTile; ++c) {
    if (!row.keeps(c)) continue;
    T slope;
    const T product = dot(row.seen_query(c), row.seen_key(c), n);
    const T weight = std::exp(row.logit_of(c, product, &slope) - lse - lse_low), factor = row.keep_factor(c);
    const T grad_weight = factor == 0 ? 0 : factor * dot(grad_out, row.value(c), m);
    const T grad_logit = weight * (grad_weight - row_delta), grad_score = grad_logit * slope;
    if (parts.query) add_scaled(row.is_far(c) ? rows.grad_far : rows.grad_near, grad_score, row.seen_key(c), n);
    if (parts.key_value) {
      add_scaled((row.is_far(c) ? rows.tile_far : rows.tile_near) + c * n, grad_score, row.seen_query(c), n);
      if (factor != 0) add_scaled(rows.tile_value + c * m, weight * factor, grad_out, m);
    }
    if (parts.bias) {
      parts.bias[bias_index(forward, row.distance(c))] += grad_logit;
    }
    if (parts.rows) add_row_sums<T>(forward, row.distance(c), product, weight, grad_weight, parts.rows);
  }
  if (!parts.query) return;
  if (forward.rope_cos && row.kept & ~row.far) {
    rotate_row<T>(forward, rows.grad_near, tile * kKeyTile - row.place, rows.grad_near);
  }
  if (forward.rope_cos && row.kept & row.far) {
    rotate_row<T>(forward, rows.grad_far, -forward.distance_limit, rows.grad_far);
  }
  T* grad_query = static_cast<T*>(params.grad_query) + index * n;
  for (int64_t d = 0; d < n; ++d) grad_query[d] += rows.grad_near[d] + rows.grad_far[d];
}

template <class T>
void grad_query(const AttentionBackwardParams& params, const RowMap& map, const QueryTile& queries, BackwardParts parts,
                void* scratch) {
  Rows<T> rows;
  rows.bind(params.forward, scratch);
  RowSums* const row_sums = parts.rows;
  for (int64_t i = queries.first; i < queries.first + queries.count; ++i) {
    if (row_sums) parts.rows = row_sums + (i - queries.first);
    const int64_t p = map.query_position(i);
    for (int64_t tile = map.next_tile(p, p, 0); tile != kNoTile; tile = map.next_tile(p, p, tile + 1)) {
      backward_row<T>(params, map, queries.batch, queries.head, i, tile, parts, rows);
    }
  }
}

template <class T>
void grad_key_value(const AttentionBackwardParams& params, const RowMap& map, int64_t b, int64_t kv_head, int64_t tile,
                    BackwardParts parts, void* scratch) {
  const AttentionParams& forward = params.forward;
  const int64_t n = forward.head_dim, m = forward.value_dim, group = forward.heads / forward.kv_heads;
  Rows<T> rows;
  rows.bind(forward, scratch);
  const int64_t sums = Rows<T>::tile_sums(forward);
  clear(rows.tile_near, sums);
  clear(rows.tile_totals, sums);
  const auto close_sums = [&]() {
    add_scaled(rows.tile_totals, T(1), rows.tile_near, sums);
    clear(rows.tile_near, sums);
  };
  int64_t lo, hi;
  map.schedule.query_range(tile, &lo, &hi);
  // Of all the queries, those that may reach the tile; others would add zeros.
  const int64_t p0 = map.query_position(0);
  const int64_t first = lo > p0 ? lo - p0 : 0, last = hi - p0 < map.queries - 1 ? hi - p0 : map.queries - 1;
  if (first > last) return;
  RowMap head_map = map;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    bind_head(forward, b, h, &head_map);
    for (int64_t i = first; i <= last; ++i) {
      backward_row<T>(params, head_map, b, h, i, tile, parts, rows);
      if (i % kSumQueries == kSumQueries - 1) close_sums();
    }
    close_sums();
  }
  T* total_near = rows.tile_totals;
  const T* total_far = total_near + kKeyTile * n;
  const T* total_value = total_far + kKeyTile * n;
  const uint64_t present = map.present_bits(tile);
  for (int64_t c = 0; c < kKeyTile; ++c) {
    if (!(present >> c & 1)) continue;
    const int64_t row = key_row_index(forward, b, kv_head, map.key_row(tile * kKeyTile + c));
    T* near = total_near + c * n;
    if (forward.rope_cos) rotate_row<T>(forward, near, -key_turn(map.schedule, tile, c), near);
    T* grad_key = static_cast<T*>(params.grad_key) + row * n;
    T* grad_value = static_cast<T*>(params.grad_value) + row * m;
    for (int64_t d = 0; d < n; ++d) grad_key[d] = near[d] + total_far[c * n + d];
    for (int64_t d = 0; d < m; ++d) grad_value[d] = total_value[c * m + d];
  }
}

template <class T>
constexpr AttentionKernels kKernels = {
    kRows,    kRows,         scratch_bytes<T>, forward<T>, nullptr, nullptr, backward_scratch<T>,
    delta<T>, grad_query<T>, grad_key_value<T>};

}  // namespace

const AttentionKernels attention_float = kKernels<float>;
const AttentionKernels attention_double = kKernels<double>;

}  // namespace scalar
}  // namespace pycore
