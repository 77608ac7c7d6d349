// SPDX-License-Identifier: Apache-2.0
// Attention on CUDA: which kernels a problem gets. Compiled, run on a CPU under tests/native/cuda_emulation.h, and not
// yet run on a device.
#include <pycore/attention.h>
#include <pycore/attention_rows.h>

#include "attention_launch.h"
#include "launch.cuh"

namespace pycore {
namespace {

constexpr int64_t kPartialBytes = int64_t{64} << 20;  // what splitting may take
constexpr int64_t kTileRows = 64, kWideRows = 128;

Status check(const AttentionParams& params) {
  if (params.dtype != DType::kFloat32 && params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) {
    return {StatusCode::kUnsupported, "the CUDA kernels take float32, float16 and bfloat16"};
  }
  if (params.head_dim > 256 || params.value_dim > 256) {
    return {StatusCode::kUnsupported, "the CUDA kernels take a head_dim of at most 256"};
  }
  return {};
}

// Whether every row starts at a multiple of 16 bytes, in elements of two.
bool aligned(const void* data, const AttentionStrides& strides) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.batch % 8 == 0 && strides.head % 8 == 0 &&
         strides.row % 8 == 0;
}

int64_t ceiling(int64_t x, int64_t y) { return (x + y - 1) / y; }

MmaPlan mma_plan(const AttentionParams& params) {
  MmaPlan plan;
  const int64_t channels = params.head_dim > params.value_dim ? params.head_dim : params.value_dim;
  plan.channels = channels <= 64 ? 64 : channels <= 96 ? 96 : channels <= 128 ? 128 : 256;
  plan.options = params.rope_cos || has_bias(params) || params.block_bias || params.softcap > 0 ||
                 params.dropout_p > 0 || !(static_cast<float>(params.scale) * 1.44f > 0);
  // Small blocks: rows of other blocks want other keys.
  const bool small_blocks =
      params.schedule.kind == ScheduleKind::kBlocks && (int64_t{1} << params.schedule.block_shift) < kWideRows;
  plan.wide = !plan.options && plan.channels <= 128 && params.query_length > kTileRows && !small_blocks;
  const int64_t most = plan.wide ? kWideRows : kTileRows, group = params.heads / params.kv_heads;
  const int64_t rows = params.query_length < most ? params.query_length : most;
  plan.rows = static_cast<int>(rows);
  // Every head has blocks of its own.
  const int64_t heads = params.schedule.kind == ScheduleKind::kBlocks ? 1 : most / rows;
  plan.heads = static_cast<int>(heads < group ? heads : group);
  plan.head_tiles = ceiling(group, plan.heads);
  plan.query_tiles = ceiling(params.query_length, rows);
  plan.items = plan.query_tiles * plan.head_tiles * params.kv_heads * params.batch;
  plan.aligned_query = aligned(params.query, params.query_strides);
  plan.aligned_key = aligned(params.key, params.key_strides);
  plan.aligned_value = aligned(params.value, params.value_strides);
  plan.pairs_out = params.value_dim % 2 == 0 && reinterpret_cast<uintptr_t>(params.out) % 4 == 0;
  return plan;
}

int64_t partial_bytes(const AttentionParams& params, const MmaPlan& plan, int64_t splits) {
  return plan.items * splits * plan.heads * plan.rows * MmaPlan::state_floats(params) *
         static_cast<int64_t>(sizeof(float));
}

// Blocks for each item: the most segments it can visit, on both sides of a gap, where items are fewer than the device
// takes at a time.
int64_t wanted_splits(const AttentionParams& params, const MmaPlan& plan) {
  const int64_t splits = params.key_length / (kKeyTile * kSegmentTiles) + 3;
  if (params.key_length <= kKeyTile * kSegmentTiles || plan.items >= 2 * multiprocessors()) return 1;
  return partial_bytes(params, plan, splits) <= kPartialBytes ? splits : 1;
}

bool has_work(const AttentionParams& params) { return params.batch * params.heads * params.query_length > 0; }
bool is_half(const AttentionParams& params) {
  return params.dtype == DType::kFloat16 || params.dtype == DType::kBFloat16;
}

}  // namespace

int64_t launch_attention_forward_scratch(const AttentionParams& params) {
  if (!is_half(params) || !check(params).ok() || !has_work(params)) return 0;
  const MmaPlan plan = mma_plan(params);
  const int64_t splits = wanted_splits(params, plan);
  return splits > 1 ? partial_bytes(params, plan, splits) : 0;
}

Status launch_attention_forward(const AttentionParams& params, void* scratch, void* stream) {
  const Status status = check(params);
  if (!status.ok() || !has_work(params)) return status;
  if (!is_half(params)) return launch_plain_forward(params, stream);
  MmaPlan plan = mma_plan(params);
  // The largest tiles are more than small devices have shared memory for.
  if (plan.channels == 256 && shared_limit() < 144 << 10) return launch_plain_forward(params, stream);
  if (scratch != nullptr) {
    plan.splits = wanted_splits(params, plan);
    plan.partials = static_cast<float*>(scratch);
  }
  return params.dtype == DType::kFloat16 ? launch_mma_float16(params, plan, stream)
                                         : launch_mma_bfloat16(params, plan, stream);
}

int64_t launch_attention_backward_scratch(const AttentionBackwardParams& params) {
  return plain_backward_scratch(params);
}

Status launch_attention_backward(const AttentionBackwardParams& params, void* scratch, void* stream) {
  const Status status = check(params.forward);
  return status.ok() ? launch_plain_backward(params, scratch, stream) : status;
}

}  // namespace pycore
