// SPDX-License-Identifier: Apache-2.0
// One query row as a warp sees it: keys come 32 at a time, a lane holds the score of one, and, for what is summed over
// keys, every 32nd channel. Each warp walks its row's key tiles in order, so a row's bits do not depend on others.
#pragma once

#include "attention_device.cuh"

namespace pycore {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kChannelsPerLane = kMostChannels / kLanes;

template <class T>
struct QueryRow {
  const AttentionParams& params;
  int64_t b, h, i, kv_head, p;
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
    const int lane = threadIdx.x % kLanes;
    if (!valid || !params.rope_cos || p <= params.distance_limit) return;
    for (int64_t c = lane; c < params.head_dim; c += kLanes) far[c] = rotated(params, query, params.distance_limit, c);
  }

  __device__ const T* key(int64_t j) const { return keys + map.key_row(j) * params.key_strides.row; }
  __device__ const T* value(int64_t j) const { return values + map.key_row(j) * params.value_strides.row; }
  __device__ bool is_far(int64_t j) const { return params.rope_cos != nullptr && p - j > params.distance_limit; }
  // Channel c of the key whose product with `near` or `far` is the score.
  __device__ float seen_key(int64_t j, int64_t c) const {
    return params.rope_cos && !is_far(j) ? rotated(params, key(j), j % kKeyTile, c) : to_float(key(j)[c]);
  }
  __device__ float product(int64_t j) const {
    const float* seen = is_far(j) ? far : near;
    const T* row = key(j);
    const bool turns = params.rope_cos && !is_far(j);
    float sum = 0;
    for (int64_t c = 0; c < params.head_dim; ++c) {
      sum = fmaf(seen[c], turns ? rotated(params, row, j % kKeyTile, c) : to_float(row[c]), sum);
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
        near[c] = params.rope_cos ? rotated(params, query, p - base, c) : to_float(query[c]);
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

// This warp's number among all of the launch.
__device__ inline int64_t warp_index() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kLanes;
}

inline int64_t blocks_of_warps(int64_t warps) { return (warps + kWarpsPerBlock - 1) / kWarpsPerBlock; }

}  // namespace
}  // namespace pycore
