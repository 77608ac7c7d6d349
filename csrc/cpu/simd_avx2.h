// SPDX-License-Identifier: Apache-2.0
// Vec: eight float32 lanes on AVX2 + FMA. Include inside a target region and an anonymous namespace (see
// cpu/linear/avx2.cpp); simd_avx512.h is the same interface with sixteen lanes.

#define PYCORE_INLINE inline __attribute__((always_inline))

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr bool kMultipliesPairs = false;  // of bfloat16
  static constexpr int kProductColumns = 2;        // vectors per tile-product block: 6 x 2 accumulators of 16 registers
  __m256 v;

  static PYCORE_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static PYCORE_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static PYCORE_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  PYCORE_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }

  // The first `count` lanes, 0 <= count <= 8; the others are zero and their memory is not touched.
  static PYCORE_INLINE __m256i first(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static PYCORE_INLINE Vec load_first(const float* p, int64_t count) { return {_mm256_maskload_ps(p, first(count))}; }
  PYCORE_INLINE void store_first(float* p, int64_t count) const { _mm256_maskstore_ps(p, first(count), v); }

  static PYCORE_INLINE Vec load_float16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static PYCORE_INLINE Vec load_bfloat16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  // Bytes as numbers.
  static PYCORE_INLINE Vec load_bytes(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  PYCORE_INLINE void store_float16(uint16_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  // Rounds to nearest, ties to even; NaN stays NaN: bfloat16_from_float of include/pycore/dtype.h.
  PYCORE_INLINE void store_bfloat16(uint16_t* p) const {
    const __m256i bits = _mm256_castps_si256(v),
                  odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i high = _mm256_srli_epi32(
        _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan)), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  // A lane holds two numbers of 16 bits, the first in its low half: the eight first ones, or the eight second, as
  // float32.
  PYCORE_INLINE Vec low_bfloat16() const {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 16))};
  }
  PYCORE_INLINE Vec high_bfloat16() const {
    return {_mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  // Eight lanes of two numbers of 16 bits become all first ones and all second ones.
  PYCORE_INLINE Vec parted() const {
    const __m256i places =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    const __m256i within = _mm256_shuffle_epi8(_mm256_castps_si256(v), places);
    return {_mm256_castsi256_ps(_mm256_permute4x64_epi64(within, 0xd8))};
  }
  // Two vectors, one the lanes at even places of 16 numbers and one those at odd places, become the first eight and the
  // last; and back.
  static PYCORE_INLINE void interleave(Vec* a, Vec* b) {
    const __m256 lo = _mm256_unpacklo_ps(a->v, b->v), hi = _mm256_unpackhi_ps(a->v, b->v);
    a->v = _mm256_permute2f128_ps(lo, hi, 0x20);
    b->v = _mm256_permute2f128_ps(lo, hi, 0x31);
  }
  static PYCORE_INLINE void deinterleave(Vec* a, Vec* b) {
    const __m256 lo = _mm256_permute2f128_ps(a->v, b->v, 0x20), hi = _mm256_permute2f128_ps(a->v, b->v, 0x31);
    a->v = _mm256_shuffle_ps(lo, hi, 0x88);
    b->v = _mm256_shuffle_ps(lo, hi, 0xdd);
  }
  // The vector is 16 of float16: its first or its last eight as float32.
  PYCORE_INLINE Vec first_float16() const { return {_mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_castps_si256(v)))}; }
  PYCORE_INLINE Vec last_float16() const {
    return {_mm256_cvtph_ps(_mm256_extracti128_si256(_mm256_castps_si256(v), 1))};
  }

  friend PYCORE_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend PYCORE_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend PYCORE_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static PYCORE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }    // a b + c
  static PYCORE_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
  friend PYCORE_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  static PYCORE_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }

  // Lane i is this lane if bit i of `bits` is set, else `other`'s.
  PYCORE_INLINE Vec select(uint64_t bits, Vec other) const {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits & 0xff)), lane);
    return {_mm256_blendv_ps(other.v, v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)))};
  }

  // Bit i is set if lane i is below that of `limit`.
  PYCORE_INLINE uint64_t below(Vec limit) const {
    return static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, limit.v, _CMP_LT_OQ)));
  }

  // 2^x for x <= 127; exactly zero below -125. The polynomial is within 1 ulp on [-1/2, 1/2].
  PYCORE_INLINE Vec exp2() const {
    const __m256 n = _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(v, n);
    __m256 y = _mm256_set1_ps(1.5353362e-4f);
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(1.3398874e-3f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(9.6184373e-3f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(5.5503324e-2f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(2.4022648e-1f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(6.9314720e-1f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(1.0f));
    const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(y), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
    const __m256 above = _mm256_cmp_ps(v, _mm256_set1_ps(-125.0f), _CMP_NLT_UQ);  // true for NaN, which stays NaN
    return {_mm256_and_ps(_mm256_castsi256_ps(scaled), above)};
  }

  PYCORE_INLINE float reduce_max() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  PYCORE_INLINE float reduce_add() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
};

// rows[i] (lane j) becomes column: rows[j] (lane i).
PYCORE_INLINE void transpose(Vec (&rows)[Vec::kWidth]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
    a[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
  }
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
