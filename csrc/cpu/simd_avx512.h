// SPDX-License-Identifier: Apache-2.0
// Vec: sixteen float32 lanes on AVX-512 F/DQ/BW/VL. The interface of simd_avx2.h; include it the same way.

#define PYCORE_INLINE inline __attribute__((always_inline))

struct Vec {
  static constexpr int kWidth = 16;
#ifdef PYCORE_BFLOAT16_PRODUCTS
  static constexpr bool kMultipliesPairs = true;
  // A lane of a and b holds two bfloat16, the first in its high half: c + a.first b.first, then + a.second b.second,
  // each rounded once, subnormal numbers as zero: two FMAs under FlushedFloats.
  static PYCORE_INLINE Vec fma_pairs(Vec a, Vec b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
  }
  // The halves of every lane exchanged.
  PYCORE_INLINE Vec turned() const { return {_mm512_castsi512_ps(_mm512_rol_epi32(_mm512_castps_si512(v), 16))}; }
  // Of two vectors of bfloat16 in float32.
  static PYCORE_INLINE Vec pairs(Vec first, Vec second) {
    return {_mm512_castsi512_ps(
        _mm512_or_si512(_mm512_castps_si512(first.v), _mm512_srli_epi32(_mm512_castps_si512(second.v), 16)))};
  }
#else
  static constexpr bool kMultipliesPairs = false;
#endif
  static constexpr int kProductColumns = 4;  // vectors per tile-product block: 6 x 4 accumulators of 32 registers
  __m512 v;

  static PYCORE_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static PYCORE_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static PYCORE_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  PYCORE_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }

  // The first `count` lanes, 0 <= count <= 16; the others are zero and their memory is not touched.
  static PYCORE_INLINE __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
  static PYCORE_INLINE Vec load_first(const float* p, int64_t count) {
    return {_mm512_maskz_loadu_ps(first(count), p)};
  }
  PYCORE_INLINE void store_first(float* p, int64_t count) const { _mm512_mask_storeu_ps(p, first(count), v); }

  static PYCORE_INLINE Vec load_float16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static PYCORE_INLINE Vec load_bfloat16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  // Bytes as numbers.
  static PYCORE_INLINE Vec load_bytes(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  PYCORE_INLINE void store_float16(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  // Rounds to nearest, ties to even; NaN stays NaN: bfloat16_from_float of include/pycore/dtype.h.
  PYCORE_INLINE void store_bfloat16(uint16_t* p) const {
    const __m512i bits = _mm512_castps_si512(v),
                  odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i chosen = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
  }

  // A lane holds two numbers of 16 bits, the first in its low half: the sixteen first ones, or the sixteen second, as
  // float32.
  PYCORE_INLINE Vec low_bfloat16() const {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 16))};
  }
  PYCORE_INLINE Vec high_bfloat16() const {
    return {_mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  // Sixteen lanes of two numbers of 16 bits become all first ones and all second ones.
  PYCORE_INLINE Vec parted() const {
    const __m512i places = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24,
                                            22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(places, _mm512_castps_si512(v)))};
  }
  // Two vectors, one the lanes at even places of 32 numbers and one those at odd places, become the first sixteen and
  // the last; and back.
  static PYCORE_INLINE void interleave(Vec* a, Vec* b) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i last = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const __m512 x = _mm512_permutex2var_ps(a->v, first, b->v);
    b->v = _mm512_permutex2var_ps(a->v, last, b->v);
    a->v = x;
  }
  static PYCORE_INLINE void deinterleave(Vec* a, Vec* b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m512 x = _mm512_permutex2var_ps(a->v, even, b->v);
    b->v = _mm512_permutex2var_ps(a->v, odd, b->v);
    a->v = x;
  }
  // The vector is 32 of float16: its first or its last sixteen as float32.
  PYCORE_INLINE Vec first_float16() const { return {_mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_castps_si512(v)))}; }
  PYCORE_INLINE Vec last_float16() const {
    return {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(v), 1))};
  }

  friend PYCORE_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend PYCORE_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend PYCORE_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static PYCORE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a b + c
  static PYCORE_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
  friend PYCORE_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  static PYCORE_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }

  // Lane i is this lane if bit i of `bits` is set, else `other`'s.
  PYCORE_INLINE Vec select(uint64_t bits, Vec other) const {
    return {_mm512_mask_mov_ps(other.v, static_cast<__mmask16>(bits), v)};
  }

  // Bit i is set if lane i is below that of `limit`.
  PYCORE_INLINE uint64_t below(Vec limit) const { return _mm512_cmp_ps_mask(v, limit.v, _CMP_LT_OQ); }

  // 2^x for x <= 127; exactly zero below -125. The polynomial is within 1 ulp on [-1/2, 1/2].
  PYCORE_INLINE Vec exp2() const {
    const __m512 n = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(v, n);
    __m512 y = _mm512_set1_ps(1.5353362e-4f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.3398874e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6184373e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5503324e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022648e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314720e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);  // true for NaN
    return {_mm512_maskz_scalef_ps(above, y, n)};
  }

  PYCORE_INLINE float reduce_max() const { return _mm512_reduce_max_ps(v); }
  // Written out: a fixed tree, not the compiler's choice.
  PYCORE_INLINE float reduce_add() const {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
};

// rows[i] (lane j) becomes column: rows[j] (lane i).
PYCORE_INLINE void transpose(Vec (&rows)[Vec::kWidth]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
    a[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
  }
  // b[4g + c]: column c of each 128-bit lane, rows 4g .. 4g+3.
  for (int g = 0; g < 4; ++g) {
    b[4 * g] = _mm512_shuffle_ps(a[4 * g], a[4 * g + 2], 0x44);
    b[4 * g + 1] = _mm512_shuffle_ps(a[4 * g], a[4 * g + 2], 0xee);
    b[4 * g + 2] = _mm512_shuffle_ps(a[4 * g + 1], a[4 * g + 3], 0x44);
    b[4 * g + 3] = _mm512_shuffle_ps(a[4 * g + 1], a[4 * g + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even_lo = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);       // lanes 0, 2 of rows 0-3 and 4-7
    const __m512 odd_lo = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);        // lanes 1, 3
    const __m512 even_hi = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);  // the same of rows 8-15
    const __m512 odd_hi = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    rows[c].v = _mm512_shuffle_f32x4(even_lo, even_hi, 0x88);
    rows[8 + c].v = _mm512_shuffle_f32x4(even_lo, even_hi, 0xdd);
    rows[4 + c].v = _mm512_shuffle_f32x4(odd_lo, odd_hi, 0x88);
    rows[12 + c].v = _mm512_shuffle_f32x4(odd_lo, odd_hi, 0xdd);
  }
}
