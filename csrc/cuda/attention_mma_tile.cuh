// SPDX-License-Identifier: Apache-2.0
// What the tensor-core kernels are made of: which rows and key tiles a block has, how rows come to shared memory and
// are turned there, and how segments merge.
#pragma once

#include "attention_device.cuh"
#include "attention_launch.h"

namespace pycore {
namespace {

constexpr int kMmaWarps = 4, kMmaThreads = kMmaWarps * kLanes;
constexpr int kTile = static_cast<int>(kKeyTile);
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Largest base-2 logit and sum of weights of what was merged so far; empty while the sum is 0.
struct SoftmaxTotal {
  float max = -INFINITY, sum = 0;
  float old_factor = 1, factor = 0;  // what the last merge multiplies the total and the newcomer with

  __device__ void merge(float other_max, float other_sum) {
    old_factor = 1;
    factor = 0;
    if (other_sum == 0) return;
    if (sum == 0) {
      max = other_max;
      sum = other_sum;
      factor = 1;
      return;
    }
    const float larger = fmaxf(max, other_max);
    old_factor = exp2_approx(max - larger);  // NaN if both are -inf: then the sum is NaN
    factor = exp2_approx(other_max - larger);
    max = larger;
    sum = fmaf(other_sum, factor, sum * old_factor);
  }
  __device__ float merged(float total, float newcomer) const {
    return factor == 0 ? total * old_factor : fmaf(newcomer, factor, total * old_factor);
  }
  // The sink joins; returns what the values are multiplied with in the end.
  __device__ float finish(const AttentionParams& params, int64_t h) {
    if (params.sink_logits) {
      const float sink = static_cast<const float*>(params.sink_logits)[h] * kLog2E;
      const float larger = fmaxf(max, sink), shrunk = sum == 0 ? 0.0f : exp2_approx(max - larger);
      sum = fmaf(sum, shrunk, exp2_approx(sink - larger));
      max = larger;
      return shrunk * (1.0f / sum);
    }
    return sum == 0 ? 0.0f : 1.0f / sum;
  }
  __device__ float lse() const { return fmaf(max, kLn2, logf(sum)); }
};

// One tile of query rows: row r is query first + r % rows of head head + r / rows.
struct MmaTile {
  int64_t item, split, b, kv_head, head, first;
  int heads, rows;

  __device__ void bind(const AttentionParams& params, const MmaPlan& plan, int64_t block) {
    item = block / plan.splits;
    split = block % plan.splits;
    // Query tiles of a head side by side, which share its keys; the last ones, of most keys, first.
    first = (plan.query_tiles - 1 - item % plan.query_tiles) * plan.rows;
    const int64_t others = item / plan.query_tiles, group = params.heads / params.kv_heads;
    const int64_t in_group = others % plan.head_tiles * plan.heads;
    kv_head = others / plan.head_tiles % params.kv_heads;
    b = others / plan.head_tiles / params.kv_heads;
    head = kv_head * group + in_group;
    heads = static_cast<int>(group - in_group < plan.heads ? group - in_group : plan.heads);
    rows = plan.rows;
  }
  __device__ int64_t query(int r) const { return first + r % rows; }
  __device__ bool exists(const AttentionParams& params, int r) const {
    return r / rows < heads && query(r) < params.query_length;
  }
};

// The first tile that some query of p_lo..p_hi visits in the n-th segment they visit, or kNoTile.
__device__ inline int64_t segment_start(const RowMap& map, int64_t p_lo, int64_t p_hi, int64_t n) {
  int64_t tile = map.next_tile(p_lo, p_hi, 0);
  for (; n > 0 && tile != kNoTile; --n) {
    tile = map.next_tile(p_lo, p_hi, (tile / kSegmentTiles + 1) * kSegmentTiles);
  }
  return tile;
}

// A key tile to visit.
struct KeyTile {
  int64_t index = kNoTile;
  uint64_t bits = 0;    // keys outside of which no row keeps any; others are not read
  bool masked = false;  // whether some row may keep only some of it

  __device__ bool any() const { return index != kNoTile; }
  __device__ int64_t segment() const { return index / kSegmentTiles; }
};

// The first tile from `index` on of which rows p_lo..p_hi may keep something. A call, as is all that is large and not
// the products: these hold most registers.
__device__ __noinline__ KeyTile next_key_tile(const RowMap& map, int64_t p_lo, int64_t p_hi, int64_t index) {
  KeyTile tile;
  for (;; ++index) {
    index = map.next_tile(p_lo, p_hi, index);
    if (index == kNoTile) return tile;
    tile.bits = map.present_bits(index) & map.schedule.reach_bits(p_lo, p_hi, index);
    const Cover cover = map.schedule.cover(p_lo, p_hi, index);
    tile.masked = tile.bits != ~uint64_t{0} || cover != Cover::kAll;
    if (tile.bits == 0 || cover == Cover::kNone) continue;
    tile.index = index;
    return tile;
  }
}

__device__ __noinline__ float base2_logit(const AttentionParams& params, int64_t h, int64_t p, int64_t j,
                                          float product) {
  float slope;
  return logit_of(params, h, p, j, product, &slope) * kLog2E;
}

// All ones where an infinity or a NaN has its exponent.
template <class T>
struct ExponentBits;
template <>
struct ExponentBits<Float16> {
  static constexpr uint16_t kBits = 0x7c00;
};
template <>
struct ExponentBits<BFloat16> {
  static constexpr uint16_t kBits = 0x7f80;
};

// A kernel's tiles in shared memory. Rows are 16 bytes longer than their channels, so that ldmatrix meets every bank.
template <class T, int kChannels, int kBlocks, bool kOptions>
struct MmaShared {
  static constexpr int kRows = kMmaWarps * 16 * kBlocks, kStride = kChannels + 8;
  T query[kRows * kStride], key[kTile * kStride], value[kTile * kStride];
  T turned[kOptions ? kRows * kStride : 8];  // the query as the tile sees it
  uint64_t kept[kRows], dropped[kOptions ? kRows : 1];
  // The same for all threads, here because registers are short.
  RowMap map;
  MmaTile tile;
  int64_t p_lo, p_hi;    // where the tile's first and last valid query stand
  KeyTile key_tiles[2];  // the one visited and the next
};

// `rows` rows of kChannels halves; row_of(r) is where row r has its `channels` halves, or null: zeros.
template <class T, int kChannels, class RowOf>
__device__ void load_rows(T* shared, int rows, int channels, bool aligned, const void* anywhere, RowOf row_of) {
  constexpr int kChunks = kChannels / 8, kStride = kChannels + 8;
  PYCORE_UNROLL_BY(1)
  for (int n = threadIdx.x; n < rows * kChunks; n += kMmaThreads) {
    const int r = n / kChunks, c = n % kChunks * 8;
    const T* row = row_of(r);
    const int left = row == nullptr || channels < c ? 0 : channels - c < 8 ? channels - c : 8;
    T* to = shared + r * kStride + c;
    if (aligned) {
      copy_async(to, left > 0 ? row + c : anywhere, 2 * left);
    } else {
      for (int k = 0; k < 8; ++k) to[k] = k < left ? row[c + k] : T{0};
    }
  }
}

// The pair i of a row turned by `distance`, into `out`, which may be the row itself.
template <class T>
__device__ void turn_pair(const AttentionParams& params, const T* x, int64_t distance, int i, T* out) {
  const int half = static_cast<int>(params.rope_dim / 2);
  const int one = params.rope_interleaved ? 2 * i : i, two = params.rope_interleaved ? 2 * i + 1 : half + i;
  int64_t row = distance < 0 ? -distance : distance;
  if (row >= params.rope_rows) row = params.rope_rows - 1;  // in bounds whatever the caller's lengths say
  const float cosine = static_cast<const float*>(params.rope_cos)[row * params.rope_stride + i];
  float sine = static_cast<const float*>(params.rope_sin)[row * params.rope_stride + i];
  if (distance < 0) sine = -sine;
  const float a = to_float(x[one]), b = to_float(x[two]);
  out[one] = from_float<T>(fmaf(a, cosine, -(b * sine)));
  out[two] = from_float<T>(fmaf(b, cosine, a * sine));
}

// A warp for each row of a tile whose segments were blocks of their own.
template <class T>
__global__ void merge_kernel(const __grid_constant__ AttentionParams params, const __grid_constant__ MmaPlan plan) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kMmaThreads + threadIdx.x) / kLanes;
  const int64_t item = warp / (plan.heads * plan.rows), lane = threadIdx.x % kLanes;
  const int r = static_cast<int>(warp % (plan.heads * plan.rows));
  if (item >= plan.items) return;
  MmaTile tile;
  tile.bind(params, plan, item * plan.splits);
  if (!tile.exists(params, r)) return;
  const RowMap map = bounded_row_map(params, tile.b, tile.head);
  const int64_t left = map.queries - tile.first, p_lo = map.query_position(tile.first);
  const int64_t p_hi = p_lo + (left < tile.rows ? left : tile.rows) - 1;
  const bool valid = tile.query(r) < map.queries;
  SoftmaxTotal total;
  constexpr int kEach = kMostChannels / kLanes;
  float out[kEach] = {};
  int64_t key_tile = valid ? map.next_tile(p_lo, p_hi, 0) : kNoTile;
  for (int64_t n = 0; key_tile != kNoTile; ++n) {
    const float* state = plan.partial(params, item, n, r);
    total.merge(state[0], state[1]);
    for (int k = 0; k < kEach; ++k) {
      const int64_t c = k * kLanes + lane;
      if (c < params.value_dim) out[k] = total.merged(out[k], state[2 + c]);
    }
    key_tile = map.next_tile(p_lo, p_hi, (key_tile / kSegmentTiles + 1) * kSegmentTiles);
  }
  const int64_t h = tile.head + r / tile.rows, index = row_index(params, tile.b, h, tile.query(r));
  const float factor = total.finish(params, h);
  T* row = static_cast<T*>(params.out) + index * params.value_dim;
  for (int k = 0; k < kEach; ++k) {
    const int64_t c = k * kLanes + lane;
    if (c < params.value_dim) row[c] = from_float<T>(valid ? out[k] * factor + 0.0f : 0.0f);
  }
  if (lane == 0) static_cast<float*>(params.lse)[index] = valid ? total.lse() : -INFINITY;
}

}  // namespace
}  // namespace pycore
