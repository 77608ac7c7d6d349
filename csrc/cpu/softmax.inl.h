// SPDX-License-Identifier: Apache-2.0
// The softmax of a tile of rows, online. Keys come in segments: within one, scores update a maximum, a sum by lane and
// weighted values; where it ends, it joins the totals of the segments before it, in order. In base 2:
// 2^(factor (x - max)), with the logit's scale, if that is all there is to it, in the factor. The difference comes
// first, so that a row's largest weight is 1 to the bit, and where it has all the weight, its value the result.
#pragma once

#include <cstdint>

#include "lane_sum.inl.h"
#include "vector_rows.inl.h"

constexpr float kLog2E = 1.44269504088896340736f;
constexpr double kLn2 = 0.69314718055994530942;
constexpr float kInfinity = __builtin_inff();

// 2^x by the function the weights use.
PYCORE_INLINE float exp2_of(float x) {
  float lanes[Vec::kWidth];
  Vec::broadcast(x).exp2().store(lanes);
  return lanes[0];
}

// The factors by which the totals of kWidth rows, and states that join them, shrink to the larger of their maxima: of
// rows whose total and state both hold something.
struct MergeFactors {
  float max[Vec::kWidth], total[Vec::kWidth], state[Vec::kWidth];

  PYCORE_INLINE MergeFactors(Vec total_max, Vec state_max, float factor) {
    const Vec largest = Vec::max(state_max, total_max), power = Vec::broadcast(factor);
    largest.store(max);
    ((total_max - largest) * power).exp2().store(total);
    ((state_max - largest) * power).exp2().store(state);
  }
};

struct SoftmaxRows {
  int64_t width;       // floats of a row of values, whole vectors
  float* max;          // [rows] of the open segment; scores, or logits
  float* sum;          // [rows, kSumLanes] of the open segment, by lane
  float* accumulator;  // [rows, width] of the open segment
  float* total_max;    // [rows] of the segments merged so far
  float* total_sum;    // [rows]
  float* total;        // [rows, width]

  PYCORE_INLINE void bind(Scratch* scratch, int64_t rows, int64_t values) {
    width = values;
    max = scratch->take(rows);
    sum = scratch->take(rows * kSumLanes);
    accumulator = scratch->take(rows * width);
    total_max = scratch->take(rows);
    total_sum = scratch->take(rows);
    total = scratch->take(rows * width);
  }

  PYCORE_INLINE void open_totals(int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      total_max[r] = -kInfinity;
      total_sum[r] = 0;
    }
    zero_rows(total, rows * width);
  }

  PYCORE_INLINE void open(int64_t rows) const {
    open_totals(rows);
    for (int64_t r = 0; r < rows; ++r) max[r] = -kInfinity;
    zero_rows(sum, rows * kSumLanes);
    zero_rows(accumulator, rows * width);
  }

  // The maximum of row r's scores (columns begin..end-1, whole vectors; what is not kept becomes -inf) joins the open
  // segment, which is rescaled when it grows.
  PYCORE_INLINE void update_max(int64_t r, float* scores, int64_t begin, int64_t end, uint64_t kept, bool masked,
                                float factor) const {
    const Vec nothing = Vec::broadcast(-kInfinity);
    Vec row_max = nothing;
    if (masked) {
      for (int64_t c = begin; c < end; c += Vec::kWidth) {
        const Vec x = Vec::load(scores + c).select(kept >> c, nothing);
        x.store(scores + c);
        row_max = Vec::max(row_max, x);
      }
    } else {
      for (int64_t c = begin; c < end; c += Vec::kWidth) row_max = Vec::max(row_max, Vec::load(scores + c));
    }
    const float tile_max = row_max.reduce_max();
    if (!(tile_max > max[r]) && tile_max == tile_max) return;  // NaN enters, and stays
    if (max[r] != -kInfinity) {                                // else there is nothing to rescale yet
      const Vec shrunk = Vec::broadcast(exp2_of((max[r] - tile_max) * factor));
      scale_row(accumulator + r * width, width, shrunk);
      float* const row_sum = sum + r * kSumLanes;
      (LaneSum::load(row_sum) * shrunk).store(row_sum);
    }
    max[r] = tile_max;
  }

  // Scores of row r in place -> weights 2^(factor (s - max)), which join the open segment's sum.
  PYCORE_INLINE void weigh(int64_t r, float* scores, int64_t begin, int64_t end, float factor) const {
    float* const row_sum = sum + r * kSumLanes;
    if (max[r] == -kInfinity) {  // nothing kept so far, or NaN, which a maximum may drop
      Vec seen = Vec::zero();
      for (int64_t c = begin; c < end; c += Vec::kWidth) {
        const Vec weight = Vec::load(scores + c).exp2();
        weight.store(scores + c);
        seen = seen + weight;
      }
      const float added = seen.reduce_add();
      if (added == 0) return;
      max[r] = added;
      for (int v = 0; v < kSumVectors; ++v)
        Vec::broadcast(added).store(row_sum + v * Vec::kWidth);  // also where dropout leaves no weight that says so
      return;
    }
    const Vec power = Vec::broadcast(factor), largest = Vec::broadcast(max[r]);
    LaneSum by_lane = LaneSum::load(row_sum);
    by_lane.fold(begin, end, [&](int64_t c, Vec lanes) __attribute__((always_inline)) {
      const Vec weight = ((Vec::load(scores + c) - largest) * power).exp2();
      weight.store(scores + c);
      return lanes + weight;
    });
    by_lane.store(row_sum);
  }

  // A later segment's (max, sum, values) of row r join its total; `lane` is the row's place in the factors.
  PYCORE_INLINE void merge(int64_t r, float segment_max, float segment_sum, const float* values,
                           const MergeFactors& factors, int64_t lane) const {
    if (segment_max == -kInfinity) return;
    float* const row = total + r * width;
    if (total_max[r] == -kInfinity) {
      total_max[r] = segment_max;
      total_sum[r] = segment_sum;
      copy_row(values, width, row);
      return;
    }
    const Vec old_factor = Vec::broadcast(factors.total[lane]), factor = Vec::broadcast(factors.state[lane]);
    total_sum[r] = __builtin_fmaf(segment_sum, factors.state[lane], total_sum[r] * factors.total[lane]);
    total_max[r] = factors.max[lane];
    for (int64_t d = 0; d < width; d += Vec::kWidth) {
      Vec::fma(Vec::load(values + d), factor, Vec::load(row + d) * old_factor).store(row + d);
    }
  }

  // The open segment joins the totals, and a new one opens. Factors come for a vector of rows at a time: where few
  // tiles of a segment are visited, merging is a good part of the time.
  PYCORE_INLINE void close_segment(int64_t rows, float factor) const {
    for (int64_t first = 0; first < rows; first += Vec::kWidth) {
      const MergeFactors factors(Vec::load(total_max + first), Vec::load(max + first), factor);
      for (int64_t r = first; r < first + Vec::kWidth && r < rows; ++r) {
        if (max[r] == -kInfinity) continue;
        float* const values = accumulator + r * width;
        float* const row_sum = sum + r * kSumLanes;
        merge(r, max[r], LaneSum::load(row_sum).total(), values, factors, r - first);
        max[r] = -kInfinity;
        zero_rows(row_sum, kSumLanes);
        zero_rows(values, width);
      }
    }
  }

  // ---- states: a row's total in memory, to be merged by another call -----------------------------------------------

  static PYCORE_INLINE int64_t state_floats(int64_t values) { return 2 + values; }

  PYCORE_INLINE void store_state(int64_t r, float* state) const {
    state[0] = total_max[r];
    state[1] = total_sum[r];
    copy_row(total + r * width, width, state + 2);
  }

  PYCORE_INLINE void merge_state(int64_t r, const float* state, float factor) const {
    const MergeFactors factors(Vec::broadcast(total_max[r]), Vec::broadcast(state[0]), factor);
    merge(r, state[0], state[1], state + 2, factors, 0);
  }
};
