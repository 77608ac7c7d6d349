// SPDX-License-Identifier: Apache-2.0
// What both faces check of biases, sinks, softcap and dropout.
#pragma once

#include <pycore/attention/attention.h>

#include <cmath>
#include <string>

#include "attention_arguments.h"

namespace pycore {
namespace detail {

// A float table [heads] or [heads, n]; with `shared` also [1, n].
inline const void* check_table(const AttentionArgs& args, const AttentionParams& params, const char* name,
                               const TensorView& view, int dims, bool shared = false) {
  if (!view.defined()) return nullptr;
  const DType table = sum_dtype(args.query.dtype);
  check_value(view.dtype == table, args.op, name, " is ", dtype_name(view.dtype), " and must be ", dtype_name(table));
  check_value(view.dims == dims && (view.shape[0] == params.heads || (shared && view.shape[0] == 1)), args.op, name,
              " has shape ", shape_text(view), " and must be ", dims == 1 ? "[heads]" : "[heads, n]", ", with ",
              params.heads, " heads");
  check_value(dims == 1 || view.shape[1] >= 1, args.op, name, " has no entries and must have at least one a head");
  check_last_contiguous(args.op, name, view);
  check_device_of(args.op, name, view, args.query, "query");
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
  check_device_of(args.op, "dropout_seed", seed, args.query, "query");
  params->dropout_seed = args.kept(seed);
}

}  // namespace detail
}  // namespace pycore
