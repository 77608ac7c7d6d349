// SPDX-License-Identifier: Apache-2.0
// A segment of a row: from scores to logits, and their sum of exponentials; and those of columns.
#pragma once

#include <cstdint>

#include "../softmax.inl.h"
#include "../tanh.inl.h"
#include "kernels.h"

void pairwise_logits(void* memory, int64_t count, double scale, const void* bias_memory, double softcap) {
  float* const row = static_cast<float*>(memory);
  const float* const bias = static_cast<const float*>(bias_memory);
  const Vec factor = Vec::broadcast(static_cast<float>(scale));
  const Vec cap = Vec::broadcast(static_cast<float>(softcap));
  for (int64_t c = 0; c < count; c += Vec::kWidth) {
    const int64_t here = smaller(Vec::kWidth, count - c);
    Vec z = Vec::load(row + c);
    z = bias ? Vec::fma(z, factor, load_lanes(bias + c, here)) : z * factor;
    if (softcap > 0) z = cap * tanh_of(z / cap);
    z.store(row + c);
  }
  for (int64_t c = count; c < round_up(count, kSumLanes); ++c) row[c] = -kInfinity;
}

void pairwise_reduce(const void* memory, int64_t count, void* largest, void* sum) {
  const float* const row = static_cast<const float*>(memory);
  const int64_t end = round_up(count, kSumLanes);
  Vec most = Vec::broadcast(-kInfinity);
  for (int64_t c = 0; c < end; c += Vec::kWidth) most = Vec::max(most, Vec::load(row + c));
  float top = most.reduce_max();
  if (!(top > -kInfinity)) top = -kInfinity;  // all -inf, or NaN
  const Vec from = Vec::broadcast(top == -kInfinity ? 0.0f : top), factor = Vec::broadcast(kLog2E);
  LaneSum by_lane;
  for (int v = 0; v < kSumVectors; ++v) by_lane.lanes[v] = Vec::zero();
  by_lane.add(0, end,
              [&](int64_t c) __attribute__((always_inline)) { return ((Vec::load(row + c) - from) * factor).exp2(); });
  *static_cast<float*>(largest) = top;
  *static_cast<float*>(sum) = by_lane.total();
}

void pairwise_total(const void* memory, int64_t count, void* sum) {
  const float* const row = static_cast<const float*>(memory);
  LaneSum by_lane;
  for (int v = 0; v < kSumVectors; ++v) by_lane.lanes[v] = Vec::zero();
  by_lane.add(0, round_up(count, Vec::kWidth), [&](int64_t c) __attribute__((always_inline)) {
    return load_lanes(row + c, smaller(Vec::kWidth, count - c));
  });
  *static_cast<float*>(sum) = by_lane.total();
}

void pairwise_reduce_columns(const void* memory, int64_t rows, int64_t count, void* largest, void* sum) {
  const float* const logits = static_cast<const float*>(memory);
  constexpr float kLargest = 0x1.fffffep127f;
  const Vec none = Vec::broadcast(-kInfinity), factor = Vec::broadcast(kLog2E);
  for (int64_t c = 0; c < count; c += Vec::kWidth) {
    Vec most = none;
    for (int64_t r = 0; r < rows; ++r) most = Vec::max(Vec::load(logits + r * kSegmentStride + c), most);
    // -inf - -inf would be none; NaN stays out of the maximum, and is in the sum.
    const Vec from = Vec::max(most, Vec::broadcast(-kLargest));
    Vec total = Vec::zero();
    for (int64_t r = 0; r < rows; ++r) {
      total = total + ((Vec::load(logits + r * kSegmentStride + c) - from) * factor).exp2();
    }
    most.store(static_cast<float*>(largest) + c);
    total.store(static_cast<float*>(sum) + c);
  }
}
