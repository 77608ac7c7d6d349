// SPDX-License-Identifier: Apache-2.0
// Vec: one lane in plain C++, the interface of simd_avx2.h and its bits, for functions that are one formula everywhere:
// element by element, so that nothing but each step's rounding counts. std::fma rounds once, with FMA hardware or not.

#define PYCORE_INLINE inline __attribute__((always_inline))

struct Vec {
  static constexpr int kWidth = 1;
  static constexpr bool kMultipliesPairs = false;  // of bfloat16
  static constexpr int kProductColumns = 1;
  float v;

  static Vec zero() { return {0.0f}; }
  static Vec broadcast(float x) { return {x}; }
  static Vec load(const float* p) { return {*p}; }
  void store(float* p) const { *p = v; }
  static Vec load_first(const float* p, int64_t count) { return {count > 0 ? *p : 0.0f}; }
  void store_first(float* p, int64_t count) const {
    if (count > 0) *p = v;
  }

  static Vec load_float16(const uint16_t* p) { return {float_from_float16(*p)}; }
  static Vec load_bfloat16(const uint16_t* p) { return {float_from_bfloat16(*p)}; }
  void store_float16(uint16_t* p) const { *p = float16_from_float(v); }
  void store_bfloat16(uint16_t* p) const { *p = bfloat16_from_float(v); }

  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {std::fma(a.v, b.v, c.v)}; }    // a b + c
  static Vec fnma(Vec a, Vec b, Vec c) { return {std::fma(-a.v, b.v, c.v)}; }  // c - a b
  static Vec max(Vec a, Vec b) { return a.v > b.v ? a : b; }                   // b where either is NaN

  Vec select(uint64_t bits, Vec other) const { return bits & 1 ? *this : other; }
  uint64_t below(Vec limit) const { return v < limit.v; }

  // 2^x for x <= 127; exactly zero below -125. The polynomial is within 1 ulp on [-1/2, 1/2].
  Vec exp2() const {
    if (v != v) return *this;
    if (v < -125.0f) return zero();
    const float n = std::nearbyint(v), f = v - n;
    float y = 1.5353362e-4f;
    for (const float c : {1.3398874e-3f, 9.6184373e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.9314720e-1f, 1.0f}) {
      y = std::fma(y, f, c);
    }
    return {float_from_bits(bits_of_float(y) + (static_cast<uint32_t>(static_cast<int32_t>(n)) << 23))};
  }

  float reduce_max() const { return v; }
  float reduce_add() const { return v; }
};

PYCORE_INLINE void transpose(Vec (&)[Vec::kWidth]) {}
