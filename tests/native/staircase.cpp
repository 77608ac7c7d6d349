// SPDX-License-Identifier: Apache-2.0
// The staircase's kernels under the sanitizers: buffers of exactly the size the contract asks for, tokens appended in
// random chunks with padding and cropped again, and what is read compared with quantizing and dequantizing directly.
#include <pycore/dtype.h>
#include <pycore/staircase/cache.h>
#include <pycore/staircase/staircase.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

using namespace pycore;

std::mt19937 engine(20261128);

int64_t draw(int64_t lo, int64_t hi) { return std::uniform_int_distribution<int64_t>(lo, hi)(engine); }

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> buffer(static_cast<size_t>(count));
  for (float& x : buffer) x = distribution(engine);
  return buffer;
}

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "staircase: %s\n", what);
  std::exit(1);
}

Parallel in_reverse(int64_t threads) {
  Parallel parallel;
  parallel.threads = threads;
  parallel.run = [](void*, int64_t slots, void (*body)(void*, int64_t), void* argument) {
    for (int64_t slot = slots - 1; slot >= 0; --slot) body(argument, slot);
  };
  return parallel;
}

// Codes and values of x [outer, length, inner, channels] along its second dimension.
struct Quantized {
  std::vector<uint8_t> codes, centers;
  std::vector<float> lo, hi, back;

  Quantized(const std::vector<float>& x, int64_t outer, int64_t length, int64_t channels, int64_t group, int32_t bits,
            bool use_centers) {
    const bool last = channels == 0;  // groups along the last dimension
    StaircaseQuantizeParams params;
    params.bits = bits;
    params.group_size = group;
    params.outer = outer;
    params.length = length;
    params.channels = last ? 1 : channels;
    params.along_last = last;
    params.x.data = const_cast<float*>(x.data());
    params.x.dtype = DType::kFloat32;
    params.x.dims = last ? 2 : 3;
    params.dim = 1;
    params.x.shape[0] = outer;
    params.x.shape[1] = length;
    params.x.shape[2] = params.channels;
    params.x.strides[0] = length * params.channels;
    params.x.strides[1] = params.channels;
    params.x.strides[2] = 1;
    const size_t count = static_cast<size_t>(outer * length * params.channels);
    const size_t groups = static_cast<size_t>(outer * params.groups() * params.channels);
    codes.resize(count);
    back.resize(count);
    lo.resize(groups);
    hi.resize(groups);
    centers.resize(groups);
    params.codes = codes.data();
    params.lo = reinterpret_cast<char*>(lo.data());
    params.hi = reinterpret_cast<char*>(hi.data());
    params.centers = centers.data();
    expect(staircase_fault(params, in_reverse(3)) == -1, "a fault where there is none");
    expect(staircase_quantize(params, in_reverse(3)).ok(), "quantizing failed");
    StaircaseDequantizeParams inverse;
    static_cast<StaircaseShape&>(inverse) = params;
    inverse.codes = codes.data();
    inverse.lo = params.lo;
    inverse.hi = params.hi;
    inverse.centers = use_centers ? centers.data() : nullptr;
    inverse.out = reinterpret_cast<char*>(back.data());
    expect(staircase_dequantize(inverse, in_reverse(3)).ok(), "dequantizing failed");
  }
};

void check_grid() {
  for (int round = 0; round < 60; ++round) {
    const int64_t outer = draw(1, 3), length = draw(1, 150), channels = draw(0, 40), group = draw(1, 90);
    const std::vector<float> x = normal(outer * length * std::max<int64_t>(channels, 1));
    const Quantized eight(x, outer, length, channels, group, 8, true);
    for (const int32_t bits : {4, 2, 1}) {
      const Quantized direct(x, outer, length, channels, group, bits, true);
      for (size_t i = 0; i < x.size(); ++i) {
        expect(direct.codes[i] == eight.codes[i] >> (8 - bits), "dropping bits is not quantizing directly");
      }
    }
    for (size_t i = 0; i < x.size(); ++i) expect(std::fabs(eight.back[i] - x[i]) < 0.1f, "a value far from its own");
  }
}

struct Side {
  std::vector<char> full, lo, hi;
  std::vector<uint8_t> planes[3], centers[3];
};

int64_t up(int64_t tokens, int64_t group) { return (tokens + group - 1) / group * group; }

StaircaseSide make_side(Side* side, bool by_token, int64_t channels, const std::vector<int32_t>& bits, int64_t pairs,
                        int64_t sinks, int64_t step, int64_t group, int64_t rollback, int64_t capacity) {
  StaircaseSide out;
  out.by_token = by_token;
  out.channels = channels;
  out.group = group;
  out.steps = static_cast<int32_t>(bits.size());
  std::copy(bits.begin(), bits.end(), out.bits);
  const auto rows = [&](int32_t least) {
    const int64_t steps = std::count_if(bits.begin(), bits.end(), [&](int32_t width) { return width >= least; });
    return bits.back() >= least ? up(capacity, group) : up(std::max(steps * step, group) + rollback, group);
  };
  out.full_rows = rows(16);
  side->full.assign(static_cast<size_t>(pairs * (sinks + out.full_rows) * channels * 4), 0);
  out.full = side->full.data();
  for (int32_t k = 0; k < 3; ++k) {
    out.plane_rows[k] = rows(2 << k);
    side->planes[k].assign(static_cast<size_t>(pairs * (out.plane_rows[k] / group) * tile_plane_bytes(out, group, k)),
                           0);
    out.planes[k] = side->planes[k].data();
  }
  const size_t groups = static_cast<size_t>(pairs * (out.plane_rows[0] / group) * tile_groups(out, group));
  side->lo.assign(groups * 4, 0);
  side->hi.assign(groups * 4, 0);
  out.lo = side->lo.data();
  out.hi = side->hi.data();
  for (int32_t k = 0; k < 3; ++k) {
    out.center_rows[k] = out.plane_rows[k];
    side->centers[k].assign(static_cast<size_t>(pairs * (out.center_rows[k] / group) * tile_groups(out, group)), 0);
    out.centers[k] = side->centers[k].data();
  }
  return out;
}

void check_cache() {
  for (int round = 0; round < 40; ++round) {
    const int64_t heads = draw(1, 2), group = draw(1, 20), step = group * draw(1, 3), sinks = draw(0, 25);
    const int64_t rollback = draw(0, 30), capacity = draw(1, 200), key_channels = draw(1, 40),
                  value_channels = draw(1, 40);
    const std::vector<int32_t> ladders[] = {{16, 8, 4, 2}, {16, 8, 8, 4, 2}, {8, 4, 2}};
    const std::vector<int32_t>& ladder = ladders[round % 3];
    Side keys, values;
    StaircaseCacheParams params;
    params.batch = 1;
    params.kv_heads = heads;
    params.sinks = sinks;
    params.step = step;
    params.group = group;
    params.key = make_side(&keys, false, key_channels, ladder, heads, sinks, step, group, rollback, capacity);
    params.value = make_side(&values, true, value_channels, ladder, heads, sinks, step, group, rollback, capacity);
    const std::vector<float> key = normal(heads * capacity * key_channels),
                             value = normal(heads * capacity * value_channels);
    int64_t length = 0, peak = 0;
    while (length < capacity) {
      const int64_t tokens = draw(0, std::min<int64_t>(capacity - length, 60)), start = draw(0, tokens);
      // A chunk whose padding is not there to be read.
      params.tokens = tokens;
      params.starts = &start;
      const int64_t seen = length;
      params.seen = &seen;
      params.lengths = &length;
      const auto source = [&](const std::vector<float>& x, int64_t channels) {
        const int64_t row = channels * 4;
        return CacheSource{reinterpret_cast<const char*>(x.data()) + (length - start) * row, heads * capacity * row,
                           capacity * row, row, row};
      };
      params.key_source = source(key, key_channels);
      params.value_source = source(value, value_channels);
      expect(staircase_cache_fault(params, in_reverse(2)) == -1, "a fault where there is none");
      expect(staircase_cache_append(params, in_reverse(2)).ok(), "appending failed");
      expect(length == seen + tokens - start, "lengths has not moved on");
      peak = std::max(peak, length);
      length -= draw(0, std::max<int64_t>(0, std::min(length, rollback - (peak - length))));
      if (length == 0) continue;
      for (const bool by_token : {false, true}) {
        const int64_t channels = by_token ? value_channels : key_channels;
        const std::vector<float>& x = by_token ? value : key;
        StaircaseReadParams read;
        read.batch = 1;
        read.kv_heads = heads;
        read.tokens = length + 3;
        read.sinks = sinks;
        read.step = step;
        read.group = group;
        read.side = by_token ? params.value : params.key;
        const int64_t position = length - 1;
        read.positions = &position;
        read.ends = &length;
        std::vector<float> out(static_cast<size_t>(heads * read.tokens * channels), 1.0f);
        read.out = reinterpret_cast<char*>(out.data());
        expect(staircase_cache_read(read, in_reverse(2)).ok(), "reading failed");
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t first = 0; first < read.tokens; first += group) {
            const int32_t bits = staircase_bits(read.side, step, position, first);
            const int64_t begin = std::max(first, sinks), end = std::min(first + group, length);
            std::vector<float> expected(x.begin() + (h * capacity + std::min(begin, end)) * channels,
                                        x.begin() + (h * capacity + end) * channels);
            if (bits < 16 && begin < end) {
              expected = by_token ? Quantized(expected, end - begin, channels, 0, group, bits, true).back
                                  : Quantized(expected, 1, end - begin, channels, end - begin, bits, true).back;
            }
            const float* got = out.data() + (h * read.tokens + begin) * channels;
            expect(begin >= end || std::memcmp(got, expected.data(), expected.size() * 4) == 0,
                   "another value is read");
          }
          for (int64_t i = length * channels; i < read.tokens * channels; ++i) {
            expect(out[static_cast<size_t>(h * read.tokens * channels + i)] == 0.0f, "a token where there is none");
          }
        }
      }
      if (draw(0, 30) == 0) break;
    }
  }
}

void check_faults() {
  std::vector<float> x = normal(100 * 20);
  StaircaseQuantizeParams params;
  params.group_size = 64;
  params.length = 100;
  params.channels = 20;
  params.x.data = x.data();
  params.x.dtype = DType::kFloat32;
  params.x.dims = 2;
  params.x.shape[0] = 100;
  params.x.shape[1] = 20;
  params.x.strides[0] = 20;
  params.x.strides[1] = 1;
  for (const float wrong : {NAN, INFINITY, -INFINITY}) {
    const float kept = x[70 * 20 + 17];
    x[70 * 20 + 17] = wrong;
    expect(staircase_fault(params, in_reverse(2)) == 20 + 17, "a fault that is not found");
    x[70 * 20 + 17] = kept;
  }
  x[3] = 3e38f;
  x[23] = -3e38f;
  expect(staircase_fault(params, in_reverse(2)) == 3, "a range that is not found");
}

}  // namespace

int main() {
  check_grid();
  check_cache();
  check_faults();
  return 0;
}
