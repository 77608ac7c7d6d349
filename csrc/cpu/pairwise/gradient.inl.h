// SPDX-License-Identifier: Apache-2.0
// From logits to their gradients, and those times the rows of either side.
#pragma once

#include <pycore/key_tile.h>

#include <cstdint>

#include "../softmax.inl.h"
#include "../tile_product.inl.h"
#include "../vector_rows.inl.h"
#include "kernels.h"
#include "scores.inl.h"

void pairwise_gradient(void* memory, int64_t count, double lse, const double* weights, int64_t target, double scale,
                       double softcap, const void* weights_of_columns, const void* lse_of_columns, void* bias_memory) {
  float* const row = static_cast<float*>(memory);
  float* const bias = static_cast<float*>(bias_memory);
  const float* const column_weights = static_cast<const float*>(weights_of_columns);
  const float* const column_lse = static_cast<const float*>(lse_of_columns);
  const float low = static_cast<float>(lse);
  const Vec from = Vec::broadcast(low), power = Vec::broadcast(kLog2E);
  const Vec weight = Vec::broadcast(static_cast<float>(weights[0])),
            rest = Vec::broadcast(static_cast<float>(weights[2]));
  const Vec factor = Vec::broadcast(static_cast<float>(scale));
  const Vec cap = Vec::broadcast(static_cast<float>(1 / (softcap > 0 ? softcap : 1))), one = Vec::broadcast(1.0f);
  const bool none = low == -kInfinity;
  const int64_t at = target >= 0 ? target / Vec::kWidth * Vec::kWidth : -1;
  for (int64_t c = 0; c < count; c += Vec::kWidth) {
    const Vec z = Vec::load(row + c);
    Vec g = none ? rest : Vec::fma(weight, ((z - from) * power).exp2(), rest);
    if (c == at) {
      const Vec more = g + Vec::broadcast(static_cast<float>(weights[1]));
      g = more.select(uint64_t{1} << (target - at), g);
    }
    if (column_weights) {
      const int64_t here = smaller(Vec::kWidth, count - c);
      const Vec e = ((z - load_lanes(column_lse + c, here)) * power).exp2();
      g = Vec::fma(load_lanes(column_weights + c, here), e, g);
    }
    if (softcap > 0) {
      const Vec t = z * cap;
      g = g * Vec::fnma(t, t, one);
    }
    (Vec::load(bias + c) + g).store(bias + c);
    (g * factor).store(row + c);
  }
}

void pairwise_columns_product(const PairwiseParams& params, int64_t batch, Range rows, int64_t columns, const void* g,
                              void* memory) {
  const float* const gradients = static_cast<const float*>(g);
  float* const out = static_cast<float*>(memory);
  for (int64_t c = 0; c < columns; c += kProductRows) {
    tile_product<true>(smaller(kProductRows, columns - c), rows.count(), gradients + c, kSegmentStride,
                       params.x.at<float>(batch, rows.begin), params.x.row_stride, 0, params.dim,
                       AddBlock{out + c * params.dim, params.dim});
  }
}

void pairwise_rows_product(const PairwiseParams& params, int64_t batch, int64_t rows, Range columns, Range channels,
                           const void* g, void* memory, void* scratch) {
  const float* const gradients = static_cast<const float*>(g);
  float* const out = static_cast<float*>(memory);
  float* const panel = static_cast<PairwiseScratch*>(scratch)->panel;
  for (int64_t c = columns.begin; c < columns.end; c += kPairwiseDepth) {
    const int64_t depth = smaller(kPairwiseDepth, columns.end - c);
    for (int64_t k = 0; k < depth; ++k) {
      copy_row(params.y.at<float>(batch, c + k) + channels.begin, channels.count(), panel + k * kKeyTile);
    }
    for (int64_t row = 0; row < rows; row += kProductRows) {
      tile_product<false>(smaller(kProductRows, rows - row), depth,
                          gradients + row * kSegmentStride + (c - columns.begin), kSegmentStride, panel, kKeyTile, 0,
                          channels.count(), AddBlock{out + row * params.dim, params.dim});
    }
  }
}
