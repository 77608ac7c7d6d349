// SPDX-License-Identifier: Apache-2.0
// Sums in sixteen lanes, element i in lane i mod 16, whatever a vector holds: so all instruction sets add in one order.
#pragma once

#include <cstdint>

#include "vector_rows.inl.h"

constexpr int kSumLanes = 16;
constexpr int kSumVectors = kSumLanes / Vec::kWidth;

struct LaneSum {
  Vec lanes[kSumVectors];

  static PYCORE_INLINE LaneSum zero() {
    LaneSum sum;
    for (int v = 0; v < kSumVectors; ++v) sum.lanes[v] = Vec::zero();
    return sum;
  }
  static PYCORE_INLINE LaneSum load(const float* row) {
    LaneSum sum;
    for (int v = 0; v < kSumVectors; ++v) sum.lanes[v] = Vec::load(row + v * Vec::kWidth);
    return sum;
  }
  PYCORE_INLINE void store(float* row) const {
    for (int v = 0; v < kSumVectors; ++v) lanes[v].store(row + v * Vec::kWidth);
  }
  PYCORE_INLINE LaneSum operator*(Vec factor) const {
    LaneSum scaled;
    for (int v = 0; v < kSumVectors; ++v) scaled.lanes[v] = lanes[v] * factor;
    return scaled;
  }
  PYCORE_INLINE float total() const {
    Vec x = lanes[0];
    if constexpr (kSumVectors == 2) x = x + lanes[1];
    return x.reduce_add();  // goes on halving
  }
  // For elements begin <= c < end, in whole vectors: the lanes of c become term(c, lanes).
  template <class Term>
  PYCORE_INLINE void fold(int64_t begin, int64_t end, const Term& term) {
    int64_t c = begin;
    if constexpr (kSumVectors == 2) {
      if (c % kSumLanes != 0 && c < end) {
        lanes[1] = term(c, lanes[1]);
        c += Vec::kWidth;
      }
      for (; c + kSumLanes <= end; c += kSumLanes) {
        lanes[0] = term(c, lanes[0]);
        lanes[1] = term(c + Vec::kWidth, lanes[1]);
      }
    }
    for (; c < end; c += Vec::kWidth) lanes[0] = term(c, lanes[0]);
  }
  // Adds term(c), the vector of elements from c on.
  template <class Term>
  PYCORE_INLINE void add(int64_t begin, int64_t end, const Term& term) {
    fold(begin, end, [&](int64_t c, Vec sum) __attribute__((always_inline)) { return sum + term(c); });
  }
};

// <x, y>, n channels, which the caller has padded with zeros to whole vectors.
PYCORE_INLINE float lane_dot(const float* x, const float* y, int64_t n) {
  LaneSum sum = LaneSum::zero();
  sum.fold(0, n, [&](int64_t c, Vec lanes) __attribute__((always_inline)) {
    return Vec::fma(Vec::load(x + c), Vec::load(y + c), lanes);
  });
  return sum.total();
}
