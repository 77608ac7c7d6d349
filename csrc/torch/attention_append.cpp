// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.attention_append: a cache takes new tokens, and their queries are attended to, in one call: a step
// of decoding is short enough for a second one to count. What either refuses is refused before anything is written.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../host/attention_append_args.h"
#include "tensor.h"

namespace pycore {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> append_and_attend(
    Tensor query, Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor lengths, OptionalTensor starts,
    OptionalTensor rope_cos, OptionalTensor rope_sin, OptionalTensor distance_bias, OptionalTensor alibi_slopes,
    OptionalTensor sink_logits, Text append_op, Text op, Text schedule, std::vector<int64_t> schedule_args,
    bool interleaved, int64_t distance_limit, std::optional<double> scale, double softcap, int64_t sink_size,
    int64_t key_ring, int64_t most, OptionalTensor numbers) {
  const FixedFloats fixed;  // for the default scale and the checks
  const char* const first = append_op.c_str();
  const char* const second = op.c_str();
  key = last_contiguous(key, append_op, "key");
  value = last_contiguous(value, append_op, "value");
  query = last_contiguous(query, op, "query");
  if (starts) starts = dense(*starts, append_op, "starts");
  CacheAppendArgs appended;
  appended.op = append_op;
  appended.key_cache = view(key_cache, first, "key_cache");
  appended.value_cache = view(value_cache, first, "value_cache");
  appended.lengths = view(lengths, first, "lengths");
  appended.key = view(key, first, "key");
  appended.value = view(value, first, "value");
  appended.starts = view(starts, first, "starts");
  appended.sink_size = sink_size;
  appended.most = most;

  AttentionArgs args;
  args.op = op;
  args.query = view(query, second, "query");
  for (OptionalTensor* table : {&distance_bias, &alibi_slopes, &sink_logits}) {
    if (*table) *table = dense(**table, op, "a table");
  }
  for (OptionalTensor* table : {&rope_cos, &rope_sin}) {
    if (*table) *table = dense(**table, op, "rope");
  }
  args.rope_cos = view(rope_cos, second, "rope's cos");
  args.rope_sin = view(rope_sin, second, "rope's sin");
  args.distance_bias = view(distance_bias, second, "distance_bias");
  args.alibi_slopes = view(alibi_slopes, second, "alibi_slopes");
  args.sink_logits = view(sink_logits, second, "sink_logits");
  args.schedule = schedule;
  args.schedule_args = schedule_args;
  args.interleaved = interleaved;
  args.distance_limit = distance_limit;
  args.key_ring = key_ring;
  const double* given = graph_numbers(numbers, 2, second, "numbers");  // scale (if it is not left to us), softcap
  const int64_t head_dim = args.query.dims == 4 ? std::max<int64_t>(1, args.query.shape[3]) : 1;
  args.scale = !scale ? std::pow(static_cast<double>(head_dim), -0.5) : given ? given[0] : *scale;
  args.softcap = given ? given[1] : softcap;
  AppendAndAttend all = append_and_attend_params(appended, &args);
  AttentionParams& params = all.attend;

  const Parallel parallel = torch_parallel();
  const ScalarType sum = params.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor out = new_tensor(op, "out", query, {params.batch, params.heads, params.query_length, params.value_dim},
                          query.scalar_type());
  Tensor lse = new_tensor(op, "lse", query, {params.batch, params.heads, params.query_length}, sum);
  const Scratch scratch(op, query, attention_forward_scratch(params, parallel.threads));
  params.out = out.data_ptr();
  params.lse = lse.data_ptr();
  throw_if(lambda_cache_append(all.append, parallel), first);
  throw_if(attention_forward(params, parallel, scratch.data), second);
  return {out, lse};
}

}  // namespace
}  // namespace pycore

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  m.def(
      "attention_append(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor(c!) lengths, Tensor? starts, Tensor? rope_cos, Tensor? rope_sin, Tensor? distance_bias, "
      "Tensor? alibi_slopes, Tensor? sink_logits, str append_op, str op, str schedule, SymInt[] schedule_args, "
      "bool interleaved, SymInt distance_limit, float? scale, float softcap, SymInt sink_size, SymInt key_ring=0, "
      "SymInt most=-1, Tensor? numbers=None) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) { m.impl("attention_append", TORCH_BOX(&pycore::append_and_attend)); }
