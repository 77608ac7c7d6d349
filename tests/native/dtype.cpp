// SPDX-License-Identifier: Apache-2.0
// float16 and bfloat16 by their definition, without the bit tricks of dtype.h: a half is sign * mantissa * 2^exponent,
// and a float becomes the nearest one, the even one of two. All halves, all ties and their neighbours, random floats.
#include <pycore/dtype.h>

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

}  // namespace

int main() {
  check({"float16", 10, 15, pycore::float_from_float16, pycore::float16_from_float});
  check({"bfloat16", 7, 127, pycore::float_from_bfloat16, pycore::bfloat16_from_float});
  std::printf("all halves, all ties, a million floats\n");
  return 0;
}
