// SPDX-License-Identifier: Apache-2.0
// The table of a call, and how work is cut. Included by the family's dispatching files.
#pragma once

#include <pycore/sizes.h>

#include <algorithm>
#include <cstring>

#include "../for_isa.h"
#include "kernels.h"

namespace pycore::pairwise {

inline const PairwiseKernels* kernels_for(DType dtype, CpuIsa isa) {
  if (dtype == DType::kFloat64) return &scalar::pairwise_double;
  if (dtype != DType::kFloat32) return nullptr;
  return &for_isa(isa, scalar::pairwise_float, avx2::pairwise_float, avx512::pairwise_float);
}

inline constexpr Status kNoKernel = {StatusCode::kUnsupported,
                                     "the pairwise kernels have no CPU version for this dtype"};
inline constexpr int64_t kSerialWork = 1 << 18;  // multiply-adds that are not worth waking a second thread for

inline int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }
inline Range part(int64_t index, int64_t size, int64_t total) {
  return {index * size, std::min((index + 1) * size, total)};
}
inline int64_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }
inline int64_t aligned(int64_t bytes) { return bytes > INT64_MAX - 63 ? INT64_MAX : (bytes + 63) / 64 * 64; }

inline int64_t work_of(const PairwiseParams& params) {
  return size_product({params.batch, params.rows, params.columns, std::max<int64_t>(params.dim, 1)});
}

inline constexpr int64_t kGroupRows = 6;  // of the tile product

// Rows of an item: enough of them to pay for turning the columns, few enough to go round, whole groups.
inline int64_t item_rows(int64_t batch, int64_t rows, int64_t threads) {
  const int64_t fair = parts(size_product({batch, rows}), std::max<int64_t>(threads, 1) * 2);
  return std::clamp<int64_t>(parts(fair, kGroupRows) * kGroupRows, kGroupRows, kPairwiseRows);
}

inline double number(const void* memory, DType dtype, int64_t index) {
  return dtype == DType::kFloat64 ? static_cast<const double*>(memory)[index]
                                  : static_cast<double>(static_cast<const float*>(memory)[index]);
}

inline void set_number(void* memory, DType dtype, int64_t index, double value) {
  if (dtype == DType::kFloat64) {
    static_cast<double*>(memory)[index] = value;
  } else {
    static_cast<float*>(memory)[index] = static_cast<float>(value);
  }
}

// A number of the call's dtype that a kernel writes.
struct Number {
  double memory = 0;
  DType dtype;
  explicit Number(DType type) : dtype(type) {}
  double get() const { return number(&memory, dtype, 0); }
};

}  // namespace pycore::pairwise
