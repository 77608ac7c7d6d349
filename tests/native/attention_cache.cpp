// SPDX-License-Identifier: Apache-2.0
// An evicting cache under the sanitizers: buffers of exactly the size the contract asks for, tokens appended in random
// chunks with padding, and attention over the ring, its keys in rows or by channel, compared, bit for bit, with
// attention over all tokens.
#include <pycore/attention/attention.h>
#include <pycore/attention/cache.h>

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

std::mt19937 engine(20261123);

int64_t draw(int64_t lo, int64_t hi) { return std::uniform_int_distribution<int64_t>(lo, hi)(engine); }

Buffer normal(int64_t count) {
  std::normal_distribution<float> distribution;
  Buffer buffer(count);
  for (float& x : buffer) x = distribution(engine);
  return buffer;
}

struct Freer {
  void operator()(void* memory) const { std::free(memory); }
};

pycore::Parallel in_reverse(int64_t threads) {
  pycore::Parallel parallel;
  parallel.threads = threads;
  parallel.run = [](void*, int64_t slots, void (*body)(void*, int64_t), void* argument) {
    for (int64_t slot = slots - 1; slot >= 0; --slot) body(argument, slot);
  };
  return parallel;
}

void attend(const pycore::AttentionParams& params, int64_t threads) {
  const int64_t bytes = (pycore::attention_forward_scratch(params, threads) + 127) / 64 * 64;
  const std::unique_ptr<void, Freer> scratch(std::aligned_alloc(64, bytes));
  if (!pycore::attention_forward(params, in_reverse(threads), scratch.get()).ok()) std::abort();
}

struct Problem {
  const int64_t batch = draw(1, 3), kv_heads = draw(1, 2), heads = kv_heads * draw(1, 4), dim = draw(1, 40);
  const int64_t sinks = draw(0, 80), window = draw(1, 150), ring = (window + draw(0, 70) + 63) / 64 * 64;
  const bool tiles = draw(0, 1);                                // keys by channel
  const int64_t kept = tiles ? (sinks + 63) / 64 * 64 : sinks;  // rows before the ring
  const int64_t rows = kept + ring, longest = 600;
  Buffer key_cache = normal(batch * kv_heads * rows * dim), value_cache = normal(batch * kv_heads * rows * dim);
  // All tokens, by row and head; NaN where none has come yet.
  Buffer keys = Buffer(batch * kv_heads * longest * dim, NAN), values = keys;
  std::vector<int64_t> lengths = std::vector<int64_t>(batch, 0);

  void append(int64_t tokens) {
    const Buffer key = normal(batch * kv_heads * tokens * dim), value = normal(batch * kv_heads * tokens * dim);
    std::vector<int64_t> starts(batch);
    for (int64_t b = 0; b < batch; ++b) {
      starts[b] = draw(0, 1) ? draw(0, tokens) : 0;
      for (int64_t h = 0; h < kv_heads; ++h) {
        const int64_t from = ((b * kv_heads + h) * tokens + starts[b]) * dim;
        const int64_t to = ((b * kv_heads + h) * longest + lengths[b]) * dim, count = (tokens - starts[b]) * dim;
        std::copy_n(key.begin() + from, count, keys.begin() + to);
        std::copy_n(value.begin() + from, count, values.begin() + to);
      }
    }
    pycore::CacheAppendParams params;
    params.batch = batch;
    params.kv_heads = kv_heads;
    params.tokens = tokens;
    params.sinks = kept;
    params.key_element = tiles ? static_cast<int64_t>(sizeof(float)) : 0;
    params.ring = ring;
    const auto source = [&](const Buffer& x) {
      const int64_t row = dim * static_cast<int64_t>(sizeof(float));
      return pycore::CacheSource{reinterpret_cast<const char*>(x.data()), kv_heads * tokens * row, tokens * row, row,
                                 row};
    };
    params.key = source(key);
    params.value = source(value);
    params.key_cache = reinterpret_cast<char*>(key_cache.data());
    params.value_cache = reinterpret_cast<char*>(value_cache.data());
    params.starts = starts.data();
    params.lengths = lengths.data();
    if (!pycore::lambda_cache_append(params, in_reverse(draw(1, 3))).ok()) std::abort();
  }

  // Whether the newest `queries` tokens' attention has the same bits on the ring as over everything.
  bool same_bits(int64_t queries) {
    const Buffer query = normal(batch * heads * queries * dim);
    Buffer out[2], lse[2];
    for (int full = 0; full < 2; ++full) {
      out[full].resize(query.size());
      lse[full].resize(batch * heads * queries);
      pycore::AttentionParams params;
      params.batch = batch;
      params.heads = heads;
      params.kv_heads = kv_heads;
      params.query_length = queries;
      params.key_length = full ? longest : rows;
      params.head_dim = params.value_dim = dim;
      params.query = query.data();
      params.key = full ? keys.data() : key_cache.data();
      params.value = full ? values.data() : value_cache.data();
      params.query_strides = {heads * queries * dim, queries * dim, dim};
      params.key_strides = params.value_strides = {kv_heads * params.key_length * dim, params.key_length * dim, dim};
      if (tiles && !full) {
        params.key_strides = {kv_heads * rows * dim, rows * dim, 64 * dim};
        params.key_channel_stride = 64;
      }
      params.out = out[full].data();
      params.lse = lse[full].data();
      params.schedule.kind = pycore::ScheduleKind::kLambda;
      params.schedule.sink_size = sinks;
      params.schedule.window_size = window;
      params.key_lengths = lengths.data();
      params.key_ring = full ? 0 : ring;
      attend(params, draw(1, 3));
    }
    const auto equal = [](const Buffer& a, const Buffer& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return equal(out[0], out[1]) && equal(lse[0], lse[1]);
  }
};

}  // namespace

int main() {
  constexpr int kProblems = 300;
  for (int n = 0; n < kProblems; ++n) {
    Problem problem;
    for (int64_t left = problem.longest; left > 0;) {
      const int64_t tokens = std::min(left, draw(0, 3) ? draw(1, 3) : draw(1, 200));
      problem.append(tokens);
      left -= tokens;
      if (draw(0, 15) == 0 && !problem.same_bits(draw(1, problem.ring - problem.window + 1))) {
        std::fprintf(stderr, "failed: the ring has other bits than all tokens, in problem %d\n", n);
        return 1;
      }
    }
  }
  std::printf("%d caches\n", kProblems);
  return 0;
}
