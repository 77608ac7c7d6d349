// SPDX-License-Identifier: Apache-2.0
// float16 and bfloat16 as bits, in plain integer arithmetic: what the scalar kernels use and the faster ones agree
// with.
#pragma once

#include <pycore/tensor_view.h>

#include <cstdint>
#include <cstring>

namespace pycore {

[[gnu::always_inline]] inline int64_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
    case DType::kUInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32:
    case DType::kUInt32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kInt16:
    case DType::kUInt16: return 2;
    default: return 1;
  }
}

[[gnu::always_inline]] inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

[[gnu::always_inline]] inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

[[gnu::always_inline]] inline float float_from_bfloat16(uint16_t bits) {
  return float_from_bits(static_cast<uint32_t>(bits) << 16);
}

// To nearest, ties to even; NaN stays NaN.
[[gnu::always_inline]] inline uint16_t bfloat16_from_float(float x) {
  const uint32_t bits = bits_of_float(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

[[gnu::always_inline]] inline float float_from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return float_from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // A subnormal half is an integer times 2^-24. Neither it nor the product is a subnormal float, and both are exact: no
  // floating-point environment changes them.
  const uint32_t small = bits_of_float(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);
  return float_from_bits(sign | (rest < 0x400 ? small : (rest << 13) + (112u << 23)));
}

// To nearest, ties to even; NaN stays NaN.
[[gnu::always_inline]] inline uint16_t float16_from_float(float x) {
  const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds past the largest, 65504
  if (magnitude < 0x38800000) {
    // Subnormal: a multiple of 2^-24, by integers, which no floating-point environment rounds otherwise.
    const uint32_t exponent = magnitude >> 23, significand = (magnitude & 0x7fffff) | 0x800000;
    if (exponent < 102) return sign;  // below half of the least one
    const uint32_t shift = 126 - exponent, half = 1u << (shift - 1);
    return sign | static_cast<uint16_t>((significand + half - 1 + (significand >> shift & 1)) >> shift);
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

}  // namespace pycore
