// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.{invariant_linear, invariant_linears, rms_norm, layer_norm, silu_mul, gelu_mul} and their gradients:
// schema, validation, allocation.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../host/linear_args.h"
#include "tensor.h"

namespace pycore {
namespace {

using torch::stable::Tensor;

// Not wanted: no elements.
Tensor empty_if(bool wanted, const char* op, const char* name, const Tensor& like, const std::vector<int64_t>& shape) {
  return new_tensor(op, name, like, wanted ? shape : std::vector<int64_t>{0}, like.scalar_type());
}

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

struct Scratch {
  Scratch(const char* op, const Tensor& like, int64_t bytes) {
    if (bytes == 0) return;
    memory = new_tensor(op, "scratch", like, {bytes}, torch::headeronly::ScalarType::Byte);
    data = memory->mutable_data_ptr();
  }
  std::optional<Tensor> memory;
  void* data = nullptr;
};

Tensor invariant_linear_cpu(const Tensor& x_any, const Tensor& weight_any, const std::optional<Tensor>& bias_any) {
  constexpr const char* kOp = "invariant_linear";
  const Tensor x = last_contiguous(x_any, kOp, "x"), weight = last_contiguous(weight_any, kOp, "weight");
  const std::optional<Tensor> bias = last_contiguous(bias_any, kOp, "bias");
  const TensorView x_view = view(x, kOp, "x"), weight_view = view(weight, kOp, "weight");
  const TensorView bias_view = view(bias, kOp, "bias");
  check_linear(kOp, x_view, weight_view, bias_view);
  LinearParams params = linear_params(x_view, weight_view, bias_view);
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = params.out_features;
  const Tensor out = new_tensor(kOp, "out", x, shape, x.scalar_type());
  params.out = out.mutable_data_ptr();
  const Parallel parallel = torch_parallel();
  const Scratch scratch(kOp, x, linear_forward_scratch(params, parallel.threads));
  throw_if(linear_forward(&params, 1, parallel, scratch.data), kOp);
  return out;
}

Tensor invariant_linears_cpu(const Tensor& x_any, std::vector<Tensor> weights, std::vector<Tensor> biases) {
  constexpr const char* kOp = "invariant_linears";
  const Tensor x = last_contiguous(x_any, kOp, "x");
  const TensorView x_view = view(x, kOp, "x");
  std::vector<TensorView> weight_views, bias_views;
  const auto take = [&](const char* name, std::vector<Tensor>* tensors, std::vector<TensorView>* views) {
    views->reserve(tensors->size());
    for (Tensor& tensor : *tensors) {
      tensor = last_contiguous(tensor, kOp, name);
      views->push_back(view(tensor, kOp, name));
    }
  };
  take("weight", &weights, &weight_views);
  take("bias", &biases, &bias_views);
  check_linears(kOp, x_view, weight_views, bias_views);
  std::vector<LinearParams> layers = linears_params(x_view, weight_views, bias_views);
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = columns_of(layers);
  const Tensor out = new_tensor(kOp, "out", x, shape, x.scalar_type());
  place_side_by_side(&layers, shape.back(), out.mutable_data_ptr());
  const Parallel parallel = torch_parallel();
  const Scratch scratch(kOp, x, linear_forward_scratch(layers[0], parallel.threads));
  throw_if(linear_forward(layers.data(), static_cast<int64_t>(layers.size()), parallel, scratch.data), kOp);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> invariant_linear_backward_cpu(const Tensor& grad_out_any, const Tensor& x_any,
                                                                 const Tensor& weight_any, bool need_x,
                                                                 bool need_weight, bool need_bias) {
  constexpr const char* kOp = "invariant_linear_backward";
  const Tensor grad_out = last_contiguous(grad_out_any, kOp, "grad_out"), x = last_contiguous(x_any, kOp, "x");
  const Tensor weight = last_contiguous(weight_any, kOp, "weight");
  const TensorView grad_view = view(grad_out, kOp, "grad_out"), x_view = view(x, kOp, "x");
  const TensorView weight_view = view(weight, kOp, "weight");
  check_linear(kOp, x_view, weight_view, TensorView{});
  check_grad_out(kOp, grad_view, x_view, weight_view.shape[0]);
  LinearBackwardParams params = linear_backward_params(grad_view, x_view, weight_view);
  const Tensor grad_x = empty_if(need_x, kOp, "grad_x", x, shape_of(x));
  const Tensor grad_weight = empty_if(need_weight, kOp, "grad_weight", x, shape_of(weight));
  const Tensor grad_bias = empty_if(need_bias, kOp, "grad_bias", x, {params.out_features});
  if (need_x) params.grad_x = grad_x.mutable_data_ptr();
  if (need_weight) params.grad_weight = grad_weight.mutable_data_ptr();
  if (need_bias) params.grad_bias = grad_bias.mutable_data_ptr();
  const Parallel parallel = torch_parallel();
  const Scratch scratch(kOp, x, linear_backward_scratch(params, parallel.threads));
  throw_if(linear_backward(params, parallel, scratch.data), kOp);
  return {grad_x, grad_weight, grad_bias};
}

Tensor rms_norm_cpu(const Tensor& x_any, const std::optional<Tensor>& weight_any, double eps,
                    const std::optional<Tensor>& numbers, bool plus_one) {
  constexpr const char* kOp = "rms_norm";
  if (const double* given = graph_numbers(numbers, 1, kOp, "numbers")) eps = given[0];
  const Tensor x = last_contiguous(x_any, kOp, "x");
  const std::optional<Tensor> weight = last_contiguous(weight_any, kOp, "weight");
  const TensorView x_view = view(x, kOp, "x"), weight_view = view(weight, kOp, "weight");
  check_rms_norm(kOp, x_view, weight_view, eps);
  RmsNormParams params = rms_norm_params(x_view, weight_view, eps, plus_one);
  const Tensor out = new_tensor(kOp, "out", x, shape_of(x), x.scalar_type());
  params.out = out.mutable_data_ptr();
  throw_if(rms_norm_forward(params, torch_parallel()), kOp);
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(const Tensor& grad_out_any, const Tensor& x_any,
                                                 const std::optional<Tensor>& weight_any, double eps, bool need_x,
                                                 bool need_weight, const std::optional<Tensor>& numbers,
                                                 bool plus_one) {
  constexpr const char* kOp = "rms_norm_backward";
  if (const double* given = graph_numbers(numbers, 1, kOp, "numbers")) eps = given[0];
  const Tensor grad_out = last_contiguous(grad_out_any, kOp, "grad_out"), x = last_contiguous(x_any, kOp, "x");
  const std::optional<Tensor> weight = last_contiguous(weight_any, kOp, "weight");
  const TensorView grad_view = view(grad_out, kOp, "grad_out"), x_view = view(x, kOp, "x");
  const TensorView weight_view = view(weight, kOp, "weight");
  check_rms_norm(kOp, x_view, weight_view, eps);
  check_grad_out(kOp, grad_view, x_view, x_view.shape[x_view.dims - 1]);
  RmsNormBackwardParams params = rms_norm_backward_params(grad_view, x_view, weight_view, eps, plus_one);
  const Tensor grad_x = empty_if(need_x, kOp, "grad_x", x, shape_of(x));
  const Tensor grad_weight = empty_if(need_weight, kOp, "grad_weight", x, {params.channels});
  if (need_x) params.grad_x = grad_x.mutable_data_ptr();
  if (need_weight) params.grad_weight = grad_weight.mutable_data_ptr();
  const Parallel parallel = torch_parallel();
  const Scratch scratch(kOp, x, rms_norm_backward_scratch(params, parallel.threads));
  throw_if(rms_norm_backward(params, parallel, scratch.data), kOp);
  return {grad_x, grad_weight};
}

Tensor layer_norm_cpu(const Tensor& x_any, const std::optional<Tensor>& weight_any,
                      const std::optional<Tensor>& bias_any, double eps, const std::optional<Tensor>& numbers) {
  constexpr const char* kOp = "layer_norm";
  if (const double* given = graph_numbers(numbers, 1, kOp, "numbers")) eps = given[0];
  const Tensor x = last_contiguous(x_any, kOp, "x");
  const std::optional<Tensor> weight = last_contiguous(weight_any, kOp, "weight");
  const std::optional<Tensor> bias = last_contiguous(bias_any, kOp, "bias");
  const TensorView x_view = view(x, kOp, "x"), weight_view = view(weight, kOp, "weight");
  const TensorView bias_view = view(bias, kOp, "bias");
  check_norm(kOp, x_view, weight_view, bias_view, eps);
  LayerNormParams params = layer_norm_params(x_view, weight_view, bias_view, eps);
  const Tensor out = new_tensor(kOp, "out", x, shape_of(x), x.scalar_type());
  params.out = out.mutable_data_ptr();
  throw_if(layer_norm_forward(params, torch_parallel()), kOp);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(const Tensor& grad_out_any, const Tensor& x_any,
                                                           const std::optional<Tensor>& weight_any, double eps,
                                                           bool need_x, bool need_weight, bool need_bias,
                                                           const std::optional<Tensor>& numbers) {
  constexpr const char* kOp = "layer_norm_backward";
  if (const double* given = graph_numbers(numbers, 1, kOp, "numbers")) eps = given[0];
  const Tensor grad_out = last_contiguous(grad_out_any, kOp, "grad_out"), x = last_contiguous(x_any, kOp, "x");
  const std::optional<Tensor> weight = last_contiguous(weight_any, kOp, "weight");
  const TensorView grad_view = view(grad_out, kOp, "grad_out"), x_view = view(x, kOp, "x");
  const TensorView weight_view = view(weight, kOp, "weight");
  check_norm(kOp, x_view, weight_view, TensorView{}, eps);
  check_grad_out(kOp, grad_view, x_view, x_view.shape[x_view.dims - 1]);
  LayerNormBackwardParams params = layer_norm_backward_params(grad_view, x_view, weight_view, eps);
  const Tensor grad_x = empty_if(need_x, kOp, "grad_x", x, shape_of(x));
  const Tensor grad_weight = empty_if(need_weight, kOp, "grad_weight", x, {params.channels});
  const Tensor grad_bias = empty_if(need_bias, kOp, "grad_bias", x, {params.channels});
  if (need_x) params.grad_x = grad_x.mutable_data_ptr();
  if (need_weight) params.grad_weight = grad_weight.mutable_data_ptr();
  if (need_bias) params.grad_bias = grad_bias.mutable_data_ptr();
  const Parallel parallel = torch_parallel();
  const Scratch scratch(kOp, x, layer_norm_backward_scratch(params, parallel.threads));
  throw_if(layer_norm_backward(params, parallel, scratch.data), kOp);
  return {grad_x, grad_weight, grad_bias};
}

Tensor gated(const char* op, Gate function, const Tensor& gate_any, const Tensor& up_any) {
  const Tensor gate = last_contiguous(gate_any, op, "gate"), up = last_contiguous(up_any, op, "up");
  const TensorView gate_view = view(gate, op, "gate"), up_view = view(up, op, "up");
  check_gated(op, gate_view, up_view);
  GatedParams params = gated_params(function, gate_view, up_view);
  const Tensor out = new_tensor(op, "out", gate, shape_of(gate), gate.scalar_type());
  params.out = out.mutable_data_ptr();
  throw_if(gated_forward(params, torch_parallel()), op);
  return out;
}

std::tuple<Tensor, Tensor> gated_gradients(const char* op, Gate function, const Tensor& grad_out_any,
                                           const Tensor& gate_any, const Tensor& up_any, bool need_gate, bool need_up) {
  const Tensor grad_out = last_contiguous(grad_out_any, op, "grad_out");
  const Tensor gate = last_contiguous(gate_any, op, "gate"), up = last_contiguous(up_any, op, "up");
  const TensorView grad_view = view(grad_out, op, "grad_out"), gate_view = view(gate, op, "gate");
  const TensorView up_view = view(up, op, "up");
  check_gated(op, gate_view, up_view);
  check_grad_out(op, grad_view, gate_view, gate_view.shape[gate_view.dims - 1], "gate");
  GatedBackwardParams params = gated_backward_params(function, grad_view, gate_view, up_view);
  const Tensor grad_gate = empty_if(need_gate, op, "grad_gate", gate, shape_of(gate));
  const Tensor grad_up = empty_if(need_up, op, "grad_up", gate, shape_of(gate));
  if (need_gate) params.grad_gate = grad_gate.mutable_data_ptr();
  if (need_up) params.grad_up = grad_up.mutable_data_ptr();
  throw_if(gated_backward(params, torch_parallel()), op);
  return {grad_gate, grad_up};
}

Tensor silu_mul_cpu(const Tensor& gate, const Tensor& up) { return gated("silu_mul", Gate::kSilu, gate, up); }

std::tuple<Tensor, Tensor> silu_mul_backward_cpu(const Tensor& grad_out, const Tensor& gate, const Tensor& up,
                                                 bool need_gate, bool need_up) {
  return gated_gradients("silu_mul_backward", Gate::kSilu, grad_out, gate, up, need_gate, need_up);
}

Tensor gelu_mul_cpu(const Tensor& gate, const Tensor& up, Text approximate) {
  return gated("gelu_mul", gelu_gate("gelu_mul", approximate), gate, up);
}

std::tuple<Tensor, Tensor> gelu_mul_backward_cpu(const Tensor& grad_out, const Tensor& gate, const Tensor& up,
                                                 Text approximate, bool need_gate, bool need_up) {
  constexpr const char* kOp = "gelu_mul_backward";
  return gated_gradients(kOp, gelu_gate(kOp, approximate), grad_out, gate, up, need_gate, need_up);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  m.def("invariant_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  // biases: one for each weight, or none at all.
  m.def("invariant_linears(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor");
  // Gradients that are not needed come back without elements.
  m.def(
      "invariant_linear_backward(Tensor grad_out, Tensor x, Tensor weight, bool need_x, bool need_weight, "
      "bool need_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  // numbers: eps, where a graph computes it.
  m.def("rms_norm(Tensor x, Tensor? weight, float eps, Tensor? numbers=None, bool plus_one=False) -> Tensor");
  m.def(
      "rms_norm_backward(Tensor grad_out, Tensor x, Tensor? weight, float eps, bool need_x, bool need_weight, "
      "Tensor? numbers=None, bool plus_one=False) -> (Tensor grad_x, Tensor grad_weight)");
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? numbers=None) -> Tensor");
  m.def(
      "layer_norm_backward(Tensor grad_out, Tensor x, Tensor? weight, float eps, bool need_x, bool need_weight, "
      "bool need_bias, Tensor? numbers=None) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def(
      "silu_mul_backward(Tensor grad_out, Tensor gate, Tensor up, bool need_gate, bool need_up) -> "
      "(Tensor grad_gate, Tensor grad_up)");
  m.def("gelu_mul(Tensor gate, Tensor up, str approximate) -> Tensor");
  m.def(
      "gelu_mul_backward(Tensor grad_out, Tensor gate, Tensor up, str approximate, bool need_gate, bool need_up) -> "
      "(Tensor grad_gate, Tensor grad_up)");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) {
  m.impl("invariant_linear", TORCH_BOX(&invariant_linear_cpu));
  m.impl("invariant_linears", TORCH_BOX(&invariant_linears_cpu));
  m.impl("invariant_linear_backward", TORCH_BOX(&invariant_linear_backward_cpu));
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_cpu));
  m.impl("layer_norm", TORCH_BOX(&layer_norm_cpu));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward_cpu));
  m.impl("silu_mul", TORCH_BOX(&silu_mul_cpu));
  m.impl("silu_mul_backward", TORCH_BOX(&silu_mul_backward_cpu));
  m.impl("gelu_mul", TORCH_BOX(&gelu_mul_cpu));
  m.impl("gelu_mul_backward", TORCH_BOX(&gelu_mul_backward_cpu));
}

}  // namespace pycore
