// SPDX-License-Identifier: Apache-2.0
// What both faces check before tokens are appended to a cache.
#pragma once

#include <pycore/attention/cache.h>
#include <pycore/dtype.h>
#include <pycore/tensor_view.h>

#include <algorithm>
#include <string>

#include "checks.h"
#include "index_copies.h"

namespace pycore {

struct CacheAppendArgs {
  std::string op = "lambda_cache_append";      // the public function called; it opens every message
  TensorView key_cache, value_cache, lengths;  // written
  TensorView key, value;
  TensorView starts;  // not defined(): no padding
  int64_t sink_size = 0;
  int64_t most = -1;           // tokens that a row of the batch may have; -1: any number, the newest over the oldest
  mutable IndexCopies copies;  // of lengths and starts, on the CPU
};

inline CacheAppendParams cache_append_params(const CacheAppendArgs& args) {
  const std::string& op = args.op;
  CacheAppendParams params;
  const TensorView& cache = args.key_cache;
  const bool tiles = cache.dims == 5;
  const int64_t held = tiles ? cache.shape[2] * kKeyTile : cache.shape[2];
  const struct {
    const char* name;
    const TensorView& view;
  } all[] = {{"key_cache", cache}, {"value_cache", args.value_cache}, {"key", args.key}, {"value", args.value}};
  for (const auto& [name, view] : all) {
    check_value(view.dims == 4 || (&view == &cache && tiles), op, name, " has ", view.dims,
                " dimensions and must have 4: [batch, kv_heads, tokens, channels]");
    check_like(op, name, view, cache, "key_cache");
    check_value(view.shape[0] == cache.shape[0] && view.shape[1] == cache.shape[1], op, name, " has shape ",
                shape_text(view), " and must have ", cache.shape[0], " batch rows and ", cache.shape[1], " heads");
    check_last_contiguous(op, name, view);
  }
  check_value(is_floating(cache.dtype), op, "key_cache is ", dtype_name(cache.dtype),
              " and must be float32, float16, bfloat16 or float64");
  check_value(cache.device != Device::kOther, op, "key_cache must be on the CPU or on a CUDA device");
  params.batch = cache.shape[0];
  params.kv_heads = cache.shape[1];
  params.tokens = args.key.shape[2];
  if (tiles) {
    check_value(cache.device == Device::kCpu, op, "key_cache is in tiles and must be in rows on a CUDA device");
    check_value(cache.shape[4] == kKeyTile, op, "key_cache has shape ", shape_text(cache),
                " and must be [batch, kv_heads, tiles, channels, ", kKeyTile, "]");
    check_value(args.sink_size % kKeyTile == 0, op, "sink_size is ", args.sink_size, " and must be a multiple of ",
                kKeyTile, " where key_cache is in tiles");
    params.key_element = dtype_size(cache.dtype);
  }
  check_value(args.sink_size >= 0 && args.sink_size <= held, op, "sink_size is ", args.sink_size,
              " and must be between 0 and the cache's rows, ", held);
  params.sinks = args.sink_size;
  params.ring = held - args.sink_size;
  check_value(params.ring > 0 && params.ring % kKeyTile == 0, op, "key_cache has ", params.ring,
              " rows past the sinks and must have a multiple of ", kKeyTile);
  check_value(args.value_cache.shape[2] == held, op, "value_cache has ", args.value_cache.shape[2],
              " rows and must have ", held, " like key_cache");
  check_value(args.most <= held, op, "most is ", args.most, " and must be at most the cache's rows, ", held);
  check_value(args.value.shape[2] == params.tokens, op, "value has ", args.value.shape[2], " tokens and key has ",
              params.tokens, "; they must be equal");
  for (int i = 0; i < 2; ++i) {
    const TensorView& kept = all[i].view;
    check_value(all[i + 2].view.shape[3] == kept.shape[3], op, all[i + 2].name, " has ", all[i + 2].view.shape[3],
                " channels and must have ", kept.shape[3], " like ", all[i].name);
    check_contiguous(op, all[i].name, kept);
  }
  const struct {
    const char* name;
    const TensorView& view;
  } indices[] = {{"lengths", args.lengths}, {"starts", args.starts}};
  for (const auto& [name, view] : indices) {
    if (!view.defined()) continue;
    check_value(view.dtype == DType::kInt64 && view.dims == 1 && view.shape[0] == params.batch, op, name, " is ",
                dtype_name(view.dtype), " ", shape_text(view), " and must be int64 [", params.batch, "]");
    check_contiguous(op, name, view);
    check_device_of(op, name, view, cache, "key_cache");
  }
  params.lengths = args.lengths.as<int64_t>();
  params.starts = args.starts.defined() ? args.starts.as<const int64_t>() : nullptr;
  const bool readable = cache.device == Device::kCpu;
  if (readable) {
    params.seen = args.copies.keep(op, params.lengths, params.batch);
    if (params.starts) params.starts = args.copies.keep(op, params.starts, params.batch);
  }
  check_value(args.most < 0 || readable, op, "most is ", args.most, " and must be -1 on a CUDA device");
  for (int64_t b = 0; b < params.batch && readable; ++b) {
    check_value(params.seen[b] >= 0 && params.seen[b] < kFar - params.tokens, op, "lengths[", b, "] is ",
                params.seen[b], " and must be between 0 and ", kFar - params.tokens - 1);
    check_value(!params.starts || (params.starts[b] >= 0 && params.starts[b] <= params.tokens), op, "starts[", b,
                "] is ", params.starts ? params.starts[b] : 0, " and must be between 0 and key's ", params.tokens,
                " tokens");
    const int64_t end = params.seen[b] + params.tokens - (params.starts ? params.starts[b] : 0);
    check_value(args.most < 0 || end <= args.most, op, "key has ", params.tokens,
                " tokens, with which a row would have ", end, ", and must leave it with at most ", args.most);
  }
  const NamedView written[] = {
      {"key_cache", args.key_cache}, {"value_cache", args.value_cache}, {"lengths", args.lengths}};
  const NamedView read[] = {{"key", args.key}, {"value", args.value}, {"starts", args.starts}};
  check_disjoint(op, written, read);
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
