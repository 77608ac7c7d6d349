// SPDX-License-Identifier: Apache-2.0
// What the two faces refuse for the ops of the linear family, and how they fill the parameter structs. Views of tensors
// that are not given are not defined().
#pragma once

#include <pycore/linear/linear.h>

#include <cmath>
#include <string>
#include <vector>

#include "checks.h"

namespace pycore {

inline void check_float_cpu(const char* op, const char* argument, const TensorView& view) {
  check_on_cpu(op, argument, view);
  check_value(is_floating(view.dtype), op, argument, " has dtype ", dtype_name(view.dtype),
              " and must have float32, bfloat16, float16 or float64");
}

// `of` names the tensor whose dtype it is.
inline void check_dtype_is(const char* op, const char* argument, const TensorView& view, DType dtype,
                           const char* of = "x") {
  check_value(view.dtype == dtype, op, argument, " has dtype ", dtype_name(view.dtype), " and must have ", of, "'s ",
              dtype_name(dtype));
  check_value(view.device == Device::kCpu, op, argument, " is not on the CPU, where ", of, " is");
}

inline void check_last_stride(const char* op, const char* argument, const TensorView& view) {
  check_value(view.last_contiguous(), op, argument, " has stride ", view.strides[view.dims - 1],
              " in its last dimension, which must be contiguous");
}

inline void check_same_shape(const char* op, const char* argument, const TensorView& view, TensorView expected,
                             int64_t last) {
  expected.shape[expected.dims - 1] = last;
  check_value(same_shape(view, expected), op, argument, " has shape ", shape_text(view), " and must have ",
              shape_text(expected));
}

// x [..., K], weight [N, K], bias [N] or absent.
inline void check_linear(const char* op, const TensorView& x, const TensorView& weight, const TensorView& bias) {
  check_float_cpu(op, "x", x);
  check_value(x.dims >= 1, op, "x is a scalar and must have shape [..., in_features]");
  check_dtype_is(op, "weight", weight, x.dtype);
  check_value(weight.dims == 2, op, "weight has shape ", shape_text(weight),
              " and must be [out_features, in_features]");
  check_value(weight.shape[1] == x.shape[x.dims - 1], op, "x has ", x.shape[x.dims - 1],
              " features in its last dimension and must have weight's ", weight.shape[1]);
  check_last_stride(op, "x", x);
  check_last_stride(op, "weight", weight);
  if (!bias.defined()) return;
  check_dtype_is(op, "bias", bias, x.dtype);
  check_value(bias.dims == 1 && bias.shape[0] == weight.shape[0], op, "bias has shape ", shape_text(bias),
              " and must have [", weight.shape[0], "], weight's out_features");
  check_last_stride(op, "bias", bias);
}

// weights [N_i, K], at least one, and as many biases [N_i] or none.
inline void check_linears(const char* op, const TensorView& x, const std::vector<TensorView>& weights,
                          const std::vector<TensorView>& biases) {
  check_value(!weights.empty(), op, "weights is empty and must have at least one weight");
  check_value(biases.empty() || biases.size() == weights.size(), op, "biases has ", biases.size(),
              " tensors and must have one for each of the ", weights.size(), " weights, or be None");
  for (size_t i = 0; i < weights.size(); ++i) {
    check_linear(op, x, weights[i], biases.empty() ? TensorView{} : biases[i]);
  }
}

// A norm's weight or bias: [C], as wide as x, or absent.
inline void check_of_channels(const char* op, const char* argument, const TensorView& view, const TensorView& x) {
  if (!view.defined()) return;
  check_dtype_is(op, argument, view, x.dtype);
  check_value(view.dims == 1 && view.shape[0] == x.shape[x.dims - 1], op, argument, " has shape ", shape_text(view),
              " and must have [", x.shape[x.dims - 1], "], x's last dimension");
  check_last_stride(op, argument, view);
}

// x [..., C], weight [C] and bias [C] or absent.
inline void check_norm(const char* op, const TensorView& x, const TensorView& weight, const TensorView& bias,
                       double eps) {
  check_float_cpu(op, "x", x);
  check_value(x.dims >= 1, op, "x is a scalar and must have shape [..., channels]");
  check_value(std::isfinite(eps) && eps >= 0, op, "eps is ", eps, " and must be finite and not negative");
  check_value(x.dtype == DType::kFloat64 || std::isfinite(static_cast<float>(eps)), op, "eps is ", eps,
              " and must be finite in float32, as x is");
  check_last_stride(op, "x", x);
  check_of_channels(op, "weight", weight, x);
  check_of_channels(op, "bias", bias, x);
}

inline void check_rms_norm(const char* op, const TensorView& x, const TensorView& weight, double eps) {
  check_norm(op, x, weight, TensorView{}, eps);
}

// gate [..., C] and up of its shape.
inline void check_gated(const char* op, const TensorView& gate, const TensorView& up) {
  check_float_cpu(op, "gate", gate);
  check_value(gate.dims >= 1, op, "gate is a scalar and must have shape [..., channels]");
  check_dtype_is(op, "up", up, gate.dtype, "gate");
  check_value(same_shape(up, gate), op, "up has shape ", shape_text(up), " and must have gate's ", shape_text(gate));
  check_last_stride(op, "gate", gate);
  check_last_stride(op, "up", up);
}

inline Gate gelu_gate(const char* op, const std::string& approximate) {
  check_value(approximate == "none" || approximate == "tanh", op, "approximate is '", approximate,
              "' and must be 'none' or 'tanh'");
  return approximate == "tanh" ? Gate::kGeluTanh : Gate::kGelu;
}

// grad_out as the op's result for x is shaped, `last` wide.
inline void check_grad_out(const char* op, const TensorView& grad_out, const TensorView& x, int64_t last,
                           const char* of = "x") {
  check_dtype_is(op, "grad_out", grad_out, x.dtype, of);
  check_same_shape(op, "grad_out", grad_out, x, last);
  check_last_stride(op, "grad_out", grad_out);
}

// The inputs' half of the structs; the caller adds where results go.
inline LinearParams linear_params(const TensorView& x, const TensorView& weight, const TensorView& bias) {
  LinearParams params;
  params.dtype = x.dtype;
  params.in_features = weight.shape[1];
  params.out_features = weight.shape[0];
  params.x = row_view(x);
  params.weight = weight.data;
  params.weight_stride = weight.strides[0];
  params.bias = bias.data;
  params.out_stride = weight.shape[0];
  return params;
}

// Where the results of several layers lie beside each other in rows of `columns`: `out` is the first row.
inline void place_side_by_side(std::vector<LinearParams>* layers, int64_t columns, void* out) {
  char* at = static_cast<char*>(out);
  for (LinearParams& layer : *layers) {
    layer.out = at;
    layer.out_stride = columns;
    at += layer.out_features * dtype_size(layer.dtype);
  }
}

inline std::vector<LinearParams> linears_params(const TensorView& x, const std::vector<TensorView>& weights,
                                                const std::vector<TensorView>& biases) {
  std::vector<LinearParams> layers;
  layers.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    layers.push_back(linear_params(x, weights[i], biases.empty() ? TensorView{} : biases[i]));
  }
  return layers;
}

inline int64_t columns_of(const std::vector<LinearParams>& layers) {
  int64_t columns = 0;
  for (const LinearParams& layer : layers) columns += layer.out_features;
  return columns;
}

inline LinearBackwardParams linear_backward_params(const TensorView& grad_out, const TensorView& x,
                                                   const TensorView& weight) {
  LinearBackwardParams params;
  params.dtype = x.dtype;
  params.in_features = weight.shape[1];
  params.out_features = weight.shape[0];
  params.grad_out = row_view(grad_out);
  params.x = row_view(x);
  params.weight = weight.data;
  params.weight_stride = weight.strides[0];
  return params;
}

inline RmsNormParams rms_norm_params(const TensorView& x, const TensorView& weight, double eps, bool plus_one) {
  RmsNormParams params;
  params.dtype = x.dtype;
  params.channels = x.shape[x.dims - 1];
  params.x = row_view(x);
  params.weight = weight.data;
  params.eps = eps;
  params.plus_one = plus_one;
  return params;
}

inline RmsNormBackwardParams rms_norm_backward_params(const TensorView& grad_out, const TensorView& x,
                                                      const TensorView& weight, double eps, bool plus_one) {
  RmsNormBackwardParams params;
  params.dtype = x.dtype;
  params.channels = x.shape[x.dims - 1];
  params.grad_out = row_view(grad_out);
  params.x = row_view(x);
  params.weight = weight.data;
  params.eps = eps;
  params.plus_one = plus_one;
  return params;
}

inline LayerNormParams layer_norm_params(const TensorView& x, const TensorView& weight, const TensorView& bias,
                                         double eps) {
  LayerNormParams params;
  params.dtype = x.dtype;
  params.channels = x.shape[x.dims - 1];
  params.x = row_view(x);
  params.weight = weight.data;
  params.bias = bias.data;
  params.eps = eps;
  return params;
}

inline LayerNormBackwardParams layer_norm_backward_params(const TensorView& grad_out, const TensorView& x,
                                                          const TensorView& weight, double eps) {
  LayerNormBackwardParams params;
  params.dtype = x.dtype;
  params.channels = x.shape[x.dims - 1];
  params.grad_out = row_view(grad_out);
  params.x = row_view(x);
  params.weight = weight.data;
  params.eps = eps;
  return params;
}

inline GatedParams gated_params(Gate function, const TensorView& gate, const TensorView& up) {
  GatedParams params;
  params.dtype = gate.dtype;
  params.function = function;
  params.channels = gate.shape[gate.dims - 1];
  params.gate = row_view(gate);
  params.up = row_view(up);
  return params;
}

inline GatedBackwardParams gated_backward_params(Gate function, const TensorView& grad_out, const TensorView& gate,
                                                 const TensorView& up) {
  GatedBackwardParams params;
  params.dtype = gate.dtype;
  params.function = function;
  params.channels = gate.shape[gate.dims - 1];
  params.grad_out = row_view(grad_out);
  params.gate = row_view(gate);
  params.up = row_view(up);
  return params;
}

}  // namespace pycore
