// SPDX-License-Identifier: Apache-2.0
// The backward pass in vectors. Steps (backward_step.inl.h) run in a fixed order (keys ascending for a query, heads
// then queries ascending for a key), and what each adds does not depend on who runs it, so that one pass and two
// passes, and any number of threads, give the same bits.
#pragma once

#include <pycore/attention/rows.h>

#include <cstdint>

#include "backward_step.inl.h"

// A key's gradients are summed over this many steps, and those sums over all: a sink has as many queries as the
// sequence, and one chain over them would lose accuracy.
constexpr int64_t kSumSteps = 4;

void delta(const AttentionBackwardParams& params, int64_t b, int64_t h, int64_t first, int64_t count, void* memory) {
  const AttentionParams& forward = params.forward;
  const int64_t n = forward.value_dim;
  BackwardBuffers buffers;
  buffers.bind(forward, memory);
  AttentionStrides out_strides;
  out_strides.row = n;
  out_strides.head = n * forward.query_length;
  out_strides.batch = out_strides.head * forward.heads;
  // A lane a row, and one chain of FMAs over the channels as in <grad_out, v>: where a row keeps one key, the two then
  // cancel as they should.
  for (int64_t i = first; i < first + count; i += Vec::kWidth) {
    const int64_t lanes = first + count - i < Vec::kWidth ? first + count - i : Vec::kWidth;
    const int64_t row = row_index(forward, b, h, i);
    const QueryRows rows = {b, h, i, lanes};
    const Matrix grad_out = rows.read(forward, params.grad_out, params.grad_out_strides, n, buffers.grad_out_copy);
    const Matrix out = rows.read(forward, forward.out, out_strides, n, buffers.value_copy);
    Vec sum = Vec::zero();
    for (int64_t c = 0; c < n; c += Vec::kWidth) {
      const int64_t channels = n - c < Vec::kWidth ? n - c : Vec::kWidth;
      Vec x[Vec::kWidth], y[Vec::kWidth];
      for (int64_t r = 0; r < Vec::kWidth; ++r) {
        x[r] = r < lanes ? Vec::load_first(grad_out.data + r * grad_out.stride + c, channels) : Vec::zero();
        y[r] = r < lanes ? Vec::load_first(out.data + r * out.stride + c, channels) : Vec::zero();
      }
      transpose(x);
      transpose(y);
      for (int64_t d = 0; d < channels; ++d) sum = Vec::fma(x[d], y[d], sum);
    }
    if (params.grad_lse) sum = sum - Vec::load_first(static_cast<const float*>(params.grad_lse) + row, lanes);
    sum.store_first(static_cast<float*>(params.delta) + row, lanes);
  }
}

void grad_query(const AttentionBackwardParams& params, const RowMap& map, const QueryTile& queries, BackwardParts parts,
                void* memory) {
  const AttentionParams& forward = params.forward;
  BackwardBuffers buffers;
  buffers.bind(forward, memory);
  const int64_t p_lo = map.query_position(queries.first), p_hi = p_lo + queries.count - 1;
  for (int64_t tile = map.next_tile(p_lo, p_hi, 0); tile != kNoTile; tile = map.next_tile(p_lo, p_hi, tile + 1)) {
    if (map.schedule.cover(p_lo, p_hi, tile) == Cover::kNone) continue;
    const BackwardTile loaded = load_backward_tile(forward, map, queries.batch, queries.kv_head, tile,
                                                   map.schedule.reach_bits(p_lo, p_hi, tile), buffers);
    if (loaded.present == 0) continue;
    backward_step(params, map, {queries.batch, queries.head, queries.first, queries.count}, loaded, parts, buffers);
  }
}

void grad_key_value(const AttentionBackwardParams& params, const RowMap& map, int64_t b, int64_t kv_head, int64_t tile,
                    BackwardParts parts, void* memory) {
  const AttentionParams& forward = params.forward;
  BackwardBuffers buffers;
  buffers.bind(forward, memory);
  const int64_t d = padded(forward.head_dim), dv = padded(forward.value_dim);
  const int64_t group = forward.heads / forward.kv_heads;
  const bool rope = forward.rope_cos != nullptr;
  int64_t lo, hi;
  map.schedule.query_range(tile, &lo, &hi);
  const int64_t p0 = map.query_position(0);
  const int64_t first = lo > p0 ? lo - p0 : 0;
  const int64_t last = hi - p0 < map.queries - 1 ? hi - p0 : map.queries - 1;
  if (first > last) return;  // no query reaches the tile: its gradients stay zeros
  uint64_t reached = 0;
  RowMap head_map = map;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    bind_head(forward, b, h, &head_map);
    reached |= head_map.schedule.reach_bits(p0 + first, p0 + last, tile);
  }
  const BackwardTile loaded = load_backward_tile(forward, map, b, kv_head, tile, reached, buffers);
  if (loaded.present == 0) return;
  const int64_t sums = BackwardBuffers::sums(forward);
  zero_rows(buffers.grad_key, sums);
  zero_rows(buffers.totals, sums);
  const auto close_steps = [&]() {
    add_row(buffers.grad_key, sums, buffers.totals);
    zero_rows(buffers.grad_key, sums);
  };

  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    bind_head(forward, b, h, &head_map);
    int64_t open = 0;
    bool added = false;  // a step that keeps no key adds zeros, and so do sums of such steps
    for (int64_t i = first; i <= last; i += kBackwardRows) {
      const int64_t count = last - i + 1 < kBackwardRows ? last - i + 1 : kBackwardRows;
      if (head_map.schedule.cover(p0 + i, p0 + i + count - 1, tile) != Cover::kNone) {
        backward_step(params, head_map, {b, h, i, count}, loaded, parts, buffers);
        added = true;
      }
      if (++open % kSumSteps == 0 && added) {
        close_steps();
        added = false;
      }
    }
    close_steps();
  }
  float* key = buffers.totals;
  const float* value = key + kKeyTile * d;
  const float* key_far = value + kKeyTile * dv;
  for (int64_t c = 0; c < kKeyTile; ++c) {
    if (!(loaded.present >> c & 1)) continue;
    const int64_t row = key_row_index(forward, b, kv_head, map.key_row(tile * kKeyTile + c));
    if (rope) {
      rotate(forward, key + c * d, -key_turn(map.schedule, tile, c), key + c * d);
      add_row(key_far + c * d, d, key + c * d);
    }
    copy_row(key + c * d, forward.head_dim, static_cast<float*>(params.grad_key) + row * forward.head_dim);
    copy_row(value + c * dv, forward.value_dim, static_cast<float*>(params.grad_value) + row * forward.value_dim);
  }
}

int64_t backward_scratch(const AttentionBackwardParams& params) {
  BackwardBuffers buffers;
  return buffers.bind(params.forward, nullptr);
}
