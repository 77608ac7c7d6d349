// SPDX-License-Identifier: Apache-2.0
// What an attention op was called with, as both faces hand it to the checks.
#pragma once

#include <pycore/attention/attention.h>

#include <string>
#include <vector>

#include "checks.h"
#include "index_copies.h"

namespace pycore {

// Of lse, tables and gradients.
inline DType sum_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

struct AttentionArgs {
  std::string op;  // the public function called; it opens every message
  TensorView query, key, value;
  TensorView rope_cos, rope_sin;                                  // not defined(): no rotation
  TensorView key_starts, key_lengths, key_offset, query_lengths;  // not defined(): defaults
  TensorView distance_bias, alibi_slopes, sink_logits;            // not defined(): none
  TensorView dropout_seed;                                        // int64, one number; read if dropout_p > 0
  TensorView block_bias;                                          // not defined(): none
  std::string schedule;  // "full", "causal", "lambda", "prefix", "segments", "blocks", "key_subset" or "tree"
  // lambda: sink_size, window_size and, if not 0, right; segments: 1 if causal and, if there is a window, window_size,
  // sink_size, right; key_subset: 1 if causal; blocks: block_size, sink_size, window_blocks
  std::vector<int64_t> schedule_args;
  TensorView schedule_tensor;  // prefix: lengths [batch]; segments: boundaries [S + 1] or [1 or batch, S + 1]; blocks,
                               // key_subset: the bitmap; tree: its nodes
  bool interleaved = false;
  int64_t distance_limit = -1;  // -1: none
  int64_t key_ring = 0;
  std::string key_layout = "rows";  // or "tiles": key is [batch, kv_heads, tiles, head_dim, 64]
  double scale = 1.0;
  double softcap = 0.0;
  double dropout_p = 0.0;
  bool symmetric_bias = false;
  mutable IndexCopies copies;  // what was checked of the arrays of indices, and is then used

  // A contiguous int64 array as kernels get it: on the CPU, where its values are checked, a copy.
  const int64_t* kept(const TensorView& view) const {
    return view.device == Device::kCpu ? copies.keep(op, view.as<const int64_t>(), view.count())
                                       : view.as<const int64_t>();
  }
};

}  // namespace pycore
