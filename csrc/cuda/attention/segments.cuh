// SPDX-License-Identifier: Apache-2.0
// How query rows are cut into tiles, and how the softmaxes of a row's segments merge.
#pragma once

#include "finite.cuh"
#include "launch.h"
#include "turn.cuh"

namespace pycore {
namespace {

// A number as a type, for choosing a kernel.
template <auto kValue>
struct Number {
  static constexpr auto value = kValue;
};

template <class Use>
auto with_channels(int channels, const Use& use) {
  switch (channels) {
    case 64: return use(Number<64>());
    case 96: return use(Number<96>());
    case 128: return use(Number<128>());
    default: return use(Number<256>());
  }
}

// Which part of the tile this warp has: not always the same, because a short tile is work for few warps, and those of
// one number share a scheduler.
template <int kWarps>
__device__ inline int warp_of_tile() {
  const unsigned turn = blockIdx.x * 2654435761u >> 20;
  return static_cast<int>((threadIdx.x / kLanes + turn) % kWarps);
}

// Channels c and c + 1 of an output row of `channels`.
template <class T>
__device__ void store_two(T* row, int c, int64_t channels, bool pairs, float one, float two) {
  if (pairs && c < channels) {
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<uint32_t*>(row + c) = pack<T>(one, two);
    } else {
      *reinterpret_cast<TwoFloats*>(row + c) = {{one, two}};
    }
    return;
  }
  if (c < channels) row[c] = from_float<T>(one);
  if (c + 1 < channels) row[c + 1] = from_float<T>(two);
}

// What a score, or with options a natural logit, is multiplied with for base 2, and what turns that into natural
// logits: undone with the rounded factor, a large one loses nothing.
template <bool kOptions>
__device__ float base2_factor(const AttentionParams& params) {
  return kOptions ? kLog2E : static_cast<float>(params.scale) * kLog2E;
}
__device__ inline TwoParts natural_factor(const AttentionParams& params, bool options) {
  return options ? TwoParts::quotient(1.0f, kLog2E)
                 : TwoParts::quotient(static_cast<float>(params.scale), static_cast<float>(params.scale) * kLog2E);
}
__device__ inline TwoParts inverse_factor(const AttentionParams& params, bool options) {
  return options ? TwoParts{kLog2E, 0.0f}
                 : TwoParts::quotient(static_cast<float>(params.scale) * kLog2E, static_cast<float>(params.scale));
}

// Largest base-2 logit and sum of weights of what was merged so far; empty while the sum is 0.
struct SoftmaxTotal {
  float max = -INFINITY, sum = 0;
  float max_low = 0;                 // what max leaves out of a sink's base-2 logit
  float old_factor = 1, factor = 0;  // what the last merge multiplies the total and the newcomer with

  __device__ void merge(float other_max, float other_sum) {
    old_factor = 1;
    factor = 0;
    if (other_sum == 0) return;
    if (sum == 0) {
      max = other_max;
      sum = other_sum;
      factor = 1;
      return;
    }
    const float larger = fmaxf(max, other_max);
    old_factor = exp2_approx(max - larger);  // NaN if both are -inf: then the sum is NaN
    factor = exp2_approx(other_max - larger);
    max = larger;
    sum = fmaf(other_sum, factor, sum * old_factor);
  }
  __device__ float merged(float total, float newcomer) const {
    return factor == 0 ? total * old_factor : fmaf(newcomer, factor, total * old_factor);
  }
  // The sink joins; returns what the values are multiplied with in the end. A sink of -inf adds nothing, and has no
  // distance to a row without a key.
  __device__ float finish(const AttentionParams& params, int64_t h, bool options) {
    const float sink = params.sink_logits ? static_cast<const float*>(params.sink_logits)[h] : -INFINITY;
    if (sink == -INFINITY) return sum == 0 ? 0.0f : 1.0f / sum;
    TwoParts sink2 = inverse_factor(params, options).times({sink, 0.0f});
    if (!sink2.finite()) sink2.low = 0;
    const float larger = fmaxf(max, sink2.high);
    max_low = sink2.high > max ? sink2.low : 0.0f;
    const float shrunk = sum == 0 ? 0.0f : exp2_approx((max - larger) - max_low);
    sum = fmaf(sum, shrunk, exp2_approx((sink2.high - larger) + (sink2.low - max_low)));
    max = larger;
    return shrunk * (1.0f / sum);
  }
  __device__ TwoParts lse(const AttentionParams& params, bool options) const {
    if (!(sum > 0 && sum < INFINITY && fabsf(max) < INFINITY)) return {fmaf(max, kLn2, logf(sum)), 0.0f};
    return TwoParts{max, max_low}.plus(two_part_log2(sum)).times(natural_factor(params, options));
  }
};

// One tile of query rows: row r is query first + r % rows of head head + r / rows.
struct QueryTile {
  int64_t item, split, b, kv_head, head, first;
  int heads, rows;

  __device__ void bind(const AttentionParams& params, const TilePlan& plan, int64_t block) {
    item = block / plan.splits;
    split = block % plan.splits;
    // Query tiles of a head side by side, which share its keys; the last ones, of most keys, first.
    first = (plan.query_tiles - 1 - item % plan.query_tiles) * plan.rows;
    const int64_t others = item / plan.query_tiles, group = params.heads / params.kv_heads;
    const int64_t in_group = others % plan.head_tiles * plan.heads;
    kv_head = others / plan.head_tiles % params.kv_heads;
    b = others / plan.head_tiles / params.kv_heads;
    head = kv_head * group + in_group;
    heads = static_cast<int>(group - in_group < plan.heads ? group - in_group : plan.heads);
    rows = plan.rows;
  }
  __device__ int64_t query(int r) const { return first + r % rows; }
  __device__ bool exists(const AttentionParams& params, int r) const {
    return r / rows < heads && query(r) < params.query_length;
  }
  // Of each head, not past the queries.
  __device__ int64_t valid_rows(const RowMap& map) const { return clamped(map.queries - first, 0, rows); }
};

// Of the segments that rows p_lo..p_hi visit, how many there are up to the n-th, and where that starts, or kNoTile. A
// warp looks at 32 of them at a time.
struct SegmentStart {
  int64_t tile = kNoTile, count = 0;

  __device__ __noinline__ SegmentStart(const RowMap& map, int64_t p_lo, int64_t p_hi, int64_t n) {
    const int lane = threadIdx.x % kLanes;
    PYCORE_UNROLL_BY(1)
    for (int64_t at = map.next_tile(p_lo, p_hi, 0); at != kNoTile;) {
      const int64_t segment = at / kSegmentTiles + lane;
      const int64_t start = map.next_tile(p_lo, p_hi, lane == 0 ? at : segment * kSegmentTiles);
      uint32_t found = __ballot_sync(kAllLanes, start != kNoTile && start / kSegmentTiles == segment);
      const int here = __popc(found);
      if (n < count + here) {
        PYCORE_UNROLL_BY(1)
        for (; count < n; ++count) found &= found - 1;
        tile = __shfl_sync(kAllLanes, start, __ffs(static_cast<int>(found)) - 1);
        return;
      }
      count += here;
      at = map.next_tile(p_lo, p_hi, (at / kSegmentTiles + kLanes) * kSegmentTiles);
    }
  }
};

constexpr int kMergeWarps = 4;

// Where each of the segments that an item visits begins, a warp an item. A walk from the first in every block would be
// quadratic in the keys.
template <class T>
__global__ void __launch_bounds__(kMergeWarps* kLanes)
    list_kernel(const __grid_constant__ AttentionParams params, const __grid_constant__ TilePlan plan) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  if (item >= plan.items) return;
  QueryTile tile;
  tile.bind(params, plan, item * plan.splits);
  const RowMap map = bounded_row_map(params, tile.b, tile.head);
  const int64_t rows = tile.valid_rows(map), p_lo = map.query_position(tile.first), p_hi = p_lo + rows - 1;
  int64_t count = 0;
  PYCORE_UNROLL_BY(1)
  for (int64_t at = rows > 0 ? map.next_tile(p_lo, p_hi, 0) : kNoTile; at != kNoTile;) {
    const int64_t segment = at / kSegmentTiles + lane;
    const int64_t start = map.next_tile(p_lo, p_hi, lane == 0 ? at : segment * kSegmentTiles);
    const bool visited = start != kNoTile && start / kSegmentTiles == segment;
    const uint32_t found = __ballot_sync(kAllLanes, visited);
    const int64_t n = count + __popc(found & ((1u << lane) - 1));
    if (visited && n < plan.splits) plan.starts[item * plan.splits + n] = start;
    count += __popc(found);
    at = map.next_tile(p_lo, p_hi, (at / kSegmentTiles + kLanes) * kSegmentTiles);
  }
  PYCORE_UNROLL_BY(1)
  for (int64_t n = count + lane; n < plan.splits; n += kLanes) plan.starts[item * plan.splits + n] = kNoTile;
}

template <class T>
Status launch_list(const AttentionParams& params, const TilePlan& plan, void* stream) {
  if (plan.starts == nullptr) return {};
  return launch(list_kernel<T>, (plan.items + kMergeWarps - 1) / kMergeWarps, kMergeWarps * kLanes, 0, stream, params,
                plan);
}

// A warp for each row of a tile whose segments were blocks of their own.
template <class T>
__global__ void __launch_bounds__(kMergeWarps* kLanes)
    merge_kernel(const __grid_constant__ AttentionParams params, const __grid_constant__ TilePlan plan) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / kLanes;
  const int64_t item = warp / (plan.heads * plan.rows), lane = threadIdx.x % kLanes;
  const int r = static_cast<int>(warp % (plan.heads * plan.rows));
  if (item >= plan.items) return;
  QueryTile tile;
  tile.bind(params, plan, item * plan.splits);
  if (!tile.exists(params, r)) return;
  const RowMap map = bounded_row_map(params, tile.b, tile.head);
  const int64_t p_lo = map.query_position(tile.first), p_hi = p_lo + tile.valid_rows(map) - 1;
  const bool valid = tile.query(r) < map.queries;
  const int64_t segments = valid ? SegmentStart(map, p_lo, p_hi, plan.splits).count : 0;
  SoftmaxTotal total;
  // Some states at a time, whose loads do not wait for each other.
  constexpr int kEach = kMostChannels / kLanes, kAhead = 4;
  float out[kEach] = {};
  for (int64_t n = 0; n < segments; n += kAhead) {
    float max[kAhead], sum[kAhead], values[kAhead][kEach];
    PYCORE_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      const float* state = plan.partial(params, item, n + a < segments ? n + a : n, r);
      max[a] = state[0];
      sum[a] = state[1];
      PYCORE_UNROLL
      for (int k = 0; k < kEach; ++k) {
        values[a][k] = k * kLanes + lane < params.value_dim ? state[2 + k * kLanes + lane] : 0.0f;
      }
    }
    PYCORE_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      if (n + a >= segments) break;
      total.merge(max[a], sum[a]);
      PYCORE_UNROLL
      for (int k = 0; k < kEach; ++k) out[k] = total.merged(out[k], values[a][k]);
    }
  }
  const int64_t h = tile.head + r / tile.rows, index = row_index(params, tile.b, h, tile.query(r));
  const float factor = total.finish(params, h, plan.options);
  T* row = static_cast<T*>(params.out) + index * params.value_dim;
  PYCORE_UNROLL
  for (int k = 0; k < kEach; ++k) {
    const int64_t c = k * kLanes + lane;
    if (c < params.value_dim) row[c] = from_float<T>(valid ? out[k] * factor + 0.0f : 0.0f);
  }
  if (lane == 0) store_lse(params, index, valid ? total.lse(params, plan.options) : TwoParts{-INFINITY, 0.0f});
}

template <class T>
Status launch_merge(const AttentionParams& params, const TilePlan& plan, void* stream) {
  const int64_t warps = plan.items * plan.heads * plan.rows;
  return launch(merge_kernel<T>, (warps + kMergeWarps - 1) / kMergeWarps, kMergeWarps * kLanes, 0, stream, params,
                plan);
}

}  // namespace
}  // namespace pycore
