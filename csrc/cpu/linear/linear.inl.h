// SPDX-License-Identifier: Apache-2.0
// The linear layer forward on the tile product. A product's columns lie in panels of kPanel: the weight transposed,
// copied so that the product reads one stream. Copies go to scratch that stays in the second cache.
//
// bfloat16 and float16 become float32 on the way into a panel, and so do an item's rows, once a block; the sums stay in
// scratch until the last block, so that a result is rounded once.

#pragma once

#include <pycore/dtype.h>
#include <pycore/linear/linear.h>

#include <cstdint>

#include "../tile_product.inl.h"
#include "../vector_rows.inl.h"
#include "few.inl.h"
#include "kernels.h"

constexpr int64_t kPanel = Vec::kProductColumns * Vec::kWidth;
constexpr int64_t kSumColumns = Vec::kMultipliesPairs ? kPairColumns : kHalfColumns;  // of an item in 16 bits

// What a thread has to write on.
struct ForwardScratch {
  float panel[kLinearBlock * kPanel];       // [depth][kPanel]
  float rows[kProductRows * kLinearBlock];  // gathered rows of x
};
struct HalfScratch {
  float panels[kLinearBlock * kWeightColumns];  // [depth][kPanel], kWeightColumns / kPanel of them where wanted
  float rows[kMaxHalfRows * kLinearBlock];      // [rows][kHalfRow], or [depth][kWeightRows]
  float sums[(Vec::kMultipliesPairs ? kMaxRows : kMaxHalfRows) * kSumColumns];
  // sums: [rows][kSumColumns], or [kWeightRows][kWeightColumns]
};
static_assert(kMaxHalfRows == kWeightRows && kSumColumns >= kWeightColumns);

// Adds a block's chains to the sum.
struct BlockSum {
  float* out;
  int64_t out_row;
  const float* bias;  // added after the last block; null before it
  bool first_block;

  PYCORE_INLINE Vec start(int, int64_t) const { return Vec::zero(); }
  PYCORE_INLINE Vec start_first(int, int64_t, int64_t) const { return Vec::zero(); }
  PYCORE_INLINE void finish(int m, int64_t n, Vec x) const {
    if (!first_block) x = Vec::load(out + m * out_row + n) + x;
    if (bias) x = x + Vec::load(bias + n);
    x.store(out + m * out_row + n);
  }
  PYCORE_INLINE void finish_first(int m, int64_t n, int64_t count, Vec x) const {
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

void linear_forward_float(const LinearParams& params, Range rows, Range columns, ForwardScratch* scratch) {
  const float* weight = static_cast<const float*>(params.weight);
  const float* bias = static_cast<const float*>(params.bias);
  const int64_t depth = params.in_features;
  for (int64_t n = columns.begin; n < columns.end; n += kPanel) {
    const int64_t width = smaller(kPanel, columns.end - n);
    int64_t k = 0;
    do {
      const int64_t end = smaller(k + kLinearBlock, depth);
      pack_transposed(weight + n * params.weight_stride + k, params.weight_stride, width, end - k, scratch->panel);
      const BlockSum sum = {static_cast<float*>(params.out) + rows.begin * params.out_stride + n, params.out_stride,
                            bias && end == depth ? bias + n : nullptr, k == 0};
      multiply_rows(params.x, rows, k, end - k, scratch->panel, kPanel, width, sum, scratch->rows);
      k = end;
    } while (k < depth);
  }
}

// Rows of the matrix that the next panel will be made of, of which a product fetches the first kFetchedRows, whether
// they are there or not.
struct Fetched {
  const char* rows;
  int64_t stride;  // bytes
};
constexpr int64_t kFetchedRows = 8;

// The product in 16 bits: columns of a panel, rows of a block, and how far the prepared rows lie apart.
#ifdef PYCORE_BFLOAT16_PRODUCTS
// Twice the multiplications want half the loads: squarer blocks, of panels that leave room in the first cache.
constexpr int64_t kHalfPanel = 2 * Vec::kWidth, kHalfRows = 12, kHalfRow = kLinearBlock / 2;

// The tile product of a whole panel where lanes are pairs: A [rows][kHalfRow], B [pairs][kHalfPanel]. Meanwhile `next`
// is fetched, a line for every two pairs: the copy into a panel waits for memory otherwise.
template <int M>
__attribute__((noinline)) void multiply_pair_rows(int64_t pairs, const float* a, const float* b, BlockSum sum,
                                                  Fetched next) {
  constexpr int V = kHalfPanel / Vec::kWidth;
  Vec chain[M][V];  // never in memory: all loops over it are unrolled
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) chain[m][v] = Vec::zero();
  }
  for (int64_t k = 0; k < pairs; ++k, b += kHalfPanel) {
    if (k % 2 == 0) __builtin_prefetch(next.rows + k / 16 * next.stride + k % 16 * (kLineBytes / 2), 0, 2);
    Vec columns[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) columns[v] = Vec::load(b + v * Vec::kWidth);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const Vec x = Vec::broadcast(a[m * kHalfRow + k]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) chain[m][v] = Vec::fma_pairs(x, columns[v], chain[m][v]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum.finish(m, v * Vec::kWidth, chain[m][v]);
  }
}

PYCORE_INLINE void multiply_half(int64_t rows, int64_t depth, const float* a, const float* b, int64_t, BlockSum sum,
                                 Fetched next) {
  const int64_t pairs = (depth + 1) / 2;
  switch (rows) {
    case 1: return multiply_pair_rows<1>(pairs, a, b, sum, next);
    case 2: return multiply_pair_rows<2>(pairs, a, b, sum, next);
    case 3: return multiply_pair_rows<3>(pairs, a, b, sum, next);
    case 4: return multiply_pair_rows<4>(pairs, a, b, sum, next);
    case 5: return multiply_pair_rows<5>(pairs, a, b, sum, next);
    case 6: return multiply_pair_rows<6>(pairs, a, b, sum, next);
    case 7: return multiply_pair_rows<7>(pairs, a, b, sum, next);
    case 8: return multiply_pair_rows<8>(pairs, a, b, sum, next);
    case 9: return multiply_pair_rows<9>(pairs, a, b, sum, next);
    case 10: return multiply_pair_rows<10>(pairs, a, b, sum, next);
    case 11: return multiply_pair_rows<11>(pairs, a, b, sum, next);
    case 12: return multiply_pair_rows<12>(pairs, a, b, sum, next);
    default: return;
  }
}
#else
constexpr int64_t kHalfPanel = kPanel, kHalfRows = kProductRows, kHalfRow = kLinearBlock;

PYCORE_INLINE void multiply_half(int64_t rows, int64_t depth, const float* a, const float* b, int64_t width,
                                 BlockSum sum, Fetched) {
  tile_product<false>(rows, depth, a, kHalfRow, b, kHalfPanel, 0, width, sum);
}
#endif

// out[rows][columns] = A B + bias in 16 bits. pack(k, depth, column, width, panel) fills a panel of B, and from(k,
// column) is where it will read.
template <DType kType, class Pack, class From>
PYCORE_INLINE void half_product(const RowView& view, Range rows, Range columns, int64_t depth, const Pack& pack,
                                const From& from, const void* bias, void* out, int64_t out_row, HalfScratch* scratch) {
  int64_t k = 0;
  do {
    const int64_t end = smaller(k + kLinearBlock, depth);
    for (int64_t r = 0; r < rows.count(); ++r) {
      prepare_row<kType>(row_bytes<kType>(view, rows.begin + r) + k * kElementBytes<kType>, end - k,
                         scratch->rows + r * kHalfRow);
    }
    for (int64_t n = columns.begin; n < columns.end; n += kHalfPanel) {
      const int64_t width = smaller(kHalfPanel, columns.end - n);
      pack(k, end - k, n, width, scratch->panels);
      const bool last = n + kHalfPanel >= columns.end;
      const Fetched next = from(last ? smaller(end, depth - 1) : k, last ? columns.begin : n + kHalfPanel);
      for (int64_t r = 0; r < rows.count(); r += kHalfRows) {
        const BlockSum sum = {scratch->sums + r * kSumColumns + (n - columns.begin), kSumColumns, nullptr, k == 0};
        const int64_t fetched = smaller(r / kHalfRows, kHalfPanel / kFetchedRows - 1) * kFetchedRows;
        multiply_half(smaller(kHalfRows, rows.count() - r), end - k, scratch->rows + r * kHalfRow, scratch->panels,
                      width, sum, {next.rows + fetched * next.stride, next.stride});
      }
    }
    k = end;
  } while (k < depth);
  for (int64_t r = 0; r < rows.count(); ++r) {
    char* const row = static_cast<char*>(out) + (rows.begin + r) * out_row * kElementBytes<kType>;
    for (int64_t n = columns.begin; n < columns.end; n += Vec::kWidth) {
      const int64_t count = smaller(Vec::kWidth, columns.end - n);
      Vec x = load_lanes(scratch->sums + r * kSumColumns + (n - columns.begin), count);
      if (bias) x = x + load_some<kType>(static_cast<const char*>(bias), n, count);
      store_some<kType>(x, row, n, count);
    }
  }
}

template <DType kType>
void linear_forward_item(const LinearParams& params, Range rows, Range columns, void* memory) {
  if (rows.count() <= kFewRows) {
    return few_forward<kType>(params, rows, columns);
  }
  if constexpr (kType == DType::kFloat32) {
    linear_forward_float(params, rows, columns, static_cast<ForwardScratch*>(memory));
  } else {
    const int64_t stride = params.weight_stride * kElementBytes<kType>;
    const auto from = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
      return Fetched{static_cast<const char*>(params.weight) + n * stride + k * kElementBytes<kType>, stride};
    };
    const auto pack = [&](int64_t k, int64_t depth, int64_t n, int64_t width, float* panel)
                          __attribute__((always_inline)) {
                            pack_halves<kType>(from(k, n).rows, stride, width, depth, panel, kHalfPanel);
                          };
    half_product<kType>(params.x, rows, columns, params.in_features, pack, from, params.bias, params.out,
                        params.out_stride, static_cast<HalfScratch*>(memory));
  }
}
