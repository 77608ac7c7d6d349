// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.{rotary_tables, rotate, softcap}: schema, validation, allocation. The gradient of a rotation is the
// rotation back.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../host/linear_pointwise_args.h"
#include "tensor.h"

namespace pycore {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

std::tuple<Tensor, Tensor> rotary_tables_cpu(const Tensor& positions_any, const Tensor& frequencies_any, bool wide) {
  constexpr const char* kOp = "rotary_tables";
  const Tensor positions = dense(positions_any, kOp, "positions");
  const Tensor frequencies = dense(frequencies_any, kOp, "frequencies");
  const TensorView position_view = view(positions, kOp, "positions");
  const TensorView frequency_view = view(frequencies, kOp, "frequencies");
  check_rotary_tables(kOp, position_view, frequency_view);
  RotaryTablesParams params = rotary_tables_params(position_view, frequency_view, wide);
  std::vector<int64_t> shape = shape_of(positions);
  shape.push_back(params.pairs);
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor cos = new_tensor(kOp, "cos", positions, shape, type);
  const Tensor sin = new_tensor(kOp, "sin", positions, shape, type);
  params.cos = cos.mutable_data_ptr();
  params.sin = sin.mutable_data_ptr();
  throw_if(rotary_tables(params, torch_parallel()), kOp);
  return {cos, sin};
}

Tensor rotate_cpu(const Tensor& x_any, const Tensor& cos_any, const Tensor& sin_any, bool inverse) {
  constexpr const char* kOp = "rotate";
  const Tensor x = last_contiguous(x_any, kOp, "x");
  const Tensor cos = dense(cos_any, kOp, "cos"), sin = dense(sin_any, kOp, "sin");
  const TensorView x_view = view(x, kOp, "x"), cos_view = view(cos, kOp, "cos"), sin_view = view(sin, kOp, "sin");
  check_rotate(kOp, x_view, cos_view, sin_view);
  RotateParams params = rotate_params(x_view, cos_view, sin_view, inverse);
  const Tensor out = new_tensor(kOp, "out", x, shape_of(x), x.scalar_type());
  params.out = out.mutable_data_ptr();
  throw_if(rotate_forward(params, torch_parallel()), kOp);
  return out;
}

Tensor softcap_of(const char* op, const Tensor& x_any, const std::optional<Tensor>& grad_any, double cap,
                  const std::optional<Tensor>& numbers) {
  if (const double* given = graph_numbers(numbers, 1, op, "numbers")) cap = given[0];
  const Tensor x = last_contiguous(x_any, op, "x");
  const std::optional<Tensor> grad_out = last_contiguous(grad_any, op, "grad_out");
  const TensorView x_view = view(x, op, "x"), grad_view = view(grad_out, op, "grad_out");
  check_softcap(op, x_view, cap);
  if (grad_view.defined()) check_grad_out(op, grad_view, x_view, x_view.shape[x_view.dims - 1]);
  SoftcapParams params = softcap_params(x_view, grad_view, cap);
  const Tensor out = new_tensor(op, "out", x, shape_of(x), x.scalar_type());
  params.out = out.mutable_data_ptr();
  throw_if(softcap_forward(params, torch_parallel()), op);
  return out;
}

Tensor softcap_cpu(const Tensor& x, double cap, const std::optional<Tensor>& numbers) {
  return softcap_of("softcap", x, std::nullopt, cap, numbers);
}

Tensor softcap_backward_cpu(const Tensor& grad_out, const Tensor& x, double cap, const std::optional<Tensor>& numbers) {
  return softcap_of("softcap_backward", x, grad_out, cap, numbers);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  m.def("rotary_tables(Tensor positions, Tensor frequencies, bool wide=False) -> (Tensor cos, Tensor sin)");
  m.def("rotate(Tensor x, Tensor cos, Tensor sin, bool inverse=False) -> Tensor");
  // numbers: cap, where a graph computes it.
  m.def("softcap(Tensor x, float cap, Tensor? numbers=None) -> Tensor");
  m.def("softcap_backward(Tensor grad_out, Tensor x, float cap, Tensor? numbers=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) {
  m.impl("rotary_tables", TORCH_BOX(&rotary_tables_cpu));
  m.impl("rotate", TORCH_BOX(&rotate_cpu));
  m.impl("softcap", TORCH_BOX(&softcap_cpu));
  m.impl("softcap_backward", TORCH_BOX(&softcap_backward_cpu));
}

}  // namespace pycore
