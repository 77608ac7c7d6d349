// SPDX-License-Identifier: Apache-2.0
// Attention on the CPU: picks the instruction set, cuts the work into items and hands them to threads. Nothing here
// decides a bit of the result: every reduction is cut by position inside the kernels.
#include <pycore/cpu_isa.h>
#include <pycore/dtype.h>
#include <pycore/sizes.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../for_isa.h"
#include "kernels.h"
#include "plan.h"
#include "sum_gradients.h"

namespace pycore {
namespace {

const AttentionKernels* kernels_for(DType dtype, CpuIsa isa) {
  if (dtype == DType::kFloat64) return &scalar::attention_double;
  if (dtype != DType::kFloat32 && dtype != DType::kFloat16 && dtype != DType::kBFloat16) return nullptr;
  return &for_isa(isa, scalar::attention_float, avx2::attention_float, avx512::attention_float);
}

constexpr Status kNoKernel = {StatusCode::kUnsupported, "attention has no CPU kernel for this dtype"};

// Of gradients, lse and everything else in the accumulation dtype.
int64_t sum_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

void clear(void* data, int64_t offset, int64_t bytes) {
  if (bytes > 0) std::memset(static_cast<char*>(data) + offset, 0, bytes);
}

// Query rows past query_lengths[b] keep no key.
void clear_rows(const AttentionParams& params, int64_t b, int64_t from) {
  const int64_t size = dtype_size(params.dtype), rows = params.query_length - from;
  for (int64_t h = 0; h < params.heads && rows > 0; ++h) {
    const int64_t row = (b * params.heads + h) * params.query_length + from;
    clear(params.out, row * params.value_dim * size, rows * params.value_dim * size);
    for (int64_t i = row; i < row + rows; ++i) {
      if (params.dtype == DType::kFloat64) {
        static_cast<double*>(params.lse)[i] = -std::numeric_limits<double>::infinity();
      } else {
        static_cast<float*>(params.lse)[i] = -std::numeric_limits<float>::infinity();
      }
    }
  }
}

// Element i of a row of any dtype.
double element(DType dtype, const void* row, int64_t i) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<const double*>(row)[i];
    case DType::kFloat16: return float_from_float16(static_cast<const uint16_t*>(row)[i]);
    case DType::kBFloat16: return float_from_bfloat16(static_cast<const uint16_t*>(row)[i]);
    default: return static_cast<const float*>(row)[i];
  }
}

// The sink takes exp(sink - lse) of every row's weight and gives nothing for it. A sum over all rows: in double, and so
// is what it adds up, delta once more.
template <class T>
void grad_sink_logit(const AttentionBackwardParams& params, int64_t h) {
  const AttentionParams& forward = params.forward;
  const int64_t size = dtype_size(forward.dtype);
  const T sink = static_cast<const T*>(forward.sink_logits)[h];
  double sum = 0;
  for (int64_t b = 0; b < forward.batch; ++b) {
    const int64_t queries = row_map(forward, b).queries;
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t row = (b * forward.heads + h) * forward.query_length + i;
      const double lse = static_cast<const T*>(forward.lse)[row], low = static_cast<const T*>(forward.lse_low)[row];
      if (lse == -std::numeric_limits<double>::infinity()) continue;  // nor has the sink any weight there
      const char* out = static_cast<const char*>(forward.out) + row * forward.value_dim * size;
      const AttentionStrides& strides = params.grad_out_strides;
      const char* grad_out =
          static_cast<const char*>(params.grad_out) + (b * strides.batch + h * strides.head + i * strides.row) * size;
      double delta = params.grad_lse ? -static_cast<double>(static_cast<const T*>(params.grad_lse)[row]) : 0.0;
      for (int64_t c = 0; c < forward.value_dim; ++c) {
        delta += element(forward.dtype, grad_out, c) * element(forward.dtype, out, c);
      }
      sum -= portable_exp(sink - lse - low) * delta;
    }
  }
  static_cast<T*>(params.grad_sink_logits)[h] = static_cast<T>(sum);
}

int64_t query_rows(const AttentionParams& params) { return params.batch * params.heads * params.query_length; }

// Numbers of keys and values that are not worth waking a second thread for, as in a step of decoding on a small window.
constexpr int64_t kSerialWork = 1 << 16;

int64_t forward_work(const AttentionParams& params) {
  int64_t keys = params.key_length;
  const TileSchedule& schedule = params.schedule;
  if (schedule.kind == ScheduleKind::kLambda || schedule.kind == ScheduleKind::kSegments) {
    const int64_t sinks = std::max(schedule.sink_size, schedule.segment_sinks);
    keys = std::min(keys, sinks + schedule.window_size + schedule.right + params.query_length);
  }
  return size_product({params.batch, params.heads, params.query_length, keys, params.head_dim + params.value_dim});
}

int64_t forward_scratch(const AttentionKernels* kernels, const AttentionParams& params, int64_t threads) {
  if (query_rows(params) == 0) return 0;
  const ForwardPlan plan(params, *kernels, forward_work(params) < kSerialWork ? 1 : threads);
  const int64_t shared = plan.segments > 1 ? size_product({plan.tiles, plan.segments, plan.item_bytes()}) : 0;
  return size_sum(size_product({threads, plan.slot_bytes}), shared);
}

// The item of a claim, such that threads that claim by turns go through items that follow one another: what is asked
// for ahead at the end of one is then where the thread's next one begins.
int64_t side_by_side(int64_t claim, int64_t items, int64_t threads) {
  return threads > 1 && items % threads == 0 ? claim % threads * (items / threads) + claim / threads : claim;
}

void forward(const AttentionKernels* kernels, const AttentionParams& params, const Parallel& given, void* scratch) {
  if (query_rows(params) == 0) return;
  const Parallel parallel = limited(given, forward_work(params), kSerialWork);
  const ForwardPlan plan(params, *kernels, parallel.threads);
  char* const partials = static_cast<char*>(scratch) + parallel.threads * plan.slot_bytes;
  auto* const segments = reinterpret_cast<SegmentRange*>(partials + plan.items() * plan.partial_bytes);
  const auto slot_scratch = [&](int64_t slot) { return static_cast<char*>(scratch) + slot * plan.slot_bytes; };
  if (plan.segments == 1) {
    for_each_item(parallel, plan.tiles, [&](int64_t slot, int64_t claim) {
      RowMap map;
      // Where there are several query tiles, those that cost most come first.
      const int64_t item = plan.query_tiles == 1 ? side_by_side(claim, plan.tiles, parallel.threads) : claim;
      const QueryTile tile = plan.tile(item, &map);
      if (tile.count > 0) kernels->forward(params, map, tile, {}, slot_scratch(slot), nullptr);
    });
  } else {
    // A state for every segment a tile visits, in order, and then their merging: what one thread does by itself. The
    // segments are listed first, in one walk: a walk for every item would be quadratic in the keys.
    for_each_item(parallel, plan.tiles, [&](int64_t, int64_t item) {
      RowMap map;
      const QueryTile tile = plan.tile(item, &map);
      const int64_t p_lo = map.query_position(tile.first);
      if (tile.count <= 0) return;
      list_segments(map, p_lo, p_lo + tile.count - 1, plan.segments, segments + item * plan.segments);
    });
    for_each_item(parallel, plan.items(), [&](int64_t slot, int64_t claim) {
      const int64_t item = side_by_side(claim, plan.items(), parallel.threads);
      RowMap map;
      const QueryTile tile = plan.tile(item / plan.segments, &map);
      if (tile.count <= 0) return;
      kernels->forward(params, map, tile, segments[item], slot_scratch(slot), partials + item * plan.partial_bytes);
    });
    for_each_item(parallel, plan.tiles, [&](int64_t slot, int64_t item) {
      RowMap map;
      const QueryTile tile = plan.tile(item, &map);
      if (tile.count <= 0) return;
      kernels->forward_merge(params, tile, partials + item * plan.segments * plan.partial_bytes, plan.partial_bytes,
                             plan.segments, slot_scratch(slot));
    });
  }
  if (params.query_lengths) {
    for (int64_t b = 0; b < params.batch; ++b) clear_rows(params, b, params.query_lengths[b]);
  }
}

// The forward pass for lse alone, in two parts.
AttentionParams lse_params(const AttentionParams& params, void* lse, void* lse_low) {
  AttentionParams again = params;
  again.value_dim = 0;
  again.dropout_p = 0;
  again.lse = lse;
  again.lse_low = lse_low;
  return again;
}

// Forgets the low part of rows whose lse is another one, as that of more keys elsewhere.
template <class T>
void keep_own(const void* lse, const void* own, void* low, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    if (static_cast<const T*>(lse)[row] != static_cast<const T*>(own)[row]) static_cast<T*>(low)[row] = 0;
  }
}

// A thread's scratch: the sums of a row of grad_bias, then the kernels'.
int64_t bias_sum_bytes(const AttentionParams& params) { return tiles(params.bias_length * 8, 64) * 64; }

int64_t backward_slot_bytes(const AttentionBackwardParams& params, const AttentionKernels& kernels) {
  return bias_sum_bytes(params.forward) + kernels.backward_scratch(params);
}

// Of lse as the backward pass recomputes it, or of its low part.
int64_t lse_bytes(const AttentionParams& params) {
  return params.lse_low ? 0 : tiles(query_rows(params) * sum_size(params.dtype), 64) * 64;
}

void backward(const AttentionKernels* kernels, const AttentionBackwardParams& params, const Parallel& parallel,
              void* scratch) {
  const AttentionParams& forward = params.forward;
  const int64_t slot_bytes = backward_slot_bytes(params, *kernels), bias_bytes = bias_sum_bytes(forward);
  auto* const head_sums = static_cast<HeadSums*>(scratch);
  scratch = static_cast<char*>(scratch) + sum_gradient_bytes(params);
  const auto slot_scratch = [&](int64_t slot) { return static_cast<char*>(scratch) + slot * slot_bytes + bias_bytes; };
  const int64_t size = sum_size(forward.dtype);
  const int64_t group = forward.kv_heads ? forward.heads / forward.kv_heads : 0;
  const int64_t query_tiles = tiles(forward.query_length, kernels->backward_rows);
  const int64_t pairs = forward.batch * forward.kv_heads;

  // Zeros everywhere: rows that nothing visits keep them, and so do all where there are no queries or no heads.
  for_each_item(parallel, pairs, [&](int64_t, int64_t pair) {
    const int64_t rows = forward.key_length * size;
    clear(params.grad_key, pair * rows * forward.head_dim, rows * forward.head_dim);
    clear(params.grad_value, pair * rows * forward.value_dim, rows * forward.value_dim);
  });
  for_each_item(parallel, forward.batch * forward.heads, [&](int64_t slot, int64_t item) {
    const int64_t b = item / forward.heads, h = item % forward.heads;
    const int64_t query_bytes = forward.query_length * forward.head_dim * size;
    clear(params.grad_query, item * query_bytes, query_bytes);
    const RowMap map = row_map(forward, b);
    kernels->delta(params, b, h, 0, map.queries, slot_scratch(slot));
  });

  if (params.grad_sink_logits) {
    for_each_item(parallel, forward.heads, [&](int64_t, int64_t h) {
      if (forward.dtype == DType::kFloat64) {
        grad_sink_logit<double>(params, h);
      } else {
        grad_sink_logit<float>(params, h);
      }
    });
  }
  if (params.grad_bias) {
    for_each_item(parallel, forward.heads, [&](int64_t slot, int64_t h) {
      double* sums = reinterpret_cast<double*>(slot_scratch(slot) - bias_bytes);
      std::fill_n(sums, forward.bias_length, 0.0);
      QueryTile tile;
      tile.head = h;
      tile.kv_head = h / group;
      for (tile.batch = 0; tile.batch < forward.batch; ++tile.batch) {
        const RowMap map = row_map(forward, tile.batch, h);
        for (tile.first = 0; tile.first < map.queries; tile.first += kernels->backward_rows) {
          tile.count = std::min(kernels->backward_rows, map.queries - tile.first);
          kernels->grad_query(params, map, tile, {false, false, sums}, slot_scratch(slot));
        }
      }
      for (int64_t i = 0; i < forward.bias_length; ++i) {
        const int64_t at = h * forward.bias_length + i;
        if (forward.dtype == DType::kFloat64) {
          static_cast<double*>(params.grad_bias)[at] = sums[i];
        } else {
          static_cast<float*>(params.grad_bias)[at] = static_cast<float>(sums[i]);
        }
      }
    });
  }

  if (wants_sums(params) && forward.dtype == DType::kFloat64) {
    sum_gradients<double>(*kernels, params, parallel, head_sums, slot_scratch);
  } else if (wants_sums(params)) {
    sum_gradients<float>(*kernels, params, parallel, head_sums, slot_scratch);
  }

  if (query_rows(forward) == 0) return;
  int64_t key_tiles = 0;
  for (int64_t b = 0; b < forward.batch; ++b) key_tiles = std::max(key_tiles, row_map(forward, b).present_tiles());
  // One pass (5 products a tile) keeps a key head on one thread; two passes (7 products) share it out. Both add the
  // same numbers in the same order, so the choice is a matter of time alone.
  const int64_t threads = std::max<int64_t>(parallel.threads, 1);
  const bool one_pass = tiles(pairs, threads) * threads * 5 <= pairs * 8;
  if (one_pass) {
    for_each_item(parallel, pairs, [&](int64_t slot, int64_t pair) {
      const int64_t b = pair / forward.kv_heads, kv_head = pair % forward.kv_heads;
      const RowMap map = row_map(forward, b);
      for (int64_t n = 0; n < map.present_tiles(); ++n) {
        kernels->grad_key_value(params, map, b, kv_head, map.present_tile(n), {true, true, nullptr},
                                slot_scratch(slot));
      }
    });
    return;
  }
  for_each_item(parallel, forward.batch * forward.heads * query_tiles, [&](int64_t slot, int64_t item) {
    RowMap map;
    const QueryTile tile = backward_query_tile(forward, kernels->backward_rows, item, &map);
    if (tile.count > 0) kernels->grad_query(params, map, tile, {true, false, nullptr}, slot_scratch(slot));
  });
  for_each_item(parallel, pairs * key_tiles, [&](int64_t slot, int64_t item) {
    const int64_t pair = item % pairs, b = pair / forward.kv_heads;
    const RowMap map = row_map(forward, b);
    if (item / pairs >= map.present_tiles()) return;
    kernels->grad_key_value(params, map, b, pair % forward.kv_heads, map.present_tile(item / pairs),
                            {false, true, nullptr}, slot_scratch(slot));
  });
}

}  // namespace

int64_t attention_forward_scratch(const AttentionParams& params, int64_t threads) {
  const AttentionKernels* kernels = kernels_for(params.dtype, params.isa);
  return kernels ? forward_scratch(kernels, params, threads) : 0;
}

Status attention_forward(const AttentionParams& params, const Parallel& parallel, void* scratch) {
  const AttentionKernels* kernels = kernels_for(params.dtype, params.isa);
  if (!kernels) return kNoKernel;
  forward(kernels, params, parallel, scratch);
  return {};
}

int64_t attention_backward_scratch(const AttentionBackwardParams& params, int64_t threads) {
  const AttentionKernels* kernels = kernels_for(params.forward.dtype, params.forward.isa);
  if (!kernels) return 0;
  const int64_t slots =
      size_sum(sum_gradient_bytes(params), size_product({threads, backward_slot_bytes(params, *kernels)}));
  const int64_t lse = lse_bytes(params.forward);
  if (lse == 0) return slots;
  const int64_t again = forward_scratch(kernels, lse_params(params.forward, nullptr, nullptr), threads);
  return size_sum(size_product({2, lse}), std::max(slots, again));
}

Status attention_backward(const AttentionBackwardParams& params, const Parallel& parallel, void* scratch) {
  const AttentionKernels* kernels = kernels_for(params.forward.dtype, params.forward.isa);
  if (!kernels) return kNoKernel;
  AttentionBackwardParams whole = params;
  if (const int64_t bytes = lse_bytes(params.forward)) {
    char* const lse = static_cast<char*>(scratch);
    char* const low = lse + bytes;
    scratch = low + bytes;
    forward(kernels, lse_params(params.forward, lse, low), parallel, scratch);
    const auto keep = params.forward.dtype == DType::kFloat64 ? keep_own<double> : keep_own<float>;
    keep(params.forward.lse, lse, low, query_rows(params.forward));
    whole.forward.lse_low = low;
  }
  backward(kernels, whole, parallel, scratch);
  return {};
}

}  // namespace pycore
