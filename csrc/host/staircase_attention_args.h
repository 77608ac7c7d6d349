// SPDX-License-Identifier: Apache-2.0
// What both faces check before attention on a staircase cache, and the parameters it then gets.
#pragma once

#include <pycore/staircase/attention.h>

#include <algorithm>
#include <string>
#include <vector>

#include "attention_args.h"
#include "staircase_cache_args.h"

namespace pycore {

struct StaircaseAttentionArgs {
  TensorView query;                         // float32 [batch, heads, n, head_dim]
  const TensorView* key_storage = nullptr;  // kStorageTensors of each
  const TensorView* value_storage = nullptr;
  TensorView ends;         // int64 [batch]: tokens that the last query of each row reads
  StaircaseLadder ladder;  // bits: the key's
  std::vector<int64_t> value_bits;
  std::string schedule;  // "causal" or "lambda"
  std::vector<int64_t> schedule_args;
  TensorView distance_bias, sink_logits;  // not defined(): none
  double scale = 1.0, softcap = 0.0;
};

// What the parameters point into; it stays where it is while they are used.
struct StaircaseAttentionMemory {
  AttentionArgs args;
  StaircasePlanes planes;
};

// Everything but out and lse.
inline AttentionParams staircase_attention_params(const StaircaseAttentionArgs& given,
                                                  StaircaseAttentionMemory* memory) {
  constexpr const char* kOp = "staircase_attention";
  check_value(given.ladder.group_size == kPackedGroup, kOp, "group_size is ", given.ladder.group_size, " and must be ",
              kPackedGroup, ", a tile of keys");
  StaircaseLadder value_ladder = given.ladder;
  value_ladder.bits = given.value_bits;
  StaircasePlanes& planes = memory->planes;
  planes.key = staircase_side(kOp, "key_storage", given.key_storage, false, given.ladder);
  planes.value = staircase_side(kOp, "value_storage", given.value_storage, true, value_ladder);
  const TensorView &full = given.key_storage[0], &other = given.value_storage[0];
  check_value(other.dtype == full.dtype && other.shape[0] == full.shape[0] && other.shape[1] == full.shape[1], kOp,
              "value_storage[0] is ", dtype_name(other.dtype), " ", shape_text(other), " and must be ",
              dtype_name(full.dtype), " of ", full.shape[0], " batch rows and ", full.shape[1], " heads");
  planes.dtype = full.dtype;
  planes.kv_heads = full.shape[1];
  planes.sinks = given.ladder.sink_size;
  planes.step = given.ladder.step;
  check_value(given.query.dtype == DType::kFloat32, kOp, "query is ", dtype_name(given.query.dtype),
              " and must be float32");
  check_value(given.schedule == "causal" || given.schedule == "lambda", kOp, "schedule is \"", given.schedule,
              "\" and must be \"causal\" or \"lambda\"");

  AttentionArgs& args = memory->args;
  args.op = kOp;
  args.query = given.query;
  args.key_lengths = given.ends;
  args.schedule = given.schedule;
  args.schedule_args = given.schedule_args;
  args.distance_bias = given.distance_bias;
  args.sink_logits = given.sink_logits;
  args.scale = given.scale;
  args.softcap = given.softcap;
  // Keys and values have no rows of their own, only as many as can be read.
  const int64_t capacity =
      std::min(staircase_capacity(planes.key, planes.sinks), staircase_capacity(planes.value, planes.sinks));
  for (const auto& [view, side] : {std::pair(&args.key, &planes.key), std::pair(&args.value, &planes.value)}) {
    *view = full;
    view->dtype = DType::kFloat32;
    view->shape[2] = capacity;
    view->shape[3] = side->channels;
    view->strides[3] = 1;
  }
  // Queries that read alike.
  const bool begins_full = planes.key.bits[0] == 16 && planes.value.bits[0] == 16;
  const int64_t step = begins_full ? planes.step : kPackedGroup;
  AttentionParams params = attention_params(args);
  params.key = params.value = nullptr;
  params.planes = &planes;
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t end = params.key_lengths[b], first = std::max<int64_t>(end - params.query_length, 0);
    check_value(end == 0 || first / step == (end - 1) / step, kOp, "query has ", params.query_length, " rows and ends[",
                b, "] is ", end, "; they must stand in one step of ", step, " tokens");
  }
  return params;
}

}  // namespace pycore
