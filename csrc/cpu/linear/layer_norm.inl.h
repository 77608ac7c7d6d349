// SPDX-License-Identifier: Apache-2.0
// Layer norm a row at a time, sums in kNormLanes lanes. scalar.cpp has the formulas.
#pragma once

#include <pycore/dtype.h>
#include <pycore/linear/linear.h>

#include <cstdint>

#include "../vector_rows.inl.h"
#include "kernels.h"
#include "norm.inl.h"
#include "rows.inl.h"

// `count` lanes of x, zero in the others.
PYCORE_INLINE Vec first_lanes(Vec x, int64_t count) {
  return count == Vec::kWidth ? x : x.select((uint64_t{1} << count) - 1, Vec::zero());
}

// What normalises one row: (x - mean - rest) * scale.
template <DType kType>
struct RowMoments {
  float mean, rest, scale;

  PYCORE_INLINE RowMoments(const char* x, int64_t channels, float eps) {
    const float size = static_cast<float>(channels);
    mean = lane_sum(channels, [&](int64_t c, int64_t count, Vec chain)
                                  __attribute__((always_inline)) { return chain + load_some<kType>(x, c, count); }) /
           size;
    const Vec means = Vec::broadcast(mean);
    rest = lane_sum(channels,
                    [&](int64_t c, int64_t count, Vec chain) __attribute__((always_inline)) {
                      return chain + first_lanes(load_some<kType>(x, c, count) - means, count);
                    }) /
           size;
    const float squares = lane_sum(channels, [&](int64_t c, int64_t count, Vec chain) __attribute__((always_inline)) {
      const Vec d = first_lanes(deviation(load_some<kType>(x, c, count)), count);
      return Vec::fma(d, d, chain);
    });
    scale = 1.0f / __builtin_sqrtf(squares / size + eps);
  }
  PYCORE_INLINE Vec deviation(Vec x) const { return x - Vec::broadcast(mean) - Vec::broadcast(rest); }
  PYCORE_INLINE Vec normal(Vec x) const { return deviation(x) * Vec::broadcast(scale); }
};

template <DType kType>
void layer_norm_rows(const LayerNormParams& params, Range rows) {
  const char *weight = static_cast<const char*>(params.weight), *bias = static_cast<const char*>(params.bias);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const char* x = row_bytes<kType>(params.x, r);
    char* out = static_cast<char*>(params.out) + r * params.channels * kElementBytes<kType>;
    const RowMoments<kType> moments(x, params.channels, static_cast<float>(params.eps));
    for (int64_t c = 0; c < params.channels; c += Vec::kWidth) {
      const int64_t count = smaller(Vec::kWidth, params.channels - c);
      Vec y = moments.normal(load_some<kType>(x, c, count));
      if (weight) y = y * load_some<kType>(weight, c, count);
      if (bias) y = y + load_some<kType>(bias, c, count);
      store_some<kType>(y, out, c, count);
    }
  }
}

template <DType kType>
void layer_norm_backward_rows(const LayerNormBackwardParams& params, Range rows, void* partial_memory,
                              void* chain_memory) {
  const int64_t channels = params.channels;
  const char* weight = static_cast<const char*>(params.weight);
  float* partial = static_cast<float*>(partial_memory);
  float* chain = static_cast<float*>(chain_memory);
  for (int64_t c = 0; partial && c < 2 * channels; ++c) partial[c] = 0.0f;
  for (int64_t block = rows.begin; block < rows.end; block += kNormRowBlock) {
    for (int64_t c = 0; partial && c < 2 * channels; ++c) chain[c] = 0.0f;
    const int64_t end = smaller(block + kNormRowBlock, rows.end);
    for (int64_t r = block; r < end; ++r) {
      const char* x = row_bytes<kType>(params.x, r);
      const char* grad = row_bytes<kType>(params.grad_out, r);
      char* grad_x = params.grad_x ? static_cast<char*>(params.grad_x) + r * channels * kElementBytes<kType> : nullptr;
      const RowMoments<kType> moments(x, channels, static_cast<float>(params.eps));
      const auto h = [&](int64_t c, int64_t count) __attribute__((always_inline)) {
        const Vec g = load_some<kType>(grad, c, count);
        return weight ? g * load_some<kType>(weight, c, count) : g;
      };
      const float size = static_cast<float>(channels);
      const float sum = lane_sum(channels, [&](int64_t c, int64_t count, Vec link)
                                               __attribute__((always_inline)) { return link + h(c, count); });
      const float dot = lane_sum(channels, [&](int64_t c, int64_t count, Vec link) __attribute__((always_inline)) {
        return Vec::fma(h(c, count), moments.normal(load_some<kType>(x, c, count)), link);
      });
      const Vec mean = Vec::broadcast(sum / size), slope = Vec::broadcast(dot / size);
      const Vec scale = Vec::broadcast(moments.scale);
      for (int64_t c = 0; c < channels; c += Vec::kWidth) {
        const int64_t count = smaller(Vec::kWidth, channels - c);
        const Vec y = moments.normal(load_some<kType>(x, c, count));
        if (grad_x) store_some<kType>(Vec::fnma(y, slope, h(c, count) - mean) * scale, grad_x, c, count);
        if (!partial) continue;
        const Vec g = load_some<kType>(grad, c, count);
        float *by_weight = chain + c, *by_bias = chain + channels + c;
        store_lanes(Vec::fma(g, y, load_lanes(by_weight, count)), by_weight, count);
        store_lanes(load_lanes(by_bias, count) + g, by_bias, count);
      }
    }
    for (int64_t c = 0; partial && c < 2 * channels; ++c) partial[c] = partial[c] + chain[c];
  }
}
