// SPDX-License-Identifier: Apache-2.0
// What both faces check before tokens are appended to a staircase cache, or read from it.
#pragma once

#include <pycore/staircase/cache.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "checks.h"
#include "index_copies.h"
#include "staircase_args.h"

namespace pycore {

inline constexpr int64_t kStorageTensors = 9;
inline constexpr const char* kStorageNames[kStorageTensors] = {"full", "plane2",   "plane4",   "plane8",  "lo",
                                                               "hi",   "centers2", "centers4", "centers8"};
inline constexpr int64_t kMostGroup = 256;

struct StaircaseLadder {
  std::vector<int64_t> bits;
  int64_t sink_size = 0, step = 0, group_size = 0;
  std::string grid = "embedded";
  const char* name = "bits";  // of the argument
};

inline void check_ladder(const char* op, const StaircaseLadder& ladder) {
  const char* name = ladder.name;
  const std::vector<int64_t>& bits = ladder.bits;
  check_value(ladder.group_size >= 1 && ladder.group_size <= kMostGroup, op, "group_size is ", ladder.group_size,
              " and must be between 1 and ", kMostGroup);
  check_value(ladder.step >= ladder.group_size && ladder.step % ladder.group_size == 0, op, "step is ", ladder.step,
              " and must be a multiple of group_size, ", ladder.group_size);
  check_value(ladder.sink_size >= 0 && ladder.sink_size < kFar, op, "sink_size is ", ladder.sink_size,
              " and must be at least 0");
  check_value(!bits.empty() && bits.size() <= kMostStaircaseSteps, op, name, " has ", bits.size(),
              " entries and must have between 1 and ", kMostStaircaseSteps);
  for (size_t i = 0; i < bits.size(); ++i) {
    check_value(bits[i] == 16 || bits[i] == 8 || bits[i] == 4 || bits[i] == 2, op, name, "[", i, "] is ", bits[i],
                " and must be 16, 8, 4 or 2");
    check_value(i == 0 || bits[i] <= bits[i - 1], op, name, "[", i, "] is ", bits[i], " and must be at most ",
                i > 0 ? bits[i - 1] : 16, ", the step before");
    check_value(ladder.grid != "minmax" || bits[i] == 16 || bits[i] == bits.back(), op, name, "[", i, "] is ", bits[i],
                " and must be 16 or ", bits.back(), ": the min-max grid has one width");
  }
}

// A side, from the tensors of its storage: what each must be follows from `full` and the ladder.
inline StaircaseSide staircase_side(const char* op, const std::string& name, const TensorView* storage, bool by_token,
                                    const StaircaseLadder& ladder) {
  check_ladder(op, ladder);
  const TensorView& full = storage[0];
  const auto named = [&](int64_t i) { return name + "[" + std::to_string(i) + "], " + kStorageNames[i] + ","; };
  check_staircase_float(op, named(0).c_str(), full);
  check_value(full.dims == 4, op, named(0), " has ", full.dims,
              " dimensions and must have 4: [batch, kv_heads, rows, channels]");
  StaircaseSide side;
  side.by_token = by_token;
  side.channels = full.shape[3];
  side.group = ladder.group_size;
  side.grid = staircase_grid(op, ladder.grid);
  side.steps = static_cast<int32_t>(ladder.bits.size());
  for (int32_t i = 0; i < side.steps; ++i) side.bits[i] = static_cast<int32_t>(ladder.bits[static_cast<size_t>(i)]);
  side.full_rows = full.shape[2] - ladder.sink_size;
  const int64_t group = ladder.group_size;
  check_value(side.full_rows >= 0 && side.full_rows % group == 0, op, named(0), " has ", side.full_rows,
              " rows past the sinks and must have a multiple of group_size, ", group);
  side.full = full.as<char>();
  const int64_t pairs = size_product({full.shape[0], full.shape[1]});
  int64_t widest = 0;  // quantized
  bool narrow = false, four = false, eight = false;
  for (int32_t i = 0; i < side.steps; ++i) {
    if (side.bits[i] < 16) widest = std::max<int64_t>(widest, side.bits[i]);
    narrow |= side.bits[i] == 2;
    four |= side.bits[i] == 4;
    eight |= side.bits[i] == 8;
  }
  const auto contiguous = [&](int64_t i) { check_value(storage[i].contiguous(), op, named(i), " must be contiguous"); };
  contiguous(0);
  // Tokens that tensor i holds, `tile` elements for each tile of them.
  const auto rows_of = [&](int64_t i, bool wanted, int64_t tile, DType dtype) -> int64_t {
    const TensorView& view = storage[i];
    if (!wanted) {
      check_value(view.count() == 0, op, named(i), " has shape ", shape_text(view), " and must have no elements");
      return 0;
    }
    check_value(view.device == Device::kCpu, op, named(i), " is not on the CPU, where full is");
    check_value(view.dtype == dtype, op, named(i), " has dtype ", dtype_name(view.dtype), " and must have ",
                dtype_name(dtype));
    check_value(
        view.dims == 4 && view.shape[0] == full.shape[0] && view.shape[1] == full.shape[1] && view.shape[3] == tile, op,
        named(i), " has shape ", shape_text(view), " and must be [", full.shape[0], ", ", full.shape[1], ", tiles, ",
        tile, "]");
    contiguous(i);
    check_value(view.shape[2] < kFar / group, op, named(i), " has ", view.shape[2], " tiles, which is too many");
    return view.shape[2] * group;
  };
  const bool wanted[kStaircasePlanes] = {widest >= 2, widest >= 4, widest >= 8};
  for (int32_t k = 0; k < kStaircasePlanes; ++k) {
    side.plane_rows[k] = rows_of(1 + k, wanted[k], tile_plane_bytes(side, group, k), DType::kUInt8);
    side.planes[k] = wanted[k] && pairs > 0 ? storage[1 + k].as<uint8_t>() : nullptr;
    check_value(!wanted[k] || side.plane_rows[k] > 0, op, named(1 + k), " has no tiles and must have some");
  }
  const int64_t wide = tile_groups(side, group);
  for (int64_t i = 4; i < 6; ++i) {
    check_value(rows_of(i, widest > 0, wide, full.dtype) == side.plane_rows[0], op, named(i), " has shape ",
                shape_text(storage[i]), " and must have plane2's tiles");
  }
  side.lo = widest > 0 ? storage[4].as<char>() : nullptr;
  side.hi = widest > 0 ? storage[5].as<char>() : nullptr;
  const bool embedded = side.grid == StaircaseGrid::kEmbedded,
             centered[kStaircasePlanes] = {narrow && embedded, four && embedded, eight && embedded};
  for (int32_t k = 0; k < kStaircasePlanes; ++k) {
    side.center_rows[k] = rows_of(6 + k, centered[k], wide, DType::kUInt8);
    check_value(!centered[k] || side.center_rows[k] == side.plane_rows[k], op, named(6 + k), " has shape ",
                shape_text(storage[6 + k]), " and must have ", kStorageNames[1 + k], "'s tiles");
    side.centers[k] = centered[k] ? storage[6 + k].as<uint8_t>() : nullptr;
  }
  return side;
}

// The tokens of which a side loses none: INT64_MAX where there is no limit.
inline int64_t staircase_capacity(const StaircaseSide& side, int64_t sinks) {
  const int32_t last = side.bits[side.steps - 1];
  if (last == 16) return sinks + side.full_rows;
  int64_t rows = side.plane_rows[0];
  if (last >= 4) rows = std::min(rows, side.plane_rows[1]);
  if (last >= 8) rows = std::min(rows, side.plane_rows[2]);
  // A tile that is not finished is in the ring of full tokens, and in no plane.
  return side.full_rows == 0 ? 0 : rows;
}

struct StaircaseAppendArgs {
  const TensorView* key_storage = nullptr;  // kStorageTensors of each
  const TensorView* value_storage = nullptr;
  TensorView lengths;  // written
  TensorView key, value, starts;
  StaircaseLadder ladder;  // bits: the key's
  std::vector<int64_t> value_bits;
  mutable IndexCopies copies;
};

inline StaircaseCacheParams staircase_append_params(const StaircaseAppendArgs& args) {
  constexpr const char* kOp = "staircase_cache_append";
  StaircaseCacheParams params;
  StaircaseLadder key_ladder = args.ladder, value_ladder = args.ladder;
  key_ladder.name = "key_bits";
  value_ladder.name = "value_bits";
  value_ladder.bits = args.value_bits;
  params.key = staircase_side(kOp, "key_storage", args.key_storage, false, key_ladder);
  params.value = staircase_side(kOp, "value_storage", args.value_storage, true, value_ladder);
  const TensorView& full = args.key_storage[0];
  params.dtype = full.dtype;
  params.batch = full.shape[0];
  params.kv_heads = full.shape[1];
  params.sinks = args.ladder.sink_size;
  params.step = args.ladder.step;
  params.group = args.ladder.group_size;
  const TensorView& other = args.value_storage[0];
  check_value(other.dtype == full.dtype && other.shape[0] == params.batch && other.shape[1] == params.kv_heads, kOp,
              "value_storage[0] is ", dtype_name(other.dtype), " ", shape_text(other), " and must be ",
              dtype_name(full.dtype), " of ", params.batch, " batch rows and ", params.kv_heads, " heads");
  const struct {
    const char* name;
    const TensorView& view;
    int64_t channels;
  } fresh[] = {{"key", args.key, params.key.channels}, {"value", args.value, params.value.channels}};
  params.tokens = args.key.dims == 4 ? args.key.shape[2] : 0;
  for (const auto& [name, view, channels] : fresh) {
    check_value(view.dims == 4 && view.shape[0] == params.batch && view.shape[1] == params.kv_heads &&
                    view.shape[3] == channels && view.shape[2] == params.tokens,
                kOp, name, " has shape ", shape_text(view), " and must be [", params.batch, ", ", params.kv_heads, ", ",
                params.tokens, ", ", channels, "]");
    check_value(view.dtype == full.dtype, kOp, name, " has dtype ", dtype_name(view.dtype), " and must have ",
                dtype_name(full.dtype));
    check_value(view.device == Device::kCpu, kOp, name, " is not on the CPU, where the storage is");
    check_last_contiguous(kOp, name, view);
  }
  const NamedView indices[] = {{"lengths", args.lengths}, {"starts", args.starts}};
  for (const auto& [name, view] : indices) {
    if (!view.defined()) continue;
    check_value(view.dtype == DType::kInt64 && view.dims == 1 && view.shape[0] == params.batch, kOp, name, " is ",
                dtype_name(view.dtype), " ", shape_text(view), " and must be int64 [", params.batch, "]");
    check_value(view.device == Device::kCpu, kOp, name, " is not on the CPU, where the storage is");
    check_contiguous(kOp, name, view);
  }
  params.lengths = args.lengths.as<int64_t>();
  params.seen = args.copies.keep(kOp, params.lengths, params.batch);
  params.starts =
      args.starts.defined() ? args.copies.keep(kOp, args.starts.as<const int64_t>(), params.batch) : nullptr;
  const int64_t capacity =
      std::min(staircase_capacity(params.key, params.sinks), staircase_capacity(params.value, params.sinks));
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t start = params.starts ? params.starts[b] : 0;
    check_value(start >= 0 && start <= params.tokens, kOp, "starts[", b, "] is ", start,
                " and must be between 0 and key's ", params.tokens, " tokens");
    check_value(params.seen[b] >= 0 && params.seen[b] < kFar, kOp, "lengths[", b, "] is ", params.seen[b],
                " and must be at least 0");
    check_value(params.seen[b] + params.tokens - start <= capacity, kOp, "lengths[", b, "] is ", params.seen[b],
                " and the storage holds ", capacity, " tokens, which must have room for ", params.tokens - start,
                " more");
  }
  std::vector<NamedView> written;
  for (int64_t i = 0; i < kStorageTensors; ++i) {
    written.push_back({kStorageNames[i], args.key_storage[i]});
    written.push_back({kStorageNames[i], args.value_storage[i]});
  }
  written.push_back({"lengths", args.lengths});
  const std::vector<NamedView> read = {{"key", args.key}, {"value", args.value}, {"starts", args.starts}};
  check_disjoint(kOp, written, read);
  const auto source = [](const TensorView& view) {
    const int64_t size = dtype_size(view.dtype);
    return CacheSource{view.as<const char>(), view.strides[0] * size, view.strides[1] * size, view.strides[2] * size,
                       view.shape[3] * size};
  };
  params.key_source = source(args.key);
  params.value_source = source(args.value);
  return params;
}

// The error of what staircase_cache_fault found.
[[noreturn]] inline void throw_cache_fault(const StaircaseAppendArgs& args, const StaircaseCacheParams& params,
                                           int64_t fault) {
  constexpr const char* kOp = "staircase_cache_append";
  const bool values = fault % 2 == 1;
  const TensorView& view = values ? args.value : args.key;
  const StaircaseSide& side = values ? params.value : params.key;
  const char* name = values ? "value" : "key";
  const int64_t b = fault / 2 / params.kv_heads, h = fault / 2 % params.kv_heads, group = params.group;
  const int64_t start = params.starts ? params.starts[b] : 0, length = params.seen[b];
  const int64_t end = length + params.tokens - start;
  const auto fresh = [&](int64_t j, int64_t c) {
    return float_at(
        view, b * view.strides[0] + h * view.strides[1] + (j - length + start) * view.strides[2] + c * view.strides[3]);
  };
  for (int64_t j = length; j < end; ++j) {
    for (int64_t c = 0; c < side.channels; ++c) {
      const float x = fresh(j, c);
      check_value(std::isfinite(x), kOp, name, "[", b, ", ", h, ", ", j - length + start, ", ", c, "], in group ",
                  (values ? c : j) / group, " of its ", values ? "token" : "channel", ", is ",
                  std::isnan(x) ? "nan"
                  : x > 0       ? "inf"
                                : "-inf",
                  " and must be finite");
    }
  }
  const auto refuse = [&](const std::string& what, float lo, float hi) {
    check_value(std::isfinite(hi - lo), kOp, name, " of batch row ", b, ", head ", h, ", ", what, ", is between ", lo,
                " and ", hi, ", whose difference must be finite in float32");
  };
  TensorView full = args.key_storage[0];
  const int64_t ring = side.full_rows, rows = params.sinks + ring;
  const auto held = [&](int64_t j, int64_t c) {
    return float_at(full, ((b * params.kv_heads + h) * rows + params.sinks + j % ring) * side.channels + c);
  };
  if (values) {
    for (int64_t j = std::max(length, params.sinks); j < end; ++j) {
      for (int64_t c = 0; c < side.channels; c += group) {
        float lo = INFINITY, hi = -INFINITY;
        for (int64_t i = c; i < std::min(c + group, side.channels); ++i) {
          lo = std::min(lo, fresh(j, i));
          hi = std::max(hi, fresh(j, i));
        }
        refuse("group " + std::to_string(c / group) + " of token " + std::to_string(j - length + start), lo, hi);
      }
    }
  } else {
    for (int64_t tile = length / group; tile * group < end; ++tile) {
      for (int64_t c = 0; c < side.channels; ++c) {
        float lo = INFINITY, hi = -INFINITY;
        for (int64_t j = std::max(tile * group, params.sinks); j < std::min((tile + 1) * group, end); ++j) {
          const float x = j < length ? held(j, c) : fresh(j, c);
          lo = std::min(lo, x);
          hi = std::max(hi, x);
        }
        if (lo <= hi) refuse("group " + std::to_string(tile) + " of channel " + std::to_string(c), lo, hi);
      }
    }
  }
  check_value(false, kOp, name, " has changed while it was read and must not");
  std::abort();  // not reached
}

struct StaircaseReadArgs {
  const TensorView* storage = nullptr;
  TensorView positions, ends;
  StaircaseLadder ladder;
  bool by_token = false, wide = false;
  int64_t tokens = 0;
  mutable IndexCopies copies;
};

inline StaircaseReadParams staircase_read_params(const StaircaseReadArgs& args) {
  constexpr const char* kOp = "staircase_cache_read";
  StaircaseReadParams params;
  params.side = staircase_side(kOp, "storage", args.storage, args.by_token, args.ladder);
  const TensorView& full = args.storage[0];
  params.dtype = full.dtype;
  params.out_dtype = args.wide ? DType::kFloat32 : full.dtype;
  params.batch = full.shape[0];
  params.kv_heads = full.shape[1];
  params.tokens = args.tokens;
  params.sinks = args.ladder.sink_size;
  params.step = args.ladder.step;
  params.group = args.ladder.group_size;
  const int64_t capacity = staircase_capacity(params.side, params.sinks);
  check_value(args.tokens >= 0 && args.tokens <= capacity, kOp, "tokens is ", args.tokens,
              " and must be between 0 and ", capacity, ", what the storage holds");
  const NamedView indices[] = {{"positions", args.positions}, {"ends", args.ends}};
  for (const auto& [name, view] : indices) {
    check_value(view.dtype == DType::kInt64 && view.dims == 1 && view.shape[0] == params.batch, kOp, name, " is ",
                dtype_name(view.dtype), " ", shape_text(view), " and must be int64 [", params.batch, "]");
    check_value(view.device == Device::kCpu, kOp, name, " is not on the CPU, where the storage is");
    const int64_t* kept =
        args.copies.keep(kOp, view.as<const int64_t>(), params.batch, params.batch > 1 ? view.strides[0] : 1);
    const bool ends = &view == &args.ends;
    (ends ? params.ends : params.positions) = kept;
    for (int64_t b = 0; b < params.batch; ++b) {
      check_value(kept[b] >= (ends ? 0 : -1) && kept[b] < kFar, kOp, name, "[", b, "] is ", kept[b],
                  " and must be at least ", ends ? 0 : -1);
    }
  }
  return params;
}

}  // namespace pycore
