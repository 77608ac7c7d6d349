// SPDX-License-Identifier: Apache-2.0
// One step of the backward pass in vectors: up to kBackwardRows queries of a head against one key tile,
//   p = 2^(s - lse),  g = grad_out v^T,  ds = p (g - delta) scale   (times softcap's slope)
//   grad_query += ds k,  grad_key += ds^T q,  grad_value += p^T grad_out
// With rotation, ds k and ds^T q are taken in the tile's rotated frame and turned back before they are added.
#pragma once

#include <pycore/attention/rows.h>

#include <cstdint>

#include "kernels.h"
#include "logits.inl.h"
#include "row_loader.inl.h"

struct BackwardBuffers {
  float* key_columns = nullptr;    // [padded D, 64] as in the forward pass
  float* key_far = nullptr;        // [padded D, 64]
  float* value_columns = nullptr;  // [padded Dv, 64]
  float* key_rows = nullptr;       // [64, padded D] rotated
  float* key_copy = nullptr;       // [64, padded D] unrotated, where the rows themselves will not do
  float* value_copy = nullptr;     // [64, padded Dv] converted to float32
  float* grad_key = nullptr;       // [64, padded D] of the open steps
  float* grad_value = nullptr;     // [64, padded Dv], right behind it
  float* grad_key_far = nullptr;   // [64, padded D], right behind that
  float* totals = nullptr;         // the three, of the steps before
  // The queries.
  float* query = nullptr;          // [64, padded D] rotated for the tile, or a copy
  float* query_far = nullptr;      // [64, padded D] rotated by the limit
  float* grad_query = nullptr;     // [6, padded D] in the rotated frame
  float* weights = nullptr;        // [64, 64] p
  float* grad_scores = nullptr;    // [64, 64] ds
  float* scores_far = nullptr;     // [6, 64]
  float* query_copy = nullptr;     // [64, padded D] converted to float32
  float* grad_out_copy = nullptr;  // [64, padded Dv]
  float* slopes = nullptr;         // [6, 64] of softcap
  float* strip = nullptr;          // [strip_length] biases
  float* grad_strip = nullptr;     // [strip_length] their gradient

  // Floats of grad_key, grad_value and, where there is rotation, grad_key_far.
  static int64_t sums(const AttentionParams& params) {
    return kKeyTile * (padded(params.head_dim) * (params.rope_cos ? 2 : 1) + padded(params.value_dim));
  }

  int64_t bind(const AttentionParams& params, void* memory) {
    const int64_t d = padded(params.head_dim), dv = padded(params.value_dim);
    const bool rope = params.rope_cos != nullptr;
    Scratch scratch{static_cast<char*>(memory)};
    key_columns = scratch.take(d * kKeyTile);
    value_columns = scratch.take(dv * kKeyTile);
    key_copy = scratch.take(kKeyTile * d);
    grad_key = scratch.take(sums(params));
    grad_value = grad_key + kKeyTile * d;
    grad_key_far = grad_value + kKeyTile * dv;
    totals = scratch.take(sums(params));
    grad_query = scratch.take(kProductRows * d);
    weights = scratch.take(kBackwardRows * kKeyTile);
    grad_scores = scratch.take(kBackwardRows * kKeyTile);
    query = scratch.take(kBackwardRows * d);
    if (params.dtype != DType::kFloat32) {
      value_copy = scratch.take(kKeyTile * dv);
      query_copy = scratch.take(kBackwardRows * d);
      grad_out_copy = scratch.take(kBackwardRows * dv);
    }
    if (params.softcap > 0) slopes = scratch.take(kProductRows * kKeyTile);
    if (has_bias(params)) {
      strip = scratch.take(strip_length(most_places(params, kBackwardRows)));
      grad_strip = scratch.take(strip_length(most_places(params, kBackwardRows)));
    }
    if (rope) {
      key_far = scratch.take(d * kKeyTile);
      key_rows = scratch.take(kKeyTile * d);
      query_far = scratch.take(kBackwardRows * d);
      scores_far = scratch.take(kProductRows * kKeyTile);
    }
    return scratch.used;
  }
};

// A key tile as the backward pass wants it: in columns, as the forward pass, and in rows for grad_query.
struct BackwardTile {
  int64_t index;
  uint64_t present;
  Matrix key;  // unrotated
};

// `reached`: keys that some query keeps; others are not read.
PYCORE_INLINE BackwardTile load_backward_tile(const AttentionParams& params, const RowMap& map, int64_t b,
                                              int64_t kv_head, int64_t index, uint64_t reached,
                                              const BackwardBuffers& buffers) {
  BackwardTile loaded;
  loaded.index = index;
  loaded.present = map.present_bits(index) & reached;
  if (loaded.present == 0) return loaded;
  const KeyTile tile = {index, loaded.present, true, params.distance_limit < map.positions()};
  TileRows keys, values, rotated;
  const HeadRows head_keys = key_rows_of(params, b, kv_head, map);
  const HeadRows head_values = value_rows_of(params, b, kv_head, map);
  gather_tile(head_keys, tile, params.head_dim, buffers.key_copy, &keys);
  gather_tile(head_values, tile, params.value_dim, buffers.value_copy, &values);
  loaded.key = tile_matrix(head_keys, tile, keys, params.head_dim, buffers.key_copy);
  transpose_rows(values, params.value_dim, buffers.value_columns);
  if (params.rope_cos) {
    rotate_rows(params, map.schedule, index, keys, buffers.key_rows, &rotated);
    transpose_rows(rotated, params.head_dim, buffers.key_columns);
    if (tile.far) transpose_rows(keys, params.head_dim, buffers.key_far);
  } else {
    transpose_rows(keys, params.head_dim, buffers.key_columns);
  }
  return loaded;
}

// Rows first .. first + count - 1 of a head of query, grad_out or out; read() gives them in float32, where they lie or
// converted into `copy`.
struct QueryRows {
  int64_t batch, head, first, count;

  PYCORE_INLINE Matrix read(const AttentionParams& params, const void* data, const AttentionStrides& strides, int64_t n,
                            float* copy) const {
    const char* rows = row_of(params, data, strides, batch, head, first);
    if (params.dtype == DType::kFloat32) return {reinterpret_cast<const float*>(rows), strides.row};
    for (int64_t r = 0; r < count; ++r) {
      load_row(params.dtype, row_of(params, data, strides, batch, head, first + r), n, copy + r * padded(n));
    }
    return {copy, padded(n)};
  }
};

class BackwardStep {
 public:
  PYCORE_INLINE BackwardStep(const AttentionBackwardParams& params, const RowMap& map, const QueryRows& rows,
                             const BackwardTile& tile, BackwardParts parts, const BackwardBuffers& buffers)
      : params_(params),
        forward_(params.forward),
        map_(map),
        rows_(rows),
        tile_(tile),
        parts_(parts),
        buffers_(buffers),
        base_(tile.index * kKeyTile),
        in_place_(map.schedule.in_place(tile.index)),
        span_(map, rows.first, rows.count, places_) {
    const int64_t index = row_index(forward_, rows.batch, rows.head, rows.first);
    lse_ = static_cast<const float*>(forward_.lse) + index;
    lse_low_ = static_cast<const float*>(forward_.lse_low) + index;
    delta_ = static_cast<const float*>(params.delta) + index;
    if (parts.query) grad_query_ = static_cast<float*>(params.grad_query) + index * forward_.head_dim;
  }

  PYCORE_INLINE void run() {
    if (!find_keys()) return;
    load_queries();
    if (buffers_.strip && in_place_) {
      fill_strip(forward_, rows_.batch, rows_.head, span_, tile_.index, buffers_.strip);
    }
    if (parts_.bias) zero_rows(buffers_.grad_strip, round_up(strip_length(span_.count()), Vec::kWidth));
    for (int64_t row = 0; row < rows_.count; row += kProductRows) run_block(row);
    if (parts_.bias && in_place_) add_strip();
    if (parts_.key_value) add_key_value();
  }

 private:
  // A block of up to kProductRows rows: what they keep, and which of it within and beyond the distance limit.
  struct Block {
    int64_t row, rows;
    BlockKeeps keeps, near, far;
    int64_t begin, end;  // columns that some row keeps, in whole vectors
  };

  PYCORE_INLINE int64_t position(int64_t r) const { return map_.query_position(rows_.first) + r; }

  // False if no row keeps a key of the tile.
  PYCORE_INLINE bool find_keys() {
    const TileSchedule& schedule = map_.schedule;
    const bool alike = schedule.keep_alike(position(0), position(rows_.count - 1), tile_.index);
    uint64_t bits = 0;
    any_near_ = any_far_ = 0;
    for (int64_t r = 0; r < rows_.count; ++r) {
      if (r == 0 || !alike) bits = schedule.keep_bits(position(r), tile_.index) & tile_.present;
      kept_[r] = lse_[r] == -kInfinity ? 0 : bits;  // a row whose logits are all -inf has no weights
      const uint64_t beyond = far_bits(forward_, schedule, places_[r], tile_.index);
      far_[r] = kept_[r] & beyond;
      near_[r] = kept_[r] & ~beyond;
      any_near_ |= near_[r];
      any_far_ |= far_[r];
    }
    return any_near_ | any_far_;
  }

  PYCORE_INLINE void load_queries() {
    const int64_t d = padded(forward_.head_dim);
    const Matrix query =
        rows_.read(forward_, forward_.query, forward_.query_strides, forward_.head_dim, buffers_.query_copy);
    grad_out_ =
        rows_.read(forward_, params_.grad_out, params_.grad_out_strides, forward_.value_dim, buffers_.grad_out_copy);
    query_ = query;
    if (forward_.rope_cos == nullptr) return;
    for (int64_t r = 0; r < rows_.count; ++r) {
      const float* x = query.data + r * query.stride;
      if (near_[r]) rotate(forward_, x, places_[r] - base_, buffers_.query + r * d);
      if (far_[r]) rotate(forward_, x, forward_.distance_limit, buffers_.query_far + r * d);
    }
    query_ = {buffers_.query, d};
  }

  PYCORE_INLINE void run_block(int64_t row) {
    Block block;
    block.row = row;
    block.rows = smaller(rows_.count - row, kProductRows);
    for (int m = 0; m < block.rows; ++m) {
      block.keeps.set(m, kept_[row + m]);
      block.near.set(m, near_[row + m]);
      block.far.set(m, far_[row + m]);
    }
    if (block.keeps.any == 0) return;
    block.begin = block.keeps.first() / Vec::kWidth * Vec::kWidth;
    block.end = round_up(block.keeps.end(), Vec::kWidth);
    score(block);
    for (int m = 0; m < block.rows; ++m) weigh(block, m);
    if (parts_.query) add_query(block);
  }

  // buffers.weights: <query, key>; buffers.grad_scores: <grad_out, value>.
  PYCORE_INLINE void score(const Block& block) const {
    const int64_t d = padded(forward_.head_dim), row = block.row;
    const auto product = [&](const float* a, int64_t a_row, int64_t channels, const float* columns, float* out)
                             __attribute__((always_inline)) {
                               tile_product<false>(block.rows, channels, a, a_row, columns, kKeyTile, block.begin,
                                                   block.end, StoreBlock{out, kKeyTile});
                             };
    float* const weights = buffers_.weights + row * kKeyTile;
    if (block.near.any) {
      product(query_.data + row * query_.stride, query_.stride, forward_.head_dim, buffers_.key_columns, weights);
    }
    if (block.far.any) {
      float* const scores = block.near.any ? buffers_.scores_far : weights;
      product(buffers_.query_far + row * d, d, forward_.head_dim, buffers_.key_far, scores);
      for (int m = 0; m < block.rows && block.near.any; ++m) {
        for (int64_t c = block.begin; c < block.end; c += Vec::kWidth) {
          const int64_t at = m * kKeyTile + c;
          Vec::load(scores + at).select(far_[row + m] >> c, Vec::load(weights + at)).store(weights + at);
        }
      }
    }
    product(grad_out_.data + row * grad_out_.stride, grad_out_.stride, forward_.value_dim, buffers_.value_columns,
            buffers_.grad_scores + row * kKeyTile);
  }

  // Row m of the block: scores in place -> p, <grad_out, value> in place -> ds. Columns that are not kept may hold
  // anything; accumulate_kept never reads them.
  PYCORE_INLINE void weigh(const Block& block, int m) const {
    const int64_t r = block.row + m, begin = block.begin, end = block.end;
    const uint64_t keeps = block.keeps.bits[m];
    float* const weights = buffers_.weights + r * kKeyTile;
    float* const grads = buffers_.grad_scores + r * kKeyTile;
    float* const slopes = buffers_.slopes ? buffers_.slopes + m * kKeyTile : nullptr;
    float products[kKeyTile], plain_grads[kKeyTile], by_key[kKeyTile];  // by_key: biases, and then their gradients
    if (parts_.rows) copy_row(weights + begin, end - begin, products + begin);
    if (!plain_logits(forward_)) bend_scores(r, begin, end, weights, by_key, slopes);
    uint64_t dropped = 0;
    if (forward_.dropout_p > 0) {
      dropped = dropped_keys(forward_, rows_.batch, rows_.head, position(r), tile_.index, keeps);
      drop_out(forward_, grads, begin, end, dropped);
    }
    if (parts_.rows) copy_row(grads + begin, end - begin, plain_grads + begin);
    differentiate(r, begin, end, keeps, weights, grads, by_key, slopes);
    if (parts_.rows) {
      add_row_sums(forward_, map_.schedule, places_[r] - base_, tile_.index, products, weights, plain_grads, begin, end,
                   keeps, parts_.rows + r);
    }
    if (forward_.dropout_p > 0) drop_out(forward_, weights, begin, end, dropped);
    for (uint64_t left = parts_.bias && !in_place_ ? keeps : 0; left; left &= left - 1) {
      const int64_t c = __builtin_ctzll(left), distance = places_[r] - base_ - key_turn(map_.schedule, tile_.index, c);
      parts_.bias[bias_index(forward_, distance)] += by_key[c];
    }
  }

  PYCORE_INLINE void bend_scores(int64_t r, int64_t begin, int64_t end, float* scores, float* biases,
                                 float* slopes) const {
    const float* row_biases = buffers_.strip ? buffers_.strip + behind(r) : nullptr;
    if (buffers_.strip && !in_place_) {
      fill_biases(forward_, map_.schedule, rows_.batch, rows_.head, places_[r], tile_.index, biases);
      row_biases = biases;
    }
    logits_of(forward_, scores, begin, end, row_biases, slopes);
    if (forward_.block_bias) add_block_bias(forward_, rows_.head, position(r), tile_.index, scores, begin, end);
  }

  // Places of this step after query r's.
  PYCORE_INLINE int64_t behind(int64_t r) const { return span_.hi - places_[r]; }

  PYCORE_INLINE void differentiate(int64_t r, int64_t begin, int64_t end, uint64_t keeps, float* weights, float* grads,
                                   float* bias_grads, const float* slopes) const {
    // lse in base 2 as a sum of two floats: rounded to one, it would be the largest error of every weight.
    const double exact = (static_cast<double>(lse_[r]) + lse_low_[r]) / natural_factor(forward_);
    const float rounded = static_cast<float>(exact);
    const Vec row_lse = Vec::broadcast(-rounded), row_rest = Vec::broadcast(static_cast<float>(exact - rounded));
    const Vec row_delta = Vec::broadcast(delta_[r]), factor = Vec::broadcast(base2_factor(forward_));
    const Vec scale = Vec::broadcast(static_cast<float>(forward_.scale));
    for (int64_t c = begin; c < end; c += Vec::kWidth) {
      const Vec p = (Vec::fma(Vec::load(weights + c), factor, row_lse) - row_rest).exp2();
      p.store(weights + c);
      Vec grad = p * (Vec::load(grads + c) - row_delta);
      if (parts_.bias && in_place_) {
        float* sum = buffers_.grad_strip + behind(r) + c;
        (Vec::load(sum) + grad.select(keeps >> c, Vec::zero())).store(sum);
      } else if (parts_.bias) {
        grad.store(bias_grads + c);
      }
      if (slopes) grad = grad * Vec::load(slopes + c);
      (grad * scale).store(grads + c);
    }
  }

  PYCORE_INLINE void add_query(const Block& block) const {
    const bool rope = forward_.rope_cos != nullptr;
    if (block.near.any) {
      const Matrix rotated = {buffers_.key_rows, padded(forward_.head_dim)};
      add_query_share(block, block.near, rope ? rotated : tile_.key, false);
    }
    if (block.far.any) add_query_share(block, block.far, tile_.key, true);
  }

  // The tile's share is one chain of FMAs, turned back and then added to what earlier tiles gave.
  PYCORE_INLINE void add_query_share(const Block& block, const BlockKeeps& part, Matrix key, bool is_far) const {
    const int64_t d = padded(forward_.head_dim);
    zero_rows(buffers_.grad_query, block.rows * d);
    accumulate_kept<false>(block.rows, part, buffers_.grad_scores + block.row * kKeyTile, kKeyTile, key.data,
                           key.stride, forward_.head_dim, buffers_.grad_query, d);
    for (int m = 0; m < block.rows; ++m) {
      if (part.bits[m] == 0) continue;
      float* const share = buffers_.grad_query + m * d;
      const int64_t r = block.row + m, turn = is_far ? -forward_.distance_limit : base_ - places_[r];
      if (forward_.rope_cos) rotate(forward_, share, turn, share);
      add_row(share, forward_.head_dim, grad_query_ + r * forward_.head_dim);
    }
  }

  PYCORE_INLINE void add_strip() const {
    for (int64_t t = 0; t < strip_length(span_.count()); ++t) {
      parts_.bias[bias_index(forward_, span_.hi - base_ - t)] += buffers_.grad_strip[t];
    }
  }

  PYCORE_INLINE void add_key_value() const {
    const int64_t d = padded(forward_.head_dim), count = rows_.count;
    accumulate_columns(kept_, count, buffers_.weights, grad_out_.data, grad_out_.stride, forward_.value_dim,
                       buffers_.grad_value, padded(forward_.value_dim));
    if (any_near_) {
      accumulate_columns(near_, count, buffers_.grad_scores, query_.data, query_.stride, forward_.head_dim,
                         buffers_.grad_key, d);
    }
    if (any_far_) {
      accumulate_columns(far_, count, buffers_.grad_scores, buffers_.query_far, d, forward_.head_dim,
                         buffers_.grad_key_far, d);
    }
  }

  const AttentionBackwardParams& params_;
  const AttentionParams& forward_;
  const RowMap& map_;
  const QueryRows& rows_;
  const BackwardTile& tile_;
  const BackwardParts parts_;
  const BackwardBuffers& buffers_;
  const int64_t base_;
  const bool in_place_;
  int64_t places_[kBackwardRows];  // where each query stands for distances
  const Places span_;
  uint64_t kept_[kBackwardRows], near_[kBackwardRows],
      far_[kBackwardRows];  // keys by query; within and beyond the limit
  uint64_t any_near_, any_far_;
  Matrix query_, grad_out_;  // query_ as near pairs see it
  const float *lse_, *lse_low_, *delta_;
  float* grad_query_ = nullptr;
};

__attribute__((noinline)) void backward_step(const AttentionBackwardParams& params, const RowMap& map,
                                             const QueryRows& rows, const BackwardTile& tile, BackwardParts parts,
                                             const BackwardBuffers& buffers) {
  BackwardStep(params, map, rows, tile, parts, buffers).run();
}
