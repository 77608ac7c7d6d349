// SPDX-License-Identifier: Apache-2.0
// Rotation in tiles, and logits of a distance.
#pragma once

#include "tile.cuh"

namespace pycore {
namespace {

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

// Logits where they take only the score and a distance: a row's against a tile whose keys stand in place.
struct DistanceLogits {
  const float* table = nullptr;  // distance_bias of the head
  float scale, cap, alibi = 0;
  int distance, limit, last = 0;  // to the tile's first key; the distance limit; the table's last entry
  int after;                      // what a negative distance is multiplied by

  static constexpr int64_t kMost = int64_t{1} << 30;
  // float32 bends by the C library's tanh, one pair at a time.
  template <class T>
  static __device__ bool apply(const AttentionParams& params, const TileSchedule& schedule, int64_t tile) {
    return (params.softcap == 0 || sizeof(T) == 2) && params.block_bias == nullptr && schedule.in_place(tile);
  }
  __device__ DistanceLogits(const AttentionParams& params, int64_t b, int64_t h, int64_t distance)
      : scale(static_cast<float>(params.scale)),
        cap(static_cast<float>(params.softcap)),
        distance(static_cast<int>(clamped(distance, -kMost, kMost))),
        limit(static_cast<int>(clamped(params.distance_limit, 0, kMost))),
        after(params.symmetric_bias ? -1 : 0) {
    if (params.distance_bias) {
      table = static_cast<const float*>(params.distance_bias) + h * params.bias_stride;
      last = static_cast<int>(clamped(params.bias_length - 1, 0, kMost));
    } else if (params.alibi_slopes) {
      alibi = slope_of<float>(params, b, h);
    }
  }
  // *slope is the logit's derivative.
  __device__ float natural(int column, float product, float* slope) const {
    int seen = distance - column;
    seen = seen < 0 ? seen * after : seen;
    seen = seen < limit ? seen : limit;
    const float bias = table ? table[seen < last ? seen : last] : -alibi * static_cast<float>(seen);
    *slope = scale;
    float logit = product * scale;
    if (cap > 0) {
      // tanh(x) = 1 - 2 / (e^2x + 1), within a few units of 2^-24 of 1.
      const float bent = 1 - 2 * reciprocal_approx(exp2_approx(logit * (2 * kLog2E * (1 / cap))) + 1);
      logit = cap * bent;
      *slope *= 1 - bent * bent;
    }
    return logit + bias;
  }
};

}  // namespace
}  // namespace pycore
