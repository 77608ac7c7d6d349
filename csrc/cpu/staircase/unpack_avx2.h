// SPDX-License-Identifier: Apache-2.0
// Sixty-four codes of one group as bytes, from the middle, on AVX2. A 32-bit shift moves bits from byte to byte, but
// none that a mask of the low ones keeps.

PYCORE_INLINE void unpack_codes(const uint8_t* const* planes, int64_t offset, int32_t depth, int8_t* codes) {
  const __m256i low = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2), high = _mm256_setr_epi32(4, 4, 4, 4, 6, 6, 6, 6);
  const __m256i two = _mm256_set1_epi8(3), four = _mm256_set1_epi8(15);
  const auto pairs = [&](int32_t k, __m256i shift) __attribute__((always_inline)) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(planes[k] + offset));
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_broadcastsi128_si256(bytes), shift), two);
  };
  __m256i first = pairs(0, low), second = pairs(0, high);
  if (depth >= 2) {
    first = _mm256_or_si256(_mm256_slli_epi32(first, 2), pairs(1, low));
    second = _mm256_or_si256(_mm256_slli_epi32(second, 2), pairs(1, high));
  }
  if (depth == 3) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes[2] + 2 * offset));
    first = _mm256_or_si256(_mm256_slli_epi32(first, 4), _mm256_and_si256(bytes, four));
    second = _mm256_or_si256(_mm256_slli_epi32(second, 4), _mm256_and_si256(_mm256_srli_epi32(bytes, 4), four));
  }
  const __m256i half = _mm256_set1_epi8(static_cast<char>(depth == 3 ? 128 : depth == 2 ? 8 : 2));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_sub_epi8(first, half));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 32), _mm256_sub_epi8(second, half));
}
