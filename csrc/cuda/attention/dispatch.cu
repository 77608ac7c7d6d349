// SPDX-License-Identifier: Apache-2.0
// Attention on CUDA: which kernels a problem gets, and how they cut it. Compiled, run on a CPU under
// tests/native/cuda_emulation.h, and not yet run on a device.
#include <pycore/attention/attention.h>
#include <pycore/attention/rows.h>

#include "../launch.cuh"
#include "launch.h"

namespace pycore {
namespace {

constexpr int64_t kPartialBytes = int64_t{256} << 20;  // what splitting may take
constexpr int64_t kListedSplits = 128;                 // from so many on, one walk lists the segments for all blocks
constexpr int64_t kTileRows = 64, kWideRows = 128, kFewRows = 32;

Status check(const AttentionParams& params) {
  if (params.dtype != DType::kFloat32 && params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) {
    return {StatusCode::kUnsupported, "the CUDA kernels take float32, float16 and bfloat16"};
  }
  if (params.head_dim > 256 || params.value_dim > 256) {
    return {StatusCode::kUnsupported, "the CUDA kernels take a head_dim of at most 256"};
  }
  return {};
}

bool has_work(const AttentionParams& params) { return params.batch * params.heads * params.query_length > 0; }
int64_t ceiling(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Whether every row starts at a multiple of 16 bytes.
bool aligned(DType dtype, const void* data, const AttentionStrides& strides) {
  const int64_t each = 16 / dtype_size(dtype);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.batch % each == 0 && strides.head % each == 0 &&
         strides.row % each == 0;
}

// What forward and backward have in common.
TilePlan plan_of(const AttentionParams& params) {
  TilePlan plan;
  const int64_t channels = params.head_dim > params.value_dim ? params.head_dim : params.value_dim;
  plan.channels = channels <= 64 ? 64 : channels <= 96 ? 96 : channels <= 128 ? 128 : 256;
  plan.options = params.rope_cos || has_bias(params) || params.block_bias || params.softcap > 0 ||
                 params.dropout_p > 0 || !(static_cast<float>(params.scale) * 1.44f > 0);
  plan.aligned_query = aligned(params.dtype, params.query, params.query_strides);
  plan.aligned_key = aligned(params.dtype, params.key, params.key_strides);
  plan.aligned_value = aligned(params.dtype, params.value, params.value_strides);
  return plan;
}

TilePlan forward_plan(const AttentionParams& params) {
  TilePlan plan = plan_of(params);
  if (params.dtype != DType::kFloat32 && !plan.options && plan.channels <= 128) {
    // Small blocks: rows of other blocks want other keys.
    const bool small_blocks =
        params.schedule.kind == ScheduleKind::kBlocks && (int64_t{1} << params.schedule.block_shift) < kWideRows;
    if (params.query_length > kTileRows && !small_blocks) {
      plan.shape = TileShape::kWide;
    } else if (params.query_length > kFewRows) {
      plan.shape = TileShape::kPaired;
    }
  }
  const int64_t most = plan.shape == TileShape::kWide ? kWideRows : kTileRows, group = params.heads / params.kv_heads;
  const int64_t rows = params.query_length < most ? params.query_length : most;
  plan.rows = static_cast<int>(rows);
  // Every head has blocks of its own.
  const int64_t heads = params.schedule.kind == ScheduleKind::kBlocks ? 1 : most / rows;
  plan.heads = static_cast<int>(heads < group ? heads : group);
  plan.head_tiles = ceiling(group, plan.heads);
  plan.query_tiles = ceiling(params.query_length, rows);
  plan.items = plan.query_tiles * plan.head_tiles * params.kv_heads * params.batch;
  const uintptr_t pair = 2 * static_cast<uintptr_t>(dtype_size(params.dtype));
  plan.pairs_out = params.value_dim % 2 == 0 && reinterpret_cast<uintptr_t>(params.out) % pair == 0;
  return plan;
}

TilePlan backward_plan(const AttentionBackwardParams& params) {
  TilePlan plan = plan_of(params.forward);
  plan.query_tiles = ceiling(params.forward.query_length, kTileRows);
  plan.aligned_grad_out = aligned(params.forward.dtype, params.grad_out, params.grad_out_strides);
  return plan;
}

int64_t partial_bytes(const AttentionParams& params, const TilePlan& plan, int64_t splits) {
  return plan.items * splits * plan.heads * plan.rows * (2 + params.value_dim) * static_cast<int64_t>(sizeof(float));
}

// Blocks for each item: the most segments it can visit, on both sides of a gap, where items are fewer than the device
// takes at a time.
int64_t wanted_splits(const AttentionParams& params, const TilePlan& plan) {
  constexpr int64_t kSegment = kKeyTile * kSegmentTiles;
  int64_t keys = params.key_length;
  if (params.schedule.kind == ScheduleKind::kLambda) {
    const int64_t sinks = params.schedule.sink_size,
                  reached = params.schedule.window_size + params.schedule.right + plan.rows;
    if (sinks < keys && reached < keys - sinks) keys = sinks + reached;
  }
  const int64_t splits = keys / kSegment + 4;
  if (params.key_length <= kKeyTile * kSegmentTiles || plan.items >= 2 * multiprocessors()) return 1;
  return partial_bytes(params, plan, splits) <= kPartialBytes ? splits : 1;
}

// Of the list of segments, which stands behind the partials.
int64_t list_bytes(const TilePlan& plan, int64_t splits) {
  return splits > kListedSplits ? plan.items * splits * static_cast<int64_t>(sizeof(int64_t)) : 0;
}

// use(dtype's function of float32, float16 and bfloat16).
template <class F>
F for_dtype(DType dtype, F float32, F float16, F bfloat16) {
  return dtype == DType::kFloat16 ? float16 : dtype == DType::kBFloat16 ? bfloat16 : float32;
}

// Whether the device has the shared memory for tiles; a row has the same bits whatever the problem, so only the device,
// the dtype, the channels and the options may decide.
bool forward_in_tiles(const AttentionParams& params, const TilePlan& plan) {
  const auto shared = for_dtype(params.dtype, forward_shared_float32, forward_shared_float16, forward_shared_bfloat16);
  TilePlan widest = plan;
  widest.shape = params.dtype != DType::kFloat32 && plan.channels <= 128 ? TileShape::kWide : TileShape::kNarrow;
  return shared(widest) <= shared_limit();
}

}  // namespace

int64_t launch_attention_forward_scratch(const AttentionParams& params) {
  if (!check(params).ok() || !has_work(params)) return 0;
  const TilePlan plan = forward_plan(params);
  const int64_t splits = forward_in_tiles(params, plan) ? wanted_splits(params, plan) : 1;
  return splits > 1 ? partial_bytes(params, plan, splits) + 8 + list_bytes(plan, splits) : 0;
}

Status launch_attention_forward(const AttentionParams& params, void* scratch, void* stream) {
  const Status status = check(params);
  if (!status.ok() || !has_work(params)) return status;
  TilePlan plan = forward_plan(params);
  if (!forward_in_tiles(params, plan)) return launch_plain_forward(params, stream);
  if (scratch != nullptr) {
    plan.splits = wanted_splits(params, plan);
    plan.partials = static_cast<float*>(scratch);
    if (list_bytes(plan, plan.splits) > 0) {
      const int64_t partials = (partial_bytes(params, plan, plan.splits) + 7) / 8 * 8;
      plan.starts = reinterpret_cast<int64_t*>(static_cast<char*>(scratch) + partials);
    }
  }
  return for_dtype(params.dtype, launch_forward_float32, launch_forward_float16, launch_forward_bfloat16)(params, plan,
                                                                                                          stream);
}

int64_t launch_attention_backward_scratch(const AttentionBackwardParams& params) {
  return table_gradient_scratch(params);
}

Status launch_attention_backward(const AttentionBackwardParams& params, void* scratch, void* stream) {
  const AttentionParams& forward = params.forward;
  Status status = check(forward);
  if (status.ok()) status = launch_delta(params, stream);
  const DType dtype = forward.dtype;
  const TilePlan plan = backward_plan(params);
  const auto shared = for_dtype(dtype, backward_shared_float32, backward_shared_float16, backward_shared_bfloat16);
  const bool in_tiles = shared(plan) <= shared_limit();
  if (status.ok() && has_work(forward)) {
    const auto tiles = for_dtype(dtype, launch_backward_float32, launch_backward_float16, launch_backward_bfloat16);
    status = in_tiles ? tiles(params, plan, stream) : launch_plain_backward(params, stream);
  }
  return status.ok() ? launch_table_gradients(params, in_tiles ? &plan : nullptr, scratch, stream) : status;
}

}  // namespace pycore
