// SPDX-License-Identifier: Apache-2.0
// Draws the blocks of a round, a warp for each row of the bitmap, from seeds and a round in device memory: a graph that
// is replayed draws what they then say. The decisions are block_draw.h's, and so are their bits.
#include <pycore/attention/block_draw.h>
#include <pycore/attention/blocks.h>

#include "device.cuh"

namespace pycore {
namespace {

// One row of the bitmap.
struct DrawnRow {
  const BlockParams& params;
  const double* probabilities;
  BlockDraw draw;
  int64_t query_block, column0;
  uint64_t* words;

  __device__ double probability(int64_t key_block) const {
    const int64_t distance = query_block - key_block, last = params.probability_length - 1;
    return fmin(fmax(probabilities[distance < last ? distance : last], 0.0), 1.0);  // NaN is 0
  }
  // Adds 32 consecutive blocks, one a lane, that were chosen: 0, 1 or 2 words of the bitmap.
  __device__ void set(int64_t key_block, bool chosen) const {
    const int64_t column = key_block - column0;
    for (uint32_t left =
             __ballot_sync(kAllLanes, chosen && column >= 0 && column < 64 * params.rows.schedule.block_words);
         left != 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1, place = static_cast<int>(threadIdx.x);
      if (lane == place) words[column / 64] |= uint64_t{1} << (column % 64);
      __syncwarp();
    }
  }
  // Bits for the blocks of a word, in which every lane takes part.
  template <class Taken>
  __device__ uint64_t word(int64_t index, Taken taken) const {
    uint64_t bits = 0;
    for (int half = 0; half < 2; ++half) {
      const int64_t key_block = column0 + index * 64 + half * kLanes + threadIdx.x;
      bits |= static_cast<uint64_t>(__ballot_sync(kAllLanes, key_block <= query_block && taken(key_block)))
              << (half * kLanes);
    }
    return bits;
  }
};

// A double as a number that is larger where the double is.
__device__ inline uint64_t ordered(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}

// The Gumbel top-k: what the window leaves of blocks_per_row, of equal scores the lowest block. shared: the scores of
// the first `capacity` key blocks; the others are found again each time.
__device__ inline void choose_blocks(const DrawnRow& row, int64_t capacity) {
  auto* scores = reinterpret_cast<uint64_t*>(shared_memory());
  const int64_t window = row.params.rows.schedule.window_blocks, lane = threadIdx.x;
  const int64_t candidates = row.query_block + 1 - window;
  const auto find_score = [&](int64_t key_block) {
    const double p = row.probability(key_block);
    // 0 is no double's number but a NaN's, which is none.
    return p > 0 ? ordered(gumbel_score(p, row.draw.bits(row.query_block, key_block))) : 0;
  };
  const auto score_of = [&](int64_t key_block) {
    return key_block < capacity ? scores[key_block] : find_score(key_block);
  };
  for (int64_t n = lane; n < candidates && n < capacity; n += kLanes) scores[n] = find_score(n);
  __syncwarp();
  const auto count = [&](auto matches) {
    int64_t found = 0;
    for (int64_t n = lane; n < candidates; n += kLanes) found += matches(score_of(n));
    return warp_sum(found);
  };
  int64_t wanted = row.params.blocks_per_row - (candidates > 0 ? window : row.query_block + 1);
  const int64_t possible = count([](uint64_t score) { return score > 0; });
  if (wanted > possible) wanted = possible;
  if (wanted <= 0) return;
  // The largest number that at least `wanted` scores reach, bit by bit.
  uint64_t least = 0;
  for (int bit = 63; bit >= 0; --bit) {
    const uint64_t tried = least | uint64_t{1} << bit;
    if (count([&](uint64_t score) { return score >= tried; }) >= wanted) least = tried;
  }
  int64_t ties = wanted - count([&](uint64_t score) { return score > least; });
  // From block 0 on: ties of evicted blocks come first, too.
  for (int64_t first = 0; first < candidates; first += kLanes) {
    const int64_t key_block = first + lane;
    const uint64_t score = key_block < candidates ? score_of(key_block) : 0;
    uint32_t equal = __ballot_sync(kAllLanes, score == least);
    const uint32_t above = __ballot_sync(kAllLanes, score > least);
    bool chosen = above >> lane & 1;
    for (; equal != 0 && ties > 0; equal &= equal - 1, --ties) {
      if (__ffs(static_cast<int>(equal)) - 1 == lane) chosen = true;
    }
    row.set(key_block, chosen);
  }
}

__global__ void draw_kernel(const __grid_constant__ BlockParams params, int64_t capacity) {
  const AttentionParams& rows = params.rows;
  const TileSchedule& shape = rows.schedule;
  // Rows of many blocks first.
  const int64_t index = shape.block_rows - 1 - blockIdx.x % shape.block_rows, head = blockIdx.x / shape.block_rows;
  const int64_t b = head / rows.heads, h = head % rows.heads;
  const RowMap map = bounded_row_map(rows, b, h);
  DrawnRow row = {params,
                  params.probabilities + h * params.probability_stride,
                  {static_cast<uint64_t>(params.seeds[b * params.seed_stride]), static_cast<uint32_t>(h),
                   static_cast<uint32_t>(*params.round), params.diagonal},
                  map.schedule.block_row0 + index,
                  map.schedule.block_column0,
                  params.blocks + (head * shape.block_rows + index) * shape.block_words};
  const bool empty = map.queries == 0 || row.query_block < 0 ||
                     row.query_block > map.query_position(map.queries - 1) >> shape.block_shift;
  const bool chosen = params.blocks_per_row > 0;
  for (int64_t word = 0; word < shape.block_words; ++word) {
    const uint64_t bits = empty ? 0 : row.word(word, [&](int64_t key_block) {
      if (row.query_block - key_block < shape.window_blocks) return true;
      return !chosen && row.draw.bits(row.query_block, key_block) < block_threshold(row.probability(key_block));
    });
    if (threadIdx.x == 0) row.words[word] = bits;
  }
  __syncwarp();
  if (!empty && chosen) choose_blocks(row, capacity);
}

constexpr int kCorrectionThreads = 128;
constexpr int64_t kMostScores = 4096;  // in 32 KB of shared memory

__global__ void correction_kernel(const double* probabilities, int64_t length, int64_t stride, int64_t count,
                                  float* out) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kCorrectionThreads + threadIdx.x;
  if (n < count) out[n] = static_cast<float>(added_logit(probabilities[n / length * stride + n % length]));
}

}  // namespace

Status launch_attention_blocks(const BlockParams& params, void* stream) {
  const AttentionParams& rows = params.rows;
  if (rows.schedule.block_words == 0) return {};
  // Key blocks of a row, unless some were evicted.
  int64_t capacity = params.blocks_per_row > 0 ? rows.schedule.block_words * 64 : 0;
  if (capacity > kMostScores) capacity = kMostScores;
  return launch(draw_kernel, rows.batch * rows.heads * rows.schedule.block_rows, kLanes,
                capacity * static_cast<int64_t>(sizeof(uint64_t)), stream, params, capacity);
}

Status launch_block_correction(const BlockParams& params, void* stream) {
  const int64_t count = params.correction_rows * params.probability_length;
  return launch(correction_kernel, (count + kCorrectionThreads - 1) / kCorrectionThreads, kCorrectionThreads, 0, stream,
                params.probabilities, params.probability_length, params.probability_stride, count,
                static_cast<float*>(params.correction));
}

}  // namespace pycore
