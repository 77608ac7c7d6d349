// SPDX-License-Identifier: Apache-2.0
// What the kernels that work in tiles share: which tiles a block visits, how rows come to shared memory and are turned
// there, what is done about numbers that are not finite, and a logit.
#pragma once

#include "attention_fragments.cuh"

namespace pycore {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLog2ELow = 1.9259629911266175e-8f, kLn2 = 0.6931471805599453f;

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

template <class T>
struct alignas(2 * sizeof(T)) TwoOf {
  T x[2];
};

// Rows first, first + step, … of `count` (an even number of them), by one warp, turned by distance_of(r). Channels
// that do not turn are copied. Two rows at a time, whose loads do not wait for each other.
template <class T, int kChannels, class DistanceOf>
__device__ void turn_rows(const AttentionParams& params, const T* rows, T* turned, int first, int count, int step,
                          DistanceOf distance_of) {
  constexpr int kStride = row_stride<T>(kChannels), kTogether = 2;
  const int half = static_cast<int>(params.rope_dim / 2), lane = threadIdx.x % kLanes;
  const auto* cosines = static_cast<const float*>(params.rope_cos);
  const auto* sines = static_cast<const float*>(params.rope_sin);
  PYCORE_UNROLL_BY(1)
  for (int r = first; r < count; r += kTogether * step) {
    int64_t place[kTogether];
    bool back[kTogether];
    PYCORE_UNROLL
    for (int a = 0; a < kTogether; ++a) {
      const int64_t distance = distance_of(r + a * step);
      back[a] = distance < 0;
      // In bounds whatever the caller's lengths say.
      place[a] = clamped(distance < 0 ? -distance : distance, 0, params.rope_rows - 1) * params.rope_stride;
    }
    // A lane takes two pairs of a row at a time, side by side in both halves or in one, where their number is even.
    const bool two = half % 2 == 0, side_by_side = params.rope_interleaved;
    PYCORE_UNROLL_BY(1)
    for (int i = two ? 2 * lane : lane; i < half && params.rope_rows > 0; i += two ? 2 * kLanes : kLanes) {
      const int low = side_by_side ? 2 * i : i, high = !side_by_side ? half + i : two ? 2 * i + 2 : 2 * i + 1;
      float x[kTogether][2], y[kTogether][2], cosine[kTogether][2], sine[kTogether][2];
      PYCORE_UNROLL
      for (int a = 0; a < kTogether; ++a) {
        const T* row = rows + (r + a * step) * kStride;
        if (two) {
          const TwoOf<T> first = *reinterpret_cast<const TwoOf<T>*>(row + low);
          const TwoOf<T> second = *reinterpret_cast<const TwoOf<T>*>(row + high);
          x[a][0] = to_float(first.x[0]);
          x[a][1] = to_float(side_by_side ? second.x[0] : first.x[1]);
          y[a][0] = to_float(side_by_side ? first.x[1] : second.x[0]);
          y[a][1] = to_float(second.x[1]);
        } else {
          x[a][0] = to_float(row[low]);
          y[a][0] = to_float(row[high]);
        }
        PYCORE_UNROLL
        for (int k = 0; k < 2; ++k) {
          if (k == 1 && !two) continue;
          cosine[a][k] = cosines[place[a] + i + k];
          sine[a][k] = back[a] ? -sines[place[a] + i + k] : sines[place[a] + i + k];
        }
      }
      PYCORE_UNROLL
      for (int a = 0; a < kTogether; ++a) {
        T* row = turned + (r + a * step) * kStride;
        T one[2], other[2];
        PYCORE_UNROLL
        for (int k = 0; k < 2; ++k) {
          if (k == 1 && !two) continue;
          one[k] = from_float<T>(fmaf(x[a][k], cosine[a][k], -(y[a][k] * sine[a][k])));
          other[k] = from_float<T>(fmaf(y[a][k], cosine[a][k], x[a][k] * sine[a][k]));
        }
        if (two) {
          *reinterpret_cast<TwoOf<T>*>(row + low) = {{one[0], side_by_side ? other[0] : one[1]}};
          *reinterpret_cast<TwoOf<T>*>(row + high) = {{side_by_side ? one[1] : other[0], other[1]}};
        } else {
          row[low] = one[0];
          row[high] = other[0];
        }
      }
    }
    if (turned == rows) continue;
    for (int a = 0; a < kTogether; ++a) {
      for (int c = 2 * half + lane; c < kChannels; c += kLanes) {
        turned[(r + a * step) * kStride + c] = rows[(r + a * step) * kStride + c];
      }
    }
  }
}

// 64 bits in two registers, asked at places the compiler knows.
struct RowBits {
  uint32_t low, high;

  __device__ explicit RowBits(uint64_t bits)
      : low(static_cast<uint32_t>(bits)), high(static_cast<uint32_t>(bits >> 32)) {}
  __device__ bool at(int place) const { return (place < 32 ? low >> place : high >> (place - 32)) & 1; }
};

// Which of two passes a tile takes, where pairs beyond the distance limit are turned otherwise than those within.
template <bool kOptions>
struct TurnPasses {
  bool far = false, near = true;

  __device__ TurnPasses(const AttentionParams& params, const RowMap& map, int64_t p_lo, int64_t p_hi, int64_t tile) {
    if (!kOptions || params.rope_cos == nullptr) return;
    const bool tree = map.schedule.kind == ScheduleKind::kTree;  // whose places are in no order
    const int64_t first = tile * kKeyTile, limit = params.distance_limit;
    far = limit < kFar && (tree || p_hi - first > limit);
    near = !far || tree || p_lo - (first + kKeyTile - 1) <= limit;
  }
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

// 0 times what is not finite would reach rows of a product that have nothing to do with it. So where pairs are left
// out, such numbers are taken out of the tile before it is multiplied with weights, and the rows that do keep them get
// them by hand.
//
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

// each(word, row, first channel) for the words of a tile; all threads.
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

// Base-2 logits where they take only the score and a distance: a row's against a tile whose keys stand in place.
struct DistanceLogits {
  const float* table = nullptr;  // distance_bias of the head
  float scale, cap, alibi = 0;
  int distance, limit, last = 0;  // to the tile's first key; the distance limit; the table's last entry

  static constexpr int64_t kMost = int64_t{1} << 30;
  // float32 bends by the C library's tanh, one pair at a time.
  template <class T>
  static __device__ bool apply(const AttentionParams& params, const TileSchedule& schedule, int64_t tile) {
    return (params.softcap == 0 || sizeof(T) == 2) && params.block_bias == nullptr && schedule.in_place(tile);
  }
  __device__ DistanceLogits(const AttentionParams& params, int64_t h, int64_t distance)
      : scale(static_cast<float>(params.scale)),
        cap(static_cast<float>(params.softcap)),
        distance(static_cast<int>(clamped(distance, -kMost, kMost))),
        limit(static_cast<int>(clamped(params.distance_limit, 0, kMost))) {
    if (params.distance_bias) {
      table = static_cast<const float*>(params.distance_bias) + h * params.bias_stride;
      last = static_cast<int>(clamped(params.bias_length - 1, 0, kMost));
    } else if (params.alibi_slopes) {
      alibi = static_cast<const float*>(params.alibi_slopes)[h];
    }
  }
  // *slope is the natural logit's derivative.
  __device__ float base2(int column, float product, float* slope) const {
    int seen = distance - column;
    seen = seen < 0 ? 0 : seen < limit ? seen : limit;
    const float bias = table ? table[seen < last ? seen : last] : -alibi * static_cast<float>(seen);
    *slope = scale;
    float logit = product * scale;
    if (cap > 0) {
      // tanh(x) = 1 - 2 / (e^2x + 1), within a few units of 2^-24 of 1.
      const float bent = 1 - 2 * reciprocal_approx(exp2_approx(logit * (2 * kLog2E * (1 / cap))) + 1);
      logit = cap * bent;
      *slope *= 1 - bent * bent;
    }
    return (logit + bias) * kLog2E;
  }
};

}  // namespace
}  // namespace pycore
