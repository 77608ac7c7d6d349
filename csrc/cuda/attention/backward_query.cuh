// SPDX-License-Identifier: Apache-2.0
// The half of the backward pass (backward.cuh) that holds queries and sees keys pass by.
#pragma once

#include "backward.cuh"

namespace pycore {
namespace {

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
  bool some_empty = false;                        // some of which have no weights
  Sums sums;
  double* table = nullptr;  // the block's own

  __device__ GradQuery(const AttentionBackwardParams& params, const TilePlan& plan) : Base(params, plan) {}

  __device__ bool mask(const VisitedTile& keys, Turned turned) const {
    return mask_rows<kOptions>(forward, map, b, keys, turned, warp_row, kWarpRows, shared.kept, shared.dropped,
                               [&](int r) { return RowPlace{r < count && shared.lse[r] != -INFINITY, h, p_lo + r}; });
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
        this->run_pairs({forward, map.schedule, b, h, p_lo, base, shared.lse, sizeof(T) == 4 ? shared.lse_low : nullptr,
                         shared.delta, masked ? shared.kept : nullptr, this->drops() ? shared.dropped : nullptr,
                         warp_row, false, kBias},
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
      const RowWeights<T> weights(shared, r);
      const float delta = shared.delta[r], factor = base2_factor<kOptions>(forward);
      const DistanceLogits logits(forward, b, h, kOptions ? map.schedule.place(p_lo + r) - base : 0);
      PYCORE_UNROLL
      for (int n = 0; n < 8; ++n) {
        PYCORE_UNROLL
        for (int k = 0; k < 2; ++k) {
          float &score = scores[0][n][2 * half + k], slope = 1;
          const float logit = kOptions ? logits.natural(column + 8 * n + k, score, &slope) : score;
          const float weight = weights.weight(logit, factor);
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
  // that share an entry stand side by side, or on both sides of 0: one thread adds them. All threads.
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
    const bool both_sides = forward.symmetric_bias && distance < 0;
    for (int n = 0; both_sides && n < thread; ++n) {
      if (entry(n) == entry(thread)) return;
    }
    double sum = 0;
    for (int n = thread; n < diagonals && (both_sides || entry(n) == entry(thread)); ++n) {
      if (entry(n) == entry(thread)) sum += shared.diagonals[n];
    }
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
    const bool masked = keys.masked || some_empty || (kOptions && ((passes.far && passes.near) || this->drops()));
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
    copy_async_wait<0>();
    some_empty = this->settle_softmax();
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
