// SPDX-License-Identifier: Apache-2.0
// pycore.native's pairwise kernels, for NumPy arrays and DLPack tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "../host/pairwise_args.h"
#include "arrays.h"
#include "bindings.h"
#include "call.h"
#include "threads.h"

namespace pycore::python {
namespace {

void run(const char* op, const PairwiseLogsumexpParams& params, const py::object& threads) {
  const Parallel parallel = thread_parallel(threads, op);
  const py::gil_scoped_release release;
  const AlignedScratch scratch(op, pairwise_logsumexp_scratch(params, parallel.threads));
  throw_if(pairwise_logsumexp(params, parallel, scratch.data), op);
}

Array new_result(DType dtype, const std::vector<int64_t>& shape, const char* op, const char* argument) {
  return cpu_result(py::none(), dtype, shape, op, argument);
}

py::tuple logsumexp(py::object x, py::object y, py::object y_bias, py::object target, bool euclidean, double scale,
                    double softcap, int64_t ignore_index, bool need_sum, py::object threads) {
  constexpr const char* kOp = "pairwise_logsumexp";
  const Array x_array = input(x, kOp, "x"), y_array = input(y, kOp, "y");
  const Array bias = optional_input(y_bias, kOp, "y_bias"), targets = small_input(target, kOp, "target", 0, true);
  IndexCopies copies;
  PairwiseLogsumexpParams params =
      pairwise_logsumexp_params(kOp, x_array.view, y_array.view, bias.view, targets.view, TensorView{}, euclidean,
                                scale, softcap, ignore_index, &copies);
  const std::vector<int64_t> shape = {params.batch, params.rows};
  const Array lse = new_result(params.dtype, shape, kOp, "lse");
  const Array of_target = new_result(params.dtype, shape, kOp, "target_logit");
  const Array sum = new_result(params.dtype, shape, kOp, "logit_sum");
  params.lse = lse.view.data;
  params.target_logit = of_target.view.data;
  if (need_sum) params.logit_sum = sum.view.data;
  run(kOp, params, threads);
  return py::make_tuple(lse.object, params.target ? of_target.object : py::none(), need_sum ? sum.object : py::none());
}

py::tuple gradients(py::object x, py::object y, py::object y_bias, py::object target, py::object weights,
                    bool euclidean, double scale, double softcap, int64_t ignore_index, py::object threads) {
  constexpr const char* kOp = "pairwise_logsumexp_gradients";
  const Array x_array = input(x, kOp, "x"), y_array = input(y, kOp, "y"), of_rows = input(weights, kOp, "weights");
  const Array bias = optional_input(y_bias, kOp, "y_bias"), targets = small_input(target, kOp, "target", 0, true);
  IndexCopies copies;
  PairwiseLogsumexpParams params =
      pairwise_logsumexp_params(kOp, x_array.view, y_array.view, bias.view, targets.view, of_rows.view, euclidean,
                                scale, softcap, ignore_index, &copies);
  const std::vector<int64_t> shape = {params.batch, params.rows};
  const Array lse = new_result(params.dtype, shape, kOp, "lse");
  const Array of_target = new_result(params.dtype, shape, kOp, "target_logit");
  const Array sum = new_result(params.dtype, shape, kOp, "logit_sum");
  const Array grad_x = new_result(params.dtype, {params.batch, params.rows, params.dim}, kOp, "grad_x");
  const Array grad_y = new_result(params.dtype, {params.batch, params.columns, params.dim}, kOp, "grad_y");
  const Array grad_bias = new_result(params.dtype, {params.batch, params.columns}, kOp, "grad_bias");
  params.lse = lse.view.data;
  params.target_logit = of_target.view.data;
  params.logit_sum = sum.view.data;
  params.grad_x = grad_x.view.data;
  params.grad_y = grad_y.view.data;
  params.grad_bias = grad_bias.view.data;
  run(kOp, params, threads);
  return py::make_tuple(lse.object, of_target.object, sum.object, grad_x.object, grad_y.object, grad_bias.object);
}

py::tuple both(py::object x, py::object y, py::object target, double scale, py::object threads) {
  constexpr const char* kOp = "pairwise_logsumexp_both";
  const Array x_array = input(x, kOp, "x"), y_array = input(y, kOp, "y");
  const Array targets = small_input(target, kOp, "target", 0, true);
  IndexCopies copies;
  PairwiseLogsumexpParams params = pairwise_logsumexp_params(kOp, x_array.view, y_array.view, TensorView{},
                                                             targets.view, TensorView{}, false, scale, 0, -1, &copies);
  const Array lse = new_result(params.dtype, {params.batch, params.rows}, kOp, "lse");
  const Array column_lse = new_result(params.dtype, {params.batch, params.columns}, kOp, "column_lse");
  const Array of_target = new_result(params.dtype, {params.batch, params.rows}, kOp, "target_logit");
  params.lse = lse.view.data;
  params.column_lse = column_lse.view.data;
  params.target_logit = of_target.view.data;
  run(kOp, params, threads);
  return py::make_tuple(lse.object, column_lse.object, params.target ? of_target.object : py::none());
}

py::tuple both_backward(py::object x, py::object y, py::object target, py::object weights, py::object column_weights,
                        py::object column_lse, double scale, py::object threads) {
  constexpr const char* kOp = "pairwise_logsumexp_both_backward";
  const Array x_array = input(x, kOp, "x"), y_array = input(y, kOp, "y"), of_rows = input(weights, kOp, "weights");
  const Array of_columns = input(column_weights, kOp, "column_weights"), lses = input(column_lse, kOp, "column_lse");
  const Array targets = small_input(target, kOp, "target", 0, true);
  IndexCopies copies;
  PairwiseLogsumexpParams params = pairwise_logsumexp_params(kOp, x_array.view, y_array.view, TensorView{},
                                                             targets.view, of_rows.view, false, scale, 0, -1, &copies);
  pairwise_columns(kOp, of_columns.view, lses.view, x_array.view, &params);
  const Array lse = new_result(params.dtype, {params.batch, params.rows}, kOp, "lse");
  const Array grad_x = new_result(params.dtype, {params.batch, params.rows, params.dim}, kOp, "grad_x");
  const Array grad_y = new_result(params.dtype, {params.batch, params.columns, params.dim}, kOp, "grad_y");
  params.lse = lse.view.data;
  params.grad_x = grad_x.view.data;
  params.grad_y = grad_y.view.data;
  run(kOp, params, threads);
  return py::make_tuple(grad_x.object, grad_y.object);
}

py::tuple topk(py::object x, py::object y, py::object k, bool euclidean, py::object x_lengths, py::object y_lengths,
               py::object threads) {
  constexpr const char* kOp = "pairwise_topk";
  const Array x_array = input(x, kOp, "x"), y_array = input(y, kOp, "y");
  const Array of_x = small_input(x_lengths, kOp, "x_lengths", 0, true);
  const Array of_y = small_input(y_lengths, kOp, "y_lengths", 0, true);
  IndexCopies copies;
  PairwiseFaults faults;
  PairwiseTopkParams params = pairwise_topk_params(kOp, x_array.view, y_array.view, integer(k, kOp, "k"), euclidean,
                                                   of_x.view, of_y.view, &copies, &faults);
  const std::vector<int64_t> shape = {params.batch, params.rows, params.k};
  const Array scores = new_result(params.dtype, shape, kOp, "scores");
  const Array indices = new_result(DType::kInt64, shape, kOp, "indices");
  params.scores = scores.view.data;
  params.indices = indices.view.as<int64_t>();
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    const AlignedScratch scratch(kOp, pairwise_topk_scratch(params, parallel.threads));
    throw_if(pairwise_topk(params, parallel, scratch.data), kOp);
  }
  throw_faults(kOp, params);
  return py::make_tuple(scores.object, indices.object);
}

py::object distances_at(py::object x, py::object y, py::object indices, py::object threads) {
  constexpr const char* kOp = "pairwise_distances_at";
  const Array x_array = input(x, kOp, "x"), y_array = input(y, kOp, "y");
  const Array of = small_input(indices, kOp, "indices", 0, true);
  IndexCopies copies;
  auto params = pairwise_pairs_params<PairwiseDistancesParams>(kOp, x_array.view, y_array.view, of.view, true, &copies);
  const Array out = new_result(params.dtype, {params.batch, params.rows, params.k}, kOp, "out");
  params.out = out.view.data;
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    throw_if(pairwise_distances_at(params, parallel), kOp);
  }
  return out.object;
}

py::tuple pairs_backward(py::object grad, py::object x, py::object y, py::object indices, bool euclidean,
                         py::object threads) {
  constexpr const char* kOp = "pairwise_pairs_backward";
  const Array x_array = input(x, kOp, "x"), y_array = input(y, kOp, "y"), grads = input(grad, kOp, "grad");
  const Array of = small_input(indices, kOp, "indices", 0, true);
  IndexCopies copies;
  auto params =
      pairwise_pairs_params<PairwisePairsBackwardParams>(kOp, x_array.view, y_array.view, of.view, euclidean, &copies);
  check_pairs_grad(kOp, grads.view, x_array.view, params);
  const Array grad_x = new_result(params.dtype, {params.batch, params.rows, params.dim}, kOp, "grad_x");
  const Array grad_y = new_result(params.dtype, {params.batch, params.columns, params.dim}, kOp, "grad_y");
  params.grad = grads.view.data;
  params.grad_x = grad_x.view.data;
  params.grad_y = grad_y.view.data;
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    throw_if(pairwise_pairs_backward(params, parallel), kOp);
  }
  return py::make_tuple(grad_x.object, grad_y.object);
}

py::tuple hamming(py::object x, py::object y, py::object k, py::object threads) {
  constexpr const char* kOp = "hamming_topk";
  const Array x_array = input(x, kOp, "x"), y_array = input(y, kOp, "y");
  HammingTopkParams params = hamming_topk_params(kOp, x_array.view, y_array.view, integer(k, kOp, "k"));
  const std::vector<int64_t> shape = {params.batch, params.rows, params.k};
  const Array distances = new_result(DType::kInt64, shape, kOp, "distances");
  const Array indices = new_result(DType::kInt64, shape, kOp, "indices");
  params.distances = distances.view.as<int64_t>();
  params.indices = indices.view.as<int64_t>();
  const Parallel parallel = thread_parallel(threads, kOp);
  {
    const py::gil_scoped_release release;
    throw_if(hamming_topk(params, parallel), kOp);
  }
  return py::make_tuple(distances.object, indices.object);
}

constexpr const char* kLogsumexpDoc =
    R"(Log-sum-exp of rows of logits that are never stored: see pycore.ops.pairwise_logsumexp.

x [batch, rows, D], y [batch, columns, D], y_bias [batch, columns] or None, target [batch, rows] int64 (ignore_index: none) or None:
float32 or float64 NumPy arrays or DLPack tensors on the CPU. A logit is scale times the product, or with euclidean the
squared distance, plus y_bias. Returns (lse, logits of target or None, sums of logits or None), each [batch, rows].)";

constexpr const char* kGradientsDoc = R"(The same with gradients: see csrc/include/pycore/pairwise/pairwise.h.

weights [batch, rows, 4]: the gradient of logit z is (w0 + w1 lse) e^(z - lse) + w2 [column is target] + w3. Returns (lse,
target logits, logit sums, grad_x, grad_y, grad_bias), where grad_x and grad_y are those of products.)";

constexpr const char* kBothDoc = R"(Log-sum-exp of the rows and of the columns of scale times products, in one pass.

x [batch, rows, D], y [batch, columns, D], target [batch, rows] int64 (-1: none) or None. Returns (lse [batch, rows],
column_lse [batch, columns], logits of target [batch, rows] or None).)";

constexpr const char* kBothBackwardDoc = R"(The gradients of the same: see csrc/include/pycore/pairwise/pairwise.h.

weights [batch, rows, 4] as in pairwise_logsumexp_gradients; column_weights and column_lse [batch, columns]. Returns
(grad_x, grad_y).)";

constexpr const char* kTopkDoc = R"(The best k rows of y for each row of x: see pycore.ops.pairwise_topk.

x [batch, rows, D], y [batch, columns, D], lengths [batch] or None. Returns (scores, indices), each [batch, rows, k].)";

constexpr const char* kDistancesDoc = R"(Squared distances of x's rows to the rows of y that indices names.

x [batch, rows, D], y [batch, columns, D], indices [batch, rows, k] int64, -1 for infinitely far. Returns [batch, rows, k].)";

constexpr const char* kPairsDoc = R"(Gradients of the scores of the pairs that indices names: (grad_x, grad_y).)";

constexpr const char* kHammingDoc = R"(The k rows of bits nearest to each row: see pycore.ops.hamming_topk.

x [batch, rows, bytes], y [batch, columns, bytes], uint8. Returns (distances, indices), int64 [batch, rows, k].)";

}  // namespace

void register_pairwise(py::module_& m) {
  const py::none none;
  m.def("pairwise_logsumexp", &logsumexp, kLogsumexpDoc, py::arg("x"), py::arg("y"), py::arg("y_bias") = none,
        py::arg("target") = none, py::kw_only(), py::arg("euclidean") = false, py::arg("scale") = 1.0,
        py::arg("softcap") = 0.0, py::arg("ignore_index") = -1, py::arg("need_sum") = false, py::arg("threads") = none);
  m.def("pairwise_logsumexp_gradients", &gradients, kGradientsDoc, py::arg("x"), py::arg("y"), py::arg("y_bias"),
        py::arg("target"), py::arg("weights"), py::kw_only(), py::arg("euclidean") = false, py::arg("scale") = 1.0,
        py::arg("softcap") = 0.0, py::arg("ignore_index") = -1, py::arg("threads") = none);
  m.def("pairwise_logsumexp_both", &both, kBothDoc, py::arg("x"), py::arg("y"), py::arg("target") = none, py::kw_only(),
        py::arg("scale") = 1.0, py::arg("threads") = none);
  m.def("pairwise_logsumexp_both_backward", &both_backward, kBothBackwardDoc, py::arg("x"), py::arg("y"),
        py::arg("target"), py::arg("weights"), py::arg("column_weights"), py::arg("column_lse"), py::kw_only(),
        py::arg("scale") = 1.0, py::arg("threads") = none);
  m.def("pairwise_topk", &topk, kTopkDoc, py::arg("x"), py::arg("y"), py::arg("k"), py::kw_only(),
        py::arg("euclidean") = false, py::arg("x_lengths") = none, py::arg("y_lengths") = none,
        py::arg("threads") = none);
  m.def("pairwise_distances_at", &distances_at, kDistancesDoc, py::arg("x"), py::arg("y"), py::arg("indices"),
        py::kw_only(), py::arg("threads") = none);
  m.def("pairwise_pairs_backward", &pairs_backward, kPairsDoc, py::arg("grad"), py::arg("x"), py::arg("y"),
        py::arg("indices"), py::kw_only(), py::arg("euclidean") = false, py::arg("threads") = none);
  m.def("hamming_topk", &hamming, kHammingDoc, py::arg("x"), py::arg("y"), py::arg("k"), py::kw_only(),
        py::arg("threads") = none);
}

}  // namespace pycore::python
