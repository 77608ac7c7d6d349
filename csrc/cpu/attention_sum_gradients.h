// SPDX-License-Identifier: Apache-2.0
// The gradients of alibi_slopes, scale and softcap: sums over all pairs of a head, or of all heads. A batch row's head
// is one item, whose queries and keys come in order, and the items' sums are added in order: the same bits with any
// number of threads. All in double.
#pragma once

#include <algorithm>

#include "attention_kernels.h"

namespace pycore {

// What a batch row's head sums.
struct HeadSums {
  double slope = 0;
  double numbers[2] = {0, 0};  // scale, softcap
};

inline bool wants_sums(const AttentionBackwardParams& params) { return params.grad_slopes || params.grad_numbers; }

// Bytes for all heads of all batch rows.
inline int64_t sum_gradient_bytes(const AttentionBackwardParams& params) {
  const int64_t bytes = params.forward.batch * params.forward.heads * static_cast<int64_t>(sizeof(HeadSums));
  return wants_sums(params) ? (bytes + 63) / 64 * 64 : 0;
}

// `sums` are sum_gradient_bytes; slot_scratch(slot) is a thread's own scratch.
template <class SlotScratch>
void sum_gradients(const AttentionKernels& kernels, const AttentionBackwardParams& params, const Parallel& parallel,
                   HeadSums* sums, const SlotScratch& slot_scratch) {
  const AttentionParams& forward = params.forward;
  for_each_item(parallel, forward.batch * forward.heads, [&](int64_t slot, int64_t item) {
    HeadSums* const own = new (sums + item) HeadSums;
    QueryTile tile;
    tile.batch = item / forward.heads;
    tile.head = item % forward.heads;
    tile.kv_head = tile.head / (forward.heads / forward.kv_heads);
    BackwardParts parts;
    parts.bias = params.grad_slopes ? &own->slope : nullptr;
    parts.numbers = params.grad_numbers ? own->numbers : nullptr;
    const RowMap map = row_map(forward, tile.batch, tile.head);
    for (tile.first = 0; tile.first < map.queries; tile.first += kernels.backward_rows) {
      tile.count = std::min(kernels.backward_rows, map.queries - tile.first);
      kernels.grad_query(params, map, tile, parts, slot_scratch(slot));
    }
  });
  for (int64_t n = 0; params.grad_slopes && n < params.slope_rows * forward.heads; ++n) {
    double sum = 0;
    for (int64_t item = n; item < forward.batch * forward.heads; item += params.slope_rows * forward.heads) {
      sum += sums[item].slope;
    }
    if (forward.dtype == DType::kFloat64) {
      static_cast<double*>(params.grad_slopes)[n] = sum;
    } else {
      static_cast<float*>(params.grad_slopes)[n] = static_cast<float>(sum);
    }
  }
  for (int which = 0; params.grad_numbers && which < 2; ++which) {
    double sum = 0;
    for (int64_t item = 0; item < forward.batch * forward.heads; ++item) sum += sums[item].numbers[which];
    params.grad_numbers[which] = sum;
  }
}

}  // namespace pycore
