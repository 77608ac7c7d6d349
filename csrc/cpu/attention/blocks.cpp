// SPDX-License-Identifier: Apache-2.0
// Draws the blocks of a round, a row of the bitmap at a time. There is one version: ten rounds of Philox a block are
// nothing beside the block's products.
#include <pycore/attention/block_draw.h>
#include <pycore/attention/blocks.h>
#include <pycore/dtype.h>
#include <pycore/float_environment.h>
#include <pycore/sizes.h>

#include <algorithm>
#include <cmath>

namespace pycore {
namespace {

constexpr int64_t kSerialDraws = 1 << 12;  // blocks not worth waking a second thread for

struct Candidate {
  double score;
  int64_t key_block;
};

// The Gumbel top-k: what the window leaves of blocks_per_row, best first, of equal scores the lowest block.
void choose_blocks(const BlockParams& params, const BlockDraw& draw, const double* probabilities, int64_t query_block,
                   int64_t column0, Candidate* candidates, uint64_t* row) {
  const int64_t window = std::min(params.rows.schedule.window_blocks, query_block + 1);
  int64_t count = 0;
  for (int64_t key_block = 0; key_block <= query_block - window; ++key_block) {
    const double p = probabilities[std::min(query_block - key_block, params.probability_length - 1)];
    if (p > 0) candidates[count++] = {gumbel_score(p, draw.bits(query_block, key_block)), key_block};
  }
  const int64_t wanted = std::clamp<int64_t>(params.blocks_per_row - window, 0, count);
  const auto before = [](const Candidate& x, const Candidate& y) {
    return x.score > y.score || (x.score == y.score && x.key_block < y.key_block);
  };
  if (wanted < count) std::nth_element(candidates, candidates + wanted, candidates + count, before);
  for (int64_t i = 0; i < wanted; ++i) {
    const int64_t column = candidates[i].key_block - column0;
    if (column >= 0) row[column / 64] |= uint64_t{1} << (column % 64);
  }
}

void draw_row(const BlockParams& params, int64_t b, int64_t h, int64_t index, Candidate* candidates) {
  const AttentionParams& rows = params.rows;
  const TileSchedule& shape = rows.schedule;
  uint64_t* row = params.blocks + ((b * rows.heads + h) * shape.block_rows + index) * shape.block_words;
  std::fill_n(row, shape.block_words, uint64_t{0});
  const RowMap map = row_map(rows, b, h);
  const int64_t query_block = map.schedule.block_row0 + index, column0 = map.schedule.block_column0;
  if (map.queries == 0 || query_block < 0) return;
  if (query_block > map.query_position(map.queries - 1) >> shape.block_shift) return;
  const double* probabilities = params.probabilities + h * params.probability_stride;
  const BlockDraw draw = {static_cast<uint64_t>(params.seeds[b * params.seed_stride]), static_cast<uint32_t>(h),
                          static_cast<uint32_t>(*params.round), params.diagonal};
  const bool chosen = params.blocks_per_row > 0;
  for (int64_t key_block = column0; key_block <= query_block; ++key_block) {
    const int64_t distance = query_block - key_block, column = key_block - column0;
    bool taken = distance < shape.window_blocks;
    if (!taken && !chosen) {
      const uint32_t threshold = block_threshold(probabilities[std::min(distance, params.probability_length - 1)]);
      taken = threshold > 0 && draw.bits(query_block, key_block) < threshold;
    }
    row[column / 64] |= static_cast<uint64_t>(taken) << (column % 64);
  }
  if (chosen) choose_blocks(params, draw, probabilities, query_block, column0, candidates, row);
}

// Candidates a row can have: key blocks before the last query's.
int64_t most_candidates(const BlockParams& params) {
  if (params.blocks_per_row == 0) return 0;
  int64_t most = 0;
  for (int64_t b = 0; b < params.rows.batch; ++b) {
    most = std::max(most, (row_map(params.rows, b).positions() >> params.rows.schedule.block_shift) + 1);
  }
  return most;
}

int64_t slot_bytes(const BlockParams& params) {
  return (most_candidates(params) * static_cast<int64_t>(sizeof(Candidate)) + 63) / 64 * 64;
}

// A family's probabilities, before the threads' slots.
int64_t table_bytes(const BlockParams& params) {
  if (params.family == BlockFamily::kTable) return 0;
  return (size_product({params.probability_length, 8}) + 63) / 64 * 64;
}

}  // namespace

void block_family(BlockFamily family, double parameter, int64_t count, double* probabilities) {
  const FixedFloats fixed;
  for (int64_t i = 0; i < count; ++i) {
    const double distance = static_cast<double>(i);
    double p = parameter;
    if (family == BlockFamily::kGeometric) p = std::pow(parameter, distance);
    if (family == BlockFamily::kPowerLaw) p = std::pow(1 + distance, -parameter);
    if (family == BlockFamily::kHarmonic) p = std::min(1.0, parameter / (1 + distance));
    if (family == BlockFamily::kGaussian) p = portable_exp(-(distance * distance) / (2 * parameter * parameter));
    probabilities[i] = p;
  }
}

void block_correction(const double* probabilities, int64_t count, DType dtype, void* out) {
  const FixedFloats fixed;
  for (int64_t i = 0; i < count; ++i) {
    const double added = added_logit(probabilities[i]);
    if (dtype == DType::kFloat64) {
      static_cast<double*>(out)[i] = added;
    } else {
      static_cast<float*>(out)[i] = static_cast<float>(added);
    }
  }
}

int64_t attention_blocks_scratch(const BlockParams& params, int64_t threads) {
  return size_sum(table_bytes(params), size_product({threads, slot_bytes(params)}));
}

Status attention_blocks(const BlockParams& given_params, const Parallel& given, void* scratch) {
  BlockParams params = given_params;
  if (params.family != BlockFamily::kTable) {
    auto* const table = static_cast<double*>(scratch);
    block_family(params.family, params.parameter, params.probability_length, table);
    params.probabilities = table;
    scratch = static_cast<char*>(scratch) + table_bytes(params);
  }
  for (int64_t h = 0; h < params.correction_rows; ++h) {
    const int64_t row = h * params.probability_length * dtype_size(params.correction_dtype);
    block_correction(params.probabilities + h * params.probability_stride, params.probability_length,
                     params.correction_dtype, static_cast<char*>(params.correction) + row);
  }
  const AttentionParams& rows = params.rows;
  const int64_t block_rows = rows.schedule.block_rows, items = size_product({rows.batch, rows.heads, block_rows});
  if (rows.schedule.block_words == 0) return {};
  const Parallel parallel = limited(given, size_product({items, rows.schedule.block_words, 64}), kSerialDraws);
  const int64_t bytes = slot_bytes(params);
  for_each_item(parallel, items, [&](int64_t slot, int64_t item) {
    const int64_t head = item / block_rows;
    // Rows of many blocks first.
    draw_row(params, head / rows.heads, head % rows.heads, block_rows - 1 - item % block_rows,
             reinterpret_cast<Candidate*>(static_cast<char*>(scratch) + slot * bytes));
  });
  return {};
}

}  // namespace pycore
