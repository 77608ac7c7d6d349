// SPDX-License-Identifier: Apache-2.0
// What both faces check of lengths, the ring of a cache, and the tables of rotary embedding: what says where rows
// stand.
#pragma once

#include <pycore/attention/attention.h>

#include <algorithm>
#include <string>

#include "attention_arguments.h"

namespace pycore {
namespace detail {

inline const int64_t* check_lengths(const AttentionArgs& args, const char* name, const TensorView& view,
                                    int64_t batch) {
  if (!view.defined()) return nullptr;
  check_value(view.dtype == DType::kInt64, args.op, name, " is ", dtype_name(view.dtype), " and must be int64");
  check_value(view.dims == 1 && view.shape[0] == batch, args.op, name, " has shape ", shape_text(view),
              " and must be [batch], here [", batch, "]");
  check_contiguous(args.op, name, view);
  check_device_of(args.op, name, view, args.query, "query");
  return args.kept(view);
}

inline void check_ring(const AttentionArgs& args, AttentionParams* params) {
  if (args.key_ring == 0) return;
  check_value(args.key_ring > 0 && args.key_ring % kKeyTile == 0, args.op, "key_ring is ", args.key_ring,
              " and must be a multiple of ", kKeyTile);
  check_value(params->schedule.kind == ScheduleKind::kLambda || params->schedule.kind == ScheduleKind::kTree, args.op,
              "key_ring is given with schedule \"", args.schedule, "\" and must come with \"lambda\" or \"tree\"");
  check_value(args.key_ring <= params->key_length && params->schedule.sink_size <= params->key_length - args.key_ring,
              args.op, "key has length ", params->key_length, " and must have room for a ring of ", args.key_ring,
              " and ", params->schedule.sink_size, " sinks");
  check_value(args.key_lengths.defined() && !args.key_starts.defined() && !args.key_offset.defined(), args.op,
              "key_ring comes with key_lengths, and without key_starts and key_offset");
  check_value(params->key_channel_stride == 0 || (params->key_length - args.key_ring) % kKeyTile == 0, args.op,
              "key has length ", params->key_length, " and must have a multiple of ", kKeyTile,
              " rows before a ring of tiles");
  params->key_ring = args.key_ring;
}

// Tiles of rows are tiles of positions.
inline void check_tiles_in_place(const AttentionArgs& args) {
  const struct {
    const char* name;
    const TensorView& view;
  } all[] = {{"key_starts", args.key_starts}, {"key_offset", args.key_offset}};
  for (const auto& [name, view] : all) {
    check_value(!view.defined(), args.op, name, " is given with key_layout \"tiles\" and must come with \"rows\"");
  }
}

// Batch rows to look at: without lengths all are alike, and an expanded batch may have more than can be counted.
inline int64_t distinct_rows(const AttentionParams& params) {
  const bool given = params.key_starts || params.key_lengths || params.key_offset || params.query_lengths;
  return given ? params.batch : std::min<int64_t>(params.batch, 1);
}

// Values of the length arguments; on the CPU, where reading them costs nothing.
inline void check_length_values(const AttentionArgs& args, const AttentionParams& params) {
  for (int64_t b = 0; b < distinct_rows(params); ++b) {
    const int64_t start = params.key_starts ? params.key_starts[b] : 0;
    const int64_t end = params.key_lengths ? params.key_lengths[b] : params.key_length;
    const int64_t offset = params.key_offset ? params.key_offset[b] : 0;
    const int64_t queries = params.query_lengths ? params.query_lengths[b] : params.query_length;
    if (params.key_ring > 0) {
      check_value(end >= 0 && end < kFar, args.op, "key_lengths[", b, "] is ", end, " and must be between 0 and ",
                  kFar - 1);
      // The first node of a tree sees as far back as the query of its position, though not itself a query.
      const int64_t windows = std::max(queries, params.schedule.tree_nodes);
      check_value(row_map(params, b).offset == 0 || params.schedule.window_size <= params.key_ring - windows + 1,
                  args.op, "key_ring is ", params.key_ring, " and must hold the windows of ", windows,
                  " queries, each of ", params.schedule.window_size);
    } else {
      check_value(end >= 0 && end <= params.key_length, args.op, "key_lengths[", b, "] is ", end,
                  " and must be between 0 and key's length, ", params.key_length);
    }
    check_value(start >= 0 && start <= end, args.op, "key_starts[", b, "] is ", start,
                " and must be between 0 and key_lengths[", b, "], ", end);
    check_value(offset >= 0 && offset < kFar, args.op, "key_offset[", b, "] is ", offset, " and must be between 0 and ",
                kFar - 1);
    check_value(queries >= 0 && queries <= params.query_length, args.op, "query_lengths[", b, "] is ", queries,
                " and must be between 0 and query's length, ", params.query_length);
  }
}

inline void check_rope(const AttentionArgs& args, AttentionParams* params) {
  const TensorView& cosine = args.rope_cos;
  const TensorView& sine = args.rope_sin;
  check_value(cosine.defined() == sine.defined(), args.op, "rope must hold both tables, cos and sin");
  if (!cosine.defined()) return;
  const DType table = sum_dtype(args.query.dtype);
  for (const TensorView* view : {&cosine, &sine}) {
    const char* name = view == &cosine ? "rope's cos" : "rope's sin";
    check_value(view->dims == 2, args.op, name, " has ", view->dims, " dimensions and must have 2: [n, R / 2]");
    check_value(view->dtype == table, args.op, name, " is ", dtype_name(view->dtype), " and must be ",
                dtype_name(table));
    check_last_contiguous(args.op, name, *view);
    check_device_of(args.op, name, *view, args.query, "query");
  }
  check_value(cosine.shape[0] == sine.shape[0] && cosine.shape[1] == sine.shape[1] &&
                  (cosine.strides[0] == sine.strides[0] || cosine.shape[0] <= 1 || cosine.count() == 0),
              args.op, "rope's cos has shape ", shape_text(cosine), " and sin ", shape_text(sine),
              "; both must have the same shape and strides");
  check_value(2 * cosine.shape[1] <= params->head_dim, args.op, "rope rotates ", 2 * cosine.shape[1],
              " channels and must rotate at most head_dim, ", params->head_dim);
  params->rope_cos = cosine.data;
  params->rope_sin = sine.data;
  params->rope_rows = cosine.shape[0];
  params->rope_dim = 2 * cosine.shape[1];
  params->rope_stride = cosine.strides[0];
  params->rope_interleaved = args.interleaved;

  int64_t positions = 0;
  if (args.query.device == Device::kCpu) {
    for (int64_t b = 0; b < distinct_rows(*params); ++b)
      positions = std::max(positions, row_map(*params, b).positions());
  } else if (!params->key_offset && params->key_ring == 0) {
    positions = params->key_length;
  }
  if (params->batch * params->heads * params->query_length == 0) return;
  // A node of a tree may stand before its key tile, by as much as the tree has nodes.
  const int64_t reach = std::max(params->distance_limit + kKeyTile, params->schedule.tree_nodes);
  // Without a causal bound a query may also stand before its keys, at any distance or within a window.
  const int64_t ahead = params->schedule.ahead();
  const int64_t needed = std::max(positions, params->query_length);
  if (ahead > 0 && (ahead >= kFar || needed <= reach)) {
    check_value(params->rope_rows >= needed, args.op, "rope has ", params->rope_rows, " rows and must have ", needed,
                ", one for every distance up to ", needed - 1);
  } else if (ahead == 0 && positions <= reach) {
    check_value(params->rope_rows >= positions, args.op, "rope has ", params->rope_rows, " rows and must have ",
                positions, ", one for every distance up to ", positions - 1);
  } else if (reach > params->distance_limit + kKeyTile) {
    check_value(params->rope_rows >= reach, args.op, "rope has ", params->rope_rows, " rows and must have ", reach,
                ", one for every node of parents");
  } else {
    check_value(params->rope_rows >= params->distance_limit + kKeyTile, args.op, "rope has ", params->rope_rows,
                " rows and must have ", params->distance_limit + kKeyTile, ": distance_limit, ", params->distance_limit,
                ", and a tile of ", kKeyTile);
  }
}

}  // namespace detail
}  // namespace pycore
