// SPDX-License-Identifier: Apache-2.0
// The forward pass on tensor cores (mma.sync, sm_80 and newer), float16 and bfloat16. A block of four warps takes a
// tile of query rows, those of several heads of a group where a head has few, and walks its key tiles in order:
//   keys arrive | values set out | scores | values arrive | next keys set out | softmax | weights times values
// Scores, weights and output stay in registers, keys and values pass through one buffer each (cp.async, ldmatrix).
//
// A row's bits depend on nothing beside it. The products of a row add in the same order whatever tile it is in, its
// softmax (base 2, online) knows only its own maxima, and a tile or segment of which it keeps nothing multiplies it by
// 1 and adds 0. Segments merge in order (SoftmaxTotal), here or, where each is a block of its own, in merge_kernel.
//
// Rotation (attention.h): the query is turned anew for each tile and rounded to its dtype, the key by its place in the
// tile. A tile with pairs on both sides of the distance limit is taken twice, first for far pairs, then for near ones.
#pragma once

#include "attention_mma_tile.cuh"

namespace pycore {
namespace {

template <class T, int kChannels, int kBlocks, bool kOptions>
struct MmaForward {
  using Shared = MmaShared<T, kChannels, kBlocks, kOptions>;
  static constexpr int kRows = Shared::kRows, kStride = Shared::kStride, kValueTiles = kChannels / 8;

  const AttentionParams& params;
  const MmaPlan& plan;
  Shared& shared;
  const MmaTile& tile;
  const RowMap& map;
  const int lane = threadIdx.x % kLanes, warp_row = static_cast<int>(threadIdx.x) / kLanes * 16 * kBlocks;
  // Of rows 16 m + g and 16 m + g + 8 of the warp, with g = lane / 4: the open segment.
  float max[kBlocks][2], sum[kBlocks][2], out[kBlocks][kValueTiles][4];

  __device__ MmaForward(const AttentionParams& params, const MmaPlan& plan)
      : params(params),
        plan(plan),
        shared(*reinterpret_cast<Shared*>(shared_memory())),
        tile(shared.tile),
        map(shared.map) {}

  // Whether the query stands in the problem, and has keys at all.
  __device__ bool valid(int r) const { return r / tile.rows < tile.heads && tile.query(r) < map.queries; }
  __device__ int row_of(int m, int half) const { return warp_row + 16 * m + 8 * half + lane / 4; }
  __device__ void load_tile(T* to, const void* data, const AttentionStrides& strides, int64_t channels, bool aligned,
                            const KeyTile& key_tile) const {
    const uint64_t bits = key_tile.bits;
    const T* rows = row_pointer<T>(data, strides, tile.b, tile.kv_head, 0);
    const int64_t base = key_tile.index * kKeyTile;
    if (map.contiguous(key_tile.index)) {
      const int64_t present = lowest_bit(bits);
      const T* first = rows + (map.key_row(base + present) - present) * strides.row;
      load_rows<T, kChannels>(to, kTile, static_cast<int>(channels), aligned, data,
                              [&](int r) { return bits >> r & 1 ? first + r * strides.row : nullptr; });
    } else {
      load_rows<T, kChannels>(to, kTile, static_cast<int>(channels), aligned, data, [&](int r) {
        return bits >> r & 1 ? rows + map.key_row(base + r) * strides.row : nullptr;
      });
    }
  }
  __device__ void load_key(const KeyTile& key_tile) const {
    load_tile(shared.key, params.key, params.key_strides, params.head_dim, plan.aligned_key, key_tile);
  }
  __device__ void load_value(const KeyTile& key_tile) const {
    load_tile(shared.value, params.value, params.value_strides, params.value_dim, plan.aligned_value, key_tile);
  }
  __device__ void load_query() const {
    load_rows<T, kChannels>(shared.query, kRows, static_cast<int>(params.head_dim), plan.aligned_query, params.query,
                            [&](int r) {
                              return valid(r) ? row_pointer<T>(params.query, params.query_strides, tile.b,
                                                               tile.head + r / tile.rows, tile.query(r))
                                              : nullptr;
                            });
  }

  // The keys of this warp's rows, in shared memory: those beyond the distance limit if `far`, or within it. False if no
  // row has any.
  __device__ bool mask_rows(const KeyTile& key_tile, bool far) const {
    bool any = false;
    __syncwarp();
    for (int n = lane; n < 16 * kBlocks; n += kLanes) {
      const int r = warp_row + n;
      uint64_t bits = 0;
      if (valid(r)) {
        const int64_t p = shared.p_lo + r % tile.rows;
        bits = map.schedule.keep_bits(p, key_tile.index) & key_tile.bits;
        if (kOptions && params.rope_cos) {
          const uint64_t beyond = far_bits(params, map.schedule, p, key_tile.index);
          bits &= far ? beyond : ~beyond;
        }
        if (kOptions && params.dropout_p > 0) {
          shared.dropped[r] = dropped_keys(params, tile.b, tile.head + r / tile.rows, p, key_tile.index, bits);
        }
      }
      shared.kept[r] = bits;
      any |= bits != 0;
    }
    __syncwarp();
    return __ballot_sync(kAllLanes, any) != 0;
  }

  // This warp's queries, turned for the tile.
  __device__ void turn_query(int64_t key_tile, bool far) const {
    const int half = static_cast<int>(params.rope_dim / 2), channels = kChannels;
    __syncwarp();
    for (int n = 0; n < 16 * kBlocks; ++n) {
      const int r = warp_row + n;
      const int64_t p = shared.p_lo + r % tile.rows, distance = far ? params.distance_limit : p - key_tile * kKeyTile;
      const T* query = shared.query + r * kStride;
      T* turned = shared.turned + r * kStride;
      for (int i = lane; i < half; i += kLanes) turn_pair(params, query, distance, i, turned);
      for (int c = 2 * half + lane; c < channels; c += kLanes) turned[c] = query[c];
    }
    __syncwarp();
  }
  // The tile's keys, by their place in it; all threads.
  __device__ void turn_key() const {
    const int half = static_cast<int>(params.rope_dim / 2);
    for (int n = threadIdx.x; n < kTile * half; n += kMmaThreads) {
      const int r = n / half;
      turn_pair(params, shared.key + r * kStride, r, n % half, shared.key + r * kStride);
    }
  }

  __device__ void multiply_keys(const T* queries, float (&scores)[kBlocks][8][4]) const {
    PYCORE_UNROLL
    for (int m = 0; m < kBlocks; ++m) {
      PYCORE_UNROLL
      for (int n = 0; n < 8; ++n) {
        PYCORE_UNROLL
        for (int k = 0; k < 4; ++k) scores[m][n][k] = 0;
      }
    }
    const SharedAddress query_rows = shared_address(queries + (warp_row + lane % 16) * kStride + lane / 16 * 8);
    const SharedAddress key_rows = shared_address(shared.key + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8);
    PYCORE_UNROLL
    for (int c = 0; c < kChannels; c += 16) {
      uint32_t query[kBlocks][4];
      PYCORE_UNROLL
      for (int m = 0; m < kBlocks; ++m) {
        load_matrix<false>(query[m], query_rows, 2 * (16 * m * kStride + c));
      }
      PYCORE_UNROLL
      for (int n = 0; n < 4; ++n) {
        uint32_t key[4];
        load_matrix<false>(key, key_rows, 2 * (16 * n * kStride + c));
        PYCORE_UNROLL
        for (int m = 0; m < kBlocks; ++m) {
          mma<T>(scores[m][2 * n], query[m], key[0], key[1]);
          mma<T>(scores[m][2 * n + 1], query[m], key[2], key[3]);
        }
      }
    }
  }

  __device__ void multiply_values(const float (&weights)[kBlocks][8][4]) {
    const SharedAddress value_rows = shared_address(shared.value + lane % 16 * kStride + lane / 16 * 8);
    PYCORE_UNROLL
    for (int k = 0; k < 4; ++k) {
      uint32_t weight[kBlocks][4];
      PYCORE_UNROLL
      for (int m = 0; m < kBlocks; ++m) {
        const float (&low)[4] = weights[m][2 * k], (&high)[4] = weights[m][2 * k + 1];
        weight[m][0] = pack<T>(low[0], low[1]);
        weight[m][1] = pack<T>(low[2], low[3]);
        weight[m][2] = pack<T>(high[0], high[1]);
        weight[m][3] = pack<T>(high[2], high[3]);
      }
      PYCORE_UNROLL
      for (int n = 0; n < kChannels / 16; ++n) {
        uint32_t value[4];
        load_matrix<true>(value, value_rows, 2 * (16 * k * kStride + 16 * n));
        PYCORE_UNROLL
        for (int m = 0; m < kBlocks; ++m) {
          mma<T>(out[m][2 * n], weight[m], value[0], value[1]);
          mma<T>(out[m][2 * n + 1], weight[m], value[2], value[3]);
        }
      }
    }
  }

  // Takes what is not finite out of the tile's values: 0 times it would reach rows that do not keep its key. Whether
  // there was any; all threads.
  __device__ bool take_not_finite() const {
    constexpr uint64_t kExponents = 0x0001000100010001u * ExponentBits<T>::kBits;
    constexpr int kWords = kChannels / 4;
    bool found = false;
    for (int n = threadIdx.x; n < kTile * kWords; n += kMmaThreads) {
      auto* word = reinterpret_cast<uint64_t*>(shared.value + n / kWords * kStride) + n % kWords;
      const uint64_t ones = (*word & kExponents) ^ kExponents;  // a half that is 0 here is not finite
      if (((ones - 0x0001000100010001u) & ~ones & 0x8000800080008000u) == 0) continue;
      found = true;
      for (int k = 0; k < 64; k += 16) {
        if ((ones >> k & 0xffff) == 0) *word &= ~(uint64_t{0xffff} << k);
      }
    }
    return __syncthreads_or(found);
  }
  // And gives it to the rows that do.
  __device__ void add_not_finite(const KeyTile& key_tile) {
    const T* values = row_pointer<T>(params.value, params.value_strides, tile.b, tile.kv_head, 0);
    for (uint64_t left = key_tile.bits; left != 0; left &= left - 1) {
      const int64_t key = lowest_bit(left);
      const T* value = values + map.key_row(key_tile.index * kKeyTile + key) * params.value_strides.row;
      PYCORE_UNROLL
      for (int n = 0; n < kValueTiles; ++n) {
        for (int k = 0; k < 2; ++k) {
          const int c = 8 * n + 2 * (lane % 4) + k;
          if (c >= params.value_dim || (~value[c].bits & ExponentBits<T>::kBits) != 0) continue;
          PYCORE_UNROLL
          for (int m = 0; m < kBlocks; ++m) {
            PYCORE_UNROLL
            for (int half = 0; half < 2; ++half) {
              const int r = row_of(m, half);
              const uint64_t taken = kOptions && params.dropout_p > 0 ? shared.dropped[r] : 0;
              if ((shared.kept[r] & ~taken) >> key & 1) out[m][n][2 * half + k] += to_float(value[c]);
            }
          }
        }
      }
    }
  }

  // Scores to weights, which join the rows' sums.
  __device__ void soften(float (&scores)[kBlocks][8][4], int64_t key_tile, bool masked) {
    const float scale = kOptions ? 1.0f : static_cast<float>(params.scale) * kLog2E;
    PYCORE_UNROLL
    for (int m = 0; m < kBlocks; ++m) {
      PYCORE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int r = row_of(m, half), shift = 2 * (lane % 4);
        const uint64_t kept = masked ? shared.kept[r] >> shift : ~uint64_t{0};
        if (kOptions) logits_of(scores[m], half, r, kept, key_tile);
        float largest = -INFINITY;
        PYCORE_UNROLL
        for (int n = 0; n < 8; ++n) {
          PYCORE_UNROLL
          for (int k = 0; k < 2; ++k) {
            float& score = scores[m][n][2 * half + k];
            if (masked && !(kept >> (8 * n + k) & 1)) score = -INFINITY;
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
        PYCORE_UNROLL
        for (int n = 0; n < kValueTiles; ++n) {
          out[m][n][2 * half] *= factor;
          out[m][n][2 * half + 1] *= factor;
        }
        if (kOptions && params.dropout_p > 0) {
          const float keep_factor = static_cast<float>(1 / (1 - params.dropout_p));
          const uint64_t dropped = shared.dropped[r] >> shift;
          PYCORE_UNROLL
          for (int n = 0; n < 8; ++n) {
            PYCORE_UNROLL
            for (int k = 0; k < 2; ++k) {
              float& weight = scores[m][n][2 * half + k];
              weight = dropped >> (8 * n + k) & 1 ? 0.0f : weight * keep_factor;
            }
          }
        }
      }
    }
  }

  // Products to base-2 logits, of the pairs that are kept.
  __device__ void logits_of(float (&scores)[8][4], int half, int r, uint64_t kept, int64_t key_tile) const {
    const int64_t h = tile.head + r / tile.rows, p = shared.p_lo + r % tile.rows;
    const int64_t j = key_tile * kKeyTile + 2 * (lane % 4);
    PYCORE_UNROLL
    for (int n = 0; n < 8; ++n) {
      PYCORE_UNROLL
      for (int k = 0; k < 2; ++k) {
        float& score = scores[n][2 * half + k];
        if (kept >> (8 * n + k) & 1) score = base2_logit(params, h, p, j + 8 * n + k, score);
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
      PYCORE_UNROLL
      for (int n = 0; n < kValueTiles; ++n) {
        PYCORE_UNROLL
        for (int k = 0; k < 4; ++k) out[m][n][k] = 0;
      }
    }
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

  // Everything of a tile whose keys are under way; then the next one's are.
  __device__ void visit(const KeyTile& key_tile, KeyTile& next) {
    copy_async_wait<0>();
    __syncthreads();  // the keys are here, and nobody needs the last values
    load_value(key_tile);
    copy_async_commit();
    if (threadIdx.x == 0) {
      next = next_key_tile(map, shared.p_lo, shared.p_hi, key_tile.index + 1);
      if (plan.splits > 1 && next.segment() != key_tile.segment()) next = KeyTile();
    }
    const bool rope = kOptions && params.rope_cos != nullptr, masked = kOptions || key_tile.masked;
    const int64_t base = key_tile.index * kKeyTile;
    const bool any_far = rope && shared.p_hi - base > params.distance_limit;
    const bool any_near = !any_far || shared.p_lo - (base + kKeyTile - 1) <= params.distance_limit;
    bool not_finite = false;
    for (int pass = any_far ? 0 : 1; pass < (any_near ? 2 : 1); ++pass) {
      const bool far = pass == 0, last = pass == 1 || !any_near;
      if (rope && !far) {
        turn_key();
        __syncthreads();
      }
      const bool any = masked ? mask_rows(key_tile, far) : warp_row < tile.heads * tile.rows;
      float scores[kBlocks][8][4];
      if (any) {
        if (rope) turn_query(key_tile.index, far);
        multiply_keys(rope ? shared.turned : shared.query, scores);
      }
      copy_async_wait<0>();
      __syncthreads();  // the values are here, and nobody needs the keys
      if (last && next.any()) load_key(next);
      if (last) copy_async_commit();
      if (masked) not_finite |= take_not_finite();
      if (any) {
        soften(scores, key_tile.index, masked);
        multiply_values(scores);
        if (not_finite) add_not_finite(key_tile);
      }
    }
  }

  __device__ void store_row(int m, int half, float factor, float lse) const {
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
      if (plan.pairs_out && c < params.value_dim) {
        *reinterpret_cast<uint32_t*>(row + c) = pack<T>(one, two);
      } else {
        if (c < params.value_dim) row[c] = from_float<T>(one);
        if (c + 1 < params.value_dim) row[c + 1] = from_float<T>(two);
      }
    }
    if (lane % 4 == 0) static_cast<float*>(params.lse)[index] = empty ? -INFINITY : lse;
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

  // Thread 0 finds the block's rows and their first key tile.
  __device__ void bind() {
    shared.tile.bind(params, plan, blockIdx.x);
    shared.map = bounded_row_map(params, tile.b, tile.head);
    const int64_t left = map.queries - tile.first;
    shared.p_lo = map.query_position(tile.first);
    shared.p_hi = shared.p_lo + (left < tile.rows ? left : tile.rows) - 1;
    KeyTile first;
    if (left > 0) first.index = segment_start(map, shared.p_lo, shared.p_hi, tile.split);
    const int64_t segment = first.segment();
    if (first.any()) first = next_key_tile(map, shared.p_lo, shared.p_hi, first.index);
    if (plan.splits > 1 && first.segment() != segment) first = KeyTile();
    shared.key_tiles[0] = first;
  }

  __device__ void run() {
    if (threadIdx.x == 0) bind();
    __syncthreads();
    const bool split = plan.splits > 1;
    load_query();
    if (shared.key_tiles[0].any()) load_key(shared.key_tiles[0]);
    copy_async_commit();
    open_segment();
    // Of segments before the open one: rarely used and never at the same time as the products, so they stay in memory.
    constexpr int kOuts = kBlocks * kValueTiles * 4;
    float memory[kOuts + 4 * kBlocks];
    const int zero = opaque_zero();
    bool merged = false;
    const auto total_of = [&](int m, int half) {
      SoftmaxTotal total;
      if (!merged) return total;
      total.max = memory[zero + kOuts + 4 * m + 2 * half];
      total.sum = memory[zero + kOuts + 4 * m + 2 * half + 1];
      return total;
    };
    // Leaves the total in place of the open segment.
    const auto merge = [&] {
      close_segment();
      PYCORE_UNROLL
      for (int m = 0; m < kBlocks; ++m) {
        PYCORE_UNROLL
        for (int half = 0; half < 2; ++half) {
          SoftmaxTotal total = total_of(m, half);
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
    for (int at = 0; shared.key_tiles[at].any(); at ^= 1) {
      visit(shared.key_tiles[at], shared.key_tiles[at ^ 1]);
      const KeyTile &last = shared.key_tiles[at], &next = shared.key_tiles[at ^ 1];
      if (next.any() && next.segment() != last.segment()) {
        merge();
        open_segment();
      }
    }
    copy_async_wait<0>();
    if (split) {
      close_segment();
      return store_partial();
    }
    merge();
    PYCORE_UNROLL
    for (int m = 0; m < kBlocks; ++m) {
      PYCORE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int r = row_of(m, half);
        if (!tile.exists(params, r)) continue;
        SoftmaxTotal total;
        total.max = max[m][half];
        total.sum = sum[m][half];
        const float factor = total.finish(params, tile.head + r / tile.rows);
        store_row(m, half, factor, total.lse());
      }
    }
  }
};

template <class T, int kChannels, int kBlocks, bool kOptions>
__global__ void __launch_bounds__(kMmaThreads)
    mma_forward_kernel(const __grid_constant__ AttentionParams params, const __grid_constant__ MmaPlan plan) {
  MmaForward<T, kChannels, kBlocks, kOptions>(params, plan).run();
}

template <class T, int kChannels, int kBlocks, bool kOptions>
Status launch_mma(const AttentionParams& params, const MmaPlan& plan, void* stream) {
  return launch(mma_forward_kernel<T, kChannels, kBlocks, kOptions>, plan.items * plan.splits, kMmaThreads,
                static_cast<int64_t>(sizeof(MmaShared<T, kChannels, kBlocks, kOptions>)), stream, params, plan);
}

template <class T, int kChannels>
Status launch_mma_of(const AttentionParams& params, const MmaPlan& plan, void* stream) {
  if (plan.options) return launch_mma<T, kChannels, 1, true>(params, plan, stream);
  if constexpr (kChannels <= 128) {
    if (plan.wide) return launch_mma<T, kChannels, 2, false>(params, plan, stream);
  }
  return launch_mma<T, kChannels, 1, false>(params, plan, stream);
}

template <class T>
Status launch_mma_dtype(const AttentionParams& params, const MmaPlan& plan, void* stream) {
  Status status;
  switch (plan.channels) {
    case 64: status = launch_mma_of<T, 64>(params, plan, stream); break;
    case 96: status = launch_mma_of<T, 96>(params, plan, stream); break;
    case 128: status = launch_mma_of<T, 128>(params, plan, stream); break;
    default: status = launch_mma_of<T, 256>(params, plan, stream); break;
  }
  if (!status.ok() || plan.splits == 1) return status;
  const int64_t warps = plan.items * plan.heads * plan.rows;
  return launch(merge_kernel<T>, (warps + kMmaWarps - 1) / kMmaWarps, kMmaThreads, 0, stream, params, plan);
}

}  // namespace
}  // namespace pycore
