// SPDX-License-Identifier: Apache-2.0
// The launchers that csrc/cuda/attention/dispatch.cu chooses among; each takes device pointers and checks nothing.
#pragma once

#include <pycore/attention/attention.h>

#include <cstdint>

namespace pycore {

// A warp a query row: every option and dtype, head_dim and value_dim up to 256, on devices of little shared memory.
Status launch_plain_forward(const AttentionParams& params, void* stream);
// grad_query, grad_key and grad_value by warps, after delta; grad_key and grad_value are zeros.
Status launch_plain_backward(const AttentionBackwardParams& params, void* stream);

// Warps of a block, and blocks of 16 rows that each has: 128 rows; 64 in pairs, which read shared memory half as often;
// or 64 that leave registers for wide rows and options.
enum class TileShape { kWide, kPaired, kNarrow };

// How the kernels that work in tiles cut a problem. Nothing here changes a bit of the result.
struct TilePlan {
  int channels = 0;      // head_dim and value_dim, rounded up to what there is a kernel for
  bool options = false;  // rotation, or logits that are not the score times a positive factor
  TileShape shape = TileShape::kNarrow;
  int rows = 0, heads = 1;  // a tile: so many queries of so many heads of a group
  int64_t query_tiles = 0, head_tiles = 0, items = 0;
  int64_t splits = 1;  // blocks for an item: more than one, and each segment it visits is a block of its own
  float* partials = nullptr;
  int64_t* starts = nullptr;  // [items, splits], where each segment begins, or null: each block looks for itself
  bool aligned_query = false, aligned_key = false, aligned_value = false;  // rows start at multiples of 16 bytes
  bool aligned_grad_out = false;
  bool pairs_out = false;  // pairs of out start at multiples of their size

  // Of row r in the n-th segment that an item visits: largest base-2 logit, sum of weights, weighted values.
  PYCORE_HOST_DEVICE inline float* partial(const AttentionParams& params, int64_t item, int64_t n, int r) const {
    return partials + ((item * splits + n) * heads * rows + r) * (2 + params.value_dim);
  }
};

// What the gradients begin with: delta, and zeros. And the gradients of tables, summed in chunks of rows, in order:
// with a plan, distance_bias's by the kernels below.
Status launch_delta(const AttentionBackwardParams& params, void* stream);
int64_t table_gradient_scratch(const AttentionBackwardParams& params);
Status launch_table_gradients(const AttentionBackwardParams& params, const TilePlan* plan, void* scratch, void* stream);

// The kernels of a dtype, and the shared memory that they ask for.
#define PYCORE_TILE_KERNELS(dtype)                                                                           \
  Status launch_forward_##dtype(const AttentionParams& params, const TilePlan& plan, void* stream);          \
  int64_t forward_shared_##dtype(const TilePlan& plan);                                                      \
  /* grad_query, grad_key and grad_value, after delta; grad_key and grad_value are zeros. */                 \
  Status launch_backward_##dtype(const AttentionBackwardParams& params, const TilePlan& plan, void* stream); \
  Status launch_bias_##dtype(const AttentionBackwardParams& params, const TilePlan& plan, double* sums,      \
                             int64_t chunks, void* stream);                                                  \
  int64_t backward_shared_##dtype(const TilePlan& plan);
PYCORE_TILE_KERNELS(float32)
PYCORE_TILE_KERNELS(float16)
PYCORE_TILE_KERNELS(bfloat16)
#undef PYCORE_TILE_KERNELS

}  // namespace pycore
