// SPDX-License-Identifier: Apache-2.0
// pycore.native.{invariant_linear, invariant_linears, rms_norm, layer_norm, silu_mul, gelu_mul} and their gradients:
// the kernels for NumPy arrays and DLPack tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "../host/linear_args.h"
#include "arrays.h"
#include "bindings.h"
#include "call.h"
#include "threads.h"

namespace pycore::python {
namespace {

std::vector<int64_t> shape_of(const TensorView& view) { return {view.shape, view.shape + view.dims}; }

// A gradient that is not wanted is None.
struct Gradient {
  Gradient(bool wanted, const py::object& out, DType dtype, const std::vector<int64_t>& shape, const char* op,
           const char* argument) {
    if (wanted) array = cpu_result(out, dtype, shape, op, argument);
  }
  void* data() const { return array ? array->view.data : nullptr; }
  const TensorView& view() const {
    static const TensorView none;
    return array ? array->view : none;
  }
  py::object object() const { return array ? array->object : py::none(); }
  std::optional<Array> array;
};

py::object invariant_linear(py::object x, py::object weight, py::object bias, py::object out, py::object threads) {
  constexpr const char* kOp = "invariant_linear";
  const Array x_array = input(x, kOp, "x"), weight_array = input(weight, kOp, "weight");
  const Array bias_array = optional_input(bias, kOp, "bias");
  check_linear(kOp, x_array.view, weight_array.view, bias_array.view);
  LinearParams params = linear_params(x_array.view, weight_array.view, bias_array.view);
  std::vector<int64_t> shape = shape_of(x_array.view);
  shape.back() = params.out_features;
  const Array out_array = cpu_result(out, params.dtype, shape, kOp, "out");
  check_disjoint(kOp, {{"out", out_array.view}},
                 {{"x", x_array.view}, {"weight", weight_array.view}, {"bias", bias_array.view}});
  params.out = out_array.view.data;
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    const AlignedScratch scratch(kOp, linear_forward_scratch(params, parallel.threads));
    throw_if(linear_forward(&params, 1, parallel, scratch.data), kOp);
  }
  return out_array.object;
}

py::object invariant_linears(py::object x, py::sequence weights, py::object biases, py::object out,
                             py::object threads) {
  constexpr const char* kOp = "invariant_linears";
  const Array x_array = input(x, kOp, "x");
  std::vector<Array> arrays;  // which the views are of
  std::vector<NamedView> inputs = {{"x", x_array.view}};
  const auto take = [&](const char* name, const py::sequence& given) {
    std::vector<TensorView> views;
    for (const py::handle& each : given) {
      arrays.push_back(input(each, kOp, name));
      views.push_back(arrays.back().view);
      inputs.push_back({name, views.back()});
    }
    return views;
  };
  const std::vector<TensorView> weight_views = take("weight", weights);
  std::vector<TensorView> bias_views;
  if (!biases.is_none()) {
    if (!py::isinstance<py::sequence>(biases)) {
      throw py::type_error("invariant_linears: biases must be a sequence of arrays or None");
    }
    bias_views = take("bias", py::sequence(biases));
    check_value(!bias_views.empty() || weight_views.empty(), kOp,
                "biases has 0 tensors and must have one for each of the ", weight_views.size(), " weights, or be None");
  }
  check_linears(kOp, x_array.view, weight_views, bias_views);
  std::vector<LinearParams> layers = linears_params(x_array.view, weight_views, bias_views);
  std::vector<int64_t> shape = shape_of(x_array.view);
  shape.back() = columns_of(layers);
  const Array out_array = cpu_result(out, layers[0].dtype, shape, kOp, "out");
  check_disjoint(kOp, std::vector<NamedView>{{"out", out_array.view}}, inputs);
  place_side_by_side(&layers, shape.back(), out_array.view.data);
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    const AlignedScratch scratch(kOp, linear_forward_scratch(layers[0], parallel.threads));
    throw_if(linear_forward(layers.data(), static_cast<int64_t>(layers.size()), parallel, scratch.data), kOp);
  }
  return out_array.object;
}

py::tuple invariant_linear_backward(py::object grad_out, py::object x, py::object weight, bool need_x, bool need_weight,
                                    bool need_bias, py::object grad_x, py::object grad_weight, py::object grad_bias,
                                    py::object threads) {
  constexpr const char* kOp = "invariant_linear_backward";
  const Array grad_array = input(grad_out, kOp, "grad_out"), x_array = input(x, kOp, "x");
  const Array weight_array = input(weight, kOp, "weight");
  check_linear(kOp, x_array.view, weight_array.view, TensorView{});
  check_grad_out(kOp, grad_array.view, x_array.view, weight_array.view.shape[0]);
  LinearBackwardParams params = linear_backward_params(grad_array.view, x_array.view, weight_array.view);
  const Gradient of_x(need_x, grad_x, params.dtype, shape_of(x_array.view), kOp, "grad_x");
  const Gradient of_weight(need_weight, grad_weight, params.dtype, shape_of(weight_array.view), kOp, "grad_weight");
  const Gradient of_bias(need_bias, grad_bias, params.dtype, {params.out_features}, kOp, "grad_bias");
  check_disjoint(kOp, {{"grad_x", of_x.view()}, {"grad_weight", of_weight.view()}, {"grad_bias", of_bias.view()}},
                 {{"grad_out", grad_array.view}, {"x", x_array.view}, {"weight", weight_array.view}});
  params.grad_x = of_x.data();
  params.grad_weight = of_weight.data();
  params.grad_bias = of_bias.data();
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    const AlignedScratch scratch(kOp, linear_backward_scratch(params, parallel.threads));
    throw_if(linear_backward(params, parallel, scratch.data), kOp);
  }
  return py::make_tuple(of_x.object(), of_weight.object(), of_bias.object());
}

py::object rms_norm(py::object x, py::object weight, double eps, bool plus_one, py::object out, py::object threads) {
  constexpr const char* kOp = "rms_norm";
  const Array x_array = input(x, kOp, "x"), weight_array = optional_input(weight, kOp, "weight");
  check_rms_norm(kOp, x_array.view, weight_array.view, eps);
  RmsNormParams params = rms_norm_params(x_array.view, weight_array.view, eps, plus_one);
  const Array out_array = cpu_result(out, params.dtype, shape_of(x_array.view), kOp, "out");
  check_disjoint(kOp, {{"out", out_array.view}}, {{"x", x_array.view}, {"weight", weight_array.view}});
  params.out = out_array.view.data;
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    throw_if(rms_norm_forward(params, parallel), kOp);
  }
  return out_array.object;
}

py::tuple rms_norm_backward(py::object grad_out, py::object x, py::object weight, double eps, bool plus_one,
                            bool need_x, bool need_weight, py::object grad_x, py::object grad_weight,
                            py::object threads) {
  constexpr const char* kOp = "rms_norm_backward";
  const Array grad_array = input(grad_out, kOp, "grad_out"), x_array = input(x, kOp, "x");
  const Array weight_array = optional_input(weight, kOp, "weight");
  check_rms_norm(kOp, x_array.view, weight_array.view, eps);
  check_grad_out(kOp, grad_array.view, x_array.view, x_array.view.shape[x_array.view.dims - 1]);
  RmsNormBackwardParams params =
      rms_norm_backward_params(grad_array.view, x_array.view, weight_array.view, eps, plus_one);
  const Gradient of_x(need_x, grad_x, params.dtype, shape_of(x_array.view), kOp, "grad_x");
  const Gradient of_weight(need_weight, grad_weight, params.dtype, {params.channels}, kOp, "grad_weight");
  check_disjoint(kOp, {{"grad_x", of_x.view()}, {"grad_weight", of_weight.view()}},
                 {{"grad_out", grad_array.view}, {"x", x_array.view}, {"weight", weight_array.view}});
  params.grad_x = of_x.data();
  params.grad_weight = of_weight.data();
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    const AlignedScratch scratch(kOp, rms_norm_backward_scratch(params, parallel.threads));
    throw_if(rms_norm_backward(params, parallel, scratch.data), kOp);
  }
  return py::make_tuple(of_x.object(), of_weight.object());
}

py::object layer_norm(py::object x, py::object weight, py::object bias, double eps, py::object out,
                      py::object threads) {
  constexpr const char* kOp = "layer_norm";
  const Array x_array = input(x, kOp, "x"), weight_array = optional_input(weight, kOp, "weight");
  const Array bias_array = optional_input(bias, kOp, "bias");
  check_norm(kOp, x_array.view, weight_array.view, bias_array.view, eps);
  LayerNormParams params = layer_norm_params(x_array.view, weight_array.view, bias_array.view, eps);
  const Array out_array = cpu_result(out, params.dtype, shape_of(x_array.view), kOp, "out");
  check_disjoint(kOp, {{"out", out_array.view}},
                 {{"x", x_array.view}, {"weight", weight_array.view}, {"bias", bias_array.view}});
  params.out = out_array.view.data;
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    throw_if(layer_norm_forward(params, parallel), kOp);
  }
  return out_array.object;
}

py::tuple layer_norm_backward(py::object grad_out, py::object x, py::object weight, double eps, bool need_x,
                              bool need_weight, bool need_bias, py::object grad_x, py::object grad_weight,
                              py::object grad_bias, py::object threads) {
  constexpr const char* kOp = "layer_norm_backward";
  const Array grad_array = input(grad_out, kOp, "grad_out"), x_array = input(x, kOp, "x");
  const Array weight_array = optional_input(weight, kOp, "weight");
  check_norm(kOp, x_array.view, weight_array.view, TensorView{}, eps);
  check_grad_out(kOp, grad_array.view, x_array.view, x_array.view.shape[x_array.view.dims - 1]);
  LayerNormBackwardParams params = layer_norm_backward_params(grad_array.view, x_array.view, weight_array.view, eps);
  const Gradient of_x(need_x, grad_x, params.dtype, shape_of(x_array.view), kOp, "grad_x");
  const Gradient of_weight(need_weight, grad_weight, params.dtype, {params.channels}, kOp, "grad_weight");
  const Gradient of_bias(need_bias, grad_bias, params.dtype, {params.channels}, kOp, "grad_bias");
  check_disjoint(kOp, {{"grad_x", of_x.view()}, {"grad_weight", of_weight.view()}, {"grad_bias", of_bias.view()}},
                 {{"grad_out", grad_array.view}, {"x", x_array.view}, {"weight", weight_array.view}});
  params.grad_x = of_x.data();
  params.grad_weight = of_weight.data();
  params.grad_bias = of_bias.data();
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    const AlignedScratch scratch(kOp, layer_norm_backward_scratch(params, parallel.threads));
    throw_if(layer_norm_backward(params, parallel, scratch.data), kOp);
  }
  return py::make_tuple(of_x.object(), of_weight.object(), of_bias.object());
}

py::object gated(const char* op, Gate function, const py::object& gate, const py::object& up, const py::object& out,
                 const py::object& threads) {
  const Array gate_array = input(gate, op, "gate"), up_array = input(up, op, "up");
  check_gated(op, gate_array.view, up_array.view);
  GatedParams params = gated_params(function, gate_array.view, up_array.view);
  const Array out_array = cpu_result(out, params.dtype, shape_of(gate_array.view), op, "out");
  check_disjoint(op, {{"out", out_array.view}}, {{"gate", gate_array.view}, {"up", up_array.view}});
  params.out = out_array.view.data;
  const Parallel parallel = thread_parallel(threads, op);
  {
    const py::gil_scoped_release release;
    throw_if(gated_forward(params, parallel), op);
  }
  return out_array.object;
}

py::tuple gated_gradients(const char* op, Gate function, const py::object& grad_out, const py::object& gate,
                          const py::object& up, bool need_gate, bool need_up, const py::object& grad_gate,
                          const py::object& grad_up, const py::object& threads) {
  const Array grad_array = input(grad_out, op, "grad_out"), gate_array = input(gate, op, "gate");
  const Array up_array = input(up, op, "up");
  check_gated(op, gate_array.view, up_array.view);
  check_grad_out(op, grad_array.view, gate_array.view, gate_array.view.shape[gate_array.view.dims - 1], "gate");
  GatedBackwardParams params = gated_backward_params(function, grad_array.view, gate_array.view, up_array.view);
  const Gradient of_gate(need_gate, grad_gate, params.dtype, shape_of(gate_array.view), op, "grad_gate");
  const Gradient of_up(need_up, grad_up, params.dtype, shape_of(gate_array.view), op, "grad_up");
  check_disjoint(op, {{"grad_gate", of_gate.view()}, {"grad_up", of_up.view()}},
                 {{"grad_out", grad_array.view}, {"gate", gate_array.view}, {"up", up_array.view}});
  params.grad_gate = of_gate.data();
  params.grad_up = of_up.data();
  const Parallel parallel = thread_parallel(threads, op);
  {
    const py::gil_scoped_release release;
    throw_if(gated_backward(params, parallel), op);
  }
  return py::make_tuple(of_gate.object(), of_up.object());
}

py::object silu_mul(py::object gate, py::object up, py::object out, py::object threads) {
  return gated("silu_mul", Gate::kSilu, gate, up, out, threads);
}

py::tuple silu_mul_backward(py::object grad_out, py::object gate, py::object up, bool need_gate, bool need_up,
                            py::object grad_gate, py::object grad_up, py::object threads) {
  return gated_gradients("silu_mul_backward", Gate::kSilu, grad_out, gate, up, need_gate, need_up, grad_gate, grad_up,
                         threads);
}

py::object gelu_mul(py::object gate, py::object up, const std::string& approximate, py::object out,
                    py::object threads) {
  return gated("gelu_mul", gelu_gate("gelu_mul", approximate), gate, up, out, threads);
}

py::tuple gelu_mul_backward(py::object grad_out, py::object gate, py::object up, const std::string& approximate,
                            bool need_gate, bool need_up, py::object grad_gate, py::object grad_up,
                            py::object threads) {
  constexpr const char* kOp = "gelu_mul_backward";
  return gated_gradients(kOp, gelu_gate(kOp, approximate), grad_out, gate, up, need_gate, need_up, grad_gate, grad_up,
                         threads);
}

constexpr const char* kLinearDoc =
    R"(x weight^T + bias, every row with one order of summation: see pycore.ops.invariant_linear.

x [..., K], weight [N, K], bias [N] or None: NumPy arrays or DLPack tensors of one floating dtype on the CPU, last dimension
contiguous. out is a new array unless given. threads defaults to all processors. Returns [..., N].)";

constexpr const char* kLinearsDoc =
    R"(Several linear layers of one x, their results side by side: see pycore.ops.invariant_linears.

x [..., K], weights a list of [N_i, K], biases a list of [N_i] or None: NumPy arrays or DLPack tensors of one floating dtype on
the CPU, last dimension contiguous. out is a new array unless given. threads defaults to all processors. Returns
[..., N_1 + N_2 + ...].)";

constexpr const char* kLinearBackwardDoc =
    R"(Gradients of `invariant_linear`: (grad_x, grad_weight, grad_bias), new arrays unless given.

grad_out is like the result. A gradient that is not needed is None.)";

constexpr const char* kNormDoc = R"(x / sqrt(mean(x^2) + eps) * weight over the last dimension: see pycore.ops.rms_norm.
plus_one: the factor is 1 + weight.

x [..., C], weight [C] or None: NumPy arrays or DLPack tensors of one floating dtype on the CPU, last dimension contiguous. out
is a new array unless given. threads defaults to all processors. Returns [..., C].)";

constexpr const char* kNormBackwardDoc = R"(Gradients of `rms_norm`: (grad_x, grad_weight), new arrays unless given.

grad_out is like the result. A gradient that is not needed is None.)";

constexpr const char* kLayerNormDoc =
    R"((x - mean) / sqrt(variance + eps) * weight + bias over the last dimension: see pycore.ops.layer_norm.

x [..., C], weight [C] or None, bias [C] or None: NumPy arrays or DLPack tensors of one floating dtype on the CPU, last
dimension contiguous. out is a new array unless given. threads defaults to all processors. Returns [..., C].)";

constexpr const char* kLayerNormBackwardDoc =
    R"(Gradients of `layer_norm`: (grad_x, grad_weight, grad_bias), new arrays unless given.

grad_out is like the result. A gradient that is not needed is None.)";

constexpr const char* kSiluMulDoc = R"(silu(gate) * up: see pycore.ops.silu_mul.

gate [..., C] and up [..., C]: NumPy arrays or DLPack tensors of one floating dtype on the CPU, last dimension
contiguous. out is a new array unless given. threads defaults to all processors. Returns [..., C].)";

constexpr const char* kGeluMulDoc = R"(gelu(gate) * up: see pycore.ops.gelu_mul.

gate [..., C] and up [..., C]: NumPy arrays or DLPack tensors of one floating dtype on the CPU, last dimension
contiguous. approximate is "none" or "tanh". out is a new array unless given. threads defaults to all processors.
Returns [..., C].)";

constexpr const char* kGatedBackwardDoc = R"(Gradients of `silu_mul` or `gelu_mul`: (grad_gate, grad_up), new arrays
unless given.

grad_out is like the result. A gradient that is not needed is None.)";

}  // namespace

void register_linear(py::module_& m) {
  const py::none none;
  m.def("invariant_linear", &invariant_linear, kLinearDoc, py::arg("x"), py::arg("weight"), py::arg("bias") = none,
        py::kw_only(), py::arg("out") = none, py::arg("threads") = none);
  m.def("invariant_linears", &invariant_linears, kLinearsDoc, py::arg("x"), py::arg("weights"),
        py::arg("biases") = none, py::kw_only(), py::arg("out") = none, py::arg("threads") = none);
  m.def("invariant_linear_backward", &invariant_linear_backward, kLinearBackwardDoc, py::arg("grad_out"), py::arg("x"),
        py::arg("weight"), py::kw_only(), py::arg("need_x") = true, py::arg("need_weight") = true,
        py::arg("need_bias") = true, py::arg("grad_x") = none, py::arg("grad_weight") = none,
        py::arg("grad_bias") = none, py::arg("threads") = none);
  m.def("rms_norm", &rms_norm, kNormDoc, py::arg("x"), py::arg("weight") = none, py::arg("eps") = 1e-6,
        py::arg("plus_one") = false, py::kw_only(), py::arg("out") = none, py::arg("threads") = none);
  m.def("rms_norm_backward", &rms_norm_backward, kNormBackwardDoc, py::arg("grad_out"), py::arg("x"),
        py::arg("weight") = none, py::arg("eps") = 1e-6, py::arg("plus_one") = false, py::kw_only(),
        py::arg("need_x") = true, py::arg("need_weight") = true, py::arg("grad_x") = none,
        py::arg("grad_weight") = none, py::arg("threads") = none);
  m.def("layer_norm", &layer_norm, kLayerNormDoc, py::arg("x"), py::arg("weight") = none, py::arg("bias") = none,
        py::arg("eps") = 1e-5, py::kw_only(), py::arg("out") = none, py::arg("threads") = none);
  m.def("layer_norm_backward", &layer_norm_backward, kLayerNormBackwardDoc, py::arg("grad_out"), py::arg("x"),
        py::arg("weight") = none, py::arg("eps") = 1e-5, py::kw_only(), py::arg("need_x") = true,
        py::arg("need_weight") = true, py::arg("need_bias") = true, py::arg("grad_x") = none,
        py::arg("grad_weight") = none, py::arg("grad_bias") = none, py::arg("threads") = none);
  m.def("silu_mul", &silu_mul, kSiluMulDoc, py::arg("gate"), py::arg("up"), py::kw_only(), py::arg("out") = none,
        py::arg("threads") = none);
  m.def("silu_mul_backward", &silu_mul_backward, kGatedBackwardDoc, py::arg("grad_out"), py::arg("gate"), py::arg("up"),
        py::kw_only(), py::arg("need_gate") = true, py::arg("need_up") = true, py::arg("grad_gate") = none,
        py::arg("grad_up") = none, py::arg("threads") = none);
  m.def("gelu_mul", &gelu_mul, kGeluMulDoc, py::arg("gate"), py::arg("up"), py::arg("approximate") = "none",
        py::kw_only(), py::arg("out") = none, py::arg("threads") = none);
  m.def("gelu_mul_backward", &gelu_mul_backward, kGatedBackwardDoc, py::arg("grad_out"), py::arg("gate"), py::arg("up"),
        py::arg("approximate") = "none", py::kw_only(), py::arg("need_gate") = true, py::arg("need_up") = true,
        py::arg("grad_gate") = none, py::arg("grad_up") = none, py::arg("threads") = none);
}

}  // namespace pycore::python
