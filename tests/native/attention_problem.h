// SPDX-License-Identifier: Apache-2.0
// Random attention problems: every buffer has exactly the size the contract asks for, and every key row that must not
// be read holds NaN.
#pragma once

#include <pycore/attention/attention.h>
#include <pycore/attention/blocks.h>
#include <pycore/cpu_isa.h>
#include <pycore/dtype.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

namespace {

using Buffer = std::vector<float>;
using pycore::DType;
using pycore::ScheduleKind;

std::mt19937 engine(20240817);

int64_t draw(int64_t lo, int64_t hi) { return std::uniform_int_distribution<int64_t>(lo, hi)(engine); }

Buffer normal(int64_t count) {
  std::normal_distribution<float> distribution;
  Buffer buffer(count);
  for (float& x : buffer) x = distribution(engine);
  return buffer;
}

// The same in the problem's dtype, and back.
std::vector<char> stored(const Buffer& buffer, DType dtype) {
  const int64_t size = pycore::dtype_size(dtype);
  std::vector<char> bytes(buffer.size() * size);
  for (size_t i = 0; i < buffer.size(); ++i) {
    const uint16_t half =
        dtype == DType::kFloat16 ? pycore::float16_from_float(buffer[i]) : pycore::bfloat16_from_float(buffer[i]);
    std::memcpy(bytes.data() + i * size, dtype == DType::kFloat32 ? static_cast<const void*>(&buffer[i]) : &half, size);
  }
  return bytes;
}

Buffer loaded(const std::vector<char>& bytes, DType dtype) {
  const int64_t size = pycore::dtype_size(dtype);
  Buffer buffer(bytes.size() / size);
  for (size_t i = 0; i < buffer.size(); ++i) {
    uint16_t half = 0;
    std::memcpy(dtype == DType::kFloat32 ? static_cast<void*>(&buffer[i]) : &half, bytes.data() + i * size, size);
    if (dtype == DType::kFloat16) buffer[i] = pycore::float_from_float16(half);
    if (dtype == DType::kBFloat16) buffer[i] = pycore::float_from_bfloat16(half);
  }
  return buffer;
}

struct Freer {
  void operator()(char* memory) const { std::free(memory); }
};

// Exactly `bytes` bytes, 64-byte aligned: the sanitizer sees a byte too many.
std::unique_ptr<char, Freer> aligned(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes ? bytes : 64) != 0) std::abort();
  return std::unique_ptr<char, Freer>(static_cast<char*>(memory));
}

struct Problem {
  pycore::AttentionBackwardParams params;
  std::vector<char> query, key, value, out, grad_out;
  Buffer lse, lse_low, cosine, sine, delta, grad_query, grad_key, grad_value, bias, slopes, sinks, grad_bias,
      grad_sinks, grad_slopes;
  double grad_numbers[2] = {0, 0};
  std::vector<int64_t> starts, lengths, offsets, queries, prefixes, boundaries, bitmap;
  std::vector<uint64_t> blocks;
  Buffer block_bias;
  int64_t seed = 0;

  Problem(int64_t most_queries, int64_t most_keys, int64_t most_channels = 70) {
    pycore::AttentionParams& p = params.forward;
    p.batch = draw(1, 3);
    p.kv_heads = draw(1, 2);
    p.heads = p.kv_heads * draw(1, 3);
    p.query_length = draw(1, draw(0, 1) ? 8 : most_queries);
    p.key_length = draw(0, most_keys);
    p.head_dim = draw(1, most_channels);
    p.value_dim = draw(1, most_channels);
    p.scale = draw(0, 9) == 0 ? -0.3 : 0.2;
    const DType dtypes[] = {DType::kFloat32, DType::kFloat32, DType::kFloat16, DType::kBFloat16};
    p.dtype = dtypes[draw(0, 3)];
    bind_schedule();
    Buffer keys = normal(p.batch * p.kv_heads * p.key_length * p.head_dim);
    Buffer values = normal(p.batch * p.kv_heads * p.key_length * p.value_dim);
    bind_rows();
    if (p.key_ring == 0 && draw(0, 1)) bind_lengths(&keys, &values);
    if (draw(0, 2) == 0) {
      const int64_t right = p.schedule.right < pycore::kFar ? p.schedule.right : 0;
      p.distance_limit = std::max({draw(0, 200), std::min<int64_t>(p.schedule.window_size, 400), right});
    }
    if (p.head_dim > 1 && draw(0, 1)) bind_rope();
    bind_options();
    query = stored(normal(p.batch * p.heads * p.query_length * p.head_dim), p.dtype);
    key = stored(keys, p.dtype);
    value = stored(values, p.dtype);
    grad_out = stored(normal(p.batch * p.heads * p.query_length * p.value_dim), p.dtype);
    out.resize(grad_out.size());
    lse.resize(p.batch * p.heads * p.query_length);
    lse_low.resize(lse.size());
    delta.resize(lse.size());
    grad_query.resize(p.batch * p.heads * p.query_length * p.head_dim);
    grad_key.resize(keys.size());
    grad_value.resize(values.size());
    p.query = query.data();
    p.key = key.data();
    p.value = value.data();
    p.out = out.data();
    p.lse = lse.data();
    if (draw(0, 1)) p.lse_low = lse_low.data();  // else the backward pass finds it by itself
    params.grad_out = grad_out.data();
    params.delta = delta.data();
    params.grad_query = grad_query.data();
    params.grad_key = grad_key.data();
    params.grad_value = grad_value.data();
  }

  void bind_schedule() {
    pycore::AttentionParams& p = params.forward;
    p.schedule.kind = static_cast<ScheduleKind>(draw(0, 7));
    if (p.schedule.kind == ScheduleKind::kLambda) {
      p.schedule.sink_size = draw(0, 80);
      p.schedule.window_size = draw(1, 150);
      if (draw(0, 2) == 0) p.schedule.right = draw(0, 3) ? draw(1, 120) : pycore::kFar;
      if (draw(0, 3) == 0) bind_ring();
    } else if (p.schedule.kind == ScheduleKind::kPrefix) {
      for (int64_t b = 0; b < p.batch; ++b) prefixes.push_back(draw(0, 5) ? draw(0, 300) : INT64_MAX);
      p.prefix_lengths = prefixes.data();
    } else if (p.schedule.kind == ScheduleKind::kSegments) {
      const int64_t entries = draw(1, 8);
      boundaries.resize(bitmap_rows(entries) * entries);
      for (int64_t& boundary : boundaries) boundary = draw(0, 9) ? draw(-50, 400) : draw(0, 1) ? INT64_MAX : INT64_MIN;
      for (size_t at = 0; at < boundaries.size(); at += entries) {
        std::sort(boundaries.begin() + at, boundaries.begin() + at + entries);
      }
      p.schedule.boundaries = boundaries.data();
      p.schedule.segments = entries - 1;
      p.schedule.right = draw(0, 1) ? 0 : draw(0, 1) ? pycore::kFar : draw(1, 90);
      if (draw(0, 1)) {
        p.schedule.window_size = draw(1, 150);
        p.schedule.segment_sinks = draw(0, 1) ? draw(0, 70) : 0;
      }
    } else if (p.schedule.kind == ScheduleKind::kKeySubset) {
      p.schedule.causal = draw(0, 1);
      p.schedule.key_words = draw(0, 5);
      bitmap.resize(bitmap_rows(p.schedule.key_words) * p.schedule.key_words);
      for (int64_t& word : bitmap) word = draw(0, 3) ? static_cast<int64_t>(engine()) << 32 | engine() : 0;
      p.schedule.keys = reinterpret_cast<const uint64_t*>(bitmap.data());
    } else if (p.schedule.kind == ScheduleKind::kTree) {
      bind_tree();
      if (draw(0, 1)) {
        p.schedule.sink_size = draw(0, 80);
        p.schedule.window_size = draw(1, 150);
        if (p.schedule.tree_nodes <= pycore::kKeyTile && draw(0, 1)) bind_ring();
      }
    } else if (p.schedule.kind == ScheduleKind::kBlocks) {
      p.schedule.block_shift = draw(4, 7);
      p.schedule.sink_size = draw(0, 1) ? draw(0, 80) : 0;
      p.schedule.window_blocks = draw(0, 2);
      p.schedule.block_rows = pycore::touched_blocks(p.query_length, p.schedule.block_shift);
      p.schedule.block_words = pycore::bitmap_words(p.key_length, p.schedule.block_shift);
      blocks.resize(p.batch * p.heads * p.schedule.block_rows * p.schedule.block_words);
      for (uint64_t& word : blocks)
        word = (static_cast<uint64_t>(engine()) << 32 | engine()) & (draw(0, 1) ? engine() : -1);
      blocks.reserve(1);
      p.schedule.blocks = blocks.data();
      if (draw(0, 1)) {
        p.block_bias_length = draw(1, 9);
        p.block_bias_stride = draw(0, 1) ? p.block_bias_length : 0;
        block_bias = normal(p.block_bias_stride * (p.heads - 1) + p.block_bias_length);
        p.block_bias = block_bias.data();
      }
    }
  }

  // Batch rows of a bitmap of `count` words each: one, or one each.
  int64_t bitmap_rows(int64_t count) {
    params.forward.bitmap_stride = draw(0, 1) ? count : 0;
    return params.forward.bitmap_stride ? params.forward.batch : 1;
  }

  void bind_tree() {
    pycore::TileSchedule& schedule = params.forward.schedule;
    schedule.tree_nodes = draw(0, params.forward.key_length);
    schedule.tree_words = (schedule.tree_nodes + 63) / 64;
    const int64_t row = 2 + schedule.tree_words, rows = bitmap_rows(schedule.tree_nodes * row);
    bitmap.resize(rows * schedule.tree_nodes * row);
    for (int64_t b = 0; b < rows; ++b) {
      int64_t* nodes = bitmap.data() + b * schedule.tree_nodes * row;
      for (int64_t t = 0; t < schedule.tree_nodes; ++t) {
        const int64_t parent = draw(0, 1) ? t - 1 : draw(-1, t - 1);
        if (parent >= 0) std::copy_n(nodes + parent * row, row, nodes + t * row);
        nodes[t * row] = parent;
        nodes[t * row + 1] = parent < 0 ? 0 : nodes[parent * row + 1] + 1;
        nodes[t * row + 2 + t / 64] |= static_cast<int64_t>(uint64_t{1} << (t % 64));
      }
    }
    schedule.tree = bitmap.data();
  }

  void bind_ring() {
    pycore::AttentionParams& p = params.forward;
    p.key_ring = pycore::kKeyTile * draw(1, 2);
    p.query_length = std::min(p.query_length, p.key_ring);
    p.key_length = p.schedule.sink_size + p.key_ring;
    const int64_t nodes = p.schedule.tree_nodes;
    p.schedule.window_size = draw(1, p.key_ring - std::max(p.query_length, nodes) + 1);
    for (int64_t b = 0; b < p.batch; ++b) lengths.push_back(draw(nodes, 2 * p.key_length));
    p.key_lengths = lengths.data();
  }

  void bind_options() {
    pycore::AttentionParams& p = params.forward;
    const int64_t which = draw(0, 2);
    if (which == 0) {
      p.bias_length = draw(0, 1) ? draw(1, 20) : draw(1, 400);
      p.bias_stride = p.bias_length + draw(0, 2);
      bias = normal((p.heads - 1) * p.bias_stride + p.bias_length);
      // Distances that take all weight from a pair, and maybe from a row.
      const int64_t from = draw(0, p.bias_length - 1), count = draw(0, 1) ? draw(0, p.bias_length - from) : 0;
      for (int64_t h = draw(0, p.heads - 1); h < p.heads; ++h) {
        std::fill_n(bias.begin() + h * p.bias_stride + from, count, -INFINITY);
      }
      p.distance_bias = bias.data();
      grad_bias.resize(p.heads * p.bias_length);
      if (draw(0, 3)) params.grad_bias = grad_bias.data();
    } else if (which == 1) {
      p.slopes_stride = draw(0, 1) ? p.heads + draw(0, 2) : 0;
      slopes.resize(p.slopes_stride * (p.batch - 1) + p.heads);
      for (float& slope : slopes) slope = draw(0, 20) * 0.01f;
      p.alibi_slopes = slopes.data();
      params.slope_rows = p.slopes_stride > 0 ? p.batch : 1;
      grad_slopes.resize(params.slope_rows * p.heads);
      if (draw(0, 3)) params.grad_slopes = grad_slopes.data();
    }
    p.symmetric_bias = draw(0, 1);
    if (draw(0, 1)) {
      sinks = normal(p.heads);
      if (draw(0, 1)) sinks[draw(0, p.heads - 1)] = -INFINITY;
      p.sink_logits = sinks.data();
      grad_sinks.resize(p.heads);
      if (draw(0, 3)) params.grad_sink_logits = grad_sinks.data();
    }
    if (draw(0, 2) == 0) p.softcap = draw(1, 20) * 0.5;
    if (draw(0, 1)) params.grad_numbers = grad_numbers;
    if (draw(0, 2) == 0) {
      p.dropout_p = draw(1, 9) * 0.1;
      seed = static_cast<int64_t>(engine()) << 32 | engine();
      p.dropout_seed = &seed;
    }
  }

  void bind_rows() {
    pycore::AttentionParams& p = params.forward;
    const auto strides = [](int64_t heads, int64_t length, int64_t channels) {
      return pycore::AttentionStrides{heads * length * channels, length * channels, channels};
    };
    p.query_strides = strides(p.heads, p.query_length, p.head_dim);
    p.key_strides = strides(p.kv_heads, p.key_length, p.head_dim);
    p.value_strides = strides(p.kv_heads, p.key_length, p.value_dim);
    params.grad_out_strides = strides(p.heads, p.query_length, p.value_dim);
  }

  void bind_lengths(Buffer* keys, Buffer* values) {
    pycore::AttentionParams& p = params.forward;
    for (int64_t b = 0; b < p.batch; ++b) {
      lengths.push_back(draw(p.schedule.tree_nodes, p.key_length));
      starts.push_back(draw(0, lengths[b] - p.schedule.tree_nodes));
      offsets.push_back(draw(0, 1) ? draw(0, 500) : 0);
      queries.push_back(draw(0, p.query_length));
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        for (int64_t r = 0; r < p.key_length; ++r) {
          if (r >= starts[b] && r < lengths[b]) continue;
          const int64_t row = (b * p.kv_heads + h) * p.key_length + r;
          std::fill_n(keys->begin() + row * p.head_dim, p.head_dim, NAN);
          std::fill_n(values->begin() + row * p.value_dim, p.value_dim, NAN);
        }
      }
    }
    p.key_starts = starts.data();
    p.key_lengths = lengths.data();
    p.key_offset = offsets.data();
    p.query_lengths = queries.data();
  }

  void bind_rope() {
    pycore::AttentionParams& p = params.forward;
    p.rope_dim = draw(1, p.head_dim / 2) * 2;
    p.rope_stride = p.rope_dim / 2;
    p.rope_interleaved = draw(0, 1);
    int64_t positions = 0;
    for (int64_t b = 0; b < p.batch; ++b) positions = std::max(positions, pycore::row_map(p, b).positions());
    const int64_t reach = std::max(p.distance_limit + pycore::kKeyTile, p.schedule.tree_nodes);
    const int64_t ahead = p.schedule.ahead(), all = ahead > 0 ? std::max(positions, p.query_length) : positions;
    p.rope_rows = ahead >= pycore::kFar ? all : std::min(all, reach);
    for (int64_t row = 0; row < p.rope_rows; ++row) {
      for (int64_t i = 0; i < p.rope_stride; ++i) {
        cosine.push_back(std::cos(row * std::pow(100.0, -double(i) / p.rope_stride)));
        sine.push_back(std::sin(row * std::pow(100.0, -double(i) / p.rope_stride)));
      }
    }
    cosine.reserve(1);  // an empty table is still a table
    p.rope_cos = cosine.data();
    p.rope_sin = sine.data();
  }

  void run(pycore::CpuIsa isa, int64_t threads) {
    pycore::set_cpu_isa(isa);
    pycore::Parallel parallel;
    parallel.threads = threads;
    parallel.run = [](void*, int64_t slots, void (*body)(void*, int64_t), void* argument) {
      for (int64_t slot = slots - 1; slot >= 0; --slot) body(argument, slot);
    };
    const auto forward = aligned(pycore::attention_forward_scratch(params.forward, threads));
    if (!pycore::attention_forward(params.forward, parallel, forward.get()).ok()) std::abort();
    const auto backward = aligned(pycore::attention_backward_scratch(params, threads));
    if (!pycore::attention_backward(params, parallel, backward.get()).ok()) std::abort();
  }
};

// `tolerance` is a share of the largest number.
bool close(const char* what, const Buffer& actual, const Buffer& expected, float tolerance) {
  float largest = 1;
  for (float x : expected) {
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    const bool same = actual[i] == expected[i] || std::fabs(actual[i] - expected[i]) <= tolerance * largest;
    if (same) continue;
    std::fprintf(stderr, "failed: %s[%zu] is %g and the scalar kernel says %g\n", what, i, actual[i], expected[i]);
    return false;
  }
  return true;
}

// Sums over all pairs of what is up to `reach` times as large as a gradient of a logit, and may cancel.
bool close_sums(const Problem& problem, const Buffer& slopes, const double* numbers, float tolerance) {
  const pycore::AttentionParams& p = problem.params.forward;
  const float rows = std::sqrt(static_cast<float>(p.batch * p.heads * p.query_length));
  const float reach = static_cast<float>(std::min<int64_t>(p.distance_limit, p.key_length + 500));
  if (problem.params.grad_slopes && !close("grad_slopes", problem.grad_slopes, slopes, tolerance * rows * reach)) {
    return false;
  }
  if (!problem.params.grad_numbers) return true;
  const Buffer actual(problem.grad_numbers, problem.grad_numbers + 2), expected(numbers, numbers + 2);
  return close("grad_numbers", actual, expected, tolerance * rows * std::sqrt(static_cast<float>(p.head_dim)));
}

}  // namespace
