// SPDX-License-Identifier: Apache-2.0
// What both faces check before the blocks of a round are drawn. Throws std::invalid_argument (checks.h).
#pragma once

#include <pycore/attention/blocks.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "attention_args.h"

namespace pycore {

struct BlocksArgs {
  std::string op;
  TensorView seed;                                                // int64 [batch] or one number
  TensorView round;                                               // int64, one number
  TensorView probabilities;                                       // float64 [n] or [heads, n]; not defined(): a family
  TensorView key_starts, key_lengths, key_offset, query_lengths;  // not defined(): defaults
  std::string family;  // "table", "geometric", "power_law", "harmonic", "gaussian" or "constant"
  double parameter = 0;
  std::string pattern;     // "independent" or "diagonal"
  std::string correction;  // "none" or "importance"
  bool wide = false;       // the correction in float64
  int64_t batch = 0, heads = 0, query_length = 0, key_length = 0;
  int64_t block_size = 0;  // 1: the lengths count blocks
  int64_t sink_size = 0, window_blocks = 0;
  int64_t blocks_per_row = -1;    // -1: every block by its own probability
  mutable AttentionArgs lengths;  // op and device, for the checks that attention has too, and their copies
};

namespace detail {

inline BlockFamily check_family(const BlocksArgs& args) {
  struct Family {
    const char* name;
    const char* parameter;
    BlockFamily family;
    double most;
  };
  constexpr double kAny = 1e308;
  constexpr Family kFamilies[] = {{"geometric", "rho", BlockFamily::kGeometric, 1},
                                  {"power_law", "alpha", BlockFamily::kPowerLaw, kAny},
                                  {"harmonic", "c", BlockFamily::kHarmonic, kAny},
                                  {"gaussian", "sigma", BlockFamily::kGaussian, kAny},
                                  {"constant", "p", BlockFamily::kConstant, 1}};
  if (args.family == "table") return BlockFamily::kTable;
  const Family* found = nullptr;
  for (const Family& family : kFamilies) {
    if (args.family == family.name) found = &family;
  }
  check_value(found != nullptr, args.op, "family is \"", args.family,
              "\" and must be \"table\", \"geometric\", \"power_law\", \"harmonic\", \"gaussian\" or \"constant\"");
  check_value(args.parameter >= 0 && args.parameter <= found->most, args.op, found->parameter, " is ", args.parameter,
              " and must be ", found->most == 1 ? "between 0 and 1" : "finite and at least 0");
  check_value(found->family != BlockFamily::kGaussian || args.parameter > 0, args.op,
              "sigma is 0 and must be greater than 0");
  return found->family;
}

inline void check_probabilities(const BlocksArgs& args, BlockParams* params) {
  const TensorView& table = args.probabilities;
  check_value(table.defined(), args.op, "distance_probs must be a tensor of probabilities");
  check_value(table.dtype == DType::kFloat64 && table.device == args.seed.device, args.op, "distance_probs is ",
              dtype_name(table.dtype), " and must be float64, on seed's device");
  check_value((table.dims == 1 || (table.dims == 2 && table.shape[0] == args.heads)) && table.shape[table.dims - 1] > 0,
              args.op, "distance_probs has shape ", shape_text(table), " and must be [n] or [heads, n], with ",
              args.heads, " heads and n at least 1");
  const int64_t rows = table.dims == 1 ? 1 : table.shape[0], n = table.shape[table.dims - 1];
  check_last_contiguous(args.op, "distance_probs", table);
  params->probabilities = table.as<const double>();
  params->probability_length = n;
  params->probability_stride = table.dims == 1 ? 0 : table.strides[0];
  for (int64_t h = 0; h < rows && table.device == Device::kCpu; ++h) {
    for (int64_t i = 0; i < n; ++i) {
      const double p = params->probabilities[h * params->probability_stride + i];
      const std::string at = table.dims == 1 ? "" : std::to_string(h) + ", ";
      check_value(p >= 0 && p <= 1, args.op, "distance_probs[", at, i, "] is ", p, " and must be between 0 and 1");
    }
  }
}

}  // namespace detail

// Everything but blocks and correction, which the face allocates.
inline BlockParams block_params(const BlocksArgs& args) {
  const std::string& op = args.op;
  BlockParams params;
  const std::pair<const char*, int64_t> counts[] = {{"batch", args.batch},
                                                    {"heads", args.heads},
                                                    {"query's length", args.query_length},
                                                    {"key's length", args.key_length},
                                                    {"sink_size", args.sink_size},
                                                    {"window_blocks", args.window_blocks}};
  for (const auto& [name, count] : counts) {
    check_value(count >= 0 && count < kFar, op, name, " is ", count, " and must be at least 0");
  }
  AttentionParams& rows = params.rows;
  rows.batch = args.batch;
  rows.heads = args.heads;
  rows.query_length = args.query_length;
  rows.key_length = args.key_length;
  rows.schedule.kind = ScheduleKind::kBlocks;
  rows.schedule.sink_size = args.sink_size;
  rows.schedule.window_blocks = args.window_blocks;
  rows.schedule.block_shift = detail::check_block_size(op, args.block_size, true);
  rows.schedule.block_rows = touched_blocks(args.query_length, rows.schedule.block_shift);
  rows.schedule.block_words = bitmap_words(args.key_length, rows.schedule.block_shift);

  check_value(args.pattern == "independent" || args.pattern == "diagonal", op, "pattern is \"", args.pattern,
              "\" and must be \"independent\" or \"diagonal\"");
  params.diagonal = args.pattern == "diagonal";
  check_value(args.correction == "none" || args.correction == "importance", op, "correction is \"", args.correction,
              "\" and must be \"none\" or \"importance\"");
  check_value(args.correction == "none" || args.blocks_per_row == -1, op,
              "correction is \"importance\" and must be \"none\" with blocks_per_row");
  if (args.blocks_per_row != -1) {
    const int64_t least = std::max<int64_t>(1, args.window_blocks);
    check_value(args.blocks_per_row >= least, op, "blocks_per_row is ", args.blocks_per_row, " and must be at least ",
                least, ", with window_blocks ", args.window_blocks);
    params.blocks_per_row = args.blocks_per_row;
  }
  params.family = detail::check_family(args);
  params.parameter = args.parameter;
  if (params.family == BlockFamily::kTable) {
    detail::check_probabilities(args, &params);
  } else {
    params.probability_length = std::max<int64_t>(1, touched_blocks(args.key_length, rows.schedule.block_shift));
  }

  if (args.correction == "importance") params.correction_rows = params.probability_stride ? args.heads : 1;
  params.correction_dtype = args.wide ? DType::kFloat64 : DType::kFloat32;

  // Seeds, the round and the lengths lie together; only on the CPU are their values read here.
  const bool readable = args.seed.device == Device::kCpu;
  const auto check_numbers = [&](const char* name, const TensorView& view, bool batch) {
    check_value(
        view.defined() && view.dtype == DType::kInt64 && view.device != Device::kOther && same_device(view, args.seed),
        op, name, " must be an int64 tensor on ", readable ? "the CPU" : "seed's device");
    check_value(view.count() == 1 || (batch && view.dims == 1 && view.shape[0] == args.batch), op, name, " has shape ",
                shape_text(view), " and must be one number", batch ? " or [batch]" : "");
  };
  check_numbers("seed", args.seed, true);
  check_numbers("round", args.round, false);
  AttentionArgs& lengths = args.lengths;
  lengths.op = op;
  lengths.query = args.seed;  // whose device they share
  const bool one_seed = args.seed.count() == 1;
  params.seeds = args.seed.as<const int64_t>();
  params.seed_stride = one_seed ? 0 : args.seed.strides[0];
  params.round = args.round.as<const int64_t>();
  if (readable) {
    params.seeds = lengths.copies.keep(op, params.seeds, one_seed ? 1 : args.batch, params.seed_stride);
    params.seed_stride = one_seed ? 0 : 1;
    params.round = lengths.copies.keep(op, params.round, 1);
  }
  for (int64_t b = 0; readable && b < (params.seed_stride ? args.batch : 1); ++b) {
    const int64_t seed = params.seeds[b * params.seed_stride];
    check_value(seed >= 0, op, "seed is ", seed, " and must be at least 0");
  }
  check_value(!readable || (*params.round >= 0 && *params.round < int64_t{1} << 32), op, "round is ",
              readable ? *params.round : 0, " and must be between 0 and 2**32 - 1");

  rows.key_starts = detail::check_lengths(lengths, "key_starts", args.key_starts, args.batch);
  rows.key_lengths = detail::check_lengths(lengths, "key_lengths", args.key_lengths, args.batch);
  rows.key_offset = detail::check_lengths(lengths, "key_offset", args.key_offset, args.batch);
  rows.query_lengths = detail::check_lengths(lengths, "query_lengths", args.query_lengths, args.batch);
  if (readable) detail::check_length_values(lengths, rows);
  return params;
}

}  // namespace pycore
