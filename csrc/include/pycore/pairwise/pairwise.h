// SPDX-License-Identifier: Apache-2.0
// Scores of the rows of x against the rows of y, reduced as they are made: log-sum-exp with its gradients, the best k,
// and what given pairs have. The matrix of scores never exists; of a block of rows at a time it does.
//
// A score is a product, s = sum over d of x[d] y[d], or a squared distance, s = sum over d of (x[d] - y[d])^2: blocks
// of kPairwiseDepth terms, each one chain of FMAs over d ascending from zero, added in order. A logit is scale s +
// bias, and cap tanh(that / cap) with a softcap.
//
// lse of a row: columns in segments of kPairwiseSegment. A segment has its maximum m and the sum of e^(z - m) in
// sixteen lanes (column c in lane c mod 16); segments merge in order, in float64.
//
// The gradient of logit z[i][j] is g = (w0 + w1 lse[i]) e^(z - lse[i]) + w2 [j == target[i]] + w3, with weights w of
// row i, times dz. grad_x[i] is the sum over j of g scale y[j], in blocks of kPairwiseDepth columns, each a chain;
// grad_y[j] the same over i, in blocks of kPairwiseRows. For distances these are the products alone, and the faces'
// callers add what is missing: d/dx of s is 2 (x - y).
//
// The lse of a column, over rows: blocks of kPairwiseRows rows, each with its maximum and a chain of e^(z - m) over
// rows ascending; blocks merge in order, in float64. With weights v of columns too, g has v[j] e^(z - column_lse[j])
// more.
//
// So a row has the same bits whatever it is computed with, and vectors of eight and sixteen floats agree.
#pragma once

#include <pycore/cpu_isa.h>
#include <pycore/export.h>
#include <pycore/parallel.h>
#include <pycore/status.h>
#include <pycore/tensor_view.h>

#include <atomic>
#include <cstdint>

namespace pycore {

inline constexpr int64_t kPairwiseSegment = 1024, kPairwiseDepth = 256, kPairwiseRows = 96;

// [batch, rows, dim] with dim contiguous.
struct PairwiseRows {
  const void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0;
  template <class T>
  const T* at(int64_t batch, int64_t row) const {
    return static_cast<const T*>(data) + batch * batch_stride + row * row_stride;
  }
};

struct PairwiseParams {
  CpuIsa isa = cpu_isa();         // of the whole call, asked once: scratch and kernel must agree
  DType dtype = DType::kFloat32;  // of everything; float32 or float64
  bool euclidean = false;
  int64_t batch = 0, rows = 0, columns = 0, dim = 0;
  PairwiseRows x, y;  // [batch, rows, dim], [batch, columns, dim]
};

struct PairwiseLogsumexpParams : PairwiseParams {
  double scale = 1, softcap = 0;
  const void* y_bias = nullptr;  // [batch, columns], contiguous, or null
  int64_t bias_batch_stride = 0;
  const int64_t* target = nullptr;  // [batch, rows], contiguous, -1 for none; or null
  void* lse = nullptr;              // [batch, rows], contiguous, as the next two
  void* target_logit = nullptr;     // 0 where there is no target; may be null
  void* logit_sum = nullptr;        // may be null
  // [batch, columns], contiguous, or null: lse over rows, written without weights and read with column_weights. Without
  // weights nothing but lse and target_logit is made beside it.
  void* column_lse = nullptr;
  // Gradients, if weights are given.
  const void* weights = nullptr;         // [batch, rows, 4], contiguous
  const void* column_weights = nullptr;  // [batch, columns], contiguous; may be null
  void* grad_x = nullptr;                // [batch, rows, dim], contiguous; each of the three may be null
  void* grad_y = nullptr;                // [batch, columns, dim]
  void* grad_bias = nullptr;             // [batch, columns]
};

// Rows that hold a NaN or an infinity, or whose scores are none: the lowest of each.
struct PairwiseFaults {
  static constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> x_row{kNone}, y_row{kNone}, score_row{kNone};  // batch * rows + row
};

struct PairwiseTopkParams : PairwiseParams {
  int64_t k = 1;
  const int64_t* x_lengths = nullptr;  // [batch], or null: all rows
  const int64_t* y_lengths = nullptr;
  void* scores = nullptr;      // [batch, rows, k]: the largest first, distances the smallest first
  int64_t* indices = nullptr;  // [batch, rows, k]; -1 where there is none
  PairwiseFaults* faults = nullptr;
};

struct PairwiseDistancesParams : PairwiseParams {
  int64_t k = 1;
  const int64_t* indices = nullptr;  // [batch, rows, k], contiguous, checked; -1: infinitely far
  void* out = nullptr;               // [batch, rows, k]: the distance of pycore/vq/vq.h, in sixteen lanes
};

struct PairwisePairsBackwardParams : PairwiseParams {
  int64_t k = 1;
  const int64_t* indices = nullptr;  // [batch, rows, k], contiguous, checked
  const void* grad = nullptr;        // [batch, rows, k], contiguous
  void* grad_x = nullptr;            // [batch, rows, dim], contiguous: pairs in order
  void* grad_y = nullptr;            // [batch, columns, dim], contiguous: rows in order
};

struct HammingTopkParams {
  CpuIsa isa = cpu_isa();
  int64_t batch = 0, rows = 0, columns = 0, bytes = 0, k = 1;
  PairwiseRows x, y;             // uint8
  int64_t* distances = nullptr;  // [batch, rows, k]
  int64_t* indices = nullptr;    // [batch, rows, k]: the smallest first, ties to the lowest index
};

// CPU. `scratch` holds …_scratch(params, threads) bytes, 64-byte aligned; it may be null where that is zero.
PYCORE_API int64_t pairwise_logsumexp_scratch(const PairwiseLogsumexpParams& params, int64_t threads);
PYCORE_API Status pairwise_logsumexp(const PairwiseLogsumexpParams& params, const Parallel& parallel, void* scratch);
PYCORE_API int64_t pairwise_topk_scratch(const PairwiseTopkParams& params, int64_t threads);
PYCORE_API Status pairwise_topk(const PairwiseTopkParams& params, const Parallel& parallel, void* scratch);
PYCORE_API Status pairwise_distances_at(const PairwiseDistancesParams& params, const Parallel& parallel);
PYCORE_API Status pairwise_pairs_backward(const PairwisePairsBackwardParams& params, const Parallel& parallel);
PYCORE_API Status hamming_topk(const HammingTopkParams& params, const Parallel& parallel);

}  // namespace pycore
