// SPDX-License-Identifier: Apache-2.0
// How the forward loops read keys and values. A Loader is all that they know of it:
//
//   load(tile)       the tile whose keys and values are asked for next, and which of them (KeyTile)
//   score(…)         scores[m][c] = <query row m, key c> for columns begin .. end - 1, whole vectors: one chain of FMAs
//                    over the channels, ascending
//   score_far(…)     the same with the keys as they are beyond the distance limit (unrotated)
//   accumulate(…)    out[m] += weights[m][c] value c over the keys that row m keeps, ascending, in one chain of FMAs
//   prefetches()     whether it pays to name the keys of the next tile while this one is worked on, with
//   prefetch(j)      the position of such a key
//
// So a cache in another form (packed bit planes, codes of a codebook) is another Loader and not another loop: it can
// unpack into the same columns, or fold its scales into the query and the weights.
//
// RowLoader is the Loader of rows in memory, of any dtype, rotated on the way where there is rotary embedding
// (tile_loader.inl.h is that of keys by channel). One block of query rows reads them where they lie; several share a
// transposed copy.
#pragma once

#include <pycore/attention/rows.h>

#include <cstdint>

#include "../few_rows.inl.h"
#include "../kept_product.inl.h"
#include "rotation.inl.h"

// A tile of keys for a tile of queries.
struct KeyTile {
  int64_t index;
  uint64_t present;  // keys that exist and that some query may keep
  bool near, far;    // whether some pair is within, or beyond, the distance limit
};

// The rows of keys or of values that one key head has.
struct HeadRows {
  DType dtype;
  const char* data;  // row 0
  int64_t row_bytes;
  const RowMap& map;  // of positions to rows

  PYCORE_INLINE const char* at(int64_t position) const { return data + map.key_row(position) * row_bytes; }
};

PYCORE_INLINE HeadRows key_rows_of(const AttentionParams& params, int64_t b, int64_t kv_head, const RowMap& map) {
  return {params.dtype, row_of(params, params.key, params.key_strides, b, kv_head, 0),
          params.key_strides.row * dtype_size(params.dtype), map};
}
PYCORE_INLINE HeadRows value_rows_of(const AttentionParams& params, int64_t b, int64_t kv_head, const RowMap& map) {
  return {params.dtype, row_of(params, params.value, params.value_strides, b, kv_head, 0),
          params.value_strides.row * dtype_size(params.dtype), map};
}

// The rows of a tile in float32, by gather_rows.
PYCORE_INLINE void gather_tile(const HeadRows& head, const KeyTile& tile, int64_t channels, float* copy,
                               TileRows* out) {
  gather_rows(
      head.dtype, tile.present, channels,
      [&](int64_t c) __attribute__((always_inline)) { return head.at(tile.index * kKeyTile + c); }, copy, out);
}

// And as a matrix (matrix_rows).
PYCORE_INLINE Matrix tile_matrix(const HeadRows& head, const KeyTile& tile, const TileRows& rows, int64_t channels,
                                 float* copy) {
  return matrix_rows(head.dtype, rows, tile.present, head.map.contiguous(tile.index),
                     head.row_bytes / static_cast<int64_t>(sizeof(float)), channels, copy);
}

struct LoaderBuffers {
  float* key_columns = nullptr;  // [padded D, 64] keys, rotated by place in the tile
  float* key_far = nullptr;      // [padded D, 64] keys, unrotated
  float* key_rows = nullptr;     // [64, padded D] rotated rows on their way to key_columns
  float* key_copy = nullptr;     // [64, padded D] keys converted to float32
  float* value_rows = nullptr;   // [64, padded Dv]

  // `dtype`: of the rows.
  PYCORE_INLINE void bind(const AttentionParams& params, DType dtype, Scratch* scratch) {
    const int64_t d = padded(params.head_dim);
    key_columns = scratch->take(d * kKeyTile);
    value_rows = scratch->take(kKeyTile * padded(params.value_dim));
    if (dtype != DType::kFloat32) key_copy = scratch->take(kKeyTile * d);
    if (params.rope_cos) {
      key_far = scratch->take(d * kKeyTile);
      key_rows = scratch->take(kKeyTile * d);
    }
  }
};

// accumulate for one block. Rows that keep the same keys go together, the others one by one.
PYCORE_INLINE void accumulate_block(DType dtype, int64_t rows, const TilePointers& values, const BlockKeeps& keeps,
                                    const float* weights, int64_t n, float* out, int64_t out_row) {
  const bool same = keeps.any == keeps.all;
  for (int64_t m = 0; m < rows; m += same ? rows : 1) {
    accumulate_few(dtype, same ? rows : 1, values, keeps.bits[m], weights + m * kKeyTile, n, out + m * out_row,
                   out_row);
  }
}

class RowLoader {
 public:
  PYCORE_INLINE RowLoader(const AttentionParams& params, const HeadRows& keys, const HeadRows& values, int64_t rows,
                          const LoaderBuffers& buffers)
      : params_(params), buffers_(buffers), keys_(keys), values_(values), few_(rows <= kProductRows) {}

  PYCORE_INLINE void load(const KeyTile& tile) { few_ ? point_at(tile) : transpose_tile(tile); }

  PYCORE_INLINE void score(int64_t rows, const float* query, int64_t query_row, int64_t begin, int64_t end,
                           float* scores) const {
    const DType dtype = params_.rope_cos ? DType::kFloat32 : keys_.dtype;
    if (few_) return score_few(dtype, rows, near_, params_.head_dim, query, query_row, begin, end, scores);
    tile_product<false>(rows, params_.head_dim, query, query_row, buffers_.key_columns, kKeyTile, begin, end,
                        StoreBlock{scores, kKeyTile});
  }

  PYCORE_INLINE void score_far(int64_t rows, const float* query, int64_t query_row, int64_t begin, int64_t end,
                               float* scores) const {
    if (few_) return score_few(keys_.dtype, rows, far_, params_.head_dim, query, query_row, begin, end, scores);
    tile_product<false>(rows, params_.head_dim, query, query_row, buffers_.key_far, kKeyTile, begin, end,
                        StoreBlock{scores, kKeyTile});
  }

  PYCORE_INLINE void accumulate(int64_t rows, const BlockKeeps& keeps, const float* weights, float* out,
                                int64_t out_row) const {
    if (!few_) {
      return accumulate_kept<false>(rows, keeps, weights, kKeyTile, value_.data, value_.stride, params_.value_dim, out,
                                    out_row);
    }
    accumulate_block(values_.dtype, rows, value_rows_, keeps, weights, params_.value_dim, out, out_row);
  }

  // A few rows are asked for as they are read.
  PYCORE_INLINE bool prefetches() const { return !few_; }

  // A schedule that leaves tiles out jumps, and the processor's own guess of what is read next goes wrong at every
  // jump.
  PYCORE_INLINE void prefetch(int64_t position) const {
    const auto fetch = [&](const HeadRows& rows, int64_t channels) __attribute__((always_inline)) {
      const char* x = rows.at(position);
      for (int64_t at = 0; at < channels * dtype_size(rows.dtype); at += 64) __builtin_prefetch(x + at, 0, 2);
    };
    fetch(keys_, params_.head_dim);
    fetch(values_, params_.value_dim);
  }

 private:
  PYCORE_INLINE void point_at(const KeyTile& tile) {
    const auto rows_of = [&](const HeadRows& rows, TilePointers* out) __attribute__((always_inline)) {
      out->fill(tile.present, rows.row_bytes,
                [&](int64_t c) __attribute__((always_inline)) { return rows.at(tile.index * kKeyTile + c); });
    };
    rows_of(values_, &value_rows_);
    rows_of(keys_, params_.rope_cos ? &far_ : &near_);
    if (params_.rope_cos && tile.near) {
      TileRows keys, rotated;
      const int64_t d = padded(params_.head_dim);
      gather_tile(keys_, tile, params_.head_dim, buffers_.key_copy, &keys);
      rotate_rows(params_, keys_.map.schedule, tile.index, keys, buffers_.key_rows, &rotated);
      near_.fill(tile.present, d * static_cast<int64_t>(sizeof(float)), [&](int64_t c) __attribute__((always_inline)) {
        return reinterpret_cast<const char*>(buffers_.key_rows + c * d);
      });
    }
  }

  PYCORE_INLINE void transpose_tile(const KeyTile& tile) {
    TileRows keys, values, rotated;
    gather_tile(keys_, tile, params_.head_dim, buffers_.key_copy, &keys);
    gather_tile(values_, tile, params_.value_dim, buffers_.value_rows, &values);
    if (tile.far) transpose_rows(keys, params_.head_dim, buffers_.key_far);
    if (tile.near) {
      if (params_.rope_cos) rotate_rows(params_, keys_.map.schedule, tile.index, keys, buffers_.key_rows, &rotated);
      transpose_rows(params_.rope_cos ? rotated : keys, params_.head_dim, buffers_.key_columns);
    }
    value_ = tile_matrix(values_, tile, values, params_.value_dim, buffers_.value_rows);
  }

  const AttentionParams& params_;
  const LoaderBuffers& buffers_;
  const HeadRows keys_, values_;
  const bool few_;
  Matrix value_;                          // the tile's values, for several blocks
  TilePointers near_, far_, value_rows_;  // the tile's rows, for one
};
