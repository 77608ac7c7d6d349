// SPDX-License-Identifier: Apache-2.0
// What the products of few rows are at most, for a search that reads y once and at the speed of memory. Products here
// are summed in lanes, along the channels as they lie, which needs no turning, so they decide nothing: whoever may be
// among the best is given its score by pairwise_scores.
//
// Both sums, this one s' and the score s, differ from the exact one by at most as many roundings as they have steps,
// each of at most 2^-24 sum |x_d y_d| <= 2^-24 |x| |y|. So s <= s' + e |x| |y|, where e counts the steps of both with
// room for the last few operations, and terms that underflow, in |y|^2 or in a sum, cost 2^-126 each.
// For at most 2^16 channels, up to where a hundredth is room enough for the lengths' own roundings.
#pragma once

#include <cstdint>

#include "../vector_rows.inl.h"
#include "kernels.h"

template <int R>
inline void bounds_of(const PairwiseParams& params, int64_t batch, int64_t first, Range columns, float* out) {
  constexpr int64_t kWidth = Vec::kWidth, kStep = 2 * kWidth;
  const int64_t dim = params.dim;
  const float* x[R];
  float error[R];
  const float terms = static_cast<float>(dim), tiny = terms * 0x1p-124f;
  const float unit = (terms + terms / 8 + 64) * 0x1p-24f;
  for (int r = 0; r < R; ++r) {
    x[r] = params.x.at<float>(batch, first + r);
    float squares = 0;
    for (int64_t d = 0; d < dim; ++d) squares += x[r][d] * x[r][d];
    error[r] = unit * 1.01f * __builtin_sqrtf(squares * 1.01f + tiny);
  }
  for (int64_t c = columns.begin; c < columns.end; ++c) {
    const float* const y = params.y.at<float>(batch, c);
    Vec sums[R][2], squares[2];
    for (int v = 0; v < 2; ++v) {
      squares[v] = Vec::zero();
      for (int r = 0; r < R; ++r) sums[r][v] = Vec::zero();
    }
    int64_t d = 0;
    for (; d + kStep <= dim; d += kStep) {
      for (int v = 0; v < 2; ++v) {
        const Vec here = Vec::load(y + d + v * kWidth);
        squares[v] = Vec::fma(here, here, squares[v]);
        for (int r = 0; r < R; ++r) sums[r][v] = Vec::fma(Vec::load(x[r] + d + v * kWidth), here, sums[r][v]);
      }
    }
    for (; d < dim; d += kWidth) {
      const int64_t count = smaller(kWidth, dim - d);
      const Vec here = load_lanes(y + d, count);
      squares[0] = Vec::fma(here, here, squares[0]);
      for (int r = 0; r < R; ++r) sums[r][0] = Vec::fma(load_lanes(x[r] + d, count), here, sums[r][0]);
    }
    const float length = __builtin_sqrtf((squares[0] + squares[1]).reduce_add() * 1.01f + tiny);
    for (int r = 0; r < R; ++r) {
      const float sum = (sums[r][0] + sums[r][1]).reduce_add();
      out[r * kSegmentStride + c - columns.begin] = sum + (error[r] * length + tiny);
    }
  }
}

void pairwise_bounds(const PairwiseParams& params, int64_t batch, Range rows, Range columns, void* memory) {
  float* const out = static_cast<float*>(memory);
  switch (rows.count()) {
    case 1: return bounds_of<1>(params, batch, rows.begin, columns, out);
    case 2: return bounds_of<2>(params, batch, rows.begin, columns, out);
    case 3: return bounds_of<3>(params, batch, rows.begin, columns, out);
    case 4: return bounds_of<4>(params, batch, rows.begin, columns, out);
    default: return;
  }
}

// The first column from `from` on whose bound is more than `least`; count if there is none. Bounds are no NaN.
int64_t pairwise_next(const void* memory, int64_t from, int64_t count, double least) {
  const float* const bounds = static_cast<const float*>(memory);
  const Vec limit = Vec::broadcast(static_cast<float>(least));
  for (int64_t c = from / Vec::kWidth * Vec::kWidth; c < count; c += Vec::kWidth) {
    uint64_t above = limit.below(load_lanes(bounds + c, smaller(Vec::kWidth, count - c)));
    if (count - c < Vec::kWidth) above &= (uint64_t{1} << (count - c)) - 1;
    if (c < from) above &= ~uint64_t{0} << (from - c);
    if (above) return c + __builtin_ctzll(above);
  }
  return count;
}
