// SPDX-License-Identifier: Apache-2.0
// Attention in plain loops, one query row at a time: the definition every faster kernel is tested against.
//   s_j = scale * <q rotated, k_j rotated>,  p_j = exp(s_j - lse),  out = sum_j p_j v_j
// The softmax runs online: a key tile at a time inside a segment, then the segments' (max, sum, accumulator) merge
// in order. Backward recomputes p from lse:  ds_j = p_j (<grad_out, v_j> - delta) * scale.
#include "attention_kernels.h"
#include "attention_rows.h"

#include <cmath>
#include <limits>

namespace pycore {
namespace scalar {
namespace {

constexpr int64_t kRows = 64;

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

// One query row against one key tile: the keys as this row sees them, and their scores.
template <class T>
struct RowTile {
  const AttentionParams& params;
  const RowMap& map;
  int64_t b, h, kv_head, i, tile;
  uint64_t kept, far;
  const T* query;  // unrotated
  T* query_near;   // rotated by p - base
  T* query_far;    // rotated by the distance limit
  T* key_near;     // one key, rotated by j - base

  RowTile(const AttentionParams& params, const RowMap& map, int64_t b, int64_t h, int64_t i, int64_t tile, T* scratch)
      : params(params), map(map), b(b), h(h), kv_head(h / (params.heads / params.kv_heads)), i(i), tile(tile) {
    const int64_t p = map.query_position(i);
    kept = params.schedule.keep_bits(p, tile) & map.present_bits(tile);
    far = far_bits(params, p, tile);
    query = row_of<T>(params.query, params.query_strides, b, h, i);
    query_near = scratch;
    query_far = scratch + params.head_dim;
    key_near = scratch + 2 * params.head_dim;
    if (!params.rope_cos || kept == 0) return;
    if (kept & ~far) rotate_row<T>(params, query, p - tile * kKeyTile, query_near);
    if (kept & far) rotate_row<T>(params, query, params.distance_limit, query_far);
  }

  bool keeps(int64_t c) const { return kept >> c & 1; }
  bool is_far(int64_t c) const { return far >> c & 1; }
  int64_t key_row(int64_t c) const { return map.key_row(tile * kKeyTile + c); }
  const T* value(int64_t c) const { return row_of<T>(params.value, params.value_strides, b, kv_head, key_row(c)); }

  // The query and key whose dot product is the score. The key stays valid until the next call.
  const T* seen_query(int64_t c) const {
    if (!params.rope_cos) return query;
    return is_far(c) ? query_far : query_near;
  }
  const T* seen_key(int64_t c) const {
    const T* key = row_of<T>(params.key, params.key_strides, b, kv_head, key_row(c));
    if (!params.rope_cos || is_far(c)) return key;
    rotate_row<T>(params, key, c, key_near);
    return key_near;
  }
  T score(int64_t c) const {
    return dot(seen_query(c), seen_key(c), params.head_dim) * static_cast<T>(params.scale);
  }
};

template <class T>
struct SoftmaxState {
  T max = -std::numeric_limits<T>::infinity();
  T sum = 0;
  T* accumulator = nullptr;

  void clear(int64_t n) {
    max = -std::numeric_limits<T>::infinity();
    sum = 0;
    for (int64_t d = 0; d < n; ++d) accumulator[d] = 0;
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
int64_t forward_scratch(const AttentionParams& params) {
  const int64_t bytes = static_cast<int64_t>(sizeof(T)) * (3 * params.head_dim + 2 * params.value_dim);
  return (bytes + 63) / 64 * 64;
}

template <class T>
void forward_row(const AttentionParams& params, const RowMap& map, int64_t b, int64_t h, int64_t i, T* scratch) {
  const int64_t n = params.value_dim, p = map.query_position(i);
  SoftmaxState<T> total, segment;
  total.accumulator = scratch + 3 * params.head_dim;
  segment.accumulator = total.accumulator + n;
  total.clear(n);
  segment.clear(n);
  int64_t open_segment = 0;
  const int64_t tiles = (map.positions() + kKeyTile - 1) / kKeyTile;
  for (int64_t tile = params.schedule.next_tile(p, p, 0); tile < tiles;
       tile = params.schedule.next_tile(p, p, tile + 1)) {
    const RowTile<T> row(params, map, b, h, i, tile, scratch);
    if (row.kept == 0) continue;
    if (tile / kSegmentTiles != open_segment) {
      total.merge(segment, n);
      segment.clear(n);
      open_segment = tile / kSegmentTiles;
    }
    T scores[kKeyTile];
    T tile_max = -std::numeric_limits<T>::infinity();
    for (int64_t c = 0; c < kKeyTile; ++c) {
      if (!row.keeps(c)) continue;
      scores[c] = row.score(c);
      if (scores[c] > tile_max) tile_max = scores[c];
    }
    if (tile_max > segment.max) segment.rescale(tile_max, n);
    const T shift = segment.max == -std::numeric_limits<T>::infinity() ? 0 : segment.max;  // so that only NaN gives NaN
    for (int64_t c = 0; c < kKeyTile; ++c) {
      if (!row.keeps(c)) continue;
      const T weight = std::exp(scores[c] - shift);
      segment.sum += weight;
      add_scaled(segment.accumulator, weight, row.value(c), n);
    }
  }
  total.merge(segment, n);
  T* out = static_cast<T*>(params.out) + row_index(params, b, h, i) * n;
  for (int64_t d = 0; d < n; ++d) out[d] = total.sum != 0 ? total.accumulator[d] / total.sum : 0;
  static_cast<T*>(params.lse)[row_index(params, b, h, i)] = total.max + std::log(total.sum);
}

template <class T>
void forward(const AttentionParams& params, const RowMap& map, const QueryTile& tile, void* scratch) {
  for (int64_t h = tile.head; h < tile.head + tile.heads; ++h) {
    for (int64_t i = tile.first; i < tile.first + tile.count; ++i) {
      forward_row<T>(params, map, tile.batch, h, i, static_cast<T*>(scratch));
    }
  }
}

// scratch: 3 head_dim for RowTile, then this row's gradients of one tile, then the key tile's.
template <class T>
int64_t backward_scratch(const AttentionBackwardParams& params) {
  const int64_t n = params.forward.head_dim, m = params.forward.value_dim;
  const int64_t bytes = static_cast<int64_t>(sizeof(T)) * (5 * n + kKeyTile * (2 * n + m));
  return (bytes + 63) / 64 * 64;
}

template <class T>
void delta(const AttentionBackwardParams& params, int64_t b, int64_t h, int64_t first, int64_t count) {
  const int64_t n = params.forward.value_dim;
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t row = row_index(params.forward, b, h, i);
    const T* grad_out = row_of<T>(params.grad_out, params.grad_out_strides, b, h, i);
    const T sum = dot(grad_out, static_cast<const T*>(params.forward.out) + row * n, n);
    static_cast<T*>(params.delta)[row] = sum - (params.grad_lse ? static_cast<const T*>(params.grad_lse)[row] : 0);
  }
}

// One row against one tile: adds to grad_query (if wanted) and to the key tile's gradients (unless null).
template <class T>
void backward_row(const AttentionBackwardParams& params, const RowMap& map, int64_t b, int64_t h, int64_t i,
                  int64_t tile, bool want_query, T* key_near, T* key_far, T* value, T* scratch) {
  const AttentionParams& forward = params.forward;
  const int64_t n = forward.head_dim, m = forward.value_dim;
  const RowTile<T> row(forward, map, b, h, i, tile, scratch);
  if (row.kept == 0) return;
  T* query_near = scratch + 3 * n;
  T* query_far = query_near + n;
  for (int64_t d = 0; d < 2 * n; ++d) query_near[d] = 0;
  const int64_t index = row_index(forward, b, h, i);
  const T lse = static_cast<const T*>(forward.lse)[index];
  const T row_delta = static_cast<const T*>(params.delta)[index];
  const T* grad_out = row_of<T>(params.grad_out, params.grad_out_strides, b, h, i);
  for (int64_t c = 0; c < kKeyTile; ++c) {
    if (!row.keeps(c)) continue;
    const T weight = std::exp(row.score(c) - lse);
    const T grad_score = weight * (dot(grad_out, row.value(c), m) - row_delta) * static_cast<T>(forward.scale);
    if (want_query) add_scaled(row.is_far(c) ? query_far : query_near, grad_score, row.seen_key(c), n);
    if (value) {
      add_scaled((row.is_far(c) ? key_far : key_near) + c * n, grad_score, row.seen_query(c), n);
      add_scaled(value + c * m, weight, grad_out, m);
    }
  }
  if (!want_query) return;
  if (forward.rope_cos && row.kept & ~row.far) {
    rotate_row<T>(forward, query_near, tile * kKeyTile - map.query_position(i), query_near);
  }
  if (forward.rope_cos && row.kept & row.far) rotate_row<T>(forward, query_far, -forward.distance_limit, query_far);
  T* grad_query = static_cast<T*>(params.grad_query) + index * n;
  for (int64_t d = 0; d < n; ++d) grad_query[d] += query_near[d] + query_far[d];
}

template <class T>
void grad_query(const AttentionBackwardParams& params, const RowMap& map, const QueryTile& rows, void* scratch) {
  const TileSchedule& schedule = params.forward.schedule;
  const int64_t tiles = (map.positions() + kKeyTile - 1) / kKeyTile;
  for (int64_t i = rows.first; i < rows.first + rows.count; ++i) {
    const int64_t p = map.query_position(i);
    for (int64_t tile = schedule.next_tile(p, p, 0); tile < tiles; tile = schedule.next_tile(p, p, tile + 1)) {
      backward_row<T>(params, map, rows.batch, rows.head, i, tile, true, nullptr, nullptr, nullptr,
                      static_cast<T*>(scratch));
    }
  }
}

template <class T>
void grad_key_value(const AttentionBackwardParams& params, const RowMap& map, int64_t b, int64_t kv_head, int64_t tile,
                    BackwardParts parts, void* scratch) {
  const AttentionParams& forward = params.forward;
  const int64_t n = forward.head_dim, m = forward.value_dim, group = forward.heads / forward.kv_heads;
  T* near = static_cast<T*>(scratch) + 5 * n;
  T* far = near + kKeyTile * n;
  T* value = far + kKeyTile * n;
  for (int64_t d = 0; d < kKeyTile * (2 * n + m); ++d) near[d] = 0;
  int64_t lo, hi;
  forward.schedule.query_range(tile, &lo, &hi);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    for (int64_t i = 0; i < map.queries; ++i) {
      const int64_t p = map.query_position(i);
      if (p < lo || p > hi) continue;
      backward_row<T>(params, map, b, h, i, tile, parts.query, near, far, value, static_cast<T*>(scratch));
    }
  }
  const uint64_t present = map.present_bits(tile);
  for (int64_t c = 0; c < kKeyTile; ++c) {
    if (!(present >> c & 1)) continue;
    const int64_t row = key_row_index(forward, b, kv_head, map.key_row(tile * kKeyTile + c));
    if (forward.rope_cos) rotate_row<T>(forward, near + c * n, -c, near + c * n);
    T* grad_key = static_cast<T*>(params.grad_key) + row * n;
    T* grad_value = static_cast<T*>(params.grad_value) + row * m;
    for (int64_t d = 0; d < n; ++d) grad_key[d] = near[c * n + d] + far[c * n + d];
    for (int64_t d = 0; d < m; ++d) grad_value[d] = value[c * m + d];
  }
}

template <class T>
constexpr AttentionKernels kKernels = {kRows,    kRows,         forward_scratch<T>,  forward<T>, backward_scratch<T>,
                                       delta<T>, grad_query<T>, grad_key_value<T>};

}  // namespace

const AttentionKernels attention_float = kKernels<float>;
const AttentionKernels attention_double = kKernels<double>;

}  // namespace scalar
}  // namespace pycore
