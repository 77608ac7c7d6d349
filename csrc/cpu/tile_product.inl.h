// SPDX-License-Identifier: Apache-2.0
// The tile product: C[m][n] = sum over k of A[m][k] B[k][n], a block of up to kProductRows rows at a time, and what
// becomes of the accumulators is the caller's `Reduce`. Attention (scores, values and every gradient), the linear
// layers and nearest-code search are all built on it.
//
// Every element is ONE chain of FMAs over k ascending, whatever the block shapes. That is what makes a row's bits
// independent of the rows computed beside it, and it is why blocks may be skipped or split freely along m and n.

#pragma once

#include <cstdint>

#include "simd.inl.h"

constexpr int kProductRows = 6;

// Columns of B: float32, or integers of eight bits.
PYCORE_INLINE Vec load_columns(const float* p) { return Vec::load(p); }
PYCORE_INLINE Vec load_columns(const int8_t* p) { return Vec::load_bytes(p); }
PYCORE_INLINE Vec load_columns_first(const float* p, int64_t count) { return Vec::load_first(p, count); }
PYCORE_INLINE Vec load_columns_first(const int8_t* p, int64_t count) {
  int8_t bytes[Vec::kWidth] = {};
  __builtin_memcpy(bytes, p, static_cast<size_t>(count));
  return Vec::load_bytes(bytes);
}

// A block's accumulators become memory, starting from zero.
struct StoreBlock {
  float* c;
  int64_t c_row;
  PYCORE_INLINE Vec start(int, int64_t) const { return Vec::zero(); }
  PYCORE_INLINE Vec start_first(int, int64_t, int64_t) const { return Vec::zero(); }
  PYCORE_INLINE void finish(int m, int64_t n, Vec x) const { x.store(c + m * c_row + n); }
  PYCORE_INLINE void finish_first(int m, int64_t n, int64_t count, Vec x) const {
    x.store_first(c + m * c_row + n, count);
  }
};

// The chain goes on from what memory holds.
struct AccumulateBlock {
  float* c;
  int64_t c_row;
  PYCORE_INLINE Vec start(int m, int64_t n) const { return Vec::load(c + m * c_row + n); }
  PYCORE_INLINE Vec start_first(int m, int64_t n, int64_t count) const {
    return Vec::load_first(c + m * c_row + n, count);
  }
  PYCORE_INLINE void finish(int m, int64_t n, Vec x) const { x.store(c + m * c_row + n); }
  PYCORE_INLINE void finish_first(int m, int64_t n, int64_t count, Vec x) const {
    x.store_first(c + m * c_row + n, count);
  }
};

// Rows 0..M-1, columns n .. n + V * width - 1 (the last vector cut to `tail` lanes if kTail). A[m][k] is
// a[m * a_row + k] or, transposed, a[k * a_row + m].
template <int M, int V, bool kTransposed, bool kTail, class B, class Reduce>
PYCORE_INLINE void product_block(int64_t depth, const float* a, int64_t a_row, const B* b, int64_t b_row, int64_t n,
                                 int64_t tail, const Reduce& reduce) {
  Vec acc[M][V];
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      const int64_t column = n + v * Vec::kWidth;
      acc[m][v] = kTail && v == V - 1 ? reduce.start_first(m, column, tail) : reduce.start(m, column);
    }
  }
  const float* a_rows[M];
  for (int m = 0; m < M; ++m) a_rows[m] = kTransposed ? a + m : a + m * a_row;
  const B* b_k = b + n;
  for (int64_t k = 0; k < depth; ++k, b_k += b_row) {
    Vec columns[V];
    for (int v = 0; v < V; ++v) {
      const B* at = b_k + v * Vec::kWidth;
      columns[v] = kTail && v == V - 1 ? load_columns_first(at, tail) : load_columns(at);
    }
    for (int m = 0; m < M; ++m) {
      const Vec x = Vec::broadcast(kTransposed ? a[k * a_row + m] : a_rows[m][k]);
      for (int v = 0; v < V; ++v) acc[m][v] = Vec::fma(x, columns[v], acc[m][v]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      const int64_t column = n + v * Vec::kWidth;
      if (kTail && v == V - 1) {
        reduce.finish_first(m, column, tail, acc[m][v]);
      } else {
        reduce.finish(m, column, acc[m][v]);
      }
    }
  }
}

template <int M, int V, bool kTransposed, class B, class Reduce>
PYCORE_INLINE void product_vectors(int64_t depth, const float* a, int64_t a_row, const B* b, int64_t b_row, int64_t n,
                                   int64_t tail, const Reduce& reduce) {
  if (tail == Vec::kWidth) {
    product_block<M, V, kTransposed, false>(depth, a, a_row, b, b_row, n, tail, reduce);
  } else {
    product_block<M, V, kTransposed, true>(depth, a, a_row, b, b_row, n, tail, reduce);
  }
}

// M rows, columns n_begin .. n_end - 1.
template <int M, bool kTransposed, class B, class Reduce>
__attribute__((noinline)) void product_rows(int64_t depth, const float* a, int64_t a_row, const B* b, int64_t b_row,
                                            int64_t n_begin, int64_t n_end, Reduce reduce) {
  constexpr int64_t kWidth = Vec::kWidth;
  constexpr int kColumns = Vec::kProductColumns;
  int64_t n = n_begin;
  for (; n + kColumns * kWidth <= n_end; n += kColumns * kWidth) {
    product_block<M, kColumns, kTransposed, false>(depth, a, a_row, b, b_row, n, kWidth, reduce);
  }
  const int64_t left = n_end - n;
  if (left <= 0) return;
  const int64_t vectors = (left + kWidth - 1) / kWidth, tail = left - (vectors - 1) * kWidth;
  if constexpr (kColumns == 4) {
    if (vectors == 4) return product_vectors<M, 4, kTransposed>(depth, a, a_row, b, b_row, n, tail, reduce);
    if (vectors == 3) return product_vectors<M, 3, kTransposed>(depth, a, a_row, b, b_row, n, tail, reduce);
  }
  if (vectors == 2) return product_vectors<M, 2, kTransposed>(depth, a, a_row, b, b_row, n, tail, reduce);
  return product_vectors<M, 1, kTransposed>(depth, a, a_row, b, b_row, n, tail, reduce);
}

// `rows` rows (1 .. kProductRows), columns n_begin .. n_end - 1 of B and of the result.
template <bool kTransposed, class B, class Reduce>
PYCORE_INLINE void tile_product(int64_t rows, int64_t depth, const float* a, int64_t a_row, const B* b, int64_t b_row,
                                int64_t n_begin, int64_t n_end, Reduce reduce) {
  switch (rows) {
    case 1: return product_rows<1, kTransposed>(depth, a, a_row, b, b_row, n_begin, n_end, reduce);
    case 2: return product_rows<2, kTransposed>(depth, a, a_row, b, b_row, n_begin, n_end, reduce);
    case 3: return product_rows<3, kTransposed>(depth, a, a_row, b, b_row, n_begin, n_end, reduce);
    case 4: return product_rows<4, kTransposed>(depth, a, a_row, b, b_row, n_begin, n_end, reduce);
    case 5: return product_rows<5, kTransposed>(depth, a, a_row, b, b_row, n_begin, n_end, reduce);
    case 6: return product_rows<6, kTransposed>(depth, a, a_row, b, b_row, n_begin, n_end, reduce);
    default: return;
  }
}
