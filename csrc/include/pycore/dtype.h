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
  // Shifted into place the exponent is 112 too small; a product with 2^112 mends it, subnormals included.
  return float_from_bits(sign | bits_of_float(float_from_bits(rest << 13) * float_from_bits(0x77800000)));
}

// To nearest, ties to even; NaN stays NaN.
[[gnu::always_inline]] inline uint16_t float16_from_float(float x) {
  const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds past the largest, 65504
  if (magnitude < 0x38800000) {
    // Subnormal: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits.
    return sign | static_cast<uint16_t>(bits_of_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

}  // namespace pycore
