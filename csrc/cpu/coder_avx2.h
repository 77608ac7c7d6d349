// SPDX-License-Identifier: Apache-2.0
// The functions of coder_scalar.h on AVX2, with the same results. Included inside the anonymous namespace of a target
// region.

inline __m256i load256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// row[i - 1] > row[i] is a saturated difference above zero (uint16), or a comparison (int32).
inline bool rising(const uint16_t* row, int64_t entries) {
  __m256i falls = _mm256_setzero_si256();
  int64_t i = 1;
  for (; i + 16 <= entries; i += 16) {
    falls = _mm256_or_si256(falls, _mm256_subs_epu16(load256(row + i - 1), load256(row + i)));
  }
  bool fell = !_mm256_testz_si256(falls, falls);
  for (; i < entries; ++i) fell |= row[i] < row[i - 1];
  return !fell;
}

inline bool rising(const int32_t* row, int64_t entries) {
  __m256i falls = _mm256_setzero_si256();
  int64_t i = 1;
  for (; i + 8 <= entries; i += 8) {
    falls = _mm256_or_si256(falls, _mm256_cmpgt_epi32(load256(row + i - 1), load256(row + i)));
  }
  bool fell = !_mm256_testz_si256(falls, falls);
  for (; i < entries; ++i) fell |= row[i] < row[i - 1];
  return !fell;
}

// Lanes count down from zero; at most 128 entries come here, so 16 bits do.
inline int64_t count_at_most(const uint16_t* entries, int64_t count, uint32_t value) {
  const __m256i wanted = _mm256_set1_epi16(static_cast<int16_t>(value));
  __m256i found = _mm256_setzero_si256();
  int64_t i = 0, rest = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i x = load256(entries + i);
    found = _mm256_sub_epi16(found, _mm256_cmpeq_epi16(_mm256_min_epu16(x, wanted), x));
  }
  for (; i < count; ++i) rest += entries[i] <= value;
  const __m256i pairs = _mm256_madd_epi16(found, _mm256_set1_epi16(1));
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
  return rest + _mm_cvtsi128_si32(sum);
}

inline int64_t count_at_most(const int32_t* entries, int64_t count, uint32_t value) {
  const __m256i limit = _mm256_set1_epi32(static_cast<int32_t>(value) + 1);
  __m256i found = _mm256_setzero_si256();
  int64_t i = 0, rest = 0;
  for (; i + 8 <= count; i += 8) found = _mm256_sub_epi32(found, _mm256_cmpgt_epi32(limit, load256(entries + i)));
  for (; i < count; ++i) rest += static_cast<uint32_t>(entries[i]) <= value;
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
  return rest + _mm_cvtsi128_si32(sum);
}

inline bool logit_points(const float* logits, int64_t count, int32_t* points, int32_t* highest) {
  const __m256 scale = _mm256_set1_ps(kLogitScale), bound = _mm256_set1_ps(kLogitBound);
  const __m256 low = _mm256_set1_ps(-kLogitBound), infinity = _mm256_set1_ps(__builtin_inff());
  __m256i most = _mm256_set1_epi32(-kLogitBound), good = _mm256_set1_epi32(-1);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 x = _mm256_loadu_ps(logits + i);
    good = _mm256_and_si256(good, _mm256_castps_si256(_mm256_cmp_ps(x, infinity, _CMP_LT_OQ)));
    const __m256 y = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(x, scale), low), bound);
    const __m256i point = _mm256_cvtps_epi32(y);
    most = _mm256_max_epi32(most, point);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(points + i), point);
  }
  __m128i top = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1));
  int32_t best = _mm_cvtsi128_si32(top);
  bool fine = _mm256_movemask_epi8(good) == -1;
  for (; i < count; ++i) {
    fine &= logits[i] < __builtin_inff();
    points[i] = logit_point(logits[i]);
    best = points[i] > best ? points[i] : best;
  }
  *highest = best;
  return fine;
}

inline uint64_t sum_lanes(__m256i low, __m256i high) {
  const __m256i both = _mm256_add_epi64(low, high);
  const __m128i sum = _mm_add_epi64(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(sum)) + static_cast<uint64_t>(_mm_extract_epi64(sum, 1));
}

inline uint64_t logit_counts(uint32_t* points, int64_t count, int32_t highest) {
  alignas(32) uint32_t powers[16];
  for (int f = 0; f < 16; ++f) powers[f] = logit_power(f);
  const __m256i few = load256(powers), many = load256(powers + 8), zero = _mm256_setzero_si256();
  const __m256i top = _mm256_set1_epi32(highest);
  __m256i low = zero, high = zero;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i distance = _mm256_sub_epi32(top, load256(points + i));
    const __m256i first = _mm256_permutevar8x32_epi32(few, distance),
                  second = _mm256_permutevar8x32_epi32(many, distance);
    const __m256i upper = _mm256_slli_epi32(distance, 28);  // bit 3 of the index becomes the sign
    const __m256i power = _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(first), _mm256_castsi256_ps(second), _mm256_castsi256_ps(upper)));
    const __m256i value = _mm256_srlv_epi32(power, _mm256_srli_epi32(distance, 4));  // 0 for shifts of 32 and more
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(points + i), value);
    low = _mm256_add_epi64(low, _mm256_unpacklo_epi32(value, zero));
    high = _mm256_add_epi64(high, _mm256_unpackhi_epi32(value, zero));
  }
  uint64_t sum = sum_lanes(low, high);
  for (; i < count; ++i) sum += points[i] = logit_count(highest - static_cast<int32_t>(points[i]));
  return sum;
}

inline uint64_t sum_of(const uint32_t* counts, int64_t count) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i low = zero, high = zero;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i x = load256(counts + i);
    low = _mm256_add_epi64(low, _mm256_unpacklo_epi32(x, zero));
    high = _mm256_add_epi64(high, _mm256_unpackhi_epi32(x, zero));
  }
  uint64_t sum = sum_lanes(low, high);
  for (; i < count; ++i) sum += counts[i];
  return sum;
}
