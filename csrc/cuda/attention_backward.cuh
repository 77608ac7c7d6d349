// SPDX-License-Identifier: Apache-2.0
// The backward pass in tiles, nothing added by two: a block of four warps takes 64 queries of a head and walks their
// key tiles for grad_query, or 64 keys and walks the queries of all heads of their group for grad_key and grad_value.
// Scores are recomputed (from lse, base 2), so the two make seven products a tile where atomics would do with five.
//
// With the rows that a block holds as rows of all products, what the two products of a pair give lies in registers as
// the weights of the next product:
//   grad_query   dP = dO V^T     S = Q K^T     dQ += dS K
//   grad_key     dP^T = V dO^T   S^T = K Q^T   dV += P^T dO   dK += dS^T Q
// Of the two tiles that pass by, each arrives while the other is multiplied.
//
// Rotation (attention.h): a tile's share of grad_query is turned back before it joins the sum. grad_key takes near
// pairs of all queries first, in the frame of the turned keys, turns their sum back, and then the far ones.
#pragma once

#include "attention_segments.cuh"

namespace pycore {
namespace {

constexpr int kBackwardWarps = 4, kBackwardThreads = kBackwardWarps * kLanes, kWarpRows = 16;

// A kernel's tiles in shared memory. Where pairs turn, a warp's sums pass through two tiles that lie side by side:
// value and turned (grad_query), or query and grad_out (grad_key).
template <class T, int kChannels, bool kOptions>
struct BackwardShared {
  static constexpr int kStride = row_stride<T>(kChannels);
  T query[kTile * kStride], grad_out[kTile * kStride], key[kTile * kStride], value[kTile * kStride];
  T turned[kOptions ? kTile * kStride : 8];  // the queries as a key tile sees them, or the keys as near queries do
  float lse[kTile], delta[kTile];            // of the query tile
  uint64_t kept[kTile], dropped[kOptions ? kTile : 1];  // of its rows, the keys
  // The same for all threads, here because registers are short.
  RowMap map;
  VisitedTile visited[2];  // the tile in hand and the next
  TileList<kBackwardThreads> list;
};

// What a pair adds to gradients: its score's, and its weight, after dropout, to the value's.
template <bool kOptions>
struct PairGradient {
  float weight, grad;

  __device__ PairGradient(const AttentionParams& params, float weight, float grad_weight, float delta, bool dropped,
                          float slope)
      : weight(weight) {
    if (kOptions && params.dropout_p > 0) {
      const float factor = dropped ? 0.0f : static_cast<float>(1 / (1 - params.dropout_p));
      this->weight *= factor;
      grad_weight *= factor;
    }
    grad = weight * (grad_weight - delta);
    if (kOptions) grad *= slope;
  }
};

template <class T, int kChannels, bool kOptions>
struct Backward {
  using Shared = BackwardShared<T, kChannels, kOptions>;
  using Sums = float[1][kChannels / 8][4];
  static constexpr int kStride = Shared::kStride, kThreads = kBackwardThreads;
  static constexpr int kSumStride = kChannels + 8;

  const AttentionBackwardParams& params;
  const AttentionParams& forward;
  const TilePlan& plan;
  Shared& shared;
  const RowMap& map;
  const int lane = threadIdx.x % kLanes, warp = static_cast<int>(threadIdx.x) / kLanes, warp_row = warp * kWarpRows;
  int64_t b = 0, kv_head = 0;

  __device__ Backward(const AttentionBackwardParams& params, const TilePlan& plan)
      : params(params),
        forward(params.forward),
        plan(plan),
        shared(*reinterpret_cast<Shared*>(shared_memory())),
        map(shared.map) {}

  __device__ int row_of(int half) const { return warp_row + 8 * half + lane / 4; }
  __device__ bool turns() const { return kOptions && forward.rope_cos != nullptr; }
  // Without options: a score times this is the base-2 logit, and a sum of scores' gradients times this the gradient.
  __device__ float scale2() const { return static_cast<float>(forward.scale) * kLog2E; }
  __device__ float factor() const { return kOptions ? 1.0f : static_cast<float>(forward.scale); }
  __device__ void load_key(const VisitedTile& keys) const {
    load_key_rows<T, kChannels, kThreads>(shared.key, forward.key, forward.key_strides, forward.head_dim,
                                          plan.aligned_key, map, b, kv_head, keys);
  }
  __device__ void load_value(const VisitedTile& keys) const {
    load_key_rows<T, kChannels, kThreads>(shared.value, forward.value, forward.value_strides, forward.value_dim,
                                          plan.aligned_value, map, b, kv_head, keys);
  }
  // Of head h, queries first .. first + count - 1.
  __device__ void load_query(int64_t h, int64_t first, int64_t count) const {
    const T* rows = row_pointer<T>(forward.query, forward.query_strides, b, h, first);
    load_rows<T, kChannels, kThreads>(
        shared.query, kTile, static_cast<int>(forward.head_dim), plan.aligned_query, forward.query,
        [&](int r) { return r < count ? rows + r * forward.query_strides.row : nullptr; });
  }
  __device__ void load_grad_out(int64_t h, int64_t first, int64_t count) const {
    const T* rows = row_pointer<T>(params.grad_out, params.grad_out_strides, b, h, first);
    load_rows<T, kChannels, kThreads>(
        shared.grad_out, kTile, static_cast<int>(forward.value_dim), plan.aligned_grad_out, params.grad_out,
        [&](int r) { return r < count ? rows + r * params.grad_out_strides.row : nullptr; });
  }
  __device__ void load_softmax(int64_t h, int64_t first, int64_t count) const {
    const int r = static_cast<int>(threadIdx.x) % kTile;
    const void* from = threadIdx.x < kTile ? forward.lse : params.delta;
    float* to = threadIdx.x < kTile ? shared.lse : shared.delta;
    const int64_t index = row_index(forward, b, h, r < count ? first + r : first);
    copy_async<4>(to + r, static_cast<const float*>(from) + index, r < count ? 4 : 0);
  }

  // The warp's sums through shared memory (`slab`: 64 rows of kSumStride), turned back by distance_of(row): added to
  // `total`, which may be the same array.
  template <class DistanceOf>
  __device__ void turn_back(const Sums& sums, float* slab, DistanceOf distance_of, bool add, Sums& total) const {
    const int half_dim = static_cast<int>(forward.rope_dim / 2), rope_dim = 2 * half_dim;
    __syncwarp();
    PYCORE_UNROLL
    for (int n = 0; n < kChannels / 8; ++n) {
      PYCORE_UNROLL
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<TwoFloats*>(slab + row_of(half) * kSumStride + 8 * n +
                                      2 * (lane % 4)) = {{sums[0][n][2 * half], sums[0][n][2 * half + 1]}};
      }
    }
    __syncwarp();
    PYCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float* row = slab + row_of(half) * kSumStride;
      const int64_t distance = distance_of(row_of(half));
      const int64_t place = clamped(distance < 0 ? -distance : distance, 0, forward.rope_rows - 1);
      const float* cosines = static_cast<const float*>(forward.rope_cos) + place * forward.rope_stride;
      const float* sines = static_cast<const float*>(forward.rope_sin) + place * forward.rope_stride;
      const bool rows = forward.rope_rows > 0;
      PYCORE_UNROLL
      for (int n = 0; n < kChannels / 8; ++n) {
        PYCORE_UNROLL
        for (int k = 0; k < 2; ++k) {
          const int c = 8 * n + 2 * (lane % 4) + k;
          float x = row[c];
          if (c < rope_dim && rows) {
            const bool second = forward.rope_interleaved ? k != 0 : c >= half_dim;
            const int i = forward.rope_interleaved ? c / 2 : second ? c - half_dim : c;
            const int other = forward.rope_interleaved ? c ^ 1 : second ? c - half_dim : c + half_dim;
            const float turned = row[other] * sines[i];
            x = fmaf(x, cosines[i], (distance < 0) == second ? turned : -turned);
          }
          total[0][n][2 * half + k] = add ? total[0][n][2 * half + k] + x : x;
        }
      }
    }
    __syncwarp();
  }

  // The sums times `factor` to rows of `channels` float32 each; to(row) says where, or null. Rows from `count` on get
  // zeros.
  template <class RowOf>
  __device__ void store(const Sums& sums, int64_t channels, float factor, int64_t count, RowOf to) const {
    PYCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float* row = to(row_of(half));
      if (row == nullptr) continue;
      const bool valid = row_of(half) < count;
      PYCORE_UNROLL
      for (int n = 0; n < kChannels / 8; ++n) {
        // -0 becomes 0: which of them a sum of nothing is depends on the tiles that were visited.
        const float one = valid ? sums[0][n][2 * half] * factor + 0.0f : 0.0f;
        const float two = valid ? sums[0][n][2 * half + 1] * factor + 0.0f : 0.0f;
        store_two(row, 8 * n + 2 * (lane % 4), channels, channels % 2 == 0, one, two);
      }
    }
  }
};

template <class T, int kChannels, bool kOptions>
struct GradQuery : Backward<T, kChannels, kOptions> {
  using Base = Backward<T, kChannels, kOptions>;
  using Base::b, Base::forward, Base::kv_head, Base::lane, Base::map, Base::params, Base::plan, Base::row_of,
      Base::shared, Base::turns, Base::warp, Base::warp_row;
  static constexpr int kStride = Base::kStride, kThreads = Base::kThreads;
  using Sums = typename Base::Sums;

  int64_t h = 0, first = 0, count = 0, p_lo = 0;  // the tile's queries
  Sums sums;

  __device__ GradQuery(const AttentionBackwardParams& params, const TilePlan& plan) : Base(params, plan) {}

  __device__ bool mask(const VisitedTile& keys, Turned turned) const {
    return mask_rows<kOptions>(forward, map, b, keys, turned, warp_row, kWarpRows, shared.kept, shared.dropped,
                               [&](int r) { return RowPlace{r < count, h, p_lo + r}; });
  }

  // Scores to their gradients, in place.
  __device__ void gradients(float (&scores)[1][8][4], const float (&grad_weights)[1][8][4], int64_t key_tile,
                            bool masked) const {
    PYCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = row_of(half), column = 2 * (lane % 4);
      const uint64_t kept = masked ? shared.kept[r] >> column : ~uint64_t{0};
      const uint64_t dropped = kOptions && forward.dropout_p > 0 ? shared.dropped[r] >> column : 0;
      const float lse = shared.lse[r] * kLog2E, delta = shared.delta[r], scale2 = this->scale2();
      const int64_t p = p_lo + r, base = key_tile * kKeyTile;
      const bool simple = kOptions && DistanceLogits::apply(forward, map.schedule, key_tile);
      const DistanceLogits logits(forward, h, kOptions ? map.schedule.place(p) - base : 0);
      PYCORE_UNROLL
      for (int n = 0; n < 8; ++n) {
        PYCORE_UNROLL
        for (int k = 0; k < 2; ++k) {
          float &score = scores[0][n][2 * half + k], slope = logits.scale, weight;
          const bool keeps = kept >> (8 * n + k) & 1;
          if (!kOptions) {
            weight = exp2_approx(fmaf(score, scale2, -lse));
          } else if (simple) {
            weight = exp2_approx(logits.base2(column + 8 * n + k, score) - lse);
          } else {
            weight = keeps
                         ? exp2_approx(
                               base2_logit(forward, map.schedule, h, p, base + column + 8 * n + k, score, &slope) - lse)
                         : 0.0f;
          }
          const PairGradient<kOptions> pair(forward, weight, grad_weights[0][n][2 * half + k], delta,
                                            dropped >> (8 * n + k) & 1, slope);
          score = masked && !keeps ? 0.0f : pair.grad;
        }
      }
    }
  }

  // What of the keys is not finite goes to the queries that keep it, and nowhere else; all threads. After it
  // shared.kept is of no use.
  __device__ void guard_keys(const VisitedTile& keys) {
    mask(keys, Turned::kAll);
    add_not_finite<T, kChannels>(sums, shared.key,
                                 [&](int n, int key) { return shared.kept[warp_row + n] >> key & 1; });
    take_not_finite<T, kChannels, kThreads>(shared.key);
  }

  // Everything of a tile whose values are under way; then those of the next one, which it finds, are.
  __device__ void visit(const VisitedTile& keys, VisitedTile& next) {
    copy_async_wait<0>();
    __syncthreads();  // the values are here, and nobody needs the last keys
    this->load_key(keys);
    copy_async_commit();
    const int64_t p_hi = p_lo + count - 1;
    const VisitedTile found = next_key_tile(&shared.list, &map, p_lo, p_hi, keys.index + 1, -1);
    if (threadIdx.x == 0) next = found;
    const TurnPasses passes(forward, map, p_lo, p_hi, keys.index);
    const bool masked = keys.masked || (kOptions && ((passes.far && passes.near) || forward.dropout_p > 0));
    float grad_weights[1][8][4];
    RowsTimesTile<T, kChannels, 1>::run(grad_weights, shared.grad_out + warp_row * kStride, shared.value);
    copy_async_wait<0>();
    __syncthreads();  // the keys are here, and nobody needs the values
    if (!turns() && next.any()) this->load_value(next);
    if (!turns()) copy_async_commit();
    for (int pass = passes.far ? 0 : 1; pass < (passes.near ? 2 : 1); ++pass) {
      const bool far = pass == 0, first_pass = far || !passes.far;
      if (turns() && !far) {
        if (!first_pass) __syncthreads();  // the far pass is done with the keys
        turn_rows<T, kChannels>(forward, shared.key, shared.key, warp, kTile, kBackwardWarps,
                                [&](int c) { return key_turn(map.schedule, keys.index, c); });
        __syncthreads();
      }
      const auto distance_of = [&](int r) {
        return far ? forward.distance_limit : map.schedule.place(p_lo + r) - keys.index * kKeyTile;
      };
      const bool any = masked ? mask(keys, far ? Turned::kFar : Turned::kNear) : true;
      float scores[1][8][4];
      if (any) {
        if (turns()) {
          turn_rows<T, kChannels>(forward, shared.query, shared.turned, warp_row, warp_row + kWarpRows, 1, distance_of);
          __syncwarp();
        }
        RowsTimesTile<T, kChannels, 1>::run(scores, (turns() ? shared.turned : shared.query) + warp_row * kStride,
                                            shared.key);
        gradients(scores, grad_weights, keys.index, masked);
      }
      if (masked && first_pass && has_not_finite<T, kChannels, kThreads>(shared.key)) guard_keys(keys);
      if (turns()) __syncthreads();  // a warp's sums pass through where others have their turned queries
      if (!any) continue;
      if (!turns()) {
        WeightsTimesTile<T, kChannels, 1>::run(sums, scores, shared.key);
      } else if constexpr (kOptions) {
        Sums part;
        clear(part);
        WeightsTimesTile<T, kChannels, 1>::run(part, scores, shared.key);
        this->turn_back(part, reinterpret_cast<float*>(shared.value), distance_of, true, sums);
      }
    }
    if (turns()) {
      __syncthreads();  // nobody needs the values' place
      if (next.any()) this->load_value(next);
      copy_async_commit();
    }
  }

  __device__ void run() {
    // Tiles of most keys first.
    const int64_t tile = plan.query_tiles - 1 - blockIdx.x % plan.query_tiles, pair = blockIdx.x / plan.query_tiles;
    b = pair / forward.heads;
    h = pair % forward.heads;
    kv_head = h / (forward.heads / forward.kv_heads);
    first = tile * kTile;
    if (threadIdx.x == 0) {
      shared.map = bounded_row_map(forward, b, h);
      shared.list.open();
    }
    __syncthreads();
    count = clamped(map.queries - first, 0, kTile);
    p_lo = map.query_position(first);
    clear(sums);
    if (count > 0) {
      const VisitedTile found = next_key_tile(&shared.list, &map, p_lo, p_lo + count - 1, 0, -1);
      if (threadIdx.x == 0) shared.visited[0] = found;
      this->load_query(h, first, count);
      this->load_grad_out(h, first, count);
      this->load_softmax(h, first, count);
      if (found.any()) this->load_value(found);
      copy_async_commit();
      __syncthreads();
      for (int at = 0; shared.visited[at].any(); at ^= 1) visit(shared.visited[at], shared.visited[at ^ 1]);
      copy_async_wait<0>();
    }
    float* grad_query = static_cast<float*>(params.grad_query) + row_index(forward, b, h, first) * forward.head_dim;
    this->store(sums, forward.head_dim, this->factor(), count,
                [&](int r) { return first + r < forward.query_length ? grad_query + r * forward.head_dim : nullptr; });
  }
};

template <class T, int kChannels, bool kOptions>
__global__ void __launch_bounds__(kBackwardThreads)
    grad_query_kernel(const __grid_constant__ AttentionBackwardParams params, const __grid_constant__ TilePlan plan) {
  GradQuery<T, kChannels, kOptions>(params, plan).run();
}

}  // namespace
}  // namespace pycore
