// SPDX-License-Identifier: Apache-2.0
// Functions of float64 numbers with the same bits on every machine and device: operations that IEEE 754 rounds in one
// way only, in one order. The C library's differ from version to version, and from processor to processor.
#pragma once

#include <pycore/key_tile.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pycore {

// The natural logarithm of a positive, normal x, within two units in the last place: x = 2^e m with m in
// [sqrt 1/2, sqrt 2], and log m = 2 (s + s^3 / 3 + s^5 / 5 + ...) for s = (m - 1) / (m + 1), |s| < 0.1716.
PYCORE_HOST_DEVICE inline double portable_log(double x) {
  uint64_t word;
  memcpy(&word, &x, sizeof(word));
  // The exponent of x / sqrt(1/2), rounded down: 0x3FE6A09E667F3BCD is sqrt(1/2).
  const int64_t e = static_cast<int64_t>(word - 0x3FE6A09E667F3BCDu) >> 52;
  word -= static_cast<uint64_t>(e) << 52;
  double m;
  memcpy(&m, &word, sizeof(m));
  const double s = (m - 1) / (m + 1), z = s * s;
  double sum = 0;
  for (int n = 23; n >= 3; n -= 2) sum = (sum + 1.0 / n) * z;
  const double low = s * sum, scale = static_cast<double>(e);
  // log 2 in two parts, the first with zeros enough for an exact product.
  return scale * 0x1.62e42fefap-1 + (2 * s + (2 * low + scale * 0x1.cf79abc9e3b3ap-40));
}

// e^x within two units in the last place: 2^n e^r with n the whole number nearest to x / log 2, |r| < 0.3466, by the
// series of e^r. 0 below -745.2 and infinity above 709.8, as the C library's.
PYCORE_HOST_DEVICE inline double portable_exp(double x) {
  if (x != x) return x;
  if (x > 709.8) return HUGE_VAL;
  if (x < -745.2) return 0;
  // log 2 in two parts, the first with zeros enough for an exact product.
  const double n = floor(x * 1.4426950408889634 + 0.5);
  const double r = (x - n * 0x1.62e42fefap-1) - n * 0x1.cf79abc9e3b3ap-40;
  double sum = 1;
  for (int k = 14; k >= 1; --k) sum = 1 + sum * r / k;
  // In two steps: 2^n itself may not be a number.
  const int64_t whole = static_cast<int64_t>(n), half = whole / 2;
  const auto power = [](int64_t exponent) {
    const uint64_t word = static_cast<uint64_t>(exponent + 1023) << 52;
    double value;
    memcpy(&value, &word, sizeof(value));
    return value;
  };
  return sum * power(half) * power(whole - half);
}

struct CosSin {
  double cos, sin;
};

// Cosine and sine within two units in the last place of 1, for |x| < 2^29: x = n pi/2 + r, |r| <= pi/4, and the series
// of r. Larger x stay on the circle, but lose their place on it.
PYCORE_HOST_DEVICE inline CosSin portable_cos_sin(double x) {
  if (!(fabs(x) < 0x1p+1023)) return {x - x, x - x};
  const double n = floor(x * 0.6366197723675814 + 0.5);
  // pi / 2 in parts of 24 bits, whose products with n are exact.
  double r = x - n * 0x1.921fb4p+0;
  r = r - n * 0x1.4442dp-24;
  r = r - n * 0x1.846988p-48;
  r = r - n * 0x1.8cc51701b839ap-72;
  r = r > 0.8 ? 0.8 : r < -0.8 ? -0.8 : r;
  const double z = r * r;
  double odd = 0, even = 0;  // sin r / r and cos r, each less its first term
  for (int k = 18; k >= 2; k -= 2) {
    even = (even + 1) * z * (-1.0 / ((k - 1) * k));
    odd = (odd + 1) * z * (-1.0 / (k * (k + 1)));
  }
  const double sine = r + r * odd, cosine = 1 + even;
  const double quarter = n - 4 * floor(n * 0.25);  // 0, 1, 2 or 3
  if (quarter == 0) return {cosine, sine};
  if (quarter == 1) return {-sine, cosine};
  if (quarter == 2) return {-cosine, -sine};
  return {sine, -cosine};
}

}  // namespace pycore
