// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.attention and attention_backward: schema, validation, allocation, registration.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../host/attention_args.h"
#include "stream.h"
#include "tensor.h"

namespace pycore {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments that forward and backward share, three times in one order: schema, parameters, names.
#define PYCORE_SCHEMA                                                                                            \
  "Tensor query, Tensor key, Tensor value, Tensor? rope_cos, Tensor? rope_sin, Tensor? distance_bias, "          \
  "Tensor? alibi_slopes, Tensor? sink_logits, Tensor? key_starts, Tensor? key_lengths, Tensor? key_offset, "     \
  "Tensor? query_lengths, Tensor? schedule_tensor, Tensor? dropout_seed, Tensor? block_bias, str op, "           \
  "str schedule, SymInt[] schedule_args, bool interleaved, SymInt distance_limit, float? scale, float softcap, " \
  "float dropout_p, SymInt key_ring=0, bool symmetric_bias=False, Tensor? numbers=None"
#define PYCORE_PARAMETERS                                                                                             \
  Tensor query, Tensor key, Tensor value, OptionalTensor rope_cos, OptionalTensor rope_sin,                           \
      OptionalTensor distance_bias, OptionalTensor alibi_slopes, OptionalTensor sink_logits,                          \
      OptionalTensor key_starts, OptionalTensor key_lengths, OptionalTensor key_offset, OptionalTensor query_lengths, \
      OptionalTensor schedule_tensor, OptionalTensor dropout_seed, OptionalTensor block_bias, Text op, Text schedule, \
      std::vector<int64_t> schedule_args, bool interleaved, int64_t distance_limit, std::optional<double> scale,      \
      double softcap, double dropout_p, int64_t key_ring, bool symmetric_bias, OptionalTensor numbers
#define PYCORE_NAMES                                                                                                  \
  query, key, value, rope_cos, rope_sin, distance_bias, alibi_slopes, sink_logits, key_starts, key_lengths,           \
      key_offset, query_lengths, schedule_tensor, dropout_seed, block_bias, op, schedule, schedule_args, interleaved, \
      distance_limit, scale, softcap, dropout_p, key_ring, symmetric_bias, numbers

// The views borrow from the tensors, which the caller keeps.
AttentionArgs attention_args(PYCORE_PARAMETERS) {
  const char* name = op.c_str();
  AttentionArgs args;
  args.op = op;
  args.query = view(query, name, "query");
  args.key = view(key, name, "key");
  args.value = view(value, name, "value");
  args.rope_cos = view(rope_cos, name, "rope's cos");
  args.rope_sin = view(rope_sin, name, "rope's sin");
  args.distance_bias = view(distance_bias, name, "distance_bias");
  args.alibi_slopes = view(alibi_slopes, name, "alibi_slopes");
  args.sink_logits = view(sink_logits, name, "sink_logits");
  args.key_starts = view(key_starts, name, "key_starts");
  args.key_lengths = view(key_lengths, name, "key_lengths");
  args.key_offset = view(key_offset, name, "key_offset");
  args.query_lengths = view(query_lengths, name, "query_lengths");
  args.schedule_tensor = view(schedule_tensor, name, "schedule's tensor");
  args.dropout_seed = view(dropout_seed, name, "dropout_seed");
  args.block_bias = view(block_bias, name, "block_bias");
  args.schedule = schedule;
  args.schedule_args = schedule_args;
  args.interleaved = interleaved;
  args.distance_limit = distance_limit;
  args.key_ring = key_ring;
  const double* given =
      graph_numbers(numbers, 3, name, "numbers");  // scale (if it is not left to us), softcap, dropout_p
  const int64_t head_dim = args.query.dims == 4 ? std::max<int64_t>(1, args.query.shape[3]) : 1;
  args.scale = !scale ? std::pow(static_cast<double>(head_dim), -0.5) : given ? given[0] : *scale;
  args.softcap = given ? given[1] : softcap;
  args.dropout_p = given ? given[2] : dropout_p;
  args.symmetric_bias = symmetric_bias;
  return args;
}

// What the kernels read row by row keeps its strides; tables and lists of lengths are copied where they have gaps.
struct Argument {
  const char* name;
  OptionalTensor* tensor;
};

void arrange(const std::string& op, Tensor* query, Tensor* key, Tensor* value, OptionalTensor* cosine,
             OptionalTensor* sine, std::initializer_list<Argument> tables) {
  *query = last_contiguous(*query, op, "query");
  *key = last_contiguous(*key, op, "key");
  *value = last_contiguous(*value, op, "value");
  for (const Argument& table : tables) {
    if (*table.tensor) *table.tensor = dense(**table.tensor, op, table.name);
  }
  if (!*cosine || !*sine) return;
  *cosine = last_contiguous(**cosine, op, "rope's cos");
  *sine = last_contiguous(**sine, op, "rope's sin");
  const bool shared = (*cosine)->dim() != 2 || (*sine)->dim() != 2 || (*cosine)->stride(0) == (*sine)->stride(0);
  if (shared) return;  // one stride serves both
  *cosine = dense(**cosine, op, "rope's cos");
  *sine = dense(**sine, op, "rope's sin");
}
#define PYCORE_ARRANGE                                    \
  arrange(op, &query, &key, &value, &rope_cos, &rope_sin, \
          {{"distance_bias", &distance_bias},             \
           {"alibi_slopes", &alibi_slopes},               \
           {"sink_logits", &sink_logits},                 \
           {"key_starts", &key_starts},                   \
           {"key_lengths", &key_lengths},                 \
           {"key_offset", &key_offset},                   \
           {"query_lengths", &query_lengths},             \
           {"schedule's tensor", &schedule_tensor},       \
           {"block_bias", &block_bias}})

ScalarType sum_type(const AttentionParams& params) {
  return params.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// With lse_pair, lse is [2, batch, heads, query length]: rounded, and what that left out.
std::tuple<Tensor, Tensor> forward(PYCORE_PARAMETERS, bool lse_pair, Text key_layout) {
  PYCORE_ARRANGE;
  const FixedFloats fixed;  // for the default scale, the checks and the launches
  AttentionArgs args = attention_args(PYCORE_NAMES);
  args.key_layout = key_layout;
  AttentionParams params = attention_params(args);
  Tensor out = new_tensor(op, "out", query, {params.batch, params.heads, params.query_length, params.value_dim},
                          query.scalar_type());
  std::vector<int64_t> lse_shape = {params.batch, params.heads, params.query_length};
  if (lse_pair) lse_shape.insert(lse_shape.begin(), 2);
  Tensor lse = new_tensor(op, "lse", query, lse_shape, sum_type(params));
  params.out = out.data_ptr();
  params.lse = lse.data_ptr();
  if (lse_pair) params.lse_low = second_lse(params, lse.data_ptr());
  if (args.query.device == Device::kCuda) {
    const torch::stable::accelerator::DeviceGuard guard(args.query.device_index);
    const Scratch scratch(op, query, launch_attention_forward_scratch(params));
    throw_if(launch_attention_forward(params, scratch.data, current_cuda_stream(args.query.device_index, op.c_str())),
             op.c_str());
  } else {
    const Parallel parallel = torch_parallel();
    const Scratch scratch(op, query, attention_forward_scratch(params, parallel.threads));
    throw_if(attention_forward(params, parallel, scratch.data), op.c_str());
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_out, OptionalTensor grad_lse,
                                                                            Tensor out, Tensor lse, bool bias_gradient,
                                                                            bool sink_gradient, PYCORE_PARAMETERS,
                                                                            bool slopes_gradient,
                                                                            bool numbers_gradient) {
  PYCORE_ARRANGE;
  const FixedFloats fixed;  // for the default scale, the checks and the launches
  grad_out = last_contiguous(grad_out, op, "grad_out");
  if (grad_lse) grad_lse = dense(*grad_lse, op, "grad_lse");
  const AttentionArgs args = attention_args(PYCORE_NAMES);
  const char* name = op.c_str();
  AttentionBackwardParams params =
      attention_backward_params(args, view(grad_out, name, "grad_out"), view(grad_lse, name, "grad_lse"),
                                view(out, name, "out"), view(lse, name, "lse"));
  const AttentionParams& shape = params.forward;
  check_value(!bias_gradient || args.distance_bias.defined(), op, "distance_bias has no gradient where there is none");
  check_value(!sink_gradient || args.sink_logits.defined(), op, "sink_logits has no gradient where there is none");
  check_value(!slopes_gradient || args.alibi_slopes.defined(), op, "alibi_slopes has no gradient where there is none");
  const auto empty = [&](const char* gradient, const std::vector<int64_t>& sizes) {
    return new_tensor(op, gradient, query, sizes, sum_type(shape));
  };
  Tensor grad_query = empty("grad_query", {shape.batch, shape.heads, shape.query_length, shape.head_dim});
  Tensor grad_key = empty("grad_key", {shape.batch, shape.kv_heads, shape.key_length, shape.head_dim});
  Tensor grad_value = empty("grad_value", {shape.batch, shape.kv_heads, shape.key_length, shape.value_dim});
  Tensor grad_bias =
      empty("grad_distance_bias", {bias_gradient ? shape.heads : 0, bias_gradient ? shape.bias_length : 0});
  Tensor grad_sink = empty("grad_sink_logits", {sink_gradient ? shape.heads : 0});
  std::vector<int64_t> slopes_shape = {0};
  if (slopes_gradient) {
    const TensorView& slopes = args.alibi_slopes;
    slopes_shape.assign(slopes.shape, slopes.shape + slopes.dims);
    params.slope_rows = slopes.dims == 2 ? slopes.shape[0] : 1;
  }
  Tensor grad_slopes = empty("grad_alibi_slopes", slopes_shape);
  // Like `numbers`: of scale, softcap and dropout_p, which has none.
  Tensor grad_numbers = new_tensor(op, "grad_numbers", query, {numbers_gradient ? 3 : 0}, ScalarType::Double);
  if (numbers_gradient) torch::stable::zero_(grad_numbers);
  Tensor delta = empty("delta", {shape.batch, shape.heads, shape.query_length});
  params.grad_query = grad_query.data_ptr();
  params.grad_key = grad_key.data_ptr();
  params.grad_value = grad_value.data_ptr();
  params.grad_bias = bias_gradient ? grad_bias.data_ptr() : nullptr;
  params.grad_sink_logits = sink_gradient ? grad_sink.data_ptr() : nullptr;
  params.grad_slopes = slopes_gradient ? grad_slopes.data_ptr() : nullptr;
  params.grad_numbers = numbers_gradient ? static_cast<double*>(grad_numbers.data_ptr()) : nullptr;
  params.delta = delta.data_ptr();
  if (args.query.device == Device::kCuda) {
    const torch::stable::accelerator::DeviceGuard guard(args.query.device_index);
    const Scratch scratch(op, query, launch_attention_backward_scratch(params));
    throw_if(launch_attention_backward(params, scratch.data, current_cuda_stream(args.query.device_index, name)), name);
  } else {
    const Parallel parallel = torch_parallel();
    const Scratch scratch(op, query, attention_backward_scratch(params, parallel.threads));
    throw_if(attention_backward(params, parallel, scratch.data), name);
  }
  return {grad_query, grad_key, grad_value, grad_bias, grad_sink, grad_slopes, grad_numbers};
}

}  // namespace
}  // namespace pycore

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  m.def("attention(" PYCORE_SCHEMA ", bool lse_pair=False, str key_layout=\"rows\") -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool bias_gradient, "
      "bool sink_gradient, " PYCORE_SCHEMA
      ", bool slopes_gradient=False, bool numbers_gradient=False) -> (Tensor grad_query, Tensor grad_key, "
      "Tensor grad_value, Tensor grad_bias, Tensor grad_sink_logits, Tensor grad_slopes, Tensor grad_numbers)");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) {
  m.impl("attention", TORCH_BOX(&pycore::forward));
  m.impl("attention_backward", TORCH_BOX(&pycore::backward));
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CUDA, m) {
  m.impl("attention", TORCH_BOX(&pycore::forward));
  m.impl("attention_backward", TORCH_BOX(&pycore::backward));
}
