// SPDX-License-Identifier: Apache-2.0
// What both faces refuse for the staircase's group quantization, and how they fill the parameter structs.
#pragma once

#include <pycore/dtype.h>
#include <pycore/staircase/staircase.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "checks.h"

namespace pycore {

struct StaircaseOptions {
  int64_t bits = 8, group_size = 64, dim = -1;
  std::string grid = "embedded";
};

inline void check_staircase_float(const char* op, const char* argument, const TensorView& view) {
  check_value(view.device == Device::kCpu, op, argument, " is not on the CPU, which is where this op has kernels");
  check_value(view.dtype == DType::kFloat32 || view.dtype == DType::kFloat16 || view.dtype == DType::kBFloat16, op,
              argument, " has dtype ", dtype_name(view.dtype), " and must have float32, float16 or bfloat16");
}

inline StaircaseGrid staircase_grid(const char* op, const std::string& grid) {
  check_value(grid == "embedded" || grid == "minmax", op, "grid is '", grid, "' and must be 'embedded' or 'minmax'");
  return grid == "minmax" ? StaircaseGrid::kMinMax : StaircaseGrid::kEmbedded;
}

// Of a tensor of `view`'s shape, all of whose dimensions are contiguous.
inline void fill_staircase_shape(const char* op, const char* argument, const TensorView& view,
                                 const StaircaseOptions& options, StaircaseShape* shape, int32_t* dim) {
  check_value(view.dims >= 1, op, argument, " is a scalar and must have a dimension");
  check_value(options.bits >= 1 && options.bits <= 8, op, "bits is ", options.bits, " and must be between 1 and 8");
  check_value(options.group_size >= 1, op, "group_size is ", options.group_size, " and must be at least 1");
  check_index(options.dim >= -view.dims && options.dim < view.dims, op, "dim is ", options.dim, " and must be between ",
              -view.dims, " and ", view.dims - 1, ", as ", argument, " has ", view.dims, " dimensions");
  *dim = static_cast<int32_t>(options.dim < 0 ? options.dim + view.dims : options.dim);
  shape->grid = staircase_grid(op, options.grid);
  shape->bits = static_cast<int32_t>(options.bits);
  shape->group_size = options.group_size;
  shape->length = view.shape[*dim];
  shape->along_last = *dim == view.dims - 1;
  shape->channels = shape->along_last ? 1 : view.shape[view.dims - 1];
  for (int i = 0; i < *dim; ++i) shape->outer *= view.shape[i];
  for (int i = *dim + 1; i < view.dims - 1; ++i) shape->inner *= view.shape[i];
}

// lo's shape: a number for each group.
inline std::vector<int64_t> staircase_groups(const TensorView& view, const StaircaseShape& shape, int32_t dim) {
  std::vector<int64_t> sizes(view.shape, view.shape + view.dims);
  sizes[static_cast<size_t>(dim)] = shape.groups();
  return sizes;
}

inline StaircaseQuantizeParams staircase_quantize_params(const TensorView& x, const StaircaseOptions& options) {
  constexpr const char* kOp = "staircase_quantize";
  StaircaseQuantizeParams params;
  check_staircase_float(kOp, "x", x);
  fill_staircase_shape(kOp, "x", x, options, &params, &params.dim);
  check_span(kOp, "x", x);
  const int last = x.dims - 1;
  check_value(x.shape[last] <= 1 || x.strides[last] == 1 || x.count() == 0, kOp, "x has stride ", x.strides[last],
              " in its last dimension, which must be contiguous");
  params.dtype = x.dtype;
  params.x = x;
  return params;
}

inline float float_at(const TensorView& view, int64_t offset) {
  switch (view.dtype) {
    case DType::kFloat32: return view.as<const float>()[offset];
    case DType::kFloat16: return float_from_float16(view.as<const uint16_t>()[offset]);
    default: return float_from_bfloat16(view.as<const uint16_t>()[offset]);
  }
}

// The error of the group that staircase_fault found.
[[noreturn]] inline void throw_staircase_fault(const StaircaseQuantizeParams& params, int64_t fault) {
  constexpr const char* kOp = "staircase_quantize";
  const TensorView& x = params.x;
  int64_t index[kMaxDims] = {}, offset = 0, group = 0;
  for (int i = x.dims - 1; i >= 0; --i) {
    const int64_t size = i == params.dim ? params.groups() : x.shape[i];
    index[i] = fault % size;
    fault /= size;
    if (i == params.dim) {
      group = index[i];
      index[i] *= params.group_size;
    }
    offset += index[i] * x.strides[i];
  }
  const int64_t first = index[params.dim], end = std::min(first + params.group_size, params.length);
  float lo = INFINITY, hi = -INFINITY;
  const auto where = [&](int64_t at, bool group_of) {
    std::string text = "[";
    for (int i = 0; i < x.dims; ++i) {
      text += (i ? ", " : "") + (i != params.dim ? std::to_string(index[i])
                                 : group_of      ? std::to_string(at) + ":" + std::to_string(end)
                                                 : std::to_string(at));
    }
    return text + "]";
  };
  for (int64_t t = first; t < end; ++t) {
    const float value = float_at(x, offset + (t - first) * x.strides[params.dim]);
    check_value(std::isfinite(value), kOp, "x", where(t, false), ", in group ", group, " along dim ", params.dim,
                ", is ",
                std::isnan(value) ? "nan"
                : value > 0       ? "inf"
                                  : "-inf",
                " and must be finite");
    lo = std::min(lo, value);
    hi = std::max(hi, value);
  }
  check_value(false, kOp, "x", where(first, true), ", group ", group, " along dim ", params.dim, ", is between ", lo,
              " and ", hi, ", whose difference must be finite in float32");
  std::abort();  // not reached
}

inline StaircaseDequantizeParams staircase_dequantize_params(const TensorView& codes, const TensorView& lo,
                                                             const TensorView& hi, const TensorView& centers,
                                                             const StaircaseOptions& options) {
  constexpr const char* kOp = "staircase_dequantize";
  StaircaseDequantizeParams params;
  check_value(codes.device == Device::kCpu, kOp, "codes is not on the CPU, which is where this op has kernels");
  check_value(codes.dtype == DType::kUInt8, kOp, "codes has dtype ", dtype_name(codes.dtype), " and must have uint8");
  int32_t dim = 0;
  fill_staircase_shape(kOp, "codes", codes, options, &params, &dim);
  check_span(kOp, "codes", codes);
  check_staircase_float(kOp, "lo", lo);
  TensorView wanted = codes;
  const std::vector<int64_t> sizes = staircase_groups(codes, params, dim);
  std::copy(sizes.begin(), sizes.end(), wanted.shape);
  const NamedView all[] = {{"lo", lo}, {"hi", hi}, {"centers", centers}};
  for (const auto& [name, view] : all) {
    if (!view.defined()) continue;
    const DType dtype = &view == &centers ? DType::kUInt8 : lo.dtype;
    check_value(view.device == Device::kCpu, kOp, name, " is not on the CPU, where codes is");
    check_value(view.dtype == dtype, kOp, name, " has dtype ", dtype_name(view.dtype), " and must have ",
                dtype_name(dtype));
    check_value(same_shape(view, wanted), kOp, name, " has shape ", shape_text(view), " and must have ",
                shape_text(wanted), ", one for each group of ", params.group_size);
  }
  const int64_t most = (int64_t{1} << params.bits) - 1, count = codes.count();
  const uint8_t* code = codes.as<const uint8_t>();
  for (int64_t i = 0; i < count && params.bits < 8; ++i) {
    check_value(code[i] <= most, kOp, "codes holds ", static_cast<int>(code[i]), " and must hold no more than ", most,
                " with ", params.bits, " bits");
  }
  params.dtype = lo.dtype;
  params.codes = code;
  params.lo = lo.as<const char>();
  params.hi = hi.as<const char>();
  params.centers = centers.defined() ? centers.as<const uint8_t>() : nullptr;
  return params;
}

}  // namespace pycore
