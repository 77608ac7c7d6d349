// SPDX-License-Identifier: Apache-2.0
// Attention on CUDA, plain: one warp a query row, keys 32 at a time, correct rather than fast. It takes every schedule,
// the rotation and the row maps through the same headers as the CPU. Not yet run on a device.
//
// Each warp walks its row's key tiles in order, so a row's bits do not depend on the rows beside it: a lane holds the
// score of one key and, for the values, a strided share of the channels.
#include <cuda_runtime.h>
#include <pycore/attention.h>

#include <cstdint>

namespace pycore {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr int kMaxChannelsPerLane = 8;  // head_dim and value_dim up to 256
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ float warp_max(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

__device__ float warp_sum(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Channel c of a row rotated by `distance` positions.
__device__ float rotated(const AttentionParams& params, const float* x, int64_t distance, int64_t c) {
  if (c >= params.rope_dim) return x[c];
  const int64_t half = params.rope_dim / 2;
  const int64_t i = params.rope_interleaved ? c / 2 : c % half;
  const bool second = params.rope_interleaved ? c % 2 != 0 : c >= half;
  const int64_t other = params.rope_interleaved ? c ^ 1 : (second ? c - half : c + half);
  int64_t row = distance < 0 ? -distance : distance;
  if (row >= params.rope_rows) row = params.rope_rows - 1;  // in bounds whatever the caller's lengths say
  const float cosine = static_cast<const float*>(params.rope_cos)[row * params.rope_stride + i];
  const float sine = static_cast<const float*>(params.rope_sin)[row * params.rope_stride + i];
  const float turned = (distance < 0) == second ? -x[other] * sine : x[other] * sine;
  return fmaf(x[c], cosine, turned);
}

__device__ int64_t clamped(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }

// row_map with every number held within the arrays: the lengths lie in device memory, and no host has read them.
__device__ RowMap bounded_row_map(const AttentionParams& params, int64_t b, int64_t h) {
  RowMap map = row_map(params, b, h);
  map.start = clamped(map.start, 0, params.key_length);
  map.keys = clamped(map.keys, 0, params.key_length - map.start);
  map.sinks = clamped(map.sinks, 0, map.keys);
  map.offset = clamped(map.offset, 0, kFar);
  map.queries = clamped(map.queries, 0, params.query_length);
  return map;
}

struct RowState {
  float max = -INFINITY, sum = 0;
  float accumulator[kMaxChannelsPerLane] = {};

  __device__ void merge(const RowState& other) {
    if (other.max == -INFINITY) return;
    const float new_max = fmaxf(max, other.max);
    const float mine = expf(max - new_max), theirs = expf(other.max - new_max);
    max = new_max;
    sum = fmaf(other.sum, theirs, sum * mine);
    for (int k = 0; k < kMaxChannelsPerLane; ++k) {
      accumulator[k] = fmaf(other.accumulator[k], theirs, accumulator[k] * mine);
    }
  }
};

// queries: per warp, the query rotated for the tile and the query rotated by the limit, head_dim each.
__global__ void attention_forward_kernel(AttentionParams params) {
  extern __shared__ float queries[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp;
  if (index >= params.batch * params.heads * params.query_length) return;
  const int64_t i = index % params.query_length, h = index / params.query_length % params.heads;
  const int64_t b = index / params.query_length / params.heads, kv_head = h / (params.heads / params.kv_heads);
  const RowMap map = bounded_row_map(params, b, h);

  float* near = queries + warp * 2 * params.head_dim;
  float* far = near + params.head_dim;
  const float* query = static_cast<const float*>(params.query) + b * params.query_strides.batch +
                       h * params.query_strides.head + i * params.query_strides.row;
  const float* keys =
      static_cast<const float*>(params.key) + b * params.key_strides.batch + kv_head * params.key_strides.head;
  const float* values =
      static_cast<const float*>(params.value) + b * params.value_strides.batch + kv_head * params.value_strides.head;
  const bool rope = params.rope_cos != nullptr;
  const int64_t p = map.query_position(i);
  for (int64_t c = lane; c < params.head_dim; c += kWarp) {
    far[c] = rope && p > params.distance_limit ? rotated(params, query, params.distance_limit, c) : 0;
  }

  RowState total, segment;
  int64_t open_segment = 0;
  for (int64_t tile = i < map.queries ? map.next_tile(p, p, 0) : kNoTile; tile != kNoTile;
       tile = map.next_tile(p, p, tile + 1)) {
    const uint64_t kept = map.schedule.keep_bits(p, tile) & map.present_bits(tile);
    if (kept == 0) continue;
    if (tile / kSegmentTiles != open_segment) {
      total.merge(segment);
      segment = RowState();
      open_segment = tile / kSegmentTiles;
    }
    const int64_t base = tile * kKeyTile;
    __syncwarp();
    for (int64_t c = lane; c < params.head_dim; c += kWarp)
      near[c] = rope ? rotated(params, query, p - base, c) : query[c];
    __syncwarp();
    for (int64_t first = 0; first < kKeyTile; first += kWarp) {
      const uint32_t bits = static_cast<uint32_t>(kept >> first);
      if (bits == 0) continue;
      float score = -INFINITY;
      const int64_t j = base + first + lane;
      if (bits >> lane & 1) {
        const float* key = keys + map.key_row(j) * params.key_strides.row;
        const bool is_far = rope && p - j > params.distance_limit;
        const float* seen = is_far ? far : near;
        float sum = 0;
        for (int64_t c = 0; c < params.head_dim; ++c) {
          sum = fmaf(seen[c], rope && !is_far ? rotated(params, key, j - base, c) : key[c], sum);
        }
        score = sum * static_cast<float>(params.scale);
      }
      const float new_max = fmaxf(segment.max, warp_max(score));
      if (new_max == -INFINITY) continue;
      const float rescale = expf(segment.max - new_max), weight = expf(score - new_max);
      segment.max = new_max;
      segment.sum = fmaf(segment.sum, rescale, warp_sum(weight));
      for (int k = 0; k < kMaxChannelsPerLane; ++k) segment.accumulator[k] *= rescale;
      for (int other = 0; other < kWarp; ++other) {
        const float share = __shfl_sync(kAllLanes, weight, other);
        if (!(bits >> other & 1)) continue;
        const float* value = values + map.key_row(base + first + other) * params.value_strides.row;
        for (int k = 0; k < kMaxChannelsPerLane; ++k) {
          const int64_t c = k * kWarp + lane;
          if (c < params.value_dim) segment.accumulator[k] = fmaf(share, value[c], segment.accumulator[k]);
        }
      }
    }
  }
  total.merge(segment);
  float* out = static_cast<float*>(params.out) + index * params.value_dim;
  for (int k = 0; k < kMaxChannelsPerLane; ++k) {
    const int64_t c = k * kWarp + lane;
    if (c < params.value_dim) out[c] = total.sum == 0 ? 0.0f : total.accumulator[k] / total.sum;
  }
  if (lane == 0) static_cast<float*>(params.lse)[index] = total.max + logf(total.sum);
}

}  // namespace

Status launch_attention_forward(const AttentionParams& params, void* stream) {
  if (params.dtype != DType::kFloat32) {
    return {StatusCode::kUnsupported, "the CUDA kernel takes float32"};
  }
  if (params.distance_bias || params.alibi_slopes || params.sink_logits || params.block_bias || params.softcap > 0 ||
      params.dropout_p > 0) {
    return {StatusCode::kUnsupported,
            "the CUDA kernel takes no distance_bias, alibi_slopes, sink_logits, correction, softcap or dropout_p"};
  }
  constexpr int64_t kMaxChannels = kWarp * kMaxChannelsPerLane;
  if (params.head_dim > kMaxChannels || params.value_dim > kMaxChannels) {
    return {StatusCode::kUnsupported, "the CUDA kernel takes a head_dim of at most 256"};
  }
  const int64_t rows = params.batch * params.heads * params.query_length;
  if (rows == 0) return {};
  const int64_t blocks = (rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  if (blocks > INT32_MAX) return {StatusCode::kUnsupported, "the CUDA kernel takes fewer than 2^33 query rows"};
  const size_t shared = sizeof(float) * 2 * params.head_dim * kWarpsPerBlock;
  attention_forward_kernel<<<static_cast<unsigned>(blocks), kWarp * kWarpsPerBlock, shared,
                             static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return {StatusCode::kCuda, cudaGetErrorString(error)};
  return {};
}

}  // namespace pycore
