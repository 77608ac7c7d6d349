// SPDX-License-Identifier: Apache-2.0
// Scores for one block of query rows (decoding) where keys lie by channel within their tile: the tile product on a
// matrix of any dtype, widened in registers. Each element is the same chain of FMAs as in tile_product.inl.h and
// few_rows.inl.h, so the bits are the same.
#pragma once

#include <pycore/dtype.h>
#include <pycore/key_tile.h>

#include <cstdint>

#include "few_block.inl.h"
#include "vector_rows.inl.h"

// The channels of one tile of keys, one behind the other: channel d of key c is element c of row d.
struct TileColumns {
  const char* data;       // channel 0
  int64_t channel_bytes;  // from one channel to the next
  int64_t ahead;          // bytes to what is asked for as this is read
};

// Scores for V vectors of columns from element `first` on.
template <int M, int V, DType kType>
PYCORE_INLINE void score_columns(const TileColumns& keys, int64_t n, const float* query, int64_t query_row,
                                 int64_t first, float* scores) {
  const char* const channels = keys.data + first * kElementBytes<kType>;
  FewBlock<M, V, kType> block;
  block.zero();
  for (int64_t d = 0; d < n; ++d) block.add(channels + d * keys.channel_bytes, keys.ahead, query + d, query_row);
  block.store(scores + first, kKeyTile);
}

// scores[m][c] = <query row m, key c> for columns begin .. end - 1, whole vectors.
template <int M, DType kType>
__attribute__((noinline)) void score_column_rows(const TileColumns& keys, int64_t n, const float* query,
                                                 int64_t query_row, int64_t begin, int64_t end, float* scores) {
  in_vectors<M, kType>(begin, end, [&](int64_t c, auto vectors) __attribute__((always_inline)) {
    score_columns<M, decltype(vectors)::kCount, kType>(keys, n, query, query_row, c, scores);
  });
}

template <DType kType>
PYCORE_INLINE void score_few_columns(int64_t rows, const TileColumns& keys, int64_t n, const float* query,
                                     int64_t query_row, int64_t begin, int64_t end, float* scores) {
  PYCORE_FEW_ROWS(score_column_rows, keys, n, query, query_row, begin, end, scores);
}

PYCORE_INLINE void score_few_columns(DType dtype, int64_t rows, const TileColumns& keys, int64_t n, const float* query,
                                     int64_t query_row, int64_t begin, int64_t end, float* scores) {
  switch (dtype) {
    case DType::kFloat16:
      return score_few_columns<DType::kFloat16>(rows, keys, n, query, query_row, begin, end, scores);
    case DType::kBFloat16:
      return score_few_columns<DType::kBFloat16>(rows, keys, n, query, query_row, begin, end, scores);
    default: return score_few_columns<DType::kFloat32>(rows, keys, n, query, query_row, begin, end, scores);
  }
}
