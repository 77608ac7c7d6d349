// SPDX-License-Identifier: Apache-2.0
// RMS norm a row at a time, sums in kNormLanes lanes.
#pragma once

#include <pycore/linear/linear.h>

#include <cstdint>

#include "../vector_rows.inl.h"
#include "kernels.h"

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

PYCORE_INLINE float inverse_rms(const float* x, int64_t channels, float eps) {
  const float squares = lane_sum(channels, [&](int64_t c, int64_t count, Vec chain) __attribute__((always_inline)) {
    const Vec v = load_lanes(x + c, count);
    return Vec::fma(v, v, chain);
  });
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(channels) + eps);
}

void norm_rows(const RmsNormParams& params, Range rows) {
  const float* weight = static_cast<const float*>(params.weight);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const float* x = params.x.row<float>(r);
    float* out = static_cast<float*>(params.out) + r * params.channels;
    const Vec scale = Vec::broadcast(inverse_rms(x, params.channels, static_cast<float>(params.eps)));
    for (int64_t c = 0; c < params.channels; c += Vec::kWidth) {
      const int64_t count = smaller(Vec::kWidth, params.channels - c);
      Vec y = load_lanes(x + c, count) * scale;
      if (weight) y = y * load_lanes(weight + c, count);
      store_lanes(y, out + c, count);
    }
  }
}

// linear.scalar.cpp has the formula.
void norm_backward_rows(const RmsNormBackwardParams& params, Range rows, void* partial_memory, void* chain_memory) {
  const int64_t channels = params.channels;
  const float* weight = static_cast<const float*>(params.weight);
  float* partial = static_cast<float*>(partial_memory);
  float* chain = static_cast<float*>(chain_memory);
  for (int64_t c = 0; partial && c < channels; ++c) partial[c] = 0.0f;
  for (int64_t block = rows.begin; block < rows.end; block += kNormRowBlock) {
    for (int64_t c = 0; partial && c < channels; ++c) chain[c] = 0.0f;
    const int64_t end = smaller(block + kNormRowBlock, rows.end);
    for (int64_t r = block; r < end; ++r) {
      const float* x = params.x.row<float>(r);
      const float* grad = params.grad_out.row<float>(r);
      float* grad_x = params.grad_x ? static_cast<float*>(params.grad_x) + r * channels : nullptr;
      const float scale = inverse_rms(x, channels, static_cast<float>(params.eps));
      const float dot = lane_sum(channels, [&](int64_t c, int64_t count, Vec link) __attribute__((always_inline)) {
        Vec h = load_lanes(grad + c, count);
        if (weight) h = h * load_lanes(weight + c, count);
        return Vec::fma(h, load_lanes(x + c, count), link);
      });
      const Vec mean = Vec::broadcast(dot * scale / static_cast<float>(channels)), scales = Vec::broadcast(scale);
      for (int64_t c = 0; c < channels; c += Vec::kWidth) {
        const int64_t count = smaller(Vec::kWidth, channels - c);
        const Vec g = load_lanes(grad + c, count), y = load_lanes(x + c, count) * scales;
        if (grad_x) {
          const Vec h = weight ? g * load_lanes(weight + c, count) : g;
          store_lanes(Vec::fnma(y, mean, h) * scales, grad_x + c, count);
        }
        if (partial) store_lanes(Vec::fma(g, y, load_lanes(chain + c, count)), chain + c, count);
      }
    }
    for (int64_t c = 0; partial && c < channels; ++c) partial[c] = partial[c] + chain[c];
  }
}
