// SPDX-License-Identifier: Apache-2.0
// torch.ops.pycore.lambda_cache_append: schema, validation, registration.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../host/attention_cache_args.h"
#include "stream.h"
#include "tensor.h"

namespace pycore {
namespace {

using torch::stable::Tensor;

void append(Tensor key_cache, Tensor value_cache, Tensor lengths, Tensor key, Tensor value,
            std::optional<Tensor> starts, int64_t sink_size, int64_t most, Text op) {
  const char* const name = op.c_str();
  key = last_contiguous(key, name, "key");
  value = last_contiguous(value, name, "value");
  if (starts) starts = dense(*starts, name, "starts");
  CacheAppendArgs args;
  args.op = op;
  args.key_cache = view(key_cache, name, "key_cache");
  args.value_cache = view(value_cache, name, "value_cache");
  args.lengths = view(lengths, name, "lengths");
  args.key = view(key, name, "key");
  args.value = view(value, name, "value");
  args.starts = view(starts, name, "starts");
  args.sink_size = sink_size;
  args.most = most;
  const CacheAppendParams params = cache_append_params(args);
  if (args.key.device == Device::kCuda) {
    const torch::stable::accelerator::DeviceGuard guard(args.key.device_index);
    throw_if(launch_lambda_cache_append(params, current_cuda_stream(args.key.device_index, name)), name);
  } else {
    throw_if(lambda_cache_append(params, torch_parallel()), name);
  }
}

}  // namespace
}  // namespace pycore

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  m.def(
      "lambda_cache_append(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!) lengths, Tensor key, Tensor value, "
      "Tensor? starts, SymInt sink_size, SymInt most=-1, str op=\"lambda_cache_append\") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) { m.impl("lambda_cache_append", TORCH_BOX(&pycore::append)); }

STABLE_TORCH_LIBRARY_IMPL(pycore, CUDA, m) { m.impl("lambda_cache_append", TORCH_BOX(&pycore::append)); }
