// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.ngram_update, ngram_lookup and ngram_draft: schemas, validation, allocation, registration.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../host/ngram_args.h"
#include "tensor.h"

namespace pycore {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

NgramTableArgs table_args(const char* op, const Tensor& keys, const Tensor& successors, const Tensor& scores) {
  return {view(keys, op, "keys"), view(successors, op, "successors"), view(scores, op, "scores")};
}

Tensor update(Tensor keys, Tensor successors, Tensor scores, const Tensor& trigrams_any, const Tensor& weights_any) {
  constexpr const char* kOp = "ngram_update";
  const Tensor trigrams = dense(trigrams_any, kOp, "trigrams"), weights = dense(weights_any, kOp, "weights");
  IndexCopies copies;
  NgramUpdateParams params =
      ngram_update_params(table_args(kOp, keys, successors, scores), view(trigrams, kOp, "trigrams"),
                          view(weights, kOp, "weights"), &copies);
  const Tensor result = new_tensor(kOp, "result", keys, {2}, ScalarType::Long);
  params.result = static_cast<int64_t*>(result.mutable_data_ptr());
  throw_if(ngram_update(params), kOp);
  return result;
}

std::tuple<Tensor, Tensor> lookup(const Tensor& keys, const Tensor& successors, const Tensor& scores,
                                  const Tensor& contexts_any) {
  constexpr const char* kOp = "ngram_lookup";
  const Tensor contexts = dense(contexts_any, kOp, "contexts");
  IndexCopies copies;
  NgramLookupParams params =
      ngram_lookup_params(table_args(kOp, keys, successors, scores), view(contexts, kOp, "contexts"), &copies);
  const Tensor found = new_tensor(kOp, "successors", keys, {params.rows, kNgramSlots}, ScalarType::Long);
  const Tensor probs = new_tensor(kOp, "probs", keys, {params.rows, kNgramSlots}, ScalarType::Float);
  params.successors = static_cast<int64_t*>(found.mutable_data_ptr());
  params.probs = static_cast<float*>(probs.mutable_data_ptr());
  throw_if(ngram_lookup(params), kOp);
  return {found, probs};
}

std::tuple<Tensor, Tensor> draft(const Tensor& keys, const Tensor& successors, const Tensor& scores, int64_t first,
                                 int64_t second, int64_t nodes, int64_t depth) {
  constexpr const char* kOp = "ngram_draft";
  NgramDraftParams params = ngram_draft_params(table_args(kOp, keys, successors, scores), first, second, nodes, depth);
  const Tensor tokens = new_tensor(kOp, "tokens", keys, {nodes}, ScalarType::Long);
  const Tensor parents = new_tensor(kOp, "parents", keys, {nodes}, ScalarType::Long);
  params.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  params.parents = static_cast<int64_t*>(parents.mutable_data_ptr());
  throw_if(ngram_draft(params), kOp);
  return {tokens, parents};
}

}  // namespace
}  // namespace pycore

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  m.def(
      "ngram_update(Tensor(a!) keys, Tensor(b!) successors, Tensor(c!) scores, Tensor trigrams, Tensor weights) -> "
      "Tensor");
  m.def("ngram_lookup(Tensor keys, Tensor successors, Tensor scores, Tensor contexts) -> (Tensor, Tensor)");
  m.def(
      "ngram_draft(Tensor keys, Tensor successors, Tensor scores, SymInt first, SymInt second, SymInt nodes, "
      "SymInt depth) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) {
  m.impl("ngram_update", TORCH_BOX(&pycore::update));
  m.impl("ngram_lookup", TORCH_BOX(&pycore::lookup));
  m.impl("ngram_draft", TORCH_BOX(&pycore::draft));
}
