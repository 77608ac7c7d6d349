// SPDX-License-Identifier: Apache-2.0
// Rows of bits by the bits in which they differ. For every instruction set: one with a population count counts by it.
#pragma once

#include <cstdint>

#include "insert.inl.h"
#include "kernels.h"

inline int64_t hamming_distance(const uint8_t* x, const uint8_t* y, int64_t bytes) {
  int64_t count = 0, i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t a, b;
    __builtin_memcpy(&a, x + i, 8);
    __builtin_memcpy(&b, y + i, 8);
    count += __builtin_popcountll(a ^ b);
  }
  for (; i < bytes; ++i) count += __builtin_popcount(static_cast<unsigned>(x[i] ^ y[i]));
  return count;
}

void hamming_rows(const HammingTopkParams& params, int64_t batch, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t at = (batch * params.rows + row) * params.k;
    int64_t* const distances = params.distances + at;
    const uint8_t* const x = params.x.at<uint8_t>(batch, row);
    int64_t held = 0;
    for (int64_t j = 0; j < params.columns; ++j) {
      const int64_t d = -hamming_distance(x, params.y.at<uint8_t>(batch, j), params.bytes);
      insert_largest(d, j, params.k, &held, distances, params.indices + at);
    }
    for (int64_t i = 0; i < held; ++i) distances[i] = -distances[i];
  }
}
