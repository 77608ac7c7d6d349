// SPDX-License-Identifier: Apache-2.0
// Linear layers and RMS norm on the CPU: picks the instruction set, cuts the work into items and hands them to threads.
// Nothing here decides a bit of the result, with one exception that looks at the number of rows alone: the chunks of
// rows that the norm's weight gradient is summed by.
#include <pycore/cpu_isa.h>
#include <pycore/float_environment.h>
#include <pycore/sizes.h>

#include <algorithm>

#include "../for_isa.h"
#include "kernels.h"

namespace pycore {
namespace {

const LinearKernels* kernels_for(DType dtype, CpuIsa isa) {
  if (dtype == DType::kFloat64) return &scalar::linear_double;
  if (dtype != DType::kFloat32) return nullptr;
  return &for_isa(isa, scalar::linear_float, avx2::linear_float, avx512::linear_float);
}

constexpr Status kNoKernel = {StatusCode::kUnsupported, "the linear kernels have no CPU version for this dtype"};
constexpr int64_t kMaxItemRows = 384, kMinItemRows = 96;
constexpr int64_t kSerialWork = 1 << 19;  // multiply-adds that are not worth waking a second thread for
constexpr int64_t kNormChunks = 64;       // at most

int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }
Range part(int64_t index, int64_t size, int64_t total) { return {index * size, std::min((index + 1) * size, total)}; }

// Rows of an item: enough of them to pay for packing the columns, few enough to go round.
int64_t item_rows(int64_t rows, int64_t column_items, int64_t threads) {
  const int64_t wanted = size_product({rows, column_items}) / (4 * std::max<int64_t>(threads, 1));
  return std::clamp(parts(wanted, 12) * 12, kMinItemRows, kMaxItemRows);
}

int64_t norm_chunk_rows(int64_t rows) {
  return parts(std::max<int64_t>(parts(rows, kNormChunks), 1), kNormRowBlock) * kNormRowBlock;
}

int64_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

template <class T>
void add_chunks(const void* partials, int64_t chunks, int64_t channels, void* out) {
  const T* row = static_cast<const T*>(partials);
  T* total = static_cast<T*>(out);
  std::fill(total, total + channels, T(0));
  for (int64_t chunk = 0; chunk < chunks; ++chunk, row += channels) {
    for (int64_t c = 0; c < channels; ++c) total[c] += row[c];
  }
}

}  // namespace

int64_t linear_forward_scratch(const LinearParams& params, int64_t threads) {
  const LinearKernels* kernels = kernels_for(params.dtype, params.isa);
  return kernels && params.x.rows > 1 ? size_product({threads, kernels->forward_scratch}) : 0;
}

Status linear_forward(const LinearParams& params, const Parallel& parallel, void* scratch) {
  const LinearKernels* kernels = kernels_for(params.dtype, params.isa);
  if (!kernels) return kNoKernel;
  const int64_t rows = params.x.rows, columns = params.out_features;
  const int64_t column_items = parts(columns, kLinearColumns);
  const int64_t height = item_rows(rows, column_items, parallel.threads);
  const Parallel pool = limited(parallel, size_product({rows, columns, params.in_features}), kSerialWork);
  for_each_item(pool, parts(rows, height) * column_items, [&](int64_t slot, int64_t item) {
    kernels->forward(params, part(item / column_items, height, rows),
                     part(item % column_items, kLinearColumns, columns),
                     static_cast<char*>(scratch) + slot * kernels->forward_scratch);
  });
  return {};
}

int64_t linear_backward_scratch(const LinearBackwardParams& params, int64_t threads) {
  const LinearKernels* kernels = kernels_for(params.dtype, params.isa);
  return kernels ? size_product({threads, kernels->backward_scratch}) : 0;
}

Status linear_backward(const LinearBackwardParams& params, const Parallel& parallel, void* scratch) {
  const LinearKernels* kernels = kernels_for(params.dtype, params.isa);
  if (!kernels) return kNoKernel;
  const int64_t rows = params.x.rows, ins = params.in_features, outs = params.out_features;
  const int64_t column_items = parts(ins, kLinearColumns);
  const int64_t height = item_rows(rows, column_items, parallel.threads);
  const int64_t weight_columns = parts(ins, kWeightColumns);
  const int64_t weight_items = params.grad_weight ? parts(outs, kWeightRows) * weight_columns : 0;
  const int64_t x_items = params.grad_x ? parts(rows, height) * column_items : 0;
  const int64_t bias_items = params.grad_bias ? parts(outs, kBiasColumns) : 0;
  const Parallel pool = limited(parallel, size_product({rows, ins, outs}), kSerialWork);
  // One list, the largest items first, so that no thread waits between the three gradients.
  for_each_item(pool, weight_items + x_items + bias_items, [&](int64_t slot, int64_t item) {
    void* slot_scratch = static_cast<char*>(scratch) + slot * kernels->backward_scratch;
    if (item < weight_items) {
      kernels->grad_weight(params, part(item / weight_columns, kWeightRows, outs),
                           part(item % weight_columns, kWeightColumns, ins), slot_scratch);
      return;
    }
    item -= weight_items;
    if (item < x_items) {
      kernels->grad_x(params, part(item / column_items, height, rows), part(item % column_items, kLinearColumns, ins),
                      slot_scratch);
      return;
    }
    kernels->grad_bias(params, part(item - x_items, kBiasColumns, outs));
  });
  return {};
}

Status rms_norm_forward(const RmsNormParams& params, const Parallel& parallel) {
  const LinearKernels* kernels = kernels_for(params.dtype, params.isa);
  if (!kernels) return kNoKernel;
  const int64_t rows = params.x.rows;
  const int64_t height = std::max<int64_t>(1, kSerialWork / 8 / std::max<int64_t>(params.channels, 1));
  const Parallel pool = limited(parallel, size_product({4, rows, params.channels}), kSerialWork);
  for_each_item(pool, parts(rows, height),
                [&](int64_t, int64_t item) { kernels->norm(params, part(item, height, rows)); });
  return {};
}

int64_t rms_norm_backward_scratch(const RmsNormBackwardParams& params, int64_t threads) {
  if (!params.grad_weight) return 0;
  const int64_t chunks = parts(params.x.rows, norm_chunk_rows(params.x.rows));
  return size_product({chunks + threads, params.channels, element_size(params.dtype)});
}

Status rms_norm_backward(const RmsNormBackwardParams& params, const Parallel& parallel, void* scratch) {
  const LinearKernels* kernels = kernels_for(params.dtype, params.isa);
  if (!kernels) return kNoKernel;
  const int64_t rows = params.x.rows, height = norm_chunk_rows(rows), chunks = parts(rows, height);
  const int64_t row_bytes = params.channels * element_size(params.dtype);
  char* partials = static_cast<char*>(scratch);                                 // [chunks, channels]
  char* chains = params.grad_weight ? partials + chunks * row_bytes : nullptr;  // [threads, channels]
  const Parallel pool = limited(parallel, size_product({8, rows, params.channels}), kSerialWork);
  for_each_item(pool, chunks, [&](int64_t slot, int64_t item) {
    void* partial = params.grad_weight ? partials + item * row_bytes : nullptr;
    void* chain = params.grad_weight ? chains + slot * row_bytes : nullptr;
    kernels->norm_backward(params, part(item, height, rows), partial, chain);
  });
  if (!params.grad_weight) return {};
  const FixedFloats fixed;
  if (params.dtype == DType::kFloat64) {
    add_chunks<double>(partials, chunks, params.channels, params.grad_weight);
  } else {
    add_chunks<float>(partials, chunks, params.channels, params.grad_weight);
  }
  return {};
}

}  // namespace pycore
