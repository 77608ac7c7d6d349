// SPDX-License-Identifier: Apache-2.0
// Group quantization of a tensor: chooses the instruction set, and cuts the work into groups, which are what the
// kernels take. Nothing here decides a bit of the result.
#include <pycore/row_view.h>
#include <pycore/sizes.h>
#include <pycore/staircase/staircase.h>

#include <algorithm>
#include <atomic>

#include "../for_isa.h"
#include "kernels.h"

namespace pycore {

const StaircaseKernels& staircase_kernels(CpuIsa isa) {
  return for_isa(isa, scalar::staircase, avx2::staircase, avx512::staircase);
}

namespace {

constexpr int64_t kSerialElements = 1 << 16;  // not worth waking a second thread for
constexpr int64_t kItemElements = 1 << 14;    // at least, in an item

// Calls f(row, group) for every group, or every group of each channel: row = outer * inner + inner's index.
template <class F>
void for_each_group(const StaircaseShape& shape, const Parallel& parallel, const F& f) {
  const int64_t groups = shape.groups(), total = size_product({shape.outer, shape.inner, groups});
  if (shape.channels == 0) return;
  const int64_t elements =
      std::max<int64_t>(1, size_product({std::min(shape.group_size, shape.length), shape.channels}));
  const int64_t run = std::max<int64_t>(1, kItemElements / elements);
  const Parallel pool = limited(parallel, size_product({total, elements}), kSerialElements);
  for_each_item(pool, total / run + (total % run != 0), [&](int64_t, int64_t item) {
    for (int64_t i = item * run; i < std::min(total, (item + 1) * run); ++i) f(i / groups, i % groups);
  });
}

int64_t group_count(const StaircaseShape& shape, int64_t group) {
  return std::min(shape.group_size, shape.length - group * shape.group_size);
}

// Where element (row, t) is in a contiguous [outer, length, inner, channels].
int64_t place_of(const StaircaseShape& shape, int64_t length, int64_t row, int64_t t) {
  return ((row / shape.inner * length + t) * shape.inner + row % shape.inner) * shape.channels;
}

// The rows of x: of all its dimensions but the last and the one the groups run along.
struct Rows {
  explicit Rows(const StaircaseQuantizeParams& params) {
    TensorView rest = params.x;
    const int last = rest.dims - 1;
    stride = rest.strides[params.dim] * dtype_size(rest.dtype);
    if (params.dim != last) {
      for (int i = params.dim; i < last; ++i) {
        rest.shape[i] = rest.shape[i + 1];
        rest.strides[i] = rest.strides[i + 1];
      }
      --rest.dims;
    }
    view = row_view(rest);
  }
  RowView view;
  int64_t stride;  // bytes, from an element of a group to the next
};

GroupSource source_of(const StaircaseQuantizeParams& params, const Rows& rows, int64_t row, int64_t group) {
  GroupSource source;
  source.dtype = params.dtype;
  source.count = group_count(params, group);
  source.channels = params.channels;
  const int64_t size = dtype_size(params.dtype);
  // Along the last dimension the elements lie side by side, whatever a stride of one element says.
  source.second_stride = params.along_last ? size : rows.stride;
  source.second = static_cast<const char*>(rows.view.data) + rows.view.offset(row) * size +
                  group * params.group_size * source.second_stride;
  return source;
}

}  // namespace

int64_t staircase_fault(const StaircaseQuantizeParams& params, const Parallel& parallel) {
  const StaircaseKernels& kernels = staircase_kernels(params.isa);
  const Rows rows(params);
  std::atomic<int64_t> first{INT64_MAX};
  for_each_group(params, parallel, [&](int64_t row, int64_t group) {
    const GroupSource source = source_of(params, rows, row, group);
    const int64_t channel = params.along_last ? (kernels.row_fault(source) ? 0 : -1) : kernels.column_fault(source);
    if (channel < 0) return;
    const int64_t index = place_of(params, params.groups(), row, group) + channel;
    for (int64_t seen = first; index < seen && !first.compare_exchange_weak(seen, index);) {
    }
  });
  return first == INT64_MAX ? -1 : first.load();
}

Status staircase_quantize(const StaircaseQuantizeParams& params, const Parallel& parallel) {
  const StaircaseKernels& kernels = staircase_kernels(params.isa);
  const Rows rows(params);
  const int64_t size = dtype_size(params.dtype);
  for_each_group(params, parallel, [&](int64_t row, int64_t group) {
    const int64_t place = place_of(params, params.groups(), row, group);
    GroupResult result;
    result.grid = params.grid;
    result.bits = params.bits;
    result.lo = params.lo + place * size;
    result.hi = params.hi + place * size;
    result.widths[0] = params.bits;
    result.centers[0] = params.centers + place;
    result.codes = params.codes + place_of(params, params.length, row, group * params.group_size);
    result.code_stride = params.inner * params.channels;
    const GroupSource source = source_of(params, rows, row, group);
    params.along_last ? kernels.quantize_row(source, result) : kernels.quantize_columns(source, result);
  });
  return {};
}

Status staircase_dequantize(const StaircaseDequantizeParams& params, const Parallel& parallel) {
  const StaircaseKernels& kernels = staircase_kernels(params.isa);
  const int64_t size = dtype_size(params.dtype);
  for_each_group(params, parallel, [&](int64_t row, int64_t group) {
    const int64_t place = place_of(params, params.groups(), row, group), count = group_count(params, group);
    const int64_t first = place_of(params, params.length, row, group * params.group_size);
    const uint8_t* centers = params.centers ? params.centers + place : nullptr;
    const char *lo = params.lo + place * size, *hi = params.hi + place * size;
    char* out = params.out + first * size;
    if (params.along_last) {
      kernels.dequantize_row(params.dtype, params.grid, params.bits, count, params.codes + first, lo, hi, centers, out);
    } else {
      kernels.dequantize_columns(params.dtype, params.grid, params.bits, count, params.channels, params.codes + first,
                                 params.inner * params.channels, lo, hi, centers, out);
    }
  });
  return {};
}

}  // namespace pycore
