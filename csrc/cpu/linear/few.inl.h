// SPDX-License-Identifier: Apache-2.0
// The linear layer for up to kFewRows rows (decoding): bound by reading the weight, which is read once, where it lies,
// in its own dtype. The chains are the tile product's: a lane is an output, so weight rows have to be transposed.
//
// A cache line of each of kColumns weight rows is copied to the stack, one step ahead of the products
// (weight_lines.inl.h). From there sixteen bytes of every fourth row make up a vector, so that four vectors need only
// the transposition within their sixteen bytes: half the shuffles, and few registers. Copies, because rows a power of
// two apart share the sets of the first cache: a line that is read in four parts would be gone before its last. For the
// same reason what is fetched ahead goes to the second cache.
#pragma once

#include <pycore/dtype.h>
#include <pycore/linear/linear.h>

#include <cstdint>

#include "../vector_rows.inl.h"
#include "kernels.h"
#include "rows.inl.h"
#include "weight_lines.inl.h"

constexpr int64_t kFewDepth = 2048;  // rows of 16 bits that are no longer are prepared once an item
constexpr int64_t kAheadBytes = 16 * kLineBytes;
constexpr int64_t kMostFetched = 1 << 19;  // what lies ready in the second cache

// Groups of kWidth columns that take turns: a chain's next FMA waits for its last. Sixteen lanes have work enough for
// the time.
template <DType kType, int M>
constexpr int kFewGroups = M <= 2 && Vec::kWidth < 16 ? 2 : 1;

// What a thread has on its stack.
template <DType kType, int M>
struct FewScratch {
  alignas(64) float lines[2][kFewGroups<kType, M> * Vec::kWidth][kStagedLanes<kType>];  // this line and the next
  float rows[M * kFewDepth];                                                            // x as prepare_row has it
};

// The chains of M rows by kGroups vectors of columns go on by the first `channels` channels of a line; x[m] begins
// where they do. Unrolled, or the vectors would go through memory.
template <DType kType, int M, int kGroups>
PYCORE_INLINE void follow_line(const float (*lines)[kStagedLanes<kType>], int64_t channels, const float* x,
                               int64_t x_row, Vec (&chain)[kGroups][M]) {
  constexpr int kPer = static_cast<int>(kLaneChannels<kType>);
#pragma GCC unroll 8
  for (int s = 0; s < kStagedLanes<kType>; s += 4) {
    if (kPer * s >= channels) return;
    Vec fours[kGroups][4];
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 4
      for (int a = 0; a < 4; ++a) {
        fours[g][a] = Vec::load_fours(lines[g * Vec::kWidth + a] + s, 4 * kStagedLanes<kType>);
      }
      part_fours<kType>(fours[g]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int lane = s + j;
      if (kPer * lane >= channels) return;
#ifdef PYCORE_BFLOAT16_PRODUCTS
      if constexpr (kPairs<kType>) {
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) {
          const Vec pair = fours[g][j].turned();
#pragma GCC unroll 6
          for (int m = 0; m < M; ++m) {
            chain[g][m] = Vec::fma_pairs(Vec::broadcast(x[m * x_row + lane]), pair, chain[g][m]);
          }
        }
        continue;
      }
#endif
#pragma GCC unroll 2
      for (int c = 0; c < kPer; ++c) {
        if (c == 1 && kPer * lane + 1 >= channels) return;
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) {
          const Vec column = c == 0 ? column_of<kType, 0>(fours[g][j]) : column_of<kType, 1>(fours[g][j]);
#pragma GCC unroll 6
          for (int m = 0; m < M; ++m) {
            chain[g][m] = Vec::fma(Vec::broadcast(x[m * x_row + kPer * lane + c]), column, chain[g][m]);
          }
        }
      }
    }
  }
}

template <DType kType, int M>
__attribute__((noinline)) void few_rows_forward(const LinearParams& params, int64_t first_row, Range columns) {
  constexpr int64_t kWidth = Vec::kWidth, kBytes = kElementBytes<kType>, kLine = kLineBytes / kBytes;
  constexpr int kGroups = kFewGroups<kType, M>;
  constexpr int64_t kColumns = kGroups * kWidth;
  static_assert(kLinearBlock % kLine == 0);
  const int64_t depth = params.in_features, row_bytes_read = depth * kBytes, stride = params.weight_stride * kBytes;
  // float32 rows with one stride stay where they are; others come into scratch, whole or by the block.
  const bool in_place = kType == DType::kFloat32 && params.x.uniform(), whole = depth <= kFewDepth;
  FewScratch<kType, M> scratch;
  const float* x = scratch.rows;
  int64_t x_row = kFewDepth;
  const auto prepare = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    for (int m = 0; m < M; ++m) {
      prepare_row<kType>(row_bytes<kType>(params.x, first_row + m) + k * kBytes, count, scratch.rows + m * kFewDepth);
    }
  };
  if (in_place) {
    x = reinterpret_cast<const float*>(row_bytes<kType>(params.x, first_row));
    x_row = params.x.row_stride();
  } else if (whole) {
    prepare(0, depth);
  }
  const char* rows[kColumns];  // a missing one is the last, and its result is not kept
  const auto point = [&](int64_t n) __attribute__((always_inline)) {
    for (int64_t i = 0; i < kColumns; ++i) {
      rows[i] = static_cast<const char*>(params.weight) + smaller(n + i, columns.end - 1) * stride;
    }
  };
  if (columns.count() <= 0) return;
  int turn = 0;
  point(columns.begin);
  // Columns without gaps are fetched as they lie, one line after another, as many columns ahead as are worked on: what
  // fetches by itself goes on from there.
  const bool in_order = stride == row_bytes_read && kColumns * stride <= kMostFetched;
  const char* const end = static_cast<const char*>(params.weight) + columns.end * stride;
  if (in_order) {
    for (int64_t at = 0; at < smaller(kColumns, columns.count()) * stride; at += kLineBytes) {
      __builtin_prefetch(rows[0] + at, 0, 2);
    }
  } else {
    for (int64_t at = 0; at < smaller(kAheadBytes, row_bytes_read); at += kLineBytes) {
      for (int i = 0; i < kColumns; ++i) __builtin_prefetch(rows[i] + at, 0, 2);
    }
  }
  if (depth > 0) stage<kType, kColumns>(rows, 0, smaller(kLineBytes, row_bytes_read), scratch.lines[turn]);
  for (int64_t n = columns.begin; n < columns.end; n += kColumns) {
    const int64_t next = n + kColumns < columns.end ? kColumns * stride : 0;
    const char* in_turn = rows[0] + kColumns * stride;  // what comes next of the columns behind these
    Vec total[kGroups][M], chain[kGroups][M];
    for (int g = 0; g < kGroups; ++g) {
      for (int m = 0; m < M; ++m) total[g][m] = chain[g][m] = Vec::zero();
    }
    for (int64_t k = 0; k < depth; k += kLine) {
      const int64_t block = k / kLinearBlock * kLinearBlock, line_end = k + kLine;
      const bool by_block = !in_place && !whole;
      if (by_block && k == block) prepare(block, smaller(kLinearBlock, depth - block));
      // What comes next to the stack, and what comes later to the second cache.
      if (in_order) {
        if (next && in_turn < end) {
          for (int i = 0; i < kColumns; ++i) __builtin_prefetch(in_turn + i * kLineBytes, 0, 2);
        }
        in_turn += kColumns * kLineBytes;
      } else {
        const int64_t ahead = (line_end * kBytes) + kAheadBytes;
        const int64_t fetched = ahead < row_bytes_read ? ahead : ahead - row_bytes_read + next;
        for (int i = 0; i < kColumns; ++i) __builtin_prefetch(rows[i] + fetched, 0, 2);
      }
      if (line_end + kLine <= depth) {
        stage<kType, kColumns>(rows, line_end * kBytes, kLineBytes, scratch.lines[turn ^ 1]);
      } else if (line_end < depth) {
        stage<kType, kColumns>(rows, line_end * kBytes, row_bytes_read - line_end * kBytes, scratch.lines[turn ^ 1]);
      } else if (next) {
        point(n + kColumns);
        stage<kType, kColumns>(rows, 0, smaller(kLineBytes, row_bytes_read), scratch.lines[turn ^ 1]);
      }
      const float* at = x + (k - (by_block ? block : 0)) / (kPairs<kType> ? 2 : 1);
      // x is read again for every line: kept in registers for all of them, it would crowd out the rest.
      __asm__ volatile("" : : : "memory");
      if (line_end <= depth) {
        follow_line<kType, M>(scratch.lines[turn], kLine, at, x_row, chain);
      } else {
        follow_line<kType, M>(scratch.lines[turn], depth - k, at, x_row, chain);
      }
      turn ^= 1;
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
        store_some<kType>(sum, static_cast<char*>(params.out) + (first_row + m) * params.out_features * kBytes, column,
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
