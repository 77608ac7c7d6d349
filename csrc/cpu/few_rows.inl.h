// SPDX-License-Identifier: Apache-2.0
// Scores and values for one block of query rows (decoding): keys and values are read where they lie, in their own
// dtype, once. What the general path does with a tile first, transposing and converting it into scratch, pays only
// when many blocks share the tile. Each element is the same chain of FMAs as there, so the bits are the same.
#pragma once

#include <pycore/dtype.h>
#include <pycore/key_tile.h>

#include <cstdint>

#include "few_block.inl.h"
#include "vector_rows.inl.h"

// Where the rows of one tile begin, in a dtype of their own. An absent row is some present one: what is computed from
// it is not kept.
struct TilePointers {
  const char* rows[kKeyTile];
  int64_t stride;  // bytes from one row to the next, to guess what is read next

  // row_at(c) is where present row c begins.
  template <class RowAt>
  PYCORE_INLINE void fill(uint64_t present, int64_t bytes, const RowAt& row_at) {
    const int64_t first = __builtin_ctzll(present);
    for (int64_t c = 0; c < kKeyTile; ++c) rows[c] = row_at(present >> c & 1 ? c : first);
    stride = bytes;
  }

  // From a row to the one that is asked for as it is read, of rows with so many bytes.
  PYCORE_INLINE int64_t ahead(int64_t row_bytes) const {
    const int64_t rows_ahead = ahead_of(row_bytes * kKeyTile) / row_bytes;
    return (rows_ahead > 0 ? rows_ahead : 1) * stride;
  }
};

// scores[m][c] = <query row m, key c> for columns begin .. end - 1, whole vectors.
template <int M, DType kType>
__attribute__((noinline)) void score_rows(const TilePointers& keys, int64_t n, const float* query, int64_t query_row,
                                          int64_t begin, int64_t end, float* scores) {
  constexpr int64_t kWidth = Vec::kWidth;
  const int64_t ahead = keys.stride * kWidth;
  for (int64_t c = begin; c < end; c += kWidth) {
    const char* const* rows = keys.rows + c;
    Vec acc[M];
    for (int m = 0; m < M; ++m) acc[m] = Vec::zero();
    int64_t d = 0;
    for (; d + kWidth <= n; d += kWidth) {
      Vec block[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        block[i] = load_channels<kType>(rows[i], d);
        __builtin_prefetch(rows[i] + ahead + d * kElementBytes<kType>);
      }
      transpose(block);
      for (int i = 0; i < kWidth; ++i) {
        for (int m = 0; m < M; ++m) {
          acc[m] = Vec::fma(Vec::broadcast(query[m * query_row + d + i]), block[i], acc[m]);
        }
      }
    }
    if (d < n) {
      Vec block[kWidth];
      for (int i = 0; i < kWidth; ++i) block[i] = load_channels_first<kType>(rows[i], d, n - d);
      transpose(block);
      for (int i = 0; i < kWidth && d + i < n; ++i) {
        for (int m = 0; m < M; ++m) {
          acc[m] = Vec::fma(Vec::broadcast(query[m * query_row + d + i]), block[i], acc[m]);
        }
      }
    }
    for (int m = 0; m < M; ++m) acc[m].store(scores + m * kKeyTile + c);
  }
}

// Channels d on of accumulate_rows, V vectors of them.
template <int M, int V, DType kType>
PYCORE_INLINE void accumulate_channels(const TilePointers& values, uint64_t bits, const float* weights, int64_t d,
                                       int64_t ahead, float* accumulator, int64_t accumulator_row) {
  FewBlock<M, V, kType> block;
  block.load(accumulator + d, accumulator_row);
  const auto add = [&](int64_t k) __attribute__((always_inline)) {
    block.add(values.rows[k] + d * kElementBytes<kType>, ahead, weights + k, kKeyTile);
  };
  while (bits) {
    const int64_t k = __builtin_ctzll(bits);
    if ((bits >> k & 15) == 15) {  // four at a time, without looking at each
      for (int i = 0; i < 4; ++i) add(k + i);
      bits &= ~(uint64_t{15} << k);
    } else {
      add(k);
      bits &= bits - 1;
    }
  }
  block.store(accumulator + d, accumulator_row);
}

// accumulator[m] += sum over the set bits k, ascending, of weights[m][k] value k. Every row keeps the same keys.
template <int M, DType kType>
__attribute__((noinline)) void accumulate_rows(const TilePointers& values, uint64_t bits, const float* weights,
                                               int64_t n, float* accumulator, int64_t accumulator_row) {
  if (n == 0) return;
  const int64_t ahead = values.ahead(n * kElementBytes<kType>);
  const int64_t d = in_vectors<M, kType>(0, n, [&](int64_t at, auto vectors) __attribute__((always_inline)) {
    accumulate_channels<M, decltype(vectors)::kCount, kType>(values, bits, weights, at, ahead, accumulator,
                                                             accumulator_row);
  });
  for (int m = 0; m < M && d < n; ++m) {
    float* const out = accumulator + m * accumulator_row + d;
    Vec acc = Vec::load_first(out, n - d);
    for (uint64_t left = bits; left; left &= left - 1) {
      const int64_t k = __builtin_ctzll(left);
      acc = Vec::fma(Vec::broadcast(weights[m * kKeyTile + k]), load_channels_first<kType>(values.rows[k], d, n - d),
                     acc);
    }
    acc.store_first(out, n - d);
  }
}

template <DType kType>
PYCORE_INLINE void score_few(int64_t rows, const TilePointers& keys, int64_t n, const float* query, int64_t query_row,
                             int64_t begin, int64_t end, float* scores) {
  PYCORE_FEW_ROWS(score_rows, keys, n, query, query_row, begin, end, scores);
}

template <DType kType>
PYCORE_INLINE void accumulate_few(int64_t rows, const TilePointers& values, uint64_t bits, const float* weights,
                                  int64_t n, float* accumulator, int64_t accumulator_row) {
  PYCORE_FEW_ROWS(accumulate_rows, values, bits, weights, n, accumulator, accumulator_row);
}

PYCORE_INLINE void score_few(DType dtype, int64_t rows, const TilePointers& keys, int64_t n, const float* query,
                             int64_t query_row, int64_t begin, int64_t end, float* scores) {
  switch (dtype) {
    case DType::kFloat16: return score_few<DType::kFloat16>(rows, keys, n, query, query_row, begin, end, scores);
    case DType::kBFloat16: return score_few<DType::kBFloat16>(rows, keys, n, query, query_row, begin, end, scores);
    default: return score_few<DType::kFloat32>(rows, keys, n, query, query_row, begin, end, scores);
  }
}

PYCORE_INLINE void accumulate_few(DType dtype, int64_t rows, const TilePointers& values, uint64_t bits,
                                  const float* weights, int64_t n, float* accumulator, int64_t accumulator_row) {
  switch (dtype) {
    case DType::kFloat16:
      return accumulate_few<DType::kFloat16>(rows, values, bits, weights, n, accumulator, accumulator_row);
    case DType::kBFloat16:
      return accumulate_few<DType::kBFloat16>(rows, values, bits, weights, n, accumulator, accumulator_row);
    default: return accumulate_few<DType::kFloat32>(rows, values, bits, weights, n, accumulator, accumulator_row);
  }
}
