// SPDX-License-Identifier: Apache-2.0
// unpack_codes of unpack_avx2.h on AVX-512.

PYCORE_INLINE void unpack_codes(const uint8_t* const* planes, int64_t offset, int32_t depth, int8_t* codes) {
  const __m512i pair_shift = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
  const __m512i half_shift = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
  const auto pairs = [&](int32_t k) __attribute__((always_inline)) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[k] + offset));
    return _mm512_and_si512(_mm512_srlv_epi32(_mm512_broadcast_i32x4(bytes), pair_shift), _mm512_set1_epi8(3));
  };
  __m512i code = pairs(0);
  if (depth >= 2) code = _mm512_or_si512(_mm512_slli_epi32(code, 2), pairs(1));
  if (depth == 3) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes[2] + 2 * offset));
    const __m512i both = _mm512_srlv_epi32(_mm512_broadcast_i64x4(bytes), half_shift);
    code = _mm512_or_si512(_mm512_slli_epi32(code, 4), _mm512_and_si512(both, _mm512_set1_epi8(15)));
  }
  const __m512i half = _mm512_set1_epi8(static_cast<char>(depth == 3 ? 128 : depth == 2 ? 8 : 2));
  _mm512_storeu_si512(codes, _mm512_sub_epi8(code, half));
}
