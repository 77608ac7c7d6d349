// SPDX-License-Identifier: Apache-2.0
// Copies new tokens to the rows of an evicting cache, a block for each token of each head; then moves the lengths on.
// Compiled and not yet run on a device.
#include <pycore/attention/cache.h>

namespace pycore {
namespace {

constexpr int kThreads = 128;

__device__ int64_t bounded(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }

__device__ void copy_row(const char* from, char* to, int64_t bytes) {
  // Rows are whole elements of at least two bytes.
  const auto* source = reinterpret_cast<const uint16_t*>(from);
  auto* target = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = threadIdx.x; i < bytes / 2; i += kThreads) target[i] = source[i];
}

__global__ void append_kernel(CacheAppendParams params) {
  const int64_t token = blockIdx.x % params.tokens, pair = blockIdx.x / params.tokens;
  const int64_t b = pair / params.kv_heads, h = pair % params.kv_heads;
  const int64_t start = params.starts ? bounded(params.starts[b], 0, params.tokens) : 0;
  const int64_t length = bounded(params.lengths[b], 0, kFar), j = length + token - start;
  const int64_t end = length + params.tokens - start;
  // What this chunk itself would write over is not written: the order of the blocks is not known.
  if (token < start || (j >= params.sinks && j < end - params.ring)) return;
  const int64_t row = pair * (params.sinks + params.ring) + cache_row(params, j);
  const auto copy = [&](const CacheSource& source, char* cache) {
    copy_row(source.data + b * source.batch + h * source.head + token * source.token, cache + row * source.row_bytes,
             source.row_bytes);
  };
  copy(params.key, params.key_cache);
  copy(params.value, params.value_cache);
}

__global__ void lengths_kernel(CacheAppendParams params) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= params.batch) return;
  params.lengths[b] += params.tokens - (params.starts ? bounded(params.starts[b], 0, params.tokens) : 0);
}

}  // namespace

Status launch_lambda_cache_append(const CacheAppendParams& params, void* stream) {
  const int64_t blocks = params.batch * params.kv_heads * params.tokens;
  if (blocks > 0x7fffffff) return {StatusCode::kUnsupported, "the chunk has too many tokens for one launch"};
  const auto queue = static_cast<cudaStream_t>(stream);
  if (blocks > 0) append_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, queue>>>(params);
  if (params.batch > 0) {
    lengths_kernel<<<static_cast<unsigned>((params.batch + kThreads - 1) / kThreads), kThreads, 0, queue>>>(params);
  }
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    return {StatusCode::kCuda, cudaGetErrorString(error)};
  }
  return {};
}

}  // namespace pycore
