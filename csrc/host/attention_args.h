// SPDX-License-Identifier: Apache-2.0
// What both faces check before an attention kernel sees anything, and the parameters it then gets. Throws
// std::invalid_argument (checks.h). Kernels do not include this.
#pragma once

#include <pycore/attention/attention.h>
#include <pycore/attention/blocks.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "attention_bitmaps_args.h"
#include "checks.h"
#include "index_copies.h"

namespace pycore {

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

namespace detail {

inline void check_4d(const std::string& op, const char* name, const TensorView& view) {
  check_value(view.dims == 4, op, name, " has ", view.dims,
              " dimensions and must have 4: [batch, heads, length, head_dim]");
  check_value(view.strides[3] == 1 || view.shape[3] <= 1 || view.count() == 0, op, name,
              "'s last dimension has stride ", view.strides[3], " and must be contiguous");
}

inline void check_same(const std::string& op, const char* name, const TensorView& view, const TensorView& query) {
  check_value(view.dtype == query.dtype, op, name, " is ", dtype_name(view.dtype), " and must be ",
              dtype_name(query.dtype), " like query");
  check_value(view.device == query.device && view.device_index == query.device_index, op, name,
              " is on another device than query");
}

inline void check_index_tensor(const AttentionArgs& args, const char* name, const TensorView& view) {
  check_value(view.defined() && view.dims == 1 && view.dtype == DType::kInt64, args.op, name,
              " must be an int64 tensor of one dimension");
  check_value(view.strides[0] == 1 || view.shape[0] <= 1, args.op, name, " must be contiguous");
  check_value(view.device == args.query.device && view.device_index == args.query.device_index, args.op, name,
              " is on another device than query");
}

// A power of two, as its exponent. A block of one position stands for a mask of whole blocks (pr_block_mask).
inline int64_t check_block_size(const std::string& op, int64_t block_size, bool one) {
  int64_t shift = 0;
  while (shift < kLargestBlockShift && (int64_t{1} << shift) < block_size) ++shift;
  check_value((int64_t{1} << shift) == block_size && (shift >= 4 || (one && shift == 0)), op, "block_size is ",
              block_size, " and must be a power of two between 16 and 2**", kLargestBlockShift);
  return shift;
}

inline void check_blocks(const AttentionArgs& args, AttentionParams* params) {
  TileSchedule& schedule = params->schedule;
  schedule.block_shift = check_block_size(args.op, args.schedule_args[0], false);
  check_value(args.schedule_args[1] >= 0, args.op, "sink_size is ", args.schedule_args[1], " and must be at least 0");
  check_value(args.schedule_args[2] >= 0, args.op, "window_blocks is ", args.schedule_args[2],
              " and must be at least 0");
  schedule.sink_size = std::min(args.schedule_args[1], kFar);
  schedule.window_blocks = std::min(args.schedule_args[2], kFar);
  schedule.block_rows = touched_blocks(params->query_length, schedule.block_shift);
  schedule.block_words = bitmap_words(params->key_length, schedule.block_shift);
  const TensorView& blocks = args.schedule_tensor;
  const int64_t shape[4] = {params->batch, params->heads, schedule.block_rows, schedule.block_words};
  check_value(blocks.dtype == DType::kInt64 && blocks.dims == 4 && std::equal(shape, shape + 4, blocks.shape), args.op,
              "schedule's tensor is ", dtype_name(blocks.dtype), " ", shape_text(blocks), " and must be int64 [",
              shape[0], ", ", shape[1], ", ", shape[2], ", ", shape[3], "], as attention_blocks draws it");
  check_value(blocks.count() == 0 ||
                  ((shape[3] == 1 || blocks.strides[3] == 1) && (shape[2] == 1 || blocks.strides[2] == shape[3]) &&
                   (shape[1] == 1 || blocks.strides[1] == shape[2] * shape[3]) &&
                   (shape[0] == 1 || blocks.strides[0] == shape[1] * shape[2] * shape[3])),
              args.op, "schedule's tensor must be contiguous");
  check_value(blocks.device == args.query.device && blocks.device_index == args.query.device_index, args.op,
              "schedule's tensor is on another device than query");
  schedule.blocks = reinterpret_cast<const uint64_t*>(args.kept(blocks));
}

// The numbers that lambda and segments share.
inline void check_window(const AttentionArgs& args, int64_t sink_size, int64_t window_size, int64_t right) {
  check_value(sink_size >= 0, args.op, "sink_size is ", sink_size, " and must be at least 0");
  check_value(window_size >= 1, args.op, "window_size is ", window_size, " and must be at least 1");
  check_value(right >= 0, args.op, "right is ", right, " and must be at least 0");
}

// int64 [S + 1] or [1 or batch, S + 1]; each row ascends.
inline void check_segments(const AttentionArgs& args, AttentionParams* params) {
  const TensorView& tensor = args.schedule_tensor;
  const std::vector<int64_t>& numbers = args.schedule_args;
  check_value((tensor.dims == 1 || tensor.dims == 2) && tensor.dtype == DType::kInt64, args.op,
              "boundaries must be an int64 tensor of one or two dimensions, [S + 1] or [batch, S + 1]");
  const int64_t rows = tensor.dims == 2 ? tensor.shape[0] : 1, entries = tensor.shape[tensor.dims - 1];
  check_value(rows == params->batch || rows == 1, args.op, "boundaries has ", rows,
              " rows and must have one, or one for each of ", params->batch, " batch rows");
  check_value(entries >= 1, args.op, "boundaries is empty and must have at least one entry");
  check_value((entries == 1 || tensor.strides[tensor.dims - 1] == 1) && (rows <= 1 || tensor.strides[0] == entries),
              args.op, "boundaries must be contiguous");
  check_value(tensor.device == args.query.device && tensor.device_index == args.query.device_index, args.op,
              "boundaries is on another device than query");
  TileSchedule& schedule = params->schedule;
  schedule.boundaries = args.kept(tensor);
  schedule.segments = entries - 1;
  params->bitmap_stride = rows == 1 ? 0 : entries;
  schedule.right = numbers[0] != 0 ? 0 : kFar;
  if (numbers.size() == 4) {
    check_window(args, numbers[2], numbers[1], numbers[3]);
    check_value(numbers[0] == 0 || numbers[3] == 0, args.op, "right is ", numbers[3],
                " and must be 0 where the schedule is causal");
    schedule.window_size = std::min(numbers[1], kFar);
    schedule.segment_sinks = std::min(numbers[2], kFar);
    schedule.right = std::min(numbers[3], kFar);
  }
  if (args.query.device != Device::kCpu) return;
  for (int64_t b = 0; b < rows; ++b) {
    const std::string row = tensor.dims == 2 ? std::to_string(b) + ", " : "";
    const int64_t* boundaries = schedule.boundaries + b * params->bitmap_stride;
    for (int64_t s = 0; s < schedule.segments; ++s) {
      check_value(boundaries[s] <= boundaries[s + 1], args.op, "boundaries[", row, s + 1, "] is ", boundaries[s + 1],
                  " and must not be less than the one before it, ", boundaries[s]);
    }
  }
}

// Sets params->schedule, and prefix_lengths.
inline void check_schedule(const AttentionArgs& args, AttentionParams* params) {
  struct Kind {
    const char* name;
    ScheduleKind kind;
    size_t numbers, at_most;
    bool tensor;
  };
  constexpr Kind kKinds[] = {
      {"full", ScheduleKind::kFull, 0, 0, false},           {"causal", ScheduleKind::kCausal, 0, 0, false},
      {"lambda", ScheduleKind::kLambda, 2, 3, false},       {"prefix", ScheduleKind::kPrefix, 0, 0, true},
      {"segments", ScheduleKind::kSegments, 1, 4, true},    {"blocks", ScheduleKind::kBlocks, 3, 3, true},
      {"key_subset", ScheduleKind::kKeySubset, 1, 1, true}, {"tree", ScheduleKind::kTree, 0, 2, true}};
  const Kind* found = nullptr;
  for (const Kind& kind : kKinds) {
    if (args.schedule == kind.name) found = &kind;
  }
  check_value(found != nullptr, args.op, "schedule is \"", args.schedule,
              "\" and must be \"full\", \"causal\", \"lambda\", \"prefix\", \"segments\", \"blocks\", \"key_subset\" "
              "or \"tree\"");
  const size_t numbers = args.schedule_args.size();
  check_value(numbers == found->numbers || numbers == found->at_most, args.op, "schedule \"", args.schedule, "\" has ",
              numbers, " numbers and takes ", found->numbers,
              found->at_most > found->numbers ? " or " + std::to_string(found->at_most) : "");
  check_value(args.schedule_tensor.defined() == found->tensor, args.op, "schedule \"", args.schedule, "\" takes ",
              found->tensor ? "one tensor" : "no tensor");
  TileSchedule& schedule = params->schedule;
  schedule.kind = found->kind;
  const TensorView& tensor = args.schedule_tensor;
  const bool readable = args.query.device == Device::kCpu;
  if (found->kind == ScheduleKind::kLambda) {
    const int64_t right = numbers == 3 ? args.schedule_args[2] : 0;
    check_window(args, args.schedule_args[0], args.schedule_args[1], right);
    schedule.sink_size = std::min(args.schedule_args[0], kFar);
    schedule.window_size = std::min(args.schedule_args[1], kFar);
    schedule.right = std::min(right, kFar);
  } else if (found->kind == ScheduleKind::kBlocks) {
    check_blocks(args, params);
  } else if (found->kind == ScheduleKind::kKeySubset) {
    check_key_subset(args.op, tensor, args.query, params);
    schedule.keys = reinterpret_cast<const uint64_t*>(args.kept(tensor));
    schedule.causal = args.schedule_args[0] != 0;
  } else if (found->kind == ScheduleKind::kTree) {
    check_tree_shape(args.op, tensor, args.query, params);
    schedule.tree = args.kept(tensor);
    if (readable) check_tree(args.op, tensor, schedule);
    if (numbers == 2) {
      check_window(args, args.schedule_args[0], args.schedule_args[1], 0);
      schedule.sink_size = std::min(args.schedule_args[0], kFar);
      schedule.window_size = std::min(args.schedule_args[1], kFar);
    }
  } else if (found->kind == ScheduleKind::kPrefix) {
    check_index_tensor(args, "prefix_lengths", tensor);
    check_value(tensor.shape[0] == params->batch, args.op, "prefix_lengths has ", tensor.shape[0],
                " entries and must have one for each of ", params->batch, " batch rows");
    params->prefix_lengths = args.kept(tensor);
    for (int64_t b = 0; b < params->batch && readable; ++b) {
      check_value(params->prefix_lengths[b] >= 0, args.op, "prefix_lengths[", b, "] is ", params->prefix_lengths[b],
                  " and must be at least 0");
    }
  } else if (found->kind == ScheduleKind::kSegments) {
    check_segments(args, params);
  }
}

// A float table [heads] or [heads, n]; with `shared` also [1, n].
inline const void* check_table(const AttentionArgs& args, const AttentionParams& params, const char* name,
                               const TensorView& view, int dims, bool shared = false) {
  if (!view.defined()) return nullptr;
  const DType table = args.query.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  check_value(view.dtype == table, args.op, name, " is ", dtype_name(view.dtype), " and must be ", dtype_name(table));
  check_value(view.dims == dims && (view.shape[0] == params.heads || (shared && view.shape[0] == 1)), args.op, name,
              " has shape ", shape_text(view), " and must be ", dims == 1 ? "[heads]" : "[heads, n]", ", with ",
              params.heads, " heads");
  check_value(dims == 1 || view.shape[1] >= 1, args.op, name, " has no entries and must have at least one a head");
  check_value(view.strides[dims - 1] == 1 || view.shape[dims - 1] <= 1 || view.count() == 0, args.op, name,
              "'s last dimension must be contiguous");
  check_value(view.device == args.query.device && view.device_index == args.query.device_index, args.op, name,
              " is on another device than query");
  return view.data;
}

// Logits are float32, in powers of two, unless query is float64: what is not finite there makes every row NaN.
inline void check_logit_factors(const AttentionArgs& args) {
  if (args.query.dtype == DType::kFloat64) return;
  const float log2e = 1.44269504f, scale = static_cast<float>(args.scale), cap = static_cast<float>(args.softcap);
  check_value(std::isfinite(scale * log2e), args.op, "scale is ", args.scale,
              " and must be at most 2.35e+38 in size, as logits are float32");
  if (!(args.softcap > 0) || !std::isfinite(args.softcap)) return;
  check_value(std::isfinite(cap * log2e), args.op, "softcap is ", args.softcap,
              " and must be at most 2.35e+38, as logits are float32");
  check_value(cap > 0 && std::isfinite(1 / cap), args.op, "softcap is ", args.softcap,
              " and must be 0 or at least 2.94e-39, as logits are float32");
  check_value(std::isfinite(scale * (1 / cap)), args.op, "softcap is ", args.softcap, " and scale is ", args.scale,
              "; scale / softcap must be finite in float32");
}

// A float table [heads], or [1 or batch, heads].
inline void check_slopes(const AttentionArgs& args, AttentionParams* params) {
  const TensorView& slopes = args.alibi_slopes;
  if (!slopes.defined()) return;
  const int last = slopes.dims - 1;
  const bool rows = last == 1;
  check_value((last == 0 || rows) && slopes.shape[last] == params->heads, args.op, "alibi_slopes has shape ",
              shape_text(slopes), " and must be [heads] or [batch, heads], with ", params->heads, " heads");
  check_value(!rows || slopes.shape[0] == 1 || slopes.shape[0] == params->batch, args.op, "alibi_slopes has ",
              slopes.shape[0], " rows and must have one, or one for each of ", params->batch, " batch rows");
  TensorView first = slopes;
  first.dims = 1;
  first.shape[0] = slopes.shape[last];
  first.strides[0] = slopes.strides[last];
  params->alibi_slopes = check_table(args, *params, "alibi_slopes", first, 1);
  params->slopes_stride = rows && slopes.shape[0] > 1 ? slopes.strides[0] : 0;
}

inline void check_options(const AttentionArgs& args, AttentionParams* params) {
  check_value(!(args.distance_bias.defined() && args.alibi_slopes.defined()), args.op,
              "distance_bias and alibi_slopes are both given; only one may be");
  params->distance_bias = check_table(args, *params, "distance_bias", args.distance_bias, 2);
  if (args.distance_bias.defined()) {  // without heads it has no memory, but a length
    params->bias_length = args.distance_bias.shape[1];
    params->bias_stride = args.distance_bias.strides[0];
  }
  check_slopes(args, params);
  params->symmetric_bias = args.symmetric_bias;
  params->sink_logits = check_table(args, *params, "sink_logits", args.sink_logits, 1);
  params->block_bias = check_table(args, *params, "block_bias", args.block_bias, 2, true);
  if (args.block_bias.defined()) {
    check_value(params->schedule.kind == ScheduleKind::kBlocks, args.op, "block_bias comes with schedule \"blocks\"");
    params->block_bias_length = args.block_bias.shape[1];
    params->block_bias_stride = args.block_bias.shape[0] == 1 ? 0 : args.block_bias.strides[0];
  }
  check_value(std::isfinite(args.softcap) && args.softcap >= 0, args.op, "softcap is ", args.softcap,
              " and must be finite and at least 0");
  params->softcap = args.softcap;
  check_value(args.dropout_p >= 0 && args.dropout_p < 1, args.op, "dropout_p is ", args.dropout_p,
              " and must be at least 0 and less than 1");
  params->dropout_p = args.dropout_p;
  if (args.dropout_p == 0) return;
  const TensorView& seed = args.dropout_seed;
  check_value(seed.defined() && seed.dtype == DType::kInt64 && seed.count() == 1, args.op,
              "dropout_seed must be one int64 number");
  check_value(seed.device == args.query.device && seed.device_index == args.query.device_index, args.op,
              "dropout_seed is on another device than query");
  params->dropout_seed = args.kept(seed);
}

inline const int64_t* check_lengths(const AttentionArgs& args, const char* name, const TensorView& view,
                                    int64_t batch) {
  if (!view.defined()) return nullptr;
  check_value(view.dtype == DType::kInt64, args.op, name, " is ", dtype_name(view.dtype), " and must be int64");
  check_value(view.dims == 1 && view.shape[0] == batch, args.op, name, " has shape ", shape_text(view),
              " and must be [batch], here [", batch, "]");
  check_value(view.strides[0] == 1 || batch <= 1, args.op, name, " must be contiguous");
  check_value(view.device == args.query.device && view.device_index == args.query.device_index, args.op, name,
              " is on another device than query");
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
  params->key_ring = args.key_ring;
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
  const DType table = args.query.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  for (const TensorView* view : {&cosine, &sine}) {
    const char* name = view == &cosine ? "rope's cos" : "rope's sin";
    check_value(view->dims == 2, args.op, name, " has ", view->dims, " dimensions and must have 2: [n, R / 2]");
    check_value(view->dtype == table, args.op, name, " is ", dtype_name(view->dtype), " and must be ",
                dtype_name(table));
    check_value(view->strides[1] == 1 || view->shape[1] <= 1 || view->count() == 0, args.op, name,
                "'s last dimension must be contiguous");
    check_value(view->device == args.query.device && view->device_index == args.query.device_index, args.op, name,
                " is on another device than query");
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

// Everything but out and lse, which the face allocates afterwards.
inline AttentionParams attention_params(const AttentionArgs& args) {
  const std::string& op = args.op;
  const TensorView& query = args.query;
  check_value(query.dtype == DType::kFloat32 || query.dtype == DType::kFloat64 || query.dtype == DType::kFloat16 ||
                  query.dtype == DType::kBFloat16,
              op, "query is ", dtype_name(query.dtype), " and must be float32, float16, bfloat16 or float64");
  check_value(query.device != Device::kOther, op, "query must be on the CPU or on a CUDA device");
  detail::check_4d(op, "query", query);
  detail::check_4d(op, "key", args.key);
  detail::check_4d(op, "value", args.value);
  detail::check_same(op, "key", args.key, query);
  detail::check_same(op, "value", args.value, query);

  AttentionParams params;
  params.dtype = query.dtype;
  params.batch = query.shape[0];
  params.heads = query.shape[1];
  params.query_length = query.shape[2];
  params.head_dim = query.shape[3];
  params.kv_heads = args.key.shape[1];
  params.key_length = args.key.shape[2];
  params.value_dim = args.value.shape[3];
  check_value(params.head_dim >= 1, op, "query has head_dim 0 and must have at least 1");
  check_value(args.key.shape[0] == params.batch, op, "key has batch ", args.key.shape[0], " and query has ",
              params.batch, "; they must be equal");
  check_value(args.key.shape[3] == params.head_dim, op, "key has head_dim ", args.key.shape[3], " and query has ",
              params.head_dim, "; they must be equal");
  check_value(params.heads == 0 || (params.kv_heads > 0 && params.heads % params.kv_heads == 0), op, "key has ",
              params.kv_heads, " heads, which does not divide query's ", params.heads);
  for (int i = 0; i < 3; ++i) {
    check_value(args.value.shape[i] == args.key.shape[i], op, "value has shape ", shape_text(args.value),
                " and key has ", shape_text(args.key), "; their first three dimensions must be equal");
  }
  const auto strides = [](const TensorView& view) {
    return AttentionStrides{view.strides[0], view.strides[1], view.strides[2]};
  };
  params.query = query.data;
  params.key = args.key.data;
  params.value = args.value.data;
  params.query_strides = strides(query);
  params.key_strides = strides(args.key);
  params.value_strides = strides(args.value);

  detail::check_schedule(args, &params);
  check_value(std::isfinite(args.scale), op, "scale is ", args.scale, " and must be finite");
  detail::check_logit_factors(args);
  params.scale = args.scale;
  check_value(args.distance_limit >= -1, op, "distance_limit is ", args.distance_limit, " and must be at least 0");
  params.distance_limit = args.distance_limit < 0 ? kFar : std::min(args.distance_limit, kFar);
  const bool windowed = params.schedule.kind == ScheduleKind::kLambda ||
                        (params.schedule.kind == ScheduleKind::kTree && params.schedule.window_size < kFar);
  check_value(!windowed || params.distance_limit >= params.schedule.window_size, op, "distance_limit is ",
              params.distance_limit, " and must be at least window_size, ", params.schedule.window_size);
  const int64_t ahead = params.schedule.ahead();
  check_value(ahead >= kFar || params.distance_limit >= ahead, op, "distance_limit is ", params.distance_limit,
              " and must be at least right, ", ahead);

  params.key_starts = detail::check_lengths(args, "key_starts", args.key_starts, params.batch);
  params.key_lengths = detail::check_lengths(args, "key_lengths", args.key_lengths, params.batch);
  params.key_offset = detail::check_lengths(args, "key_offset", args.key_offset, params.batch);
  params.query_lengths = detail::check_lengths(args, "query_lengths", args.query_lengths, params.batch);
  detail::check_ring(args, &params);
  if (query.device == Device::kCpu) detail::check_length_values(args, params);
  detail::check_rope(args, &params);
  detail::check_options(args, &params);
  if (params.schedule.kind == ScheduleKind::kTree) detail::check_tree_fits(op, query.device, params);
  return params;
}

// Where the second half of a pair of lse begins.
inline void* second_lse(const AttentionParams& params, void* pair) {
  const int64_t rows = params.batch * params.heads * params.query_length;
  return static_cast<char*>(pair) + rows * (params.dtype == DType::kFloat64 ? 8 : 4);
}

// grad_out and grad_lse against what the forward pass returned. lse_low comes behind lse, by itself or not at all.
inline AttentionBackwardParams attention_backward_params(const AttentionArgs& args, const TensorView& grad_out,
                                                         const TensorView& grad_lse, const TensorView& out,
                                                         const TensorView& lse, const TensorView& lse_low = {}) {
  AttentionBackwardParams params;
  params.forward = attention_params(args);
  const AttentionParams& forward = params.forward;
  const std::string& op = args.op;
  const auto check_like_out = [&](const char* name, const TensorView& view, bool contiguous) {
    detail::check_4d(op, name, view);
    detail::check_same(op, name, view, args.query);
    const int64_t shape[4] = {forward.batch, forward.heads, forward.query_length, forward.value_dim};
    check_value(std::equal(shape, shape + 4, view.shape), op, name, " has shape ", shape_text(view),
                " and must have the output's");
    const bool dense = view.count() == 0 || ((shape[2] == 1 || view.strides[2] == shape[3]) &&
                                             (shape[1] == 1 || view.strides[1] == shape[2] * shape[3]) &&
                                             (shape[0] == 1 || view.strides[0] == shape[1] * shape[2] * shape[3]));
    check_value(!contiguous || dense, op, name, " must be contiguous");
  };
  const auto check_like_lse = [&](const char* name, const TensorView& view, bool pair) {
    const int64_t* shape = view.shape + (pair ? 1 : 0);
    check_value(view.dims == (pair ? 4 : 3) && (!pair || view.shape[0] == 2) && shape[0] == forward.batch &&
                    shape[1] == forward.heads && shape[2] == forward.query_length,
                op, name, " has shape ", shape_text(view), " and must be [batch, heads, query length]");
    const DType sum = args.query.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    check_value(view.dtype == sum, op, name, " is ", dtype_name(view.dtype), " and must be ", dtype_name(sum));
    int64_t stride = 1;
    bool dense = true;
    for (int d = view.dims - 1; d >= 0; stride *= view.shape[d--]) {
      dense = dense && (view.shape[d] == 1 || view.strides[d] == stride);
    }
    check_value(view.count() == 0 || dense, op, name, " must be contiguous");
  };
  check_like_out("grad_out", grad_out, false);
  check_like_out("out", out, true);
  const bool pair = lse.dims == 4;
  check_like_lse("lse", lse, pair);
  params.forward.out = out.data;
  params.forward.lse = lse.data;
  if (pair) params.forward.lse_low = second_lse(forward, lse.data);
  if (lse_low.defined()) {
    check_like_lse("lse_low", lse_low, false);
    params.forward.lse_low = lse_low.data;
  }
  params.grad_out = grad_out.data;
  params.grad_out_strides = {grad_out.strides[0], grad_out.strides[1], grad_out.strides[2]};
  if (grad_lse.defined()) {
    check_like_lse("grad_lse", grad_lse, false);
    params.grad_lse = grad_lse.data;
  }
  return params;
}

}  // namespace pycore
