// SPDX-License-Identifier: Apache-2.0
// Where the rows of an attention problem lie in memory, and the rotation of one row. Internal linkage throughout:
// every instruction set includes this, and none may lend another its copy.
#pragma once

#include <pycore/attention.h>

#include <cstdint>

namespace pycore {
namespace {

template <class T>
[[gnu::always_inline]] inline const T* row_of(const void* data, const AttentionStrides& strides, int64_t b, int64_t h,
                                              int64_t row) {
  return static_cast<const T*>(data) + b * strides.batch + h * strides.head + row * strides.row;
}

// Row `row` of a contiguous [batch, heads, length, channels].
[[gnu::always_inline]] inline int64_t row_index(const AttentionParams& params, int64_t b, int64_t h, int64_t row) {
  return (b * params.heads + h) * params.query_length + row;
}

[[gnu::always_inline]] inline int64_t key_row_index(const AttentionParams& params, int64_t b, int64_t kv_head,
                                                    int64_t row) {
  return (b * params.kv_heads + kv_head) * params.key_length + row;
}

// Keys of the tile farther than the distance limit from a query at position p: their scores use the unrotated key.
[[gnu::always_inline]] inline uint64_t far_bits(const AttentionParams& params, int64_t p, int64_t tile) {
  return params.rope_cos == nullptr || params.distance_limit >= kFar
             ? 0
             : tile_bits(tile * kKeyTile, 0, p - params.distance_limit);
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
