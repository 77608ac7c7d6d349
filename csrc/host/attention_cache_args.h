// SPDX-License-Identifier: Apache-2.0
// What both faces check before tokens are appended to an evicting cache.
#pragma once

#include <pycore/attention/cache.h>
#include <pycore/dtype.h>
#include <pycore/tensor_view.h>

#include <algorithm>

#include "checks.h"
#include "index_copies.h"

namespace pycore {

struct CacheAppendArgs {
  TensorView key_cache, value_cache, lengths;  // written
  TensorView key, value;
  TensorView starts;  // not defined(): no padding
  int64_t sink_size = 0;
  mutable IndexCopies copies;  // of lengths and starts, on the CPU
};

inline CacheAppendParams cache_append_params(const CacheAppendArgs& args) {
  constexpr const char* kOp = "lambda_cache_append";
  CacheAppendParams params;
  const TensorView& cache = args.key_cache;
  const struct {
    const char* name;
    const TensorView& view;
  } all[] = {{"key_cache", cache}, {"value_cache", args.value_cache}, {"key", args.key}, {"value", args.value}};
  for (const auto& [name, view] : all) {
    check_value(view.dims == 4, kOp, name, " has ", view.dims,
                " dimensions and must have 4: [batch, kv_heads, tokens, channels]");
    check_like(kOp, name, view, cache, "key_cache");
    check_value(view.shape[0] == cache.shape[0] && view.shape[1] == cache.shape[1], kOp, name, " has shape ",
                shape_text(view), " and must have ", cache.shape[0], " batch rows and ", cache.shape[1], " heads");
    check_last_contiguous(kOp, name, view);
  }
  check_value(is_floating(cache.dtype), kOp, "key_cache is ", dtype_name(cache.dtype),
              " and must be float32, float16, bfloat16 or float64");
  check_value(cache.device != Device::kOther, kOp, "key_cache must be on the CPU or on a CUDA device");
  params.batch = cache.shape[0];
  params.kv_heads = cache.shape[1];
  params.tokens = args.key.shape[2];
  check_value(args.sink_size >= 0 && args.sink_size <= cache.shape[2], kOp, "sink_size is ", args.sink_size,
              " and must be between 0 and the cache's rows, ", cache.shape[2]);
  params.sinks = args.sink_size;
  params.ring = cache.shape[2] - args.sink_size;
  check_value(params.ring > 0 && params.ring % kKeyTile == 0, kOp, "key_cache has ", params.ring,
              " rows past the sinks and must have a multiple of ", kKeyTile);
  check_value(args.value_cache.shape[2] == cache.shape[2], kOp, "value_cache has ", args.value_cache.shape[2],
              " rows and must have ", cache.shape[2], " like key_cache");
  check_value(args.value.shape[2] == params.tokens, kOp, "value has ", args.value.shape[2], " tokens and key has ",
              params.tokens, "; they must be equal");
  for (int i = 0; i < 2; ++i) {
    const TensorView& held = all[i].view;
    check_value(all[i + 2].view.shape[3] == held.shape[3], kOp, all[i + 2].name, " has ", all[i + 2].view.shape[3],
                " channels and must have ", held.shape[3], " like ", all[i].name);
    check_contiguous(kOp, all[i].name, held);
  }
  const struct {
    const char* name;
    const TensorView& view;
  } indices[] = {{"lengths", args.lengths}, {"starts", args.starts}};
  for (const auto& [name, view] : indices) {
    if (!view.defined()) continue;
    check_value(view.dtype == DType::kInt64 && view.dims == 1 && view.shape[0] == params.batch, kOp, name, " is ",
                dtype_name(view.dtype), " ", shape_text(view), " and must be int64 [", params.batch, "]");
    check_contiguous(kOp, name, view);
    check_device_of(kOp, name, view, cache, "key_cache");
  }
  params.lengths = args.lengths.as<int64_t>();
  params.starts = args.starts.defined() ? args.starts.as<const int64_t>() : nullptr;
  const bool readable = cache.device == Device::kCpu;
  if (readable) {
    params.seen = args.copies.keep(kOp, params.lengths, params.batch);
    if (params.starts) params.starts = args.copies.keep(kOp, params.starts, params.batch);
  }
  for (int64_t b = 0; b < params.batch && readable; ++b) {
    check_value(params.seen[b] >= 0 && params.seen[b] < kFar - params.tokens, kOp, "lengths[", b, "] is ",
                params.seen[b], " and must be between 0 and ", kFar - params.tokens - 1);
    check_value(!params.starts || (params.starts[b] >= 0 && params.starts[b] <= params.tokens), kOp, "starts[", b,
                "] is ", params.starts ? params.starts[b] : 0, " and must be between 0 and key's ", params.tokens,
                " tokens");
  }
  const NamedView written[] = {
      {"key_cache", args.key_cache}, {"value_cache", args.value_cache}, {"lengths", args.lengths}};
  const NamedView read[] = {{"key", args.key}, {"value", args.value}, {"starts", args.starts}};
  check_disjoint(kOp, written, read);
  const auto source = [](const TensorView& view) {
    const int64_t size = dtype_size(view.dtype);
    return CacheSource{view.as<const char>(), view.strides[0] * size, view.strides[1] * size, view.strides[2] * size,
                       view.shape[3] * size};
  };
  params.key = source(args.key);
  params.value = source(args.value);
  params.key_cache = args.key_cache.as<char>();
  params.value_cache = args.value_cache.as<char>();
  return params;
}

}  // namespace pycore
