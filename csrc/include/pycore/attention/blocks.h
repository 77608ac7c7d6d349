// SPDX-License-Identifier: Apache-2.0
// Drawing the blocks of a round of probabilistic attention: the bitmap that the blocks schedule (tile_schedule.h)
// reads. It is drawn once and kept for the backward pass. block_draw.h makes the decisions.
//
// A bitmap has a row for every query block that the queries can touch and, wherever they start, room for every key
// block that the keys can: Lq and Lk in blocks, rounded up, and one more where positions need not start at a block.
// That is one bit for block_size^2 pairs.
#pragma once

#include <pycore/attention/attention.h>
#include <pycore/export.h>
#include <pycore/parallel.h>
#include <pycore/status.h>

#include <cstdint>

namespace pycore {

inline constexpr int64_t kLargestBlockShift = 30;

// Blocks of 2^shift positions that `length` consecutive positions can touch, wherever they start.
PYCORE_HOST_DEVICE inline int64_t touched_blocks(int64_t length, int64_t shift) {
  return ((length + (int64_t{1} << shift) - 2) >> shift) + 1;
}
PYCORE_HOST_DEVICE inline int64_t bitmap_words(int64_t key_length, int64_t shift) {
  return (touched_blocks(key_length, shift) + 63) / 64;
}

// p by block distance D, with one parameter.
enum class BlockFamily : int32_t {
  kTable,      // a table's entries
  kGeometric,  // rho^D
  kPowerLaw,   // (1 + D)^-alpha
  kHarmonic,   // min(1, c / (1 + D))
  kGaussian,   // exp(-D^2 / (2 sigma^2))
  kConstant    // p
};

struct BlockParams {
  // Of these: batch, heads, query_length, key_length, the four lengths, and the schedule's sink_size, block_shift,
  // block_rows, block_words and window_blocks.
  AttentionParams rows;
  // [heads or 1, probability_length]; the last holds beyond. Null with a family, of which the CPU makes them.
  const double* probabilities = nullptr;
  int64_t probability_length = 0, probability_stride = 0;  // stride 0: one row for all heads
  const int64_t* seeds = nullptr;                          // [batch], or one number with seed_stride 0
  int64_t seed_stride = 0;
  const int64_t* round = nullptr;  // one number
  bool diagonal = false;
  int64_t blocks_per_row = 0;  // 0: every block by its own probability
  BlockFamily family = BlockFamily::kTable;
  double parameter = 0;
  uint64_t* blocks = nullptr;  // [batch, heads, block_rows, block_words]
  // Importance correction, block_correction of every probability: [correction_rows, probability_length].
  void* correction = nullptr;
  int64_t correction_rows = 0;  // 0: none, else 1 or heads
  DType correction_dtype = DType::kFloat32;
};

// probabilities[D] of a family, for D < count.
PYCORE_API void block_family(BlockFamily family, double parameter, int64_t count, double* probabilities);
// -log p for `count` probabilities, 0 where p is 0: what importance correction adds to a logit. float32 or float64.
PYCORE_API void block_correction(const double* probabilities, int64_t count, DType dtype, void* out);
// `scratch` holds attention_blocks_scratch(params, threads) bytes, 64-byte aligned.
PYCORE_API int64_t attention_blocks_scratch(const BlockParams& params, int64_t threads);
PYCORE_API Status attention_blocks(const BlockParams& params, const Parallel& parallel, void* scratch);

// CUDA: every pointer is a device pointer, `probabilities` is there, and the correction is float32.
PYCORE_API Status launch_attention_blocks(const BlockParams& params, void* stream);
PYCORE_API Status launch_block_correction(const BlockParams& params, void* stream);

}  // namespace pycore
