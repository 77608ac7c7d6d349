// SPDX-License-Identifier: Apache-2.0
// The functions of coder_scalar.h on AVX-512, with the same results; masks take the ends of rows. Included inside the
// anonymous namespace of a target region.

inline __mmask32 first32(int64_t count) { return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1; }
inline __mmask16 first16(int64_t count) {
  return count >= 16 ? static_cast<__mmask16>(~0) : static_cast<__mmask16>((1 << count) - 1);
}

inline bool rising(const uint16_t* row, int64_t entries) {
  __mmask32 falls = 0;
  for (int64_t i = 1; i < entries; i += 32) {
    const __mmask32 mask = first32(entries - i);
    const __m512i before = _mm512_maskz_loadu_epi16(mask, row + i - 1), here = _mm512_maskz_loadu_epi16(mask, row + i);
    falls |= _mm512_cmplt_epu16_mask(here, before);
  }
  return falls == 0;
}

inline bool rising(const int32_t* row, int64_t entries) {
  __mmask16 falls = 0;
  for (int64_t i = 1; i < entries; i += 16) {
    const __mmask16 mask = first16(entries - i);
    const __m512i before = _mm512_maskz_loadu_epi32(mask, row + i - 1), here = _mm512_maskz_loadu_epi32(mask, row + i);
    falls |= _mm512_cmplt_epi32_mask(here, before);
  }
  return falls == 0;
}

inline int64_t count_at_most(const uint16_t* entries, int64_t count, uint32_t value) {
  const __m512i wanted = _mm512_set1_epi16(static_cast<int16_t>(value));
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 mask = first32(count - i);
    const __m512i x = _mm512_maskz_loadu_epi16(mask, entries + i);
    found += __builtin_popcount(_mm512_mask_cmple_epu16_mask(mask, x, wanted));
  }
  return found;
}

inline int64_t count_at_most(const int32_t* entries, int64_t count, uint32_t value) {
  const __m512i wanted = _mm512_set1_epi32(static_cast<int32_t>(value));
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first16(count - i);
    const __m512i x = _mm512_maskz_loadu_epi32(mask, entries + i);
    found += __builtin_popcount(_mm512_mask_cmple_epi32_mask(mask, x, wanted));
  }
  return found;
}

inline bool logit_points(const float* logits, int64_t count, int32_t* points, int32_t* highest) {
  const __m512 scale = _mm512_set1_ps(kLogitScale), bound = _mm512_set1_ps(kLogitBound);
  const __m512 low = _mm512_set1_ps(-kLogitBound), infinity = _mm512_set1_ps(__builtin_inff());
  __m512i most = _mm512_set1_epi32(-kLogitBound);
  __mmask16 bad = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first16(count - i);
    const __m512 x = _mm512_mask_loadu_ps(low, mask, logits + i);
    bad |= _mm512_cmp_ps_mask(x, infinity, _CMP_NLT_UQ);
    const __m512i point = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(x, scale), low), bound));
    most = _mm512_max_epi32(most, point);
    _mm512_mask_storeu_epi32(points + i, mask, point);
  }
  *highest = _mm512_reduce_max_epi32(most);
  return bad == 0;
}

inline __m512i add_wide(__m512i sums, __m512i x) {
  const __m512i low = _mm512_and_si512(x, _mm512_set1_epi64(0xffffffff)), high = _mm512_srli_epi64(x, 32);
  return _mm512_add_epi64(_mm512_add_epi64(sums, low), high);
}

inline uint64_t logit_counts(uint32_t* points, int64_t count, int32_t highest) {
  uint32_t table[16];
  for (int f = 0; f < 16; ++f) table[f] = logit_power(f);
  const __m512i powers = _mm512_loadu_si512(table), top = _mm512_set1_epi32(highest);
  __m512i sums = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first16(count - i);
    const __m512i distance = _mm512_sub_epi32(top, _mm512_maskz_loadu_epi32(mask, points + i));
    const __m512i power = _mm512_permutexvar_epi32(distance, powers);  // looks at the low four bits
    const __m512i value = _mm512_maskz_srlv_epi32(mask, power, _mm512_srli_epi32(distance, 4));
    _mm512_mask_storeu_epi32(points + i, mask, value);
    sums = add_wide(sums, value);
  }
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(sums));
}

inline uint64_t sum_of(const uint32_t* counts, int64_t count) {
  __m512i sums = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    sums = add_wide(sums, _mm512_maskz_loadu_epi32(first16(count - i), counts + i));
  }
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(sums));
}
