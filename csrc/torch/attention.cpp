// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.attention and attention_backward: schema, validation, allocation, registration.
#include "stream.h"
#include "tensor.h"

#include <pycore/attention_args.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace pycore {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The arguments shared by forward and backward, in schema order.
#define PYCORE_ATTENTION_SCHEMA                                                                                   \
  "Tensor query, Tensor key, Tensor value, Tensor? rope_cos, Tensor? rope_sin, Tensor? key_starts, "              \
  "Tensor? key_lengths, Tensor? key_offset, Tensor? query_lengths, str op, str schedule, SymInt[] schedule_args, " \
  "bool interleaved, SymInt distance_limit, float scale"

Tensor last_contiguous(const Tensor& x) {
  return x.dim() == 0 || x.size(-1) <= 1 || x.stride(-1) == 1 ? x : torch::stable::contiguous(x);
}

struct Inputs {
  Tensor query, key, value;
  std::optional<Tensor> rope_cos, rope_sin, key_starts, key_lengths, key_offset, query_lengths;

  AttentionArgs args(const std::string& op, const std::string& schedule, const std::vector<int64_t>& schedule_args,
                     bool interleaved, int64_t distance_limit, double scale) const {
    const char* name = op.c_str();
    AttentionArgs args;
    args.op = op;
    args.query = view(query, name, "query");
    args.key = view(key, name, "key");
    args.value = view(value, name, "value");
    args.rope_cos = view(rope_cos, name, "rope's cos");
    args.rope_sin = view(rope_sin, name, "rope's sin");
    args.key_starts = view(key_starts, name, "key_starts");
    args.key_lengths = view(key_lengths, name, "key_lengths");
    args.key_offset = view(key_offset, name, "key_offset");
    args.query_lengths = view(query_lengths, name, "query_lengths");
    args.schedule = schedule;
    args.schedule_args = schedule_args;
    args.interleaved = interleaved;
    args.distance_limit = distance_limit;
    args.scale = scale;
    return args;
  }
};

// Scratch from torch's allocator, so that its memory accounting sees it.
struct Scratch {
  Tensor memory;
  void* data;
  Scratch(const Tensor& like, int64_t bytes) : memory(torch::stable::new_empty(like, {bytes + 64}, ScalarType::Byte)) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data_ptr());
    data = reinterpret_cast<void*>((address + 63) / 64 * 64);
  }
};

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, std::optional<Tensor> rope_cos,
                                   std::optional<Tensor> rope_sin, std::optional<Tensor> key_starts,
                                   std::optional<Tensor> key_lengths, std::optional<Tensor> key_offset,
                                   std::optional<Tensor> query_lengths, std::string op, std::string schedule,
                                   std::vector<int64_t> schedule_args, bool interleaved, int64_t distance_limit,
                                   double scale) {
  const Inputs inputs = {last_contiguous(query), last_contiguous(key), last_contiguous(value), rope_cos, rope_sin,
                         key_starts, key_lengths, key_offset, query_lengths};
  const AttentionArgs args = inputs.args(op, schedule, schedule_args, interleaved, distance_limit, scale);
  AttentionParams params = attention_params(args);
  Tensor out = torch::stable::new_empty(query, {params.batch, params.heads, params.query_length, params.value_dim});
  Tensor lse = torch::stable::new_empty(query, {params.batch, params.heads, params.query_length},
                                        params.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
  params.out = out.data_ptr();
  params.lse = lse.data_ptr();
  if (args.query.device == Device::kCuda) {
    const torch::stable::accelerator::DeviceGuard guard(args.query.device_index);
    throw_if(launch_attention_forward(params, current_cuda_stream(args.query.device_index, op.c_str())), op.c_str());
  } else {
    const Parallel parallel = torch_parallel();
    const Scratch scratch(query, attention_forward_scratch(params, parallel.threads));
    throw_if(attention_forward(params, parallel, scratch.data), op.c_str());
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor out, Tensor lse,
                                            Tensor query, Tensor key, Tensor value, std::optional<Tensor> rope_cos,
                                            std::optional<Tensor> rope_sin, std::optional<Tensor> key_starts,
                                            std::optional<Tensor> key_lengths, std::optional<Tensor> key_offset,
                                            std::optional<Tensor> query_lengths, std::string op, std::string schedule,
                                            std::vector<int64_t> schedule_args, bool interleaved,
                                            int64_t distance_limit, double scale) {
  const Inputs inputs = {last_contiguous(query), last_contiguous(key), last_contiguous(value), rope_cos, rope_sin,
                         key_starts, key_lengths, key_offset, query_lengths};
  const AttentionArgs args = inputs.args(op, schedule, schedule_args, interleaved, distance_limit, scale);
  const Tensor grad = last_contiguous(grad_out);
  if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);
  const char* name = op.c_str();
  AttentionBackwardParams params =
      attention_backward_params(args, view(grad, name, "grad_out"), view(grad_lse, name, "grad_lse"),
                                view(out, name, "out"), view(lse, name, "lse"));
  const AttentionParams& shape = params.forward;
  Tensor grad_query =
      torch::stable::new_empty(query, {shape.batch, shape.heads, shape.query_length, shape.head_dim});
  Tensor grad_key = torch::stable::new_empty(key, {shape.batch, shape.kv_heads, shape.key_length, shape.head_dim});
  Tensor grad_value =
      torch::stable::new_empty(value, {shape.batch, shape.kv_heads, shape.key_length, shape.value_dim});
  Tensor delta = torch::stable::new_empty(lse, {shape.batch, shape.heads, shape.query_length});
  params.grad_query = grad_query.data_ptr();
  params.grad_key = grad_key.data_ptr();
  params.grad_value = grad_value.data_ptr();
  params.delta = delta.data_ptr();
  check_value(args.query.device == Device::kCpu, op, "query is on a CUDA device and the backward pass runs on the CPU");
  const Parallel parallel = torch_parallel();
  const Scratch scratch(query, attention_backward_scratch(params, parallel.threads));
  throw_if(attention_backward(params, parallel, scratch.data), name);
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace pycore

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  m.def("attention(" PYCORE_ATTENTION_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def("attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, " PYCORE_ATTENTION_SCHEMA
        ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) {
  m.impl("attention", TORCH_BOX(&pycore::forward));
  m.impl("attention_backward", TORCH_BOX(&pycore::backward));
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CUDA, m) {
  m.impl("attention", TORCH_BOX(&pycore::forward));
  m.impl("attention_backward", TORCH_BOX(&pycore::backward));
}
