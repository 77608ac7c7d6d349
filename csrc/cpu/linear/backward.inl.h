// SPDX-License-Identifier: Apache-2.0
// The gradients of the linear layer on the tile product. The weight (for x) or x (for the weight) lies in panels as the
// weight does forward; neither has to be transposed.
#pragma once

#include <pycore/dtype.h>
#include <pycore/linear/linear.h>

#include <cstdint>

#include "linear.inl.h"

constexpr int64_t kBorrowedRows = 24;  // fewer rows than this do not pay for a copy of the weight in grad_x

struct BackwardScratch {
  float panels[kLinearBlock * kWeightColumns];  // [depth][kPanel], kWeightColumns / kPanel of them; grad_x has one
  float rows[kLinearBlock * kWeightRows];       // [depth][kWeightRows], or gathered rows as forward
};

void grad_x_float(const LinearBackwardParams& params, Range rows, Range columns, BackwardScratch* scratch) {
  const int64_t depth = params.out_features;
  for (int64_t column = columns.begin; column < columns.end; column += kPanel) {
    const int64_t width = smaller(kPanel, columns.end - column);
    int64_t n = 0;
    do {
      const int64_t end = smaller(n + kLinearBlock, depth);
      const float* weight = static_cast<const float*>(params.weight) + n * params.weight_stride + column;
      const bool copy = rows.count() >= kBorrowedRows;
      for (int64_t i = 0; copy && i < end - n; ++i) {
        copy_row(weight + i * params.weight_stride, width, scratch->panels + i * kPanel);
      }
      const BlockSum sum = {static_cast<float*>(params.grad_x) + rows.begin * params.in_features + column,
                            params.in_features, nullptr, n == 0};
      multiply_rows(params.grad_out, rows, n, end - n, copy ? scratch->panels : weight,
                    copy ? kPanel : params.weight_stride, width, sum, scratch->rows);
      n = end;
    } while (n < depth);
  }
}

template <DType kType>
void linear_grad_x_item(const LinearBackwardParams& params, Range rows, Range columns, void* memory) {
  if constexpr (kType == DType::kFloat32) {
    grad_x_float(params, rows, columns, static_cast<BackwardScratch*>(memory));
  } else {
    const auto pack = [&](int64_t n, int64_t depth, int64_t column, int64_t width,
                          float* panel) __attribute__((always_inline)) {
      const int64_t stride = params.weight_stride * kElementBytes<kType>;
      const char* weight = static_cast<const char*>(params.weight) + n * stride + column * kElementBytes<kType>;
#ifdef PYCORE_BFLOAT16_PRODUCTS
      for (int64_t i = 0; i < depth; i += 2) {
        for (int64_t c = 0; c < width; c += Vec::kWidth) {
          const int64_t count = smaller(Vec::kWidth, width - c);
          const Vec first = load_some<kType>(weight + i * stride, c, count);
          const Vec second = i + 1 < depth ? load_some<kType>(weight + (i + 1) * stride, c, count) : Vec::zero();
          Vec::pairs(first, second).store(panel + i / 2 * kHalfPanel + c);
        }
      }
#else
      for (int64_t i = 0; i < depth; ++i) convert_row<kType>(weight + i * stride, width, panel + i * kHalfPanel);
#endif
    };
    // Panels are read along their rows, which needs no help.
    HalfScratch* const scratch = static_cast<HalfScratch*>(memory);
    const auto from = [&](int64_t, int64_t) { return Fetched{reinterpret_cast<const char*>(scratch->panels), 0}; };
    half_product<kType>(params.grad_out, rows, columns, params.out_features, pack, from, nullptr, params.grad_x,
                        params.in_features, scratch);
  }
}

// float32 sums lie in the result itself, others in scratch until the last block of rows.
template <DType kType>
void linear_grad_weight_item(const LinearBackwardParams& params, Range outs, Range columns, void* memory) {
  constexpr bool kFloat = kType == DType::kFloat32;
  float *panels, *rows, *sums;
  int64_t sum_row = params.in_features;
  if constexpr (kFloat) {
    BackwardScratch* scratch = static_cast<BackwardScratch*>(memory);
    panels = scratch->panels;
    rows = scratch->rows;
    sums = static_cast<float*>(params.grad_weight) + outs.begin * params.in_features + columns.begin;
  } else {
    HalfScratch* scratch = static_cast<HalfScratch*>(memory);
    panels = scratch->panels;
    rows = scratch->rows;
    sums = scratch->sums;
    sum_row = kWeightColumns;
  }
  int64_t row = 0;
  do {
    const int64_t end = smaller(row + kLinearBlock, params.x.rows), depth = end - row;
    for (int64_t r = 0; r < depth; ++r) {
      convert_row<kType>(row_bytes<kType>(params.grad_out, row + r) + outs.begin * kElementBytes<kType>, outs.count(),
                         rows + r * kWeightRows);
      const char* x = row_bytes<kType>(params.x, row + r);
      for (int64_t column = columns.begin, p = 0; column < columns.end; column += kPanel, ++p) {
        convert_row<kType>(x + column * kElementBytes<kType>, smaller(kPanel, columns.end - column),
                           panels + (p * kLinearBlock + r) * kPanel);
      }
    }
    for (int64_t column = columns.begin, p = 0; column < columns.end; column += kPanel, ++p) {
      const float* panel = panels + p * kLinearBlock * kPanel;
      for (int64_t n = outs.begin; n < outs.end; n += kProductRows) {
        const BlockSum sum = {sums + (n - outs.begin) * sum_row + (column - columns.begin), sum_row, nullptr, row == 0};
        tile_product<true>(smaller(kProductRows, outs.end - n), depth, rows + (n - outs.begin), kWeightRows, panel,
                           kPanel, 0, smaller(kPanel, columns.end - column), sum);
      }
    }
    row = end;
  } while (row < params.x.rows);
  for (int64_t n = outs.begin; !kFloat && n < outs.end; ++n) {
    char* const out = static_cast<char*>(params.grad_weight) + n * params.in_features * kElementBytes<kType>;
    for (int64_t k = columns.begin; k < columns.end; k += Vec::kWidth) {
      const int64_t count = smaller(Vec::kWidth, columns.end - k);
      store_some<kType>(load_lanes(sums + (n - outs.begin) * sum_row + (k - columns.begin), count), out, k, count);
    }
  }
}

template <DType kType>
void linear_grad_bias_item(const LinearBackwardParams& params, Range outs) {
  float chain[kBiasColumns], total[kBiasColumns], row_copy[kBiasColumns];
  for (int64_t n = 0; n < outs.count(); ++n) total[n] = 0.0f;
  for (int64_t block = 0; block < params.x.rows; block += kLinearBlock) {
    for (int64_t n = 0; n < outs.count(); ++n) chain[n] = 0.0f;
    const int64_t end = smaller(block + kLinearBlock, params.x.rows);
    for (int64_t row = block; row < end; ++row) {
      const char* grad = row_bytes<kType>(params.grad_out, row) + outs.begin * kElementBytes<kType>;
      const float* values = reinterpret_cast<const float*>(grad);
      if constexpr (kType != DType::kFloat32) {
        convert_row<kType>(grad, outs.count(), row_copy);
        values = row_copy;
      }
      for (int64_t n = 0; n < outs.count(); ++n) chain[n] += values[n];
    }
    for (int64_t n = 0; n < outs.count(); ++n) total[n] = block == 0 ? chain[n] : total[n] + chain[n];
  }
  char* const out = static_cast<char*>(params.grad_bias) + outs.begin * kElementBytes<kType>;
  for (int64_t n = 0; n < outs.count(); n += Vec::kWidth) {
    const int64_t count = smaller(Vec::kWidth, outs.count() - n);
    store_some<kType>(load_lanes(total + n, count), out, n, count);
  }
}
