// SPDX-License-Identifier: Apache-2.0
// 0 times what is not finite would reach rows of a product that have nothing to do with it. So where pairs are left
// out, such numbers are taken out of the tile before it is multiplied with weights, and the rows that do keep them get
// them by hand.
#pragma once

#include "tile.cuh"

namespace pycore {
namespace {

// All ones in the exponents of a word: what an infinity or a NaN has.
template <class T>
struct WordOf {
  static constexpr int kBits = 16;
  static constexpr uint64_t kOnes = 0x0001000100010001u;
};
template <>
struct WordOf<float> {
  static constexpr int kBits = 32;
  static constexpr uint64_t kOnes = 0x0000000100000001u;
};
template <class T>
constexpr uint64_t kExponent = 0x7f800000u;
template <>
constexpr uint64_t kExponent<Float16> = 0x7c00;
template <>
constexpr uint64_t kExponent<BFloat16> = 0x7f80;

// Zero where, and only where, a number of the word is not finite.
template <class T>
__device__ inline uint64_t missing_exponents(uint64_t word) {
  constexpr uint64_t kAll = WordOf<T>::kOnes * kExponent<T>;
  return (word & kAll) ^ kAll;
}
template <class T>
__device__ inline bool any_zero(uint64_t word) {
  constexpr uint64_t kOnes = WordOf<T>::kOnes;
  return ((word - kOnes) & ~word & kOnes << (WordOf<T>::kBits - 1)) != 0;
}

// each(word) for the words of a tile; all threads.
template <class T, int kChannels, int kThreads, class Each>
__device__ void each_word(T* tile, Each each) {
  constexpr int kNumbers = 64 / WordOf<T>::kBits, kWords = kChannels / kNumbers;
  PYCORE_UNROLL_BY(1)
  for (int n = threadIdx.x; n < kTile * kWords; n += kThreads) {
    each(reinterpret_cast<uint64_t*>(tile + n / kWords * row_stride<T>(kChannels))[n % kWords]);
  }
}

// Whether a tile has what is not finite. All threads, and a barrier.
template <class T, int kChannels, int kThreads>
__device__ bool has_not_finite(T* tile) {
  bool found = false;
  each_word<T, kChannels, kThreads>(tile, [&](uint64_t word) { found |= any_zero<T>(missing_exponents<T>(word)); });
  return __syncthreads_or(found);
}

// Takes it out, with a barrier before and one after; all threads.
template <class T, int kChannels, int kThreads>
__device__ __noinline__ void take_not_finite(T* tile) {
  constexpr uint64_t kNumber = ~uint64_t{0} >> (64 - WordOf<T>::kBits);
  __syncthreads();
  each_word<T, kChannels, kThreads>(tile, [&](uint64_t& word) {
    const uint64_t missing = missing_exponents<T>(word);
    for (int k = 0; k < 64; k += WordOf<T>::kBits) {
      if ((missing >> k & kNumber) == 0) word &= ~(kNumber << k);
    }
  });
  __syncthreads();
}

// Adds to the sums of a warp's rows what of the tile is not finite and stands in a row r that they keep: of row n,
// kept[n] >> r & 1, or where the tile's rows keep the sums' own, kept[r] >> n & 1. By way of memory; see
// list_key_tiles.
template <class T, int kChannels, int kBlocks>
__device__ __noinline__ void add_not_finite_in(float* sums, const T* tile, const uint64_t* kept, int first_row,
                                               bool rows_keep) {
  const int lane = threadIdx.x % kLanes;
  PYCORE_UNROLL_BY(1)
  for (int n = 0; n < kBlocks * kChannels / 2; ++n) {
    const int row = first_row + n / (kChannels / 2) * 16 + n / 2 % 2 * 8 + lane / 4;
    const int c = n / 4 % (kChannels / 8) * 8 + 2 * (lane % 4) + n % 2;
    PYCORE_UNROLL_BY(1)
    for (int r = 0; r < kTile; ++r) {
      const float x = to_float(tile[r * row_stride<T>(kChannels) + c]);
      if (fabsf(x) < INFINITY) continue;
      if ((rows_keep ? kept[row] >> r : kept[r] >> row) & 1) sums[n] += x;
    }
  }
}
template <class T, int kChannels, int kBlocks>
__device__ void add_not_finite(float (&sums)[kBlocks][kChannels / 8][4], const T* tile, const uint64_t* kept,
                               int first_row, bool rows_keep) {
  constexpr int kNumbers = kBlocks * kChannels / 2, kRow = kChannels / 2;
  float memory[kNumbers];
  PYCORE_UNROLL
  for (int n = 0; n < kNumbers; ++n) memory[n] = sums[n / kRow][n % kRow / 4][n % 4];
  add_not_finite_in<T, kChannels, kBlocks>(memory, tile, kept, first_row, rows_keep);
  PYCORE_UNROLL
  for (int n = 0; n < kNumbers; ++n) sums[n / kRow][n % kRow / 4][n % 4] = memory[n];
}

}  // namespace
}  // namespace pycore
