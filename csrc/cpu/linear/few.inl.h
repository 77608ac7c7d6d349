// SPDX-License-Identifier: Apache-2.0
// The linear layer for up to kFewRows rows (decoding): bound by reading the weight, which is read once, where it lies,
// in its own dtype. The chains are the tile product's: a lane is an output, so weight rows have to be transposed.
//
// That happens in registers, in squares: each line is loaded once, whole or by halves. It takes twice the shuffles of
// vectors that are put together from parts of rows as they are loaded, and a quarter of the loads. Loads are what
// counts: while all that a core can ask memory for is asked for, they wait, and shuffles do not.
#pragma once

#include <pycore/dtype.h>
#include <pycore/linear/linear.h>

#include <cstdint>

#include "../vector_rows.inl.h"
#include "kernels.h"
#include "rows.inl.h"
#include "weight_squares.inl.h"

constexpr int64_t kFewDepth = 2048;  // rows of 16 bits that are no longer are prepared once an item
constexpr int64_t kAheadBytes = 16 * kLineBytes;
constexpr int64_t kMostFetched = 1 << 19;  // what lies ready in the second cache

// Groups of kWidth columns that take turns: a chain's next FMA waits for its last. Sixteen lanes have work enough for
// the time.
template <int M>
constexpr int kFewGroups = M <= 2 && Vec::kWidth < 16 ? 2 : 1;

// The lines that are fetched while squares are followed: one for every line that these are made of, spread over the
// work, since one that finds no room among what is under way is dropped.
struct FetchedAhead {
  const char* at;
  int64_t step;  // bytes from one line to the next; 0 where nothing is fetched, and `at` is in the first cache
};
constexpr int kColumnsPerLine = 16 / Vec::kWidth;  // of a square, to a line

// The chains of M rows go on by the first `channels` channels of a square; x[m] begins where they do.
template <DType kType, int M>
PYCORE_INLINE void follow_square(const Vec (&square)[Vec::kWidth], int64_t channels, const float* x, int64_t x_row,
                                 Vec (&chain)[M], FetchedAhead* ahead) {
  constexpr int kPer = kElementBytes<kType> == 4 ? 1 : 2;
#pragma GCC unroll 16
  for (int j = 0; j < Vec::kWidth; ++j) {
    if (kPer * j >= channels) return;
    if (j % kColumnsPerLine == 0) {
      __builtin_prefetch(ahead->at, 0, 3);
      ahead->at += ahead->step;
    }
#ifdef PYCORE_BFLOAT16_PRODUCTS
    if constexpr (kPairs<kType>) {
      const Vec pair = square[j].turned();
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) chain[m] = Vec::fma_pairs(Vec::broadcast(x[m * x_row + j]), pair, chain[m]);
      continue;
    }
#endif
    const Vec lanes = parted<kType>(square[j]);
#pragma GCC unroll 2
    for (int c = 0; c < kPer; ++c) {
      if (c == 1 && kPer * j + 1 >= channels) return;
      const Vec column = c == 0 ? channel_of<kType, 0>(lanes) : channel_of<kType, 1>(lanes);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) chain[m] = Vec::fma(Vec::broadcast(x[m * x_row + kPer * j + c]), column, chain[m]);
    }
  }
}

template <DType kType, int M>
__attribute__((noinline)) void few_rows_forward(const LinearParams& params, int64_t first_row, Range columns) {
  constexpr int64_t kWidth = Vec::kWidth, kBytes = kElementBytes<kType>, kLine = kLineBytes / kBytes;
  constexpr int kGroups = kFewGroups<M>;
  constexpr int64_t kColumns = kGroups * kWidth;
  static_assert(kLinearBlock % kLine == 0 && kLine % kSquare<kType> == 0);
  const int64_t depth = params.in_features, row_bytes_read = depth * kBytes, stride = params.weight_stride * kBytes;
  // float32 rows with one stride stay where they are; others come into scratch, whole or by the block.
  const bool in_place = kType == DType::kFloat32 && params.x.uniform(), whole = depth <= kFewDepth;
  alignas(64) float scratch[M * kFewDepth];
  const float* x = scratch;
  int64_t x_row = kFewDepth;
  const auto prepare = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    for (int m = 0; m < M; ++m) {
      prepare_row<kType>(row_bytes<kType>(params.x, first_row + m) + k * kBytes, count, scratch + m * kFewDepth);
    }
  };
  if (in_place) {
    x = reinterpret_cast<const float*>(row_bytes<kType>(params.x, first_row));
    x_row = params.x.row_stride();
  } else if (whole) {
    prepare(0, depth);
  }
  const auto row = [&](int64_t n) __attribute__((always_inline)) {  // a missing one is the last, and is not kept
    return static_cast<const char*>(params.weight) + smaller(n, columns.end - 1) * stride;
  };
  // Columns without gaps are fetched as they lie, one line after another, as many columns ahead as are worked on.
  const bool in_order = stride == row_bytes_read && kColumns * stride <= kMostFetched;
  const char* const end = row(columns.end - 1) + stride;
  for (int64_t n = columns.begin; n < columns.end; n += kColumns) {
    const char* rows[kColumns];
    for (int64_t i = 0; i < kColumns; ++i) rows[i] = row(n + i);
    const char* in_turn = rows[0] + kColumns * stride;
    const int64_t next = n + kColumns < columns.end ? kColumns * stride : 0;
    Vec total[kGroups][M], chain[kGroups][M];
    for (int g = 0; g < kGroups; ++g) {
      for (int m = 0; m < M; ++m) total[g][m] = chain[g][m] = Vec::zero();
    }
    for (int64_t k = 0; k < depth; k += kLine) {
      const int64_t block = k / kLinearBlock * kLinearBlock, line_end = k + kLine;
      const bool by_block = !in_place && !whole;
      if (by_block && k == block) prepare(block, smaller(kLinearBlock, depth - block));
      FetchedAhead fetched = {reinterpret_cast<const char*>(x), 0};
      if (in_order) {
        if (in_turn < end) fetched = {in_turn, kLineBytes};
        in_turn += kColumns * kLineBytes;
      } else {  // to the second cache: rows a power of two apart share sets of the first
        const int64_t ahead = line_end * kBytes + kAheadBytes;
        const int64_t place = ahead < row_bytes_read ? ahead : ahead - row_bytes_read + next;
        for (int i = 0; i < kColumns; ++i) __builtin_prefetch(rows[i] + place, 0, 2);
      }
      const float* at = x + (k - (by_block ? block : 0)) / (kPairs<kType> ? 2 : 1);
      // x is read again for every line: kept in registers for all of them, it would crowd out the rest.
      __asm__ volatile("" : : : "memory");
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 2
        for (int64_t c = 0; c < kLine; c += kSquare<kType>) {
          const float* const from = at + c / (kPairs<kType> ? 2 : 1);
          const int64_t left = depth - k - c;
          Vec square[kWidth];
          if (left >= kSquare<kType>) {
            load_square(rows + g * kWidth, (k + c) * kBytes, square);
            follow_square<kType, M>(square, kSquare<kType>, from, x_row, chain[g], &fetched);
          } else if (left > 0) {
            load_square_first(rows + g * kWidth, (k + c) * kBytes, left * kBytes, square);
            follow_square<kType, M>(square, left, from, x_row, chain[g], &fetched);
          }
        }
      }
      if (line_end % kLinearBlock != 0 && line_end < depth) continue;
      for (int g = 0; g < kGroups; ++g) {
        for (int m = 0; m < M; ++m) {
          total[g][m] = block == 0 ? chain[g][m] : total[g][m] + chain[g][m];
          chain[g][m] = Vec::zero();
        }
      }
    }
    const int64_t count = smaller(kColumns, columns.end - n);
    for (int g = 0; g < kGroups && g * kWidth < count; ++g) {
      const int64_t kept = smaller(kWidth, count - g * kWidth), column = n + g * kWidth;
      for (int m = 0; m < M; ++m) {
        Vec sum = total[g][m];
        if (params.bias) sum = sum + load_some<kType>(static_cast<const char*>(params.bias), column, kept);
        store_some<kType>(sum, static_cast<char*>(params.out) + (first_row + m) * params.out_stride * kBytes, column,
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
