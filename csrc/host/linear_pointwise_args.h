// SPDX-License-Identifier: Apache-2.0
// What the two faces refuse for rotary_tables, rotate and softcap, and how they fill the parameter structs.
#pragma once

#include <pycore/linear/pointwise.h>

#include <cmath>

#include "linear_args.h"

namespace pycore {

// positions int64 [...], contiguous; frequencies float64 [P].
inline void check_rotary_tables(const char* op, const TensorView& positions, const TensorView& frequencies) {
  check_on_cpu(op, "positions", positions);
  check_on_cpu(op, "frequencies", frequencies);
  check_value(positions.dtype == DType::kInt64, op, "positions has dtype ", dtype_name(positions.dtype),
              " and must have int64");
  check_value(positions.dims < kMaxDims, op, "positions has ", positions.dims, " dimensions and may have ",
              kMaxDims - 1);
  check_value(frequencies.dtype == DType::kFloat64, op, "frequencies has dtype ", dtype_name(frequencies.dtype),
              " and must have float64");
  check_value(frequencies.dims == 1, op, "frequencies has shape ", shape_text(frequencies), " and must be [pairs]");
  check_value(positions.contiguous(), op, "positions is strided and must be contiguous");
  check_value(frequencies.contiguous(), op, "frequencies is strided and must be contiguous");
}

// What the arguments of a rotation are called.
struct RotateNames {
  const char *x = "x", *cos = "cos", *sin = "sin";
};

// x [B, H, L, C], cos and sin [B or 1, L, P] with 2 P <= C.
inline void check_rotate(const char* op, const TensorView& x, const TensorView& cos, const TensorView& sin,
                         const RotateNames& names = {}) {
  check_float_cpu(op, names.x, x);
  check_value(x.dims == 4, op, names.x, " has shape ", shape_text(x), " and must be [batch, heads, length, channels]");
  const DType wanted = x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const auto check_table = [&](const char* name, const TensorView& table) {
    check_on_cpu(op, name, table);
    check_value(table.dtype == wanted, op, name, " has dtype ", dtype_name(table.dtype), " and must have ",
                dtype_name(wanted), " where ", names.x, " has ", dtype_name(x.dtype));
    const bool fits = table.dims == 3 && (table.shape[0] == 1 || table.shape[0] == x.shape[0]) &&
                      table.shape[1] == x.shape[2] && 2 * table.shape[2] <= x.shape[3];
    check_value(fits, op, name, " has shape ", shape_text(table), " and must be [", x.shape[0], " or 1, ", x.shape[2],
                ", at most ", x.shape[3] / 2, "], as ", names.x, " is");
    check_value(table.contiguous(), op, name, " is strided and must be contiguous");
  };
  check_table(names.cos, cos);
  check_table(names.sin, sin);
  check_value(same_shape(cos, sin), op, names.sin, " has shape ", shape_text(sin), " and must have ", names.cos, "'s ",
              shape_text(cos));
  check_last_stride(op, names.x, x);
}

inline void check_softcap(const char* op, const TensorView& x, double cap) {
  check_float_cpu(op, "x", x);
  check_value(x.dims >= 1, op, "x is a scalar and must have shape [..., channels]");
  check_value(std::isfinite(static_cast<float>(cap)) && static_cast<float>(cap) > 0, op, "cap is ", cap,
              " and must be positive and finite");
  check_last_stride(op, "x", x);
}

// The inputs' half of the structs; the caller adds where results go.
inline RotaryTablesParams rotary_tables_params(const TensorView& positions, const TensorView& frequencies, bool wide) {
  RotaryTablesParams params;
  params.dtype = wide ? DType::kFloat64 : DType::kFloat32;
  params.rows = positions.count();
  params.pairs = frequencies.shape[0];
  params.positions = positions.as<const int64_t>();
  params.frequencies = frequencies.as<const double>();
  return params;
}

inline RotateParams rotate_params(const TensorView& x, const TensorView& cos, const TensorView& sin, bool inverse) {
  RotateParams params;
  params.dtype = x.dtype;
  params.heads = x.shape[1];
  params.length = x.shape[2];
  params.channels = x.shape[3];
  params.pairs = cos.shape[2];
  params.x = row_view(x);
  params.cos = cos.data;
  params.sin = sin.data;
  params.one_table = cos.shape[0] == 1;
  params.inverse = inverse;
  return params;
}

// grad_out is not defined() in the forward pass.
inline SoftcapParams softcap_params(const TensorView& x, const TensorView& grad_out, double cap) {
  SoftcapParams params;
  params.dtype = x.dtype;
  params.channels = x.shape[x.dims - 1];
  params.cap = cap;
  params.x = row_view(x);
  params.has_grad = grad_out.defined();
  if (params.has_grad) params.grad_out = row_view(grad_out);
  return params;
}

}  // namespace pycore
