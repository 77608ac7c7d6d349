// SPDX-License-Identifier: Apache-2.0
// Rows of a model, for the coder of one instruction set: checks, symbols in blocks, and the three sources of shares
// (one row for all symbols, a given row for each, logits for each).
#pragma once

#include <pycore/arithmetic_coding/arithmetic_coding.h>
#include <pycore/arithmetic_coding/coder_math.h>
#include <pycore/dtype.h>

#include <cstdint>

#include "kernels.h"
#include "vectors.inl.h"

constexpr int64_t kSymbolBlock = 512;

inline uint32_t add_bytes(uint32_t crc, const uint8_t* data, int64_t bytes) {
  for (; bytes >= 8; bytes -= 8, data += 8) {
    uint64_t word;
    __builtin_memcpy(&word, data, 8);
    crc = crc_eight(crc, word);
  }
  for (; bytes > 0; --bytes, ++data) crc = crc_one(crc, *data);
  return crc;
}

template <class T>
inline uint32_t add_symbols(uint32_t crc, const T* symbols, int64_t count) {
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    crc = crc_eight(crc, static_cast<uint32_t>(symbols[i]) | static_cast<uint64_t>(symbols[i + 1]) << 32);
  }
  return i < count ? crc_four(crc, static_cast<uint32_t>(symbols[i])) : crc;
}

// Up to kSymbolBlock symbols of any integer type. False if one is no symbol of the model.
template <class T>
bool copy_symbols(const void* base, int64_t stride, int64_t count, int64_t symbols, int32_t* out) {
  const T* from = static_cast<const T*>(base);
  bool bad = false;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t symbol = static_cast<int64_t>(from[i * stride]);
    bad |= static_cast<uint64_t>(symbol) >= static_cast<uint64_t>(symbols);
    out[i] = static_cast<int32_t>(symbol);
  }
  return !bad;
}

template <class T>
int64_t first_bad(const void* base, int64_t stride, int64_t symbols, int64_t* value) {
  const T* from = static_cast<const T*>(base);
  int64_t i = 0;
  for (;; ++i) {
    *value = static_cast<int64_t>(from[i * stride]);
    if (static_cast<uint64_t>(*value) >= static_cast<uint64_t>(symbols)) return i;
  }
}

template <class T>
bool read_symbols_as(const EncodeParams& params, int64_t stream, int64_t position, int64_t step, int64_t count,
                     int32_t* out, StreamResult* result) {
  const T* base =
      static_cast<const T*>(params.symbols) + stream * params.stream_stride + position * params.position_stride;
  const int64_t stride = step * params.position_stride;
  if (stride == 1 ? copy_symbols<T>(base, 1, count, params.model.symbols, out)
                  : copy_symbols<T>(base, stride, count, params.model.symbols, out)) {
    return true;
  }
  result->fault = CoderFault::kSymbolRange;
  result->position = position + step * first_bad<T>(base, stride, params.model.symbols, &result->value);
  return false;
}

// Symbols position, position + step, ... of a stream.
bool read_symbols(const EncodeParams& params, int64_t stream, int64_t position, int64_t step, int64_t count,
                  int32_t* out, StreamResult* result) {
  switch (params.symbol_dtype) {
    case DType::kUInt8: return read_symbols_as<uint8_t>(params, stream, position, step, count, out, result);
    case DType::kInt8: return read_symbols_as<int8_t>(params, stream, position, step, count, out, result);
    case DType::kInt16: return read_symbols_as<int16_t>(params, stream, position, step, count, out, result);
    case DType::kUInt16: return read_symbols_as<uint16_t>(params, stream, position, step, count, out, result);
    case DType::kInt32: return read_symbols_as<int32_t>(params, stream, position, step, count, out, result);
    case DType::kUInt32: return read_symbols_as<uint32_t>(params, stream, position, step, count, out, result);
    case DType::kUInt64: return read_symbols_as<uint64_t>(params, stream, position, step, count, out, result);
    default: return read_symbols_as<int64_t>(params, stream, position, step, count, out, result);
  }
}

// ---- rows that are given --------------------------------------------------------------------------------------------

// uint16 holds 2^16, which only the last entry may be, as 0.
inline uint32_t entry(const uint16_t* row, int64_t i, int64_t symbols) { return i == symbols ? 1u << 16 : row[i]; }
inline uint32_t entry(const int32_t* row, int64_t i, int64_t) { return static_cast<uint32_t>(row[i]); }

inline bool is_cumulative(const uint16_t* row, int64_t symbols, int) {
  return row[0] == 0 && row[symbols] == 0 && rising(row, symbols);
}
inline bool is_cumulative(const int32_t* row, int64_t symbols, int precision) {
  return row[0] == 0 && row[symbols] == int32_t{1} << precision && rising(row, symbols + 1);
}

// Asks for the fourth row from here: processors prefetch within a page, and a page holds a few rows. An address
// beyond the last row is asked for in vain, which does no harm.
template <class T>
inline void prefetch_row(const T* row, int64_t stride, int64_t entries) {
  const int64_t bytes = entries * static_cast<int64_t>(sizeof(T));
  if (bytes > 4096) return;
  const uintptr_t next = reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(4 * stride) * sizeof(T);
  for (int64_t at = 0; at < bytes; at += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(next + static_cast<uintptr_t>(at)));
}

// Rows up to this long are read whole: addresses that do not wait for the code let the next rows be fetched meanwhile,
// where a binary search would wait for memory at each step.
constexpr int64_t kScanned = 512;

struct Share {
  uint32_t begin, width;
};

template <class T>
struct GivenRows {
  const CoderModel& model;
  const T* base;
  T* gathered;  // a row whose entries do not lie side by side is copied here

  const T* row(int64_t position) const {
    const T* row = base + position * model.position_stride;
    if (model.entry_stride == 1) {
      prefetch_row(row, model.position_stride, model.symbols + 1);
      return row;
    }
    for (int64_t i = 0; i <= model.symbols; ++i) gathered[i] = row[i * model.entry_stride];
    return gathered;
  }

  CoderFault share(int64_t position, int32_t symbol, Share* out) const {
    const T* r = row(position);
    if (!is_cumulative(r, model.symbols, model.precision)) return CoderFault::kNotCumulative;
    const uint32_t begin = entry(r, symbol, model.symbols), end = entry(r, symbol + 1, model.symbols);
    // Another thread may have written to the row since: what is used must be a share all the same.
    if (__builtin_expect(begin > end || end > 1u << model.precision, 0)) return CoderFault::kNotCumulative;
    *out = {begin, end - begin};
    return out->width ? CoderFault::kNone : CoderFault::kNoShare;
  }

  // The symbol whose share `value` < 2^precision lies in.
  CoderFault find(int64_t position, uint32_t value, int64_t* symbol, Share* out) const {
    const T* r = row(position);
    int64_t from = 1, count = model.symbols - 1;
    while (count > kScanned) {
      const int64_t half = count / 2;
      from += static_cast<uint32_t>(r[from + half - 1]) <= value ? half : 0;
      count -= half;
    }
    const int64_t s = from - 1 + count_at_most(r + from, count, value);
    out->begin = entry(r, s, model.symbols);
    const uint32_t end = entry(r, s + 1, model.symbols);
    out->width = end - out->begin;
    *symbol = s;
    // The row was not looked at as a whole. A share that ends past 2^precision would make the range overflow, to 0.
    const bool inside = out->begin <= value && value < end && end <= 1u << model.precision;
    return inside ? CoderFault::kNone : CoderFault::kNotCumulative;
  }

  CoderFault cumulate(int64_t position, uint32_t* out) const {
    const T* r = row(position);
    const uint32_t last = entry(r, model.symbols, model.symbols);
    if (sizeof(T) == 2 && r[model.symbols] != 0) return CoderFault::kNotCumulative;
    for (int64_t i = 0; i < model.symbols; ++i) out[i] = entry(r, i, model.symbols);
    out[model.symbols] = last;
    // The copy is what is checked, since it is what is used.
    const bool good = is_cumulative(reinterpret_cast<const int32_t*>(out), model.symbols, model.precision);
    return good ? CoderFault::kNone : CoderFault::kNotCumulative;
  }
};

// ---- logits and probabilities ---------------------------------------------------------------------------------------

// A row of any floating type as float32.
const float* float_row(DType dtype, const void* data, int64_t offset, int64_t stride, int64_t count, float* out) {
  switch (dtype) {
    case DType::kFloat64: {
      const double* from = static_cast<const double*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(from[i * stride]);
      return out;
    }
    case DType::kFloat16: {
      const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = float_from_float16(from[i * stride]);
      return out;
    }
    case DType::kBFloat16: {
      const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = float_from_bfloat16(from[i * stride]);
      return out;
    }
    default: break;
  }
  const float* from = static_cast<const float*>(data) + offset;
  if (stride == 1) return from;
  for (int64_t i = 0; i < count; ++i) out[i] = from[i * stride];
  return out;
}

// The point of the row's highest logit, from which the others are measured.
CoderFault highest_point(const float* logits, int64_t symbols, int32_t* point) {
  float highest;
  if (!highest_logit(logits, symbols, &highest)) return CoderFault::kBadValue;
  *point = logit_point(highest);
  return *point == -kLogitBound ? CoderFault::kNoMass : CoderFault::kNone;
}

CoderFault counts_of_probs(DType dtype, const void* data, int64_t offset, int64_t stride, int64_t symbols,
                           float* floats, uint32_t* counts, uint64_t* sum) {
  const double* doubles = static_cast<const double*>(data) + offset;
  const float* row = dtype == DType::kFloat64 ? nullptr : float_row(dtype, data, offset, stride, symbols, floats);
  const auto bits_at = [&](int64_t i) {
    const double value = row ? static_cast<double>(row[i]) : doubles[i * stride];
    uint64_t bits;
    __builtin_memcpy(&bits, &value, 8);
    return bits == uint64_t{1} << 63 ? 0 : bits;  // -0
  };
  uint64_t largest = 0;
  for (int64_t i = 0; i < symbols; ++i) {
    const uint64_t bits = bits_at(i);
    largest = bits > largest ? bits : largest;  // a sign bit makes it larger than any number
  }
  if (largest >= uint64_t{0x7ff} << 52) return CoderFault::kBadValue;
  const int32_t exponent = probability_exponent(largest);
  *sum = 0;
  for (int64_t i = 0; i < symbols; ++i) *sum += counts[i] = probability_count(bits_at(i), exponent);
  return *sum ? CoderFault::kNone : CoderFault::kNoMass;
}

// out[0 .. symbols] from the counts, which may lie where out[1 ..] does not.
template <class T>
void cumulate_counts(const uint32_t* counts, uint64_t sum, int64_t symbols, int precision, T* out) {
  uint64_t running = 0;
  out[0] = 0;
  for (int64_t i = 0; i < symbols; ++i) {
    running += counts[i];
    out[i + 1] = static_cast<T>(cdf_entry(i + 1, running, sum, symbols, precision));
  }
}

constexpr int64_t kFewBlocks = 16;  // looked at all, without a branch

struct LogitRows {
  const CoderModel& model;
  int64_t offset;  // of the stream's first logit
  uint32_t* counts;
  uint64_t* blocks;  // sums of kCountBlock counts
  float* floats;

  const float* row(int64_t position) const {
    const int64_t first = offset + position * model.position_stride;
    if (model.dtype == DType::kFloat32 && model.entry_stride == 1) {
      prefetch_row(static_cast<const float*>(model.data) + first, model.position_stride, model.symbols);
    }
    return float_row(model.dtype, model.data, first, model.entry_stride, model.symbols, floats);
  }

  CoderFault share(int64_t position, int32_t symbol, Share* out) const {
    const float* logits = row(position);
    int32_t highest;
    const CoderFault fault = highest_point(logits, model.symbols, &highest);
    if (fault != CoderFault::kNone) return fault;
    uint64_t before;
    const uint64_t sum = logit_sums(logits, model.symbols, highest, symbol, &before);
    const uint64_t after = before + logit_count(highest - logit_point(logits[symbol]));
    // Not so unless another thread wrote to the logits since.
    if (__builtin_expect(sum == 0 || after > sum, 0)) return CoderFault::kNoMass;
    out->begin = cdf_entry(symbol, before, sum, model.symbols, model.precision);
    out->width = cdf_entry(symbol + 1, after, sum, model.symbols, model.precision) - out->begin;
    return CoderFault::kNone;
  }

  // Goes on from symbol *s by as many steps of `step` symbols as fit, less than `parts` of them.
  template <class Wide, class Sum>
  [[gnu::always_inline]] void skip(int64_t step, int64_t parts, Wide shared, Wide limit, uint64_t sum, int64_t* s,
                                   uint64_t* running, const Sum& sum_at) const {
    const int64_t first = *s, left = (model.symbols - 1 - first) / step;
    const int64_t steps = left < parts - 1 ? left : parts - 1;
    Wide total = *running * shared + static_cast<Wide>(static_cast<uint64_t>(first)) * sum;
    const Wide each = static_cast<Wide>(static_cast<uint64_t>(step)) * sum;
    for (int64_t k = 0; k < steps; ++k) {
      const uint64_t part = sum_at(first + k * step);
      total += part * shared + each;
      const uint64_t fits = total < limit;  // and all before it
      *running += part & -fits;
      *s += step & -static_cast<int64_t>(fits);
    }
  }

  // cdf[i] <= value where C[i] (2^P - V) + i C[V] < (value + 1) C[V]: a sum that grows symbol by symbol, no division.
  // Wide holds 2^P C[V].
  template <class Wide>
  int64_t search(uint32_t value, uint64_t sum, uint64_t* before) const {
    const Wide shared = (uint64_t{1} << model.precision) - static_cast<uint64_t>(model.symbols);
    const Wide limit = static_cast<Wide>(value + uint64_t{1}) * sum;
    int64_t s = 0;
    uint64_t running = 0;
    if (model.symbols > kFewBlocks * kCountBlock) {
      const auto fits = [&](int64_t i, uint64_t cumulative) {
        return cumulative * shared + static_cast<Wide>(static_cast<uint64_t>(i)) * sum < limit;
      };
      for (; s + kCountBlock < model.symbols && fits(s + kCountBlock, running + blocks[s / kCountBlock]);
           s += kCountBlock) {
        running += blocks[s / kCountBlock];
      }
    } else {
      skip<Wide>(kCountBlock, kFewBlocks, shared, limit, sum, &s, &running,
                 [&](int64_t i) { return blocks[i / kCountBlock]; });
    }
    // Where the code lies is as good as random, so the rest of the way down to a symbol has no branch on it.
    skip<Wide>(16, kCountBlock / 16, shared, limit, sum, &s, &running,
               [&](int64_t i) { return sum_of_sixteen(counts + i); });
    skip<Wide>(4, 4, shared, limit, sum, &s, &running,
               [&](int64_t i) { return uint64_t{counts[i]} + counts[i + 1] + counts[i + 2] + counts[i + 3]; });
    skip<Wide>(1, 4, shared, limit, sum, &s, &running, [&](int64_t i) { return uint64_t{counts[i]}; });
    *before = running;
    return s;
  }

  CoderFault find(int64_t position, uint32_t value, int64_t* symbol, Share* out) const {
    const float* logits = row(position);
    int32_t highest;
    const CoderFault fault = highest_point(logits, model.symbols, &highest);
    if (fault != CoderFault::kNone) return fault;
    const uint64_t sum = logit_counts(logits, model.symbols, highest, counts, blocks);
    if (__builtin_expect(sum == 0, 0)) return CoderFault::kNoMass;
    __extension__ typedef unsigned __int128 Large;
    uint64_t before;
    const bool small = sum >> (63 - model.precision) == 0;
    const int64_t s = small ? search<uint64_t>(value, sum, &before) : search<Large>(value, sum, &before);
    *symbol = s;
    out->begin = cdf_entry(s, before, sum, model.symbols, model.precision);
    out->width = cdf_entry(s + 1, before + counts[s], sum, model.symbols, model.precision) - out->begin;
    return CoderFault::kNone;
  }

  CoderFault cumulate(int64_t position, uint32_t* out) const {
    const float* logits = row(position);
    int32_t highest;
    const CoderFault fault = highest_point(logits, model.symbols, &highest);
    if (fault != CoderFault::kNone) return fault;
    const uint64_t sum = logit_counts(logits, model.symbols, highest, counts, blocks);
    if (__builtin_expect(sum == 0, 0)) return CoderFault::kNoMass;
    cumulate_counts(counts, sum, model.symbols, model.precision, out);
    return fault;
  }
};

// ---- one row for all symbols ----------------------------------------------------------------------------------------

struct Slot {
  CoderSlot* header;
  void* buckets;
  uint16_t* shares;
  uint32_t *row, *counts;
  float* floats;
  uint64_t* blocks;
};

inline Slot slot_of(void* scratch, int64_t symbols) {
  char* memory = static_cast<char*>(scratch);
  char* shares = memory + kSlotHeader + kBucketBytes;
  char* rows = shares + kShareBytes;
  const int64_t bytes = slot_row_bytes(symbols);
  return {reinterpret_cast<CoderSlot*>(memory),         memory + kSlotHeader,
          reinterpret_cast<uint16_t*>(shares),          reinterpret_cast<uint32_t*>(rows),
          reinterpret_cast<uint32_t*>(rows + bytes),    reinterpret_cast<float*>(rows + 2 * bytes),
          reinterpret_cast<uint64_t*>(rows + 3 * bytes)};
}

// Buckets are stretches of 2^precision; the table stays in the first cache. Symbols take 16 bits where they can: not
// above precision 16, nor in the larger alphabets that a row with symbols of no share may have.
inline bool is_fine(const CoderModel& model) { return model.precision > 16 || model.symbols > 1 << 16; }

template <bool kFine>
struct Buckets;
template <>
struct Buckets<false> {
  using Symbol = uint16_t;
  static constexpr int kBits = 13;
};
template <>
struct Buckets<true> {
  using Symbol = uint32_t;
  static constexpr int kBits = 12;
};

template <bool kFine>
inline int bucket_shift(int precision) {
  return precision > Buckets<kFine>::kBits ? precision - Buckets<kFine>::kBits : 0;
}

// buckets[b] is the symbol that value b << shift belongs to; one more follows for the end.
template <bool kFine>
void fill_buckets(const uint32_t* row, int64_t symbols, int precision, void* memory) {
  using Symbol = typename Buckets<kFine>::Symbol;
  Symbol* buckets = static_cast<Symbol*>(memory);
  const int shift = bucket_shift<kFine>(precision);
  const int64_t count = int64_t{1} << (precision - shift);
  int64_t symbol = 0;
  for (int64_t b = 0; b < count; ++b) {
    while (row[symbol + 1] <= static_cast<uint32_t>(b << shift)) ++symbol;
    buckets[b] = static_cast<Symbol>(symbol);
  }
  buckets[count] = static_cast<Symbol>(symbols - 1);
}

// For one stream of precision 16, whose steps wait for each other: for each of kShareStretches stretches of 2^16 the
// begin, the width and the symbol of the share that it lies in, three arrays of 16 bits. No width: the stretch has
// parts of several shares, of which the symbol is the first (or of one of 2^16).
constexpr int kShareShift = 4;
void fill_shares(const uint32_t* row, uint16_t* begins) {
  uint16_t *widths = begins + kShareStretches, *symbols = widths + kShareStretches;
  int64_t symbol = 0;
  for (int64_t b = 0; b < kShareStretches; ++b) {
    const uint32_t first = static_cast<uint32_t>(b << kShareShift);
    while (row[symbol + 1] <= first) ++symbol;
    const bool whole = row[symbol + 1] >= first + (1u << kShareShift);
    begins[b] = static_cast<uint16_t>(row[symbol]);
    widths[b] = static_cast<uint16_t>(whole ? row[symbol + 1] - row[symbol] : 0);
    symbols[b] = static_cast<uint16_t>(symbol);
  }
}

template <class Symbol>
inline int64_t find_in_buckets(const uint32_t* row, const Symbol* buckets, int shift, uint32_t value) {
  int64_t low = buckets[value >> shift], high = buckets[(value >> shift) + 1];
  while (__builtin_expect(low < high, 0)) {
    const int64_t middle = (low + high + 1) >> 1;
    if (row[middle] <= value) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// What tells one stream's first row from another's.
inline const void* row_key(const CoderModel& model, int64_t stream) {
  return static_cast<const char*>(model.data) + stream * model.stream_stride * dtype_size(model.dtype);
}

template <class Rows>
void prepare_slot(const Slot& slot, const CoderModel& model, const void* key, const Rows& rows) {
  if (slot.header->prepared == key) return;
  slot.header->prepared = key;
  slot.header->has_buckets = slot.header->has_shares = false;
  slot.header->fault = rows.cumulate(0, slot.row);
  if (slot.header->fault != CoderFault::kNone) return;
  slot.header->fingerprint = kFingerprintStart;
  for (int64_t i = 0; i <= model.symbols; ++i) {
    slot.header->fingerprint = fingerprint_add(slot.header->fingerprint, slot.row[i]);
  }
}

// The tables of the prepared row, which is a good one.
void prepare_buckets(const Slot& slot, const CoderModel& model) {
  if (slot.header->has_buckets) return;
  slot.header->has_buckets = true;
  if (is_fine(model)) {
    fill_buckets<true>(slot.row, model.symbols, model.precision, slot.buckets);
  } else {
    fill_buckets<false>(slot.row, model.symbols, model.precision, slot.buckets);
  }
}

void prepare_shares(const Slot& slot) {
  if (slot.header->has_shares) return;
  slot.header->has_shares = true;
  fill_shares(slot.row, slot.shares);
}

// Calls f(rows) with the stream's rows as what they are.
template <class F>
void with_rows(const CoderModel& model, int64_t stream, const Slot& slot, const F& f) {
  const int64_t offset = stream * model.stream_stride;
  switch (model.dtype) {
    case DType::kInt32:
      f(GivenRows<int32_t>{model, static_cast<const int32_t*>(model.data) + offset,
                           reinterpret_cast<int32_t*>(slot.counts)});
      break;
    case DType::kUInt16:
      f(GivenRows<uint16_t>{model, static_cast<const uint16_t*>(model.data) + offset,
                            reinterpret_cast<uint16_t*>(slot.counts)});
      break;
    default: f(LogitRows{model, offset, slot.counts, slot.blocks, slot.floats});
  }
}
