// SPDX-License-Identifier: Apache-2.0
// The functions of vectors_scalar.h on AVX2, with the same results. Included inside the anonymous namespace of a target
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

// Lanes count down from zero; at most 512 entries come here, so 16 bits do.
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

constexpr int64_t kCountBlock = 64;

// False if something is NaN or +inf. One comparison looks for NaN in two vectors; +inf would be the highest.
inline bool highest_logit(const float* logits, int64_t count, float* highest) {
  __m256 most[4], nan = _mm256_setzero_ps();
  for (__m256& x : most) x = _mm256_set1_ps(-__builtin_inff());
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m256 x[4];
    for (int k = 0; k < 4; ++k) x[k] = _mm256_loadu_ps(logits + i + 8 * k);
    for (int k = 0; k < 4; k += 2) nan = _mm256_or_ps(nan, _mm256_cmp_ps(x[k], x[k + 1], _CMP_UNORD_Q));
    for (int k = 0; k < 4; ++k) most[k] = _mm256_max_ps(most[k], x[k]);
  }
  for (; i + 8 <= count; i += 8) {
    const __m256 x = _mm256_loadu_ps(logits + i);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    most[0] = _mm256_max_ps(most[0], x);
  }
  const __m256 all = _mm256_max_ps(_mm256_max_ps(most[0], most[1]), _mm256_max_ps(most[2], most[3]));
  __m128 top = _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  top = _mm_max_ss(top, _mm_shuffle_ps(top, top, 1));
  float best = _mm_cvtss_f32(top);
  bool fine = _mm256_movemask_ps(nan) == 0;
  for (; i < count; ++i) {
    fine &= logits[i] == logits[i];
    best = logits[i] > best ? logits[i] : best;
  }
  *highest = best;
  return fine && best < __builtin_inff();
}

struct Powers {
  __m256i few, many;
};

inline Powers logit_powers() {
  alignas(32) uint32_t powers[16];
  for (int f = 0; f < 16; ++f) powers[f] = logit_power(f);
  return {load256(powers), load256(powers + 8)};
}

// Whether, for this highest point, holding the others at the grid's bounds can change a count: none lies above it, and
// what lies 25 octaves below has no count.
inline bool bounds_matter(int32_t highest) { return highest >= kLogitBound || highest < 25 * 16 - kLogitBound; }

// The counts of eight logits: logit_count(top - logit_point(x)). kHeld: bounds_matter(top).
template <bool kHeld>
inline __m256i eight_counts(const float* logits, __m256i top, const Powers& powers) {
  __m256 y = _mm256_mul_ps(_mm256_loadu_ps(logits), _mm256_set1_ps(kLogitScale));
  if (kHeld) y = _mm256_min_ps(_mm256_max_ps(y, _mm256_set1_ps(-kLogitBound)), _mm256_set1_ps(kLogitBound));
  const __m256i distance = _mm256_sub_epi32(top, _mm256_cvtps_epi32(y));  // of what no integer holds, about 2^31
  const __m256i first = _mm256_permutevar8x32_epi32(powers.few, distance);
  const __m256i second = _mm256_permutevar8x32_epi32(powers.many, distance);
  const __m256i upper = _mm256_slli_epi32(distance, 28);  // bit 3 of the index becomes the sign
  const __m256i power = _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(first), _mm256_castsi256_ps(second), _mm256_castsi256_ps(upper)));
  return _mm256_srlv_epi32(power, _mm256_srli_epi32(distance, 4));  // 0 for shifts of 32 and more
}

inline uint64_t sum_lanes(__m256i sums) {  // of 32 bits
  const __m256i low = _mm256_and_si256(sums, _mm256_set1_epi64x(0xffffffff));
  const __m256i both = _mm256_add_epi64(low, _mm256_srli_epi64(sums, 32));
  const __m128i sum = _mm_add_epi64(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(sum)) + static_cast<uint64_t>(_mm_extract_epi64(sum, 1));
}

// Lanes of 32 bits hold 255 counts of up to 2^24; 128 are added before they move on.
constexpr int64_t kLaneBlock = 128 * 8;

template <bool kHeld>
uint64_t logit_sums_held(const float* logits, int64_t count, int32_t highest, int64_t split, uint64_t* before) {
  const Powers powers = logit_powers();
  const __m256i top = _mm256_set1_epi32(highest), lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  uint64_t sum = 0, first = 0;
  int64_t i = 0;
  for (int64_t end = count / 8 * 8; i < end;) {
    __m256i all = _mm256_setzero_si256(), part = all;
    const int64_t stop = end - i < kLaneBlock ? end : i + kLaneBlock;
    const int64_t whole = split / 8 * 8 < stop ? split / 8 * 8 : stop;
    for (; i < whole; i += 8) all = _mm256_add_epi32(all, eight_counts<kHeld>(logits + i, top, powers));
    part = all;
    if (i < stop && i < split) {
      const __m256i x = eight_counts<kHeld>(logits + i, top, powers);
      const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(split - i)), lanes);
      all = _mm256_add_epi32(all, x);
      part = _mm256_add_epi32(part, _mm256_and_si256(x, mask));
      i += 8;
    }
    for (; i < stop; i += 8) all = _mm256_add_epi32(all, eight_counts<kHeld>(logits + i, top, powers));
    sum += sum_lanes(all);
    first += sum_lanes(part);
  }
  for (; i < count; ++i) {
    const uint64_t x = logit_count(highest - logit_point(logits[i]));
    sum += x;
    first += i < split ? x : 0;
  }
  *before = first;
  return sum;
}

inline uint64_t logit_sums(const float* logits, int64_t count, int32_t highest, int64_t split, uint64_t* before) {
  return bounds_matter(highest) ? logit_sums_held<true>(logits, count, highest, split, before)
                                : logit_sums_held<false>(logits, count, highest, split, before);
}

template <bool kHeld>
uint64_t logit_counts_held(const float* logits, int64_t count, int32_t highest, uint32_t* counts, uint64_t* blocks) {
  const Powers powers = logit_powers();
  const __m256i top = _mm256_set1_epi32(highest);
  uint64_t sum = 0;
  for (int64_t i = 0; i < count;) {
    const int64_t stop = count - i < kCountBlock ? count : i + kCountBlock;
    __m256i all = _mm256_setzero_si256();
    for (; i + 8 <= stop; i += 8) {
      const __m256i x = eight_counts<kHeld>(logits + i, top, powers);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(counts + i), x);
      all = _mm256_add_epi32(all, x);
    }
    uint64_t block = sum_lanes(all);
    for (; i < stop; ++i) block += counts[i] = logit_count(highest - logit_point(logits[i]));
    *blocks++ = block;
    sum += block;
  }
  return sum;
}

inline uint64_t logit_counts(const float* logits, int64_t count, int32_t highest, uint32_t* counts, uint64_t* blocks) {
  return bounds_matter(highest) ? logit_counts_held<true>(logits, count, highest, counts, blocks)
                                : logit_counts_held<false>(logits, count, highest, counts, blocks);
}

inline uint64_t sum_of_sixteen(const uint32_t* counts) {
  return sum_lanes(_mm256_add_epi32(load256(counts), load256(counts + 8)));
}

inline int64_t* put_tokens(const uint32_t* walked, int64_t count, int64_t* out) {
  int64_t i = 1;
  for (; i + 32 <= count; i += 32) {
    uint32_t starts = 0;
    for (int k = 0; k < 4; ++k) {
      const __m256i signs = _mm256_slli_epi32(load256(walked + i + 8 * k), 31);
      starts |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(signs))) << 8 * k;
    }
    for (; starts; starts &= starts - 1) {
      *out++ = static_cast<int64_t>(walked[i - 1 + __builtin_ctz(starts)] >> 1 & kTokenMask);
    }
  }
  for (; i < count; ++i) {
    *out = static_cast<int64_t>(walked[i - 1] >> 1 & kTokenMask);
    out += walked[i] & 1;
  }
  return out;
}
