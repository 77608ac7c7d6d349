// SPDX-License-Identifier: Apache-2.0
// pycore.native.attention and attention_backward: the kernels for NumPy arrays and DLPack tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pycore/attention_args.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "call.h"
#include "threads.h"

namespace pycore::python {
namespace {

// The arguments both functions share; the arrays keep the memory alive.
struct Inputs {
  std::vector<Array> arrays;
  AttentionArgs args;

  Inputs(const char* op, py::object query, py::object key, py::object value, py::object rope_cos, py::object rope_sin,
         py::object key_starts, py::object key_lengths, py::object key_offset, py::object query_lengths,
         std::string schedule, std::vector<int64_t> schedule_args, bool interleaved,
         std::optional<int64_t> distance_limit, std::optional<double> scale, int64_t stream) {
    args.op = op;
    const auto take = [&](TensorView& view, const py::object& object, const char* name, bool optional) {
      arrays.push_back(optional ? optional_input(object, op, name, stream) : input(object, op, name, stream));
      view = arrays.back().view;
    };
    take(args.query, query, "query", false);
    take(args.key, key, "key", false);
    take(args.value, value, "value", false);
    take(args.rope_cos, rope_cos, "rope's cos", true);
    take(args.rope_sin, rope_sin, "rope's sin", true);
    take(args.key_starts, key_starts, "key_starts", true);
    take(args.key_lengths, key_lengths, "key_lengths", true);
    take(args.key_offset, key_offset, "key_offset", true);
    take(args.query_lengths, query_lengths, "query_lengths", true);
    args.schedule = std::move(schedule);
    args.schedule_args = std::move(schedule_args);
    args.interleaved = interleaved;
    check_value(!distance_limit || *distance_limit >= 0, op, "distance_limit is ", distance_limit.value_or(0),
                " and must be at least 0");
    args.distance_limit = distance_limit.value_or(-1);
    const int64_t head_dim = args.query.dims == 4 ? args.query.shape[3] : 1;
    args.scale = scale.value_or(head_dim > 0 ? 1.0 / std::sqrt(static_cast<double>(head_dim)) : 1.0);
  }
};

py::tuple attention(py::object query, py::object key, py::object value, py::object rope_cos, py::object rope_sin,
                    py::object key_starts, py::object key_lengths, py::object key_offset, py::object query_lengths,
                    std::string schedule, std::vector<int64_t> schedule_args, bool interleaved,
                    std::optional<int64_t> distance_limit, std::optional<double> scale, py::object out, py::object lse,
                    std::optional<int64_t> threads, int64_t stream) {
  constexpr const char* kOp = "attention";
  const Inputs inputs(kOp, query, key, value, rope_cos, rope_sin, key_starts, key_lengths, key_offset, query_lengths,
                      std::move(schedule), std::move(schedule_args), interleaved, distance_limit, scale, stream);
  AttentionParams params = attention_params(inputs.args);
  const Device device = inputs.args.query.device;
  const Array out_array = contiguous_result(
      out, params.dtype, {params.batch, params.heads, params.query_length, params.value_dim}, device, kOp, "out", stream);
  const Array lse_array = contiguous_result(lse, params.dtype, {params.batch, params.heads, params.query_length},
                                            device, kOp, "lse", stream);
  params.out = out_array.view.data;
  params.lse = lse_array.view.data;
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    if (device == Device::kCuda) {
      throw_if(launch_attention_forward(params, reinterpret_cast<void*>(stream)), kOp);
    } else {
      const AlignedScratch scratch(attention_forward_scratch(params, parallel.threads));
      throw_if(attention_forward(params, parallel, scratch.data), kOp);
    }
  }
  return py::make_tuple(out_array.object, lse_array.object);
}

py::tuple attention_backward(py::object grad_out, py::object grad_lse, py::object out, py::object lse, py::object query,
                             py::object key, py::object value, py::object rope_cos, py::object rope_sin,
                             py::object key_starts, py::object key_lengths, py::object key_offset,
                             py::object query_lengths, std::string schedule, std::vector<int64_t> schedule_args,
                             bool interleaved, std::optional<int64_t> distance_limit, std::optional<double> scale,
                             py::object grad_query, py::object grad_key, py::object grad_value,
                             std::optional<int64_t> threads, int64_t stream) {
  constexpr const char* kOp = "attention_backward";
  const Inputs inputs(kOp, query, key, value, rope_cos, rope_sin, key_starts, key_lengths, key_offset, query_lengths,
                      std::move(schedule), std::move(schedule_args), interleaved, distance_limit, scale, stream);
  check_value(inputs.args.query.device == Device::kCpu, kOp,
              "query is on a CUDA device and the backward pass runs on the CPU");
  const Array grad_out_array = input(grad_out, kOp, "grad_out"), out_array = input(out, kOp, "out");
  const Array lse_array = input(lse, kOp, "lse"), grad_lse_array = optional_input(grad_lse, kOp, "grad_lse");
  AttentionBackwardParams params = attention_backward_params(inputs.args, grad_out_array.view, grad_lse_array.view,
                                                             out_array.view, lse_array.view);
  const AttentionParams& shape = params.forward;
  const auto gradient = [&](const py::object& given, int64_t heads, int64_t length, int64_t channels, const char* name) {
    return cpu_result(given, shape.dtype, {shape.batch, heads, length, channels}, kOp, name);
  };
  const Array query_array = gradient(grad_query, shape.heads, shape.query_length, shape.head_dim, "grad_query");
  const Array key_array = gradient(grad_key, shape.kv_heads, shape.key_length, shape.head_dim, "grad_key");
  const Array value_array = gradient(grad_value, shape.kv_heads, shape.key_length, shape.value_dim, "grad_value");
  params.grad_query = query_array.view.data;
  params.grad_key = key_array.view.data;
  params.grad_value = value_array.view.data;
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    const int64_t rows = shape.batch * shape.heads * shape.query_length;
    const AlignedScratch delta(rows * (shape.dtype == DType::kFloat64 ? 8 : 4));
    params.delta = delta.data;
    const AlignedScratch scratch(attention_backward_scratch(params, parallel.threads));
    throw_if(attention_backward(params, parallel, scratch.data), kOp);
  }
  return py::make_tuple(query_array.object, key_array.object, value_array.object);
}

constexpr const char* kAttentionDoc =
    R"(softmax(scale * query key^T, over the keys the schedule keeps) value, for NumPy arrays and DLPack tensors.

query [B, H, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv]; float32 or float64 (CPU), float32 (CUDA); last dimension
contiguous. schedule: "full", "causal" or "lambda" with schedule_args = [sink_size, window_size]. rope_cos and rope_sin
[n, R/2]. The other arguments mean what they mean in pycore.ops.attention, except that distance_limit defaults to none for
every schedule. out and lse are new arrays unless given. threads defaults to all processors; stream is a CUDA stream's
address. Returns (out [B, H, Lq, Dv], lse [B, H, Lq]). Raises ValueError or TypeError in one sentence.)";

constexpr const char* kBackwardDoc =
    R"(Gradients of `attention`: (grad_query, grad_key, grad_value), new arrays unless given. CPU.

grad_out is like out; grad_lse [B, H, Lq] or None; out and lse are what `attention` returned for the same arguments.)";

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention", &attention, kAttentionDoc, py::arg("query"), py::arg("key"), py::arg("value"), py::kw_only(),
        py::arg("rope_cos") = py::none(), py::arg("rope_sin") = py::none(), py::arg("key_starts") = py::none(),
        py::arg("key_lengths") = py::none(), py::arg("key_offset") = py::none(), py::arg("query_lengths") = py::none(),
        py::arg("schedule") = "causal", py::arg("schedule_args") = std::vector<int64_t>(),
        py::arg("interleaved") = false, py::arg("distance_limit") = py::none(), py::arg("scale") = py::none(),
        py::arg("out") = py::none(), py::arg("lse") = py::none(), py::arg("threads") = py::none(),
        py::arg("stream") = 0);
  m.def("attention_backward", &attention_backward, kBackwardDoc, py::arg("grad_out"), py::arg("grad_lse"),
        py::arg("out"), py::arg("lse"), py::arg("query"), py::arg("key"), py::arg("value"), py::kw_only(),
        py::arg("rope_cos") = py::none(), py::arg("rope_sin") = py::none(), py::arg("key_starts") = py::none(),
        py::arg("key_lengths") = py::none(), py::arg("key_offset") = py::none(), py::arg("query_lengths") = py::none(),
        py::arg("schedule") = "causal", py::arg("schedule_args") = std::vector<int64_t>(),
        py::arg("interleaved") = false, py::arg("distance_limit") = py::none(), py::arg("scale") = py::none(),
        py::arg("grad_query") = py::none(), py::arg("grad_key") = py::none(), py::arg("grad_value") = py::none(),
        py::arg("threads") = py::none(), py::arg("stream") = 0);
}

}  // namespace pycore::python
