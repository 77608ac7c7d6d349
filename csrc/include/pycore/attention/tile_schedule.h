// SPDX-License-Identifier: Apache-2.0
// Which keys a query attends to, and which tiles of keys a tile of queries has to visit. Host and device.
//
// Positions: query row i of a batch row stands at position p, key row r at position j (attention.h), d = p - j.
// Keys are visited in tiles of kKeyTile positions and reduced in segments of kSegmentTiles tiles; both are cut by
// position alone, so a row meets the same reductions whatever it is computed with.
//
// The attention loops know a schedule only through the functions below. A new sparsity pattern is a new kind here, not
// a new kernel:
//   keeps(p, j)               the definition
//   keep_bits(p, tile)        the same for one tile, bit b standing for position tile * kKeyTile + b
//   reach_bits(p_lo, p_hi, tile)  keys of the tile outside of which rows p_lo..p_hi keep none: others are not read
//   cover(p_lo, p_hi, tile)   whether rows p_lo..p_hi keep none, some or all of a tile (kSome is always allowed)
//   next_tile(p_lo, p_hi, t)  the first tile >= t that some row of p_lo..p_hi may visit (a huge value if none)
//   query_range(tile, lo, hi) positions outside lo..hi keep nothing of the tile (the backward pass walks it)
//   place(p)                  where p stands for distances (rotations, biases): p itself, but for the nodes of a tree
//   in_place(tile)            whether every position of the tile stands at itself
//   ahead()                   by how much a kept key may stand after its query: kFar where nothing bounds it
#pragma once

#include <pycore/key_tile.h>

#include <cstdint>

namespace pycore {

inline constexpr int64_t kNoTile = INT64_MAX;
inline constexpr int64_t kFar =
    INT64_MAX / 4;  // "no limit" for distances and window sizes: sums of two do not overflow

enum class ScheduleKind : int32_t { kFull, kCausal, kLambda, kPrefix, kSegments, kBlocks, kKeySubset, kTree };
enum class Cover : int32_t { kNone, kSome, kAll };

struct TileSchedule {
  ScheduleKind kind = ScheduleKind::kCausal;
  int64_t sink_size = 0;       // Λ, Blocks, Tree: tokens kept from the start
  int64_t window_size = kFar;  // Λ, Segments, Tree (by place): newest tokens kept, the query's own among them
  int64_t right = 0;           // Λ, Segments: tokens kept after the query's own
  int64_t prefix = 0;          // Prefix: tokens every query sees, also those before it
  const int64_t* boundaries =
      nullptr;  // Segments: ascending positions; segment s is boundaries[s] .. boundaries[s+1]-1
  int64_t segments = 0;
  int64_t segment_sinks = 0;  // Segments: tokens kept from the start of the query's own
  bool causal = true;         // KeySubset: a query keeps no key after it
  // Blocks: a bit for every pair of a query block p >> block_shift and a key block j >> block_shift that take part, of
  // one batch row and head: [block_rows, block_words], from query block block_row0 and key block block_column0 on
  // (attention_blocks.h draws them). Whole tiles lie in a block, or whole blocks of at least 16 in a tile.
  const uint64_t* blocks = nullptr;
  int64_t block_shift = 0, block_rows = 0, block_words = 0, block_row0 = 0, block_column0 = 0;
  int64_t window_blocks = 0;  // of the newest blocks, which no correction touches
  // KeySubset: a bit for every key position that takes part, [key_words], a word a tile.
  const uint64_t* keys = nullptr;
  int64_t key_words = 0;
  // Tree: the last positions, from tree_start on, are its nodes. Of each its parent, its depth, and a bit for every
  // node that is it or one of its ancestors: [tree_nodes, 2 + tree_words].
  const int64_t* tree = nullptr;
  int64_t tree_start = 0, tree_nodes = 0, tree_words = 0;

  // The segment of a position, [*lo, *hi); empty where there is none.
  PYCORE_HOST_DEVICE void segment_of(int64_t p, int64_t* lo, int64_t* hi) const {
    *lo = *hi = p;
    if (segments == 0 || p < boundaries[0] || p >= boundaries[segments]) return;
    int64_t first = 0, last = segments - 1;  // the last segment that starts at or before p
    PYCORE_ROLLED
    while (first < last) {
      const int64_t middle = (first + last + 1) / 2;
      if (boundaries[middle] <= p) {
        first = middle;
      } else {
        last = middle - 1;
      }
    }
    *lo = boundaries[first];
    *hi = boundaries[first + 1];
  }

  // Keys of the tile that rows p_lo..p_hi, all of a text that starts at `start` and ends before `end`, keep between
  // them: those of its first `sinks` and those of their windows, none past `right`.
  PYCORE_HOST_DEVICE uint64_t window_bits(int64_t p_lo, int64_t p_hi, int64_t start, int64_t end, int64_t sinks,
                                          int64_t tile) const {
    const int64_t base = tile * kKeyTile, oldest = p_lo - window_size + 1, past = p_hi + right + 1;
    const int64_t to = past < end ? past : end, sinks_end = start + sinks;
    return tile_bits(base, oldest > start ? oldest : start, to) |
           tile_bits(base, start, sinks_end < to ? sinks_end : to);
  }

  // A segment's first position, for sums: those below -kFar are none's.
  PYCORE_HOST_DEVICE static int64_t bounded(int64_t position) { return position < -kFar ? -kFar : position; }

  // Keys of the tile that some row of p_lo..p_hi keeps under segments.
  PYCORE_HOST_DEVICE uint64_t segment_bits(int64_t p_lo, int64_t p_hi, int64_t tile) const {
    if (segments == 0) return 0;
    const int64_t base = tile * kKeyTile, last = base + kKeyTile - 1;
    // A segment with rows and keys holds the later one of p_lo and base, or starts after it, where both ranges are.
    int64_t at = p_lo > base ? p_lo : base;
    const int64_t until = p_hi < last ? p_hi : last;
    if (at < boundaries[0] && boundaries[0] <= until) at = boundaries[0];
    uint64_t bits = 0;
    PYCORE_ROLLED
    do {
      int64_t lo, hi;
      segment_of(at, &lo, &hi);
      if (lo == hi) break;  // no position from here on has one
      const int64_t first = p_lo > lo ? p_lo : lo, end = p_hi < hi ? p_hi : hi - 1;
      if (first <= end) bits |= window_bits(first, end, bounded(lo), hi, segment_sinks, tile);
      at = hi;
    } while (at <= until);
    return bits;
  }

  PYCORE_HOST_DEVICE int64_t ahead() const {
    switch (kind) {
      case ScheduleKind::kFull:
      case ScheduleKind::kPrefix: return kFar;
      case ScheduleKind::kKeySubset: return causal ? 0 : kFar;
      case ScheduleKind::kLambda:
      case ScheduleKind::kSegments: return right;
      default: return 0;
    }
  }

  // Word `word` of the bitmap's rows for positions p_lo..p_hi, together.
  PYCORE_HOST_DEVICE uint64_t block_word(int64_t p_lo, int64_t p_hi, int64_t word) const {
    int64_t first = (p_lo >> block_shift) - block_row0, last = (p_hi >> block_shift) - block_row0;
    first = first < 0 ? 0 : first;
    last = last < block_rows ? last : block_rows - 1;
    uint64_t any = 0;
    PYCORE_ROLLED
    for (int64_t row = first; row <= last; ++row) any |= blocks[row * block_words + word];
    return any;
  }

  // Keys of the tile that lie in a block which takes part for one of positions p_lo..p_hi.
  PYCORE_HOST_DEVICE uint64_t block_bits(int64_t p_lo, int64_t p_hi, int64_t tile) const {
    const int64_t base = tile * kKeyTile, size = int64_t{1} << block_shift;
    uint64_t bits = 0;
    PYCORE_ROLLED
    for (int64_t k = 0; k < kKeyTile; k += size) {
      const int64_t column = ((base + k) >> block_shift) - block_column0;
      if (column < 0 || column >= 64 * block_words) continue;
      if (block_word(p_lo, p_hi, column / 64) >> (column % 64) & 1) bits |= bit_range(k, k + size);
    }
    return bits;
  }

  // Whether every one of positions p_lo..p_hi has all blocks of the tile.
  PYCORE_HOST_DEVICE bool blocks_fill(int64_t p_lo, int64_t p_hi, int64_t tile) const {
    const int64_t first_row = (p_lo >> block_shift) - block_row0, last_row = (p_hi >> block_shift) - block_row0;
    const int64_t first = (tile * kKeyTile >> block_shift) - block_column0;
    const int64_t last = (((tile + 1) * kKeyTile - 1) >> block_shift) - block_column0;
    if (first_row < 0 || last_row >= block_rows || first < 0 || last >= 64 * block_words) return false;
    PYCORE_ROLLED
    for (int64_t row = first_row; row <= last_row; ++row) {
      PYCORE_ROLLED
      for (int64_t column = first; column <= last; ++column) {
        if ((blocks[row * block_words + column / 64] >> (column % 64) & 1) == 0) return false;
      }
    }
    return true;
  }

  // The first tile >= `tile` that a block of positions p_lo..p_hi reaches into, or kNoTile.
  PYCORE_HOST_DEVICE int64_t next_block_tile(int64_t p_lo, int64_t p_hi, int64_t tile) const {
    int64_t column = (tile * kKeyTile >> block_shift) - block_column0;
    if (column < 0) column = 0;
    uint64_t wanted = ~uint64_t{0} << (column % 64);
    PYCORE_ROLLED
    for (int64_t word = column / 64; word < block_words; ++word, wanted = ~uint64_t{0}) {
      const uint64_t any = block_word(p_lo, p_hi, word) & wanted;
      if (any == 0) continue;
      const int64_t found = ((block_column0 + word * 64 + lowest_bit(any)) << block_shift) / kKeyTile;
      return found > tile ? found : tile;
    }
    return kNoTile;
  }

  PYCORE_HOST_DEVICE uint64_t key_word(int64_t tile) const { return tile < key_words ? keys[tile] : 0; }

  PYCORE_HOST_DEVICE bool in_tree(int64_t p) const {
    return kind == ScheduleKind::kTree && p >= tree_start && p - tree_start < tree_nodes;
  }

  // A node stands behind the context at its depth.
  PYCORE_HOST_DEVICE int64_t place(int64_t p) const {
    return in_tree(p) ? tree_start + tree[(p - tree_start) * (2 + tree_words) + 1] : p;
  }

  PYCORE_HOST_DEVICE bool in_place(int64_t tile) const {
    return kind != ScheduleKind::kTree || (tile + 1) * kKeyTile <= tree_start;
  }

  // Keys of the tile that the node at position p descends from, itself among them.
  PYCORE_HOST_DEVICE uint64_t ancestor_bits(int64_t p, int64_t tile) const {
    const uint64_t* words = reinterpret_cast<const uint64_t*>(tree + (p - tree_start) * (2 + tree_words) + 2);
    const int64_t from = tile * kKeyTile - tree_start;  // the node at the tile's start; it may stand before the first
    if (from <= -kKeyTile || from >= 64 * tree_words) return 0;
    if (from < 0) return words[0] << -from;
    const int64_t word = from / 64, shift = from % 64;
    const uint64_t low = words[word] >> shift;
    return shift == 0 || word + 1 == tree_words ? low : low | words[word + 1] << (64 - shift);
  }

  // Keys of the tile that position p keeps under a tree: of the context and of its ancestors those in its window, or
  // among the sinks, by place.
  PYCORE_HOST_DEVICE uint64_t branch_bits(int64_t p, int64_t tile) const {
    if (!in_tree(p)) return window_bits(p, p, 0, INT64_MAX, sink_size, tile);
    const int64_t at = place(p);
    uint64_t ancestors = ancestor_bits(p, tile);
    if (at - tree_start >= window_size) {  // else the window holds the whole branch
      PYCORE_ROLLED
      for (uint64_t left = ancestors; left != 0; left &= left - 1) {
        const int64_t j = place(tile * kKeyTile + lowest_bit(left));
        if (at - j >= window_size && j >= sink_size) ancestors &= ~(left & (~left + 1));
      }
    }
    return window_bits(at, at, 0, tree_start, sink_size, tile) | ancestors;
  }

  PYCORE_HOST_DEVICE uint64_t reach_bits(int64_t p_lo, int64_t p_hi, int64_t tile) const {
    if (kind == ScheduleKind::kSegments) return segment_bits(p_lo, p_hi, tile);
    if (kind != ScheduleKind::kBlocks && kind != ScheduleKind::kKeySubset) return ~uint64_t{0};
    const int64_t base = tile * kKeyTile;
    const uint64_t past = tile_bits(base, 0, p_hi + 1);
    if (kind == ScheduleKind::kKeySubset) return causal ? past & key_word(tile) : key_word(tile);
    return past == 0 ? 0 : past & (tile_bits(base, 0, sink_size) | block_bits(p_lo, p_hi, tile));
  }

  // Whether rows p_lo..p_hi are known to keep the same keys of the tile; false says nothing.
  PYCORE_HOST_DEVICE bool keep_alike(int64_t p_lo, int64_t p_hi, int64_t tile) const {
    const bool past = (tile + 1) * kKeyTile <= p_lo;
    if (kind == ScheduleKind::kKeySubset) return past || !causal;
    return kind == ScheduleKind::kBlocks && p_lo >> block_shift == p_hi >> block_shift && past;
  }

  // Of `rows` rows from position p on, how many of the first to take together, so that keep_alike may hold.
  PYCORE_HOST_DEVICE int64_t rows_alike(int64_t p, int64_t rows) const {
    if (kind != ScheduleKind::kBlocks) return rows;
    const int64_t size = int64_t{1} << block_shift, left = size - (p & (size - 1));  // p may be negative
    return left < rows ? left : rows;
  }

  PYCORE_HOST_DEVICE bool keeps(int64_t p, int64_t j) const { return keep_bits(p, j / kKeyTile) >> (j % kKeyTile) & 1; }

  PYCORE_HOST_DEVICE uint64_t keep_bits(int64_t p, int64_t tile) const {
    const int64_t base = tile * kKeyTile;
    if (kind == ScheduleKind::kFull) return ~uint64_t{0};
    if (kind == ScheduleKind::kBlocks || kind == ScheduleKind::kKeySubset) return reach_bits(p, p, tile);
    if (kind == ScheduleKind::kTree) return branch_bits(p, tile);
    if (kind == ScheduleKind::kSegments) {
      int64_t lo, hi;
      segment_of(p, &lo, &hi);
      return lo == hi ? 0 : window_bits(p, p, bounded(lo), hi, segment_sinks, tile);
    }
    if (kind == ScheduleKind::kLambda) return window_bits(p, p, 0, INT64_MAX, sink_size, tile);
    const uint64_t past = tile_bits(base, 0, p + 1);
    return kind == ScheduleKind::kPrefix ? past | tile_bits(base, 0, prefix) : past;
  }

  PYCORE_HOST_DEVICE Cover cover(int64_t p_lo, int64_t p_hi, int64_t tile) const {
    const int64_t first = tile * kKeyTile, last = first + kKeyTile - 1;
    if (kind == ScheduleKind::kFull) return Cover::kAll;
    if (kind == ScheduleKind::kBlocks || kind == ScheduleKind::kKeySubset) {
      const uint64_t reached = reach_bits(p_lo, p_hi, tile);
      if (reached == 0) return Cover::kNone;
      const bool all = kind == ScheduleKind::kKeySubset
                           ? reached == ~uint64_t{0} && (!causal || last <= p_lo)
                           : last <= p_lo && (last < sink_size || blocks_fill(p_lo, p_hi, tile));
      return all ? Cover::kAll : Cover::kSome;
    }
    if (kind == ScheduleKind::kSegments) {
      int64_t lo, hi;
      segment_of(p_lo, &lo, &hi);
      const bool together = p_hi < hi && first >= lo && last < hi && last <= p_lo + right;
      if (together && (last < bounded(lo) + segment_sinks || p_hi - first < window_size)) return Cover::kAll;
      return segment_bits(p_lo, p_hi, tile) == 0 ? Cover::kNone : Cover::kSome;
    }
    if (kind == ScheduleKind::kPrefix) {
      if (last < prefix || last <= p_lo) return Cover::kAll;
      return first > p_hi && first >= prefix ? Cover::kNone : Cover::kSome;
    }
    if (first > p_hi + right) return Cover::kNone;
    const bool past_all = last <= p_lo + right;
    if (kind == ScheduleKind::kCausal) return past_all ? Cover::kAll : Cover::kSome;
    // No node stands further than its position, nor before the tree.
    const bool shared = kind != ScheduleKind::kTree || last < tree_start;
    const int64_t nearest = kind == ScheduleKind::kTree && tree_start < p_lo ? tree_start : p_lo;
    if (past_all && shared && (last < sink_size || p_hi - first < window_size)) return Cover::kAll;
    if (first >= sink_size && nearest - last >= window_size) return Cover::kNone;
    return Cover::kSome;
  }

  PYCORE_HOST_DEVICE int64_t next_tile(int64_t p_lo, int64_t p_hi, int64_t tile) const {
    int64_t end = p_hi + right + 1;  // positions that some row may see stop here
    int64_t oldest = 0;              // and, from this tile on, start here
    if (kind == ScheduleKind::kFull) return tile;
    if (kind == ScheduleKind::kBlocks && tile * kKeyTile >= sink_size) {
      tile = next_block_tile(p_lo, p_hi, tile);
      if (tile == kNoTile) return kNoTile;
    }
    if (kind == ScheduleKind::kKeySubset) {
      if (!causal || key_words * kKeyTile < end) end = key_words * kKeyTile;
      PYCORE_ROLLED
      while (tile * kKeyTile < end && keys[tile] == 0) ++tile;
    }
    if (kind == ScheduleKind::kPrefix && prefix > end) end = prefix;
    if (kind == ScheduleKind::kLambda && tile * kKeyTile >= sink_size) oldest = p_lo - window_size + 1;
    if (kind == ScheduleKind::kTree && tile * kKeyTile >= sink_size) {
      oldest = (tree_start < p_lo ? tree_start : p_lo) - window_size + 1;
    }
    if (kind == ScheduleKind::kSegments) {
      if (segments == 0 || p_hi < boundaries[0] || p_lo >= boundaries[segments]) return kNoTile;
      const int64_t from = p_lo > boundaries[0] ? p_lo : boundaries[0];
      const int64_t to = p_hi < boundaries[segments] ? p_hi : boundaries[segments] - 1;
      // Rows of later segments see nothing before these start, so only the first row's sinks lie before its window.
      int64_t start, unused, segment_end;
      segment_of(from, &start, &unused);
      start = bounded(start);
      const bool in_sinks = segment_sinks > 0 && tile * kKeyTile < start + segment_sinks;
      oldest = from - window_size + 1;
      if (in_sinks || oldest < start) oldest = start;
      segment_of(to, &unused, &segment_end);
      end = to + right + 1 < segment_end ? to + right + 1 : segment_end;
    }
    if (oldest > 0 && oldest / kKeyTile > tile) tile = oldest / kKeyTile;
    return tile * kKeyTile < end ? tile : kNoTile;
  }

  PYCORE_HOST_DEVICE void query_range(int64_t tile, int64_t* lo, int64_t* hi) const {
    const int64_t first = tile * kKeyTile, last = first + kKeyTile - 1;
    const bool seen_early = kind == ScheduleKind::kFull || (kind == ScheduleKind::kPrefix && first < prefix) ||
                            (kind == ScheduleKind::kKeySubset && !causal);
    *lo = seen_early ? -kFar : first - right;
    *hi = kFar;
    const bool windowed = kind == ScheduleKind::kLambda || kind == ScheduleKind::kTree;
    if (windowed && first >= sink_size && window_size < kFar) {
      const int64_t seen_last = last + window_size - 1;
      if (kind == ScheduleKind::kLambda || seen_last < tree_start) *hi = seen_last;  // nodes may stand nearer
    }
    if (kind != ScheduleKind::kSegments || segments == 0) return;
    // Between two segments there is none, so look from the nearest position inside.
    int64_t start, end;
    segment_of(first, &start, &end);
    if (start < end && start > *lo) *lo = start;
    const int64_t past = bounded(boundaries[segments]);
    segment_of(last < past ? last : past - 1, &start, &end);
    // Boundaries may be any numbers, and callers add to these. Segments that end in the tile have no row after it.
    *hi = end > kFar ? kFar : end - 1;
    const bool sinks = segment_sinks > 0 && bounded(start) + segment_sinks > first;
    if (!sinks && *hi - last >= window_size) *hi = last + window_size - 1;
    if (*hi < last) *hi = last;
  }
};

}  // namespace pycore
