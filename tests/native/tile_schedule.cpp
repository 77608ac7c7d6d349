// SPDX-License-Identifier: Apache-2.0
// The functions of a schedule agree with each other: every one against `keeps`, the definition, on random
// schedules.
#include <pycore/attention/tile_schedule.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

using pycore::Cover;
using pycore::kKeyTile;
using pycore::TileSchedule;

constexpr int64_t kTiles = 6, kKeys = kTiles * kKeyTile;

std::mt19937 engine(7);

int64_t draw(int64_t lo, int64_t hi) { return std::uniform_int_distribution<int64_t>(lo, hi)(engine); }

void expect(bool condition, const char* what, const TileSchedule& schedule, int64_t p_lo, int64_t p_hi, int64_t tile) {
  if (condition) return;
  std::fprintf(stderr, "%s: kind %d, sinks %lld, window %lld, right %lld, positions %lld..%lld, tile %lld\n", what,
               static_cast<int>(schedule.kind), static_cast<long long>(schedule.sink_size + schedule.segment_sinks),
               static_cast<long long>(schedule.window_size), static_cast<long long>(schedule.right),
               static_cast<long long>(p_lo), static_cast<long long>(p_hi), static_cast<long long>(tile));
  std::exit(1);
}

// How many of the tile's pairs with rows p_lo..p_hi are kept, by definition.
int64_t kept(const TileSchedule& schedule, int64_t p_lo, int64_t p_hi, int64_t tile) {
  int64_t count = 0;
  for (int64_t p = p_lo; p <= p_hi; ++p) {
    for (int64_t j = tile * kKeyTile; j < (tile + 1) * kKeyTile; ++j) count += schedule.keeps(p, j);
  }
  return count;
}

// The blocks schedule from its bitmap, pair by pair.
bool block_keeps(const TileSchedule& schedule, int64_t p, int64_t j) {
  const int64_t size = int64_t{1} << schedule.block_shift;
  if (p < 0 || j > p) return false;
  if (j < schedule.sink_size) return true;
  const int64_t row = p / size - schedule.block_row0, column = j / size - schedule.block_column0;
  if (row < 0 || row >= schedule.block_rows || column < 0 || column >= 64 * schedule.block_words) return false;
  return schedule.blocks[row * schedule.block_words + column / 64] >> (column % 64) & 1;
}

bool key_subset_keeps(const TileSchedule& schedule, int64_t p, int64_t j) {
  if (j >= kKeyTile * schedule.key_words || (schedule.causal && j > p)) return false;
  return schedule.keys[j / 64] >> (j % 64) & 1;
}

// Segments one after the other. Sums of distances in double, which no boundary overflows.
bool segments_keep(const TileSchedule& schedule, int64_t p, int64_t j) {
  for (int64_t s = 0; s < schedule.segments; ++s) {
    const int64_t start = schedule.boundaries[s], end = schedule.boundaries[s + 1];
    if (p < start || p >= end || j < start || j >= end || p - j < -schedule.right) continue;
    return p - j < schedule.window_size || static_cast<double>(j) - start < static_cast<double>(schedule.segment_sinks);
  }
  return false;
}

bool lambda_keeps(const TileSchedule& schedule, int64_t p, int64_t j) {
  return p - j >= -schedule.right && (p - j < schedule.window_size || j < schedule.sink_size);
}

int64_t tree_depth(const TileSchedule& schedule, int64_t node) {
  const int64_t parent = schedule.tree[node * (2 + schedule.tree_words)];
  return parent < 0 ? 0 : tree_depth(schedule, parent) + 1;
}

// The tree from its parents.
bool tree_keeps(const TileSchedule& schedule, int64_t p, int64_t j) {
  const int64_t start = schedule.tree_start, last = start + schedule.tree_nodes;
  if (j > p) return false;
  int64_t from = p, to = j;
  if (p >= start && p < last) from = start + tree_depth(schedule, p - start);
  if (j >= start && p < last) {
    int64_t node = p - start;
    while (node > j - start) node = schedule.tree[node * (2 + schedule.tree_words)];
    if (node != j - start) return false;
    to = start + tree_depth(schedule, j - start);
  }
  return from - to < schedule.window_size || to < schedule.sink_size;
}

bool agrees(const TileSchedule& schedule, int64_t p, int64_t j, bool kept) {
  switch (schedule.kind) {
    case pycore::ScheduleKind::kBlocks: return kept == block_keeps(schedule, p, j);
    case pycore::ScheduleKind::kKeySubset: return kept == key_subset_keeps(schedule, p, j);
    case pycore::ScheduleKind::kTree: return kept == tree_keeps(schedule, p, j);
    case pycore::ScheduleKind::kLambda: return kept == lambda_keeps(schedule, p, j);
    case pycore::ScheduleKind::kSegments: return kept == segments_keep(schedule, p, j);
    default: return true;
  }
}

void check_places(const TileSchedule& schedule) {
  for (int64_t p = -10; p < kKeys; ++p) {
    const int64_t node = p - schedule.tree_start;
    const bool in_tree = schedule.kind == pycore::ScheduleKind::kTree && node >= 0 && node < schedule.tree_nodes;
    const int64_t place = in_tree ? schedule.tree_start + tree_depth(schedule, node) : p;
    expect(schedule.place(p) == place, "place", schedule, p, p, 0);
    expect(p < 0 || place == p || !schedule.in_place(p / kKeyTile), "in_place", schedule, p, p, p / kKeyTile);
  }
}

// Whether `cover` promises to know a tile that all rows keep whole, so that no mask is computed for it.
bool covers_all(const TileSchedule& schedule) {
  switch (schedule.kind) {
    case pycore::ScheduleKind::kBlocks: return schedule.sink_size == 0;  // else a tile may be part sinks, part blocks
    case pycore::ScheduleKind::kSegments: return schedule.segment_sinks == 0;  // the same
    case pycore::ScheduleKind::kLambda:
    case pycore::ScheduleKind::kTree: return false;
    default: return true;
  }
}

void check(const TileSchedule& schedule, int64_t p_lo, int64_t p_hi) {
  for (int64_t tile = 0; tile < kTiles; ++tile) {
    const int64_t count = kept(schedule, p_lo, p_hi, tile), all = (p_hi - p_lo + 1) * kKeyTile;
    const Cover cover = schedule.cover(p_lo, p_hi, tile);
    expect(cover != Cover::kNone || count == 0, "cover says none", schedule, p_lo, p_hi, tile);
    expect(cover != Cover::kAll || count == all, "cover says all", schedule, p_lo, p_hi, tile);
    expect(cover == Cover::kAll || count < all || !covers_all(schedule), "cover misses all", schedule, p_lo, p_hi,
           tile);
    for (int64_t p = p_lo; p <= p_hi; ++p) {
      const uint64_t bits = schedule.keep_bits(p, tile);
      for (int64_t c = 0; c < kKeyTile; ++c) {
        expect((bits >> c & 1) == schedule.keeps(p, tile * kKeyTile + c), "keep_bits", schedule, p, p, tile);
        expect(agrees(schedule, p, tile * kKeyTile + c, bits >> c & 1), "keep_bits by definition", schedule, p, p,
               tile);
      }
      expect((bits & ~schedule.reach_bits(p_lo, p_hi, tile)) == 0, "reach_bits", schedule, p_lo, p_hi, tile);
      expect(!schedule.keep_alike(p_lo, p_hi, tile) || bits == schedule.keep_bits(p_lo, tile), "keep_alike", schedule,
             p_lo, p_hi, tile);
    }
    // Segments are exact: no key that nobody keeps is read, and no tile without a kept one.
    if (schedule.kind == pycore::ScheduleKind::kSegments) {
      uint64_t any = 0;
      for (int64_t p = p_lo; p <= p_hi; ++p) any |= schedule.keep_bits(p, tile);
      expect(schedule.reach_bits(p_lo, p_hi, tile) == any, "reach_bits of segments", schedule, p_lo, p_hi, tile);
      expect(count > 0 || cover == Cover::kNone, "cover misses none", schedule, p_lo, p_hi, tile);
    }
    for (int64_t p = p_lo; p <= p_hi; ++p) {
      for (int64_t j = std::max(p + schedule.ahead() + 1, tile * kKeyTile); j < (tile + 1) * kKeyTile; ++j) {
        expect(!schedule.keeps(p, j), "ahead", schedule, p, p, tile);
      }
    }
    int64_t lo, hi;
    schedule.query_range(tile, &lo, &hi);
    expect(p_lo >= lo || kept(schedule, p_lo, std::min(p_hi, lo - 1), tile) == 0, "query_range's lo", schedule, p_lo,
           p_hi, tile);
    expect(p_hi <= hi || kept(schedule, std::max(p_lo, hi + 1), p_hi, tile) == 0, "query_range's hi", schedule, p_lo,
           p_hi, tile);
    // next_tile steps over nothing that is kept, and forward.
    const int64_t next = schedule.next_tile(p_lo, p_hi, tile);
    expect(next >= tile, "next_tile goes back", schedule, p_lo, p_hi, tile);
    for (int64_t t = tile; t < std::min(next, kTiles); ++t) {
      expect(kept(schedule, p_lo, p_hi, t) == 0, "next_tile skips", schedule, p_lo, p_hi, t);
    }
  }
}

// The boundaries, the bitmap and the nodes of the schedule last drawn.
std::vector<int64_t> boundaries, nodes;
std::vector<uint64_t> blocks;

// On a device nobody checks boundaries: of any numbers in any order, every function ends and overflows nothing.
void check_any_boundaries() {
  TileSchedule schedule;
  schedule.kind = pycore::ScheduleKind::kSegments;
  boundaries.resize(draw(1, 6));
  const int64_t ends[] = {INT64_MIN, INT64_MIN + 1, -pycore::kFar, INT64_MAX, INT64_MAX - 1, pycore::kFar, 0};
  for (int64_t& boundary : boundaries) boundary = draw(0, 1) ? ends[draw(0, 6)] : draw(-70, kKeys + 70);
  schedule.boundaries = boundaries.data();
  schedule.segments = static_cast<int64_t>(boundaries.size()) - 1;
  schedule.right = draw(0, 1) ? 0 : draw(0, 1) ? pycore::kFar : 70;
  if (draw(0, 1)) schedule.window_size = draw(1, 100);
  if (draw(0, 1)) schedule.segment_sinks = draw(0, 1) ? pycore::kFar : 9;
  const int64_t p_lo = draw(-70, kKeys - 1), p_hi = p_lo + draw(0, 95);
  for (int64_t tile = 0; tile < kTiles; ++tile) {
    int64_t lo, hi;
    schedule.query_range(tile, &lo, &hi);
    expect(lo >= -2 * pycore::kFar && hi <= pycore::kFar, "query_range", schedule, p_lo, p_hi, tile);
    if (schedule.reach_bits(p_lo, p_hi, tile) != 0) schedule.cover(p_lo, p_hi, tile);
    expect(schedule.next_tile(p_lo, p_hi, tile) >= tile, "next_tile of any boundaries", schedule, p_lo, p_hi, tile);
    for (int64_t j = tile * kKeyTile; j < (tile + 1) * kKeyTile; ++j) {
      expect(!schedule.keeps(p_lo, j) || j - p_lo <= schedule.right, "keeps of any boundaries", schedule, p_lo, p_hi,
             tile);
    }
  }
}

// Tiles a walk visits for one tile of queries.
int64_t visited(const TileSchedule& schedule, int64_t p_lo, int64_t p_hi) {
  int64_t count = 0;
  const int64_t tiles = (p_hi + std::min(schedule.right, 10 * kKeyTile)) / kKeyTile + 1;
  for (int64_t tile = schedule.next_tile(p_lo, p_hi, 0); tile < tiles;
       tile = schedule.next_tile(p_lo, p_hi, tile + 1)) {
    expect(schedule.cover(p_lo, p_hi, tile) != Cover::kNone, "a walk visits a tile for nothing", schedule, p_lo, p_hi,
           tile);
    ++count;
  }
  return count;
}

// The tiles of positions lo..hi.
int64_t tiles_of(int64_t lo, int64_t hi) { return hi / kKeyTile - lo / kKeyTile + 1; }

TileSchedule random_schedule() {
  TileSchedule schedule;
  schedule.kind = static_cast<pycore::ScheduleKind>(draw(0, 7));
  if (schedule.kind == pycore::ScheduleKind::kPrefix) {
    schedule.prefix = draw(0, 5) == 0 ? pycore::kFar : draw(0, kKeys + 70);
  }
  if (schedule.kind == pycore::ScheduleKind::kSegments) {
    boundaries.resize(draw(1, 9));
    for (int64_t& boundary : boundaries) {
      boundary = draw(0, 1) ? draw(-70, kKeys + 70) : draw(-1, kTiles) * kKeyTile + draw(-1, 1);
    }
    std::sort(boundaries.begin(), boundaries.end());
    schedule.boundaries = boundaries.data();
    schedule.segments = static_cast<int64_t>(boundaries.size()) - 1;
    for (int64_t& boundary : boundaries) {
      if (draw(0, 40) == 0) boundary = draw(0, 1) ? INT64_MIN : INT64_MAX;
    }
    std::sort(boundaries.begin(), boundaries.end());
    const int64_t sizes[] = {0, 1, 63, 64, 65, draw(0, 200), pycore::kFar};
    schedule.right = sizes[draw(0, 1) ? 0 : draw(0, 6)];
    if (draw(0, 1)) schedule.window_size = std::max<int64_t>(sizes[draw(0, 6)], 1);
    if (draw(0, 1)) schedule.segment_sinks = sizes[draw(0, 6)];
  }
  if (schedule.kind == pycore::ScheduleKind::kBlocks) {
    schedule.block_shift = draw(4, 9);
    const int64_t last = (kKeys - 1) >> schedule.block_shift;
    schedule.block_row0 = draw(-2, last);
    schedule.block_column0 = draw(0, 3) ? 0 : draw(0, last);
    schedule.block_rows = draw(1, last + 3);
    schedule.block_words = draw(1, 2);
    schedule.sink_size = draw(0, 1) ? 0 : draw(0, 150);
    blocks.resize(schedule.block_rows * schedule.block_words);
    for (uint64_t& word : blocks) {
      word = 0;
      for (int bit = 0; bit < 64; ++bit) word |= static_cast<uint64_t>(draw(0, 2) == 0) << bit;
    }
    schedule.blocks = blocks.data();
  }
  if (schedule.kind == pycore::ScheduleKind::kKeySubset) {
    schedule.causal = draw(0, 1);
    schedule.key_words = draw(0, kTiles + 1);
    blocks.resize(schedule.key_words);
    for (uint64_t& word : blocks) word = draw(0, 2) == 0 ? 0 : draw(0, 3) == 0 ? ~uint64_t{0} : engine() & engine();
    schedule.keys = blocks.data();
  }
  if (schedule.kind == pycore::ScheduleKind::kTree) {
    schedule.tree_nodes = draw(0, 3) == 0 ? draw(0, 3) * 64 : draw(0, 260);
    schedule.tree_words = (schedule.tree_nodes + 63) / 64;
    schedule.tree_start = kKeys - schedule.tree_nodes - draw(0, 100);
    const int64_t row = 2 + schedule.tree_words;
    nodes.assign(schedule.tree_nodes * row, 0);
    schedule.tree = nodes.data();
    for (int64_t t = 0; t < schedule.tree_nodes; ++t) {
      const int64_t parent = draw(0, 1) ? t - 1 : draw(-1, t - 1);
      if (parent >= 0) std::copy_n(&nodes[parent * row], row, &nodes[t * row]);
      nodes[t * row] = parent;
      nodes[t * row + 1] = parent < 0 ? 0 : nodes[parent * row + 1] + 1;
      nodes[t * row + 2 + t / 64] |= static_cast<int64_t>(uint64_t{1} << (t % 64));
    }
    check_places(schedule);
  }
  const bool tree = schedule.kind == pycore::ScheduleKind::kTree;
  if (schedule.kind != pycore::ScheduleKind::kLambda && (!tree || draw(0, 1))) return schedule;
  const int64_t sizes[] = {0, 1, 63, 64, 65, 128, draw(0, 200), kKeys, pycore::kFar};
  schedule.sink_size = sizes[draw(0, 8)];
  schedule.window_size = std::max<int64_t>(sizes[draw(0, 8)], 1);
  if (!tree && draw(0, 1)) schedule.right = sizes[draw(0, 8)];
  return schedule;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  for (int i = 0; i < (quick ? 3000 : 20000); ++i) {
    const int64_t p_lo = draw(-70, kKeys - 1);
    check(random_schedule(), p_lo, std::min(p_lo + draw(0, draw(0, 1) ? 5 : 95), kKeys - 1));
  }
  for (int i = 0; i < (quick ? 3000 : 20000); ++i) check_any_boundaries();
  // The cost of Λ, and of a window on both sides: a tile of queries visits the sinks' tiles and the window's, however
  // far it stands.
  TileSchedule schedule;
  schedule.kind = pycore::ScheduleKind::kLambda;
  schedule.sink_size = 16;
  schedule.window_size = 512;
  for (int64_t p = 4096; p < int64_t{1} << 50; p = p * 3 + 1) {
    const int64_t tiles = visited(schedule, p, p + 95);
    expect(tiles <= 1 + (512 + 95) / kKeyTile + 2, "Λ visits too many tiles", schedule, p, p + 95, tiles);
    TileSchedule both = schedule;
    both.right = 200;
    const int64_t on_both_sides = visited(both, p, p + 95);
    expect(on_both_sides == 1 + tiles_of(p - 511, p + 95 + 200), "Λ visits other tiles on both sides", both, p, p + 95,
           on_both_sides);
  }
  // That of a window inside segments: the tiles of the window, those of its segment's sinks, and no other segment's.
  for (int64_t p = 4096; p < int64_t{1} << 50; p = p * 3 + 1) {
    for (const int64_t right : {int64_t{0}, int64_t{200}}) {
      TileSchedule packed;
      packed.kind = pycore::ScheduleKind::kSegments;
      boundaries = {0, p - 3000, p - 3000, p + 96, p + 96, p + 9000};
      packed.boundaries = boundaries.data();
      packed.segments = 5;
      packed.window_size = 512;
      packed.right = right;
      const int64_t without = visited(packed, p, p + 95);
      expect(without == tiles_of(p - 511, p + 95), "a window visits other tiles", packed, p, p + 95, without);
      packed.segment_sinks = 16;
      const int64_t with = visited(packed, p, p + 95);
      expect(with == without + tiles_of(p - 3000, p - 3000 + 15), "sinks of a segment visit other tiles", packed, p,
             p + 95, with);
      // Rows of two segments: the second one's see nothing of the first.
      const int64_t two = visited(packed, p + 80, p + 110);
      expect(two == tiles_of(p - 3000, p - 3000 + 15) + tiles_of(p + 80 - 511, p + 110 + right),
             "rows of two segments visit other tiles", packed, p + 80, p + 110, two);
    }
  }
  return 0;
}
