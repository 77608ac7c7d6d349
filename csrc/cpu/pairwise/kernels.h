// SPDX-License-Identifier: Apache-2.0
// What the family asks of an instruction set: a rectangle of scores, and what becomes of a row or block of them. No
// rectangle changes a bit. Numbers are those of params.dtype.
#pragma once

#include <pycore/dtype.h>
#include <pycore/key_tile.h>
#include <pycore/pairwise/pairwise.h>

#include <cstdint>

namespace pycore {

struct Range {
  int64_t begin = 0, end = 0;
  int64_t count() const { return end - begin; }
};

// Rows of a segment in scratch lie this far apart: whole vectors, and no power of two, which would share cache sets.
inline constexpr int64_t kSegmentStride = kPairwiseSegment + 16;

inline constexpr int64_t kBoundedRows = 4, kMostBoundedDim = 1 << 16;

struct PairwiseKernels {
  int64_t scratch;  // bytes a thread

  // out[row][column - columns.begin], kSegmentStride apart, of at most a segment's columns.
  void (*scores)(const PairwiseParams& params, int64_t batch, Range rows, Range columns, void* out, void* scratch);
  // out[row][column - columns.begin], of at most kBoundedRows rows: at least the score, unless that is none or not
  // finite. Null, as the next one, where nothing is gained.
  void (*bounds)(const PairwiseParams& params, int64_t batch, Range rows, Range columns, void* out);
  // The first column of a row's bounds, from `from` on, that has more than `least`; count if there is none.
  int64_t (*next)(const void* bounds, int64_t from, int64_t count, double least);
  // Scores of a row in place -> logits; bias may be null. What is left of the last sixteen becomes -inf.
  void (*logits)(void* row, int64_t count, double scale, const void* bias, double softcap);
  // The largest logit, and the sum of e^(z - largest).
  void (*reduce)(const void* row, int64_t count, void* largest, void* sum);
  void (*total)(const void* row, int64_t count, void* sum);
  // The same of every column, over at most kPairwiseRows rows kSegmentStride apart: [count] each, whole vectors.
  void (*reduce_columns)(const void* logits, int64_t rows, int64_t count, void* largest, void* sum);
  // Logits of a row in place -> g dz scale, with g = weight e^(z - lse) + w3, and w2 more at `target` (-1: none), and
  // column_weights e^(z - column_lse) unless they are null. bias [kSegmentStride] += g dz.
  void (*gradient)(void* row, int64_t count, double lse, const double* weights, int64_t target, double scale,
                   double softcap, const void* column_weights, const void* column_lse, void* bias);
  // grad_y[column][d] += sum over rows, at most kPairwiseRows, of g[row][column] x[row][d].
  void (*columns_product)(const PairwiseParams& params, int64_t batch, Range rows, int64_t columns, const void* g,
                          void* out);
  // grad_x[row][d in channels] += sum over columns, a segment's, of g[row][column] y[column][d].
  void (*rows_product)(const PairwiseParams& params, int64_t batch, int64_t rows, Range columns, Range channels,
                       const void* g, void* out, void* scratch);
  // A row's columns join its list of the k largest, of which there are *held. What is left of the last vector is lost.
  void (*select)(void* row, int64_t count, int64_t first, int64_t k, int64_t* held, void* scores, int64_t* indices);
  void (*distance)(const void* x, const void* y, int64_t dim, void* out);
  void (*hamming)(const HammingTopkParams& params, int64_t batch, Range rows);
};

inline constexpr int64_t kRowChannels = 64;  // of a rows_product, at most

namespace scalar {
extern const PairwiseKernels pairwise_float;
extern const PairwiseKernels pairwise_double;
}  // namespace scalar
namespace avx2 {
extern const PairwiseKernels pairwise_float;
}
namespace avx512 {
extern const PairwiseKernels pairwise_float;
}

}  // namespace pycore
