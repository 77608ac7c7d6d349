// SPDX-License-Identifier: Apache-2.0
// The forward pass in tiles: half precision on tensor cores (mma.sync, sm_80 and newer), float32 on FMAs. The warps of
// a block take a tile of query rows, those of several heads of a group where a head has few, and walk its key tiles in
// order:
//   keys arrive | values set out | scores | values arrive | next keys set out | softmax | weights times values
// Scores, weights and output stay in registers, keys and values pass through one buffer each (cp.async).
//
// A row's bits depend on nothing beside it. The products of a row add in the same order whatever tile it is in, its
// softmax (base 2, online) knows only its own maxima, and a tile or segment of which it keeps nothing multiplies it by
// 1 and adds 0. Segments merge in order (SoftmaxTotal), here or, where each is a block of its own, in merge_kernel.
//
// Rotation (attention.h): the query is turned anew for each tile and rounded to its dtype, the key by its place in the
// tile. A tile with pairs on both sides of the distance limit is taken twice, first for far pairs, then for near ones.
#pragma once

#include "launch.h"
#include "segments.cuh"

namespace pycore {
namespace {

// A kernel's tiles in shared memory.
template <class T, int kChannels, int kBlocks, int kWarps, bool kOptions>
struct ForwardShared {
  static constexpr int kRows = kWarps * 16 * kBlocks, kStride = row_stride<T>(kChannels);
  T query[kRows * kStride], key[kTile * kStride], value[kTile * kStride];
  T turned[kOptions ? kRows * kStride : 8];  // the query as the tile sees it
  uint64_t kept[kRows], dropped[kOptions ? kRows : 1];
  // The same for all threads, here because registers are short.
  RowMap map;
  QueryTile tile;
  int64_t p_lo, p_hi;      // where the tile's first and last valid query stand
  int64_t segment;         // the one the block has to itself, or -1
  VisitedTile visited[2];  // the key tile in hand and the next
  TileList<kWarps * kLanes> list;
};

// A lane's scores of a row, 8 keys times two from j on, to logits, one at a time and whatever they take.
__device__ __noinline__ void any_logits(const AttentionParams& params, const TileSchedule& schedule, int64_t b,
                                        int64_t h, int64_t p, int64_t j, uint64_t kept, float* scores) {
  PYCORE_UNROLL_BY(1)
  for (int n = 0; n < 16; ++n) {
    const int column = n / 2 * 8 + n % 2;
    float slope;
    if (kept >> column & 1) scores[n] = logit_of(params, schedule, b, h, p, j + column, scores[n], &slope);
  }
}

template <class T, int kChannels, int kBlocks, int kWarps, bool kOptions>
struct Forward {
  using Shared = ForwardShared<T, kChannels, kBlocks, kWarps, kOptions>;
  static constexpr int kRows = Shared::kRows, kStride = Shared::kStride, kValueTiles = kChannels / 8;
  static constexpr int kThreads = kWarps * kLanes;

  const AttentionParams& params;
  const TilePlan& plan;
  Shared& shared;
  const QueryTile& tile;
  const RowMap& map;
  const int lane = threadIdx.x % kLanes, warp_row = warp_of_tile<kWarps>() * 16 * kBlocks;
  // Of rows 16 m + g and 16 m + g + 8 of the warp, with g = lane / 4: the open segment.
  float max[kBlocks][2], sum[kBlocks][2], out[kBlocks][kValueTiles][4];

  __device__ Forward(const AttentionParams& params, const TilePlan& plan)
      : params(params),
        plan(plan),
        shared(*reinterpret_cast<Shared*>(shared_memory())),
        tile(shared.tile),
        map(shared.map) {}

  // Whether the query stands in the problem, and has keys at all.
  __device__ bool valid(int r) const { return r / tile.rows < tile.heads && tile.query(r) < map.queries; }
  __device__ int row_of(int m, int half) const { return warp_row + 16 * m + 8 * half + lane / 4; }
  __device__ int64_t position(int r) const { return shared.p_lo + r % tile.rows; }
  __device__ bool drops() const { return kOptions && params.dropout_p > 0; }
  __device__ void load_key(const VisitedTile& visited) const {
    load_key_rows<T, kChannels, kThreads>(shared.key, params.key, params.key_strides, params.head_dim, plan.aligned_key,
                                          map, tile.b, tile.kv_head, visited);
  }
  __device__ void load_value(const VisitedTile& visited) const {
    load_key_rows<T, kChannels, kThreads>(shared.value, params.value, params.value_strides, params.value_dim,
                                          plan.aligned_value, map, tile.b, tile.kv_head, visited);
  }
  __device__ void load_query() const {
    load_rows<T, kChannels, kThreads>(shared.query, kRows, static_cast<int>(params.head_dim), plan.aligned_query,
                                      params.query, [&](int r) {
                                        return valid(r) ? row_pointer<T>(params.query, params.query_strides, tile.b,
                                                                         tile.head + r / tile.rows, tile.query(r))
                                                        : nullptr;
                                      });
  }

  // The keys of this warp's rows, in shared memory; false if no row has any.
  __device__ bool mask(const VisitedTile& visited, Turned turned) const {
    return mask_rows<kOptions>(params, map, tile.b, visited, turned, warp_row, 16 * kBlocks, shared.kept,
                               shared.dropped,
                               [&](int r) { return RowPlace{valid(r), tile.head + r / tile.rows, position(r)}; });
  }

  // This warp's queries, turned for the tile.
  __device__ void turn_query(int64_t key_tile, bool far) const {
    __syncwarp();
    turn_rows<T, kChannels>(
        params, shared.query + warp_row * kStride, shared.turned + warp_row * kStride, 0, 16 * kBlocks, 1, [&](int n) {
          return far ? params.distance_limit : map.schedule.place(position(warp_row + n)) - key_tile * kKeyTile;
        });
    __syncwarp();
  }

  // Scores to natural logits.
  __device__ void logits_of(float (&scores)[8][4], int half, int r, uint64_t kept, int64_t key_tile) const {
    // Rows past the tile's heads read a table too, the last head's; what comes of it is masked, or not stored.
    const int head = r / tile.rows < tile.heads ? r / tile.rows : tile.heads - 1;
    const int64_t h = tile.head + head, p = position(r), base = key_tile * kKeyTile;
    const int first = 2 * (lane % 4);
    if (DistanceLogits::apply<T>(params, map.schedule, key_tile)) {
      const DistanceLogits logits(params, tile.b, h, map.schedule.place(p) - base);
      PYCORE_UNROLL
      for (int n = 0; n < 8; ++n) {
        PYCORE_UNROLL
        for (int k = 0; k < 2; ++k) {
          float slope;
          scores[n][2 * half + k] = logits.natural(first + 8 * n + k, scores[n][2 * half + k], &slope);
        }
      }
      return;
    }
    float memory[16];
    PYCORE_UNROLL
    for (int n = 0; n < 16; ++n) memory[n] = scores[n / 2][2 * half + n % 2];
    any_logits(params, map.schedule, tile.b, h, p, base + first, kept, memory);
    __syncwarp();
    PYCORE_UNROLL
    for (int n = 0; n < 16; ++n) scores[n / 2][2 * half + n % 2] = memory[n];
  }

  // Scores to weights, which join the rows' sums.
  __device__ void soften(float (&scores)[kBlocks][8][4], int64_t key_tile, bool masked) {
    const float scale = base2_factor<kOptions>(params);
    PYCORE_UNROLL
    for (int m = 0; m < kBlocks; ++m) {
      float factors[2];
      PYCORE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int r = row_of(m, half), shift = 2 * (lane % 4);
        const uint64_t row_bits = masked ? shared.kept[r] >> shift : ~uint64_t{0};
        const RowBits kept(row_bits);
        if (kOptions) logits_of(scores[m], half, r, row_bits, key_tile);
        float largest = -INFINITY;
        PYCORE_UNROLL
        for (int n = 0; n < 8; ++n) {
          PYCORE_UNROLL
          for (int k = 0; k < 2; ++k) {
            float& score = scores[m][n][2 * half + k];
            if (masked && !kept.at(8 * n + k)) score = -INFINITY;
            largest = fmaxf(largest, score);
          }
        }
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
        largest = fmaxf(max[m][half], largest * scale);
        const float from = largest == -INFINITY ? 0.0f : largest;  // so that only NaN gives NaN
        const float factor = exp2_approx(max[m][half] - from);
        max[m][half] = largest;
        float added = sum[m][half] * factor;
        PYCORE_UNROLL
        for (int n = 0; n < 8; ++n) {
          PYCORE_UNROLL
          for (int k = 0; k < 2; ++k) {
            float& score = scores[m][n][2 * half + k];
            score = exp2_approx(fmaf(score, scale, -from));
            added += score;
          }
        }
        sum[m][half] = added;
        factors[half] = factor;
        if (drops()) {
          const float keep_factor = static_cast<float>(1 / (1 - params.dropout_p));
          const RowBits dropped(shared.dropped[r] >> shift);
          PYCORE_UNROLL
          for (int n = 0; n < 8; ++n) {
            PYCORE_UNROLL
            for (int k = 0; k < 2; ++k) {
              float& weight = scores[m][n][2 * half + k];
              weight = dropped.at(8 * n + k) ? 0.0f : weight * keep_factor;
            }
          }
        }
      }
      // A maximum that stands, as most do after a few tiles, leaves the sums as they are.
      if (__ballot_sync(kAllLanes, factors[0] != 1 || factors[1] != 1) == 0) continue;
      PYCORE_UNROLL
      for (int n = 0; n < kValueTiles; ++n) {
        PYCORE_UNROLL
        for (int k = 0; k < 4; ++k) out[m][n][k] *= factors[k / 2];
      }
    }
  }

  __device__ void open_segment() {
    PYCORE_UNROLL
    for (int m = 0; m < kBlocks; ++m) {
      PYCORE_UNROLL
      for (int half = 0; half < 2; ++half) {
        max[m][half] = -INFINITY;
        sum[m][half] = 0;
      }
    }
    clear(out);
  }
  // The four lanes of a row have a sum each.
  __device__ void close_segment() {
    PYCORE_UNROLL
    for (int m = 0; m < kBlocks; ++m) {
      PYCORE_UNROLL
      for (int half = 0; half < 2; ++half) {
        sum[m][half] += __shfl_xor_sync(kAllLanes, sum[m][half], 1);
        sum[m][half] += __shfl_xor_sync(kAllLanes, sum[m][half], 2);
      }
    }
  }

  // What of the tile's values is not finite goes to the rows that keep it, far or near, and nowhere else; all threads.
  // After it shared.kept is of no use.
  __device__ void guard_values(const VisitedTile& visited) {
    mask(visited, Turned::kAll);
    for (int r = warp_row + lane; drops() && r < warp_row + 16 * kBlocks; r += kLanes) {
      shared.kept[r] &= ~shared.dropped[r];
    }
    __syncwarp();
    add_not_finite<T, kChannels>(out, shared.value, shared.kept, warp_row, true);
    take_not_finite<T, kChannels, kThreads>(shared.value);
  }

  // Everything of a tile whose keys are under way; then those of the next one, which it finds, are.
  __device__ void visit(const VisitedTile& visited, VisitedTile& next) {
    copy_async_wait<0>();
    __syncthreads();  // the keys are here, and nobody needs the last values
    load_value(visited);
    copy_async_commit();
    const VisitedTile found =
        next_key_tile(&shared.list, &map, shared.p_lo, shared.p_hi, visited.index + 1, shared.segment);
    if (threadIdx.x == 0) next = found;
    const bool rope = kOptions && params.rope_cos != nullptr;
    const TurnPasses<kOptions> turns(params, map, shared.p_lo, shared.p_hi, visited.index);
    const bool masked = visited.masked || (kOptions && ((turns.far && turns.near) || drops()));
    for (int pass = turns.far ? 0 : 1; pass < (turns.near ? 2 : 1); ++pass) {
      const bool far = pass == 0, first = far || !turns.far, last = !far || !turns.near;
      if (rope && !far) {
        turn_rows<T, kChannels>(params, shared.key, shared.key, threadIdx.x / kLanes, kTile, kWarps,
                                [&](int c) { return key_turn(map.schedule, visited.index, c); });
        __syncthreads();
      }
      const bool any = masked ? mask(visited, far ? Turned::kFar : Turned::kNear) : warp_row < tile.heads * tile.rows;
      float scores[kBlocks][8][4];
      if (any) {
        if (rope) turn_query(visited.index, far);
        RowsTimesTile<T, kChannels, kBlocks>::run(scores, (rope ? shared.turned : shared.query) + warp_row * kStride,
                                                  shared.key);
      }
      copy_async_wait<0>();
      __syncthreads();  // the values are here, and nobody needs the keys
      if (last && next.any()) load_key(next);
      if (last) copy_async_commit();
      const bool guard = masked && first && has_not_finite<T, kChannels, kThreads>(shared.value);
      if (any) soften(scores, visited.index, masked);
      if (guard) guard_values(visited);
      if (any) WeightsTimesTile<T, kChannels, kBlocks>::run(out, scores, shared.value);
    }
  }

  __device__ void store_row(int m, int half, float factor, TwoParts lse) const {
    const int r = row_of(m, half);
    const int64_t index = row_index(params, tile.b, tile.head + r / tile.rows, tile.query(r));
    T* row = static_cast<T*>(params.out) + index * params.value_dim;
    const bool empty = !valid(r);
    PYCORE_UNROLL
    for (int n = 0; n < kValueTiles; ++n) {
      const int c = 8 * n + 2 * (lane % 4);
      // -0 becomes 0: which of them a sum of nothing is depends on the tiles that were visited.
      const float one = empty ? 0.0f : out[m][n][2 * half] * factor + 0.0f;
      const float two = empty ? 0.0f : out[m][n][2 * half + 1] * factor + 0.0f;
      store_two(row, c, params.value_dim, plan.pairs_out, one, two);
    }
    if (lane % 4 == 0) store_lse(params, index, empty ? TwoParts{-INFINITY, 0.0f} : lse);
  }

  // The open segment's state, for merge_kernel.
  __device__ void store_partial() const {
    PYCORE_UNROLL
    for (int m = 0; m < kBlocks; ++m) {
      PYCORE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int r = row_of(m, half);
        if (r >= tile.heads * tile.rows) continue;
        float* state = plan.partial(params, tile.item, tile.split, r);
        if (lane % 4 == 0) {
          state[0] = max[m][half];
          state[1] = sum[m][half];
        }
        PYCORE_UNROLL
        for (int n = 0; n < kValueTiles; ++n) {
          for (int k = 0; k < 2; ++k) {
            const int c = 8 * n + 2 * (lane % 4) + k;
            if (c < params.value_dim) state[2 + c] = out[m][n][2 * half + k];
          }
        }
      }
    }
  }

  // Thread 0 finds the block's rows.
  __device__ void bind() {
    shared.tile.bind(params, plan, blockIdx.x);
    shared.map = bounded_row_map(params, tile.b, tile.head);
    shared.p_lo = map.query_position(tile.first);
    shared.p_hi = shared.p_lo + tile.valid_rows(map) - 1;
    shared.segment = -1;
    shared.list.open();
  }

  // The first key tile; all threads.
  __device__ VisitedTile find_first() {
    const bool split = plan.splits > 1;
    if (tile.valid_rows(map) <= 0) return VisitedTile();
    const int64_t start = !split        ? 0
                          : plan.starts ? plan.starts[tile.item * plan.splits + tile.split]
                                        : SegmentStart(map, shared.p_lo, shared.p_hi, tile.split).tile;
    if (start == kNoTile) return VisitedTile();
    if (split) {
      if (threadIdx.x == 0) shared.segment = start / kSegmentTiles;
      __syncthreads();
    }
    return next_key_tile(&shared.list, &map, shared.p_lo, shared.p_hi, start, shared.segment);
  }

  __device__ void run() {
    if (threadIdx.x == 0) bind();
    __syncthreads();
    const VisitedTile found = find_first();
    if (plan.splits > 1 && shared.segment < 0) return;  // a segment that nobody merges
    if (threadIdx.x == 0) shared.visited[0] = found;
    load_query();
    __syncthreads();
    if (shared.visited[0].any()) load_key(shared.visited[0]);
    copy_async_commit();
    open_segment();
    // Of segments before the open one: rarely used and never at the same time as the products, so they stay in memory.
    constexpr int kOuts = kBlocks * kValueTiles * 4;
    float memory[kOuts + 4 * kBlocks];
    const int zero = opaque_zero();
    bool merged = false;
    PYCORE_UNROLL
    for (int n = kOuts; n < kOuts + 4 * kBlocks; n += 2) {
      memory[zero + n] = -INFINITY;
      memory[zero + n + 1] = 0;
    }
    // Leaves the total in place of the open segment.
    const auto merge = [&] {
      close_segment();
      PYCORE_UNROLL
      for (int m = 0; m < kBlocks; ++m) {
        PYCORE_UNROLL
        for (int half = 0; half < 2; ++half) {
          SoftmaxTotal total;
          total.max = memory[zero + kOuts + 4 * m + 2 * half];
          total.sum = memory[zero + kOuts + 4 * m + 2 * half + 1];
          total.merge(max[m][half], sum[m][half]);
          PYCORE_UNROLL
          for (int n = 0; n < kValueTiles; ++n) {
            PYCORE_UNROLL
            for (int k = 2 * half; k < 2 * half + 2; ++k) {
              float& at = memory[zero + (m * kValueTiles + n) * 4 + k];
              at = out[m][n][k] = total.merged(merged ? at : 0.0f, out[m][n][k]);
            }
          }
          memory[zero + kOuts + 4 * m + 2 * half] = max[m][half] = total.max;
          memory[zero + kOuts + 4 * m + 2 * half + 1] = sum[m][half] = total.sum;
        }
      }
      merged = true;
    };
    const bool split = plan.splits > 1;
    for (int at = 0; shared.visited[at].any(); at ^= 1) {
      visit(shared.visited[at], shared.visited[at ^ 1]);
      const VisitedTile &last = shared.visited[at], &next = shared.visited[at ^ 1];
      if (split || (next.any() && next.segment() == last.segment())) continue;
      merge();
      if (next.any()) open_segment();
    }
    copy_async_wait<0>();
    if (split) {
      close_segment();
      return store_partial();
    }
    PYCORE_UNROLL
    for (int m = 0; m < kBlocks; ++m) {
      PYCORE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int r = row_of(m, half);
        if (!tile.exists(params, r)) continue;
        SoftmaxTotal total;
        total.max = max[m][half];
        total.sum = sum[m][half];
        const float factor = total.finish(params, tile.head + r / tile.rows, kOptions);
        store_row(m, half, factor, total.lse(params, kOptions));
      }
    }
  }
};

// Blocks a multiprocessor, at least: decoding reads, and what is under way grows with them. The compiler would rather
// have 194 registers than 168 with 128 channels, which is one block fewer.
template <class T, int kChannels, int kBlocks, bool kOptions>
constexpr int kForwardBlocks = sizeof(T) == 2 && kChannels <= 128 && kBlocks == 1 && !kOptions ? 3 : 1;

template <class T, int kChannels, int kBlocks, int kWarps, bool kOptions>
__global__ void __launch_bounds__(kWarps* kLanes, (kForwardBlocks<T, kChannels, kBlocks, kOptions>))
    forward_kernel(const __grid_constant__ AttentionParams params, const __grid_constant__ TilePlan plan) {
  Forward<T, kChannels, kBlocks, kWarps, kOptions>(params, plan).run();
}

// use(kernel, threads, shared bytes) with the plan's kernel.
template <class T, int kChannels, class Use>
auto with_forward_kernel(const TilePlan& plan, const Use& use) {
  constexpr bool kHalf = sizeof(T) == 2;
  const auto with = [&](auto blocks, auto warps, auto options) {
    constexpr int kBlocks = decltype(blocks)::value, kWarps = decltype(warps)::value;
    constexpr bool kOptions = decltype(options)::value;
    return use(forward_kernel<T, kChannels, kBlocks, kWarps, kOptions>, kWarps * kLanes,
               static_cast<int64_t>(sizeof(ForwardShared<T, kChannels, kBlocks, kWarps, kOptions>)));
  };
  if (plan.options) return with(Number<1>(), Number<4>(), Number<true>());
  if constexpr (kHalf && kChannels <= 128) {
    if (plan.shape == TileShape::kWide) return with(Number<2>(), Number<4>(), Number<false>());
    if (plan.shape == TileShape::kPaired) return with(Number<2>(), Number<2>(), Number<false>());
  }
  return with(Number<1>(), Number<4>(), Number<false>());
}

template <class T>
int64_t forward_shared_of(const TilePlan& plan) {
  return with_channels(plan.channels, [&](auto channels) {
    return with_forward_kernel<T, decltype(channels)::value>(
        plan, [](auto, int, int64_t shared) -> int64_t { return shared; });
  });
}

template <class T>
Status launch_forward_of(const AttentionParams& params, const TilePlan& plan, void* stream) {
  Status status = launch_list<T>(params, plan, stream);
  if (!status.ok()) return status;
  status = with_channels(plan.channels, [&](auto channels) {
    return with_forward_kernel<T, decltype(channels)::value>(plan, [&](auto kernel, int threads, int64_t shared) {
      return launch(kernel, plan.items * plan.splits, threads, shared, stream, params, plan);
    });
  });
  if (!status.ok() || plan.splits == 1) return status;
  return launch_merge<T>(params, plan, stream);
}

}  // namespace
}  // namespace pycore
