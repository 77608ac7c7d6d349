// SPDX-License-Identifier: Apache-2.0
// What the two faces refuse for the pairwise ops, and how they fill the parameter structs. Views of tensors that are
// not given are not defined().
#pragma once

#include <pycore/pairwise/pairwise.h>

#include <cmath>
#include <string>
#include <vector>

#include "checks.h"
#include "index_copies.h"

namespace pycore {

namespace pairwise_args {

inline void check_rows(const char* op, const char* argument, const TensorView& view) {
  check_on_cpu(op, argument, view);
  check_value(view.dims == 3, op, argument, " has shape ", shape_text(view), " and must be [batch, rows, channels]");
  check_last_contiguous(op, argument, view);
}

inline PairwiseRows rows_of(const TensorView& view) { return {view.data, view.strides[0], view.strides[1]}; }

// `shape` as [batch, rows, last], contiguous; last 0: [batch, rows].
inline void check_shape(const char* op, const char* argument, const TensorView& view, std::vector<int64_t> shape) {
  TensorView wanted;
  wanted.dims = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) wanted.shape[i] = shape[i];
  check_value(same_shape(view, wanted), op, argument, " has shape ", shape_text(view), " and must have ",
              shape_text(wanted));
  check_contiguous(op, argument, view);
}

inline void check_indices(const char* op, const char* argument, const TensorView& view, const TensorView& x) {
  check_value(view.dtype == DType::kInt64, op, argument, " has dtype ", dtype_name(view.dtype), " and must have int64");
  check_device_of(op, argument, view, x, "x");
}

// A copy of them, each checked: -1, or a row of y.
inline const int64_t* checked_indices(const char* op, const char* argument, const TensorView& view, int64_t columns,
                                      IndexCopies* copies) {
  const int64_t count = view.count();
  const int64_t* kept = copies->keep(op, view.as<const int64_t>(), count);
  for (int64_t i = 0; i < count; ++i) {
    check_index(kept[i] >= -1 && kept[i] < columns, op, argument, " has ", kept[i], " and must have -1 to ",
                columns - 1, ", a row of y");
  }
  return kept;
}

// A copy of them, each checked: a row of y, or ignore_index, which becomes -1.
inline const int64_t* checked_targets(const char* op, const TensorView& target, int64_t columns, int64_t ignore_index,
                                      IndexCopies* copies) {
  const int64_t count = target.count();
  const int64_t* kept = copies->keep(op, target.as<const int64_t>(), count);
  for (int64_t i = 0; i < count; ++i) {
    const bool ignored = kept[i] == ignore_index;
    check_index(ignored || (kept[i] >= 0 && kept[i] < columns), op, "target has ", kept[i], " and must have 0 to ",
                columns - 1, ", or ", ignore_index, " for none");
    if (ignored) const_cast<int64_t*>(kept)[i] = -1;
  }
  return kept;
}

}  // namespace pairwise_args

// x [batch, rows, channels] and y [batch, columns, channels], float32 or float64.
inline void fill_pairwise(const char* op, const TensorView& x, const TensorView& y, bool euclidean,
                          PairwiseParams* params) {
  pairwise_args::check_rows(op, "x", x);
  pairwise_args::check_rows(op, "y", y);
  check_value(x.dtype == DType::kFloat32 || x.dtype == DType::kFloat64, op, "x has dtype ", dtype_name(x.dtype),
              " and must have float32 or float64");
  check_like(op, "y", y, x, "x");
  check_value(x.shape[0] == y.shape[0], op, "y has ", y.shape[0], " batches and must have x's ", x.shape[0]);
  check_value(x.shape[2] == y.shape[2], op, "y has ", y.shape[2], " channels and must have x's ", x.shape[2]);
  params->dtype = x.dtype;
  params->euclidean = euclidean;
  params->batch = x.shape[0];
  params->rows = x.shape[1];
  params->columns = y.shape[1];
  params->dim = x.shape[2];
  params->x = pairwise_args::rows_of(x);
  params->y = pairwise_args::rows_of(y);
}

inline PairwiseLogsumexpParams pairwise_logsumexp_params(const char* op, const TensorView& x, const TensorView& y,
                                                         const TensorView& y_bias, const TensorView& target,
                                                         const TensorView& weights, bool euclidean, double scale,
                                                         double softcap, int64_t ignore_index, IndexCopies* copies) {
  PairwiseLogsumexpParams params;
  fill_pairwise(op, x, y, euclidean, &params);
  check_value(std::isfinite(scale), op, "scale is ", scale, " and must be finite");
  check_value(std::isfinite(softcap) && softcap >= 0, op, "softcap is ", softcap,
              " and must be finite and not negative");
  params.scale = scale;
  params.softcap = softcap;
  if (y_bias.defined()) {
    check_like(op, "y_bias", y_bias, x, "x");
    check_value(y_bias.dims == 2 && y_bias.shape[0] == params.batch && y_bias.shape[1] == params.columns, op,
                "y_bias has shape ", shape_text(y_bias), " and must have [", params.batch, ", ", params.columns, "]");
    check_last_contiguous(op, "y_bias", y_bias);
    params.y_bias = y_bias.data;
    params.bias_batch_stride = y_bias.strides[0];
  }
  if (target.defined()) {
    pairwise_args::check_indices(op, "target", target, x);
    pairwise_args::check_shape(op, "target", target, {params.batch, params.rows});
    params.target = pairwise_args::checked_targets(op, target, params.columns, ignore_index, copies);
  }
  if (weights.defined()) {
    check_like(op, "weights", weights, x, "x");
    pairwise_args::check_shape(op, "weights", weights, {params.batch, params.rows, 4});
    params.weights = weights.data;
  }
  return params;
}

// What gradients of the lse of both directions have of the columns.
inline void pairwise_columns(const char* op, const TensorView& weights, const TensorView& lse, const TensorView& x,
                             PairwiseLogsumexpParams* params) {
  const auto check = [&](const char* argument, const TensorView& view) {
    check_like(op, argument, view, x, "x");
    pairwise_args::check_shape(op, argument, view, {params->batch, params->columns});
  };
  check("column_weights", weights);
  check("column_lse", lse);
  params->column_weights = weights.data;
  params->column_lse = const_cast<void*>(static_cast<const void*>(lse.data));
}

inline const int64_t* pairwise_lengths(const char* op, const char* argument, const TensorView& lengths,
                                       const TensorView& x, int64_t most, IndexCopies* copies) {
  if (!lengths.defined()) return nullptr;
  pairwise_args::check_indices(op, argument, lengths, x);
  pairwise_args::check_shape(op, argument, lengths, {x.shape[0]});
  const int64_t* kept = copies->keep(op, lengths.as<const int64_t>(), x.shape[0]);
  for (int64_t i = 0; i < x.shape[0]; ++i) {
    check_value(kept[i] >= 0 && kept[i] <= most, op, argument, " has ", kept[i], " and must have 0 to ", most);
  }
  return kept;
}

inline PairwiseTopkParams pairwise_topk_params(const char* op, const TensorView& x, const TensorView& y, int64_t k,
                                               bool euclidean, const TensorView& x_lengths, const TensorView& y_lengths,
                                               IndexCopies* copies, PairwiseFaults* faults) {
  PairwiseTopkParams params;
  fill_pairwise(op, x, y, euclidean, &params);
  check_value(k >= 1 && k <= params.columns, op, "k is ", k, " and must be 1 to y's ", params.columns, " rows");
  params.k = k;
  params.x_lengths = pairwise_lengths(op, "x_lengths", x_lengths, x, params.rows, copies);
  params.y_lengths = pairwise_lengths(op, "y_lengths", y_lengths, x, params.columns, copies);
  params.faults = faults;
  return params;
}

inline void throw_faults(const char* op, const PairwiseTopkParams& params) {
  const auto refuse = [&](const char* argument, const std::atomic<int64_t>& fault, int64_t rows, const char* what) {
    const int64_t row = fault.load();
    if (row == PairwiseFaults::kNone) return;
    check_value(false, op, argument, " has ", what, " in row ", row % rows,
                params.batch > 1 ? " of batch " + std::to_string(row / rows) : std::string(), " and must have none");
  };
  refuse("x", params.faults->x_row, params.rows, "a NaN or an infinity");
  refuse("y", params.faults->y_row, params.columns, "a NaN or an infinity");
  refuse("x", params.faults->score_row, params.rows, "scores that its dtype does not hold");
}

// indices [batch, rows, k].
template <class Params>
Params pairwise_pairs_params(const char* op, const TensorView& x, const TensorView& y, const TensorView& indices,
                             bool euclidean, IndexCopies* copies) {
  Params params;
  fill_pairwise(op, x, y, euclidean, &params);
  pairwise_args::check_indices(op, "indices", indices, x);
  check_value(indices.dims == 3, op, "indices has shape ", shape_text(indices), " and must be [batch, rows, k]");
  params.k = indices.shape[2];
  pairwise_args::check_shape(op, "indices", indices, {params.batch, params.rows, params.k});
  params.indices = pairwise_args::checked_indices(op, "indices", indices, params.columns, copies);
  return params;
}

inline void check_pairs_grad(const char* op, const TensorView& grad, const TensorView& x,
                             const PairwisePairsBackwardParams& params) {
  check_like(op, "grad", grad, x, "x");
  pairwise_args::check_shape(op, "grad", grad, {params.batch, params.rows, params.k});
}

// x [batch, rows, bytes] and y [batch, columns, bytes], uint8.
inline HammingTopkParams hamming_topk_params(const char* op, const TensorView& x, const TensorView& y, int64_t k) {
  pairwise_args::check_rows(op, "x", x);
  pairwise_args::check_rows(op, "y", y);
  check_value(x.dtype == DType::kUInt8, op, "x has dtype ", dtype_name(x.dtype), " and must have uint8");
  check_like(op, "y", y, x, "x");
  check_value(x.shape[0] == y.shape[0], op, "y has ", y.shape[0], " batches and must have x's ", x.shape[0]);
  check_value(x.shape[2] == y.shape[2], op, "y has ", y.shape[2], " bytes a row and must have x's ", x.shape[2]);
  check_value(k >= 1 && k <= y.shape[1], op, "k is ", k, " and must be 1 to y's ", y.shape[1], " rows");
  HammingTopkParams params;
  params.batch = x.shape[0];
  params.rows = x.shape[1];
  params.columns = y.shape[1];
  params.bytes = x.shape[2];
  params.k = k;
  params.x = pairwise_args::rows_of(x);
  params.y = pairwise_args::rows_of(y);
  return params;
}

}  // namespace pycore
