// SPDX-License-Identifier: Apache-2.0
// Keys lie in tiles of 64 positions, and a set of keys of one tile is a word of 64 bits. Host and device.
#pragma once

#include <cstdint>

// PYCORE_ROLLED stands before loops that are not worth nvcc's unrolling: its copies are most of what ptxas works on.
#if defined(__CUDACC__)
#define PYCORE_HOST_DEVICE __host__ __device__
#define PYCORE_ROLLED _Pragma("unroll 1")
#else
#define PYCORE_ROLLED
// Inlined always: a copy of its own would be a weak symbol, and in a file of wide instructions that crashes others.
#define PYCORE_HOST_DEVICE [[gnu::always_inline]]
#endif

namespace pycore {

inline constexpr int64_t kKeyTile = 64;
inline constexpr int64_t kSegmentTiles = 16;  // tiles reduced together, before segments merge in order

// The number of zeros below the lowest set bit of x, which is not 0.
PYCORE_HOST_DEVICE inline int64_t lowest_bit(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return __ffsll(static_cast<long long>(x)) - 1;
#else
  return __builtin_ctzll(x);
#endif
}

// Bits lo..hi-1 set, for 0 <= lo and hi <= 64; none if hi <= lo.
PYCORE_HOST_DEVICE inline uint64_t bit_range(int64_t lo, int64_t hi) {
  if (hi <= lo) return 0;
  const uint64_t below_hi = hi >= 64 ? ~uint64_t{0} : (uint64_t{1} << hi) - 1;
  return below_hi & ~((uint64_t{1} << lo) - 1);
}

// Bits of the tile starting at `base` for positions in [from, to).
PYCORE_HOST_DEVICE inline uint64_t tile_bits(int64_t base, int64_t from, int64_t to) {
  const int64_t lo = from > base ? from - base : 0;
  const int64_t hi = to < base + kKeyTile ? to - base : kKeyTile;
  return lo >= kKeyTile ? 0 : bit_range(lo, hi);
}

}  // namespace pycore
