// SPDX-License-Identifier: Apache-2.0
// The arithmetic coder of Witten, Neal and Cleary, "Arithmetic coding for data compression" (1987), with 32-bit bounds
// and 16-bit frequencies: torchac's streams. Their loop writes a bit a turn; here all bits that the bounds agree on go
// out at once, and then all turns in which the bounds straddle the middle are taken at once. The bits are the same.
#include <pycore/arithmetic_coding/arithmetic_coding.h>

#include <cstring>

namespace pycore {
namespace {

constexpr uint32_t kQuarter = 1u << 30, kHalf = 1u << 31;
constexpr int kPrecision = 16;

struct Bounds {
  uint32_t low = 0, high = ~0u;

  // To the share [begin, end) of 2^16. Both products fit 48 bits.
  void narrow(uint32_t begin, uint32_t end) {
    const uint64_t span = uint64_t{high} - low + 1;
    high = low + static_cast<uint32_t>((span * end) >> kPrecision) - 1;
    low = low + static_cast<uint32_t>((span * begin) >> kPrecision);
  }
  // Leading bits on which low and high agree; they are never all equal.
  int agreed() const { return __builtin_clz(low ^ high); }
  void drop(int bits) {
    low <<= bits;
    high = high << bits | ((1u << bits) - 1);
  }
  // With low = 0..., high = 1...: how often low is 01... and high 10..., so that the second bit can be put off.
  int straddled() const {
    const uint32_t ends = ~((~high & low) << 1);
    return ends ? __builtin_clz(ends) : 31;
  }
  void put_off(int bits) {
    low = low << bits & ~kHalf;
    high = high << bits | ((1u << bits) - 1) | kHalf;
  }
};

struct Bits {
  uint8_t* out;
  uint64_t held = 0;  // the last `count` bits, not yet written
  int count = 0;

  void put(uint32_t bits, int number) {  // number <= 32
    held = held << number | bits;
    count += number;
    while (count >= 8) {
      count -= 8;
      *out++ = static_cast<uint8_t>(held >> count);
    }
  }
  void repeat(bool bit, int64_t number) {
    for (; number > 0; number -= 16) {
      const int some = number < 16 ? static_cast<int>(number) : 16;
      put(bit ? (1u << some) - 1 : 0, some);
    }
  }
};

uint32_t entry(const uint16_t* row, int64_t i, const BitwiseModel& model) {
  return i == model.symbols ? 1u << kPrecision : row[i * model.entry_stride];
}

bool rises(const uint16_t* row, const BitwiseModel& model) {
  bool falls = false;
  if (model.entry_stride == 1) {
    for (int64_t i = 1; i < model.symbols; ++i) falls |= row[i] < row[i - 1];
  } else {
    for (int64_t i = 1; i < model.symbols; ++i) {
      falls |= row[i * model.entry_stride] < row[(i - 1) * model.entry_stride];
    }
  }
  return !falls;
}

int64_t symbol_at(const BitwiseParams& params, int64_t i) {
  switch (params.symbol_dtype) {
    case DType::kUInt8: return *params.symbols.row<uint8_t>(i);
    case DType::kInt8: return *params.symbols.row<int8_t>(i);
    case DType::kInt16: return *params.symbols.row<int16_t>(i);
    case DType::kUInt16: return *params.symbols.row<uint16_t>(i);
    case DType::kInt32: return *params.symbols.row<int32_t>(i);
    case DType::kUInt32: return *params.symbols.row<uint32_t>(i);
    default: return *params.symbols.row<int64_t>(i);
  }
}

const uint16_t* row_at(const BitwiseModel& model, int64_t i) {
  return static_cast<const uint16_t*>(model.cdf) +
         (model.rows.uniform() ? i * model.rows.row_stride() : model.rows.offset(i));
}

// 32 bits of the stream from bit `at` on; zeros lie behind its end.
uint32_t window(const uint8_t* data, int64_t bytes, int64_t at) {
  uint64_t word = 0;
  const int64_t first = at >> 3;
  if (bytes - first >= 8) {
    std::memcpy(&word, data + first, 8);
    word = __builtin_bswap64(word);
  } else {
    for (int64_t i = 0; i < 8 && first + i < bytes; ++i) word |= static_cast<uint64_t>(data[first + i]) << (56 - 8 * i);
  }
  return static_cast<uint32_t>(word << (at & 7) >> 32);
}

void stop(const BitwiseParams& params, CoderFault fault, int64_t position, int64_t value) {
  params.result->fault = fault;
  params.result->position = position;
  params.result->value = value;
}

}  // namespace

// A symbol takes 16 bits and, because a span of at least 2^30 is cut into 2^16 parts, less than 2^-13 of a bit more.
int64_t bitwise_capacity(const BitwiseParams& params) {
  return 2 * params.model.rows.rows + params.model.rows.rows / 1024 + 16;
}

Status bitwise_encode(const BitwiseParams& params) {
  const BitwiseModel& model = params.model;
  *params.result = StreamResult();
  Bounds bounds;
  Bits bits{params.data};
  int64_t pending = 0;
  for (int64_t i = 0; i < model.rows.rows; ++i) {
    const uint16_t* row = row_at(model, i);
    const int64_t symbol = symbol_at(params, i);
    if (symbol < 0 || symbol >= model.symbols) {
      stop(params, CoderFault::kSymbolRange, i, symbol);
      return {};
    }
    const uint32_t begin = entry(row, symbol, model), end = entry(row, symbol + 1, model);
    if (!rises(row, model) || begin >= end) {
      stop(params, begin == end ? CoderFault::kNoShare : CoderFault::kNotCumulative, i, symbol);
      return {};
    }
    bounds.narrow(begin, end);
    const int agreed = bounds.agreed();
    if (agreed > 0) {
      const uint32_t first = bounds.low >> (32 - agreed), top = first >> (agreed - 1);
      if (pending > 0) {
        bits.put(top, 1);
        bits.repeat(top == 0, pending);
        pending = 0;
        bits.put(first & ((1u << (agreed - 1)) - 1), agreed - 1);
      } else {
        bits.put(first, agreed);
      }
      bounds.drop(agreed);
    }
    const int straddled = bounds.straddled();
    pending += straddled;
    bounds.put_off(straddled);
  }
  const bool above = bounds.low >= kQuarter;
  bits.put(above, 1);
  bits.repeat(!above, pending + 1);
  if (bits.count > 0) bits.put(0, 8 - bits.count);
  params.result->bytes = bits.out - params.data;
  return {};
}

Status bitwise_decode(const BitwiseParams& params) {
  const BitwiseModel& model = params.model;
  *params.result = StreamResult();
  Bounds bounds;
  uint32_t value = window(params.data, params.bytes, 0);
  int64_t position = 32;  // of the next bit
  for (int64_t i = 0; i < model.rows.rows; ++i) {
    const uint16_t* row = row_at(model, i);
    const uint64_t span = uint64_t{bounds.high} - bounds.low + 1;
    const uint32_t count = static_cast<uint32_t>(((uint64_t{value} - bounds.low + 1) * (1u << kPrecision) - 1) / span);
    int64_t symbol = 0, left = model.symbols;
    while (left > 1) {  // the last entry that is at most count, without a branch
      const int64_t half = left / 2;
      symbol += row[(symbol + half) * model.entry_stride] <= count ? half : 0;
      left -= half;
    }
    const uint32_t begin = entry(row, symbol, model), end = entry(row, symbol + 1, model);
    if (!rises(row, model)) {
      stop(params, CoderFault::kNotCumulative, i, symbol);
      return {};
    }
    if (count < begin || count >= end) {
      stop(params, CoderFault::kSymbols, i, symbol);
      return {};
    }
    params.out[i] = static_cast<int16_t>(symbol);
    bounds.narrow(begin, end);
    const int agreed = bounds.agreed();
    bounds.drop(agreed);
    const int straddled = bounds.straddled();
    bounds.put_off(straddled);
    // A turn at the middle takes out the second bit; the first one stays.
    const uint64_t fresh = window(params.data, params.bytes, position);
    value = value << agreed | static_cast<uint32_t>(fresh >> (32 - agreed));
    value = (value << straddled & ~kHalf) | (value & kHalf) |
            static_cast<uint32_t>(static_cast<uint32_t>(fresh << agreed) >> 1 >> (31 - straddled));
    position += agreed + straddled;
  }
  // The encoder wrote a bit for each turn, two more, and zeros up to a whole byte.
  if (params.bytes != (position - 32 + 2 + 7) / 8) stop(params, CoderFault::kTruncated, model.rows.rows, 0);
  return {};
}

}  // namespace pycore
