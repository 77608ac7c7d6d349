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
            std::optional<Tensor> starts, int64_t sink_size) {
  constexpr const char* kOp = "lambda_cache_append";
  key = last_contiguous(key, kOp, "key");
  value = last_contiguous(value, kOp, "value");
  if (starts) starts = dense(*starts, kOp, "starts");
  CacheAppendArgs args;
  args.key_cache = view(key_cache, kOp, "key_cache");
  args.value_cache = view(value_cache, kOp, "value_cache");
  args.lengths = view(lengths, kOp, "lengths");
  args.key = view(key, kOp, "key");
  args.value = view(value, kOp, "value");
  args.starts = view(starts, kOp, "starts");
  args.sink_size = sink_size;
  const CacheAppendParams params = cache_append_params(args);
  if (args.key.device == Device::kCuda) {
    const torch::stable::accelerator::DeviceGuard guard(args.key.device_index);
    throw_if(launch_lambda_cache_append(params, current_cuda_stream(args.key.device_index, kOp)), kOp);
  } else {
    throw_if(lambda_cache_append(params, torch_parallel()), kOp);
  }
}

}  // namespace
}  // namespace pycore

STABLE_TORCH_LIBRARY_FRAGMENT(pycore, m) {
  m.def(
      "lambda_cache_append(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!) lengths, Tensor key, Tensor value, "
      "Tensor? starts, SymInt sink_size) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pycore, CPU, m) { m.impl("lambda_cache_append", TORCH_BOX(&pycore::append)); }

STABLE_TORCH_LIBRARY_IMPL(pycore, CUDA, m) { m.impl("lambda_cache_append", TORCH_BOX(&pycore::append)); }
