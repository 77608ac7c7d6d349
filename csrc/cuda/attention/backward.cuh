// SPDX-License-Identifier: Apache-2.0
// The backward pass in tiles, nothing added by two: a block of four warps takes 64 queries of a head and walks their
// key tiles for grad_query, or 64 keys and walks the queries of all heads of their group for grad_key and grad_value.
// Scores are recomputed (from lse, base 2), so the two make seven products a tile where atomics would do with five.
//
// With the rows that a block holds as rows of all products, what the two products of a pair give lies in registers as
// the weights of the next product:
//   grad_query   dP = dO V^T     S = Q K^T     dQ += dS K
//   grad_key     dP^T = V dO^T   S^T = K Q^T   dV += P^T dO   dK += dS^T Q
// Of the two tiles that pass by, each arrives while the other is multiplied.
//
// Rotation (attention.h): a tile's share of grad_query is turned back before it joins the sum. grad_key takes near
// pairs of all queries first, in the frame of the turned keys, turns their sum back, and then the far ones.
#pragma once

#include "segments.cuh"

namespace pycore {
namespace {

constexpr int kBackwardWarps = 4, kBackwardThreads = kBackwardWarps * kLanes, kWarpRows = 16;
// Blocks of a multiprocessor that registers are shared out for: narrow rows leave some for a third.
template <int kChannels, bool kOptions>
constexpr int kLeastBlocks = kChannels <= 64 && !kOptions ? 3 : 1;

// A kernel's tiles in shared memory. Where pairs turn, a warp's sums pass through two tiles that lie side by side:
// value and turned (grad_query), or query and grad_out (grad_key).
template <class T, int kChannels, bool kOptions>
struct BackwardShared {
  static constexpr int kStride = row_stride<T>(kChannels);
  T query[kTile * kStride], grad_out[kTile * kStride], key[kTile * kStride], value[kTile * kStride];
  T turned[kOptions ? kTile * kStride : 8];  // the queries as a key tile sees them, or the keys as near queries do
  // Of the query tile; lse in base 2, in two floats where one would be the largest error of every weight.
  float lse[kTile], lse_low[sizeof(T) == 4 ? kTile : 1], delta[kTile];
  uint64_t kept[kTile], dropped[kOptions ? kTile : 1];  // of its rows, the keys
  float diagonals[kOptions ? 2 * kTile : 1];            // of a tile of gradients, the sums
  // The same for all threads, here because registers are short.
  RowMap map;
  VisitedTile visited[2];  // the tile in hand and the next
  TileList<kBackwardThreads> list;
};

// A row's weights, from its lse in shared memory. Half-precision ones do without the second part.
template <class T>
struct RowWeights {
  float high, low;

  template <class Shared>
  __device__ RowWeights(const Shared& shared, int r)
      : high(shared.lse[r]), low(sizeof(T) == 4 ? shared.lse_low[r] : 0) {}
  // 2^(factor * logit) over the row's sum.
  __device__ float weight(float logit, float factor) const {
    const float power = fmaf(logit, factor, -high);
    return exp2_approx(sizeof(T) == 4 ? power - low : power);
  }
};

// Of a warp's 16 rows and a tile's 64 columns, one of them queries and the other keys, what a pair adds to gradients.
struct TilePairs {
  const AttentionParams& params;
  const TileSchedule& schedule;
  int64_t b, h, p_lo, base;            // the first query and the first key
  const float *lse, *lse_low, *delta;  // by query, in base 2; without lse_low for half precision
  const uint64_t *kept, *dropped;      // by query, the keys; null where all are kept, and none is dropped
  int first_row;                       // of the warp
  bool rows_are_keys, of_logits;       // gradients of the logits instead of the scores

  // A lane's scores to weights, after dropout, and grad_weights to the scores' gradients, one at a time and whatever
  // they take.
  __device__ __noinline__ void run(float* scores, float* grad_weights) const {
    const int lane = threadIdx.x % kLanes;
    const float keep_factor = static_cast<float>(1 / (1 - params.dropout_p));
    PYCORE_UNROLL_BY(1)
    for (int n = 0; n < 32; ++n) {
      const int row = first_row + lane / 4 + n / 2 % 2 * 8, column = n / 4 * 8 + lane % 4 * 2 + n % 2;
      const int q = rows_are_keys ? column : row, key = rows_are_keys ? row : column;
      float weight = 0, grad = 0;
      if (kept == nullptr || kept[q] >> key & 1) {
        float slope;
        const float logit = logit_of(params, schedule, b, h, p_lo + q, base + key, scores[n], &slope);
        const float power = fmaf(logit, kLog2E, -lse[q]);
        weight = exp2_approx(lse_low == nullptr ? power : power - lse_low[q]);
        const float factor = dropped == nullptr ? 1.0f : dropped[q] >> key & 1 ? 0.0f : keep_factor;
        grad = weight * fmaf(grad_weights[n], factor, -delta[q]) * (of_logits ? 1.0f : slope);
        weight *= factor;
      }
      scores[n] = weight;
      grad_weights[n] = grad;
    }
  }
};

template <class T, int kChannels, bool kOptions>
struct Backward {
  using Shared = BackwardShared<T, kChannels, kOptions>;
  using Sums = float[1][kChannels / 8][4];
  static constexpr int kStride = Shared::kStride, kThreads = kBackwardThreads;

  const AttentionBackwardParams& params;
  const AttentionParams& forward;
  const TilePlan& plan;
  Shared& shared;
  const RowMap& map;
  const int lane = threadIdx.x % kLanes, warp = static_cast<int>(threadIdx.x) / kLanes, warp_row = warp * kWarpRows;
  int64_t b = 0, kv_head = 0;

  __device__ Backward(const AttentionBackwardParams& params, const TilePlan& plan)
      : params(params),
        forward(params.forward),
        plan(plan),
        shared(*reinterpret_cast<Shared*>(shared_memory())),
        map(shared.map) {}

  __device__ int row_of(int half) const { return warp_row + 8 * half + lane / 4; }
  // each(n, half) for the pairs of numbers that a lane holds of the warp's sums.
  template <class Each>
  __device__ static void each_pair(Each each) {
    PYCORE_UNROLL
    for (int n = 0; n < kChannels / 8; ++n) {
      PYCORE_UNROLL
      for (int half = 0; half < 2; ++half) each(n, half);
    }
  }
  __device__ bool drops() const { return kOptions && forward.dropout_p > 0; }
  // Whether a logit takes no more than the score and a distance, in tile `tile` of keys.
  __device__ bool simple(int64_t tile) const {
    return !kOptions || (!drops() && DistanceLogits::apply<T>(forward, map.schedule, tile));
  }
  __device__ bool turns() const { return kOptions && forward.rope_cos != nullptr; }
  // Without options, what the sums of scores' gradients are multiplied with in the end.
  __device__ float factor() const { return kOptions ? 1.0f : static_cast<float>(forward.scale); }
  __device__ void load_key(const VisitedTile& keys) const {
    load_key_rows<T, kChannels, kThreads>(shared.key, forward.key, forward.key_strides, forward.head_dim,
                                          plan.aligned_key, map, b, kv_head, keys);
  }
  __device__ void load_value(const VisitedTile& keys) const {
    load_key_rows<T, kChannels, kThreads>(shared.value, forward.value, forward.value_strides, forward.value_dim,
                                          plan.aligned_value, map, b, kv_head, keys);
  }
  // Of head h, queries first .. first + count - 1.
  __device__ void load_query(int64_t h, int64_t first, int64_t count) const {
    const T* rows = row_pointer<T>(forward.query, forward.query_strides, b, h, first);
    load_rows<T, kChannels, kThreads>(
        shared.query, kTile, static_cast<int>(forward.head_dim), plan.aligned_query, forward.query,
        [&](int r) { return r < count ? rows + r * forward.query_strides.row : nullptr; });
  }
  __device__ void load_grad_out(int64_t h, int64_t first, int64_t count) const {
    const T* rows = row_pointer<T>(params.grad_out, params.grad_out_strides, b, h, first);
    load_rows<T, kChannels, kThreads>(
        shared.grad_out, kTile, static_cast<int>(forward.value_dim), plan.aligned_grad_out, params.grad_out,
        [&](int r) { return r < count ? rows + r * params.grad_out_strides.row : nullptr; });
  }
  __device__ void load_softmax(int64_t h, int64_t first, int64_t count) const {
    const int r = static_cast<int>(threadIdx.x) % kTile;
    const void* from = threadIdx.x < kTile ? forward.lse : params.delta;
    float* to = threadIdx.x < kTile ? shared.lse : shared.delta;
    const int64_t index = row_index(forward, b, h, r < count ? first + r : first);
    copy_async<4>(to + r, static_cast<const float*>(from) + index, r < count ? 4 : 0);
    if (sizeof(T) == 2 || threadIdx.x >= kTile || !forward.lse_low) return;
    copy_async<4>(shared.lse_low + r, static_cast<const float*>(forward.lse_low) + index, r < count ? 4 : 0);
  }
  // What load_softmax brought, once the thread has waited for it and before others may read: lse goes to base 2. All
  // threads, and a barrier; true if a row of the tile has no weights at all, and so no gradients.
  __device__ bool settle_softmax() const {
    const int r = static_cast<int>(threadIdx.x);
    bool empty = false;
    if (r < kTile) {
      const float lse = shared.lse[r], low = sizeof(T) == 4 && forward.lse_low ? shared.lse_low[r] : 0.0f;
      empty = lse == -INFINITY;
      TwoParts base2 = TwoParts{lse, low}.times(inverse_factor(forward, kOptions));
      if (!base2.finite()) base2 = {lse, 0.0f};
      shared.lse[r] = base2.high;
      if (sizeof(T) == 4) shared.lse_low[r] = base2.low;
    }
    return __syncthreads_or(empty);
  }

  // The warp's sums turned back by distance_of(row), in shared memory (`rows`, 64 of kChannels numbers): added to
  // `total`, or in its place; it may be the same array.
  template <class DistanceOf>
  __device__ void turn_back(const Sums& sums, float* rows, DistanceOf distance_of, bool add, Sums& total) const {
    constexpr int kSumStride = row_stride<float>(kChannels);
    __syncwarp();
    each_pair([&](int n, int half) {
      *reinterpret_cast<TwoFloats*>(rows + row_of(half) * kSumStride + 8 * n +
                                    2 * (lane % 4)) = {{sums[0][n][2 * half], sums[0][n][2 * half + 1]}};
    });
    __syncwarp();
    turn_rows<float, kChannels>(forward, rows, rows, warp_row, warp_row + kWarpRows, 1,
                                [&](int r) { return -distance_of(r); });
    __syncwarp();
    each_pair([&](int n, int half) {
      const float* pair = rows + row_of(half) * kSumStride + 8 * n + 2 * (lane % 4);
      for (int k = 0; k < 2; ++k) {
        total[0][n][2 * half + k] = add ? total[0][n][2 * half + k] + pair[k] : pair[k];
      }
    });
    __syncwarp();
  }

  // The lane's scores and grad_weights, by way of memory; see TilePairs::run.
  __device__ static void run_pairs(const TilePairs& pairs, float (&scores)[1][8][4], float (&grad_weights)[1][8][4]) {
    float memory[32], grads[32];
    PYCORE_UNROLL
    for (int n = 0; n < 32; ++n) {
      memory[n] = scores[0][n / 4][n % 4];
      grads[n] = grad_weights[0][n / 4][n % 4];
    }
    pairs.run(memory, grads);
    __syncwarp();
    PYCORE_UNROLL
    for (int n = 0; n < 32; ++n) {
      scores[0][n / 4][n % 4] = memory[n];
      grad_weights[0][n / 4][n % 4] = grads[n];
    }
  }

  // The sums times `factor` to rows of `channels` float32 each; to(row) says where, or null. Rows from `count` on get
  // zeros.
  template <class RowOf>
  __device__ void store(const Sums& sums, int64_t channels, float factor, int64_t count, RowOf to) const {
    PYCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float* row = to(row_of(half));
      if (row == nullptr) continue;
      const bool valid = row_of(half) < count;
      PYCORE_UNROLL
      for (int n = 0; n < kChannels / 8; ++n) {
        // -0 becomes 0: which of them a sum of nothing is depends on the tiles that were visited.
        const float one = valid ? sums[0][n][2 * half] * factor + 0.0f : 0.0f;
        const float two = valid ? sums[0][n][2 * half + 1] * factor + 0.0f : 0.0f;
        store_two(row, 8 * n + 2 * (lane % 4), channels, channels % 2 == 0, one, two);
      }
    }
  }
};

}  // namespace
}  // namespace pycore
