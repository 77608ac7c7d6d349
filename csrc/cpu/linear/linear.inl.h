// SPDX-License-Identifier: Apache-2.0
// The linear kernels on the tile product. A product's columns lie in panels of kPanel: the weight transposed (forward),
// the weight (grad_x) or x (grad_weight), copied so that the product reads one stream. Copies go to scratch that stays
// in the second cache.

#pragma once

#include <pycore/linear/linear.h>

#include <cstdint>

#include "../tile_product.inl.h"
#include "../vector_rows.inl.h"
#include "kernels.h"

constexpr int64_t kPanel = Vec::kProductColumns * Vec::kWidth;
// With few rows a panel is read once. Then it is narrow, because each of its columns is a row of the weight and the
// machine can follow some 16 streams, and goes through in slices of the depth that stay in the first cache.
constexpr int64_t kFewRows = kProductRows, kFewColumns = 16, kSlice = 64;
constexpr int64_t kBorrowedRows = 24;  // fewer rows than this do not pay for a copy of the weight in grad_x

// What a thread has to write on.
struct ForwardScratch {
  float panel[kLinearBlock * kPanel];       // [depth][kPanel]
  float rows[kProductRows * kLinearBlock];  // gathered rows of x
  float chain[kFewRows * kPanel];           // unfinished chains
};
struct BackwardScratch {
  float panels[kLinearBlock * kWeightColumns];  // [depth][kPanel], kWeightColumns / kPanel of them; grad_x has one
  float rows[kLinearBlock * kWeightRows];       // [depth][kWeightRows], or gathered rows as above
};

// Adds a block's chains to the sum. Between the slices of a block the chains rest in `chain`.
struct BlockSum {
  float* out;
  int64_t out_row;
  const float* bias;  // added after the last block; null before it
  float* chain;       // [rows][kPanel]
  bool resume, rest, first_block;

  PYCORE_INLINE Vec start(int m, int64_t n) const { return resume ? Vec::load(chain + m * kPanel + n) : Vec::zero(); }
  PYCORE_INLINE Vec start_first(int m, int64_t n, int64_t) const { return start(m, n); }
  PYCORE_INLINE void finish(int m, int64_t n, Vec x) const {
    if (rest) return x.store(chain + m * kPanel + n);
    if (!first_block) x = Vec::load(out + m * out_row + n) + x;
    if (bias) x = x + Vec::load(bias + n);
    x.store(out + m * out_row + n);
  }
  PYCORE_INLINE void finish_first(int m, int64_t n, int64_t count, Vec x) const {
    if (rest) return x.store(chain + m * kPanel + n);
    if (!first_block) x = Vec::load_first(out + m * out_row + n, count) + x;
    if (bias) x = x + Vec::load_first(bias + n, count);
    x.store_first(out + m * out_row + n, count);
  }
};

// panel[k][i] = rows[i][k].
inline void pack_transposed(const float* rows, int64_t row_stride, int64_t count, int64_t depth, float* panel) {
  constexpr int64_t kWidth = Vec::kWidth;
  for (int64_t i = 0; i < count; i += kWidth) {
    for (int64_t k = 0; k < depth; k += kWidth) {
      Vec square[kWidth];
      const int64_t ks = smaller(kWidth, depth - k);
      load_transposed(rows + i * row_stride + k, row_stride, smaller(kWidth, count - i), ks, square);
      for (int j = 0; j < ks; ++j) square[j].store(panel + (k + j) * kPanel + i);
    }
  }
}

// Rows of A as the tile product wants them: one stride. Rows of several strides are gathered.
PYCORE_INLINE Matrix row_tile(const RowView& view, int64_t row, int64_t count, int64_t k, int64_t depth, float* rows) {
  if (view.uniform()) return {static_cast<const float*>(view.data) + row * view.row_stride() + k, view.row_stride()};
  for (int64_t i = 0; i < count; ++i) copy_row(view.row<float>(row + i) + k, depth, rows + i * kLinearBlock);
  return {rows, kLinearBlock};
}

// out[rows][columns of a panel] += A B over one slice or block of the depth; BlockSum says which.
inline void multiply_rows(const RowView& view, Range rows, int64_t k, int64_t depth, const float* panel,
                          int64_t panel_row, int64_t width, BlockSum sum, float* gathered) {
  float* const out = sum.out;
  for (int64_t row = rows.begin; row < rows.end; row += kProductRows) {
    const int64_t count = smaller(kProductRows, rows.end - row);
    const Matrix tile = row_tile(view, row, count, k, depth, gathered);
    sum.out = out + (row - rows.begin) * sum.out_row;
    tile_product<false>(count, depth, tile.data, tile.stride, panel, panel_row, 0, width, sum);
  }
}

// One row: the transposed squares of the weight are used where they stand, in registers. The chains are the tile
// product's. kFewColumns columns at a time hide the latency of a chain.
void forward_one_row(const LinearParams& params, int64_t row, Range columns) {
  constexpr int64_t kWidth = Vec::kWidth;
  constexpr int kGroups = kFewColumns / kWidth;
  const float* x = params.x.row<float>(row);
  const float* bias = static_cast<const float*>(params.bias);
  float* out = static_cast<float*>(params.out) + row * params.out_features;
  for (int64_t n = columns.begin; n < columns.end; n += kFewColumns) {
    const float* weight = static_cast<const float*>(params.weight) + n * params.weight_stride;
    int64_t counts[kGroups];
    for (int g = 0; g < kGroups; ++g) counts[g] = smaller(kWidth, columns.end - n - g * kWidth);
    Vec total[kGroups];
    int64_t block = 0;
    do {
      const int64_t end = smaller(block + kLinearBlock, params.in_features);
      Vec chain[kGroups], square[kWidth];
      for (int g = 0; g < kGroups; ++g) chain[g] = Vec::zero();
      int64_t k = block;
      for (; k + kWidth <= end; k += kWidth) {
        for (int g = 0; g < kGroups; ++g) {
          load_transposed(weight + g * kWidth * params.weight_stride + k, params.weight_stride, counts[g], kWidth,
                          square);
          for (int j = 0; j < kWidth; ++j) chain[g] = Vec::fma(Vec::broadcast(x[k + j]), square[j], chain[g]);
        }
      }
      for (int g = 0; g < kGroups && k < end; ++g) {
        load_transposed(weight + g * kWidth * params.weight_stride + k, params.weight_stride, counts[g], end - k,
                        square);
        for (int j = 0; j < end - k; ++j) chain[g] = Vec::fma(Vec::broadcast(x[k + j]), square[j], chain[g]);
      }
      for (int g = 0; g < kGroups; ++g) total[g] = block == 0 ? chain[g] : total[g] + chain[g];
      block = end;
    } while (block < params.in_features);
    for (int g = 0; g < kGroups && counts[g] > 0; ++g) {
      if (bias) total[g] = total[g] + Vec::load_first(bias + n + g * kWidth, counts[g]);
      total[g].store_first(out + n + g * kWidth, counts[g]);
    }
  }
}

void linear_forward_item(const LinearParams& params, Range rows, Range columns, void* memory) {
  if (rows.count() == 1) return forward_one_row(params, rows.begin, columns);
  ForwardScratch* scratch = static_cast<ForwardScratch*>(memory);
  const float* weight = static_cast<const float*>(params.weight);
  const float* bias = static_cast<const float*>(params.bias);
  const int64_t depth = params.in_features;
  const bool few = rows.count() <= kFewRows;
  const int64_t slice = few ? kSlice : kLinearBlock, step = few ? kFewColumns : kPanel;
  for (int64_t n = columns.begin; n < columns.end; n += step) {
    const int64_t width = smaller(step, columns.end - n);
    int64_t k = 0;
    do {
      const int64_t end = smaller(k + slice, depth);
      const bool block_ends = end == depth || end % kLinearBlock == 0;
      pack_transposed(weight + n * params.weight_stride + k, params.weight_stride, width, end - k, scratch->panel);
      const BlockSum sum = {static_cast<float*>(params.out) + rows.begin * params.out_features + n,
                            params.out_features,
                            bias && end == depth ? bias + n : nullptr,
                            scratch->chain,
                            k % kLinearBlock != 0,
                            !block_ends,
                            k < kLinearBlock};
      multiply_rows(params.x, rows, k, end - k, scratch->panel, kPanel, width, sum, scratch->rows);
      k = end;
    } while (k < depth);
  }
}

void linear_grad_x_item(const LinearBackwardParams& params, Range rows, Range columns, void* memory) {
  BackwardScratch* scratch = static_cast<BackwardScratch*>(memory);
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
                            params.in_features,
                            nullptr,
                            nullptr,
                            false,
                            false,
                            n == 0};
      multiply_rows(params.grad_out, rows, n, end - n, copy ? scratch->panels : weight,
                    copy ? kPanel : params.weight_stride, width, sum, scratch->rows);
      n = end;
    } while (n < depth);
  }
}

void linear_grad_weight_item(const LinearBackwardParams& params, Range outs, Range columns, void* memory) {
  BackwardScratch* scratch = static_cast<BackwardScratch*>(memory);
  int64_t row = 0;
  do {
    const int64_t end = smaller(row + kLinearBlock, params.x.rows), depth = end - row;
    for (int64_t r = 0; r < depth; ++r) {
      copy_row(params.grad_out.row<float>(row + r) + outs.begin, outs.count(), scratch->rows + r * kWeightRows);
      const float* x = params.x.row<float>(row + r);
      for (int64_t column = columns.begin, p = 0; column < columns.end; column += kPanel, ++p) {
        copy_row(x + column, smaller(kPanel, columns.end - column), scratch->panels + (p * kLinearBlock + r) * kPanel);
      }
    }
    for (int64_t column = columns.begin, p = 0; column < columns.end; column += kPanel, ++p) {
      const float* panel = scratch->panels + p * kLinearBlock * kPanel;
      for (int64_t n = outs.begin; n < outs.end; n += kProductRows) {
        const BlockSum sum = {static_cast<float*>(params.grad_weight) + n * params.in_features + column,
                              params.in_features,
                              nullptr,
                              nullptr,
                              false,
                              false,
                              row == 0};
        tile_product<true>(smaller(kProductRows, outs.end - n), depth, scratch->rows + (n - outs.begin), kWeightRows,
                           panel, kPanel, 0, smaller(kPanel, columns.end - column), sum);
      }
    }
    row = end;
  } while (row < params.x.rows);
}

void linear_grad_bias_item(const LinearBackwardParams& params, Range outs) {
  float chain[kBiasColumns], *const total = static_cast<float*>(params.grad_bias) + outs.begin;
  for (int64_t n = 0; n < outs.count(); ++n) total[n] = 0.0f;
  for (int64_t block = 0; block < params.x.rows; block += kLinearBlock) {
    for (int64_t n = 0; n < outs.count(); ++n) chain[n] = 0.0f;
    const int64_t end = smaller(block + kLinearBlock, params.x.rows);
    for (int64_t row = block; row < end; ++row) {
      const float* grad = params.grad_out.row<float>(row) + outs.begin;
      for (int64_t n = 0; n < outs.count(); ++n) chain[n] += grad[n];
    }
    for (int64_t n = 0; n < outs.count(); ++n) total[n] = block == 0 ? chain[n] : total[n] + chain[n];
  }
}
