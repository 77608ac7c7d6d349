// SPDX-License-Identifier: Apache-2.0
// Rows of numbers in memory and in vectors: loading any dtype as float32, storing, copying, adding, and a tile of rows
// turned into columns for the tile product.
#pragma once

#include <pycore/dtype.h>
#include <pycore/key_tile.h>

#include <cstdint>

#include "simd.inl.h"

PYCORE_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
PYCORE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Channel counts in scratch are padded to whole vectors.
PYCORE_INLINE int64_t padded(int64_t channels) { return round_up(channels, Vec::kWidth); }

// Hands out 64-byte aligned pieces of a thread's scratch; with a null base it only adds up their sizes.
struct Scratch {
  char* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* piece = reinterpret_cast<float*>(base + used);
    used += round_up(floats * static_cast<int64_t>(sizeof(float)), 64);
    return piece;
  }
};

// ---- one row --------------------------------------------------------------------------------------------------------

// `count` lanes, 1 to all of a vector; the others are zero, or not written.
PYCORE_INLINE Vec load_lanes(const float* p, int64_t count) {
  return count == Vec::kWidth ? Vec::load(p) : Vec::load_first(p, count);
}
PYCORE_INLINE void store_lanes(Vec x, float* p, int64_t count) {
  if (count == Vec::kWidth) {
    x.store(p);
  } else {
    x.store_first(p, count);
  }
}

PYCORE_INLINE void copy_row(const float* x, int64_t n, float* out) {
  int64_t d = 0;
  for (; d + Vec::kWidth <= n; d += Vec::kWidth) Vec::load(x + d).store(out + d);
  if (d < n) Vec::load_first(x + d, n - d).store_first(out + d, n - d);
}

// Whole vectors.
PYCORE_INLINE void zero_rows(float* x, int64_t floats) {
  for (int64_t d = 0; d < floats; d += Vec::kWidth) Vec::zero().store(x + d);
}

// Whole vectors.
PYCORE_INLINE void scale_row(float* row, int64_t n, Vec factor) {
  for (int64_t d = 0; d < n; d += Vec::kWidth) (Vec::load(row + d) * factor).store(row + d);
}

// out += x.
PYCORE_INLINE void add_row(const float* x, int64_t n, float* out) {
  int64_t at = 0;
  for (; at + Vec::kWidth <= n; at += Vec::kWidth) (Vec::load(out + at) + Vec::load(x + at)).store(out + at);
  if (at < n) (Vec::load_first(out + at, n - at) + Vec::load_first(x + at, n - at)).store_first(out + at, n - at);
}

// A vector of channels from d on, in float32; the second form reads only `count` of them. bfloat16 and float16 are
// exact in float32.
template <DType kType>
PYCORE_INLINE Vec load_channels(const char* row, int64_t d) {
  if constexpr (kType == DType::kFloat32) return Vec::load(reinterpret_cast<const float*>(row) + d);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(row) + d;
  return kType == DType::kBFloat16 ? Vec::load_bfloat16(halves) : Vec::load_float16(halves);
}

template <DType kType>
PYCORE_INLINE Vec load_channels_first(const char* row, int64_t d, int64_t count) {
  if constexpr (kType == DType::kFloat32) return Vec::load_first(reinterpret_cast<const float*>(row) + d, count);
  uint16_t tail[Vec::kWidth] = {};
  __builtin_memcpy(tail, reinterpret_cast<const uint16_t*>(row) + d, static_cast<size_t>(count) * sizeof(uint16_t));
  return kType == DType::kBFloat16 ? Vec::load_bfloat16(tail) : Vec::load_float16(tail);
}

// `count` channels from d on, 1 to all of a vector, in and out of float32; a result is rounded once. The other lanes
// are zero, or not written.
template <DType kType>
PYCORE_INLINE Vec load_some(const char* row, int64_t d, int64_t count) {
  return count == Vec::kWidth ? load_channels<kType>(row, d) : load_channels_first<kType>(row, d, count);
}
template <DType kType>
PYCORE_INLINE void store_some(Vec x, char* row, int64_t d, int64_t count) {
  if constexpr (kType == DType::kFloat32) return store_lanes(x, reinterpret_cast<float*>(row) + d, count);
  uint16_t* const halves = reinterpret_cast<uint16_t*>(row) + d;
  uint16_t part[Vec::kWidth];
  uint16_t* const to = count == Vec::kWidth ? halves : part;
  if constexpr (kType == DType::kBFloat16) {
    x.store_bfloat16(to);
  } else {
    x.store_float16(to);
  }
  if (to == part) __builtin_memcpy(halves, part, static_cast<size_t>(count) * sizeof(uint16_t));
}

template <DType kType>
constexpr int64_t kElementBytes = kType == DType::kFloat32 ? 4 : 2;

template <DType kType>
PYCORE_INLINE void convert_row(const char* row, int64_t n, float* out) {
  int64_t d = 0;
  for (; d + Vec::kWidth <= n; d += Vec::kWidth) load_channels<kType>(row, d).store(out + d);
  if (d < n) load_channels_first<kType>(row, d, n - d).store_first(out + d, n - d);
}

// A row in float32, into `out`.
PYCORE_INLINE void load_row(DType dtype, const char* row, int64_t n, float* out) {
  switch (dtype) {
    case DType::kBFloat16: return convert_row<DType::kBFloat16>(row, n, out);
    case DType::kFloat16: return convert_row<DType::kFloat16>(row, n, out);
    default: return convert_row<DType::kFloat32>(row, n, out);
  }
}

PYCORE_INLINE void store_row(DType dtype, const float* x, int64_t n, char* row) {
  if (dtype == DType::kFloat32) return copy_row(x, n, reinterpret_cast<float*>(row));
  uint16_t* halves = reinterpret_cast<uint16_t*>(row);
  if (dtype == DType::kBFloat16) {
    for (int64_t d = 0; d < n; ++d) halves[d] = bfloat16_from_float(x[d]);
    return;
  }
  int64_t d = 0;
  for (; d + Vec::kWidth <= n; d += Vec::kWidth) Vec::load(x + d).store_float16(halves + d);
  for (; d < n; ++d) halves[d] = float16_from_float(x[d]);
}

// ---- a tile of rows -------------------------------------------------------------------------------------------------

// The rows of one tile in float32; null where a row is absent.
struct TileRows {
  const float* rows[kKeyTile];
};

// row_at(c) is where present row c lies, in `dtype`. float32 rows stay there; others are converted into `copy`,
// padded(n) apart.
template <class RowAt>
PYCORE_INLINE void gather_rows(DType dtype, uint64_t present, int64_t n, const RowAt& row_at, float* copy,
                               TileRows* out) {
  for (int64_t c = 0; c < kKeyTile; ++c) {
    out->rows[c] = nullptr;
    if (!(present >> c & 1)) continue;
    const char* row = row_at(c);
    if (dtype == DType::kFloat32) {
      out->rows[c] = reinterpret_cast<const float*>(row);
    } else {
      load_row(dtype, row, n, copy + c * padded(n));
      out->rows[c] = copy + c * padded(n);
    }
  }
}

// out[d][c] = rows[c][d] for d < n, zero in absent columns. `out` has kKeyTile columns and padded(n) rows.
[[maybe_unused]] __attribute__((noinline)) void transpose_rows(const TileRows& tile, int64_t n, float* out) {
  for (int64_t c = 0; c < kKeyTile; c += Vec::kWidth) {
    for (int64_t d = 0; d < n; d += Vec::kWidth) {
      Vec block[Vec::kWidth];
      if (d + Vec::kWidth <= n) {
        for (int i = 0; i < Vec::kWidth; ++i) {
          block[i] = tile.rows[c + i] ? Vec::load(tile.rows[c + i] + d) : Vec::zero();
        }
      } else {
        for (int i = 0; i < Vec::kWidth; ++i) {
          block[i] = tile.rows[c + i] ? Vec::load_first(tile.rows[c + i] + d, n - d) : Vec::zero();
        }
      }
      transpose(block);
      for (int i = 0; i < Vec::kWidth; ++i) block[i].store(out + (d + i) * kKeyTile + c);
    }
  }
}

// Rows with one stride between them.
struct Matrix {
  const float* data;
  int64_t stride;
};

// The tile as a matrix: the rows themselves if they lie `row_stride` apart, else a copy (rows far apart would fight for
// the same cache sets). `copy` is what gather_rows converted into. Absent rows stay unset: nothing reads them.
PYCORE_INLINE Matrix matrix_rows(DType dtype, const TileRows& tile, uint64_t present, bool consecutive,
                                 int64_t row_stride, int64_t n, float* copy) {
  if (dtype == DType::kFloat32 && consecutive && row_stride <= n + Vec::kWidth && present) {
    const int64_t first = __builtin_ctzll(present);
    return {tile.rows[first] - first * row_stride, row_stride};
  }
  const int64_t stride = padded(n);
  for (int64_t c = 0; c < kKeyTile && dtype == DType::kFloat32; ++c) {
    if (tile.rows[c]) copy_row(tile.rows[c], n, copy + c * stride);
  }
  return {copy, stride};
}

// square[k][i] = rows[i][k] for i < count and k < depth, at most kWidth of both; the other lanes are zero.
PYCORE_INLINE void load_transposed(const float* rows, int64_t row_stride, int64_t count, int64_t depth,
                                   Vec (&square)[Vec::kWidth]) {
  if (count == Vec::kWidth && depth == Vec::kWidth) {
    for (int i = 0; i < Vec::kWidth; ++i) square[i] = Vec::load(rows + i * row_stride);
  } else {
    for (int i = 0; i < Vec::kWidth; ++i) {
      square[i] = i < count ? Vec::load_first(rows + i * row_stride, depth) : Vec::zero();
    }
  }
  transpose(square);
}
