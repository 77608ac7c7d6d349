// SPDX-License-Identifier: Apache-2.0
// The Loader (../attention/row_loader.inl.h) of keys and values that lie packed in a staircase cache: codes become
// columns, and their scales go into the query and the weights (pycore/staircase/attention.h has the sums and their
// order). A tile is unpacked once for all query rows. What lies in full precision is read by a RowLoader.
#pragma once

#include <pycore/attention/rows.h>
#include <pycore/staircase/attention.h>

#include <cstdint>

#include "../attention/row_loader.inl.h"
#include "../lane_sum.inl.h"
#include "tile.h"
#include "unpack.inl.h"

struct StaircaseBuffers {
  int8_t* key_codes = nullptr;    // [D, 64]
  float* key_step = nullptr;      // [padded D], zero from D on
  float* key_base = nullptr;      // [padded D]
  float* query = nullptr;         // [6, padded D] times key_step
  int8_t* value_codes = nullptr;  // [64, groups, 64]
  float* value_step = nullptr;    // [groups, 64]
  float* value_base = nullptr;    // [groups, 64]
  float* grids = nullptr;         // [2, 64, groups]
  float* weights = nullptr;       // [6, 64] times value_step
  float* full_scores = nullptr;   // [6, 64]
  LoaderBuffers rows;

  static PYCORE_INLINE int64_t groups(const AttentionParams& params) {
    return (params.value_dim + kPackedGroup - 1) / kPackedGroup;
  }
  static PYCORE_INLINE int8_t* take_bytes(int64_t bytes, Scratch* scratch) {
    return reinterpret_cast<int8_t*>(scratch->take(bytes / static_cast<int64_t>(sizeof(float))));
  }
  PYCORE_INLINE void bind(const AttentionParams& params, Scratch* scratch) {
    const int64_t d = padded(params.head_dim);
    key_codes = take_bytes(params.head_dim * kKeyTile, scratch);
    key_step = scratch->take(d);
    key_base = scratch->take(d);
    query = scratch->take(kProductRows * d);
    value_codes = take_bytes(groups(params) * kKeyTile * kPackedGroup, scratch);
    value_step = scratch->take(groups(params) * kKeyTile);
    value_base = scratch->take(groups(params) * kKeyTile);
    grids = scratch->take(2 * groups(params) * kKeyTile);
    weights = scratch->take(kProductRows * kKeyTile);
    full_scores = scratch->take(kProductRows * kKeyTile);
    rows.bind(params, params.planes->dtype, scratch);
  }
};

// The product's block, and what a row adds to each of its elements.
struct AddToRows {
  float* c;
  int64_t c_row;
  const float* added;  // [rows]
  PYCORE_INLINE Vec start(int, int64_t) const { return Vec::zero(); }
  PYCORE_INLINE Vec start_first(int, int64_t, int64_t) const { return Vec::zero(); }
  PYCORE_INLINE void finish(int m, int64_t n, Vec x) const { (x + Vec::broadcast(added[m])).store(c + m * c_row + n); }
  PYCORE_INLINE void finish_first(int m, int64_t n, int64_t count, Vec x) const {
    (x + Vec::broadcast(added[m])).store_first(c + m * c_row + n, count);
  }
};

// The map of positions to rows of `full`.
PYCORE_INLINE RowMap full_map(const RowMap& map, int64_t sinks, int64_t ring) {
  RowMap rows = map;
  rows.sinks = rows.start = sinks;
  rows.ring = ring;
  return rows;
}

PYCORE_INLINE HeadRows full_rows_of(const StaircasePlanes& planes, const StaircaseSide& side, int64_t pair,
                                    const RowMap* map) {
  const int64_t bytes = side.channels * dtype_size(planes.dtype);
  return {planes.dtype, side.full + pair * (planes.sinks + side.full_rows) * bytes, bytes, *map};
}

class StaircaseLoader {
 public:
  PYCORE_INLINE StaircaseLoader(const AttentionParams& params, const RowMap& map, const QueryTile& queries,
                                const StaircaseBuffers& buffers)
      : params_(params),
        planes_(*params.planes),
        buffers_(buffers),
        pair_(queries.batch * planes_.kv_heads + queries.kv_head),
        newest_(map.positions() - 1),
        key_map_(full_map(map, planes_.sinks, planes_.key.full_rows)),
        value_map_(full_map(map, planes_.sinks, planes_.value.full_rows)),
        full_(params, full_rows_of(planes_, planes_.key, pair_, &key_map_),
              full_rows_of(planes_, planes_.value, pair_, &value_map_), queries.rows(), buffers.rows) {}

  PYCORE_INLINE void load(const KeyTile& tile) {
    const StaircaseTile keys(planes_, false, pair_, tile.index, newest_);
    const StaircaseTile values(planes_, true, pair_, tile.index, newest_);
    const uint64_t sinks = tile_bits(tile.index * kKeyTile, 0, planes_.sinks);
    full_key_bits_ = keys.bits == 16 ? ~uint64_t{0} : sinks;
    full_value_bits_ = values.bits == 16 ? ~uint64_t{0} : sinks;
    const uint64_t full = tile.present & (full_key_bits_ | full_value_bits_);
    if (full) full_.load({tile.index, full, true, false});
    if (tile.present & ~full_key_bits_) unpack_keys(keys);
    if (tile.present & ~full_value_bits_) unpack_values(values, tile.present & ~full_value_bits_);
  }

  PYCORE_INLINE void score(int64_t rows, const float* query, int64_t query_row, int64_t begin, int64_t end,
                           float* scores) const {
    const uint64_t columns = bit_range(begin, end);
    if ((columns & ~full_key_bits_) == 0) return full_.score(rows, query, query_row, begin, end, scores);
    const int64_t d = padded(params_.head_dim);
    float added[kProductRows];
    for (int64_t m = 0; m < rows; ++m) {
      const float* x = query + m * query_row;
      for (int64_t c = 0; c < d; c += Vec::kWidth) {
        (Vec::load(x + c) * Vec::load(buffers_.key_step + c)).store(buffers_.query + m * d + c);
      }
      // lane_dot, but that what pads the query is anything, and not a number perhaps.
      LaneSum sum = LaneSum::zero();
      sum.fold(0, d, [&](int64_t c, Vec lanes) __attribute__((always_inline)) {
        const Vec part = load_lanes(x + c, smaller(params_.head_dim - c, Vec::kWidth));
        return Vec::fma(part, Vec::load(buffers_.key_base + c), lanes);
      });
      added[m] = sum.total();
    }
    tile_product<false>(rows, params_.head_dim, buffers_.query, d, buffers_.key_codes, kKeyTile, begin, end,
                        AddToRows{scores, kKeyTile, added});
    if ((columns & full_key_bits_) == 0) return;
    const int64_t last = round_up(64 - __builtin_clzll(full_key_bits_), Vec::kWidth), until = smaller(end, last);
    full_.score(rows, query, query_row, begin, until, buffers_.full_scores);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t c = begin; c < until; c += Vec::kWidth) {
        const int64_t at = m * kKeyTile + c;
        const Vec packed = Vec::load(scores + at);
        Vec::load(buffers_.full_scores + at).select(full_key_bits_ >> c, packed).store(scores + at);
      }
    }
  }
  // There is no rotation here, and so no limit.
  PYCORE_INLINE void score_far(int64_t, const float*, int64_t, int64_t, int64_t, float*) const {}

  PYCORE_INLINE void accumulate(int64_t rows, const BlockKeeps& keeps, const float* weights, float* out,
                                int64_t out_row) const {
    BlockKeeps full, packed;
    for (int m = 0; m < rows; ++m) {
      full.set(m, keeps.bits[m] & full_value_bits_);
      packed.set(m, keeps.bits[m] & ~full_value_bits_);
    }
    if (full.any) full_.accumulate(rows, full, weights, out, out_row);
    if (packed.any == 0) return;
    const int64_t stride = StaircaseBuffers::groups(params_) * kPackedGroup;
    for (int64_t g = 0; g < StaircaseBuffers::groups(params_); ++g) {
      const int64_t first = g * kPackedGroup, count = smaller(kPackedGroup, params_.value_dim - first);
      float added[kProductRows];
      for (int64_t m = 0; m < rows; ++m) added[m] = fold_weights(weights + m * kKeyTile, g, packed.bits[m], m);
      accumulate_kept<false>(rows, packed, buffers_.weights, kKeyTile, buffers_.value_codes + first, stride, count,
                             out + first, out_row);
      for (int64_t m = 0; m < rows; ++m) {
        const Vec base = Vec::broadcast(added[m]);
        float* const row = out + m * out_row + first;
        for (int64_t c = 0; c < count; c += Vec::kWidth) {
          const int64_t lanes = smaller(count - c, Vec::kWidth);
          store_lanes(load_lanes(row + c, lanes) + base, row + c, lanes);
        }
      }
    }
  }

  PYCORE_INLINE bool prefetches() const { return false; }
  PYCORE_INLINE void prefetch(int64_t) const {}

 private:
  // buffers.weights of row m: times the steps of group g. The sum of weights times bases.
  PYCORE_INLINE float fold_weights(const float* weights, int64_t g, uint64_t kept, int64_t m) const {
    const float *step = buffers_.value_step + g * kKeyTile, *base = buffers_.value_base + g * kKeyTile;
    float* const scaled = buffers_.weights + m * kKeyTile;
    LaneSum sum = LaneSum::zero();
    sum.fold(0, kKeyTile, [&](int64_t c, Vec lanes) __attribute__((always_inline)) {
      const Vec weight = Vec::load(weights + c).select(kept >> c, Vec::zero());
      (weight * Vec::load(step + c)).store(scaled + c);
      return Vec::fma(weight, Vec::load(base + c), lanes);
    });
    return sum.total();
  }

  PYCORE_INLINE void unpack_keys(const StaircaseTile& tile) {
    const int64_t channels = params_.head_dim;
    load_grids(tile, channels, buffers_.key_step, buffers_.key_base);
    int8_t* const codes = buffers_.key_codes;
    const Planes planes(tile);
    with_depth(tile.depth, [=](int32_t depth) __attribute__((always_inline)) {
      for (int64_t d = 0; d < channels; ++d) {
        planes.prefetch(d * (kPackedGroup / 4), depth);
        unpack_codes(planes.first, d * (kPackedGroup / 4), depth, codes + d * kKeyTile);
      }
    });
  }

  PYCORE_INLINE void unpack_values(const StaircaseTile& tile, uint64_t present) {
    const int64_t groups = StaircaseBuffers::groups(params_);
    float *const step = buffers_.grids, *const base = step + groups * kKeyTile;
    load_grids(tile, groups * kKeyTile, step, base);
    if (groups == 2) {  // with a constant, the compiler makes shuffles of it
      by_group(step, base, 2, present);
    } else {
      by_group(step, base, groups, present);
    }
    const int64_t whole = params_.value_dim / kPackedGroup, rest = params_.value_dim % kPackedGroup;
    const int64_t token = token_plane_bytes(tile.side, kPackedGroup, 0);
    int8_t* const codes = buffers_.value_codes;
    const Planes planes(tile);
    with_depth(tile.depth, [=](int32_t depth) __attribute__((always_inline)) {
      for (uint64_t left = present; left; left &= left - 1) {
        const int64_t t = __builtin_ctzll(left);
        int8_t* const out = codes + t * groups * kPackedGroup;
        for (int64_t g = 0; g < whole; ++g) {
          const int64_t offset = t * token + g * (kPackedGroup / 4);
          planes.prefetch(offset, depth);
          unpack_codes(planes.first, offset, depth, out + g * kPackedGroup);
        }
      }
    });
    for (uint64_t left = rest ? present : 0; left; left &= left - 1) {
      const int64_t t = __builtin_ctzll(left), offset = tile.offset(t, whole);
      int8_t* const out = codes + (t * groups + whole) * kPackedGroup;
      for (int64_t c = 0; c < rest; ++c) out[c] = static_cast<int8_t>(tile.code(offset, rest, c));
    }
  }

  // From a token's groups side by side to a group's tokens. What an absent token's bytes say is not looked at.
  PYCORE_INLINE void by_group(const float* step, const float* base, int64_t groups, uint64_t present) {
    for (int64_t g = 0; g < groups; ++g) {
      float *const steps = buffers_.value_step + g * kKeyTile, *const bases = buffers_.value_base + g * kKeyTile;
      for (int64_t t = 0; t < kKeyTile; ++t) {
        steps[t] = step[t * groups + g];
        bases[t] = base[t * groups + g];
      }
      for (int64_t t = 0; t < kKeyTile; t += Vec::kWidth) {
        Vec::load(steps + t).select(present >> t, Vec::zero()).store(steps + t);
        Vec::load(bases + t).select(present >> t, Vec::zero()).store(bases + t);
      }
    }
  }

  // A copy, which the compiler knows that writing codes does not change.
  struct Planes {
    const uint8_t* first[kStaircasePlanes];
    int64_t bytes[kStaircasePlanes];  // of a tile
    explicit PYCORE_INLINE Planes(const StaircaseTile& tile) {
      for (int k = 0; k < kStaircasePlanes; ++k) {
        first[k] = k < tile.depth ? tile.planes[k] : nullptr;
        bytes[k] = tile_plane_bytes(tile.side, kPackedGroup, k);
      }
    }
    // Of the tile behind this one, what lies where `offset` points. A tile's few kilobytes of a plane are too short a
    // run for what a processor fetches by itself. At a ring's end this names what is not wanted, which harms nothing.
    PYCORE_INLINE void prefetch(int64_t offset, int32_t depth) const {
      for (int k = 0; k < depth; ++k) __builtin_prefetch(first[k] + bytes[k] + (k == 2 ? 2 : 1) * offset, 0, 2);
    }
  };

  // f(depth), for each depth a loop of its own.
  template <class F>
  static PYCORE_INLINE void with_depth(int32_t depth, const F& f) {
    if (depth == 1) return f(1);
    if (depth == 2) return f(2);
    f(3);
  }

  // StaircaseTile::grid of groups 0 .. count - 1, and zeros to the end of a vector.
  PYCORE_INLINE void load_grids(const StaircaseTile& tile, int64_t count, float* step, float* middle) const {
    switch (planes_.dtype) {
      case DType::kBFloat16: return load_grids_as<DType::kBFloat16>(tile, count, step, middle);
      case DType::kFloat16: return load_grids_as<DType::kFloat16>(tile, count, step, middle);
      default: return load_grids_as<DType::kFloat32>(tile, count, step, middle);
    }
  }
  template <DType kType>
  static PYCORE_INLINE void load_grids_as(const StaircaseTile& tile, int64_t count, float* step, float* middle) {
    const bool minmax = tile.side.grid == StaircaseGrid::kMinMax;
    const Vec cells = Vec::broadcast(static_cast<float>((1 << tile.bits) - 1));
    const Vec cell = Vec::broadcast(1.0f / static_cast<float>(1 << tile.bits));
    const Vec half = Vec::broadcast(static_cast<float>(tile.half()));
    for (int64_t g = 0; g < count; g += Vec::kWidth) {
      const int64_t lanes = smaller(count - g, Vec::kWidth);
      const Vec low = load_some<kType>(tile.lo, g, lanes), range = load_some<kType>(tile.hi, g, lanes) - low;
      const Vec width = minmax ? range / cells : range * cell;
      Vec centre = Vec::broadcast(minmax ? 0.0f : static_cast<float>(kMiddle) * 0x1p-8f);
      if (!minmax && tile.centers) {
        int8_t signs[Vec::kWidth] = {};
        __builtin_memcpy(signs, tile.centers + g, static_cast<size_t>(lanes));
        for (int8_t& byte : signs) byte = static_cast<int8_t>(byte ^ -128);  // less 128
        centre = (Vec::load_bytes(signs) + Vec::broadcast(128.0f)) * Vec::broadcast(0x1p-8f);
      }
      width.store(step + g);
      (low + (half + centre) * width).store(middle + g);
    }
  }

  const AttentionParams& params_;
  const StaircasePlanes& planes_;
  const StaircaseBuffers& buffers_;
  const int64_t pair_, newest_;
  const RowMap key_map_, value_map_;
  RowLoader full_;
  uint64_t full_key_bits_ = 0, full_value_bits_ = 0;
};
