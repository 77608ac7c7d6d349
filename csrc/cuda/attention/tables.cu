// SPDX-License-Identifier: Apache-2.0
// Gradients that sum over all rows: delta, which every other one needs, and those of distance_bias and sink_logits. A
// table's is summed in chunks of rows, a warp each, and then over the chunks, in order.
#include <type_traits>

#include "launch.h"
#include "warp.cuh"

namespace pycore {
namespace {

constexpr int64_t kMostChunks = 64;

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
    const TwoParts lse = load_lse(forward, index);
    const float delta = static_cast<const float*>(params.delta)[index];
    const T* grad_out = row_pointer<T>(params.grad_out, params.grad_out_strides, row.b, row.h, row.i);
    const auto visit = [&](int64_t first, uint32_t bits) {
      const bool kept = bits >> lane & 1;
      if (kept) shares[lane] = pair_of(params, row, first + lane, lse, delta, grad_out).grad_logit;
      const int64_t at = kept ? bias_index(forward, row.place - row.map.schedule.place(first + lane)) : -1 - lane;
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
    if (lse.high != -INFINITY) row.walk(visit, [](int64_t) {});
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
  int64_t bound = -1, queries = 0;
  for (int64_t r = rows.first; r < rows.last; ++r) {
    const int64_t b = r / forward.query_length, i = r % forward.query_length;
    const int64_t index = row_index(forward, b, h, i);
    if (b != bound) queries = bounded_row_map(forward, b, h).queries;
    bound = b;
    const TwoParts lse = load_lse(forward, index);
    if (i >= queries || lse.high == -INFINITY) continue;
    const T* grad_out = row_pointer<T>(params.grad_out, params.grad_out_strides, b, h, i);
    const T* out = static_cast<const T*>(forward.out) + index * forward.value_dim;
    double delta = 0;
    for (int64_t c = lane; c < forward.value_dim; c += kLanes) {
      delta += static_cast<double>(to_float(grad_out[c])) * to_float(out[c]);
    }
    delta = warp_sum(delta);
    if (params.grad_lse) delta -= static_cast<const float*>(params.grad_lse)[index];
    sum -= exp(sink - lse.high - lse.low) * delta;
  }
  if (lane == 0) sums[chunk * forward.heads + h] = sum;
}

// What the pairs of one batch row's head give to the gradients of its slope, of scale and of softcap.
constexpr int kHeadSums = 3;

// sums [chunks, batch, heads, 3]: a warp for some rows of a batch row's head, a lane for every thirty-second key. What
// is summed, and why not with delta, says cpu/attention/sum_gradients.h. shared as for plain_grad_bias_kernel.
template <class T>
__global__ void head_sums_kernel(const __grid_constant__ AttentionBackwardParams params, double* sums, int64_t chunks) {
  const AttentionParams& forward = params.forward;
  const int64_t lane = threadIdx.x % kLanes, n = forward.head_dim, pairs = forward.batch * forward.heads;
  const int64_t chunk = warp_index() / pairs, pair = warp_index() % pairs;
  if (chunk >= chunks) return;
  float* near = reinterpret_cast<float*>(shared_memory()) + threadIdx.x / kLanes * (2 * n + kLanes);
  const int64_t first = forward.query_length * chunk / chunks, last = forward.query_length * (chunk + 1) / chunks;
  double head[kHeadSums] = {0, 0, 0};
  for (int64_t i = first; i < last; ++i) {
    const int64_t index = pair * forward.query_length + i;
    __syncwarp();
    const QueryRow<T> row(forward, index, near, near + n);
    const TwoParts lse = load_lse(forward, index);
    const T* grad_out = row_pointer<T>(params.grad_out, params.grad_out_strides, row.b, row.h, row.i);
    double weights = 0, grads = 0, by_grad[kHeadSums] = {0, 0, 0}, by_weight[kHeadSums] = {0, 0, 0};
    const auto visit = [&](int64_t tile_first, uint32_t bits) {
      if (!(bits >> lane & 1)) return;
      const int64_t j = tile_first + lane;
      const float product = row.product(j);
      const WarpPair seen = pair_gradient(params, row.map.schedule, row.b, row.h, row.p, j, product, lse, 0.0f,
                                          row.keep_factor(j), grad_out, row.value(j));
      float by_scale = product, by_cap = 0;
      if (forward.softcap > 0) {
        const float x = product * static_cast<float>(forward.scale) / static_cast<float>(forward.softcap);
        const float bent = tanhf(x), bend = 1 - bent * bent;
        by_cap = bent - x * bend;
        by_scale *= bend;
      }
      const double distance = static_cast<double>(seen_distance(forward, row.place - row.map.schedule.place(j)));
      const double x[kHeadSums] = {-distance, by_scale, by_cap};
      weights += seen.share;
      grads += seen.grad_logit;
      for (int k = 0; k < kHeadSums; ++k) {
        by_grad[k] += seen.grad_logit * x[k];
        by_weight[k] += seen.share * x[k];
      }
    };
    if (lse.high == -INFINITY) continue;
    row.walk(visit, [](int64_t) {});
    double all = warp_sum(weights);
    if (forward.sink_logits)
      all += exp(static_cast<double>(static_cast<const float*>(forward.sink_logits)[row.h]) - lse.high - lse.low);
    const double from_lse = params.grad_lse ? static_cast<const float*>(params.grad_lse)[index] : 0.0f;
    const double delta = warp_sum(grads) / all - from_lse;
    for (int k = 0; k < kHeadSums; ++k) head[k] += (warp_sum(by_grad[k]) - delta * warp_sum(by_weight[k])) / all;
  }
  if (lane != 0) return;
  for (int k = 0; k < kHeadSums; ++k) sums[(chunk * pairs + pair) * kHeadSums + k] = head[k];
}

// Thread n adds up the slope of [slope_rows, heads]'s entry n; two more those of scale and softcap. In order.
__global__ void sum_heads_kernel(const __grid_constant__ AttentionBackwardParams params, const double* sums,
                                 int64_t chunks) {
  const AttentionParams& forward = params.forward;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarpBlockThreads + threadIdx.x;
  const int64_t pairs = forward.batch * forward.heads, slopes = params.slope_rows * forward.heads;
  if (n >= slopes + 2) return;
  const bool is_slope = n < slopes;
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t pair = is_slope ? n : 0; pair < pairs; pair += is_slope ? slopes : 1) {
      sum += sums[(chunk * pairs + pair) * kHeadSums + (is_slope ? 0 : n - slopes + 1)];
    }
  }
  if (is_slope && params.grad_slopes) static_cast<float*>(params.grad_slopes)[n] = static_cast<float>(sum);
  if (!is_slope && params.grad_numbers) params.grad_numbers[n - slopes] = sum;
}

bool wants_head_sums(const AttentionBackwardParams& params) { return params.grad_slopes || params.grad_numbers; }

// out[n] = the sum of sums[chunk][n], chunks ascending.
__global__ void sum_chunks_kernel(const double* sums, int64_t chunks, int64_t count, float* out) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarpBlockThreads + threadIdx.x;
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
Status delta_of(const AttentionBackwardParams& params, void* stream) {
  const AttentionParams& forward = params.forward;
  constexpr int64_t kFloat = sizeof(float);
  const int64_t keys = forward.batch * forward.kv_heads * forward.key_length;
  Status status = clear_memory(params.grad_key, keys * forward.head_dim * kFloat, stream);
  if (status.ok()) status = clear_memory(params.grad_value, keys * forward.value_dim * kFloat, stream);
  const int64_t rows = forward.batch * forward.heads * forward.query_length;
  return status.ok() ? launch(delta_kernel<T>, blocks_of_warps(rows), kWarpBlockThreads, 0, stream, params) : status;
}

template <class T>
Status tables_of(const AttentionBackwardParams& params, const TilePlan* plan, void* scratch, void* stream) {
  const AttentionParams& forward = params.forward;
  Status status;
  const auto sum_chunks = [&](const double* sums, int64_t chunks, int64_t count, void* out) {
    return launch(sum_chunks_kernel, (count + kWarpBlockThreads - 1) / kWarpBlockThreads, kWarpBlockThreads, 0, stream,
                  sums, chunks, count, static_cast<float*>(out));
  };
  double* sums = static_cast<double*>(scratch);
  if (params.grad_bias) {
    const int64_t count = forward.heads * forward.bias_length, chunks = chunks_for(count);
    status = clear_memory(sums, chunks * count * static_cast<int64_t>(sizeof(double)), stream);
    // A tree's distances lie on no diagonals.
    if (status.ok() && plan != nullptr && forward.schedule.kind != ScheduleKind::kTree) {
      const auto launch_bias = std::is_same<T, float>::value     ? launch_bias_float32
                               : std::is_same<T, Float16>::value ? launch_bias_float16
                                                                 : launch_bias_bfloat16;
      status = launch_bias(params, *plan, sums, chunks, stream);
    } else if (status.ok()) {
      status = launch(plain_grad_bias_kernel<T>, blocks_of_warps(chunks * forward.heads), kWarpBlockThreads,
                      kWarpsPerBlock * (2 * forward.head_dim + kLanes) * static_cast<int64_t>(sizeof(float)), stream,
                      params, sums, chunks);
    }
    if (status.ok()) status = sum_chunks(sums, chunks, count, params.grad_bias);
    sums += chunks * count;
  }
  if (status.ok() && params.grad_sink_logits) {
    const int64_t count = forward.heads, chunks = chunks_for(count);
    status = launch(grad_sink_kernel<T>, blocks_of_warps(chunks * count), kWarpBlockThreads, 0, stream, params, sums,
                    chunks);
    if (status.ok()) status = sum_chunks(sums, chunks, count, params.grad_sink_logits);
    sums += chunks * count;
  }
  if (status.ok() && wants_head_sums(params)) {
    const int64_t pairs = forward.batch * forward.heads, chunks = chunks_for(pairs * kHeadSums);
    if (pairs > 0) {
      status = launch(head_sums_kernel<T>, blocks_of_warps(chunks * pairs), kWarpBlockThreads,
                      kWarpsPerBlock * (2 * forward.head_dim + kLanes) * static_cast<int64_t>(sizeof(float)), stream,
                      params, sums, chunks);
    }
    const int64_t threads = params.slope_rows * forward.heads + 2;
    if (status.ok()) {
      const double* given = sums;
      status = launch(sum_heads_kernel, (threads + kWarpBlockThreads - 1) / kWarpBlockThreads, kWarpBlockThreads, 0,
                      stream, params, given, chunks);
    }
  }
  return status;
}

}  // namespace

Status launch_delta(const AttentionBackwardParams& params, void* stream) {
  switch (params.forward.dtype) {
    case DType::kFloat16: return delta_of<Float16>(params, stream);
    case DType::kBFloat16: return delta_of<BFloat16>(params, stream);
    default: return delta_of<float>(params, stream);
  }
}

int64_t table_gradient_scratch(const AttentionBackwardParams& params) {
  const AttentionParams& forward = params.forward;
  int64_t doubles = 0;
  if (params.grad_bias) {
    doubles += chunks_for(forward.heads * forward.bias_length) * forward.heads * forward.bias_length;
  }
  if (params.grad_sink_logits) doubles += chunks_for(forward.heads) * forward.heads;
  if (wants_head_sums(params)) {
    const int64_t sums = forward.batch * forward.heads * kHeadSums;
    doubles += chunks_for(sums) * sums;
  }
  return doubles * static_cast<int64_t>(sizeof(double));
}

Status launch_table_gradients(const AttentionBackwardParams& params, const TilePlan* plan, void* scratch,
                              void* stream) {
  switch (params.forward.dtype) {
    case DType::kFloat16: return tables_of<Float16>(params, plan, scratch, stream);
    case DType::kBFloat16: return tables_of<BFloat16>(params, plan, scratch, stream);
    default: return tables_of<float>(params, plan, scratch, stream);
  }
}

}  // namespace pycore
