// SPDX-License-Identifier: Apache-2.0
// One query row as a warp sees it: keys come 32 at a time, a lane holds the score of one, and, for what is summed over
// keys, every 32nd channel. Each warp walks its row's key tiles in order, so a row's bits do not depend on others.
#pragma once

#include "device.cuh"

namespace pycore {
namespace {

constexpr int kWarpsPerBlock = 4, kWarpBlockThreads = kWarpsPerBlock * kLanes;
constexpr int kChannelsPerLane = kMostChannels / kLanes;

template <class T>
struct QueryRow {
  const AttentionParams& params;
  int64_t b, h, i, kv_head, p, place;
  RowMap map;
  const T *query, *keys, *values;
  float *near, *far;  // shared: the query rotated for the tile, and by the limit; head_dim each
  bool valid;

  // `index` counts rows of [batch, heads, query_length].
  __device__ QueryRow(const AttentionParams& params, int64_t index, float* near, float* far)
      : params(params),
        b(index / params.query_length / params.heads),
        h(index / params.query_length % params.heads),
        i(index % params.query_length),
        kv_head(h / (params.heads / params.kv_heads)),
        map(bounded_row_map(params, b, h)),
        query(row_pointer<T>(params.query, params.query_strides, b, h, i)),
        keys(row_pointer<T>(params.key, params.key_strides, b, kv_head, 0)),
        values(row_pointer<T>(params.value, params.value_strides, b, kv_head, 0)),
        near(near),
        far(far),
        valid(i < map.queries) {
    p = map.query_position(i);
    place = map.schedule.place(p);
    const int lane = threadIdx.x % kLanes;
    if (!valid || !params.rope_cos || place <= params.distance_limit) return;
    for (int64_t c = lane; c < params.head_dim; c += kLanes) far[c] = rotated(params, query, params.distance_limit, c);
  }

  __device__ const T* key(int64_t j) const { return keys + map.key_row(j) * params.key_strides.row; }
  __device__ const T* value(int64_t j) const { return values + map.key_row(j) * params.value_strides.row; }
  __device__ bool is_far(int64_t j) const {
    return params.rope_cos != nullptr && place - map.schedule.place(j) > params.distance_limit;
  }
  __device__ int64_t turn_of(int64_t j) const { return key_turn(map.schedule, j / kKeyTile, j % kKeyTile); }
  // Channel c of the key whose product with `near` or `far` is the score.
  __device__ float seen_key(int64_t j, int64_t c) const {
    return params.rope_cos && !is_far(j) ? rotated(params, key(j), turn_of(j), c) : to_float(key(j)[c]);
  }
  __device__ float product(int64_t j) const {
    const float* seen = is_far(j) ? far : near;
    const T* row = key(j);
    const bool turns = params.rope_cos && !is_far(j);
    const int64_t turn = turns ? turn_of(j) : 0;
    float sum = 0;
    for (int64_t c = 0; c < params.head_dim; ++c) {
      sum = fmaf(seen[c], turns ? rotated(params, row, turn, c) : to_float(row[c]), sum);
    }
    return sum;
  }
  // 0 for a weight that is dropped, else what it is multiplied with.
  __device__ float keep_factor(int64_t j) const {
    if (params.dropout_p <= 0) return 1;
    const bool dropped = dropped_bits(params, b, h, p, j / 4) >> (j % 4) & 1;
    return dropped ? 0.0f : static_cast<float>(1 / (1 - params.dropout_p));
  }

  // visit(first, bits): of the keys first .. first + 31, the row keeps those with a bit. close(tile) after each tile.
  template <class Visit, class Close>
  __device__ void walk(Visit visit, Close close) const {
    const int lane = threadIdx.x % kLanes;
    for (int64_t tile = valid ? map.next_tile(p, p, 0) : kNoTile; tile != kNoTile;
         tile = map.next_tile(p, p, tile + 1)) {
      const uint64_t kept = map.schedule.keep_bits(p, tile) & map.present_bits(tile);
      if (kept == 0) continue;
      const int64_t base = tile * kKeyTile;
      __syncwarp();
      for (int64_t c = lane; c < params.head_dim; c += kLanes) {
        near[c] = params.rope_cos ? rotated(params, query, place - base, c) : to_float(query[c]);
      }
      __syncwarp();
      for (int64_t first = 0; first < kKeyTile; first += kLanes) {
        const uint32_t bits = static_cast<uint32_t>(kept >> first);
        if (bits != 0) visit(base + first, bits);
      }
      close(tile);
    }
  }
};

// What a pair of a query and a key it keeps adds to the gradients.
struct WarpPair {
  float weight = 0;      // of the value, after dropout
  float share = 0;       // before dropout
  float grad_logit = 0;  // by the logit, which is also the bias's
  float grad_score = 0;  // by <q, k>
};

// `product` is the pair's <q, k>.
template <class T>
__device__ WarpPair pair_gradient(const AttentionBackwardParams& params, const TileSchedule& schedule, int64_t b,
                                  int64_t h, int64_t p, int64_t j, float product, TwoParts lse, float delta,
                                  float keep_factor, const T* grad_out, const T* value) {
  WarpPair pair;
  float slope;
  const float weight = expf(logit_of(params.forward, schedule, b, h, p, j, product, &slope) - lse.high - lse.low);
  float grad_weight = 0;
  if (keep_factor != 0) {
    for (int64_t c = 0; c < params.forward.value_dim; ++c) {
      grad_weight = fmaf(to_float(grad_out[c]), to_float(value[c]), grad_weight);
    }
    grad_weight *= keep_factor;
  }
  pair.weight = weight * keep_factor;
  pair.share = weight;
  pair.grad_logit = weight * (grad_weight - delta);
  pair.grad_score = pair.grad_logit * slope;
  return pair;
}

template <class T>
__device__ WarpPair pair_of(const AttentionBackwardParams& params, const QueryRow<T>& row, int64_t j, TwoParts lse,
                            float delta, const T* grad_out) {
  return pair_gradient(params, row.map.schedule, row.b, row.h, row.p, j, row.product(j), lse, delta, row.keep_factor(j),
                       grad_out, row.value(j));
}

// This warp's number among all of the launch.
__device__ inline int64_t warp_index() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kLanes;
}

inline int64_t blocks_of_warps(int64_t warps) { return (warps + kWarpsPerBlock - 1) / kWarpsPerBlock; }

}  // namespace
}  // namespace pycore
