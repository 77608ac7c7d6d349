// SPDX-License-Identifier: Apache-2.0
// The gradients of alibi_slopes, scale and softcap: sums over all pairs of a head, or of all heads, of p (g - delta) x.
// In most of them large numbers cancel: where a key has all the weight, g - delta is 0, and x as large as it likes. So
// delta is not that of the other gradients, which knows the rounded out and weights that add up to nearly 1, but is
// taken from the very sums it is to cancel: sum p g over sum p, a query at a time.
//
// A batch row's head is one item, whose queries and keys come in order, and the items' sums are added in order: the
// same bits with any number of threads. All in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"

namespace pycore {

// What a batch row's head sums.
struct HeadSums {
  double scale = 0, softcap = 0, slope = 0;
};

inline bool wants_sums(const AttentionBackwardParams& params) { return params.grad_slopes || params.grad_numbers; }

// Bytes for all heads of all batch rows.
inline int64_t sum_gradient_bytes(const AttentionBackwardParams& params) {
  const int64_t bytes = params.forward.batch * params.forward.heads * static_cast<int64_t>(sizeof(HeadSums));
  return wants_sums(params) ? (bytes + 63) / 64 * 64 : 0;
}

// A query's sums join its head's. `index` is its number among all.
template <class T>
void close_row(const AttentionBackwardParams& params, int64_t h, int64_t index, const RowSums& row, HeadSums* sums) {
  const AttentionParams& forward = params.forward;
  const double lse = static_cast<const T*>(forward.lse)[index], low = static_cast<const T*>(forward.lse_low)[index];
  if (lse == -std::numeric_limits<double>::infinity()) return;
  double all = row.weight;
  if (forward.sink_logits)
    all += portable_exp(static_cast<double>(static_cast<const T*>(forward.sink_logits)[h]) - lse - low);
  const double delta = row.grad / all - (params.grad_lse ? static_cast<const T*>(params.grad_lse)[index] : T(0));
  sums->scale += (row.scale.grad - delta * row.scale.mean) / all;
  sums->softcap += (row.softcap.grad - delta * row.softcap.mean) / all;
  sums->slope += (row.slope.grad - delta * row.slope.mean) / all;
}

// `sums` are sum_gradient_bytes; slot_scratch(slot) is a thread's own scratch.
template <class T, class SlotScratch>
void sum_gradients(const AttentionKernels& kernels, const AttentionBackwardParams& params, const Parallel& parallel,
                   HeadSums* sums, const SlotScratch& slot_scratch) {
  const AttentionParams& forward = params.forward;
  const int64_t items = forward.batch * forward.heads;
  for_each_item(parallel, items, [&](int64_t slot, int64_t item) {
    HeadSums own;
    QueryTile tile;
    tile.batch = item / forward.heads;
    tile.head = item % forward.heads;
    tile.kv_head = tile.head / (forward.heads / forward.kv_heads);
    const RowMap map = row_map(forward, tile.batch, tile.head);
    for (tile.first = 0; tile.first < map.queries; tile.first += kernels.backward_rows) {
      tile.count = std::min(kernels.backward_rows, map.queries - tile.first);
      RowSums rows[kBackwardRows];
      BackwardParts parts;
      parts.rows = rows;
      kernels.grad_query(params, map, tile, parts, slot_scratch(slot));
      for (int64_t r = 0; r < tile.count; ++r) {
        close_row<T>(params, tile.head, item * forward.query_length + tile.first + r, rows[r], &own);
      }
    }
    sums[item] = own;
  });
  const int64_t slopes = params.slope_rows * forward.heads;
  for (int64_t n = 0; params.grad_slopes && n < slopes; ++n) {
    double sum = 0;
    for (int64_t item = n; item < items; item += slopes) sum += sums[item].slope;
    static_cast<T*>(params.grad_slopes)[n] = static_cast<T>(sum);
  }
  if (params.grad_numbers) {
    double scale = 0, softcap = 0;
    for (int64_t item = 0; item < items; ++item) {
      scale += sums[item].scale;
      softcap += sums[item].softcap;
    }
    params.grad_numbers[0] = scale;
    params.grad_numbers[1] = softcap;
  }
}

}  // namespace pycore
