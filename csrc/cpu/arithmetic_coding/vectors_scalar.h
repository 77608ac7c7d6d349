// SPDX-License-Identifier: Apache-2.0
// What the coder does to whole rows, in plain loops: the definition. vectors_avx2.h and vectors_avx512.h have the same
// functions. Included inside an anonymous namespace.

constexpr int kCrcTables = 8;
constexpr int64_t kCountBlock = 64;

struct CrcTable {
  uint32_t of[kCrcTables][256];
  constexpr CrcTable() : of() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t crc = byte;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
      of[0][byte] = crc;
    }
    for (int t = 1; t < kCrcTables; ++t) {
      for (int byte = 0; byte < 256; ++byte) of[t][byte] = of[t - 1][byte] >> 8 ^ of[0][of[t - 1][byte] & 255];
    }
  }
};
constexpr CrcTable kCrc;

inline uint32_t crc_eight(uint32_t crc, uint64_t data) {
  data ^= crc;
  return kCrc.of[7][data & 255] ^ kCrc.of[6][data >> 8 & 255] ^ kCrc.of[5][data >> 16 & 255] ^
         kCrc.of[4][data >> 24 & 255] ^ kCrc.of[3][data >> 32 & 255] ^ kCrc.of[2][data >> 40 & 255] ^
         kCrc.of[1][data >> 48 & 255] ^ kCrc.of[0][data >> 56];
}

inline uint32_t crc_four(uint32_t crc, uint32_t data) {
  data ^= crc;
  return kCrc.of[3][data & 255] ^ kCrc.of[2][data >> 8 & 255] ^ kCrc.of[1][data >> 16 & 255] ^ kCrc.of[0][data >> 24];
}

inline uint32_t crc_one(uint32_t crc, uint8_t byte) { return kCrc.of[0][(crc ^ byte) & 255] ^ crc >> 8; }

template <class T>
bool rising(const T* row, int64_t entries) {
  bool falls = false;
  for (int64_t i = 1; i < entries; ++i) falls |= row[i] < row[i - 1];
  return !falls;
}

// How many of the entries, which rise, are at most `value`.
template <class T>
int64_t count_at_most(const T* entries, int64_t count, uint32_t value) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += static_cast<uint32_t>(entries[i]) <= value;
  return found;
}

// The highest of the logits, or -infinity; false if one is NaN or +infinity.
bool highest_logit(const float* logits, int64_t count, float* highest) {
  bool good = true;
  float most = -__builtin_inff();
  for (int64_t i = 0; i < count; ++i) {
    good &= logits[i] < __builtin_inff();  // false for NaN
    most = logits[i] > most ? logits[i] : most;
  }
  *highest = most;
  return good;
}

// The sum of all counts, and of those before `split`.
uint64_t logit_sums(const float* logits, int64_t count, int32_t highest, int64_t split, uint64_t* before) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i == split) *before = sum;
    sum += logit_count(highest - logit_point(logits[i]));
  }
  return sum;
}

// All counts, their sum, and the sum of each kCountBlock of them.
uint64_t logit_counts(const float* logits, int64_t count, int32_t highest, uint32_t* counts, uint64_t* blocks) {
  uint64_t sum = 0;
  for (int64_t begin = 0; begin < count; begin += kCountBlock) {
    const uint64_t before = sum;
    for (int64_t i = begin; i < begin + kCountBlock && i < count; ++i) {
      sum += counts[i] = logit_count(highest - logit_point(logits[i]));
    }
    *blocks++ = sum - before;
  }
  return sum;
}

inline uint64_t sum_of_sixteen(const uint32_t* counts) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < 16; ++i) sum += counts[i];
  return sum;
}

// The last of a context's entries that is at most `value`.
inline int find_nibble(const uint16_t* entries, uint32_t value) {
  int found = 0;
  for (int i = 1; i < kNibbles; ++i) found += entries[i] <= value;
  return found;
}

inline void move_entries(uint16_t* entries, int symbol, int rate) {
  for (int i = 0; i < kNibbles; ++i) {
    entries[i] = static_cast<uint16_t>(entries[i] + ((adaptive_target(i, symbol) - entries[i]) >> rate));
  }
}

// What a walk of a token table wrote down (table.h), as tokens: where one starts at walked[i], i > 0,
// the one before it ended with walked[i - 1]. There is room for `count`; returns where they end.
inline int64_t* put_tokens(const uint32_t* walked, int64_t count, int64_t* out) {
  for (int64_t i = 1; i < count; ++i) {
    *out = static_cast<int64_t>(walked[i - 1] >> 1 & kTokenMask);
    out += walked[i] & 1;
  }
  return out;
}
