// SPDX-License-Identifier: Apache-2.0
// TileLoader: the Loader (row_loader.inl.h) of keys that lie by channel within tiles of 64 (AttentionParams::
// key_channel_stride), which is how the tile product reads them: nothing is transposed. One block of query rows reads a
// tile where it lies, in its own dtype; several share a copy in float32, and float32 needs none. Rotation goes by
// column with a table turned once per query tile, one formula with rotate(). Values are rows.
#pragma once

#include <pycore/attention/rows.h>

#include <cstdint>

#include "../few_block.inl.h"
#include "../few_columns.inl.h"
#include "../few_rows.inl.h"
#include "../kept_product.inl.h"
#include "row_loader.inl.h"

struct TileBuffers {
  float* key_columns = nullptr;  // [padded D, 64] keys in float32, rotated by place in the tile
  float* key_far = nullptr;      // [padded D, 64] keys in float32, unrotated
  float* turn_cos = nullptr;     // [padded rope_dim / 2, 64] of the key in each column
  float* turn_sin = nullptr;
  float* value_rows = nullptr;  // [64, padded Dv]

  PYCORE_INLINE void bind(const AttentionParams& params, Scratch* scratch) {
    const int64_t d = padded(params.head_dim);
    const bool rope = params.rope_cos != nullptr;
    value_rows = scratch->take(kKeyTile * padded(params.value_dim));
    if (rope || params.dtype != DType::kFloat32) key_columns = scratch->take(d * kKeyTile);
    if (!rope) return;
    if (params.dtype != DType::kFloat32) key_far = scratch->take(d * kKeyTile);
    turn_cos = scratch->take(padded(params.rope_dim / 2) * kKeyTile);
    turn_sin = scratch->take(padded(params.rope_dim / 2) * kKeyTile);
  }
};

// The keys of one key head.
struct HeadTiles {
  DType dtype;
  const char* data;  // of row 0
  int64_t tile_bytes, channel_bytes;
  int64_t ahead;      // bytes to what is asked for as a tile is read
  const RowMap& map;  // of positions to rows

  PYCORE_INLINE TileColumns at(int64_t tile) const {
    return {data + map.key_row(tile * kKeyTile) / kKeyTile * tile_bytes, channel_bytes, ahead};
  }
};

PYCORE_INLINE HeadTiles key_tiles_of(const AttentionParams& params, int64_t b, int64_t kv_head, const RowMap& map) {
  const int64_t size = dtype_size(params.dtype);
  const int64_t tile_bytes = params.key_strides.row * size, channel_bytes = params.key_channel_stride * size;
  const bool dense = channel_bytes == kKeyTile * size && tile_bytes == params.head_dim * channel_bytes;
  return {params.dtype,
          row_of(params, params.key, params.key_strides, b, kv_head, 0),
          tile_bytes,
          channel_bytes,
          dense ? ahead_of(tile_bytes) : tile_bytes,
          map};
}

class TileLoader {
 public:
  PYCORE_INLINE TileLoader(const AttentionParams& params, const HeadTiles& keys, const HeadRows& values, int64_t rows,
                           const TileBuffers& buffers)
      : params_(params), buffers_(buffers), keys_(keys), values_(values), few_(rows <= kProductRows) {}

  PYCORE_INLINE void load(const KeyTile& tile) {
    held_ = keys_.at(tile.index);
    if (few_) {
      value_rows_.fill(tile.present, values_.row_bytes,
                       [&](int64_t c) __attribute__((always_inline)) { return values_.at(tile.index * kKeyTile + c); });
    } else {
      TileRows values;
      gather_tile(values_, tile, params_.value_dim, buffers_.value_rows, &values);
      value_ = tile_matrix(values_, tile, values, params_.value_dim, buffers_.value_rows);
    }
    far_ = wide(tile.far || (params_.rope_cos == nullptr && !few_),
                params_.rope_cos ? buffers_.key_far : buffers_.key_columns);
    near_ = far_;
    if (params_.rope_cos && tile.near) {
      turn(tile.index);
      near_ = {buffers_.key_columns, kKeyTile};
    }
  }

  PYCORE_INLINE void score(int64_t rows, const float* query, int64_t query_row, int64_t begin, int64_t end,
                           float* scores) const {
    if (few_ && params_.rope_cos == nullptr) {
      return score_few_columns(keys_.dtype, rows, held_, params_.head_dim, query, query_row, begin, end, scores);
    }
    product(near_, rows, query, query_row, begin, end, scores);
  }

  PYCORE_INLINE void score_far(int64_t rows, const float* query, int64_t query_row, int64_t begin, int64_t end,
                               float* scores) const {
    product(far_, rows, query, query_row, begin, end, scores);
  }

  PYCORE_INLINE void accumulate(int64_t rows, const BlockKeeps& keeps, const float* weights, float* out,
                                int64_t out_row) const {
    if (!few_) {
      return accumulate_kept<false>(rows, keeps, weights, kKeyTile, value_.data, value_.stride, params_.value_dim, out,
                                    out_row);
    }
    accumulate_block(values_.dtype, rows, value_rows_, keeps, weights, params_.value_dim, out, out_row);
  }

  PYCORE_INLINE bool prefetches() const { return !few_; }

  // Of the keys, a 64th of the tile's lines for each position.
  PYCORE_INLINE void prefetch(int64_t position) const {
    const TileColumns tile = keys_.at(position / kKeyTile);
    const int64_t c = position % kKeyTile, bytes = kKeyTile * dtype_size(keys_.dtype);
    for (int64_t d = c; d < params_.head_dim; d += kKeyTile) {
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(tile.data + d * tile.channel_bytes + at, 0, 2);
    }
    const char* const row = values_.at(position);
    for (int64_t at = 0; at < params_.value_dim * dtype_size(values_.dtype); at += 64) {
      __builtin_prefetch(row + at, 0, 2);
    }
  }

 private:
  PYCORE_INLINE void product(const Matrix& keys, int64_t rows, const float* query, int64_t query_row, int64_t begin,
                             int64_t end, float* scores) const {
    tile_product<false>(rows, params_.head_dim, query, query_row, keys.data, keys.stride, begin, end,
                        StoreBlock{scores, kKeyTile});
  }

  // The tile in float32: where it lies, or, if it is `wanted`, in `copy`.
  PYCORE_INLINE Matrix wide(bool wanted, float* copy) const {
    if (keys_.dtype == DType::kFloat32) {
      return {reinterpret_cast<const float*>(held_.data), held_.channel_bytes / static_cast<int64_t>(sizeof(float))};
    }
    for (int64_t d = 0; d < params_.head_dim && wanted; ++d) {
      load_row(keys_.dtype, held_.data + d * held_.channel_bytes, kKeyTile, copy + d * kKeyTile);
    }
    return {copy, kKeyTile};
  }

  // key_columns: the tile, every key rotated by its turn.
  PYCORE_INLINE void turn(int64_t tile) {
    const int64_t half = params_.rope_dim / 2;
    turn_table(tile);
    switch (keys_.dtype) {
      case DType::kFloat16: turn_columns<DType::kFloat16>(half); break;
      case DType::kBFloat16: turn_columns<DType::kBFloat16>(half); break;
      default: turn_columns<DType::kFloat32>(half); break;
    }
  }

  // The tables' rows as columns. Where keys stand in order, all tiles have the same.
  PYCORE_INLINE void turn_table(int64_t tile) {
    const TileSchedule& schedule = keys_.map.schedule;
    const bool in_place = schedule.in_place(tile);
    if (in_place && turned_in_place_) return;
    turned_in_place_ = in_place;
    const int64_t half = params_.rope_dim / 2;
    const auto* const cosine = static_cast<const float*>(params_.rope_cos);
    const auto* const sine = static_cast<const float*>(params_.rope_sin);
    if (in_place) {  // by place in the tile; for a step of decoding, element by element takes as long as the scores
      TileRows cosines, sines;
      for (int64_t c = 0; c < kKeyTile; ++c) {
        const bool there = c < params_.rope_rows;
        cosines.rows[c] = there ? cosine + c * params_.rope_stride : nullptr;
        sines.rows[c] = there ? sine + c * params_.rope_stride : nullptr;
      }
      transpose_rows(cosines, half, buffers_.turn_cos);
      transpose_rows(sines, half, buffers_.turn_sin);
      return;
    }
    for (int64_t c = 0; c < kKeyTile; ++c) {
      const int64_t distance = key_turn(schedule, tile, c), row = distance < 0 ? -distance : distance;
      const bool there = row < params_.rope_rows;  // else it is the place of no key that is kept
      for (int64_t i = 0; i < half; ++i) {
        const float s = there ? sine[row * params_.rope_stride + i] : 0.0f;
        buffers_.turn_cos[i * kKeyTile + c] = there ? cosine[row * params_.rope_stride + i] : 0.0f;
        buffers_.turn_sin[i * kKeyTile + c] = distance < 0 ? -s : s;
      }
    }
  }

  template <DType kType>
  __attribute__((noinline)) void turn_columns(int64_t half) const {
    const bool interleaved = params_.rope_interleaved;
    const auto channel = [&](int64_t d) { return held_.data + d * held_.channel_bytes; };
    const auto columns = [&](int64_t d) { return buffers_.key_columns + d * kKeyTile; };
    for (int64_t i = 0; i < half; ++i) {
      const int64_t first = interleaved ? 2 * i : i, second = interleaved ? first + 1 : half + i;
      if (few_) {  // several blocks fetch the next tile themselves
        prefetch_lines(channel(first) + keys_.tile_bytes, kKeyTile * kElementBytes<kType>);
        prefetch_lines(channel(second) + keys_.tile_bytes, kKeyTile * kElementBytes<kType>);
      }
      for (int64_t c = 0; c < kKeyTile; c += Vec::kWidth) {
        const Vec a = load_channels<kType>(channel(first), c), b = load_channels<kType>(channel(second), c);
        const Vec cosine = Vec::load(buffers_.turn_cos + i * kKeyTile + c);
        const Vec sine = Vec::load(buffers_.turn_sin + i * kKeyTile + c);
        // rotate_row, where pairs lie side by side, and rotate.
        const Vec x = interleaved ? a * cosine - b * sine : Vec::fnma(b, sine, a * cosine);
        const Vec y = interleaved ? b * cosine + a * sine : Vec::fma(a, sine, b * cosine);
        x.store(columns(first) + c);
        y.store(columns(second) + c);
      }
    }
    for (int64_t d = params_.rope_dim; d < params_.head_dim; ++d) {
      convert_row<kType>(channel(d), kKeyTile, columns(d));
    }
  }

  const AttentionParams& params_;
  const TileBuffers& buffers_;
  const HeadTiles keys_;
  const HeadRows values_;
  const bool few_;
  bool turned_in_place_ = false;
  TileColumns held_;
  Matrix near_, far_, value_;
  TilePointers value_rows_;
};
