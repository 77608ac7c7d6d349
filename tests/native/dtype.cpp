// SPDX-License-Identifier: Apache-2.0
// float16 and bfloat16 by their definition, without the bit tricks of dtype.h: a half is sign * mantissa * 2^exponent,
// and a float becomes the nearest one, the even one of two. All halves, all ties and their neighbours, random floats.
// And no floating-point environment changes any of them, nor the instructions that the fast kernels convert with.
#include <immintrin.h>
#include <pycore/dtype.h>
#include <pycore/float_environment.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

struct Format {
  const char* name;
  int mantissa_bits;
  int bias;
  float (*to_float)(uint16_t);
  uint16_t (*from_float)(float);

  int exponent_bits() const { return 15 - mantissa_bits; }
  uint16_t infinity() const { return static_cast<uint16_t>(((1 << exponent_bits()) - 1) << mantissa_bits); }

  // The value of a finite half; one step past the largest it goes on as if there were another exponent.
  double value(uint32_t magnitude) const {
    const int exponent = static_cast<int>(magnitude >> mantissa_bits);
    const int mantissa = static_cast<int>(magnitude & ((1u << mantissa_bits) - 1));
    if (exponent == 0) return std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }
};

void fail(const Format& format, const char* what, float x, unsigned actual, unsigned expected) {
  std::fprintf(stderr, "failed: %s, %s %a: %04x and must be %04x\n", format.name, what, x, actual, expected);
  std::exit(1);
}

// `values` are those of the magnitudes 0 .. infinity().
uint16_t nearest(const Format& format, const std::vector<double>& values, float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(x));
  if (magnitude >= values.back()) return sign | format.infinity();
  const int64_t above = std::upper_bound(values.begin(), values.end(), magnitude) - values.begin();
  const double down = magnitude - values[above - 1], up = values[above] - magnitude;
  const int64_t best = down < up || (down == up && (above - 1) % 2 == 0) ? above - 1 : above;
  return sign | static_cast<uint16_t>(best);
}

void check_float(const Format& format, const std::vector<double>& values, float x) {
  if (std::isnan(x)) {
    const uint16_t half = format.from_float(x);
    if ((half & 0x7fff) <= format.infinity()) fail(format, "NaN", x, half, format.infinity() | 1u);
    return;
  }
  const uint16_t actual = format.from_float(x), expected = nearest(format, values, x);
  if (actual != expected) fail(format, "float", x, actual, expected);
}

void check(const Format& format) {
  std::vector<double> values;
  for (uint32_t magnitude = 0; magnitude <= format.infinity(); ++magnitude) values.push_back(format.value(magnitude));
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint32_t magnitude = bits & 0x7fff;
    const float x = format.to_float(static_cast<uint16_t>(bits));
    bool right = std::signbit(x) == (bits >> 15 != 0);
    if (magnitude > format.infinity()) {
      right = std::isnan(x);
    } else if (magnitude == format.infinity()) {
      right = right && std::isinf(x);
    } else {
      right = right && std::fabs(static_cast<double>(x)) == values[magnitude];
    }
    if (!right) fail(format, "the half as a float is", x, bits, bits);
    check_float(format, values, x);
    if (magnitude >= format.infinity()) continue;
    // Halfway to the next, and one float to either side of it.
    const float tie = static_cast<float>((values[magnitude] + values[magnitude + 1]) / 2);
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    check_float(format, values, sign * tie);
    check_float(format, values, sign * std::nextafter(tie, 0.0f));
    check_float(format, values, sign * std::nextafter(tie, INFINITY));
  }
  std::mt19937 engine(11);
  for (int i = 0; i < 1000000; ++i) {
    check_float(format, values, pycore::float_from_bits(static_cast<uint32_t>(engine())));
  }
}

// Everything above once more as bits: all halves, and floats that become every kind of half.
using Convert = void (*)(std::vector<uint32_t>* floats, std::vector<uint16_t>* halves, const std::vector<float>& given);

template <float (*to_float)(uint16_t), uint16_t (*from_float)(float)>
void plainly(std::vector<uint32_t>* floats, std::vector<uint16_t>* halves, const std::vector<float>& given) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    floats->push_back(pycore::bits_of_float(to_float(static_cast<uint16_t>(bits))));
  }
  for (const float x : given) halves->push_back(from_float(x));
}

__attribute__((target("avx,f16c"))) void instructions(std::vector<uint32_t>* floats, std::vector<uint16_t>* halves,
                                                      const std::vector<float>& given) {
  alignas(32) uint16_t half[8];
  alignas(32) float wide[8];
  for (uint32_t bits = 0; bits < 0x10000; bits += 8) {
    for (uint32_t i = 0; i < 8; ++i) half[i] = static_cast<uint16_t>(bits + i);
    _mm256_store_ps(wide, _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(half))));
    for (const float x : wide) floats->push_back(pycore::bits_of_float(x));
  }
  for (size_t i = 0; i + 8 <= given.size(); i += 8) {
    const __m256 x = _mm256_loadu_ps(given.data() + i);
    _mm_store_si128(reinterpret_cast<__m128i*>(half),
                    _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    halves->insert(halves->end(), half, half + 8);
  }
}

void check_environments(const char* name, Convert convert) {
  std::mt19937 engine(12);
  std::vector<float> given(1 << 20);
  for (float& x : given) {
    const uint32_t bits = static_cast<uint32_t>(engine());
    // Of every third the exponent is one whose halves are subnormal or nearly so, or the float is.
    const uint32_t exponent = engine() % 3 ? bits >> 23 & 0xff : 98 + engine() % 20;
    x = pycore::float_from_bits((bits & 0x807fffff) | (engine() % 16 ? exponent << 23 : 0));
  }
  std::vector<uint32_t> floats;
  std::vector<uint16_t> halves;
  convert(&floats, &halves, given);
  const unsigned before = _mm_getcsr();
  for (const unsigned mode : {0x9fc0u, 0x3f80u, 0x5f80u, 0x7f80u, 0xffc0u}) {  // flush, three roundings, both
    std::vector<uint32_t> other_floats;
    std::vector<uint16_t> other_halves;
    _mm_setcsr(mode);
    convert(&other_floats, &other_halves, given);
    _mm_setcsr(before);
    if (other_floats == floats && other_halves == halves) continue;
    std::fprintf(stderr, "failed: %s depends on the environment %x\n", name, mode);
    std::exit(1);
  }
}

// What a kernel runs in, and what its caller gets back.
void check_fixed() {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0xffc4);
  {
    const pycore::FixedFloats fixed;
    if (_mm_getcsr() != 0x1f80) std::exit(1);
    volatile float third = 1.0f;
    third = third / 3.0f;  // raises a flag
  }
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  if (after == 0xffc4) return;
  std::fprintf(stderr, "failed: the caller gets %x back\n", after);
  std::exit(1);
}

}  // namespace

int main() {
  check_fixed();
  check_environments("float16", plainly<pycore::float_from_float16, pycore::float16_from_float>);
  check_environments("bfloat16", plainly<pycore::float_from_bfloat16, pycore::bfloat16_from_float>);
  if (__builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c")) check_environments("F16C", instructions);
  check({"float16", 10, 15, pycore::float_from_float16, pycore::float16_from_float});
  check({"bfloat16", 7, 127, pycore::float_from_bfloat16, pycore::bfloat16_from_float});
  std::printf("all halves, all ties, a million floats\n");
  return 0;
}
