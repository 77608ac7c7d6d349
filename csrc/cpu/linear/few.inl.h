// SPDX-License-Identifier: Apache-2.0
// The linear layer for up to kFewRows rows (decoding): bound by reading the weight, which is read once, where it lies,
// in its own dtype. Squares of it are transposed in registers and multiply all rows; the chains are the tile product's.
//
// A square is kWidth weight rows by kWidth 32-bit lanes: one channel each in float32, two in 16 bits, so that half the
// shuffles do. Squares are taken a cache line at a time from each weight row: rows a power of two apart share the sets
// of the first cache, and half a line would be gone before its other half is wanted. For the same reason what is
// fetched ahead goes to the second cache.
#pragma once

#include <pycore/dtype.h>
#include <pycore/linear/linear.h>

#include <cstdint>

#include "../vector_rows.inl.h"
#include "kernels.h"
#include "rows.inl.h"

constexpr int64_t kFewDepth = 2048;  // rows of 16 bits that are no longer become float32 once an item
constexpr int64_t kLineBytes = 64, kAheadBytes = 8 * kLineBytes;

// What a thread has on its stack.
struct FewScratch {
  float rows[kFewRows * kFewDepth];  // x in float32, if it is not; [rows][kFewDepth]
};

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

// The first or the second of a lane's two numbers; float32 has one.
template <DType kType, int kWhich>
PYCORE_INLINE Vec channel_of(Vec lanes) {
  if constexpr (kType == DType::kFloat32) return lanes;
  if constexpr (kType == DType::kBFloat16) return kWhich == 0 ? lanes.low_bfloat16() : lanes.high_bfloat16();
  return kWhich == 0 ? lanes.low_float16() : lanes.high_float16();
}

// Whether a lane's two numbers are multiplied where they are.
template <DType kType>
constexpr bool kPairs = kType == DType::kBFloat16 && Vec::kMultipliesPairs;

// A row of 16 bits as lanes of two numbers, the first in the high half. Beside a last one stands -1: what it is
// multiplied with is +0, and adding -0 changes nothing.
PYCORE_INLINE void pair_row(const char* row, int64_t n, float* out) {
  uint32_t* const lanes = reinterpret_cast<uint32_t*>(out);
  for (int64_t j = 0; 2 * j + 1 < n; ++j) {
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

// How many floats of a prepared row hold `channels` of them.
template <DType kType>
PYCORE_INLINE int64_t prepared(int64_t channels) {
  return kPairs<kType> ? channels / 2 : channels;
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
        channel_of<kType, 0>(square[j]).store(out + 2 * j * panel_row);
        if (2 * j + 1 < channels) channel_of<kType, 1>(square[j]).store(out + (2 * j + 1) * panel_row);
      }
    }
  }
}

// The chains of M rows by kGroups vectors of columns go on by the first `channels` channels of the groups' squares;
// x[m] begins where they do. Group by group within a channel: a chain's next FMA waits for its last, and the others
// fill the gap. Unrolled, or the squares would go through memory.
template <DType kType, int M, int kGroups>
PYCORE_INLINE void follow_squares(const Vec (&squares)[kGroups][Vec::kWidth], int64_t channels, const float* x,
                                  int64_t x_row, Vec (&chain)[kGroups][M]) {
  constexpr int kPer = kType == DType::kFloat32 ? 1 : 2;
#pragma GCC unroll 16
  for (int j = 0; j < Vec::kWidth; ++j) {
    if (kPer * j >= channels) return;
#ifdef PYCORE_BFLOAT16_PRODUCTS
    if constexpr (kPairs<kType>) {
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        const Vec pair = squares[g][j].turned();
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) chain[g][m] = Vec::fma_pairs(Vec::broadcast(x[m * x_row + j]), pair, chain[g][m]);
      }
      continue;
    }
#endif
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
      const Vec first = channel_of<kType, 0>(squares[g][j]);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) chain[g][m] = Vec::fma(Vec::broadcast(x[m * x_row + kPer * j]), first, chain[g][m]);
    }
    if (kPer == 1 || kPer * j + 1 >= channels) continue;
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
      const Vec second = channel_of<kType, 1>(squares[g][j]);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        chain[g][m] = Vec::fma(Vec::broadcast(x[m * x_row + kPer * j + 1]), second, chain[g][m]);
      }
    }
  }
}

// One block of the chains. `next` is how far the weight rows of the next columns are: their beginnings are fetched
// where these rows end.
template <DType kType, int M, int kGroups>
PYCORE_INLINE void few_block(const char* const* rows, int64_t begin, int64_t end, int64_t depth, int64_t next,
                             const float* x, int64_t x_row, Vec (&chain)[kGroups][M]) {
  constexpr int64_t kBytes = kElementBytes<kType>, kLine = kLineBytes / kBytes;
  Vec squares[kGroups][Vec::kWidth];
  int64_t k = begin;
  for (; k + kLine <= end; k += kLine) {
    const int64_t at = k * kBytes, ahead = at + kAheadBytes;
    const int64_t fetched = ahead < depth * kBytes ? ahead : ahead - depth * kBytes + next;
    for (int i = 0; i < kGroups * Vec::kWidth; ++i) __builtin_prefetch(rows[i] + fetched, 0, 2);
    for (int64_t s = 0; s < kLine; s += kSquare<kType>) {
      // x is read again for every square: kept in registers for all of them, it would crowd out the rest.
      __asm__ volatile("" : : : "memory");
      for (int g = 0; g < kGroups; ++g) load_square(rows + g * Vec::kWidth, at + s * kBytes, squares[g]);
      follow_squares<kType, M>(squares, kSquare<kType>, x + prepared<kType>(k + s - begin), x_row, chain);
    }
  }
  for (; k < end; k += kSquare<kType>) {
    const int64_t channels = smaller(kSquare<kType>, end - k);
    for (int g = 0; g < kGroups; ++g) {
      load_square_first(rows + g * Vec::kWidth, k * kBytes, channels * kBytes, squares[g]);
    }
    follow_squares<kType, M>(squares, channels, x + prepared<kType>(k - begin), x_row, chain);
  }
}

template <DType kType, int M>
__attribute__((noinline)) void few_rows_forward(const LinearParams& params, int64_t first_row, Range columns) {
  constexpr int64_t kWidth = Vec::kWidth, kBytes = kElementBytes<kType>;
  constexpr int kGroups = M <= 2 ? 2 : 1;
  constexpr int64_t kColumns = kGroups * kWidth;
  const int64_t depth = params.in_features, stride = params.weight_stride * kBytes;
  // float32 rows with one stride stay where they are; others come into scratch, whole or by the block.
  const bool in_place = kType == DType::kFloat32 && params.x.uniform(), whole = depth <= kFewDepth;
  FewScratch scratch;
  const float* x = scratch.rows;
  int64_t x_row = kFewDepth;
  const auto convert = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    for (int m = 0; m < M; ++m) {
      prepare_row<kType>(row_bytes<kType>(params.x, first_row + m) + k * kBytes, count, scratch.rows + m * kFewDepth);
    }
  };
  if (in_place) {
    x = reinterpret_cast<const float*>(row_bytes<kType>(params.x, first_row));
    x_row = params.x.row_stride();
  } else if (whole) {
    convert(0, depth);
  }
  for (int64_t n = columns.begin; n < columns.end; n += kColumns) {
    const int64_t count = smaller(kColumns, columns.end - n);
    const char* rows[kColumns];  // a missing one is the last, and its result is not kept
    for (int64_t i = 0; i < kColumns; ++i) {
      rows[i] = static_cast<const char*>(params.weight) + (n + smaller(i, count - 1)) * stride;
    }
    const int64_t next = n + kColumns < columns.end ? kColumns * stride : 0;
    Vec total[kGroups][M];
    int64_t block = 0;
    do {
      const int64_t end = smaller(block + kLinearBlock, depth);
      Vec chain[kGroups][M];
      for (int g = 0; g < kGroups; ++g) {
        for (int m = 0; m < M; ++m) chain[g][m] = Vec::zero();
      }
      if (!in_place && !whole) convert(block, end - block);
      few_block<kType, M, kGroups>(rows, block, end, depth, next, in_place || whole ? x + prepared<kType>(block) : x,
                                   x_row, chain);
      for (int g = 0; g < kGroups; ++g) {
        for (int m = 0; m < M; ++m) total[g][m] = block == 0 ? chain[g][m] : total[g][m] + chain[g][m];
      }
      block = end;
    } while (block < depth);
    for (int g = 0; g < kGroups && g * kWidth < count; ++g) {
      const int64_t kept = smaller(kWidth, count - g * kWidth), column = n + g * kWidth;
      for (int m = 0; m < M; ++m) {
        Vec x = total[g][m];
        if (params.bias) x = x + load_some<kType>(static_cast<const char*>(params.bias), column, kept);
        store_some<kType>(x, static_cast<char*>(params.out) + (first_row + m) * params.out_features * kBytes, column,
                          kept);
      }
    }
  }
}

template <DType kType>
PYCORE_INLINE void few_forward(const LinearParams& params, Range rows, Range columns) {
  switch (rows.count()) {
    case 1: return few_rows_forward<kType, 1>(params, rows.begin, columns);
    case 2: return few_rows_forward<kType, 2>(params, rows.begin, columns);
    case 3: return few_rows_forward<kType, 3>(params, rows.begin, columns);
    case 4: return few_rows_forward<kType, 4>(params, rows.begin, columns);
    case 5: return few_rows_forward<kType, 5>(params, rows.begin, columns);
    case 6: return few_rows_forward<kType, 6>(params, rows.begin, columns);
    default: return;
  }
}
