// SPDX-License-Identifier: Apache-2.0
// Tile products restricted to kept pairs of rows and keys. What is not kept is not touched, so that NaN in it stays
// there.
#pragma once

#include <pycore/key_tile.h>

#include <cstdint>

#include "tile_product.inl.h"

// Which keys a block of rows keeps of a tile.
struct BlockKeeps {
  uint64_t bits[kProductRows];  // by row
  uint64_t any = 0, all = ~uint64_t{0};

  PYCORE_INLINE void set(int m, uint64_t row_bits) {
    bits[m] = row_bits;
    any |= row_bits;
    all &= row_bits;
  }
  PYCORE_INLINE int64_t first() const { return __builtin_ctzll(any); }
  PYCORE_INLINE int64_t end() const { return 64 - __builtin_clzll(any); }
};

// c[m] += sum over the set bits k of bits[m], ascending, of A[m][k] B[k]. A[m][k] is a[m * a_row + k] or, transposed,
// a[k * a_row + m]. Pairs that are not kept are not touched, so what they hold (NaN too) does not matter. The run of
// k that every row keeps goes through the block product; the ragged ends go row by row, in the same order. Where all
// rows keep the same, every run does.
template <bool kTransposed, class B>
__attribute__((noinline)) void accumulate_kept(int64_t rows, const BlockKeeps& keeps, const float* a, int64_t a_row,
                                               const B* b, int64_t b_row, int64_t n, float* c, int64_t c_row) {
  if (keeps.any == 0) return;
  const auto a_at = [&](int64_t m, int64_t k) { return kTransposed ? a + k * a_row + m : a + m * a_row + k; };
  // Rows m .. m + count - 1, all of which keep `bits`.
  const auto product = [&](int64_t m, int64_t count, uint64_t bits) {
    while (bits) {
      const int64_t k = __builtin_ctzll(bits);
      const uint64_t rest = ~(bits >> k);
      const int64_t run = rest ? __builtin_ctzll(rest) : 64;
      tile_product<kTransposed>(count, run, a_at(m, k), a_row, b + k * b_row, b_row, 0, n,
                                AccumulateBlock{c + m * c_row, c_row});
      bits &= ~bit_range(k, k + run);
    }
  };
  if (keeps.any == keeps.all) return product(0, rows, keeps.any);
  int64_t begin = 64, end = 64;
  if (keeps.all) {
    begin = __builtin_ctzll(keeps.all);
    const uint64_t rest = ~(keeps.all >> begin);
    end = begin + (rest ? __builtin_ctzll(rest) : 64);
    if (end > 64) end = 64;
  }
  const uint64_t before = bit_range(0, begin), after = bit_range(end, 64);
  if (keeps.any & before) {
    for (int64_t m = 0; m < rows; ++m) product(m, 1, keeps.bits[m] & before);
  }
  if (end > begin) {
    tile_product<kTransposed>(rows, end - begin, a_at(0, begin), a_row, b + begin * b_row, b_row, 0, n,
                              AccumulateBlock{c, c_row});
  }
  if (keeps.any & after) {
    for (int64_t m = 0; m < rows; ++m) product(m, 1, keeps.bits[m] & after);
  }
}

// Bit r of out[c] is bit c of in[r].
PYCORE_INLINE void transpose_bits(const uint64_t* in, int64_t rows, uint64_t* out) {
  for (int64_t c = 0; c < kKeyTile; ++c) out[c] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (uint64_t bits = in[r]; bits; bits &= bits - 1) out[__builtin_ctzll(bits)] |= uint64_t{1} << r;
  }
}

// grad[c] += sum over kept rows r of A[r][c] B[r], for the tile's 64 keys.
PYCORE_INLINE void accumulate_columns(const uint64_t* row_bits, int64_t rows, const float* a, const float* b,
                                      int64_t b_row, int64_t n, float* grad, int64_t grad_row) {
  uint64_t columns[kKeyTile], all = ~uint64_t{0}, any = 0;
  for (int64_t r = 0; r < rows; ++r) {
    all &= row_bits[r];
    any |= row_bits[r];
  }
  if (any == 0) return;
  const bool full = all == ~uint64_t{0};
  if (!full) transpose_bits(row_bits, rows, columns);
  for (int64_t c = 0; c < kKeyTile; c += kProductRows) {
    const int64_t count = kKeyTile - c < kProductRows ? kKeyTile - c : kProductRows;
    BlockKeeps keeps;
    for (int m = 0; m < count; ++m) keeps.set(m, full ? bit_range(0, rows) : columns[c + m]);
    accumulate_kept<true>(count, keeps, a + c, kKeyTile, b, b_row, n, grad + c * grad_row, grad_row);
  }
}
