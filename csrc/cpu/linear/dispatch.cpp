// SPDX-License-Identifier: Apache-2.0
// The linear family on the CPU: picks the instruction set, cuts the work into items and hands them to threads.
// Nothing here decides a bit of the result, with one exception that looks at the number of rows alone: the chunks of
// rows that the norms' weight gradients are summed by.
#include <pycore/cpu_isa.h>
#include <pycore/dtype.h>
#include <pycore/float_environment.h>
#include <pycore/portable_math.h>
#include <pycore/sizes.h>

#include <algorithm>
#include <initializer_list>

#include "../for_isa.h"
#include "kernels.h"

namespace pycore {
namespace {

const LinearKernels* kernels_for(DType dtype, CpuIsa isa) {
  switch (dtype) {
    case DType::kFloat64: return &scalar::linear_double;
    case DType::kFloat32: return &for_isa(isa, scalar::linear_float, avx2::linear_float, avx512::linear_float);
    case DType::kBFloat16:
      if (isa == CpuIsa::kAvx512 && cpu_has_bfloat16_products()) return &avx512_bf16::linear_bfloat16;
      return &for_isa(isa, scalar::linear_bfloat16, avx2::linear_bfloat16, avx512::linear_bfloat16);
    case DType::kFloat16: return &for_isa(isa, scalar::linear_float16, avx2::linear_float16, avx512::linear_float16);
    default: return nullptr;
  }
}

constexpr Status kNoKernel = {StatusCode::kUnsupported, "the linear kernels have no CPU version for this dtype"};
constexpr int64_t kMinItemRows = 96;
constexpr int64_t kSerialWork = 1 << 19;      // multiply-adds that are not worth waking a second thread for
constexpr int64_t kFewSerialBytes = 1 << 17;  // the same of few rows, in bytes of the weight
constexpr int64_t kFewColumns = 32;           // what an item of few rows has a multiple of
constexpr int64_t kFewItemBytes = 1 << 21;    // and the least of the weight, if each thread is to have several
constexpr int64_t kNormChunks = 64;           // at most

int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }
Range part(int64_t index, int64_t size, int64_t total) { return {index * size, std::min((index + 1) * size, total)}; }

// Rows of an item: enough of them to pay for packing the columns, few enough to go round.
int64_t item_rows(int64_t rows, int64_t column_items, int64_t threads, int64_t most_rows) {
  const int64_t wanted = size_product({rows, column_items}) / (4 * std::max<int64_t>(threads, 1));
  return std::clamp(parts(wanted, 12) * 12, kMinItemRows, most_rows);
}

// Columns of an item. Few rows read the weight, whose next rows are fetched ahead within an item and not beyond. In 16
// bits an item's rows are converted, which more columns share. Both where there are items enough.
int64_t item_columns(int64_t rows, int64_t columns, int64_t depth, int64_t threads, DType dtype, int64_t most_columns) {
  if (rows <= kFewRows) {
    const int64_t bytes = size_product({columns, depth, dtype_size(dtype)}), slots = std::max<int64_t>(threads, 1);
    const int64_t items = slots * std::clamp<int64_t>(bytes / (slots * kFewItemBytes), 1, 8);
    return std::max<int64_t>(parts(parts(columns, items), kFewColumns), 1) * kFewColumns;
  }
  int64_t width = most_columns;
  while (width > kLinearColumns && size_product({parts(rows, kMaxHalfRows), parts(columns, width)}) < 8 * threads) {
    width /= 2;
  }
  return width;
}

int64_t norm_chunk_rows(int64_t rows) {
  return parts(std::max<int64_t>(parts(rows, kNormChunks), 1), kNormRowBlock) * kNormRowBlock;
}

// Sums over rows are kept in float32, or in float64 where that is the dtype.
int64_t sum_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

template <class T>
void store_sum(T sum, DType dtype, void* out, int64_t c) {
  switch (dtype) {
    case DType::kBFloat16: static_cast<uint16_t*>(out)[c] = bfloat16_from_float(static_cast<float>(sum)); return;
    case DType::kFloat16: static_cast<uint16_t*>(out)[c] = float16_from_float(static_cast<float>(sum)); return;
    default: static_cast<T*>(out)[c] = sum;
  }
}

// out[c] = the sum of the chunks' partials, in order, rounded once; `stride` sums from one chunk to the next.
template <class T>
void add_chunks(const void* partials, int64_t chunks, int64_t channels, int64_t stride, DType dtype, void* out) {
  for (int64_t c = 0; c < channels; ++c) {
    const T* partial = static_cast<const T*>(partials) + c;
    T total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk * stride];
    store_sum(total, dtype, out, c);
  }
}

void finish_sums(const void* partials, int64_t chunks, int64_t channels, int64_t stride, DType dtype, void* out) {
  if (out == nullptr) return;
  const FixedFloats fixed;
  if (dtype == DType::kFloat64) {
    add_chunks<double>(partials, chunks, channels, stride, dtype, out);
  } else {
    add_chunks<float>(partials, chunks, channels, stride, dtype, out);
  }
}

// A norm's rows, one after another on as many threads as pay.
template <class Body>
void for_norm_rows(int64_t rows, int64_t channels, const Parallel& parallel, const Body& body) {
  const int64_t height = std::max<int64_t>(1, kSerialWork / 8 / std::max<int64_t>(channels, 1));
  const Parallel pool = limited(parallel, size_product({4, rows, channels}), kSerialWork);
  for_each_item(pool, parts(rows, height), [&](int64_t, int64_t item) { body(part(item, height, rows)); });
}

// The same in the chunks that `sums` numbers a row are summed by: body(rows, partial, chain). scratch: [chunks +
// threads] of them, or unused where sums is zero.
template <class Body>
void for_norm_chunks(int64_t rows, int64_t channels, int64_t sums, DType dtype, const Parallel& parallel, void* scratch,
                     const Body& body) {
  const int64_t height = norm_chunk_rows(rows), chunks = parts(rows, height), row_bytes = sums * sum_size(dtype);
  char* partials = static_cast<char*>(scratch);
  const Parallel pool = limited(parallel, size_product({8, rows, channels}), kSerialWork);
  for_each_item(pool, chunks, [&](int64_t slot, int64_t item) {
    char* partial = sums ? partials + item * row_bytes : nullptr;
    body(part(item, height, rows), partial, sums ? partials + (chunks + slot) * row_bytes : nullptr);
  });
}

// Elements of [rows, channels] in pieces; where every view is one run, rows do not matter.
template <class Params, class Kernel>
void for_elements(Params* params, std::initializer_list<RowView*> views, const Parallel& parallel,
                  const Kernel& kernel) {
  constexpr int64_t kPiece = 16384;
  const int64_t total = size_product({views.begin()[0]->rows, params->channels});
  const bool flat = std::all_of(views.begin(), views.end(), [&](const RowView* view) {
    return view->dims == 0 || (view->dims == 1 && view->strides[0] == params->channels);
  });
  if (flat && total > 0) {
    for (RowView* view : views) {
      view->rows = 1;
      view->dims = 0;
    }
    params->channels = total;
  }
  const Parallel pool = limited(parallel, size_product({16, total}), kSerialWork);
  for_each_item(pool, parts(total, kPiece), [&](int64_t, int64_t item) { kernel(part(item, kPiece, total)); });
}

}  // namespace

int64_t linear_forward_scratch(const LinearParams& params, int64_t threads) {
  const LinearKernels* kernels = kernels_for(params.dtype, params.isa);
  return kernels && params.x.rows > kFewRows ? size_product({threads, kernels->forward_scratch}) : 0;
}

Status linear_forward(const LinearParams* layers, int64_t count, const Parallel& parallel, void* scratch) {
  const LinearParams& first = layers[0];
  const LinearKernels* kernels = kernels_for(first.dtype, first.isa);
  if (!kernels) return kNoKernel;
  const int64_t rows = first.x.rows, depth = first.in_features;
  int64_t columns = 0;
  for (int64_t i = 0; i < count; ++i) columns += layers[i].out_features;
  const int64_t width = item_columns(rows, columns, depth, parallel.threads, first.dtype, kernels->most_columns);
  const int64_t column_items = parts(columns, width);
  const int64_t height = item_rows(rows, column_items, parallel.threads, kernels->most_rows);
  const Parallel pool =
      rows <= kFewRows ? limited(parallel, size_product({columns, depth, dtype_size(first.dtype)}), kFewSerialBytes)
                       : limited(parallel, size_product({rows, columns, depth}), kSerialWork);
  for_each_item(pool, parts(rows, height) * column_items, [&](int64_t slot, int64_t item) {
    const FlushedFloats flushed(first.dtype == DType::kBFloat16);
    const Range all = part(item % column_items, width, columns);
    int64_t before = 0;  // columns of the layers before this one
    for (int64_t i = 0; i < count; before += layers[i++].out_features) {
      const Range own = {std::max(all.begin - before, int64_t{0}), std::min(all.end - before, layers[i].out_features)};
      if (own.count() <= 0) continue;
      kernels->forward(layers[i], part(item / column_items, height, rows), own,
                       static_cast<char*>(scratch) + slot * kernels->forward_scratch);
    }
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
  const int64_t width = rows > kFewRows
                            ? item_columns(rows, ins, outs, parallel.threads, params.dtype, kernels->most_columns)
                            : kLinearColumns;
  const int64_t column_items = parts(ins, width);
  const int64_t height = item_rows(rows, column_items, parallel.threads, kernels->most_rows);
  const int64_t weight_columns = parts(ins, kWeightColumns);
  const int64_t weight_items = params.grad_weight ? parts(outs, kWeightRows) * weight_columns : 0;
  const int64_t x_items = params.grad_x ? parts(rows, height) * column_items : 0;
  const int64_t bias_items = params.grad_bias ? parts(outs, kBiasColumns) : 0;
  const Parallel pool = limited(parallel, size_product({rows, ins, outs}), kSerialWork);
  // One list, the largest items first, so that no thread waits between the three gradients.
  for_each_item(pool, weight_items + x_items + bias_items, [&](int64_t slot, int64_t item) {
    const FlushedFloats flushed(params.dtype == DType::kBFloat16);
    void* slot_scratch = static_cast<char*>(scratch) + slot * kernels->backward_scratch;
    if (item < weight_items) {
      kernels->grad_weight(params, part(item / weight_columns, kWeightRows, outs),
                           part(item % weight_columns, kWeightColumns, ins), slot_scratch);
      return;
    }
    item -= weight_items;
    if (item < x_items) {
      kernels->grad_x(params, part(item / column_items, height, rows), part(item % column_items, width, ins),
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
  for_norm_rows(params.x.rows, params.channels, parallel, [&](Range rows) { kernels->norm(params, rows); });
  return {};
}

int64_t rms_norm_backward_scratch(const RmsNormBackwardParams& params, int64_t threads) {
  if (!params.grad_weight) return 0;
  const int64_t chunks = parts(params.x.rows, norm_chunk_rows(params.x.rows));
  return size_product({chunks + threads, params.channels, sum_size(params.dtype)});
}

Status rms_norm_backward(const RmsNormBackwardParams& params, const Parallel& parallel, void* scratch) {
  const LinearKernels* kernels = kernels_for(params.dtype, params.isa);
  if (!kernels) return kNoKernel;
  const int64_t rows = params.x.rows, channels = params.channels, sums = params.grad_weight ? channels : 0;
  for_norm_chunks(rows, channels, sums, params.dtype, parallel, scratch, [&](Range part, void* partial, void* chain) {
    kernels->norm_backward(params, part, partial, chain);
  });
  finish_sums(scratch, parts(rows, norm_chunk_rows(rows)), channels, sums, params.dtype, params.grad_weight);
  return {};
}

Status layer_norm_forward(const LayerNormParams& params, const Parallel& parallel) {
  const LinearKernels* kernels = kernels_for(params.dtype, params.isa);
  if (!kernels) return kNoKernel;
  for_norm_rows(params.x.rows, params.channels, parallel, [&](Range rows) { kernels->layer_norm(params, rows); });
  return {};
}

int64_t layer_norm_backward_scratch(const LayerNormBackwardParams& params, int64_t threads) {
  if (!params.grad_weight && !params.grad_bias) return 0;
  const int64_t chunks = parts(params.x.rows, norm_chunk_rows(params.x.rows));
  return size_product({chunks + threads, 2, params.channels, sum_size(params.dtype)});
}

Status layer_norm_backward(const LayerNormBackwardParams& params, const Parallel& parallel, void* scratch) {
  const LinearKernels* kernels = kernels_for(params.dtype, params.isa);
  if (!kernels) return kNoKernel;
  const int64_t rows = params.x.rows, channels = params.channels;
  const int64_t sums = params.grad_weight || params.grad_bias ? 2 * channels : 0;
  for_norm_chunks(rows, channels, sums, params.dtype, parallel, scratch, [&](Range part, void* partial, void* chain) {
    kernels->layer_norm_backward(params, part, partial, chain);
  });
  const int64_t chunks = parts(rows, norm_chunk_rows(rows));
  const char* bias_sums = static_cast<const char*>(scratch) + (sums ? channels * sum_size(params.dtype) : 0);
  finish_sums(scratch, chunks, channels, sums, params.dtype, params.grad_weight);
  finish_sums(bias_sums, chunks, channels, sums, params.dtype, params.grad_bias);
  return {};
}

Status gated_forward(const GatedParams& given, const Parallel& parallel) {
  const LinearKernels* kernels = kernels_for(given.dtype, given.isa);
  if (!kernels) return kNoKernel;
  GatedParams params = given;
  for_elements(&params, {&params.gate, &params.up}, parallel,
               [&](Range elements) { kernels->gated(params, elements); });
  return {};
}

Status gated_backward(const GatedBackwardParams& given, const Parallel& parallel) {
  const LinearKernels* kernels = kernels_for(given.dtype, given.isa);
  if (!kernels) return kNoKernel;
  GatedBackwardParams params = given;
  for_elements(&params, {&params.grad_out, &params.gate, &params.up}, parallel,
               [&](Range elements) { kernels->gated_backward(params, elements); });
  return {};
}

Status rotate_forward(const RotateParams& params, const Parallel& parallel) {
  const LinearKernels* kernels = kernels_for(params.dtype, params.isa);
  if (!kernels) return kNoKernel;
  for_norm_rows(params.x.rows, params.channels, parallel, [&](Range rows) { kernels->rotate(params, rows); });
  return {};
}

Status softcap_forward(const SoftcapParams& given, const Parallel& parallel) {
  const LinearKernels* kernels = kernels_for(given.dtype, given.isa);
  if (!kernels) return kNoKernel;
  SoftcapParams params = given;
  const auto kernel = [&](Range elements) { kernels->softcap(params, elements); };
  if (params.has_grad) {
    for_elements(&params, {&params.x, &params.grad_out}, parallel, kernel);
  } else {
    for_elements(&params, {&params.x}, parallel, kernel);
  }
  return {};
}

// In float64 and of one formula, on every instruction set.
Status rotary_tables(const RotaryTablesParams& params, const Parallel& parallel) {
  const int64_t rows = params.rows, pairs = params.pairs;
  const int64_t height = std::max<int64_t>(1, 1024 / std::max<int64_t>(pairs, 1));
  const Parallel pool = limited(parallel, size_product({128, rows, pairs}), kSerialWork);
  for_each_item(pool, parts(rows, height), [&](int64_t, int64_t item) {
    const Range range = part(item, height, rows);
    for (int64_t r = range.begin; r < range.end; ++r) {
      for (int64_t i = 0; i < pairs; ++i) {
        const CosSin of = portable_cos_sin(static_cast<double>(params.positions[r]) * params.frequencies[i]);
        if (params.dtype == DType::kFloat64) {
          static_cast<double*>(params.cos)[r * pairs + i] = of.cos;
          static_cast<double*>(params.sin)[r * pairs + i] = of.sin;
        } else {
          static_cast<float*>(params.cos)[r * pairs + i] = static_cast<float>(of.cos);
          static_cast<float*>(params.sin)[r * pairs + i] = static_cast<float>(of.sin);
        }
      }
    }
  });
  return {};
}

}  // namespace pycore
