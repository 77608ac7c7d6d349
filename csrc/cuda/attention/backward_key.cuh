// SPDX-License-Identifier: Apache-2.0
// The half of the backward pass (backward.cuh) that holds keys and sees queries pass by. With head_dim 256
// registers hold the sums of grad_key or those of grad_value, so there it runs once for each.
#pragma once

#include "backward.cuh"

namespace pycore {
namespace {

// The query tiles that may keep keys of one tile: of each head of the group, `tiles` from `first_tile` on. An item is
// one of them; its number counts heads, then tiles.
struct QueryItems {
  int64_t key_tile, first_head, heads, first_tile, tiles;
  uint64_t bits;  // the keys that are there

  struct Item {
    int64_t h, first, count, p_lo;  // queries first .. first + count - 1 of head h, from position p_lo on
  };

  __device__ void bind(const AttentionParams& params, const RowMap& map, int64_t kv_head, int64_t tile) {
    const int64_t group = params.heads / params.kv_heads, p0 = map.query_position(0);
    key_tile = tile;
    first_head = kv_head * group;
    heads = group;
    bits = map.present_bits(tile);
    int64_t lo, hi;
    map.schedule.query_range(tile, &lo, &hi);
    first_tile = clamped(lo - p0, 0, map.queries) / kTile;
    const int64_t last_query = clamped(hi - p0, -1, map.queries - 1);
    tiles = last_query < 0 ? 0 : clamped(last_query / kTile + 1 - first_tile, 0, kFar);
  }
  __device__ Item item(const RowMap& map, int64_t index) const {
    Item item;
    // Numbers of tiles; no memory holds the queries of 2^32.
    const uint32_t head = static_cast<uint32_t>(index) / static_cast<uint32_t>(tiles);
    item.h = first_head + head;
    item.first = (first_tile + index - head * tiles) * kTile;
    item.count = map.queries - item.first < kTile ? map.queries - item.first : kTile;
    item.p_lo = map.query_position(item.first);
    return item;
  }
  // What a pass (far or near pairs) does with an item.
  template <bool kOptions>
  __device__ VisitedTile look(const AttentionParams& params, const RowMap& map, int64_t b, bool far,
                              int64_t index) const {
    VisitedTile tile;
    if (index >= heads * tiles) return tile;
    const Item item = this->item(map, index);
    const int64_t p_hi = item.p_lo + item.count - 1;
    RowMap own = map;
    bind_head(params, b, item.h, &own);
    const TileSchedule& schedule = own.schedule;
    const TurnPasses<kOptions> passes(params, map, item.p_lo, p_hi, key_tile);
    const Cover cover = schedule.cover(item.p_lo, p_hi, key_tile);
    if (cover == Cover::kNone || !(far ? passes.far : passes.near)) return tile;
    if ((schedule.reach_bits(item.p_lo, p_hi, key_tile) & bits) == 0) return tile;
    tile.index = index;
    tile.bits = bits;
    tile.masked = cover != Cover::kAll || bits != ~uint64_t{0} || item.count < kTile;
    return tile;
  }
};

// next_item where the list has come to its end; see list_key_tiles.
template <bool kOptions, int kThreads>
__device__ __noinline__ VisitedTile list_items(TileList<kThreads>* list, const AttentionParams* params,
                                               const RowMap* map, const QueryItems* items, int64_t b, bool far,
                                               int64_t index) {
  for (;;) {
    if (index >= list->first && index < list->first + kThreads) index = list->first + kThreads;
    if (index >= items->heads * items->tiles) return VisitedTile();
    __syncthreads();
    list->fill(index, [&](int64_t at) { return items->look<kOptions>(*params, *map, b, far, at); });
    __syncthreads();
    const VisitedTile tile = list->find(index);
    if (tile.any()) return tile;
  }
}

// The first item >= index that is visited; all threads.
template <bool kOptions, int kThreads>
__device__ VisitedTile next_item(TileList<kThreads>* list, const AttentionParams* params, const RowMap* map,
                                 const QueryItems* items, int64_t b, bool far, int64_t index) {
  const VisitedTile tile = list->find(index);
  return tile.any() ? tile : list_items<kOptions>(list, params, map, items, b, far, index);
}

template <class T, int kChannels, bool kOptions>
struct KeyShared : BackwardShared<T, kChannels, kOptions> {
  QueryItems items;
  QueryItems::Item item[2];  // the visited ones
};

template <class T, int kChannels, bool kOptions, bool kKey, bool kValue>
struct GradKey : Backward<T, kChannels, kOptions> {
  using Base = Backward<T, kChannels, kOptions>;
  using Base::b, Base::forward, Base::kv_head, Base::lane, Base::map, Base::params, Base::plan, Base::row_of,
      Base::turns, Base::warp, Base::warp_row;
  static constexpr int kStride = Base::kStride, kThreads = Base::kThreads;
  using Sums = typename Base::Sums;
  using Item = QueryItems::Item;

  KeyShared<T, kChannels, kOptions>& shared;
  Sums grad_key, grad_value;

  __device__ GradKey(const AttentionBackwardParams& params, const TilePlan& plan)
      : Base(params, plan), shared(*reinterpret_cast<KeyShared<T, kChannels, kOptions>*>(shared_memory())) {}

  // Before lse is settled, as if every query had weights.
  __device__ void mask(const Item& item, bool far, bool settled) const {
    const VisitedTile keys = {shared.items.key_tile, shared.items.bits, true};
    mask_rows<kOptions>(forward, map, b, keys, far ? Turned::kFar : Turned::kNear, warp_row, kWarpRows, shared.kept,
                        shared.dropped, [&](int r) {
                          const bool empty = settled && shared.lse[r] == -INFINITY;
                          return RowPlace{r < item.count && !empty, item.h, item.p_lo + r};
                        });
  }

  // Scores of the warp's keys (rows) and the item's queries (columns) to weights, and grad_weights to the scores'
  // gradients, in place.
  __device__ void gradients(float (&scores)[1][8][4], float (&grad_weights)[1][8][4], const Item& item,
                            bool masked) const {
    const int64_t key_tile = shared.items.key_tile, base = key_tile * kKeyTile;
    if constexpr (kOptions) {
      if (!this->simple(key_tile) || map.schedule.kind == ScheduleKind::kTree) {
        return this->run_pairs({forward, map.schedule, b, item.h, item.p_lo, base, shared.lse,
                                sizeof(T) == 4 ? shared.lse_low : nullptr, shared.delta, masked ? shared.kept : nullptr,
                                this->drops() ? shared.dropped : nullptr, warp_row, true, false},
                               scores, grad_weights);
      }
    }
    const float factor = base2_factor<kOptions>(forward);
    const DistanceLogits logits(forward, b, item.h, kOptions ? item.p_lo - base - warp_row - lane / 4 : 0);
    PYCORE_UNROLL
    for (int n = 0; n < 8; ++n) {
      PYCORE_UNROLL
      for (int k = 0; k < 2; ++k) {
        const int q = 8 * n + 2 * (lane % 4) + k;
        const RowWeights<T> weights(shared, q);
        const float delta = shared.delta[q];
        const uint64_t kept = masked ? shared.kept[q] >> (warp_row + lane / 4) : ~uint64_t{0};
        PYCORE_UNROLL
        for (int half = 0; half < 2; ++half) {
          float &score = scores[0][n][2 * half + k], slope = 1;
          const bool left_out = masked && !(kept >> (8 * half) & 1);
          const float logit = kOptions ? logits.natural(8 * half - q, score, &slope) : score;
          const float weight = weights.weight(logit, factor);
          score = left_out ? 0.0f : weight;
          if (!kKey) continue;
          float& grad_weight = grad_weights[0][n][2 * half + k];
          const float grad = weight * (grad_weight - delta);
          grad_weight = left_out ? 0.0f : kOptions ? grad * slope : grad;
        }
      }
    }
  }

  // What of the queries is not finite goes to the keys they keep, and nowhere else; all threads.
  __device__ void guard(T* queries, Sums& sums) {
    add_not_finite<T, kChannels>(sums, queries, shared.kept, warp_row, false);
    take_not_finite<T, kChannels, kThreads>(queries);
  }

  // Thread 0 leaves what was found.
  __device__ void leave(const VisitedTile& found, int at) const {
    if (threadIdx.x != 0) return;
    shared.visited[at] = found;
    if (found.any()) shared.item[at] = shared.items.item(map, found.index);
  }

  // Everything of an item whose grad_out is under way; then that of the next one, which it finds, is.
  __device__ void visit(int at, bool far) {
    const VisitedTile& visited = shared.visited[at];
    const Item& item = shared.item[at];
    if (threadIdx.x == 0) bind_head(forward, b, item.h, &shared.map);
    copy_async_wait<0>();
    __syncthreads();  // grad_out is here, and nobody needs the last queries
    this->load_query(item.h, item.first, item.count);
    this->load_softmax(item.h, item.first, item.count);
    copy_async_commit();
    leave(next_item<kOptions>(&shared.list, &forward, &map, &shared.items, b, far, visited.index + 1), at ^ 1);
    const TurnPasses<kOptions> passes(forward, map, item.p_lo, item.p_lo + item.count - 1, shared.items.key_tile);
    bool masked = visited.masked || (kOptions && ((passes.far && passes.near) || this->drops()));
    if (masked) mask(item, far, false);
    float grad_weights[1][8][4];
    if (!kKey && kOptions) clear(grad_weights);
    if (kKey) {
      RowsTimesTile<T, kChannels, 1>::run(grad_weights, shared.value + warp_row * kStride, shared.grad_out);
    }
    copy_async_wait<0>();
    if (this->settle_softmax()) {  // the queries are here
      masked = true;
      mask(item, far, true);
      __syncthreads();
    }
    if (turns()) {
      turn_rows<T, kChannels>(forward, shared.query, shared.query, warp, kTile, kBackwardWarps, [&](int r) {
        const int64_t base = shared.items.key_tile * kKeyTile;
        return far ? forward.distance_limit : map.schedule.place(item.p_lo + r) - base;
      });
      __syncthreads();
    }
    float scores[1][8][4];
    RowsTimesTile<T, kChannels, 1>::run(scores, (turns() && !far ? shared.turned : shared.key) + warp_row * kStride,
                                        shared.query);
    gradients(scores, grad_weights, item, masked);
    if constexpr (kValue) {
      if (masked && has_not_finite<T, kChannels, kThreads>(shared.grad_out)) guard(shared.grad_out, grad_value);
      WeightsTimesTile<T, kChannels, 1>::run(grad_value, scores, shared.grad_out);
    }
    __syncthreads();  // nobody needs grad_out
    if (shared.visited[at ^ 1].any()) load_grad_out_of(at ^ 1);
    copy_async_commit();
    if constexpr (kKey) {
      if (masked && has_not_finite<T, kChannels, kThreads>(shared.query)) guard(shared.query, grad_key);
      WeightsTimesTile<T, kChannels, 1>::run(grad_key, grad_weights, shared.query);
    }
  }
  __device__ void load_grad_out_of(int at) const {
    this->load_grad_out(shared.item[at].h, shared.item[at].first, shared.item[at].count);
  }

  // All queries, of pairs beyond the distance limit or within it.
  __device__ void walk(bool far) {
    __syncthreads();
    if (threadIdx.x == 0) shared.list.open();
    __syncthreads();
    leave(next_item<kOptions>(&shared.list, &forward, &map, &shared.items, b, far, 0), 0);
    __syncthreads();
    if (shared.visited[0].any()) load_grad_out_of(0);
    copy_async_commit();
    for (int at = 0; shared.visited[at].any(); at ^= 1) visit(at, far);
    copy_async_wait<0>();
  }

  __device__ void run() {
    const int64_t places = most_key_tiles(forward.key_length);
    const int64_t place = blockIdx.x % places, pair = blockIdx.x / places;
    b = pair / forward.kv_heads;
    kv_head = pair % forward.kv_heads;
    if (threadIdx.x == 0) {
      shared.map = bounded_row_map(forward, b, kv_head * (forward.heads / forward.kv_heads));
      if (place < map.present_tiles()) shared.items.bind(forward, map, kv_head, map.present_tile(place));
    }
    __syncthreads();
    if (place >= map.present_tiles() || shared.items.bits == 0) return;
    const VisitedTile keys = {shared.items.key_tile, shared.items.bits, true};
    this->load_key(keys);
    this->load_value(keys);
    copy_async_commit();
    clear(grad_key);
    clear(grad_value);
    const auto turn_of = [&](int c) { return key_turn(map.schedule, keys.index, c); };
    if (turns()) {
      copy_async_wait<0>();
      __syncthreads();
      turn_rows<T, kChannels>(forward, shared.key, shared.turned, warp, kTile, kBackwardWarps, turn_of);
    }
    // Near pairs, or all; then far ones.
    const bool far_too = turns() && forward.distance_limit < kFar;
    PYCORE_UNROLL_BY(1)
    for (int pass = 0; pass < (far_too ? 2 : 1); ++pass) {
      walk(pass == 1);
      if (!kOptions || !kKey || !turns() || pass == 1) continue;
      __syncthreads();
      this->turn_back(grad_key, reinterpret_cast<float*>(shared.query), turn_of, false, grad_key);
    }
    const auto row = [&](void* data, int64_t channels) {
      return [this, data, channels, &keys](int r) -> float* {
        if ((keys.bits >> r & 1) == 0) return nullptr;
        const int64_t key_row = map.key_row(keys.index * kKeyTile + r);
        return static_cast<float*>(data) + key_row_index(forward, b, kv_head, key_row) * channels;
      };
    };
    if (kKey) {
      this->store(grad_key, forward.head_dim, this->factor(), kTile, row(params.grad_key, forward.head_dim));
    }
    if (kValue) this->store(grad_value, forward.value_dim, 1.0f, kTile, row(params.grad_value, forward.value_dim));
  }
};

template <class T, int kChannels, bool kOptions, bool kKey, bool kValue>
__global__ void __launch_bounds__(kBackwardThreads, kLeastBlocks<kChannels, kOptions>)
    grad_key_kernel(const __grid_constant__ AttentionBackwardParams params, const __grid_constant__ TilePlan plan) {
  GradKey<T, kChannels, kOptions, kKey, kValue>(params, plan).run();
}

}  // namespace
}  // namespace pycore
