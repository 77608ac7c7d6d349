// SPDX-License-Identifier: Apache-2.0
// A context of the adaptive models is one vector of sixteen entries of 16 bits. For AVX2 and AVX-512. Included inside
// the anonymous namespace of a target region.

// The last entry that is at most `value` < 2^15.
inline int find_nibble(const uint16_t* entries, uint32_t value) {
  const __m256i row = _mm256_load_si256(reinterpret_cast<const __m256i*>(entries));
  const __m256i above = _mm256_cmpgt_epi16(row, _mm256_set1_epi16(static_cast<int16_t>(value)));
  return 15 - __builtin_popcount(static_cast<uint32_t>(_mm256_movemask_epi8(above))) / 2;
}

inline void move_entries(uint16_t* entries, int symbol, int rate) {
  const __m256i i = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m256i above = _mm256_cmpgt_epi16(i, _mm256_set1_epi16(static_cast<int16_t>(symbol)));
  const __m256i rest = _mm256_set1_epi16((1 << kAdaptivePrecision) - 16);
  const __m256i target = _mm256_add_epi16(i, _mm256_and_si256(above, rest));
  __m256i* place = reinterpret_cast<__m256i*>(entries);
  const __m256i row = _mm256_load_si256(place);
  const __m256i step = _mm256_sra_epi16(_mm256_sub_epi16(target, row), _mm_cvtsi32_si128(rate));
  _mm256_store_si256(place, _mm256_add_epi16(row, step));
}
