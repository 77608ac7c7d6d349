// SPDX-License-Identifier: Apache-2.0
// From scores to logits where more than a scale stands between them: softcap, distance bias, ALiBi; and dropout.
#pragma once

#include <pycore/attention/rows.h>

#include <cstdint>

#include "../softmax.inl.h"
#include "../tanh.inl.h"
#include "kernels.h"

// Whether a logit is its score times a factor that stays positive in float32, the common case: the largest score then
// has the largest logit, and the factor waits until the exponential. The backward pass asks the same, so that its
// weights are those of the forward pass.
PYCORE_INLINE bool plain_logits(const AttentionParams& params) {
  return params.softcap == 0 && !has_bias(params) && params.block_bias == nullptr &&
         static_cast<float>(params.scale) * kLog2E > 0;
}

// What a score, if plain, or else a logit is multiplied with for base 2.
PYCORE_INLINE float base2_factor(const AttentionParams& params) {
  return plain_logits(params) ? static_cast<float>(params.scale) * kLog2E : kLog2E;
}

// And what turns the product into a natural logit: undone with the rounded factor, a large one loses nothing.
PYCORE_INLINE double natural_factor(const AttentionParams& params) {
  const double scale = plain_logits(params) ? static_cast<float>(params.scale) : 1.0f;
  return scale / base2_factor(params);
}

// Where queries stand for distances, first and last.
struct Places {
  int64_t lo, hi;

  // Of rows first .. first + count - 1; `out` gets each.
  PYCORE_INLINE Places(const RowMap& map, int64_t first, int64_t count, int64_t* out) {
    lo = INT64_MAX;
    hi = INT64_MIN;
    for (int64_t i = 0; i < count; ++i) {
      out[i] = map.schedule.place(map.query_position(first + i));
      lo = out[i] < lo ? out[i] : lo;
      hi = out[i] > hi ? out[i] : hi;
    }
  }
  PYCORE_INLINE int64_t count() const { return hi - lo + 1; }
};

// The most places that `count` queries can stand at: as many, or, where some are nodes of a tree, its depths too.
PYCORE_INLINE int64_t most_places(const AttentionParams& params, int64_t count) {
  return count + params.schedule.tree_nodes;
}

// Queries at `count` places in a row see count + 63 distances to the keys of a tile, so a head's biases are one strip:
// a query reads strip[places.hi - its place + c] for key c.
PYCORE_INLINE int64_t strip_length(int64_t count) { return count + kKeyTile - 1; }

PYCORE_INLINE void fill_strip(const AttentionParams& params, int64_t b, int64_t h, const Places& places, int64_t tile,
                              float* strip) {
  const int64_t distance = places.hi - tile * kKeyTile;
  for (int64_t t = 0; t < strip_length(places.count()); ++t) {
    strip[t] = bias_of<float>(params, b, h, distance - t);
  }
}

// The biases of one query against a tile with nodes of a tree, whose keys stand in no order.
PYCORE_INLINE void fill_biases(const AttentionParams& params, const TileSchedule& schedule, int64_t b, int64_t h,
                               int64_t place, int64_t tile, float* biases) {
  const int64_t distance = place - tile * kKeyTile;
  for (int64_t c = 0; c < kKeyTile; ++c) {
    biases[c] = bias_of<float>(params, b, h, distance - key_turn(schedule, tile, c));
  }
}

// One row's scores in place -> logits, columns begin..end-1 (whole vectors). `strip` is this row's, or null; `slopes`,
// if not null, gets the derivative of softcap.
PYCORE_INLINE void logits_of(const AttentionParams& params, float* scores, int64_t begin, int64_t end,
                             const float* strip, float* slopes) {
  const float cap = static_cast<float>(params.softcap);
  const Vec scale = Vec::broadcast(static_cast<float>(params.scale) * (cap > 0 ? 1 / cap : 1.0f));
  const Vec one = Vec::broadcast(1.0f), height = Vec::broadcast(cap);
  for (int64_t c = begin; c < end; c += Vec::kWidth) {
    Vec x = Vec::load(scores + c) * scale;
    if (cap > 0) {
      const Vec bent = tanh_of(x);
      if (slopes) Vec::fnma(bent, bent, one).store(slopes + c);
      x = bent * height;
    }
    if (strip) x = x + Vec::load(strip + c);
    x.store(scores + c);
  }
}

// One query's kept pairs join its sums, keys ascending: `products` are the <q, k>, `weights` and `grads` those of the
// softmax, columns begin..end-1, and `distance` that of column 0.
PYCORE_INLINE void add_row_sums(const AttentionParams& params, const TileSchedule& schedule, int64_t distance,
                                int64_t tile, const float* products, const float* weights, const float* grads,
                                int64_t begin, int64_t end, uint64_t kept, RowSums* sums) {
  float by_scale[kKeyTile], by_cap[kKeyTile];
  const float cap = static_cast<float>(params.softcap);
  const Vec scale = Vec::broadcast(static_cast<float>(params.scale) * (cap > 0 ? 1 / cap : 1));
  const Vec one = Vec::broadcast(1.0f);
  for (int64_t c = begin; c < end; c += Vec::kWidth) {
    const Vec product = Vec::load(products + c);
    if (cap > 0) {
      const Vec x = product * scale, bent = tanh_of(x), slope = Vec::fnma(bent, bent, one);
      Vec::fnma(x, slope, bent).store(by_cap + c);
      (product * slope).store(by_scale + c);
    } else {
      product.store(by_scale + c);
    }
  }
  for (uint64_t left = kept; left; left &= left - 1) {
    const int64_t c = __builtin_ctzll(left);
    const double weight = weights[c], weighted = weight * grads[c];
    sums->weight += weight;
    sums->grad += weighted;
    sums->scale.add(weight, weighted, by_scale[c]);
    if (cap > 0) sums->softcap.add(weight, weighted, by_cap[c]);
    if (params.alibi_slopes == nullptr) continue;
    const int64_t seen = seen_distance(params, distance - key_turn(schedule, tile, c));
    sums->slope.add(weight, weighted, -static_cast<double>(seen));
  }
}

// block_bias joins the logits of the row at position p. A vector of keys lies in one block.
PYCORE_INLINE void add_block_bias(const AttentionParams& params, int64_t h, int64_t p, int64_t tile, float* logits,
                                  int64_t begin, int64_t end) {
  const int64_t base = tile * kKeyTile;
  const uint64_t sinks = tile_bits(base, 0, params.schedule.sink_size);
  for (int64_t c = begin; c < end; c += Vec::kWidth) {
    // The last key of the vector: where some are sinks, they are the first.
    const float bias = block_bias_of<float>(params, h, p, base + c + Vec::kWidth - 1);
    const Vec x = Vec::load(logits + c);
    x.select(sinks >> c, x + Vec::broadcast(bias)).store(logits + c);
  }
}

// One row times what dropout makes of its weights, columns begin..end-1.
PYCORE_INLINE void drop_out(const AttentionParams& params, float* row, int64_t begin, int64_t end, uint64_t dropped) {
  const Vec factor = Vec::broadcast(static_cast<float>(1 / (1 - params.dropout_p)));
  for (int64_t c = begin; c < end; c += Vec::kWidth) {
    Vec::zero().select(dropped >> c, Vec::load(row + c) * factor).store(row + c);
  }
}
