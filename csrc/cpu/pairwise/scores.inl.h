// SPDX-License-Identifier: Apache-2.0
// A rectangle of scores: products by the tile product, distances by blocks of the same shape whose chains are of
// differences, because x^2 - 2 x y + y^2 loses the small distances of data that lies far from zero.
#pragma once

#include <pycore/key_tile.h>

#include <cstdint>

#include "../tile_product.inl.h"
#include "../vector_rows.inl.h"
#include "kernels.h"

struct PairwiseScratch {
  alignas(64) float panel[kPairwiseDepth * kKeyTile];  // 64 rows of y as columns, or 64 channels of its rows
};

// A chain of its own that is added to what memory holds.
struct AddBlock {
  float* c;
  int64_t c_row;
  PYCORE_INLINE Vec start(int, int64_t) const { return Vec::zero(); }
  PYCORE_INLINE Vec start_first(int, int64_t, int64_t) const { return Vec::zero(); }
  PYCORE_INLINE void finish(int m, int64_t n, Vec x) const {
    (Vec::load(c + m * c_row + n) + x).store(c + m * c_row + n);
  }
  PYCORE_INLINE void finish_first(int m, int64_t n, int64_t count, Vec x) const {
    (Vec::load_first(c + m * c_row + n, count) + x).store_first(c + m * c_row + n, count);
  }
};

// panel[k][c] = rows[c][k], zero in what is left of the last vector.
inline void pack_columns(const float* rows, int64_t row_stride, int64_t count, int64_t depth, float* panel) {
  for (int64_t c = 0; c < count; c += Vec::kWidth) {
    for (int64_t k = 0; k < depth; k += Vec::kWidth) {
      Vec square[Vec::kWidth];
      const int64_t ks = smaller(Vec::kWidth, depth - k);
      load_transposed(rows + c * row_stride + k, row_stride, smaller(Vec::kWidth, count - c), ks, square);
      for (int64_t j = 0; j < ks; ++j) square[j].store(panel + (k + j) * kKeyTile + c);
    }
  }
}

// out[m][n] = (or +=) the chain of squared differences, for whole vectors of n < width: out has room for them.
template <int M>
__attribute__((noinline)) void distance_rows(int64_t depth, const float* a, int64_t a_row, const float* panel,
                                             int64_t width, float* out, bool add) {
  constexpr int kVectors = 2;  // a panel has a multiple of them
  for (int64_t n = 0; n < width; n += kVectors * Vec::kWidth) {
    Vec sums[M][kVectors];
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < kVectors; ++v) sums[m][v] = Vec::zero();
    }
    const int vectors = n + Vec::kWidth < width ? kVectors : 1;
    for (int64_t k = 0; k < depth; ++k) {
      Vec columns[kVectors];
      for (int v = 0; v < kVectors; ++v) columns[v] = Vec::load(panel + k * kKeyTile + n + v * Vec::kWidth);
      for (int m = 0; m < M; ++m) {
        const Vec x = Vec::broadcast(a[m * a_row + k]);
        for (int v = 0; v < kVectors; ++v) {
          const Vec d = x - columns[v];
          sums[m][v] = Vec::fma(d, d, sums[m][v]);
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < vectors; ++v) {
        float* const to = out + m * kSegmentStride + n + v * Vec::kWidth;
        (add ? Vec::load(to) + sums[m][v] : sums[m][v]).store(to);
      }
    }
  }
}

PYCORE_INLINE void distance_block(int64_t rows, int64_t depth, const float* a, int64_t a_row, const float* panel,
                                  int64_t width, float* out, bool add) {
  switch (rows) {
    case 1: return distance_rows<1>(depth, a, a_row, panel, width, out, add);
    case 2: return distance_rows<2>(depth, a, a_row, panel, width, out, add);
    case 3: return distance_rows<3>(depth, a, a_row, panel, width, out, add);
    case 4: return distance_rows<4>(depth, a, a_row, panel, width, out, add);
    case 5: return distance_rows<5>(depth, a, a_row, panel, width, out, add);
    default: return distance_rows<6>(depth, a, a_row, panel, width, out, add);
  }
}

// One row's products: squares of y are turned in registers where they stand, with the chain of the tile product. For
// two rows too it is faster than a panel. What bounds it is reading y, so what comes next is asked for early: rows are
// too many streams for a processor to foresee.
inline void scores_of_one(const PairwiseParams& params, int64_t batch, int64_t row, Range columns, float* out) {
  constexpr int64_t kWidth = Vec::kWidth, kLine = 16;
  constexpr int kGroups = 2;  // independent chains, to hide the latency of one
  const float* const x = params.x.at<float>(batch, row);
  const int64_t y_row = params.y.row_stride;
  for (int64_t c = columns.begin; c < columns.end; c += kGroups * kWidth) {
    int64_t counts[kGroups];
    Vec total[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      const int64_t left = columns.end - c - g * kWidth;
      counts[g] = left < 0 ? 0 : smaller(kWidth, left);
      total[g] = Vec::zero();
    }
    const float* const y = params.y.at<float>(batch, c);
    const bool whole = counts[kGroups - 1] == kWidth;
    for (int64_t block = 0; block < params.dim; block += kPairwiseDepth) {
      const int64_t end = smaller(block + kPairwiseDepth, params.dim);
      Vec chain[kGroups], square[kWidth];
      for (int g = 0; g < kGroups; ++g) chain[g] = Vec::zero();
      int64_t k = block;
      for (; whole && k + kWidth <= end; k += kWidth) {
        for (int g = 0; g < kGroups; ++g) {
          const float* const at = y + g * kWidth * y_row + k;
          for (int i = 0; i < kWidth; ++i) {
            if (k % kLine == 0) __builtin_prefetch(at + (kGroups * kWidth + i) * y_row);
            square[i] = Vec::load(at + i * y_row);
          }
          transpose(square);
          for (int j = 0; j < kWidth; ++j) chain[g] = Vec::fma(Vec::broadcast(x[k + j]), square[j], chain[g]);
        }
      }
      for (; k < end; k += kWidth) {
        const int64_t depth = smaller(kWidth, end - k);
        for (int g = 0; g < kGroups && counts[g] > 0; ++g) {
          load_transposed(y + g * kWidth * y_row + k, y_row, counts[g], depth, square);
          for (int64_t j = 0; j < depth; ++j) chain[g] = Vec::fma(Vec::broadcast(x[k + j]), square[j], chain[g]);
        }
      }
      for (int g = 0; g < kGroups; ++g) total[g] = block == 0 ? chain[g] : total[g] + chain[g];
    }
    for (int g = 0; g < kGroups && counts[g] > 0; ++g) {
      total[g].store_first(out + (c - columns.begin) + g * kWidth, counts[g]);
    }
  }
}

void pairwise_scores(const PairwiseParams& params, int64_t batch, Range rows, Range columns, void* memory,
                     void* scratch) {
  if (!params.euclidean && rows.count() <= 2) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      scores_of_one(params, batch, row, columns, static_cast<float*>(memory) + (row - rows.begin) * kSegmentStride);
    }
    return;
  }
  float* const panel = static_cast<PairwiseScratch*>(scratch)->panel;
  const int64_t x_row = params.x.row_stride;
  for (int64_t c = columns.begin; c < columns.end; c += kKeyTile) {
    const int64_t width = smaller(kKeyTile, columns.end - c), whole = round_up(width, Vec::kWidth);
    float* const out = static_cast<float*>(memory) + (c - columns.begin);
    int64_t k = 0;
    do {
      const int64_t depth = smaller(kPairwiseDepth, params.dim - k);
      pack_columns(params.y.at<float>(batch, c) + k, params.y.row_stride, width, depth, panel);
      for (int64_t row = rows.begin; row < rows.end; row += kProductRows) {
        const int64_t count = smaller(kProductRows, rows.end - row);
        const float* x = params.x.at<float>(batch, row) + k;
        float* const to = out + (row - rows.begin) * kSegmentStride;
        if (params.euclidean) {
          distance_block(count, depth, x, x_row, panel, width, to, k > 0);
        } else if (k == 0) {
          tile_product<false>(count, depth, x, x_row, panel, kKeyTile, 0, whole, StoreBlock{to, kSegmentStride});
        } else {
          tile_product<false>(count, depth, x, x_row, panel, kKeyTile, 0, whole, AddBlock{to, kSegmentStride});
        }
      }
      k += depth;
    } while (k < params.dim);
  }
}
