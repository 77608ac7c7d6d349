// SPDX-License-Identifier: Apache-2.0
// The backward pass, plain: a warp a query row for grad_query, a warp a key row for grad_key and grad_value, nothing
// added by two. What a table's gradient sums over all rows is summed in chunks of rows, and then over the chunks.
#include "attention_launch.h"
#include "attention_warp.cuh"

namespace pycore {
namespace {

constexpr int kThreads = kWarpsPerBlock * kLanes;
// A key's gradients are summed over this many queries, and those sums over all.
constexpr int64_t kSumQueries = 256;
constexpr int64_t kMostChunks = 64;

// What a pair of a query and a key it keeps adds to the gradients.
struct PairGradient {
  float weight = 0;      // of the value, after dropout
  float grad_logit = 0;  // by the logit, which is also the bias's
  float grad_score = 0;  // by <q, k>
};

// `product` is the pair's <q, k>.
template <class T>
__device__ PairGradient pair_gradient(const AttentionBackwardParams& params, int64_t h, int64_t p, int64_t j,
                                      float product, float lse, float delta, float keep_factor, const T* grad_out,
                                      const T* value) {
  PairGradient pair;
  float slope;
  const float weight = expf(logit_of(params.forward, h, p, j, product, &slope) - lse);
  float grad_weight = 0;
  if (keep_factor != 0) {
    for (int64_t c = 0; c < params.forward.value_dim; ++c) {
      grad_weight = fmaf(to_float(grad_out[c]), to_float(value[c]), grad_weight);
    }
    grad_weight *= keep_factor;
  }
  pair.weight = weight * keep_factor;
  pair.grad_logit = weight * (grad_weight - delta);
  pair.grad_score = pair.grad_logit * slope;
  return pair;
}

template <class T>
__device__ PairGradient pair_of(const AttentionBackwardParams& params, const QueryRow<T>& row, int64_t j, float lse,
                                float delta, const T* grad_out) {
  return pair_gradient(params, row.h, row.p, j, row.product(j), lse, delta, row.keep_factor(j), grad_out, row.value(j));
}

template <class T>
__global__ void delta_kernel(const __grid_constant__ AttentionBackwardParams params) {
  const AttentionParams& forward = params.forward;
  const int64_t index = warp_index(), lane = threadIdx.x % kLanes;
  if (index >= forward.batch * forward.heads * forward.query_length) return;
  const int64_t i = index % forward.query_length, pair = index / forward.query_length;
  const T* grad_out =
      row_pointer<T>(params.grad_out, params.grad_out_strides, pair / forward.heads, pair % forward.heads, i);
  const T* out = static_cast<const T*>(forward.out) + index * forward.value_dim;
  float sum = 0;
  for (int64_t c = lane; c < forward.value_dim; c += kLanes) sum = fmaf(to_float(grad_out[c]), to_float(out[c]), sum);
  sum = warp_sum(sum);
  if (lane != 0) return;
  static_cast<float*>(params.delta)[index] =
      sum - (params.grad_lse ? static_cast<const float*>(params.grad_lse)[index] : 0.0f);
}

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
  const float lse = static_cast<const float*>(forward.lse)[index];
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
  row.walk(visit, [&](int64_t tile) {
    if (forward.rope_cos) {
      turn_back(near_sum, row.p - tile * kKeyTile);
    } else {
      for (int k = 0; k < kChannelsPerLane; ++k) total[k] += near_sum[k];
    }
    for (int k = 0; k < kChannelsPerLane; ++k) near_sum[k] = 0;
  });
  if (row.valid && forward.rope_cos && row.p > forward.distance_limit) turn_back(far_sum, forward.distance_limit);
  float* grad_query = static_cast<float*>(params.grad_query) + index * n;
  each_channel(n, [&](int k, int64_t c) { grad_query[c] = total[k]; });
}

// The tiles of 64 positions that key_length rows can lie in, on both sides of a gap.
PYCORE_HOST_DEVICE inline int64_t most_tiles(int64_t key_length) { return key_length / kKeyTile + 4; }

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
  const int64_t places = most_tiles(forward.key_length) * kKeyTile;
  const int64_t pair = warp_index() / places, place = warp_index() % places;
  if (pair >= forward.batch * forward.kv_heads) return;
  const int64_t b = pair / forward.kv_heads, kv_head = pair % forward.kv_heads;
  const int64_t group = forward.heads / forward.kv_heads;
  RowMap map = bounded_row_map(forward, b, kv_head * group);
  if (place / kKeyTile >= map.present_tiles()) return;
  const int64_t tile = map.present_tile(place / kKeyTile), c0 = place % kKeyTile, j = tile * kKeyTile + c0;
  if (!(map.present_bits(tile) >> c0 & 1)) return;
  const bool rope = forward.rope_cos != nullptr;
  const T* key = row_pointer<T>(forward.key, forward.key_strides, b, kv_head, map.key_row(j));
  const T* value = row_pointer<T>(forward.value, forward.value_strides, b, kv_head, map.key_row(j));
  float* seen = reinterpret_cast<float*>(shared_memory()) + threadIdx.x / kLanes * 2 * n;
  float* turning = seen + n;
  each_channel(n, [&](int, int64_t c) { seen[c] = rope ? rotated(forward, key, c0, c) : to_float(key[c]); });
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
      const bool kept = i <= last_query && map.schedule.keep_bits(p, tile) >> c0 & 1;
      const uint32_t bits = __ballot_sync(kAllLanes, kept);
      if (bits == 0) continue;
      const auto is_far = [&](int64_t position) { return rope && position - j > forward.distance_limit; };
      // The query whose product with the key, rotated or not, is the score.
      const auto seen_query = [&](const T* query, int64_t position, int64_t c) {
        if (!rope) return to_float(query[c]);
        return rotated(forward, query, is_far(position) ? forward.distance_limit : position - tile * kKeyTile, c);
      };
      PairGradient mine;
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
        const int64_t index = row_index(forward, b, h, i);
        mine = pair_gradient(params, h, p, j, product, static_cast<const float*>(forward.lse)[index],
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
    grad_key[c] = (rope ? rotated(forward, turning, -c0, c) : turning[c]) + total.far[k];
  });
  each_channel(m, [&](int k, int64_t c) { grad_value[c] = total.value[k]; });
}

// Rows of one head, over all batch rows, that a chunk sums.
struct ChunkRows {
  int64_t first, last;
  __device__ ChunkRows(const AttentionParams& params, int64_t chunk, int64_t chunks) {
    const int64_t rows = params.batch * params.query_length;
    first = rows * chunk / chunks;
    last = rows * (chunk + 1) / chunks;
  }
  // Its number among rows of [batch, heads, query_length].
  __device__ static int64_t index(const AttentionParams& params, int64_t row, int64_t h) {
    return row_index(params, row / params.query_length, h, row % params.query_length);
  }
};

// sums [chunks, heads, bias_length], zeros at first. shared: for each warp, near and far, and 32 numbers.
template <class T>
__global__ void plain_grad_bias_kernel(const __grid_constant__ AttentionBackwardParams params, double* sums,
                                       int64_t chunks) {
  const AttentionParams& forward = params.forward;
  const int64_t lane = threadIdx.x % kLanes, n = forward.head_dim;
  const int64_t chunk = warp_index() / forward.heads, h = warp_index() % forward.heads;
  if (chunk >= chunks) return;
  float* near = reinterpret_cast<float*>(shared_memory()) + threadIdx.x / kLanes * (2 * n + kLanes);
  float* shares = near + 2 * n;
  double* bias = sums + (chunk * forward.heads + h) * forward.bias_length;
  const ChunkRows rows(forward, chunk, chunks);
  for (int64_t r = rows.first; r < rows.last; ++r) {
    const int64_t index = ChunkRows::index(forward, r, h);
    __syncwarp();
    const QueryRow<T> row(forward, index, near, near + n);
    const float lse = static_cast<const float*>(forward.lse)[index];
    const float delta = static_cast<const float*>(params.delta)[index];
    const T* grad_out = row_pointer<T>(params.grad_out, params.grad_out_strides, row.b, row.h, row.i);
    const auto visit = [&](int64_t first, uint32_t bits) {
      const bool kept = bits >> lane & 1;
      if (kept) shares[lane] = pair_of(params, row, first + lane, lse, delta, grad_out).grad_logit;
      const int64_t at = kept ? bias_index(forward, row.p - first - lane) : -1 - lane;
      // Of keys with the same entry the first lane adds all, in order.
      const uint32_t peers = __match_any_sync(kAllLanes, static_cast<int>(at));
      __syncwarp();
      if (kept && __ffs(static_cast<int>(peers)) - 1 == lane) {
        double sum = 0;
        for (uint32_t left = peers; left != 0; left &= left - 1) sum += shares[__ffs(static_cast<int>(left)) - 1];
        bias[at] += sum;
      }
      __syncwarp();
    };
    row.walk(visit, [](int64_t) {});
  }
}

// sums [chunks, heads]: the sink takes exp(sink - lse) of every row's weight and gives nothing for it. In double, and
// so is what it adds up, delta once more.
template <class T>
__global__ void grad_sink_kernel(const __grid_constant__ AttentionBackwardParams params, double* sums, int64_t chunks) {
  const AttentionParams& forward = params.forward;
  const int64_t lane = threadIdx.x % kLanes;
  const int64_t chunk = warp_index() / forward.heads, h = warp_index() % forward.heads;
  if (chunk >= chunks) return;
  const double sink = static_cast<const float*>(forward.sink_logits)[h];
  const ChunkRows rows(forward, chunk, chunks);
  double sum = 0;
  for (int64_t r = rows.first; r < rows.last; ++r) {
    const int64_t b = r / forward.query_length, i = r % forward.query_length;
    const int64_t index = row_index(forward, b, h, i);
    if (i >= bounded_row_map(forward, b, h).queries) continue;
    const T* grad_out = row_pointer<T>(params.grad_out, params.grad_out_strides, b, h, i);
    const T* out = static_cast<const T*>(forward.out) + index * forward.value_dim;
    double delta = 0;
    for (int64_t c = lane; c < forward.value_dim; c += kLanes) {
      delta += static_cast<double>(to_float(grad_out[c])) * to_float(out[c]);
    }
    delta = warp_sum(delta);
    if (params.grad_lse) delta -= static_cast<const float*>(params.grad_lse)[index];
    sum -= exp(sink - static_cast<const float*>(forward.lse)[index]) * delta;
  }
  if (lane == 0) sums[chunk * forward.heads + h] = sum;
}

// out[n] = the sum of sums[chunk][n], chunks ascending.
__global__ void sum_chunks_kernel(const double* sums, int64_t chunks, int64_t count, float* out) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= count) return;
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * count + n];
  out[n] = static_cast<float>(sum);
}

// Chunks of rows for a table of `entries`: many, as far as 32 MB go.
int64_t chunks_for(int64_t entries) {
  const int64_t chunks = (int64_t{1} << 22) / (entries > 0 ? entries : 1);
  return chunks < 1 ? 1 : chunks < kMostChunks ? chunks : kMostChunks;
}

template <class T>
Status backward_of(const AttentionBackwardParams& params, void* scratch, void* stream) {
  const AttentionParams& forward = params.forward;
  constexpr int64_t kFloat = sizeof(float);
  const int64_t n = forward.head_dim, m = forward.value_dim, pairs = forward.batch * forward.kv_heads;
  const int64_t rows = forward.batch * forward.heads * forward.query_length, keys = pairs * forward.key_length;
  Status status = clear_memory(params.grad_key, keys * n * kFloat, stream);
  if (status.ok()) status = clear_memory(params.grad_value, keys * m * kFloat, stream);
  if (status.ok()) status = launch(delta_kernel<T>, blocks_of_warps(rows), kThreads, 0, stream, params);
  if (status.ok()) {
    status = launch(plain_grad_query_kernel<T>, blocks_of_warps(rows), kThreads, kWarpsPerBlock * 3 * n * kFloat,
                    stream, params);
  }
  if (status.ok() && rows > 0 && keys > 0) {
    const int64_t warps = pairs * most_tiles(forward.key_length) * kKeyTile;
    status = launch(plain_grad_key_kernel<T>, blocks_of_warps(warps), kThreads, kWarpsPerBlock * 2 * n * kFloat, stream,
                    params);
  }
  const auto sum_chunks = [&](const double* sums, int64_t chunks, int64_t count, void* out) {
    return launch(sum_chunks_kernel, (count + kThreads - 1) / kThreads, kThreads, 0, stream, sums, chunks, count,
                  static_cast<float*>(out));
  };
  double* sums = static_cast<double*>(scratch);
  if (status.ok() && params.grad_bias) {
    const int64_t count = forward.heads * forward.bias_length, chunks = chunks_for(count);
    status = clear_memory(sums, chunks * count * static_cast<int64_t>(sizeof(double)), stream);
    if (status.ok()) {
      status = launch(plain_grad_bias_kernel<T>, blocks_of_warps(chunks * forward.heads), kThreads,
                      kWarpsPerBlock * (2 * n + kLanes) * kFloat, stream, params, sums, chunks);
    }
    if (status.ok()) status = sum_chunks(sums, chunks, count, params.grad_bias);
    sums += chunks * count;
  }
  if (status.ok() && params.grad_sink_logits) {
    const int64_t count = forward.heads, chunks = chunks_for(count);
    status = launch(grad_sink_kernel<T>, blocks_of_warps(chunks * count), kThreads, 0, stream, params, sums, chunks);
    if (status.ok()) status = sum_chunks(sums, chunks, count, params.grad_sink_logits);
  }
  return status;
}

}  // namespace

int64_t plain_backward_scratch(const AttentionBackwardParams& params) {
  const AttentionParams& forward = params.forward;
  int64_t doubles = 0;
  if (params.grad_bias) {
    doubles += chunks_for(forward.heads * forward.bias_length) * forward.heads * forward.bias_length;
  }
  if (params.grad_sink_logits) doubles += chunks_for(forward.heads) * forward.heads;
  return doubles * static_cast<int64_t>(sizeof(double));
}

Status launch_plain_backward(const AttentionBackwardParams& params, void* scratch, void* stream) {
  switch (params.forward.dtype) {
    case DType::kFloat16: return backward_of<Float16>(params, scratch, stream);
    case DType::kBFloat16: return backward_of<BFloat16>(params, scratch, stream);
    default: return backward_of<float>(params, scratch, stream);
  }
}

}  // namespace pycore
