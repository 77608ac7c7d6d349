// SPDX-License-Identifier: Apache-2.0
// What both faces check before an attention kernel sees anything, and the parameters it then gets. Throws
// std::invalid_argument (checks.h). Kernels do not include this.
#pragma once

#include <pycore/attention/attention.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "attention_arguments.h"
#include "attention_options_args.h"
#include "attention_positions_args.h"
#include "attention_schedule_args.h"

namespace pycore {

namespace detail {

inline void check_4d(const std::string& op, const char* name, const TensorView& view) {
  check_value(view.dims == 4, op, name, " has ", view.dims,
              " dimensions and must have 4: [batch, heads, length, head_dim]");
  check_value(view.last_contiguous(), op, name, "'s last dimension has stride ", view.strides[3],
              " and must be contiguous");
}

// The shape and strides of key, in either layout. Value has the length of both.
inline void check_key(const AttentionArgs& args, AttentionParams* params) {
  const std::string& op = args.op;
  const TensorView& key = args.key;
  const bool tiles = args.key_layout == "tiles";
  check_value(tiles || args.key_layout == "rows", op, "key_layout is \"", args.key_layout,
              "\" and must be \"rows\" or \"tiles\"");
  if (!tiles) {
    check_4d(op, "key", key);
  } else {
    check_value(key.dims == 5, op, "key has ", key.dims,
                " dimensions and must have 5: [batch, kv_heads, tiles, head_dim, 64]");
    check_last_contiguous(op, "key", key);
    check_value(args.query.device == Device::kCpu, op, "key_layout is \"tiles\" and must be \"rows\" on a CUDA device");
  }
  check_4d(op, "value", args.value);
  check_like(op, "key", key, args.query, "query");
  check_like(op, "value", args.value, args.query, "query");
  params->kv_heads = key.shape[1];
  params->key_length = tiles ? args.value.shape[2] : key.shape[2];
  params->value_dim = args.value.shape[3];
  check_value(key.shape[0] == params->batch, op, "key has batch ", key.shape[0], " and query has ", params->batch,
              "; they must be equal");
  check_value(key.shape[3] == params->head_dim, op, "key has head_dim ", key.shape[3], " and query has ",
              params->head_dim, "; they must be equal");
  check_value(params->heads == 0 || (params->kv_heads > 0 && params->heads % params->kv_heads == 0), op, "key has ",
              params->kv_heads, " heads, which does not divide query's ", params->heads);
  for (int i = 0; i < (tiles ? 2 : 3); ++i) {
    check_value(args.value.shape[i] == key.shape[i], op, "value has shape ", shape_text(args.value), " and key has ",
                shape_text(key), "; their first ", tiles ? "two" : "three", " dimensions must be equal");
  }
  params->key_strides = {key.strides[0], key.strides[1], key.strides[2]};
  if (!tiles) return;
  const int64_t needed = (params->key_length + kKeyTile - 1) / kKeyTile;
  check_value(key.shape[4] == kKeyTile && key.shape[2] == needed, op, "key has shape ", shape_text(key),
              " and must have ", needed, " tiles of ", kKeyTile, " for value's length ", params->key_length);
  // A dimension of one has any stride, and zero would say that keys lie in rows.
  params->key_channel_stride = params->head_dim == 1 ? kKeyTile : key.strides[3];
  check_value(params->key_channel_stride > 0, op, "key's channels have stride ", key.strides[3],
              " and must have a positive one");
  check_tiles_in_place(args);
}

}  // namespace detail

// Everything but out and lse, which the face allocates afterwards.
inline AttentionParams attention_params(const AttentionArgs& args) {
  const std::string& op = args.op;
  const TensorView& query = args.query;
  check_value(is_floating(query.dtype), op, "query is ", dtype_name(query.dtype),
              " and must be float32, float16, bfloat16 or float64");
  check_value(query.device != Device::kOther, op, "query must be on the CPU or on a CUDA device");
  detail::check_4d(op, "query", query);
  AttentionParams params;
  params.dtype = query.dtype;
  params.batch = query.shape[0];
  params.heads = query.shape[1];
  params.query_length = query.shape[2];
  params.head_dim = query.shape[3];
  check_value(params.head_dim >= 1, op, "query has head_dim 0 and must have at least 1");
  detail::check_key(args, &params);
  const auto strides = [](const TensorView& view) {
    return AttentionStrides{view.strides[0], view.strides[1], view.strides[2]};
  };
  params.query = query.data;
  params.key = args.key.data;
  params.value = args.value.data;
  params.query_strides = strides(query);
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
    check_like(op, name, view, args.query, "query");
    const int64_t shape[4] = {forward.batch, forward.heads, forward.query_length, forward.value_dim};
    check_value(std::equal(shape, shape + 4, view.shape), op, name, " has shape ", shape_text(view),
                " and must have the output's");
    if (contiguous) check_contiguous(op, name, view);
  };
  const auto check_like_lse = [&](const char* name, const TensorView& view, bool pair) {
    const int64_t* shape = view.shape + (pair ? 1 : 0);
    check_value(view.dims == (pair ? 4 : 3) && (!pair || view.shape[0] == 2) && shape[0] == forward.batch &&
                    shape[1] == forward.heads && shape[2] == forward.query_length,
                op, name, " has shape ", shape_text(view), " and must be [batch, heads, query length]");
    const DType sum = sum_dtype(args.query.dtype);
    check_value(view.dtype == sum, op, name, " is ", dtype_name(view.dtype), " and must be ", dtype_name(sum));
    check_contiguous(op, name, view);
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
