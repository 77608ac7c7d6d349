// SPDX-License-Identifier: Apache-2.0
// What dispatch.cpp asks of an instruction set: one tile of work at a time.
#pragma once

#include <pycore/attention/rows.h>
#include <pycore/dtype.h>
#include <pycore/key_tile.h>
#include <pycore/portable_math.h>
#include <pycore/staircase/attention.h>

#include <cstdint>

#include "../staircase/tile.h"

namespace pycore {

// Rows of queries computed together: `count` consecutive query rows of each of `heads` heads that share a key head.
struct QueryTile {
  int64_t batch = 0;
  int64_t kv_head = 0;
  int64_t head = 0;  // the first of `heads` consecutive query heads
  int64_t heads = 1;
  int64_t first = 0;  // query row
  int64_t count = 0;

  int64_t rows() const { return heads * count; }
};

struct SegmentRange {
  int64_t first = 0, last = INT64_MAX;
};

// What the vector kernels take for forward_rows and backward_rows.
inline constexpr int64_t kForwardRows = 192, kBackwardRows = 64;

// Sums over the keys of one query, of which the gradients of scale, softcap and a slope are made. Of each, x is the
// logit's derivative, p a weight and g the gradient of a weight, <grad_out, v> as dropout leaves it.
struct RowSums {
  double weight = 0, grad = 0;  // sum p, sum p g
  struct Derivative {
    double grad = 0, mean = 0;  // sum p g x, sum p x
    void add(double weight, double weighted_grad, double x) {
      grad += weighted_grad * x;
      mean += weight * x;
    }
  };
  Derivative scale, softcap, slope;
};

// Which gradients a backward call is to produce.
struct BackwardParts {
  bool query = false;
  bool key_value = false;
  double* bias = nullptr;   // the head's row of sums, [bias_length]: one chain of floats over all pairs would not do
  RowSums* rows = nullptr;  // of the tile's queries
};

struct AttentionKernels {
  int64_t forward_rows;                                       // most rows a QueryTile may have in the forward pass
  int64_t backward_rows;                                      // most query rows (of one head) in a backward step
  int64_t (*forward_scratch)(const AttentionParams& params);  // bytes a thread
  // One tile over its segments first..last-1 in order, and then its rows' results; or, with `partial`, only the state
  // of the rows after these segments, forward_partial(params, rows) bytes.
  void (*forward)(const AttentionParams& params, const RowMap& map, const QueryTile& tile, SegmentRange segments,
                  void* scratch, void* partial);
  // The rows' results from `count` such states, of one segment each, in order and `stride` bytes apart. Null: tiles are
  // never split.
  void (*forward_merge)(const AttentionParams& params, const QueryTile& tile, const void* partials, int64_t stride,
                        int64_t count, void* scratch);
  int64_t (*forward_partial)(const AttentionParams& params, int64_t rows);
  int64_t (*backward_scratch)(const AttentionBackwardParams& params);
  // Rows first..first+count-1 of a head: delta = sum(grad_out * out) - grad_lse.
  void (*delta)(const AttentionBackwardParams& params, int64_t batch, int64_t head, int64_t first, int64_t count,
                void* scratch);
  // One tile of one head over all its key tiles in order: adds to grad_query, parts.rows and parts.bias (the head's
  // tiles must then come in order, from one thread).
  void (*grad_query)(const AttentionBackwardParams& params, const RowMap& map, const QueryTile& tile,
                     BackwardParts parts, void* scratch);
  // grad_key and grad_value of one key tile, over the group's heads and their queries in order; with parts.query
  // it adds this key tile's share to grad_query as well (key tiles must then come in order, from one thread).
  void (*grad_key_value)(const AttentionBackwardParams& params, const RowMap& map, int64_t batch, int64_t kv_head,
                         int64_t key_tile, BackwardParts parts, void* scratch);
};

namespace scalar {
extern const AttentionKernels attention_float;
extern const AttentionKernels attention_double;
}  // namespace scalar
namespace avx2 {
extern const AttentionKernels attention_float;
}
namespace avx512 {
extern const AttentionKernels attention_float;
}

}  // namespace pycore
