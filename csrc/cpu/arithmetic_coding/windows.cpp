// SPDX-License-Identifier: Apache-2.0
// One step of many windows' walks, in plain integer loops on every machine: the model that gives the probabilities
// takes far longer than this.
#include <pycore/arithmetic_coding/windows.h>
#include <pycore/dtype.h>
#include <pycore/sizes.h>

#include <algorithm>
#include <cstring>

namespace pycore {
namespace {

constexpr int64_t kSerialEntries = 1 << 14;  // not worth waking a thread for
constexpr int64_t kWalksAtOnce = 64;

Parallel limited(const Parallel& parallel, int64_t work) { return work < kSerialEntries ? Parallel{} : parallel; }

// The bits of an entry as a double, which all four types are without rounding.
uint64_t double_bits(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
struct FromFloat {
  using Entry = float;
  static uint64_t bits(float x) { return double_bits(static_cast<double>(x)); }
};
struct FromDouble {
  using Entry = double;
  static uint64_t bits(double x) { return double_bits(x); }
};
struct FromFloat16 {
  using Entry = uint16_t;
  static uint64_t bits(uint16_t x) { return double_bits(static_cast<double>(float_from_float16(x))); }
};
struct FromBFloat16 {
  using Entry = uint16_t;
  static uint64_t bits(uint16_t x) { return double_bits(static_cast<double>(float_from_bfloat16(x))); }
};

constexpr uint64_t kInfinityBits = uint64_t{0x7ff} << 52, kMinusZeroBits = uint64_t{1} << 63;

template <class From>
WindowFault count_row(const WindowCountsParams& params, int64_t row) {
  const auto* entries = params.probs.row<typename From::Entry>(row);
  int64_t* sums = params.cumulative + row * (params.symbols + 1);
  uint64_t largest = 0;
  for (int64_t i = 0; i < params.symbols; ++i) {
    uint64_t bits = From::bits(entries[i * params.entry_stride]);
    if (bits == kMinusZeroBits) bits = 0;
    if (bits >= kInfinityBits) return WindowFault::kBadValue;  // NaN, infinity, or a sign
    largest = std::max(largest, bits);
  }
  if (largest == 0) return WindowFault::kNoMass;
  const int32_t exponent = probability_exponent(largest);
  int64_t sum = 0;
  for (int64_t i = 0; i < params.symbols; ++i) {
    sums[i] = sum;
    // The sign of -0 falls off: probability_count looks at exponent and fraction alone.
    sum += static_cast<int64_t>(probability_count(From::bits(entries[i * params.entry_stride]), exponent));
  }
  sums[params.symbols] = sum;
  return WindowFault::kNone;
}

template <class F>
void for_walks(const WindowStepParams& params, const Parallel& parallel, const F& f) {
  const int64_t items = (params.walks + kWalksAtOnce - 1) / kWalksAtOnce;
  for_each_item(limited(parallel, size_product({16, params.walks})), items, [&](int64_t, int64_t item) {
    const int64_t end = std::min(params.walks, (item + 1) * kWalksAtOnce);
    for (int64_t walk = item * kWalksAtOnce; walk < end; ++walk) f(walk);
  });
}

}  // namespace

Status window_counts(const WindowCountsParams& params, const Parallel& parallel) {
  const auto run = [&](auto from) {
    for_each_item(limited(parallel, size_product({params.probs.rows, params.symbols})), params.probs.rows,
                  [&](int64_t, int64_t row) { params.faults[row] = count_row<decltype(from)>(params, row); });
  };
  switch (params.dtype) {
    case DType::kFloat64: run(FromDouble()); break;
    case DType::kFloat16: run(FromFloat16()); break;
    case DType::kBFloat16: run(FromBFloat16()); break;
    default: run(FromFloat()); break;
  }
  return {};
}

Status window_encode(const WindowStepParams& params, const Parallel& parallel) {
  for_walks(params, parallel, [&](int64_t walk) {
    const int64_t* sums = params.cumulative + params.rows[walk] * (params.symbols + 1);
    const int64_t size = params.size[walk], symbol = params.in[walk];
    const bool root = size == int64_t{1} << params.bits;
    const int64_t begin = window_share(sums, symbol, params.symbols, size, root);
    const int64_t end = window_share(sums, symbol + 1, params.symbols, size, root);
    params.moved[walk] = end > begin;
    if (end > begin) {
      params.start[walk] += begin;
      params.size[walk] = end - begin;
    }
  });
  return {};
}

Status window_decode(const WindowStepParams& params, const Parallel& parallel) {
  for_walks(params, parallel, [&](int64_t walk) {
    const int64_t* sums = params.cumulative + params.rows[walk] * (params.symbols + 1);
    const int64_t size = params.size[walk], offset = params.in[walk] - params.start[walk];
    const bool root = size == int64_t{1} << params.bits;
    if (!root && offset == size - 1) {
      params.symbols_out[walk] = -1;
      return;
    }
    // The last symbol whose share begins at or before the codeword; those without a share begin where the next does.
    int64_t symbol = 0;
    for (int64_t left = params.symbols; left > 1;) {
      const int64_t half = left / 2;
      if (window_share(sums, symbol + half, params.symbols, size, root) <= offset) symbol += half;
      left -= half;
    }
    const int64_t begin = window_share(sums, symbol, params.symbols, size, root);
    params.symbols_out[walk] = symbol;
    params.start[walk] += begin;
    params.size[walk] = window_share(sums, symbol + 1, params.symbols, size, root) - begin;
  });
  return {};
}

}  // namespace pycore
