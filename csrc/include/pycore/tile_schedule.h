// SPDX-License-Identifier: Apache-2.0
// Which keys a query attends to, and which tiles of keys a tile of queries has to visit. Host and device.
//
// Positions: query row i of a batch row stands at position p, key row r at position j (attention.h), d = p - j.
// Keys are visited in tiles of kKeyTile positions and reduced in segments of kSegmentTiles tiles; both are cut by
// position alone, so a row meets the same reductions whatever it is computed with.
//
// The attention loops know a schedule only through the five functions below. A new sparsity pattern is a new kind
// here, not a new kernel:
//   keeps(p, j)               the definition
//   keep_bits(p, tile)        the same for one tile, bit b standing for position tile * kKeyTile + b
//   cover(p_lo, p_hi, tile)   whether rows p_lo..p_hi keep none, some or all of a tile (kSome is always allowed)
//   next_tile(p_lo, p_hi, t)  the first tile >= t that some row of p_lo..p_hi may visit (a huge value if none)
//   query_range(tile, lo, hi) positions outside lo..hi keep nothing of the tile (the backward pass walks it)
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYCORE_HOST_DEVICE __host__ __device__
#else
#define PYCORE_HOST_DEVICE
#endif

namespace pycore {

inline constexpr int64_t kKeyTile = 64;
inline constexpr int64_t kSegmentTiles = 16;
inline constexpr int64_t kNoTile = INT64_MAX;
inline constexpr int64_t kFar = INT64_MAX / 4;  // "no limit" for distances and window sizes: sums of two do not overflow

enum class ScheduleKind : int32_t { kFull = 0, kCausal = 1, kLambda = 2 };
enum class Cover : int32_t { kNone, kSome, kAll };

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

struct TileSchedule {
  ScheduleKind kind = ScheduleKind::kCausal;
  int64_t sink_size = 0;       // Λ: tokens kept from the start
  int64_t window_size = kFar;  // Λ: newest tokens kept, the query's own among them

  PYCORE_HOST_DEVICE bool keeps(int64_t p, int64_t j) const {
    const int64_t d = p - j;
    if (kind == ScheduleKind::kFull) return true;
    return d >= 0 && (kind == ScheduleKind::kCausal || d < window_size || j < sink_size);
  }

  PYCORE_HOST_DEVICE uint64_t keep_bits(int64_t p, int64_t tile) const {
    const int64_t base = tile * kKeyTile;
    if (kind == ScheduleKind::kFull) return ~uint64_t{0};
    const uint64_t causal = tile_bits(base, 0, p + 1);
    if (kind == ScheduleKind::kCausal) return causal;
    return causal & (tile_bits(base, 0, sink_size) | tile_bits(base, p - window_size + 1, p + 1));
  }

  PYCORE_HOST_DEVICE Cover cover(int64_t p_lo, int64_t p_hi, int64_t tile) const {
    const int64_t first = tile * kKeyTile, last = first + kKeyTile - 1;
    if (kind == ScheduleKind::kFull) return Cover::kAll;
    if (first > p_hi) return Cover::kNone;
    const bool causal_all = last <= p_lo;
    if (kind == ScheduleKind::kCausal) return causal_all ? Cover::kAll : Cover::kSome;
    if (causal_all && (last < sink_size || p_hi - first < window_size)) return Cover::kAll;
    if (first >= sink_size && p_lo - last >= window_size) return Cover::kNone;
    return Cover::kSome;
  }

  PYCORE_HOST_DEVICE int64_t next_tile(int64_t p_lo, int64_t p_hi, int64_t tile) const {
    if (kind == ScheduleKind::kFull) return tile;
    if (kind == ScheduleKind::kLambda && tile * kKeyTile >= sink_size) {
      const int64_t oldest = p_lo - window_size + 1;
      const int64_t window_tile = oldest > 0 ? oldest / kKeyTile : 0;
      if (window_tile > tile) tile = window_tile;
    }
    return tile * kKeyTile <= p_hi ? tile : kNoTile;
  }

  PYCORE_HOST_DEVICE void query_range(int64_t tile, int64_t* lo, int64_t* hi) const {
    const int64_t first = tile * kKeyTile, last = first + kKeyTile - 1;
    *lo = kind == ScheduleKind::kFull ? -kFar : first;
    *hi = kind == ScheduleKind::kLambda && first >= sink_size && window_size < kFar ? last + window_size - 1 : kFar;
  }
};

}  // namespace pycore
