// SPDX-License-Identifier: Apache-2.0
// FewBlock: M rows by V vectors of accumulators, for products of a few rows with a matrix that memory brings once
// (decoding). Each element is one chain of FMAs, ascending, as in tile_product.inl.h. 16-bit numbers are loaded a whole
// vector at a time, which becomes two in registers.
#pragma once

#include <pycore/dtype.h>
#include <pycore/key_tile.h>

#include <cstdint>

#include "vector_rows.inl.h"

// V vectors of numbers that lie side by side, in float32. Where 16-bit ones come two vectors at a time, the two are of
// float16 the first and the last numbers, and of bfloat16, by a shift and a mask, those at even and those at odd
// places: as_loaded brings accumulators into that order, in_order back.
template <DType kType, int V>
constexpr bool kTwoByTwo = kType != DType::kFloat32 && V % 2 == 0;

template <DType kType, int V>
PYCORE_INLINE void load_vectors(const char* x, Vec (&out)[V]) {
  if constexpr (kTwoByTwo<kType, V>) {
    for (int v = 0; v < V; v += 2) {
      const Vec both = Vec::load(reinterpret_cast<const float*>(x) + v / 2 * Vec::kWidth);
      out[v] = kType == DType::kBFloat16 ? both.low_bfloat16() : both.first_float16();
      out[v + 1] = kType == DType::kBFloat16 ? both.high_bfloat16() : both.last_float16();
    }
  } else {
    for (int v = 0; v < V; ++v) out[v] = load_channels<kType>(x, v * Vec::kWidth);
  }
}
template <DType kType, int V>
PYCORE_INLINE void in_order(Vec (&x)[V]) {
  if constexpr (kTwoByTwo<kType, V> && kType == DType::kBFloat16) {
    for (int v = 0; v < V; v += 2) Vec::interleave(&x[v], &x[v + 1]);
  }
}
template <DType kType, int V>
PYCORE_INLINE void as_loaded(Vec (&x)[V]) {
  if constexpr (kTwoByTwo<kType, V> && kType == DType::kBFloat16) {
    for (int v = 0; v < V; v += 2) Vec::deinterleave(&x[v], &x[v + 1]);
  }
}

// How far ahead, in bytes, what is read next is asked for, of a matrix that comes in tiles of `tile_bytes`, one behind
// the other. With sixteen lanes lines are read nearly in the order of their addresses, and as many as this wait in the
// first cache; nearer and farther was slower. With eight, a tile is swept several times, a part of each line a time:
// what a sweep asks for is the same place of the next tile.
constexpr int64_t kMostAhead = 12288;
PYCORE_INLINE int64_t ahead_of(int64_t tile_bytes) {
  return Vec::kWidth == 16 ? smaller(kMostAhead, tile_bytes / 4 * 3) : tile_bytes;
}

PYCORE_INLINE void prefetch_lines(const char* x, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(x + at);
}

template <int M, int V, DType kType>
struct FewBlock {
  Vec acc[M][V];

  PYCORE_INLINE void zero() {
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) acc[m][v] = Vec::zero();
    }
  }
  PYCORE_INLINE void load(const float* from, int64_t row) {
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) acc[m][v] = Vec::load(from + m * row + v * Vec::kWidth);
      as_loaded<kType>(acc[m]);
    }
  }
  // The end of the block: its accumulators are in another order then.
  PYCORE_INLINE void store(float* to, int64_t row) {
    for (int m = 0; m < M; ++m) {
      in_order<kType>(acc[m]);
      for (int v = 0; v < V; ++v) acc[m][v].store(to + m * row + v * Vec::kWidth);
    }
  }

  // acc[m] += factors[m * factor_row] x, a row of the matrix; the row `ahead` of it is asked for.
  PYCORE_INLINE void add(const char* x, int64_t ahead, const float* factors, int64_t factor_row) {
    prefetch_lines(x + ahead, V * Vec::kWidth * kElementBytes<kType>);
    Vec row[V];
    load_vectors<kType>(x, row);
    for (int m = 0; m < M; ++m) {
      const Vec factor = Vec::broadcast(factors[m * factor_row]);
      for (int v = 0; v < V; ++v) acc[m][v] = Vec::fma(factor, row[v], acc[m][v]);
    }
  }
};

// Vectors a block of M rows has: enough chains that one FMA need not wait for the last, and as many as registers hold.
template <int M, DType kType>
constexpr int kFewVectors =
    Vec::kProductColumns == 4 || M <= 2 || (M == 3 && kType == DType::kFloat32) ? 4 : Vec::kProductColumns;

// f(d, vectors) for pieces of `begin` .. `end` - 1, as wide as M rows have them and then two vectors and one; returns
// where whole vectors end. `vectors` is a number in a type.
template <int V>
struct Vectors {
  static constexpr int kCount = V;
};
template <int M, DType kType, class F>
PYCORE_INLINE int64_t in_vectors(int64_t begin, int64_t end, const F& f) {
  constexpr int kMost = kFewVectors<M, kType>;
  int64_t d = begin;
  for (; d + kMost * Vec::kWidth <= end; d += kMost * Vec::kWidth) f(d, Vectors<kMost>{});
  if (kMost > 2 && d + 2 * Vec::kWidth <= end) {
    f(d, Vectors<2>{});
    d += 2 * Vec::kWidth;
  }
  if (d + Vec::kWidth <= end) {
    f(d, Vectors<1>{});
    d += Vec::kWidth;
  }
  return d;
}

// return function<M, kType>(...), M being `rows`; where both are in scope.
#define PYCORE_FEW_ROWS(function, ...)              \
  switch (rows) {                                   \
    case 1: return function<1, kType>(__VA_ARGS__); \
    case 2: return function<2, kType>(__VA_ARGS__); \
    case 3: return function<3, kType>(__VA_ARGS__); \
    case 4: return function<4, kType>(__VA_ARGS__); \
    case 5: return function<5, kType>(__VA_ARGS__); \
    case 6: return function<6, kType>(__VA_ARGS__); \
    default: return;                                \
  }
