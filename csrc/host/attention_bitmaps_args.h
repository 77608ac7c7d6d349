// SPDX-License-Identifier: Apache-2.0
// What both faces check of the tensors of the key_subset and tree schedules, as attention_args.h does of all others.
#pragma once

#include <pycore/attention/attention.h>
#include <pycore/tensor_view.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "checks.h"

namespace pycore {
namespace detail {

// A contiguous int64 tensor [1 or batch, ...] on query's device; sets bitmap_stride. `what` it is of, in messages.
inline void check_bitmap(const std::string& op, const char* what, const TensorView& tensor, const TensorView& query,
                         AttentionParams* params) {
  check_value(tensor.dtype == DType::kInt64, op, "schedule's tensor is ", dtype_name(tensor.dtype),
              " and must be int64");
  check_value(tensor.shape[0] == 1 || tensor.shape[0] == params->batch, op, what, " has ", tensor.shape[0],
              " rows and must have one, or one for each of ", params->batch, " batch rows");
  check_contiguous(op, "schedule's tensor", tensor);
  check_device_of(op, what, tensor, query, "query");
  params->bitmap_stride = tensor.shape[0] <= 1 ? 0 : tensor.count() / tensor.shape[0];
}

// [1 or batch, words]: bit j % 64 of word j / 64 says whether the key at position j takes part. The caller sets
// schedule.keys.
inline void check_key_subset(const std::string& op, const TensorView& tensor, const TensorView& query,
                             AttentionParams* params) {
  check_value(tensor.dims == 2, op, "schedule's tensor has ", tensor.dims,
              " dimensions and must have 2: [1 or batch, words of 64 positions]");
  check_bitmap(op, "keys", tensor, query, params);
  params->schedule.key_words = tensor.shape[1];
}

// [1 or batch, nodes, 2 + words]: of each node its parent (-1: none), its depth, and a bit for each of its ancestors
// and itself. The caller sets schedule.tree.
inline void check_tree_shape(const std::string& op, const TensorView& tensor, const TensorView& query,
                             AttentionParams* params) {
  check_value(tensor.dims == 3, op, "schedule's tensor has ", tensor.dims,
              " dimensions and must have 3: [1 or batch, nodes, 2 + words of 64 nodes]");
  TileSchedule& schedule = params->schedule;
  schedule.tree_nodes = tensor.shape[1];
  schedule.tree_words = (tensor.shape[1] + 63) / 64;
  check_value(tensor.shape[2] == 2 + schedule.tree_words, op, "schedule's tensor has shape ", shape_text(tensor),
              " and must be [1 or batch, ", schedule.tree_nodes, ", ", 2 + schedule.tree_words, "]");
  check_bitmap(op, "parents", tensor, query, params);
}

// The rest follows from the parents, and kernels rely on it; values are read on the CPU alone.
inline void check_tree(const std::string& op, const TensorView& tensor, const TileSchedule& schedule) {
  const int64_t row = 2 + schedule.tree_words;
  for (int64_t b = 0; b < tensor.shape[0]; ++b) {
    const int64_t* nodes = schedule.tree + b * schedule.tree_nodes * row;
    for (int64_t t = 0; t < schedule.tree_nodes; ++t) {
      const int64_t* node = nodes + t * row;
      const int64_t parent = node[0];
      check_value(parent >= -1 && parent < t, op, "parents[", b, ", ", t, "] is ", parent,
                  " and must be at least -1 and less than ", t);
      const int64_t* above = parent < 0 ? nullptr : nodes + parent * row;
      bool same = node[1] == (above ? above[1] + 1 : 0);
      for (int64_t word = 0; word < schedule.tree_words; ++word) {
        const uint64_t own = t / 64 == word ? uint64_t{1} << (t % 64) : 0;
        same = same &&
               static_cast<uint64_t>(node[2 + word]) == ((above ? static_cast<uint64_t>(above[2 + word]) : 0) | own);
      }
      check_value(same, op, "schedule's tensor has, at node ", t, " of row ", b,
                  ", another depth or other ancestors than its parents give");
    }
  }
}

// The tree is the last of each batch row's keys.
inline void check_tree_fits(const std::string& op, Device device, const AttentionParams& params) {
  if (device != Device::kCpu) return;
  const bool given = params.key_starts || params.key_lengths || params.key_offset || params.query_lengths;
  for (int64_t b = 0; b < (given ? params.batch : std::min<int64_t>(params.batch, 1)); ++b) {
    const RowMap map = row_map(params, b);
    check_value(map.queries == 0 || map.keys >= params.schedule.tree_nodes, op, "parents has ",
                params.schedule.tree_nodes, " nodes and batch row ", b, " has ", map.keys,
                " keys; the nodes must be the last of them");
  }
}

}  // namespace detail
}  // namespace pycore
