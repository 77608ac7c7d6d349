// SPDX-License-Identifier: Apache-2.0
// The k largest of a row so far, in order, ties to the lowest index; and the distance of two rows.
#pragma once

#include <pycore/key_tile.h>

#include <cstdint>

#include "../softmax.inl.h"
#include "../vq/distance.inl.h"
#include "insert.inl.h"
#include "kernels.h"

// The first of the largest, if it is larger than what is there.
inline void select_one(const float* row, int64_t count, int64_t first, int64_t* held, float* best, int64_t* index) {
  Vec most = Vec::broadcast(-kInfinity);
  for (int64_t c = 0; c < count; c += Vec::kWidth) most = Vec::max(Vec::load(row + c), most);  // never a NaN
  const float top = most.reduce_max();
  if (*held == 1 && !(top > best[0])) return;
  const Vec limit = Vec::broadcast(top);
  for (int64_t c = 0; c < count; c += Vec::kWidth) {
    uint64_t others = ~Vec::load(row + c).below(limit) & ((uint64_t{1} << Vec::kWidth) - 1);
    for (; others; others &= others - 1) {  // NaN among them
      const int64_t at = c + __builtin_ctzll(others);
      if (at < count && row[at] == top) {
        *held = 1;
        best[0] = top;
        index[0] = first + at;
        return;
      }
    }
  }
}

void pairwise_select(void* memory, int64_t count, int64_t first, int64_t k, int64_t* held, void* scores,
                     int64_t* indices) {
  float* const row = static_cast<float*>(memory);
  float* const best = static_cast<float*>(scores);
  for (int64_t c = count; c < round_up(count, Vec::kWidth); ++c) row[c] = -kInfinity;
  if (k == 1) return select_one(row, count, first, held, best, indices);
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
