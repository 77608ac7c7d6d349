// SPDX-License-Identifier: Apache-2.0
// A list of the k largest so far, the largest first; of equal ones the one that came first. For every instruction set.
#pragma once

#include <cstdint>

template <class T>
inline void insert_largest(T score, int64_t index, int64_t k, int64_t* held, T* scores, int64_t* indices) {
  int64_t n = *held;
  if (score != score || (n == k && !(score > scores[k - 1]))) return;
  int64_t low = 0, high = n;  // behind all that are at least as large
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (scores[middle] < score) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  if (n == k) --n;
  for (int64_t i = n; i > low; --i) {
    scores[i] = scores[i - 1];
    indices[i] = indices[i - 1];
  }
  scores[low] = score;
  indices[low] = index;
  *held = n + 1;
}
