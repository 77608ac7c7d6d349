// SPDX-License-Identifier: Apache-2.0
// The backward pass, plain: a warp a query row for grad_query, a warp a key row for grad_key and grad_value, nothing
// added by two. For devices without the shared memory that tiles want.
#include "launch.h"
#include "warp.cuh"

namespace pycore {
namespace {

// A key's gradients are summed over this many queries, and those sums over all.
constexpr int64_t kSumQueries = 256;

// Channels of a lane, c = k * 32 + lane, of a row of `n`.
template <class Each>
__device__ void each_channel(int64_t n, Each each) {
  for (int k = 0; k < kChannelsPerLane; ++k) {
    const int64_t c = k * kLanes + threadIdx.x % kLanes;
    if (c < n) each(k, c);
  }
}

// shared: for each warp, near, far, and a row to turn back; head_dim each.
template <class T>
__global__ void plain_grad_query_kernel(const __grid_constant__ AttentionBackwardParams params) {
  const AttentionParams& forward = params.forward;
  const int64_t index = warp_index(), lane = threadIdx.x % kLanes, n = forward.head_dim;
  if (index >= forward.batch * forward.heads * forward.query_length) return;
  float* near = reinterpret_cast<float*>(shared_memory()) + threadIdx.x / kLanes * 3 * n;
  float* turning = near + 2 * n;
  const QueryRow<T> row(forward, index, near, near + n);
  const TwoParts lse = load_lse(forward, index);
  const float delta = static_cast<const float*>(params.delta)[index];
  const T* grad_out = row_pointer<T>(params.grad_out, params.grad_out_strides, row.b, row.h, row.i);
  float total[kChannelsPerLane] = {}, near_sum[kChannelsPerLane] = {}, far_sum[kChannelsPerLane] = {};
  // Adds a sum in the rotated frame to the total.
  const auto turn_back = [&](float* sum, int64_t distance) {
    __syncwarp();
    each_channel(n, [&](int k, int64_t c) { turning[c] = sum[k]; });
    __syncwarp();
    each_channel(n, [&](int k, int64_t c) { total[k] += rotated(forward, turning, -distance, c); });
  };
  const auto visit = [&](int64_t first, uint32_t bits) {
    const bool kept = bits >> lane & 1;
    const float mine = kept ? pair_of(params, row, first + lane, lse, delta, grad_out).grad_score : 0.0f;
    for (uint32_t left = bits; left != 0; left &= left - 1) {
      const int other = __ffs(static_cast<int>(left)) - 1;
      const float factor = __shfl_sync(kAllLanes, mine, other);
      const int64_t j = first + other;
      const bool far = row.is_far(j);
      each_channel(n, [&](int k, int64_t c) {
        const float key = row.seen_key(j, c);
        if (far) {
          far_sum[k] = fmaf(factor, key, far_sum[k]);
        } else {
          near_sum[k] = fmaf(factor, key, near_sum[k]);
        }
      });
    }
  };
  const auto close = [&](int64_t tile) {
    if (forward.rope_cos) {
      turn_back(near_sum, row.place - tile * kKeyTile);
    } else {
      for (int k = 0; k < kChannelsPerLane; ++k) total[k] += near_sum[k];
    }
    for (int k = 0; k < kChannelsPerLane; ++k) near_sum[k] = 0;
  };
  if (lse.high != -INFINITY) row.walk(visit, close);
  if (row.valid && forward.rope_cos && row.place > forward.distance_limit) turn_back(far_sum, forward.distance_limit);
  float* grad_query = static_cast<float*>(params.grad_query) + index * n;
  each_channel(n, [&](int k, int64_t c) { grad_query[c] = total[k]; });
}

struct KeySums {
  float near[kChannelsPerLane] = {}, far[kChannelsPerLane] = {}, value[kChannelsPerLane] = {};

  __device__ void add(const KeySums& other) {
    for (int k = 0; k < kChannelsPerLane; ++k) {
      near[k] += other.near[k];
      far[k] += other.far[k];
      value[k] += other.value[k];
    }
  }
};

// shared: for each warp, the key rotated by its place in the tile, and a row to turn back; head_dim each.
template <class T>
__global__ void plain_grad_key_kernel(const __grid_constant__ AttentionBackwardParams params) {
  const AttentionParams& forward = params.forward;
  const int64_t lane = threadIdx.x % kLanes, n = forward.head_dim, m = forward.value_dim;
  const int64_t places = most_key_tiles(forward.key_length) * kKeyTile;
  const int64_t pair = warp_index() / places, place = warp_index() % places;
  if (pair >= forward.batch * forward.kv_heads) return;
  const int64_t b = pair / forward.kv_heads, kv_head = pair % forward.kv_heads;
  const int64_t group = forward.heads / forward.kv_heads;
  RowMap map = bounded_row_map(forward, b, kv_head * group);
  if (place / kKeyTile >= map.present_tiles()) return;
  const int64_t tile = map.present_tile(place / kKeyTile), c0 = place % kKeyTile, j = tile * kKeyTile + c0;
  if (!(map.present_bits(tile) >> c0 & 1)) return;
  const bool rope = forward.rope_cos != nullptr;
  const int64_t key_place = map.schedule.place(j), turn = key_turn(map.schedule, tile, c0);
  const T* key = row_pointer<T>(forward.key, forward.key_strides, b, kv_head, map.key_row(j));
  const T* value = row_pointer<T>(forward.value, forward.value_strides, b, kv_head, map.key_row(j));
  float* seen = reinterpret_cast<float*>(shared_memory()) + threadIdx.x / kLanes * 2 * n;
  float* turning = seen + n;
  each_channel(n, [&](int, int64_t c) { seen[c] = rope ? rotated(forward, key, turn, c) : to_float(key[c]); });
  __syncwarp();

  int64_t lo, hi;
  map.schedule.query_range(tile, &lo, &hi);
  const int64_t p0 = map.query_position(0);
  const int64_t first_query = clamped(lo - p0, 0, map.queries) / kLanes * kLanes;
  const int64_t last_query = clamped(hi - p0, -1, map.queries - 1);
  KeySums total, sums;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    bind_head(forward, b, h, &map);
    for (int64_t first = first_query; first <= last_query; first += kLanes) {
      if (first % kSumQueries == 0) {
        total.add(sums);
        sums = KeySums();
      }
      const int64_t i = first + lane, p = p0 + i;
      const int64_t index = row_index(forward, b, h, i <= last_query ? i : 0);
      const TwoParts lse = load_lse(forward, index);
      const bool kept = i <= last_query && lse.high != -INFINITY && map.schedule.keep_bits(p, tile) >> c0 & 1;
      const uint32_t bits = __ballot_sync(kAllLanes, kept);
      if (bits == 0) continue;
      const auto is_far = [&](int64_t position) {
        return rope && map.schedule.place(position) - key_place > forward.distance_limit;
      };
      // The query whose product with the key, rotated or not, is the score.
      const auto seen_query = [&](const T* query, int64_t position, int64_t c) {
        if (!rope) return to_float(query[c]);
        const int64_t near = map.schedule.place(position) - tile * kKeyTile;
        return rotated(forward, query, is_far(position) ? forward.distance_limit : near, c);
      };
      WarpPair mine;
      if (kept) {
        const T* query = row_pointer<T>(forward.query, forward.query_strides, b, h, i);
        float product = 0;
        for (int64_t c = 0; c < n; ++c) {
          product = fmaf(seen_query(query, p, c), is_far(p) ? to_float(key[c]) : seen[c], product);
        }
        float keep_factor = 1;
        if (forward.dropout_p > 0) {
          const bool dropped = dropped_bits(forward, b, h, p, j / 4) >> (j % 4) & 1;
          keep_factor = dropped ? 0.0f : static_cast<float>(1 / (1 - forward.dropout_p));
        }
        mine = pair_gradient(params, map.schedule, b, h, p, j, product, lse,
                             static_cast<const float*>(params.delta)[index], keep_factor,
                             row_pointer<T>(params.grad_out, params.grad_out_strides, b, h, i), value);
      }
      for (uint32_t left = bits; left != 0; left &= left - 1) {
        const int other = __ffs(static_cast<int>(left)) - 1;
        const float grad_score = __shfl_sync(kAllLanes, mine.grad_score, other);
        const float weight = __shfl_sync(kAllLanes, mine.weight, other);
        const T* query = row_pointer<T>(forward.query, forward.query_strides, b, h, first + other);
        const T* grad_out = row_pointer<T>(params.grad_out, params.grad_out_strides, b, h, first + other);
        const int64_t position = p0 + first + other;
        const bool far = is_far(position);
        each_channel(n, [&](int k, int64_t c) {
          const float seen_channel = seen_query(query, position, c);
          if (far) {
            sums.far[k] = fmaf(grad_score, seen_channel, sums.far[k]);
          } else {
            sums.near[k] = fmaf(grad_score, seen_channel, sums.near[k]);
          }
        });
        if (weight == 0) continue;
        each_channel(m, [&](int k, int64_t c) { sums.value[k] = fmaf(weight, to_float(grad_out[c]), sums.value[k]); });
      }
    }
    total.add(sums);
    sums = KeySums();
  }
  const int64_t row = key_row_index(forward, b, kv_head, map.key_row(j));
  float* grad_key = static_cast<float*>(params.grad_key) + row * n;
  float* grad_value = static_cast<float*>(params.grad_value) + row * m;
  each_channel(n, [&](int k, int64_t c) { turning[c] = total.near[k]; });
  __syncwarp();
  each_channel(n, [&](int k, int64_t c) {
    grad_key[c] = (rope ? rotated(forward, turning, -turn, c) : turning[c]) + total.far[k];
  });
  each_channel(m, [&](int k, int64_t c) { grad_value[c] = total.value[k]; });
}

template <class T>
Status plain_backward_of(const AttentionBackwardParams& params, void* stream) {
  const AttentionParams& forward = params.forward;
  constexpr int64_t kFloat = sizeof(float);
  const int64_t n = forward.head_dim, rows = forward.batch * forward.heads * forward.query_length;
  Status status = launch(plain_grad_query_kernel<T>, blocks_of_warps(rows), kWarpBlockThreads,
                         kWarpsPerBlock * 3 * n * kFloat, stream, params);
  if (!status.ok() || rows == 0 || forward.key_length == 0) return status;
  const int64_t warps = forward.batch * forward.kv_heads * most_key_tiles(forward.key_length) * kKeyTile;
  return launch(plain_grad_key_kernel<T>, blocks_of_warps(warps), kWarpBlockThreads, kWarpsPerBlock * 2 * n * kFloat,
                stream, params);
}

}  // namespace

Status launch_plain_backward(const AttentionBackwardParams& params, void* stream) {
  switch (params.forward.dtype) {
    case DType::kFloat16: return plain_backward_of<Float16>(params, stream);
    case DType::kBFloat16: return plain_backward_of<BFloat16>(params, stream);
    default: return plain_backward_of<float>(params, stream);
  }
}

}  // namespace pycore
