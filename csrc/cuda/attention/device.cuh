// SPDX-License-Identifier: Apache-2.0
// What the CUDA attention kernels share: where a batch row's rows lie, what makes a logit of a score, and the rotation.
#pragma once

#include <pycore/attention/attention.h>
#include <pycore/attention/rows.h>

#include <cmath>
#include <cstdint>

#include "../launch.cuh"
#include "../ptx.cuh"

namespace pycore {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMostChannels = 256;  // of head_dim and value_dim
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f, kLn2Low = -1.9046543e-9f;

__device__ inline float warp_max(float x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

template <class T>
__device__ T warp_sum(T x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ inline int64_t clamped(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }

// row_map with every number held within the arrays: the lengths lie in device memory, and no host has read them.
__device__ inline RowMap bounded_row_map(const AttentionParams& params, int64_t b, int64_t h) {
  RowMap map = row_numbers(params, b);
  if (map.ring == 0) map.start = clamped(map.start, 0, params.key_length);
  map.keys = clamped(map.keys, 0, map.ring == 0 ? params.key_length - map.start : params.key_length);
  map.sinks = clamped(map.sinks, 0, map.keys);
  map.offset = clamped(map.offset, 0, kFar);
  map.queries = clamped(map.queries, 0, params.query_length);
  bind_schedule(params, b, h, &map);
  return map;
}

// The tiles of 64 positions that key_length rows can lie in, on both sides of a gap.
PYCORE_HOST_DEVICE inline int64_t most_key_tiles(int64_t key_length) { return key_length / kKeyTile + 4; }

template <class T>
__device__ const T* row_pointer(const void* data, const AttentionStrides& strides, int64_t b, int64_t h, int64_t row) {
  return static_cast<const T*>(data) + b * strides.batch + h * strides.head + row * strides.row;
}

// Channel c of a row rotated by `distance` positions, backwards where it is negative.
template <class T>
__device__ float rotated(const AttentionParams& params, const T* x, int64_t distance, int64_t c) {
  if (c >= params.rope_dim || params.rope_rows == 0) return to_float(x[c]);
  const int64_t half = params.rope_dim / 2;
  const int64_t i = params.rope_interleaved ? c / 2 : c < half ? c : c - half;
  const bool second = params.rope_interleaved ? c % 2 != 0 : c >= half;
  const int64_t other = params.rope_interleaved ? c ^ 1 : second ? c - half : c + half;
  int64_t row = distance < 0 ? -distance : distance;
  if (row >= params.rope_rows) row = params.rope_rows - 1;  // in bounds whatever the caller's lengths say
  if (row < 0) row = 0;                                     // the distance was INT64_MIN
  const float cosine = static_cast<const float*>(params.rope_cos)[row * params.rope_stride + i];
  const float sine = static_cast<const float*>(params.rope_sin)[row * params.rope_stride + i];
  const float turned = to_float(x[other]) * sine;
  return fmaf(to_float(x[c]), cosine, (distance < 0) == second ? -turned : turned);
}

// The sum of two floats, as its rounded value and what that leaves out.
struct TwoParts {
  float high = 0, low = 0;

  __device__ static TwoParts sum(float a, float b) {
    const float high = a + b, seen = high - a;
    return {high, (a - (high - seen)) + (b - seen)};
  }
  __device__ TwoParts plus(TwoParts other) const {
    const TwoParts sum = TwoParts::sum(high, other.high);
    return TwoParts::sum(sum.high, sum.low + low + other.low);
  }
  __device__ TwoParts times(TwoParts other) const {
    const float product = high * other.high;
    return TwoParts::sum(product, fmaf(high, other.high, -product) + (high * other.low + low * other.high));
  }
  __device__ static TwoParts quotient(float a, float b) {
    const float high = a / b;
    return {high, fmaf(-high, b, a) / b};
  }
  __device__ bool finite() const { return fabsf(high) < INFINITY; }
};

// log2(x) of a positive finite x.
__device__ inline TwoParts two_part_log2(float x) {
  int exponent;
  const float fraction = frexpf(x, &exponent);
  return TwoParts::sum(static_cast<float>(exponent), log2f(fraction));
}

// A row's lse; of an infinity or NaN, the second part is 0.
__device__ inline void store_lse(const AttentionParams& params, int64_t index, TwoParts lse) {
  static_cast<float*>(params.lse)[index] = lse.high;
  if (params.lse_low) static_cast<float*>(params.lse_low)[index] = lse.finite() ? lse.low : 0.0f;
}
__device__ inline TwoParts load_lse(const AttentionParams& params, int64_t index) {
  const auto* low = static_cast<const float*>(params.lse_low);
  return {static_cast<const float*>(params.lse)[index], low ? low[index] : 0.0f};
}

// What softcap and the biases make of the <q, k> of the pair at positions p and j; *slope is the derivative.
__device__ inline float logit_of(const AttentionParams& params, const TileSchedule& schedule, int64_t b, int64_t h,
                                 int64_t p, int64_t j, float product, float* slope) {
  const float scale = static_cast<float>(params.scale);
  float logit = product * scale;
  *slope = scale;
  if (params.softcap > 0) {
    const float cap = static_cast<float>(params.softcap), bent = tanhf(logit / cap);
    logit = cap * bent;
    *slope *= 1 - bent * bent;
  }
  if (has_bias(params)) logit += bias_of<float>(params, b, h, schedule.place(p) - schedule.place(j));
  if (params.block_bias) logit += block_bias_of<float>(params, h, p, j);
  return logit;
}

}  // namespace
}  // namespace pycore
