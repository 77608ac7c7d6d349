// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.staircase_attention: schema, validation, allocation, registration.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../host/staircase_attention_args.h"
#include "staircase_storage.h"
#include "tensor.h"

namespace pycore {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> attend(Tensor query, std::vector<Tensor> key_storage, std::vector<Tensor> value_storage,
                                  Tensor ends, OptionalTensor distance_bias, OptionalTensor sink_logits,
                                  std::vector<int64_t> key_bits, std::vector<int64_t> value_bits, int64_t sink_size,
                                  int64_t step, int64_t group_size, Text grid, Text schedule,
                                  std::vector<int64_t> schedule_args, double scale, double softcap) {
  constexpr const char* kOp = "staircase_attention";
  query = last_contiguous(query, kOp, "query");
  ends = dense(ends, kOp, "ends");
  distance_bias = last_contiguous(distance_bias, kOp, "distance_bias");
  sink_logits = last_contiguous(sink_logits, kOp, "sink_logits");
  const std::vector<TensorView> key_views = storage_views(key_storage, kOp, "key_storage");
  const std::vector<TensorView> value_views = storage_views(value_storage, kOp, "value_storage");
  StaircaseAttentionArgs args;
  args.query = view(query, kOp, "query");
  args.key_storage = key_views.data();
  args.value_storage = value_views.data();
  args.ends = view(ends, kOp, "ends");
  args.ladder = {key_bits, sink_size, step, group_size, grid};
  args.value_bits = value_bits;
  args.schedule = schedule;
  args.schedule_args = schedule_args;
  args.distance_bias = view(distance_bias, kOp, "distance_bias");
  args.sink_logits = view(sink_logits, kOp, "sink_logits");
  args.scale = scale;
  args.softcap = softcap;
  StaircaseAttentionMemory memory;
  AttentionParams params = staircase_attention_params(args, &memory);
  Tensor out = new_tensor(kOp, "out", query, {params.batch, params.heads, params.query_length, params.value_dim},
                          ScalarType::Float);
  Tensor lse = new_tensor(kOp, "lse", query, {params.batch, params.heads, params.query_length}, ScalarType::Float);
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr();
  const Parallel parallel = torch_parallel();
  const Scratch scratch(kOp, query, attention_forward_scratch(params, parallel.threads));
  throw_if(attention_forward(params, parallel, scratch.data), kOp);
  return {out, lse};
}

}  // namespace
}  // namespace pycore

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  m.def(
      "staircase_attention(Tensor query, Tensor[] key_storage, Tensor[] value_storage, Tensor ends, Tensor? "
      "distance_bias, Tensor? sink_logits, SymInt[] key_bits, SymInt[] value_bits, SymInt sink_size, SymInt step, "
      "SymInt group_size, str grid, str schedule, SymInt[] schedule_args, float scale, float softcap) -> (Tensor out, "
      "Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) { m.impl("staircase_attention", TORCH_BOX(&pycore::attend)); }
