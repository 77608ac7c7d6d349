// SPDX-License-Identifier: Apache-2.0
// Scores for one block of query rows (decoding) where keys lie by channel within their tile: the tile product on a
// matrix of any dtype, widened in registers. Each element is the same chain of FMAs as in tile_product.inl.h and
// few_rows.inl.h, so the bits are the same.
#pragma once

#include <pycore/dtype.h>
#include <pycore/key_tile.h>

#include <cstdint>

#include "vector_rows.inl.h"

// The channels of one tile of keys, one behind the other: channel d of key c is element c of row d.
struct TileColumns {
  const char* data;       // channel 0
  int64_t channel_bytes;  // from one channel to the next
  int64_t ahead;          // bytes to what is read a tile later, which is asked for as this is read
};

// A line of the tile after this one. A tile holds as many bytes as several pages, where the processor's own guess of
// what is read next stops at each.
PYCORE_INLINE void prefetch_columns(const char* at, int64_t ahead, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + ahead + line, 0, 2);
}

// V vectors of columns from element `first` on.
template <int M, int V, DType kType>
PYCORE_INLINE void score_columns(const TileColumns& keys, int64_t n, const float* query, int64_t query_row,
                                 int64_t first, float* scores) {
  constexpr int64_t kWidth = Vec::kWidth;
  Vec acc[M][V];
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) acc[m][v] = Vec::zero();
  }
  const char* channel = keys.data + first * kElementBytes<kType>;
  for (int64_t d = 0; d < n; ++d, channel += keys.channel_bytes) {
    prefetch_columns(channel, keys.ahead, V * kWidth * kElementBytes<kType>);
    Vec key[V];
    for (int v = 0; v < V; ++v) key[v] = load_channels<kType>(channel, v * kWidth);
    for (int m = 0; m < M; ++m) {
      const Vec x = Vec::broadcast(query[m * query_row + d]);
      for (int v = 0; v < V; ++v) acc[m][v] = Vec::fma(x, key[v], acc[m][v]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) acc[m][v].store(scores + m * kKeyTile + first + v * kWidth);
  }
}

// scores[m][c] = <query row m, key c> for columns begin .. end - 1, whole vectors.
template <int M, DType kType>
__attribute__((noinline)) void score_column_rows(const TileColumns& keys, int64_t n, const float* query,
                                                 int64_t query_row, int64_t begin, int64_t end, float* scores) {
  constexpr int64_t kWidth = Vec::kWidth;
  constexpr int kColumns = Vec::kProductColumns;
  int64_t c = begin;
  for (; c + kColumns * kWidth <= end; c += kColumns * kWidth) {
    score_columns<M, kColumns, kType>(keys, n, query, query_row, c, scores);
  }
  for (; c < end; c += kWidth) score_columns<M, 1, kType>(keys, n, query, query_row, c, scores);
}

template <DType kType>
PYCORE_INLINE void score_few_columns(int64_t rows, const TileColumns& keys, int64_t n, const float* query,
                                     int64_t query_row, int64_t begin, int64_t end, float* scores) {
  switch (rows) {
    case 1: return score_column_rows<1, kType>(keys, n, query, query_row, begin, end, scores);
    case 2: return score_column_rows<2, kType>(keys, n, query, query_row, begin, end, scores);
    case 3: return score_column_rows<3, kType>(keys, n, query, query_row, begin, end, scores);
    case 4: return score_column_rows<4, kType>(keys, n, query, query_row, begin, end, scores);
    case 5: return score_column_rows<5, kType>(keys, n, query, query_row, begin, end, scores);
    case 6: return score_column_rows<6, kType>(keys, n, query, query_row, begin, end, scores);
    default: return;
  }
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
