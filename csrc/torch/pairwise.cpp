// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.{pairwise_logsumexp, pairwise_logsumexp_gradients, pairwise_topk, pairwise_distances_at,
// pairwise_pairs_backward, hamming_topk}: schema, validation, allocation.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../host/pairwise_args.h"
#include "tensor.h"

namespace pycore {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Scratch {
  Scratch(const char* op, const Tensor& like, int64_t bytes) {
    if (bytes == 0) return;
    memory = new_tensor(op, "scratch", like, {bytes + 63}, ScalarType::Byte);
    data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory->mutable_data_ptr()) + 63) / 64 * 64);
  }
  std::optional<Tensor> memory;
  void* data = nullptr;
};

std::optional<Tensor> dense_if(const std::optional<Tensor>& x, const char* op, const char* argument) {
  return x.has_value() ? std::optional<Tensor>(dense(*x, op, argument)) : std::nullopt;
}

// Not wanted: no elements.
Tensor result_if(bool wanted, const char* op, const char* name, const Tensor& like, std::vector<int64_t> shape) {
  return new_tensor(op, name, like, wanted ? shape : std::vector<int64_t>{0}, like.scalar_type());
}

void run(const char* op, const Tensor& like, const PairwiseLogsumexpParams& params) {
  const Parallel parallel = torch_parallel();
  const Scratch scratch(op, like, pairwise_logsumexp_scratch(params, parallel.threads));
  throw_if(pairwise_logsumexp(params, parallel, scratch.data), op);
}

std::tuple<Tensor, Tensor, Tensor> logsumexp_cpu(const Tensor& x_any, const Tensor& y_any,
                                                 const std::optional<Tensor>& bias_any,
                                                 const std::optional<Tensor>& target_any, bool euclidean, double scale,
                                                 double softcap, int64_t ignore_index, bool need_sum, Text op) {
  const char* const kOp = op.c_str();
  const Tensor x = last_contiguous(x_any, kOp, "x"), y = last_contiguous(y_any, kOp, "y");
  const std::optional<Tensor> bias = last_contiguous(bias_any, kOp, "y_bias");
  const std::optional<Tensor> target = dense_if(target_any, kOp, "target");
  IndexCopies copies;
  PairwiseLogsumexpParams params = pairwise_logsumexp_params(
      kOp, view(x, kOp, "x"), view(y, kOp, "y"), view(bias, kOp, "y_bias"), view(target, kOp, "target"), TensorView{},
      euclidean, scale, softcap, ignore_index, &copies);
  const std::vector<int64_t> shape = {params.batch, params.rows};
  const Tensor lse = result_if(true, kOp, "lse", x, shape);
  const Tensor of_target = result_if(target.has_value(), kOp, "target_logit", x, shape);
  const Tensor sum = result_if(need_sum, kOp, "logit_sum", x, shape);
  params.lse = lse.mutable_data_ptr();
  if (target.has_value()) params.target_logit = of_target.mutable_data_ptr();
  if (need_sum) params.logit_sum = sum.mutable_data_ptr();
  run(kOp, x, params);
  return {lse, of_target, sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gradients_cpu(
    const Tensor& x_any, const Tensor& y_any, const std::optional<Tensor>& bias_any,
    const std::optional<Tensor>& target_any, const Tensor& weights_any, bool euclidean, double scale, double softcap,
    int64_t ignore_index, bool need_x, bool need_y, bool need_bias, Text op) {
  const char* const kOp = op.c_str();
  const Tensor x = last_contiguous(x_any, kOp, "x"), y = last_contiguous(y_any, kOp, "y");
  const std::optional<Tensor> bias = last_contiguous(bias_any, kOp, "y_bias");
  const std::optional<Tensor> target = dense_if(target_any, kOp, "target");
  const Tensor weights = dense(weights_any, kOp, "weights");
  IndexCopies copies;
  PairwiseLogsumexpParams params = pairwise_logsumexp_params(
      kOp, view(x, kOp, "x"), view(y, kOp, "y"), view(bias, kOp, "y_bias"), view(target, kOp, "target"),
      view(weights, kOp, "weights"), euclidean, scale, softcap, ignore_index, &copies);
  const std::vector<int64_t> shape = {params.batch, params.rows};
  const Tensor lse = result_if(true, kOp, "lse", x, shape), of_target = result_if(true, kOp, "target_logit", x, shape);
  const Tensor sum = result_if(true, kOp, "logit_sum", x, shape);
  const Tensor grad_x = result_if(need_x, kOp, "grad_x", x, {params.batch, params.rows, params.dim});
  const Tensor grad_y = result_if(need_y, kOp, "grad_y", x, {params.batch, params.columns, params.dim});
  const Tensor grad_bias = result_if(need_bias, kOp, "grad_bias", x, {params.batch, params.columns});
  params.lse = lse.mutable_data_ptr();
  params.target_logit = of_target.mutable_data_ptr();
  params.logit_sum = sum.mutable_data_ptr();
  if (need_x) params.grad_x = grad_x.mutable_data_ptr();
  if (need_y) params.grad_y = grad_y.mutable_data_ptr();
  if (need_bias) params.grad_bias = grad_bias.mutable_data_ptr();
  run(kOp, x, params);
  return {lse, of_target, sum, grad_x, grad_y, grad_bias};
}

std::tuple<Tensor, Tensor> topk_cpu(const Tensor& x_any, const Tensor& y_any, int64_t k, bool euclidean,
                                    const std::optional<Tensor>& x_lengths_any,
                                    const std::optional<Tensor>& y_lengths_any, Text op) {
  const char* const kOp = op.c_str();
  const Tensor x = last_contiguous(x_any, kOp, "x"), y = last_contiguous(y_any, kOp, "y");
  const std::optional<Tensor> x_lengths = dense_if(x_lengths_any, kOp, "x_lengths");
  const std::optional<Tensor> y_lengths = dense_if(y_lengths_any, kOp, "y_lengths");
  IndexCopies copies;
  PairwiseFaults faults;
  PairwiseTopkParams params =
      pairwise_topk_params(kOp, view(x, kOp, "x"), view(y, kOp, "y"), k, euclidean, view(x_lengths, kOp, "x_lengths"),
                           view(y_lengths, kOp, "y_lengths"), &copies, &faults);
  const std::vector<int64_t> shape = {params.batch, params.rows, k};
  const Tensor scores = new_tensor(kOp, "scores", x, shape, x.scalar_type());
  const Tensor indices = new_tensor(kOp, "indices", x, shape, ScalarType::Long);
  params.scores = scores.mutable_data_ptr();
  params.indices = indices.mutable_data_ptr<int64_t>();
  const Parallel parallel = torch_parallel();
  const Scratch scratch(kOp, x, pairwise_topk_scratch(params, parallel.threads));
  throw_if(pairwise_topk(params, parallel, scratch.data), kOp);
  throw_faults(kOp, params);
  return {scores, indices};
}

Tensor distances_at_cpu(const Tensor& x_any, const Tensor& y_any, const Tensor& indices_any) {
  constexpr const char* kOp = "pairwise_distances_at";
  const Tensor x = last_contiguous(x_any, kOp, "x"), y = last_contiguous(y_any, kOp, "y");
  const Tensor indices = dense(indices_any, kOp, "indices");
  IndexCopies copies;
  auto params = pairwise_pairs_params<PairwiseDistancesParams>(kOp, view(x, kOp, "x"), view(y, kOp, "y"),
                                                               view(indices, kOp, "indices"), true, &copies);
  const Tensor out = new_tensor(kOp, "out", x, {params.batch, params.rows, params.k}, x.scalar_type());
  params.out = out.mutable_data_ptr();
  throw_if(pairwise_distances_at(params, torch_parallel()), kOp);
  return out;
}

std::tuple<Tensor, Tensor> pairs_backward_cpu(const Tensor& grad_any, const Tensor& x_any, const Tensor& y_any,
                                              const Tensor& indices_any, bool euclidean) {
  constexpr const char* kOp = "pairwise_pairs_backward";
  const Tensor x = last_contiguous(x_any, kOp, "x"), y = last_contiguous(y_any, kOp, "y");
  const Tensor grad = dense(grad_any, kOp, "grad"), indices = dense(indices_any, kOp, "indices");
  IndexCopies copies;
  const TensorView x_view = view(x, kOp, "x");
  auto params = pairwise_pairs_params<PairwisePairsBackwardParams>(kOp, x_view, view(y, kOp, "y"),
                                                                   view(indices, kOp, "indices"), euclidean, &copies);
  check_pairs_grad(kOp, view(grad, kOp, "grad"), x_view, params);
  const Tensor grad_x = result_if(true, kOp, "grad_x", x, {params.batch, params.rows, params.dim});
  const Tensor grad_y = result_if(true, kOp, "grad_y", x, {params.batch, params.columns, params.dim});
  params.grad = grad.data_ptr();
  params.grad_x = grad_x.mutable_data_ptr();
  params.grad_y = grad_y.mutable_data_ptr();
  throw_if(pairwise_pairs_backward(params, torch_parallel()), kOp);
  return {grad_x, grad_y};
}

std::tuple<Tensor, Tensor> hamming_topk_cpu(const Tensor& x_any, const Tensor& y_any, int64_t k) {
  constexpr const char* kOp = "hamming_topk";
  const Tensor x = last_contiguous(x_any, kOp, "x"), y = last_contiguous(y_any, kOp, "y");
  HammingTopkParams params = hamming_topk_params(kOp, view(x, kOp, "x"), view(y, kOp, "y"), k);
  const std::vector<int64_t> shape = {params.batch, params.rows, k};
  const Tensor distances = new_tensor(kOp, "distances", x, shape, ScalarType::Long);
  const Tensor indices = new_tensor(kOp, "indices", x, shape, ScalarType::Long);
  params.distances = distances.mutable_data_ptr<int64_t>();
  params.indices = indices.mutable_data_ptr<int64_t>();
  throw_if(hamming_topk(params, torch_parallel()), kOp);
  return {distances, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  // x [batch, rows, channels], y [batch, columns, channels], y_bias [batch, columns], target [batch, rows]. What is not
  // wanted comes back without elements. op: how messages call it.
  m.def(
      "pairwise_logsumexp(Tensor x, Tensor y, Tensor? y_bias, Tensor? target, bool euclidean, float scale, "
      "float softcap, SymInt ignore_index, bool need_sum, str op) -> (Tensor lse, Tensor target_logit, Tensor "
      "logit_sum)");
  m.def(
      "pairwise_logsumexp_gradients(Tensor x, Tensor y, Tensor? y_bias, Tensor? target, Tensor weights, "
      "bool euclidean, float scale, float softcap, SymInt ignore_index, bool need_x, bool need_y, bool need_bias, str "
      "op) -> (Tensor lse, "
      "Tensor target_logit, Tensor logit_sum, Tensor grad_x, Tensor grad_y, Tensor grad_bias)");
  m.def(
      "pairwise_topk(Tensor x, Tensor y, SymInt k, bool euclidean, Tensor? x_lengths, Tensor? y_lengths, str op) -> "
      "(Tensor scores, Tensor indices)");
  m.def("pairwise_distances_at(Tensor x, Tensor y, Tensor indices) -> Tensor");
  m.def(
      "pairwise_pairs_backward(Tensor grad, Tensor x, Tensor y, Tensor indices, bool euclidean) -> (Tensor grad_x, "
      "Tensor grad_y)");
  m.def("hamming_topk(Tensor x, Tensor y, SymInt k) -> (Tensor distances, Tensor indices)");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) {
  m.impl("pairwise_logsumexp", TORCH_BOX(&logsumexp_cpu));
  m.impl("pairwise_logsumexp_gradients", TORCH_BOX(&gradients_cpu));
  m.impl("pairwise_topk", TORCH_BOX(&topk_cpu));
  m.impl("pairwise_distances_at", TORCH_BOX(&distances_at_cpu));
  m.impl("pairwise_pairs_backward", TORCH_BOX(&pairs_backward_cpu));
  m.impl("hamming_topk", TORCH_BOX(&hamming_topk_cpu));
}

}  // namespace pycore
