// SPDX-License-Identifier: Apache-2.0
// Which tiles a block of threads visits, how their rows come to shared memory, and which pairs are kept.
#pragma once

#include "fragments.cuh"

namespace pycore {
namespace {

// A tile to visit: of keys, or, where a block holds keys, of queries.
struct VisitedTile {
  int64_t index = kNoTile;
  uint64_t bits = 0;    // rows outside of which nothing is kept; others are not read
  bool masked = false;  // whether a pair of its rows and the block's own may be left out

  __device__ bool any() const { return index != kNoTile; }
  __device__ int64_t segment() const { return index / kSegmentTiles; }
};

// Of as many consecutive tiles as the block has threads, which are visited. Each thread looks at one; alone and one by
// one, a thread would keep all the others waiting.
template <int kThreads>
struct TileList {
  int64_t first;
  uint32_t any[kThreads / kLanes], masked[kThreads / kLanes];
  uint64_t bits[kThreads];

  // Before anything else, by one thread, with a barrier after it.
  __device__ void open() { first = -kThreads; }

  // The first tile >= index in the list.
  __device__ VisitedTile find(int64_t index) const {
    VisitedTile tile;
    const int64_t from = index - first;
    if (from < 0 || from >= kThreads) return tile;
    uint32_t wanted = ~uint32_t{0} << (from % kLanes);
    for (int word = static_cast<int>(from / kLanes); word < kThreads / kLanes; ++word, wanted = ~uint32_t{0}) {
      const uint32_t found = any[word] & wanted;
      if (found == 0) continue;
      const int bit = __ffs(static_cast<int>(found)) - 1, place = word * kLanes + bit;
      tile.index = first + place;
      tile.bits = bits[place];
      tile.masked = masked[word] >> bit & 1;
      return tile;
    }
    return tile;
  }
  // The list of the tiles from `index` on; look(tile) says what to do with one. All threads, between barriers.
  template <class Look>
  __device__ void fill(int64_t index, Look look) {
    const int thread = static_cast<int>(threadIdx.x);
    const VisitedTile tile = look(index + thread);
    const uint32_t any_here = __ballot_sync(kAllLanes, tile.any());
    const uint32_t masked_here = __ballot_sync(kAllLanes, tile.masked);
    bits[thread] = tile.bits;
    if (thread % kLanes == 0) {
      any[thread / kLanes] = any_here;
      masked[thread / kLanes] = masked_here;
    }
    if (thread == 0) first = index;
  }
};

// What rows p_lo..p_hi, none of them past the queries, do with a key tile.
__device__ inline VisitedTile look_at_keys(const RowMap& map, int64_t p_lo, int64_t p_hi, int64_t index) {
  VisitedTile tile;
  tile.bits = map.present_bits(index) & map.schedule.reach_bits(p_lo, p_hi, index);
  if (tile.bits == 0) return tile;
  const Cover cover = map.schedule.cover(p_lo, p_hi, index);
  if (cover == Cover::kNone) return tile;
  tile.index = index;
  tile.masked = tile.bits != ~uint64_t{0} || cover != Cover::kAll;
  return tile;
}

// next_key_tile where the list has come to its end. A call, as is all that is large, rarely needed and not the
// products: these hold most registers.
template <int kThreads>
__device__ __noinline__ VisitedTile list_key_tiles(TileList<kThreads>* list, const RowMap* map, int64_t p_lo,
                                                   int64_t p_hi, int64_t index, int64_t segment) {
  for (;;) {
    if (index >= list->first && index < list->first + kThreads) index = list->first + kThreads;
    index = map->next_tile(p_lo, p_hi, index);
    if (index == kNoTile || (segment >= 0 && index / kSegmentTiles != segment)) return VisitedTile();
    __syncthreads();
    list->fill(index, [&](int64_t at) {
      return segment >= 0 && at / kSegmentTiles != segment ? VisitedTile() : look_at_keys(*map, p_lo, p_hi, at);
    });
    __syncthreads();
    const VisitedTile tile = list->find(index);
    if (tile.any()) return tile;
  }
}

// The first key tile >= index that rows p_lo..p_hi visit; all threads. With a `segment` >= 0, of that segment alone.
template <int kThreads>
__device__ VisitedTile next_key_tile(TileList<kThreads>* list, const RowMap* map, int64_t p_lo, int64_t p_hi,
                                     int64_t index, int64_t segment) {
  const VisitedTile tile = list->find(index);
  return tile.any() ? tile : list_key_tiles(list, map, p_lo, p_hi, index, segment);
}

// `rows` rows of kChannels elements; row_of(r) is where row r has its `channels` elements, or null: zeros.
template <class T, int kChannels, int kThreads, class RowOf>
__device__ void load_rows(T* shared, int rows, int channels, bool aligned, const void* anywhere, RowOf row_of) {
  constexpr int kEach = 16 / static_cast<int>(sizeof(T)), kChunks = kChannels / kEach;
  PYCORE_UNROLL_BY(1)
  for (int n = threadIdx.x; n < rows * kChunks; n += kThreads) {
    const int r = n / kChunks, c = n % kChunks * kEach;
    const T* row = row_of(r);
    const int left = row == nullptr || channels < c ? 0 : channels - c < kEach ? channels - c : kEach;
    T* to = shared + r * row_stride<T>(kChannels) + c;
    if (aligned) {
      copy_async<16>(to, left > 0 ? row + c : anywhere, static_cast<int>(sizeof(T)) * left);
    } else {
      for (int k = 0; k < kEach; ++k) to[k] = k < left ? row[c + k] : T{0};
    }
  }
}

// The rows of a key tile that have a bit.
template <class T, int kChannels, int kThreads>
__device__ void load_key_rows(T* shared, const void* data, const AttentionStrides& strides, int64_t channels,
                              bool aligned, const RowMap& map, int64_t b, int64_t kv_head, const VisitedTile& tile) {
  const uint64_t bits = tile.bits;
  const T* rows = row_pointer<T>(data, strides, b, kv_head, 0);
  const int64_t base = tile.index * kKeyTile;
  if (map.contiguous(tile.index)) {
    const int64_t present = lowest_bit(bits);
    const T* first = rows + (map.key_row(base + present) - present) * strides.row;
    load_rows<T, kChannels, kThreads>(shared, kTile, static_cast<int>(channels), aligned, data,
                                      [&](int r) { return bits >> r & 1 ? first + r * strides.row : nullptr; });
  } else {
    load_rows<T, kChannels, kThreads>(shared, kTile, static_cast<int>(channels), aligned, data, [&](int r) {
      return bits >> r & 1 ? rows + map.key_row(base + r) * strides.row : nullptr;
    });
  }
}

// 64 bits in two registers, asked at places the compiler knows.
struct RowBits {
  uint32_t low, high;

  __device__ explicit RowBits(uint64_t bits)
      : low(static_cast<uint32_t>(bits)), high(static_cast<uint32_t>(bits >> 32)) {}
  __device__ bool at(int place) const { return (place < 32 ? low >> place : high >> (place - 32)) & 1; }
};

// Pairs on one side of the distance limit, or all.
enum class Turned { kFar, kNear, kAll };

// Where a row of a tile stands.
struct RowPlace {
  bool valid;
  int64_t h, p;
};

// The keys of a tile that the row at position p keeps, and of them those that dropout takes. Calls: see list_key_tiles.
template <bool kOptions>
__device__ __noinline__ uint64_t kept_keys(const AttentionParams& params, const RowMap& map, int64_t p,
                                           const VisitedTile& keys, Turned turned) {
  uint64_t bits = map.schedule.keep_bits(p, keys.index) & keys.bits;
  if (kOptions && params.rope_cos && turned != Turned::kAll) {
    const uint64_t beyond = far_bits(params, map.schedule, map.schedule.place(p), keys.index);
    bits &= turned == Turned::kFar ? beyond : ~beyond;
  }
  return bits;
}
__device__ __noinline__ uint64_t dropped_of(const AttentionParams& params, int64_t b, int64_t h, int64_t p,
                                            int64_t key_tile, uint64_t kept) {
  return dropped_keys(params, b, h, p, key_tile, kept);
}

// kept[r] for rows first .. first + count - 1: the keys of the tile that row r keeps; and dropped[r], what dropout
// takes of them. By one warp; false if no row keeps any.
template <bool kOptions, class PlaceOf>
__device__ bool mask_rows(const AttentionParams& params, const RowMap& map, int64_t b, const VisitedTile& keys,
                          Turned turned, int first, int count, uint64_t* kept, uint64_t* dropped, PlaceOf place_of) {
  bool any = false;
  __syncwarp();
  for (int r = first + static_cast<int>(threadIdx.x) % kLanes; r < first + count; r += kLanes) {
    const RowPlace row = place_of(r);
    uint64_t bits = 0;
    if (row.valid) {
      bits = kept_keys<kOptions>(params, map, row.p, keys, turned);
      if (kOptions && params.dropout_p > 0) dropped[r] = dropped_of(params, b, row.h, row.p, keys.index, bits);
    }
    kept[r] = bits;
    any |= bits != 0;
  }
  __syncwarp();
  return __ballot_sync(kAllLanes, any) != 0;
}

}  // namespace
}  // namespace pycore
