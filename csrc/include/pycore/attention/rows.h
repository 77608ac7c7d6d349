// SPDX-License-Identifier: Apache-2.0
// Where the rows of an attention problem lie in memory, what a pair of rows adds to its logit, and the rotation of one
// row; what depends on positions alone is for host and device. Internal linkage throughout: every instruction set
// includes this, and none may lend another its copy.
#pragma once

#include <pycore/attention/attention.h>
#include <pycore/dtype.h>
#include <pycore/philox.h>

#include <cstdint>

namespace pycore {
namespace {

// A row of query, key, value or grad_out, in the problem's own dtype.
[[gnu::always_inline]] inline const char* row_of(const AttentionParams& params, const void* data,
                                                 const AttentionStrides& strides, int64_t b, int64_t h, int64_t row) {
  const int64_t element = b * strides.batch + h * strides.head + row * strides.row;
  return static_cast<const char*>(data) + element * dtype_size(params.dtype);
}

// Row `row` of a contiguous [batch, heads, length, channels].
PYCORE_HOST_DEVICE inline int64_t row_index(const AttentionParams& params, int64_t b, int64_t h, int64_t row) {
  return (b * params.heads + h) * params.query_length + row;
}

PYCORE_HOST_DEVICE inline int64_t key_row_index(const AttentionParams& params, int64_t b, int64_t kv_head,
                                                int64_t row) {
  return (b * params.kv_heads + kv_head) * params.key_length + row;
}

// Keys of the tile farther than the distance limit from a query that stands at `place`: their scores use the unrotated
// key.
PYCORE_HOST_DEVICE inline uint64_t far_bits(const AttentionParams& params, const TileSchedule& schedule, int64_t place,
                                            int64_t tile) {
  if (params.rope_cos == nullptr || params.distance_limit >= kFar) return 0;
  const int64_t base = tile * kKeyTile, nearest = place - params.distance_limit;
  if (schedule.in_place(tile)) return tile_bits(base, 0, nearest);
  uint64_t bits = 0;
  PYCORE_ROLLED
  for (int64_t c = 0; c < kKeyTile; ++c) bits |= static_cast<uint64_t>(schedule.place(base + c) < nearest) << c;
  return bits;
}

// By how many positions the key in column c of the tile is rotated.
PYCORE_HOST_DEVICE inline int64_t key_turn(const TileSchedule& schedule, int64_t tile, int64_t c) {
  return schedule.in_place(tile) ? c : schedule.place(tile * kKeyTile + c) - tile * kKeyTile;
}

// The distance that biases see.
PYCORE_HOST_DEVICE inline int64_t seen_distance(const AttentionParams& params, int64_t d) {
  const int64_t seen = d >= 0 ? d : params.symmetric_bias ? -d : 0;
  return seen < params.distance_limit ? seen : params.distance_limit;
}

// Where the bias of distance d lies in a head's row of distance_bias (or of its gradient).
PYCORE_HOST_DEVICE inline int64_t bias_index(const AttentionParams& params, int64_t d) {
  const int64_t seen = seen_distance(params, d);
  return seen < params.bias_length ? seen : params.bias_length - 1;
}

PYCORE_HOST_DEVICE inline bool has_bias(const AttentionParams& params) {
  return params.distance_bias != nullptr || params.alibi_slopes != nullptr;
}

template <class T>
PYCORE_HOST_DEVICE inline T slope_of(const AttentionParams& params, int64_t b, int64_t h) {
  return static_cast<const T*>(params.alibi_slopes)[b * params.slopes_stride + h];
}

template <class T>
PYCORE_HOST_DEVICE inline T bias_of(const AttentionParams& params, int64_t b, int64_t h, int64_t d) {
  if (params.distance_bias) {
    return static_cast<const T*>(params.distance_bias)[h * params.bias_stride + bias_index(params, d)];
  }
  return -slope_of<T>(params, b, h) * static_cast<T>(seen_distance(params, d));
}

// What block_bias adds to the logit of a kept pair: nothing for sinks and in window blocks.
template <class T>
PYCORE_HOST_DEVICE inline T block_bias_of(const AttentionParams& params, int64_t h, int64_t p, int64_t j) {
  const TileSchedule& schedule = params.schedule;
  const int64_t distance = (p >> schedule.block_shift) - (j >> schedule.block_shift);
  if (j < schedule.sink_size || distance < schedule.window_blocks) return 0;
  const int64_t index = distance < params.block_bias_length ? distance : params.block_bias_length - 1;
  return static_cast<const T*>(params.block_bias)[h * params.block_bias_stride + index];
}

// Which of the four keys 4 * quad .. 4 * quad + 3 the query at position p drops: bit k for the k-th.
PYCORE_HOST_DEVICE inline uint32_t dropped_bits(const AttentionParams& params, int64_t b, int64_t h, int64_t p,
                                                int64_t quad) {
  const PhiloxWords words = philox(
      {{static_cast<uint32_t>(quad), static_cast<uint32_t>(p), static_cast<uint32_t>(h), static_cast<uint32_t>(b)}},
      static_cast<uint64_t>(*params.dropout_seed));
  const uint64_t threshold = static_cast<uint64_t>(params.dropout_p * 4294967296.0);
  uint32_t bits = 0;
  for (int k = 0; k < 4; ++k) bits |= static_cast<uint32_t>(words.word[k] < threshold) << k;
  return bits;
}

// The same for a whole tile, looking only where `kept` has bits.
PYCORE_HOST_DEVICE inline uint64_t dropped_keys(const AttentionParams& params, int64_t b, int64_t h, int64_t p,
                                                int64_t tile, uint64_t kept) {
  uint64_t dropped = 0;
  PYCORE_ROLLED
  for (int64_t quad = 0; quad < kKeyTile / 4; ++quad) {
    if (kept >> (4 * quad) & 15) {
      dropped |= static_cast<uint64_t>(dropped_bits(params, b, h, p, tile * (kKeyTile / 4) + quad)) << (4 * quad);
    }
  }
  return dropped;
}

// out = x rotated by `distance` positions (negative: backwards). out and x may be the same row.
template <class T>
[[gnu::always_inline]] inline void rotate_row(const AttentionParams& params, const T* x, int64_t distance, T* out) {
  const int64_t half = params.rope_dim / 2;
  const int64_t row = distance < 0 ? -distance : distance;
  const T* cosine = static_cast<const T*>(params.rope_cos) + row * params.rope_stride;
  const T* sine = static_cast<const T*>(params.rope_sin) + row * params.rope_stride;
  const T sign = distance < 0 ? T(-1) : T(1);
  if (params.rope_interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const T a = x[2 * i], b = x[2 * i + 1], s = sign * sine[i];
      out[2 * i] = a * cosine[i] - b * s;
      out[2 * i + 1] = b * cosine[i] + a * s;
    }
  } else {
    for (int64_t i = 0; i < half; ++i) {
      const T a = x[i], b = x[half + i], s = sign * sine[i];
      out[i] = a * cosine[i] - b * s;
      out[half + i] = b * cosine[i] + a * s;
    }
  }
  if (out != x) {
    for (int64_t i = params.rope_dim; i < params.head_dim; ++i) out[i] = x[i];
  }
}

}  // namespace
}  // namespace pycore
