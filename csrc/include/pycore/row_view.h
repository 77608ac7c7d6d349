// SPDX-License-Identifier: Apache-2.0
// The rows of a [..., C] array whose leading dimensions have any shape and strides and whose last one is contiguous.
// Leading dimensions are merged where their strides allow it, so that most arrays have one row stride.
#pragma once

#include <pycore/tensor_view.h>

#include <cstdint>

namespace pycore {

struct RowView {
  const void* data = nullptr;
  int64_t rows = 1;
  int32_t dims = 0;  // leading dimensions left after merging, innermost first
  int64_t shape[kMaxDims - 1] = {};
  int64_t strides[kMaxDims - 1] = {};  // in elements

  bool uniform() const { return dims <= 1; }  // row r starts at element r * row_stride()
  int64_t row_stride() const { return dims ? strides[0] : 0; }

  int64_t offset(int64_t row) const {
    int64_t elements = 0;
    for (int32_t i = 0; i + 1 < dims; ++i) {
      elements += row % shape[i] * strides[i];
      row /= shape[i];
    }
    return dims ? elements + row * strides[dims - 1] : 0;
  }
  template <class T>
  const T* row(int64_t r) const {
    return static_cast<const T*>(data) + offset(r);
  }
};

// `view` has at least one dimension.
inline RowView row_view(const TensorView& view) {
  RowView out;
  out.data = view.data;
  for (int32_t i = view.dims - 2; i >= 0; --i) {
    const int64_t size = view.shape[i], stride = view.strides[i];
    out.rows *= size;
    if (size == 1) continue;
    if (out.dims > 0 && stride == out.strides[out.dims - 1] * out.shape[out.dims - 1]) {
      out.shape[out.dims - 1] *= size;
    } else {
      out.shape[out.dims] = size;
      out.strides[out.dims] = stride;
      ++out.dims;
    }
  }
  return out;
}

}  // namespace pycore
