// SPDX-License-Identifier: Apache-2.0
// The k largest of a row so far, in order, ties to the lowest index; and the distance of two rows.
#pragma once

#include <pycore/key_tile.h>

#include <cstdint>

#include "../softmax.inl.h"
#include "../vq/distance.inl.h"
#include "insert.inl.h"
#include "kernels.h"

void pairwise_select(const void* memory, int64_t count, int64_t first, int64_t k, int64_t* held, void* scores,
                     int64_t* indices) {
  const float* const row = static_cast<const float*>(memory);
  float* const best = static_cast<float*>(scores);
  int64_t n = *held;
  for (int64_t c = 0; c < count; c += kKeyTile) {
    const int64_t here = smaller(kKeyTile, count - c);
    if (n == k) {  // most tiles have nothing that is larger than the least
      Vec most = Vec::broadcast(-kInfinity);
      for (int64_t i = 0; i < here; i += Vec::kWidth) most = Vec::max(Vec::load(row + c + i), most);
      if (!(most.reduce_max() > best[k - 1])) continue;
    }
    for (int64_t i = c; i < c + here; ++i) insert_largest(row[i], first + i, k, &n, best, indices);
  }
  *held = n;
}

void pairwise_distance(const void* x, const void* y, int64_t dim, void* out) {
  *static_cast<float*>(out) = distance(static_cast<const float*>(x), static_cast<const float*>(y), dim);
}
