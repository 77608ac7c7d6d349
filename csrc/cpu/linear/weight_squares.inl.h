// SPDX-License-Identifier: Apache-2.0
// Rows as the products want them: squares of weight rows, transposed; panels of 16 bits; and rows of x, in float32 or
// as pairs of bfloat16.
#pragma once

#include <pycore/dtype.h>

#include <cstdint>

#include "../vector_rows.inl.h"

constexpr int64_t kLineBytes = 64;

// Channels of a square.
template <DType kType>
constexpr int64_t kSquare = Vec::kWidth * 4 / kElementBytes<kType>;

// square[j], lane i: the j-th 32 bits of rows[i] from byte `at` on. The second form reads only `bytes` of them; the
// others are zero.
PYCORE_INLINE void load_square(const char* const* rows, int64_t at, Vec (&square)[Vec::kWidth]) {
  for (int i = 0; i < Vec::kWidth; ++i) square[i] = Vec::load(reinterpret_cast<const float*>(rows[i] + at));
  transpose(square);
}
PYCORE_INLINE void load_square_first(const char* const* rows, int64_t at, int64_t bytes, Vec (&square)[Vec::kWidth]) {
  for (int i = 0; i < Vec::kWidth; ++i) {
    float part[Vec::kWidth] = {};
    __builtin_memcpy(part, rows[i] + at, static_cast<size_t>(bytes));
    square[i] = Vec::load(part);
  }
  transpose(square);
}

// Lanes of a square, parted: of two float16, all first ones and all second ones.
template <DType kType>
PYCORE_INLINE Vec parted(Vec lanes) {
  if constexpr (kType == DType::kFloat16) return lanes.parted();
  return lanes;
}
// The first or the second of each parted lane's two numbers; float32 has one.
template <DType kType, int kWhich>
PYCORE_INLINE Vec channel_of(Vec lanes) {
  if constexpr (kType == DType::kFloat32) return lanes;
  if constexpr (kType == DType::kBFloat16) return kWhich == 0 ? lanes.low_bfloat16() : lanes.high_bfloat16();
  return kWhich == 0 ? lanes.first_float16() : lanes.last_float16();
}

// Whether a lane's two numbers are multiplied where they are.
template <DType kType>
constexpr bool kPairs = kType == DType::kBFloat16 && Vec::kMultipliesPairs;

// A row of 16 bits as lanes of two numbers, the first in the high half. Beside a last one stands -1: what it is
// multiplied with is +0, and adding -0 changes nothing.
PYCORE_INLINE void pair_row(const char* row, int64_t n, float* out) {
  uint32_t* const lanes = reinterpret_cast<uint32_t*>(out);
  int64_t j = 0;
#ifdef PYCORE_BFLOAT16_PRODUCTS
  for (; 2 * (j + Vec::kWidth) <= n; j += Vec::kWidth) {
    Vec::load(reinterpret_cast<const float*>(row + 4 * j)).turned().store(out + j);
  }
#endif
  for (; 2 * j + 1 < n; ++j) {
    uint32_t lane;
    __builtin_memcpy(&lane, row + 4 * j, 4);
    lane = lane << 16 | lane >> 16;
    __builtin_memcpy(lanes + j, &lane, 4);
  }
  if (n % 2 == 0) return;
  uint16_t last;
  __builtin_memcpy(&last, row + 2 * (n - 1), 2);
  const uint32_t lane = static_cast<uint32_t>(last) << 16 | 0xbf80;
  __builtin_memcpy(lanes + n / 2, &lane, 4);
}

// x as the products want it, from channel k on, an even number.
template <DType kType>
PYCORE_INLINE void prepare_row(const char* row, int64_t n, float* out) {
  if constexpr (kPairs<kType>) {
    pair_row(row, n, out);
  } else {
    convert_row<kType>(row, n, out);
  }
}

// panel[k][i] = rows[i][k], rows of 16 bits `stride` bytes apart.
template <DType kType>
inline void pack_halves(const char* rows, int64_t stride, int64_t count, int64_t depth, float* panel,
                        int64_t panel_row) {
  constexpr int64_t kWidth = Vec::kWidth;
  for (int64_t i = 0; i < count; i += kWidth) {
    const char* row[kWidth];
    for (int64_t j = 0; j < kWidth; ++j) row[j] = rows + smaller(i + j, count - 1) * stride;
    for (int64_t k = 0; k < depth; k += kSquare<kType>) {
      const int64_t channels = smaller(kSquare<kType>, depth - k);
      Vec square[kWidth];
      if (channels == kSquare<kType>) {
        load_square(row, 2 * k, square);
      } else {
        load_square_first(row, 2 * k, 2 * channels, square);
      }
#ifdef PYCORE_BFLOAT16_PRODUCTS
      if constexpr (kPairs<kType>) {
        for (int64_t j = 0; 2 * j < channels; ++j) square[j].turned().store(panel + (k / 2 + j) * panel_row + i);
        continue;
      }
#endif
      float* const out = panel + k * panel_row + i;
      for (int64_t j = 0; 2 * j < channels; ++j) {
        const Vec pairs = parted<kType>(square[j]);
        channel_of<kType, 0>(pairs).store(out + 2 * j * panel_row);
        if (2 * j + 1 < channels) channel_of<kType, 1>(pairs).store(out + (2 * j + 1) * panel_row);
      }
    }
  }
}
