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
// Blocks of a multiprocessor that registers are shared out for: narrow rows leave some for a third.
template <int kChannels, bool kOptions>
constexpr int kLeastBlocks = kChannels <= 64 && !kOptions ? 3 : 1;

// A kernel's tiles in shared memory. Where pairs turn, a warp's sums pass through two tiles that lie side by side:
// value and turned (grad_query), or query and grad_out (grad_key).
template <class T, int kChannels, bool kOptions>
struct BackwardShared {
  static constexpr int kStride = row_stride<T>(kChannels);
  T query[kTile * kStride], grad_out[kTile * kStride], key[kTile * kStride], value[kTile * kStride];
  T turned[kOptions ? kTile * kStride : 8];  // the queries as a key tile sees them, or the keys as near queries do
  float lse[kTile], delta[kTile];            // of the query tile
  uint64_t kept[kTile], dropped[kOptions ? kTile : 1];  // of its rows, the keys
  float diagonals[kOptions ? 2 * kTile : 1];            // of a tile of gradients, the sums
  // The same for all threads, here because registers are short.
  RowMap map;
  VisitedTile visited[2];  // the tile in hand and the next
  TileList<kBackwardThreads> list;
};

// A row's lse as weights need it: in base 2, in two floats where one would be the largest error of every weight.
template <class T>
struct Base2 {
  float high, low;

  __device__ explicit Base2(float lse)
      : high(lse * kLog2E),
        low(sizeof(T) == 4 && fabsf(high) < INFINITY ? fmaf(lse, kLog2ELow, fmaf(lse, kLog2E, -high)) : 0.0f) {}
  // 2^(factor * logit) over the row's sum.
  __device__ float weight(float logit, float factor) const {
    const float power = fmaf(logit, factor, -high);
    return exp2_approx(sizeof(T) == 4 ? power - low : power);
  }
};

// Of a warp's 16 rows and a tile's 64 columns, one of them queries and the other keys, what a pair adds to gradients.
struct TilePairs {
  const AttentionParams& params;
  const TileSchedule& schedule;
  int64_t h, p_lo, base;           // the first query and the first key
  const float *lse, *delta;        // by query
  const uint64_t *kept, *dropped;  // by query, the keys; null where all are kept, and none is dropped
  int first_row;                   // of the warp
  bool rows_are_keys, of_logits;   // gradients of the logits instead of the scores

  // A lane's scores to weights, after dropout, and grad_weights to the scores' gradients, one at a time and whatever
  // they take.
  __device__ __noinline__ void run(float* scores, float* grad_weights) const {
    const int lane = threadIdx.x % kLanes;
    const float keep_factor = static_cast<float>(1 / (1 - params.dropout_p));
    PYCORE_UNROLL_BY(1)
    for (int n = 0; n < 32; ++n) {
      const int row = first_row + lane / 4 + n / 2 % 2 * 8, column = n / 4 * 8 + lane % 4 * 2 + n % 2;
      const int q = rows_are_keys ? column : row, key = rows_are_keys ? row : column;
      float weight = 0, grad = 0;
      if (kept == nullptr || kept[q] >> key & 1) {
        float slope;
        const float logit = logit_of(params, schedule, h, p_lo + q, base + key, scores[n], &slope);
        weight = exp2_approx(fmaf(logit, kLog2E, -lse[q] * kLog2E));
        const float factor = dropped == nullptr ? 1.0f : dropped[q] >> key & 1 ? 0.0f : keep_factor;
        grad = weight * fmaf(grad_weights[n], factor, -delta[q]) * (of_logits ? 1.0f : slope);
        weight *= factor;
      }
      scores[n] = weight;
      grad_weights[n] = grad;
    }
  }
};

template <class T, int kChannels, bool kOptions>
struct Backward {
  using Shared = BackwardShared<T, kChannels, kOptions>;
  using Sums = float[1][kChannels / 8][4];
  static constexpr int kStride = Shared::kStride, kThreads = kBackwardThreads;

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
  // each(n, half) for the pairs of numbers that a lane holds of the warp's sums.
  template <class Each>
  __device__ static void each_pair(Each each) {
    PYCORE_UNROLL
    for (int n = 0; n < kChannels / 8; ++n) {
      PYCORE_UNROLL
      for (int half = 0; half < 2; ++half) each(n, half);
    }
  }
  __device__ bool drops() const { return kOptions && forward.dropout_p > 0; }
  // Whether a logit takes no more than the score and a distance, in tile `tile` of keys.
  __device__ bool simple(int64_t tile) const {
    return !kOptions || (!drops() && DistanceLogits::apply<T>(forward, map.schedule, tile));
  }
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

  // The warp's sums turned back by distance_of(row), in shared memory (`rows`, 64 of kChannels numbers): added to
  // `total`, or in its place; it may be the same array.
  template <class DistanceOf>
  __device__ void turn_back(const Sums& sums, float* rows, DistanceOf distance_of, bool add, Sums& total) const {
    constexpr int kSumStride = row_stride<float>(kChannels);
    __syncwarp();
    each_pair([&](int n, int half) {
      *reinterpret_cast<TwoFloats*>(rows + row_of(half) * kSumStride + 8 * n +
                                    2 * (lane % 4)) = {{sums[0][n][2 * half], sums[0][n][2 * half + 1]}};
    });
    __syncwarp();
    turn_rows<float, kChannels>(forward, rows, rows, warp_row, warp_row + kWarpRows, 1,
                                [&](int r) { return -distance_of(r); });
    __syncwarp();
    each_pair([&](int n, int half) {
      const float* pair = rows + row_of(half) * kSumStride + 8 * n + 2 * (lane % 4);
      for (int k = 0; k < 2; ++k) {
        total[0][n][2 * half + k] = add ? total[0][n][2 * half + k] + pair[k] : pair[k];
      }
    });
    __syncwarp();
  }

  // The lane's scores and grad_weights, or sums, by way of memory; see TilePairs::run.
  __device__ static void run_pairs(const TilePairs& pairs, float (&scores)[1][8][4], float (&grad_weights)[1][8][4]) {
    float memory[32], grads[32];
    PYCORE_UNROLL
    for (int n = 0; n < 32; ++n) {
      memory[n] = scores[0][n / 4][n % 4];
      grads[n] = grad_weights[0][n / 4][n % 4];
    }
    pairs.run(memory, grads);
    __syncwarp();
    PYCORE_UNROLL
    for (int n = 0; n < 32; ++n) {
      scores[0][n / 4][n % 4] = memory[n];
      grad_weights[0][n / 4][n % 4] = grads[n];
    }
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

// With kBias, grad_bias takes the place of grad_query: of a tile of gradients the pairs of one distance lie on a
// diagonal.
template <class T, int kChannels, bool kOptions, bool kBias>
struct GradQuery : Backward<T, kChannels, kOptions> {
  using Base = Backward<T, kChannels, kOptions>;
  using Base::b, Base::forward, Base::kv_head, Base::lane, Base::map, Base::params, Base::plan, Base::row_of,
      Base::shared, Base::turns, Base::warp, Base::warp_row;
  static constexpr int kStride = Base::kStride, kThreads = Base::kThreads;
  using Sums = typename Base::Sums;

  int64_t h = 0, first = 0, count = 0, p_lo = 0;  // the tile's queries
  Sums sums;
  double* table = nullptr;  // the block's own

  __device__ GradQuery(const AttentionBackwardParams& params, const TilePlan& plan) : Base(params, plan) {}

  __device__ bool mask(const VisitedTile& keys, Turned turned) const {
    return mask_rows<kOptions>(forward, map, b, keys, turned, warp_row, kWarpRows, shared.kept, shared.dropped,
                               [&](int r) { return RowPlace{r < count, h, p_lo + r}; });
  }

  // Grad_weights to the scores' gradients, left in the scores' place.
  __device__ void gradients(float (&scores)[1][8][4], float (&grad_weights)[1][8][4], int64_t key_tile,
                            bool masked) const {
    const int64_t base = key_tile * kKeyTile;
    if constexpr (kOptions) {
      if (!this->simple(key_tile)) {
        float grads[1][8][4];
        PYCORE_UNROLL
        for (int n = 0; n < 32; ++n) grads[0][n / 4][n % 4] = grad_weights[0][n / 4][n % 4];
        this->run_pairs({forward, map.schedule, h, p_lo, base, shared.lse, shared.delta, masked ? shared.kept : nullptr,
                         this->drops() ? shared.dropped : nullptr, warp_row, false, kBias},
                        scores, grads);
        PYCORE_UNROLL
        for (int n = 0; n < 32; ++n) scores[0][n / 4][n % 4] = grads[0][n / 4][n % 4];
        return;
      }
    }
    PYCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int r = row_of(half), column = 2 * (lane % 4);
      const RowBits kept(masked ? shared.kept[r] >> column : ~uint64_t{0});
      const Base2<T> lse(shared.lse[r]);
      const float delta = shared.delta[r], scale2 = this->scale2();
      const DistanceLogits logits(forward, h, kOptions ? map.schedule.place(p_lo + r) - base : 0);
      PYCORE_UNROLL
      for (int n = 0; n < 8; ++n) {
        PYCORE_UNROLL
        for (int k = 0; k < 2; ++k) {
          float &score = scores[0][n][2 * half + k], slope = 1;
          const float weight =
              kOptions ? lse.weight(logits.base2(column + 8 * n + k, score, &slope), 1.0f) : lse.weight(score, scale2);
          const float grad = weight * (grad_weights[0][n][2 * half + k] - delta);
          score = masked && !kept.at(8 * n + k) ? 0.0f : kOptions && !kBias ? grad * slope : grad;
        }
      }
    }
  }

  // What of the keys is not finite goes to the queries that keep it, and nowhere else; all threads. After it
  // shared.kept is of no use.
  __device__ void guard_keys(const VisitedTile& keys) {
    mask(keys, Turned::kAll);
    add_not_finite<T, kChannels>(sums, shared.key, shared.kept, warp_row, true);
    take_not_finite<T, kChannels, kThreads>(shared.key);
  }

  // Sums of the diagonals of a tile of gradients, left with the values, to the entries of their distances. Distances
  // that share an entry stand side by side: one thread adds them. All threads.
  __device__ void add_diagonals(int64_t key_tile) {
    constexpr int kSumStride = row_stride<float>(kTile);
    const auto* grads = reinterpret_cast<const float*>(shared.value);
    const int thread = static_cast<int>(threadIdx.x), diagonals = 2 * kTile - 1;
    const int64_t distance = p_lo - key_tile * kKeyTile - (kTile - 1);  // of diagonal 0
    const auto entry = [&](int n) { return bias_index(forward, distance + n); };
    __syncthreads();
    if (thread < diagonals) {
      const int offset = thread - (kTile - 1), from = offset > 0 ? offset : 0, to = offset > 0 ? kTile : kTile + offset;
      float sum = 0;
      for (int r = from; r < to; ++r) sum += grads[r * kSumStride + r - offset];
      shared.diagonals[thread] = sum;
    }
    __syncthreads();
    if (thread >= diagonals || (thread > 0 && entry(thread) == entry(thread - 1))) return;
    double sum = 0;
    for (int n = thread; n < diagonals && entry(n) == entry(thread); ++n) sum += shared.diagonals[n];
    table[entry(thread)] += sum;
  }
  __device__ void leave_gradients(const float (&scores)[1][8][4], bool any) const {
    auto* grads = reinterpret_cast<float*>(shared.value);
    PYCORE_UNROLL
    for (int n = 0; n < 8; ++n) {
      PYCORE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const bool valid = any && row_of(half) < count;
        const TwoFloats pair = {{valid ? scores[0][n][2 * half] : 0.0f, valid ? scores[0][n][2 * half + 1] : 0.0f}};
        *reinterpret_cast<TwoFloats*>(grads + row_of(half) * row_stride<float>(kTile) + 8 * n + 2 * (lane % 4)) = pair;
      }
    }
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
    const TurnPasses<kOptions> passes(forward, map, p_lo, p_hi, keys.index);
    const bool masked = keys.masked || (kOptions && ((passes.far && passes.near) || this->drops()));
    float grad_weights[1][8][4];
    RowsTimesTile<T, kChannels, 1>::run(grad_weights, shared.grad_out + warp_row * kStride, shared.value);
    copy_async_wait<0>();
    __syncthreads();  // the keys are here, and nobody needs the values
    const bool values_free = !turns() && !kBias;
    if (values_free && next.any()) this->load_value(next);
    if (values_free) copy_async_commit();
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
      if constexpr (kBias) {
        __syncthreads();  // a warp's gradients lie where others have their turned queries
        leave_gradients(scores, any);
        add_diagonals(keys.index);
        continue;
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
    if (!values_free) {
      __syncthreads();  // nobody needs the values' place
      if (next.any()) this->load_value(next);
      copy_async_commit();
    }
  }

  __device__ void bind(int64_t batch_row, int64_t head, int64_t tile) {
    b = batch_row;
    h = head;
    kv_head = h / (forward.heads / forward.kv_heads);
    first = tile * kTile;
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.map = bounded_row_map(forward, b, h);
      shared.list.open();
    }
    __syncthreads();
    count = clamped(map.queries - first, 0, kTile);
    p_lo = map.query_position(first);
  }
  __device__ void walk() {
    if (count == 0) return;
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

  __device__ void run() {
    // Tiles of most keys first.
    const int64_t tile = plan.query_tiles - 1 - blockIdx.x % plan.query_tiles, pair = blockIdx.x / plan.query_tiles;
    bind(pair / forward.heads, pair % forward.heads, tile);
    clear(sums);
    walk();
    float* grad_query = static_cast<float*>(params.grad_query) + row_index(forward, b, h, first) * forward.head_dim;
    this->store(sums, forward.head_dim, this->factor(), count,
                [&](int r) { return first + r < forward.query_length ? grad_query + r * forward.head_dim : nullptr; });
  }
  // Of a head, the tiles of one of `chunks` shares of all; sums [chunks, heads, bias_length].
  __device__ void run_bias(double* sums_of_chunks, int64_t chunks) {
    const int64_t head = blockIdx.x % forward.heads, chunk = blockIdx.x / forward.heads;
    const int64_t tiles = forward.batch * plan.query_tiles;
    table = sums_of_chunks + (chunk * forward.heads + head) * forward.bias_length;
    for (int64_t n = tiles * chunk / chunks; n < tiles * (chunk + 1) / chunks; ++n) {
      bind(n / plan.query_tiles, head, n % plan.query_tiles);
      walk();
    }
  }
};

template <class T, int kChannels, bool kOptions>
__global__ void __launch_bounds__(kBackwardThreads, kLeastBlocks<kChannels, kOptions>)
    grad_query_kernel(const __grid_constant__ AttentionBackwardParams params, const __grid_constant__ TilePlan plan) {
  GradQuery<T, kChannels, kOptions, false>(params, plan).run();
}

template <class T, int kChannels>
__global__ void __launch_bounds__(kBackwardThreads, kLeastBlocks<kChannels, true>)
    grad_bias_kernel(const __grid_constant__ AttentionBackwardParams params, const __grid_constant__ TilePlan plan,
                     double* sums, int64_t chunks) {
  GradQuery<T, kChannels, true, true>(params, plan).run_bias(sums, chunks);
}

}  // namespace
}  // namespace pycore
