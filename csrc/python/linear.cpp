// SPDX-License-Identifier: Apache-2.0
// pycore.native.{invariant_linear, rms_norm} and their gradients: the kernels for NumPy arrays and DLPack tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
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
    throw_if(linear_forward(params, parallel, scratch.data), kOp);
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

py::object rms_norm(py::object x, py::object weight, double eps, py::object out, py::object threads) {
  constexpr const char* kOp = "rms_norm";
  const Array x_array = input(x, kOp, "x"), weight_array = optional_input(weight, kOp, "weight");
  check_rms_norm(kOp, x_array.view, weight_array.view, eps);
  RmsNormParams params = rms_norm_params(x_array.view, weight_array.view, eps);
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

py::tuple rms_norm_backward(py::object grad_out, py::object x, py::object weight, double eps, bool need_x,
                            bool need_weight, py::object grad_x, py::object grad_weight, py::object threads) {
  constexpr const char* kOp = "rms_norm_backward";
  const Array grad_array = input(grad_out, kOp, "grad_out"), x_array = input(x, kOp, "x");
  const Array weight_array = optional_input(weight, kOp, "weight");
  check_rms_norm(kOp, x_array.view, weight_array.view, eps);
  check_grad_out(kOp, grad_array.view, x_array.view, x_array.view.shape[x_array.view.dims - 1]);
  RmsNormBackwardParams params = rms_norm_backward_params(grad_array.view, x_array.view, weight_array.view, eps);
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

constexpr const char* kLinearDoc =
    R"(x weight^T + bias, every row with one order of summation: see pycore.ops.invariant_linear.

x [..., K], weight [N, K], bias [N] or None: float32 or float64 NumPy arrays or DLPack tensors on the CPU, last dimension
contiguous. out is a new array unless given. threads defaults to all processors. Returns [..., N].)";

constexpr const char* kLinearBackwardDoc =
    R"(Gradients of `invariant_linear`: (grad_x, grad_weight, grad_bias), new arrays unless given.

grad_out is like the result. A gradient that is not needed is None.)";

constexpr const char* kNormDoc = R"(x / sqrt(mean(x^2) + eps) * weight over the last dimension: see pycore.ops.rms_norm.

x [..., C], weight [C] or None: float32 or float64 NumPy arrays or DLPack tensors on the CPU, last dimension contiguous. out
is a new array unless given. threads defaults to all processors. Returns [..., C].)";

constexpr const char* kNormBackwardDoc = R"(Gradients of `rms_norm`: (grad_x, grad_weight), new arrays unless given.

grad_out is like the result. A gradient that is not needed is None.)";

}  // namespace

void register_linear(py::module_& m) {
  const py::none none;
  m.def("invariant_linear", &invariant_linear, kLinearDoc, py::arg("x"), py::arg("weight"), py::arg("bias") = none,
        py::kw_only(), py::arg("out") = none, py::arg("threads") = none);
  m.def("invariant_linear_backward", &invariant_linear_backward, kLinearBackwardDoc, py::arg("grad_out"), py::arg("x"),
        py::arg("weight"), py::kw_only(), py::arg("need_x") = true, py::arg("need_weight") = true,
        py::arg("need_bias") = true, py::arg("grad_x") = none, py::arg("grad_weight") = none,
        py::arg("grad_bias") = none, py::arg("threads") = none);
  m.def("rms_norm", &rms_norm, kNormDoc, py::arg("x"), py::arg("weight") = none, py::arg("eps") = 1e-6, py::kw_only(),
        py::arg("out") = none, py::arg("threads") = none);
  m.def("rms_norm_backward", &rms_norm_backward, kNormBackwardDoc, py::arg("grad_out"), py::arg("x"),
        py::arg("weight") = none, py::arg("eps") = 1e-6, py::kw_only(), py::arg("need_x") = true,
        py::arg("need_weight") = true, py::arg("grad_x") = none, py::arg("grad_weight") = none,
        py::arg("threads") = none);
}

}  // namespace pycore::python
