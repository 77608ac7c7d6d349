// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the coder, in integers, once, for the host and the device: how a distribution becomes cumulative
// frequencies, and how a range coder spends them. docs/formats.md says the same in words; pycore/reference/
// arithmetic_coding.py says it in plain Python.
//
// Everything has internal linkage and is inlined, so that code for one instruction set leaves no symbol behind that
// code for another could share.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYCORE_CODER __host__ __device__ static inline
#else
#define PYCORE_CODER [[gnu::always_inline]] static inline
#endif

namespace pycore {

// ---- distributions to counts ----------------------------------------------------------------------------------------

inline constexpr int kMaxPrecision = 24;

// A count is an integer that is proportional to a probability. Counts of probabilities are below 2^31, those of logits
// at most 2^24; the sum of a row of 2^24 of them stays below 2^55.

// Probabilities, as doubles (float16, bfloat16 and float32 are exact in double). With e the exponent field of the row's
// largest, a count is floor(p 2^(30 - e)): the bits of p's significand that reach 2^-30 of the largest's power of two.
// Nothing is rounded and nothing is summed in floating point.
PYCORE_CODER int32_t probability_exponent(uint64_t bits) { return static_cast<int32_t>(bits >> 52 & 0x7ff); }

PYCORE_CODER uint32_t probability_count(uint64_t bits, int32_t largest_exponent) {
  const int32_t field = probability_exponent(bits);
  const uint64_t fraction = bits & ((uint64_t{1} << 52) - 1);
  const uint64_t significand = field ? fraction | uint64_t{1} << 52 : fraction;
  const int32_t shift = 22 + (largest_exponent ? largest_exponent : 1) - (field ? field : 1);
  return shift < 64 ? static_cast<uint32_t>(significand >> shift) : 0;
}

// Logits, as float32, go onto a grid of sixteen points an octave: point = round(16 log2(e) x), the product rounded to
// float32 and then to the nearest integer, ties to even; points beyond +-kLogitBound are held there. A point that lies
// d below the row's highest has the count floor(kPowers[d mod 16] / 2^(d div 16)), about 2^(24 - d/16). Two devices
// whose logits differ by rounding errors agree unless one of them straddles the middle between two points.
inline constexpr float kLogitScale = 0x1.715476p+4f;  // 16 log2(e)
inline constexpr int32_t kLogitBound = 1 << 21;       // a logit of about 90,852
inline constexpr float kRoundToInteger = 0x1.8p+23f;  // adding it leaves the rounded integer in the low bits
inline constexpr int32_t kRoundToIntegerBits = 0x4b400000;

PYCORE_CODER int32_t logit_point(float logit) {
  float y = logit * kLogitScale;
  y = y < -kLogitBound ? -kLogitBound : y > kLogitBound ? kLogitBound : y;
  y += kRoundToInteger;
  union {
    float value;
    int32_t bits;
  } rounded{y};
  return rounded.bits - kRoundToIntegerBits;
}

// round(2^(24 - f/16)) for f in 0..15.
PYCORE_CODER uint32_t logit_power(int32_t f) {
#if defined(__CUDA_ARCH__)
  constexpr
#else
  static constexpr
#endif
      uint32_t kPowers[16] = {16777216, 16065917, 15384775, 14732511, 14107901, 13509772, 12937002, 12388516,
                              11863283, 11360319, 10878679, 10417458, 9975792,  9552851,  9147842,  8760003};
  return kPowers[f];
}

// distance = highest point of the row - point, >= 0.
PYCORE_CODER uint32_t logit_count(int32_t distance) {
  const int32_t octaves = distance >> 4;
  return octaves > 24 ? 0 : logit_power(distance & 15) >> octaves;
}

// ---- counts to cumulative frequencies -------------------------------------------------------------------------------

// floor(a b / divisor) for a <= divisor, without overflow; the result is at most b.
PYCORE_CODER uint64_t mul_div(uint64_t a, uint64_t b, uint64_t divisor) {
#if defined(__SIZEOF_INT128__)
  __extension__ typedef unsigned __int128 Wide;
  const Wide product = static_cast<Wide>(a) * b;
  if (static_cast<uint64_t>(product >> 64) == 0) return static_cast<uint64_t>(product) / divisor;
  return static_cast<uint64_t>(product / divisor);
#else
#error "the coder needs 128-bit products"
#endif
}

// With C[i] = counts[0] + .. + counts[i - 1] of V symbols and total 2^P:  cdf[i] = i + floor(C[i] (2^P - V) / C[V]).
// So cdf[0] = 0, cdf[V] = 2^P, and every symbol has at least one of the 2^P.
PYCORE_CODER uint32_t cdf_entry(int64_t i, uint64_t cumulative, uint64_t sum, int64_t symbols, int precision) {
  const uint64_t shared = (uint64_t{1} << precision) - static_cast<uint64_t>(symbols);
  return static_cast<uint32_t>(static_cast<uint64_t>(i) + mul_div(cumulative, shared, sum));
}

// ---- the range coder
// --------------------------------------------------------------------------------------------------

// The encoder holds an interval [low, low + range) of the numbers that the payload, read as a binary fraction, may
// become; low is kept modulo 2^64, in units of the last bit that is not yet written, and what has been written is
// corrected when low overflows. range >= 2^48 between symbols, so that one count of the 2^P <= 2^24 is worth 2^24
// units.
inline constexpr uint64_t kFullRange = ~uint64_t{0};  // at the start, with low = 0: an overflow has a word to go to
inline constexpr uint64_t kLeastRange = uint64_t{1} << 48;

struct RangeEncoder {
  uint64_t low = 0, range = kFullRange;
};

// Narrows to the share [begin, begin + width) of 2^precision. True: low overflowed, and one has to be added to the
// words written so far, read as one number. Afterwards the caller writes words while range_needs_word().
PYCORE_CODER bool range_encode(RangeEncoder* coder, uint32_t begin, uint32_t width, int precision) {
  const uint64_t unit = coder->range >> precision, step = unit * begin;
  coder->low += step;
  coder->range = unit * width;
  return coder->low < step;
}

// At most one word a symbol for precision <= 16, at most two up to 24.
PYCORE_CODER bool range_needs_word(uint64_t range) { return range < kLeastRange; }

// Bits that the symbols so far have settled, when `words` were shifted out or in: those, and how far the range is below
// the full one. Encoder and decoder have the same range after the same symbols.
PYCORE_CODER int64_t range_position(int64_t words, uint64_t range) { return 16 * words + __builtin_clzll(range | 1); }

PYCORE_CODER uint16_t range_take_word(RangeEncoder* coder) {
  const uint16_t word = static_cast<uint16_t>(coder->low >> 48);
  coder->low <<= 16;
  coder->range <<= 16;
  return word;
}

// The last word: the interval holds a number whose digits after it are all zero, and zeros are not written.
PYCORE_CODER bool range_finish(RangeEncoder* coder, uint16_t* word) {
  const uint64_t before = coder->low;
  coder->low += kLeastRange - 1;
  *word = static_cast<uint16_t>(coder->low >> 48);
  return coder->low < before;
}

// The decoder holds the payload's number minus low, and the same range. It starts with the first four words; words past
// the end of the payload are zero.
struct RangeDecoder {
  uint64_t code = 0, range = kFullRange;
};

// Where in 2^precision the code lies. No valid stream gives 2^precision or more.
PYCORE_CODER uint64_t range_locate(const RangeDecoder& coder, int precision) {
  return coder.code / (coder.range >> precision);
}

// Takes the symbol out whose share was found. Afterwards the caller reads words while range_needs_word().
PYCORE_CODER void range_consume(RangeDecoder* coder, uint32_t begin, uint32_t width, int precision) {
  const uint64_t unit = coder->range >> precision;
  coder->code -= unit * begin;
  coder->range = unit * width;
}

PYCORE_CODER void range_put_word(RangeDecoder* coder, uint16_t word) {
  coder->code = coder->code << 16 | word;
  coder->range <<= 16;
}

// ---- adaptive models ------------------------------------------------------------------------------------------------
// A byte is two symbols of four bits, the high one and then, in a context of its own for each high one, the low one. A
// context holds entries 0 .. 15 of a cdf of precision 15 and how often it was used. At the start entry i is 2048 i.
// After symbol s, entry i moves by floor((target - entry) / 2^rate) towards its target, i for i <= s and 2^15 - 16 + i
// above: entries keep rising strictly, so every symbol keeps a share.
inline constexpr int kAdaptivePrecision = 15;
inline constexpr int kNibbles = 16, kByteContexts = 17;  // contexts of a byte: high, and low after each high
inline constexpr int kMostUses = 255;

PYCORE_CODER int adaptive_rate(int uses) { return 2 + (uses >= 2) + (uses >= 6) + (uses >= 18) + (uses >= 90); }

PYCORE_CODER int32_t adaptive_target(int i, int symbol) { return i <= symbol ? i : (1 << kAdaptivePrecision) - 16 + i; }

// ---- checks ---------------------------------------------------------------------------------------------------------

// CRC-32C (Castagnoli), reflected: start with ~0, add bytes, and take ~ of the result.
PYCORE_CODER uint32_t crc32c_add(uint32_t crc, uint8_t byte) {
  crc ^= byte;
  for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
  return crc;
}

// The fingerprint of a row is kFingerprintStart with its V + 1 entries added in order, the last one 2^P.
inline constexpr uint64_t kFingerprintStart = 0xcbf29ce484222325;
PYCORE_CODER uint64_t fingerprint_add(uint64_t hash, uint32_t entry) { return (hash ^ entry) * 0x100000001b3; }

}  // namespace pycore
