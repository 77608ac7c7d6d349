// SPDX-License-Identifier: Apache-2.0
// The launchers that csrc/cuda/attention.cu chooses among; each takes device pointers and checks nothing.
#pragma once

#include <pycore/attention.h>

#include <cstdint>

namespace pycore {

// A warp a query row: every option, float32, float16 and bfloat16, head_dim and value_dim up to 256.
Status launch_plain_forward(const AttentionParams& params, void* stream);

// delta, grad_query, grad_key and grad_value by warps; the gradients of tables in chunks of rows, summed in order.
int64_t plain_backward_scratch(const AttentionBackwardParams& params);
Status launch_plain_backward(const AttentionBackwardParams& params, void* scratch, void* stream);

// How the tensor-core kernels cut a problem. Nothing here changes a bit of the result.
struct MmaPlan {
  int channels = 0;         // head_dim and value_dim, rounded up to what there is a kernel for
  bool options = false;     // rotation, or logits that are not the score times a positive factor
  bool wide = false;        // 128 query rows a tile instead of 64
  int rows = 0, heads = 1;  // a tile: so many queries of so many heads of a group
  int64_t query_tiles = 0, head_tiles = 0, items = 0;
  int64_t splits = 1;  // blocks for an item: more than one, and each segment it visits is a block of its own
  float* partials = nullptr;
  bool aligned_query = false, aligned_key = false, aligned_value = false;  // rows start at multiples of 16 bytes
  bool pairs_out = false;                                                  // so do pairs of out at 4 bytes

  static int64_t state_floats(const AttentionParams& params) { return 2 + params.value_dim; }
  // Of row r in the n-th segment that an item visits: largest base-2 logit, sum of weights, weighted values.
  PYCORE_HOST_DEVICE inline float* partial(const AttentionParams& params, int64_t item, int64_t n, int r) const {
    return partials + ((item * splits + n) * heads * rows + r) * (2 + params.value_dim);
  }
};

Status launch_mma_float16(const AttentionParams& params, const MmaPlan& plan, void* stream);
Status launch_mma_bfloat16(const AttentionParams& params, const MmaPlan& plan, void* stream);

}  // namespace pycore
