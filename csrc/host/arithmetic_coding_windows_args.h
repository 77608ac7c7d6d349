// SPDX-License-Identifier: Apache-2.0
// What the face refuses for the windows' kernels, and how it fills their parameter structs.
#pragma once

#include <pycore/arithmetic_coding/windows.h>

#include <vector>

#include "arithmetic_coding_args.h"

namespace pycore {

// The caller adds cumulative and faults.
inline WindowCountsParams window_counts_params(const char* op, const TensorView& probs) {
  check_on_cpu(op, "probs", probs);
  check_value(is_floating(probs.dtype), op, "probs has dtype ", dtype_name(probs.dtype),
              " and must have float32, float64, float16 or bfloat16");
  check_value(probs.dims == 2, op, "probs has shape ", shape_text(probs), " and must be [rows, symbols]");
  check_value(probs.shape[1] >= 2 && probs.shape[1] <= kMaxWindowSymbols, op, "probs has ", probs.shape[1],
              " symbols and must have 2 to ", kMaxWindowSymbols);
  WindowCountsParams params;
  params.dtype = probs.dtype;
  params.symbols = probs.shape[1];
  params.probs = row_view(probs);
  params.entry_stride = probs.strides[1];
  return params;
}

inline void check_walks(const char* op, const char* argument, const TensorView& view, int64_t walks) {
  check_on_cpu(op, argument, view);
  check_value(view.dtype == DType::kInt64 && view.dims == 1 && view.shape[0] == walks, op, argument, " is ",
              dtype_name(view.dtype), " ", shape_text(view), " and must be int64 [", walks, "]");
  check_contiguous(op, argument, view);
}

// Everything is checked that a step reads, so that no input can lead it out of its node. `argument` names `in`. The
// caller replaces start and size by copies that may be written to, and adds the results. What is
// followed into memory is kept in `copies`.
inline WindowStepParams window_step_params(const char* op, const TensorView& cumulative, const TensorView& rows,
                                           const TensorView& start, const TensorView& size, const char* argument,
                                           const TensorView& in, int64_t bits, bool decoding, IndexCopies* copies) {
  check_value(bits >= 1 && bits <= kMaxWindowBits, op, "bits is ", bits, " and must be 1 to ", kMaxWindowBits);
  check_on_cpu(op, "cumulative", cumulative);
  check_value(cumulative.dtype == DType::kInt64 && cumulative.dims == 2, op, "cumulative is ",
              dtype_name(cumulative.dtype), " ", shape_text(cumulative), " and must be int64 [rows, symbols + 1]");
  const int64_t symbols = cumulative.shape[1] - 1, row_count = cumulative.shape[0];
  check_contiguous(op, "cumulative", cumulative);
  const int64_t all = int64_t{1} << bits;
  check_value(symbols >= 2 && symbols <= all && symbols <= kMaxWindowSymbols, op, "cumulative has ", symbols,
              " symbols and must have 2 to ", all < kMaxWindowSymbols ? all : kMaxWindowSymbols, " at ", bits, " bits");
  check_value(rows.dims == 1, op, "rows has shape ", shape_text(rows), " and must be [walks]");
  WindowStepParams params;
  params.walks = rows.shape[0];
  check_walks(op, "rows", rows, params.walks);
  check_walks(op, "start", start, params.walks);
  check_walks(op, "size", size, params.walks);
  check_walks(op, argument, in, params.walks);
  params.bits = static_cast<int>(bits);
  params.symbols = symbols;
  const auto kept = [&](const TensorView& view) { return copies->keep(op, view.as<const int64_t>(), view.count()); };
  params.cumulative = kept(cumulative);
  params.rows = kept(rows);
  params.in = kept(in);
  params.start = const_cast<int64_t*>(kept(start));
  params.size = const_cast<int64_t*>(kept(size));
  for (int64_t row = 0; row < row_count; ++row) {
    const int64_t* sums = params.cumulative + row * (symbols + 1);
    bool rises = sums[0] == 0 && sums[symbols] > 0;
    for (int64_t i = 0; i < symbols; ++i) rises &= sums[i] <= sums[i + 1];
    check_value(rises, op, "cumulative[", row, "] must rise from 0 to more than 0");
  }
  for (int64_t walk = 0; walk < params.walks; ++walk) {
    const int64_t first = params.start[walk], count = params.size[walk], value = params.in[walk];
    check_index(params.rows[walk] >= 0 && params.rows[walk] < row_count, op, "rows[", walk, "] is ", params.rows[walk],
                " and must be 0 to ", row_count - 1);
    check_value(count >= 2 && count <= all && first >= 0 && first <= all - count, op, "start[", walk, "] and size[",
                walk, "] are ", first, " and ", count, " and must be a node of at least 2 of the 2^", bits,
                " codewords");
    const int64_t low = decoding ? first : 0, high = decoding ? first + count - 1 : symbols - 1;
    check_index(value >= low && value <= high, op, argument, "[", walk, "] is ", value, " and must be ", low, " to ",
                high);
  }
  return params;
}

}  // namespace pycore
