// SPDX-License-Identifier: Apache-2.0
// How attention is cut into items of work, and in which order threads claim them. Nothing here decides a bit of the
// result: every reduction is cut by position inside the kernels.
//
// Threads claim the next item when they are done with one (parallel.h), so the order is what balances them: the last
// query tiles first, which cost most under a causal schedule, and of every query tile all heads. Whatever blocks a
// round drew, the thread that is ahead takes the next item, and the items at the end are the smallest.
#pragma once

#include <pycore/attention/attention.h>

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace pycore {

inline int64_t tiles(int64_t length, int64_t tile) { return (length + tile - 1) / tile; }

// The first tile that rows p_lo..p_hi visit in a later segment than `tile`, or kNoTile.
inline int64_t next_segment(const RowMap& map, int64_t p_lo, int64_t p_hi, int64_t tile) {
  return map.next_tile(p_lo, p_hi, (tile / kSegmentTiles + 1) * kSegmentTiles);
}

// The first `count` segments that rows p_lo..p_hi visit, or, where they visit fewer, empty ranges.
inline void list_segments(const RowMap& map, int64_t p_lo, int64_t p_hi, int64_t count, SegmentRange* segments) {
  int64_t tile = map.next_tile(p_lo, p_hi, 0);
  for (int64_t n = 0; n < count; ++n) {
    segments[n] = {0, 0};
    if (tile == kNoTile) continue;
    segments[n] = {tile / kSegmentTiles, tile / kSegmentTiles + 1};
    tile = next_segment(map, p_lo, p_hi, tile);
  }
}

constexpr int64_t kTilesPerThread = 8, kSmallForwardRows = 64;

// Whether threads that claim equal items one by one are busy for four fifths of the time.
inline bool busy(int64_t items, int64_t threads) { return tiles(items, threads) * threads * 4 <= items * 5; }

// How the forward pass is cut into items.
struct ForwardPlan {
  const AttentionParams& params;
  int64_t rows;        // query rows a tile
  int64_t tile_heads;  // heads a tile: few queries, and the heads that share a key head share its tiles too
  int64_t head_tiles, query_tiles, tiles;
  int64_t segments = 1;  // items a tile: more than one only where there are too few tiles for the threads
  int64_t slot_bytes, partial_bytes = 0;

  ForwardPlan(const AttentionParams& params, const AttentionKernels& kernels, int64_t threads) : params(params) {
    const int64_t group = params.heads / params.kv_heads;
    // Few tiles leave threads waiting for the last of them; smaller ones transpose each key tile more often.
    const int64_t large = pycore::tiles(params.query_length, kernels.forward_rows) * params.batch * params.heads;
    const bool small = threads > 1 && large < kTilesPerThread * threads && params.query_length > kSmallForwardRows;
    const int64_t most = small ? std::min(kSmallForwardRows, kernels.forward_rows) : kernels.forward_rows;
    rows = std::min(params.query_length, most);
    tile_heads = std::clamp<int64_t>(most / rows, 1, group);
    if (params.schedule.kind == ScheduleKind::kBlocks) tile_heads = 1;  // every head has blocks of its own
    head_tiles = pycore::tiles(group, tile_heads);
    query_tiles = pycore::tiles(params.query_length, rows);
    tiles = query_tiles * params.batch * params.kv_heads * head_tiles;
    slot_bytes = kernels.forward_scratch(params);
    const bool few = tiles < threads || (rows * tile_heads <= kSmallForwardRows && !busy(tiles, threads));
    if (!few || kernels.forward_merge == nullptr) return;
    partial_bytes = kernels.forward_partial(params, rows * tile_heads);
    const int64_t bitmaps = params.schedule.kind == ScheduleKind::kBlocks ? params.heads : 1;
    for (int64_t n = 0; n < params.batch * bitmaps; ++n) {
      const RowMap map = row_map(params, n / bitmaps, n % bitmaps);
      if (map.queries == 0) continue;
      int64_t count = 0, p_lo = map.query_position(0), p_hi = map.query_position(map.queries - 1);
      int64_t tile = map.next_tile(p_lo, p_hi, 0);
      for (; tile != kNoTile; ++count) tile = next_segment(map, p_lo, p_hi, tile);
      segments = std::max(segments, count);
    }
  }

  // Of a tile in segments: how many, and each one's state and place in the list of segments.
  int64_t items() const { return tiles * segments; }
  int64_t item_bytes() const { return partial_bytes + static_cast<int64_t>(sizeof(SegmentRange)); }

  QueryTile tile(int64_t index, RowMap* map) const {
    QueryTile tile;
    const int64_t group = params.heads / params.kv_heads, others = tiles / query_tiles, rest = index % others;
    tile.first = (query_tiles - 1 - index / others) * rows;
    tile.batch = rest / (params.kv_heads * head_tiles);
    tile.kv_head = rest / head_tiles % params.kv_heads;
    const int64_t head_in_group = rest % head_tiles * tile_heads;
    tile.head = tile.kv_head * group + head_in_group;
    tile.heads = std::min(tile_heads, group - head_in_group);
    *map = row_map(params, tile.batch, tile.head);
    tile.count = std::min(rows, map->queries - tile.first);
    return tile;
  }
};

// Item `item` of the backward pass over query tiles: of every head in turn, the last queries first.
inline QueryTile backward_query_tile(const AttentionParams& params, int64_t rows, int64_t item, RowMap* map) {
  const int64_t query_tiles = tiles(params.query_length, rows);
  QueryTile tile;
  tile.batch = item / (params.heads * query_tiles);
  tile.head = item / query_tiles % params.heads;
  tile.kv_head = tile.head / (params.heads / params.kv_heads);
  tile.first = (query_tiles - 1 - item % query_tiles) * rows;
  *map = row_map(params, tile.batch, tile.head);
  tile.count = std::min(rows, map->queries - tile.first);
  return tile;
}

}  // namespace pycore
