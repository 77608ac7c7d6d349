// SPDX-License-Identifier: Apache-2.0
// What both faces check of a schedule: its name, numbers and tensor.
#pragma once

#include <pycore/attention/attention.h>
#include <pycore/attention/blocks.h>

#include <algorithm>
#include <string>
#include <vector>

#include "attention_arguments.h"
#include "attention_bitmaps_args.h"

namespace pycore {
namespace detail {

inline void check_index_tensor(const AttentionArgs& args, const char* name, const TensorView& view) {
  check_value(view.defined() && view.dims == 1 && view.dtype == DType::kInt64, args.op, name,
              " must be an int64 tensor of one dimension");
  check_contiguous(args.op, name, view);
  check_device_of(args.op, name, view, args.query, "query");
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
  check_contiguous(args.op, "schedule's tensor", blocks);
  check_device_of(args.op, "schedule's tensor", blocks, args.query, "query");
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
  check_contiguous(args.op, "boundaries", tensor);
  check_device_of(args.op, "boundaries", tensor, args.query, "query");
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

}  // namespace detail
}  // namespace pycore
