// SPDX-License-Identifier: Apache-2.0
// RMS norm a row at a time, sums in kNormLanes lanes.
#pragma once

#include <pycore/dtype.h>
#include <pycore/linear/linear.h>

#include <cstdint>

#include "../vector_rows.inl.h"
#include "kernels.h"
#include "rows.inl.h"

constexpr int kNormVectors = static_cast<int>(kNormLanes) / Vec::kWidth;

// The sum over channels of term(c, count, chain): `count` channels from c on, the vector's other lanes to be zero.
template <class Term>
PYCORE_INLINE float lane_sum(int64_t channels, const Term& term) {
  Vec lanes[kNormVectors];
  for (int v = 0; v < kNormVectors; ++v) lanes[v] = Vec::zero();
  int64_t c = 0;
  for (; c + kNormLanes <= channels; c += kNormLanes) {
    for (int v = 0; v < kNormVectors; ++v) lanes[v] = term(c + v * Vec::kWidth, Vec::kWidth, lanes[v]);
  }
  for (int v = 0; v < kNormVectors; ++v) {
    const int64_t left = channels - c - v * Vec::kWidth;
    if (left > 0) lanes[v] = term(c + v * Vec::kWidth, smaller(left, Vec::kWidth), lanes[v]);
  }
  for (int half = kNormVectors / 2; half > 0; half /= 2) {
    for (int v = 0; v < half; ++v) lanes[v] = lanes[v] + lanes[v + half];
  }
  return lanes[0].reduce_add();  // goes on halving
}

template <DType kType>
PYCORE_INLINE float inverse_rms(const char* x, int64_t channels, float eps) {
  const float squares = lane_sum(channels, [&](int64_t c, int64_t count, Vec chain) __attribute__((always_inline)) {
    const Vec v = load_some<kType>(x, c, count);
    return Vec::fma(v, v, chain);
  });
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(channels) + eps);
}

// What a normalised row is multiplied by, from channel c on.
template <DType kType>
PYCORE_INLINE Vec norm_factor(const char* weight, int64_t c, int64_t count, bool plus_one) {
  const Vec w = load_some<kType>(weight, c, count);
  return plus_one ? w + Vec::broadcast(1.0f) : w;
}

template <DType kType>
void norm_rows(const RmsNormParams& params, Range rows) {
  const char* weight = static_cast<const char*>(params.weight);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const char* x = row_bytes<kType>(params.x, r);
    char* out = static_cast<char*>(params.out) + r * params.channels * kElementBytes<kType>;
    const Vec scale = Vec::broadcast(inverse_rms<kType>(x, params.channels, static_cast<float>(params.eps)));
    for (int64_t c = 0; c < params.channels; c += Vec::kWidth) {
      const int64_t count = smaller(Vec::kWidth, params.channels - c);
      Vec y = load_some<kType>(x, c, count) * scale;
      if (weight) y = y * norm_factor<kType>(weight, c, count, params.plus_one);
      store_some<kType>(y, out, c, count);
    }
  }
}

// scalar.cpp has the formula.
template <DType kType>
void norm_backward_rows(const RmsNormBackwardParams& params, Range rows, void* partial_memory, void* chain_memory) {
  const int64_t channels = params.channels;
  const char* weight = static_cast<const char*>(params.weight);
  float* partial = static_cast<float*>(partial_memory);
  float* chain = static_cast<float*>(chain_memory);
  for (int64_t c = 0; partial && c < channels; ++c) partial[c] = 0.0f;
  for (int64_t block = rows.begin; block < rows.end; block += kNormRowBlock) {
    for (int64_t c = 0; partial && c < channels; ++c) chain[c] = 0.0f;
    const int64_t end = smaller(block + kNormRowBlock, rows.end);
    for (int64_t r = block; r < end; ++r) {
      const char* x = row_bytes<kType>(params.x, r);
      const char* grad = row_bytes<kType>(params.grad_out, r);
      char* grad_x = params.grad_x ? static_cast<char*>(params.grad_x) + r * channels * kElementBytes<kType> : nullptr;
      const float scale = inverse_rms<kType>(x, channels, static_cast<float>(params.eps));
      const float dot = lane_sum(channels, [&](int64_t c, int64_t count, Vec link) __attribute__((always_inline)) {
        Vec h = load_some<kType>(grad, c, count);
        if (weight) h = h * norm_factor<kType>(weight, c, count, params.plus_one);
        return Vec::fma(h, load_some<kType>(x, c, count), link);
      });
      const Vec mean = Vec::broadcast(dot * scale / static_cast<float>(channels)), scales = Vec::broadcast(scale);
      for (int64_t c = 0; c < channels; c += Vec::kWidth) {
        const int64_t count = smaller(Vec::kWidth, channels - c);
        const Vec g = load_some<kType>(grad, c, count), y = load_some<kType>(x, c, count) * scales;
        if (grad_x) {
          const Vec h = weight ? g * norm_factor<kType>(weight, c, count, params.plus_one) : g;
          store_some<kType>(Vec::fnma(y, mean, h) * scales, grad_x, c, count);
        }
        if (partial) store_lanes(Vec::fma(g, y, load_lanes(chain + c, count)), chain + c, count);
      }
    }
    for (int64_t c = 0; partial && c < channels; ++c) partial[c] = partial[c] + chain[c];
  }
}
