// SPDX-License-Identifier: Apache-2.0
// The functions of vectors_scalar.h on AVX-512, with the same results; masks take the ends of rows. Included inside the
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

constexpr int64_t kCountBlock = 64;

inline bool highest_logit(const float* logits, int64_t count, float* highest) {
  const __m512 infinity = _mm512_set1_ps(__builtin_inff()), lowest = _mm512_set1_ps(-__builtin_inff());
  __m512 most = lowest;
  __mmask16 bad = 0;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512 x = _mm512_loadu_ps(logits + i);
    bad |= _mm512_cmp_ps_mask(x, infinity, _CMP_NLT_UQ);
    most = _mm512_max_ps(most, x);
  }
  if (i < count) {
    const __m512 x = _mm512_mask_loadu_ps(lowest, first16(count - i), logits + i);
    bad |= _mm512_cmp_ps_mask(x, infinity, _CMP_NLT_UQ);
    most = _mm512_max_ps(most, x);
  }
  *highest = _mm512_reduce_max_ps(most);
  return bad == 0;
}

inline __m512i logit_powers() {
  alignas(64) uint32_t powers[16];
  for (int f = 0; f < 16; ++f) powers[f] = logit_power(f);
  return _mm512_load_si512(powers);
}

// logit_count(top - logit_point(x)) of sixteen logits.
inline __m512i sixteen_counts(__m512 x, __m512i top, __m512i powers) {
  const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(kLogitScale));
  const __m512 held = _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps(-kLogitBound)), _mm512_set1_ps(kLogitBound));
  const __m512i distance = _mm512_sub_epi32(top, _mm512_cvtps_epi32(held));
  const __m512i power = _mm512_permutexvar_epi32(distance, powers);  // looks at the low four bits
  return _mm512_srlv_epi32(power, _mm512_srli_epi32(distance, 4));   // 0 for shifts of 32 and more
}

inline uint64_t sum_lanes(__m512i sums) {  // of 32 bits
  const __m512i low = _mm512_and_si512(sums, _mm512_set1_epi64(0xffffffff));
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(low, _mm512_srli_epi64(sums, 32))));
}

// Lanes of 32 bits hold 255 counts of up to 2^24; 128 are added before they move on.
constexpr int64_t kLaneBlock = 128 * 16;

inline uint64_t logit_sums(const float* logits, int64_t count, int32_t highest, int64_t split, uint64_t* before) {
  const __m512i powers = logit_powers(), top = _mm512_set1_epi32(highest);
  uint64_t sum = 0, first = 0;
  for (int64_t i = 0; i < count;) {
    __m512i all = _mm512_setzero_si512(), part;
    const int64_t stop = count - i < kLaneBlock ? count : i + kLaneBlock;
    const int64_t whole = split / 16 * 16 < stop ? split / 16 * 16 : stop / 16 * 16;
    for (; i < whole; i += 16) all = _mm512_add_epi32(all, sixteen_counts(_mm512_loadu_ps(logits + i), top, powers));
    part = all;
    if (i < stop && i < split) {
      const __mmask16 mask = first16(stop - i);
      const __m512i x = sixteen_counts(_mm512_maskz_loadu_ps(mask, logits + i), top, powers);
      all = _mm512_mask_add_epi32(all, mask, all, x);
      part = _mm512_mask_add_epi32(part, first16(split - i) & mask, part, x);
      i += 16;
    }
    for (; i + 16 <= stop; i += 16) {
      all = _mm512_add_epi32(all, sixteen_counts(_mm512_loadu_ps(logits + i), top, powers));
    }
    if (i < stop) {
      const __mmask16 mask = first16(stop - i);
      all = _mm512_mask_add_epi32(all, mask, all, sixteen_counts(_mm512_maskz_loadu_ps(mask, logits + i), top, powers));
      i = stop;
    }
    sum += sum_lanes(all);
    first += sum_lanes(part);
  }
  *before = first;
  return sum;
}

inline uint64_t logit_counts(const float* logits, int64_t count, int32_t highest, uint32_t* counts, uint64_t* blocks) {
  const __m512i powers = logit_powers(), top = _mm512_set1_epi32(highest);
  uint64_t sum = 0;
  for (int64_t i = 0; i < count;) {
    const int64_t stop = count - i < kCountBlock ? count : i + kCountBlock;
    __m512i all = _mm512_setzero_si512();
    for (; i + 16 <= stop; i += 16) {
      const __m512i x = sixteen_counts(_mm512_loadu_ps(logits + i), top, powers);
      _mm512_storeu_si512(counts + i, x);
      all = _mm512_add_epi32(all, x);
    }
    if (i < stop) {
      const __mmask16 mask = first16(stop - i);
      const __m512i x = sixteen_counts(_mm512_maskz_loadu_ps(mask, logits + i), top, powers);
      _mm512_mask_storeu_epi32(counts + i, mask, x);
      all = _mm512_mask_add_epi32(all, mask, all, x);
      i = stop;
    }
    const uint64_t block = sum_lanes(all);
    *blocks++ = block;
    sum += block;
  }
  return sum;
}

inline uint64_t sum_of_sixteen(const uint32_t* counts) { return sum_lanes(_mm512_loadu_si512(counts)); }

// Where sixteen are written, no more than the i - 1 entries before have been: within `count`.
inline int64_t* put_tokens(const uint32_t* walked, int64_t count, int64_t* out) {
  const __m512i one = _mm512_set1_epi32(1), mask = _mm512_set1_epi32(static_cast<int32_t>(kTokenMask));
  int64_t i = 1;
  for (; i + 16 <= count; i += 16) {
    const __mmask16 starts = _mm512_test_epi32_mask(_mm512_loadu_si512(walked + i), one);
    const __m512i ended = _mm512_and_si512(_mm512_srli_epi32(_mm512_loadu_si512(walked + i - 1), 1), mask);
    const __m512i tokens = _mm512_maskz_compress_epi32(starts, ended);
    const int number = __builtin_popcount(starts);
    _mm512_storeu_si512(out, _mm512_cvtepu32_epi64(_mm512_castsi512_si256(tokens)));
    if (__builtin_expect(number > 8, 0)) {
      _mm512_storeu_si512(out + 8, _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(tokens, 1)));
    }
    out += number;
  }
  for (; i < count; ++i) {
    *out = static_cast<int64_t>(walked[i - 1] >> 1 & kTokenMask);
    out += walked[i] & 1;
  }
  return out;
}
