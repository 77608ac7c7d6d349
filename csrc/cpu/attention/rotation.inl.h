// SPDX-License-Identifier: Apache-2.0
// Rotary embedding of rows, in vectors.
#pragma once

#include <pycore/attention/rows.h>

#include <cstdint>

#include "../vector_rows.inl.h"

// rotate_row in vectors, where the pairs lie half a rotation apart. One formula on every instruction set: each half of
// a pair is a product and an FMA.
PYCORE_INLINE void rotate(const AttentionParams& params, const float* x, int64_t distance, float* out) {
  const int64_t half = params.rope_dim / 2;
  if (params.rope_interleaved) return rotate_row<float>(params, x, distance, out);
  const int64_t row = distance < 0 ? -distance : distance;
  const float* cosine = static_cast<const float*>(params.rope_cos) + row * params.rope_stride;
  const float* sine = static_cast<const float*>(params.rope_sin) + row * params.rope_stride;
  const Vec sign = Vec::broadcast(distance < 0 ? -1.0f : 1.0f);
  for (int64_t i = 0; i < half; i += Vec::kWidth) {
    const int64_t count = smaller(half - i, Vec::kWidth);
    const Vec a = load_lanes(x + i, count), b = load_lanes(x + half + i, count);
    const Vec c = load_lanes(cosine + i, count), s = load_lanes(sine + i, count) * sign;
    store_lanes(Vec::fnma(b, s, a * c), out + i, count);
    store_lanes(Vec::fma(a, s, b * c), out + half + i, count);
  }
  if (out != x) copy_row(x + params.rope_dim, params.head_dim - params.rope_dim, out + params.rope_dim);
}

// Rotates every present row of tile `tile` by its place in it into `out`, whose rows are padded(head_dim) apart.
PYCORE_INLINE void rotate_rows(const AttentionParams& params, const TileSchedule& schedule, int64_t tile,
                               const TileRows& keys, float* out, TileRows* rotated) {
  const int64_t stride = padded(params.head_dim);
  for (int64_t c = 0; c < kKeyTile; ++c) {
    rotated->rows[c] = keys.rows[c] ? out + c * stride : nullptr;
    if (keys.rows[c]) rotate(params, keys.rows[c], key_turn(schedule, tile, c), out + c * stride);
  }
}
