// SPDX-License-Identifier: Apache-2.0
// The forward pass, plain: one warp a query row, for devices without the shared memory that tiles want.
#include "launch.h"
#include "warp.cuh"

namespace pycore {
namespace {

// A softmax under way: what one segment, or several, add up to. Empty while sum is 0.
struct WarpState {
  float max = -INFINITY, sum = 0;
  float accumulator[kChannelsPerLane] = {};

  __device__ void rescale(float new_max) {
    const float factor = max == new_max ? 1.0f : expf(max - new_max);
    max = new_max;
    sum *= factor;
    for (int k = 0; k < kChannelsPerLane; ++k) accumulator[k] *= factor;
  }
  // A later segment joins.
  __device__ void merge(const WarpState& other) {
    if (other.sum == 0) return;
    rescale(fmaxf(max, other.max));
    const float factor = expf(other.max - max);  // NaN if both are -inf: then the sum is NaN
    sum = fmaf(other.sum, factor, sum);
    for (int k = 0; k < kChannelsPerLane; ++k) accumulator[k] = fmaf(other.accumulator[k], factor, accumulator[k]);
  }
};

template <class T>
__global__ void plain_forward_kernel(const __grid_constant__ AttentionParams params) {
  const int64_t index = warp_index(), lane = threadIdx.x % kLanes;
  if (index >= params.batch * params.heads * params.query_length) return;
  float* near = reinterpret_cast<float*>(shared_memory()) + threadIdx.x / kLanes * 2 * params.head_dim;
  const QueryRow<T> row(params, index, near, near + params.head_dim);
  WarpState total, segment;
  int64_t open_segment = 0;
  const auto visit = [&](int64_t first, uint32_t bits) {
    if (first / kKeyTile / kSegmentTiles != open_segment) {
      total.merge(segment);
      segment = WarpState();
      open_segment = first / kKeyTile / kSegmentTiles;
    }
    const bool kept = bits >> lane & 1;
    float logit = -INFINITY, slope;
    if (kept)
      logit = logit_of(params, row.map.schedule, row.b, row.h, row.p, first + lane, row.product(first + lane), &slope);
    const float largest = fmaxf(segment.max, warp_max(logit));
    if (largest != segment.max) segment.rescale(largest);
    const float weight = kept ? expf(logit - (largest == -INFINITY ? 0.0f : largest)) : 0.0f;
    segment.sum += warp_sum(weight);
    const float share = kept ? weight * row.keep_factor(first + lane) : 0.0f;
    for (uint32_t left = bits; left != 0; left &= left - 1) {
      const int other = __ffs(static_cast<int>(left)) - 1;
      const float factor = __shfl_sync(kAllLanes, share, other);
      if (factor == 0) continue;
      const T* value = row.value(first + other);
      for (int k = 0; k < kChannelsPerLane; ++k) {
        const int64_t c = k * kLanes + lane;
        if (c < params.value_dim) segment.accumulator[k] = fmaf(factor, to_float(value[c]), segment.accumulator[k]);
      }
    }
  };
  row.walk(visit, [](int64_t) {});
  total.merge(segment);
  const float sink = row.valid && params.sink_logits ? static_cast<const float*>(params.sink_logits)[row.h] : -INFINITY;
  if (sink != -INFINITY) {  // which adds nothing, and has no distance to a row without a key
    if (sink > total.max) total.rescale(sink);
    total.sum += expf(sink - total.max);
  }
  T* out = static_cast<T*>(params.out) + index * params.value_dim;
  for (int k = 0; k < kChannelsPerLane; ++k) {
    const int64_t c = k * kLanes + lane;
    if (c < params.value_dim) out[c] = from_float<T>(total.sum == 0 ? 0.0f : total.accumulator[k] / total.sum);
  }
  if (lane != 0) return;
  const bool finite = total.sum > 0 && total.sum < INFINITY && fabsf(total.max) < INFINITY;
  store_lse(params, index,
            finite ? TwoParts{total.max, 0.0f}.plus(two_part_log2(total.sum).times({kLn2, kLn2Low}))
                   : TwoParts{total.max + logf(total.sum), 0.0f});
}

}  // namespace

Status launch_plain_forward(const AttentionParams& params, void* stream) {
  const int64_t blocks = blocks_of_warps(params.batch * params.heads * params.query_length);
  const int64_t shared = kWarpsPerBlock * 2 * params.head_dim * static_cast<int64_t>(sizeof(float));
  switch (params.dtype) {
    case DType::kFloat16:
      return launch(plain_forward_kernel<Float16>, blocks, kWarpBlockThreads, shared, stream, params);
    case DType::kBFloat16:
      return launch(plain_forward_kernel<BFloat16>, blocks, kWarpBlockThreads, shared, stream, params);
    default: return launch(plain_forward_kernel<float>, blocks, kWarpBlockThreads, shared, stream, params);
  }
}

}  // namespace pycore
