// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.{invariant_linear, rms_norm} and their gradients: schema, validation, allocation.
#include <torch/csrc/stable/library.h>

#include <optional>
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
  throw_if(linear_forward(params, parallel, scratch.data), kOp);
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
                    const std::optional<Tensor>& numbers) {
  constexpr const char* kOp = "rms_norm";
  if (const double* given = graph_numbers(numbers, 1, kOp, "numbers")) eps = given[0];
  const Tensor x = last_contiguous(x_any, kOp, "x");
  const std::optional<Tensor> weight = last_contiguous(weight_any, kOp, "weight");
  const TensorView x_view = view(x, kOp, "x"), weight_view = view(weight, kOp, "weight");
  check_rms_norm(kOp, x_view, weight_view, eps);
  RmsNormParams params = rms_norm_params(x_view, weight_view, eps);
  const Tensor out = new_tensor(kOp, "out", x, shape_of(x), x.scalar_type());
  params.out = out.mutable_data_ptr();
  throw_if(rms_norm_forward(params, torch_parallel()), kOp);
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(const Tensor& grad_out_any, const Tensor& x_any,
                                                 const std::optional<Tensor>& weight_any, double eps, bool need_x,
                                                 bool need_weight, const std::optional<Tensor>& numbers) {
  constexpr const char* kOp = "rms_norm_backward";
  if (const double* given = graph_numbers(numbers, 1, kOp, "numbers")) eps = given[0];
  const Tensor grad_out = last_contiguous(grad_out_any, kOp, "grad_out"), x = last_contiguous(x_any, kOp, "x");
  const std::optional<Tensor> weight = last_contiguous(weight_any, kOp, "weight");
  const TensorView grad_view = view(grad_out, kOp, "grad_out"), x_view = view(x, kOp, "x");
  const TensorView weight_view = view(weight, kOp, "weight");
  check_rms_norm(kOp, x_view, weight_view, eps);
  check_grad_out(kOp, grad_view, x_view, x_view.shape[x_view.dims - 1]);
  RmsNormBackwardParams params = rms_norm_backward_params(grad_view, x_view, weight_view, eps);
  const Tensor grad_x = empty_if(need_x, kOp, "grad_x", x, shape_of(x));
  const Tensor grad_weight = empty_if(need_weight, kOp, "grad_weight", x, {params.channels});
  if (need_x) params.grad_x = grad_x.mutable_data_ptr();
  if (need_weight) params.grad_weight = grad_weight.mutable_data_ptr();
  const Parallel parallel = torch_parallel();
  const Scratch scratch(kOp, x, rms_norm_backward_scratch(params, parallel.threads));
  throw_if(rms_norm_backward(params, parallel, scratch.data), kOp);
  return {grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  m.def("invariant_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  // Gradients that are not needed come back without elements.
  m.def(
      "invariant_linear_backward(Tensor grad_out, Tensor x, Tensor weight, bool need_x, bool need_weight, "
      "bool need_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  // numbers: eps, where a graph computes it.
  m.def("rms_norm(Tensor x, Tensor? weight, float eps, Tensor? numbers=None) -> Tensor");
  m.def(
      "rms_norm_backward(Tensor grad_out, Tensor x, Tensor? weight, float eps, bool need_x, bool need_weight, "
      "Tensor? numbers=None) -> (Tensor grad_x, Tensor grad_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) {
  m.impl("invariant_linear", TORCH_BOX(&invariant_linear_cpu));
  m.impl("invariant_linear_backward", TORCH_BOX(&invariant_linear_backward_cpu));
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_cpu));
}

}  // namespace pycore
