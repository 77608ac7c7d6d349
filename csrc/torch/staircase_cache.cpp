// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.{staircase_cache_append, staircase_cache_read}: schema, validation, registration.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "../host/staircase_cache_args.h"
#include "staircase_storage.h"
#include "tensor.h"

namespace pycore {
namespace {

using torch::stable::Tensor;

void append(std::vector<Tensor> key_storage, std::vector<Tensor> value_storage, Tensor lengths, Tensor key,
            Tensor value, std::optional<Tensor> starts, std::vector<int64_t> key_bits, std::vector<int64_t> value_bits,
            int64_t sink_size, int64_t step, int64_t group_size, Text grid) {
  constexpr const char* kOp = "staircase_cache_append";
  key = last_contiguous(key, kOp, "key");
  value = last_contiguous(value, kOp, "value");
  if (starts) starts = dense(*starts, kOp, "starts");
  const std::vector<TensorView> key_views = storage_views(key_storage, kOp, "key_storage");
  const std::vector<TensorView> value_views = storage_views(value_storage, kOp, "value_storage");
  StaircaseAppendArgs args;
  args.key_storage = key_views.data();
  args.value_storage = value_views.data();
  args.lengths = view(lengths, kOp, "lengths");
  args.key = view(key, kOp, "key");
  args.value = view(value, kOp, "value");
  args.starts = view(starts, kOp, "starts");
  args.ladder = {key_bits, sink_size, step, group_size, grid};
  args.value_bits = value_bits;
  const StaircaseCacheParams params = staircase_append_params(args);
  const Parallel parallel = torch_parallel();
  const int64_t fault = staircase_cache_fault(params, parallel);
  if (fault >= 0) throw_cache_fault(args, params, fault);
  throw_if(staircase_cache_append(params, parallel), kOp);
}

Tensor read(std::vector<Tensor> storage, Tensor positions, Tensor ends, std::vector<int64_t> bits, bool by_token,
            int64_t sink_size, int64_t step, int64_t group_size, Text grid, int64_t tokens, bool wide) {
  constexpr const char* kOp = "staircase_cache_read";
  const std::vector<TensorView> side = storage_views(storage, kOp, "storage");
  StaircaseReadArgs args;
  args.storage = side.data();
  args.positions = view(positions, kOp, "positions");
  args.ends = view(ends, kOp, "ends");
  args.ladder = {bits, sink_size, step, group_size, grid};
  args.by_token = by_token;
  args.wide = wide;
  args.tokens = tokens;
  StaircaseReadParams params = staircase_read_params(args);
  const Tensor out = new_tensor(kOp, "out", storage[0], {params.batch, params.kv_heads, tokens, params.side.channels},
                                wide ? torch::headeronly::ScalarType::Float : storage[0].scalar_type());
  params.out = static_cast<char*>(out.mutable_data_ptr());
  throw_if(staircase_cache_read(params, torch_parallel()), kOp);
  return out;
}

}  // namespace
}  // namespace pycore

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  // Storage: full, plane2, plane4, plane8, lo, hi, centers2, centers4, centers8; without elements what the ladder does
  // not need.
  m.def(
      "staircase_cache_append(Tensor(a!)[] key_storage, Tensor(b!)[] value_storage, Tensor(c!) lengths, Tensor key, "
      "Tensor value, Tensor? starts, SymInt[] key_bits, SymInt[] value_bits, SymInt sink_size, SymInt step, "
      "SymInt group_size, str grid) -> ()");
  // What a query at each row's position reads of its first `ends` tokens; zero past them. wide: in float32.
  m.def(
      "staircase_cache_read(Tensor[] storage, Tensor positions, Tensor ends, SymInt[] bits, bool by_token, SymInt "
      "sink_size, "
      "SymInt step, SymInt group_size, str grid, SymInt tokens, bool wide) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) {
  m.impl("staircase_cache_append", TORCH_BOX(&pycore::append));
  m.impl("staircase_cache_read", TORCH_BOX(&pycore::read));
}
