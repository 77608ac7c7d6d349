// SPDX-License-Identifier: Apache-2.0
// How evenly threads share attention: items in the order of csrc/cpu/attention/plan.h, each claimed by the thread that
// is free first, and costing the pairs it keeps. The busiest thread may have 1.1 times the mean.
#include <pycore/attention/blocks.h>

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <vector>

#include "../../csrc/cpu/attention/plan.h"

namespace {

using pycore::AttentionParams;
using pycore::QueryTile;
using pycore::RowMap;
using pycore::ScheduleKind;

// A plan asks kernels only for their sizes.
pycore::AttentionKernels sizes() {
  pycore::AttentionKernels kernels = {};
  kernels.forward_rows = pycore::kForwardRows;
  kernels.backward_rows = pycore::kBackwardRows;
  kernels.forward_scratch = [](const AttentionParams&) -> int64_t { return 0; };
  kernels.forward_partial = [](const AttentionParams&, int64_t) -> int64_t { return 0; };
  kernels.forward_merge = [](const AttentionParams&, const QueryTile&, const void*, int64_t, int64_t, void*) {};
  return kernels;
}

struct Round {
  std::vector<uint64_t> blocks;
  AttentionParams params;
};

// heads x length queries and keys; a family's blocks of 64, or with `kind` another schedule.
Round problem(ScheduleKind kind, int64_t heads, int64_t length, pycore::BlockFamily family, double parameter) {
  Round round;
  AttentionParams& params = round.params;
  params.batch = 1;
  params.heads = params.kv_heads = heads;
  params.query_length = params.key_length = length;
  params.schedule.kind = kind;
  if (kind == ScheduleKind::kLambda) {
    params.schedule.sink_size = 16;
    params.schedule.window_size = 512;
  }
  if (kind != ScheduleKind::kBlocks) return round;
  params.schedule.sink_size = 1;
  params.schedule.window_blocks = 1;
  params.schedule.block_shift = 6;
  params.schedule.block_rows = pycore::touched_blocks(length, 6);
  params.schedule.block_words = pycore::bitmap_words(length, 6);
  round.blocks.resize(heads * params.schedule.block_rows * params.schedule.block_words);
  params.schedule.blocks = round.blocks.data();
  const int64_t count = length / 64 + 1, seed = 1, number = 0;
  std::vector<double> probabilities(count);
  pycore::block_family(family, parameter, count, probabilities.data());
  pycore::BlockParams draw;
  draw.rows = params;
  draw.probabilities = probabilities.data();
  draw.probability_length = count;
  draw.seeds = &seed;
  draw.round = &number;
  draw.blocks = round.blocks.data();
  pycore::attention_blocks(draw, {}, nullptr);
  return round;
}

// Pairs that the tile's rows keep in segments first..last-1.
double kept_pairs(const RowMap& map, const QueryTile& tile, int64_t first, int64_t last) {
  if (tile.count <= 0) return 0;
  const int64_t p_lo = map.query_position(tile.first), p_hi = p_lo + tile.count - 1;
  int64_t pairs = 0;
  for (int64_t key_tile = map.next_tile(p_lo, p_hi, first * pycore::kSegmentTiles);
       key_tile != pycore::kNoTile && key_tile / pycore::kSegmentTiles < last;
       key_tile = map.next_tile(p_lo, p_hi, key_tile + 1)) {
    for (int64_t p = p_lo; p <= p_hi; ++p) {
      pairs += __builtin_popcountll(map.schedule.keep_bits(p, key_tile) & map.present_bits(key_tile));
    }
  }
  return static_cast<double>(pairs * tile.heads);
}

std::vector<double> forward_items(const AttentionParams& params, int64_t threads) {
  const pycore::AttentionKernels kernels = sizes();
  const pycore::ForwardPlan plan(params, kernels, threads);
  std::vector<double> items;
  for (int64_t index = 0; index < plan.tiles; ++index) {
    RowMap map;
    const QueryTile tile = plan.tile(index, &map);
    std::vector<pycore::SegmentRange> ranges(plan.segments);
    if (plan.segments > 1) {
      const int64_t p_lo = map.query_position(tile.first);
      pycore::list_segments(map, p_lo, p_lo + tile.count - 1, plan.segments, ranges.data());
    }
    for (const pycore::SegmentRange& range : ranges) items.push_back(kept_pairs(map, tile, range.first, range.last));
  }
  return items;
}

std::vector<double> backward_items(const AttentionParams& params, int64_t) {
  std::vector<double> items;
  const int64_t count = params.heads * pycore::tiles(params.query_length, pycore::kBackwardRows);
  for (int64_t item = 0; item < count; ++item) {
    RowMap map;
    const QueryTile tile = pycore::backward_query_tile(params, pycore::kBackwardRows, item, &map);
    items.push_back(kept_pairs(map, tile, 0, INT64_MAX));
  }
  return items;
}

// The busiest thread's share over the mean.
double imbalance(const std::vector<double>& items, int64_t threads) {
  std::vector<double> load(threads, 0.0);
  for (double cost : items) *std::min_element(load.begin(), load.end()) += cost;
  return *std::max_element(load.begin(), load.end()) * threads / std::accumulate(load.begin(), load.end(), 0.0);
}

}  // namespace

int main() {
  struct Named {
    const char* name;
    ScheduleKind kind;
    pycore::BlockFamily family;
    double parameter;
  };
  const Named schedules[] = {
      {"causal", ScheduleKind::kCausal, {}, 0},
      {"lambda", ScheduleKind::kLambda, {}, 0},
      {"constant 0.5", ScheduleKind::kBlocks, pycore::BlockFamily::kConstant, 0.5},
      {"constant 0.1", ScheduleKind::kBlocks, pycore::BlockFamily::kConstant, 0.1},
      {"harmonic 4", ScheduleKind::kBlocks, pycore::BlockFamily::kHarmonic, 4},
      {"geometric 0.9", ScheduleKind::kBlocks, pycore::BlockFamily::kGeometric, 0.9},
      {"power law 1", ScheduleKind::kBlocks, pycore::BlockFamily::kPowerLaw, 1},
      {"gaussian 16", ScheduleKind::kBlocks, pycore::BlockFamily::kGaussian, 16},
  };
  constexpr double kMost = 1.1;
  int failures = 0, checked = 0;
  double worst = 0;
  for (const Named& each : schedules) {
    for (int64_t heads : {1, 2, 8}) {
      for (int64_t length : {2048, 8192}) {
        const Round round = problem(each.kind, heads, length, each.family, each.parameter);
        for (int64_t threads : {2, 16}) {
          if (heads * length / 64 < pycore::kTilesPerThread * threads) continue;  // too few to share out
          for (auto* items_of : {&forward_items, &backward_items}) {
            const double found = imbalance(items_of(round.params, threads), threads);
            worst = std::max(worst, found);
            ++checked;
            if (found <= kMost) continue;
            ++failures;
            std::fprintf(stderr,
                         "failed: %s, %s, %d heads, length %d, %d threads: the busiest has %.3f times the mean\n",
                         items_of == &forward_items ? "forward" : "backward", each.name, static_cast<int>(heads),
                         static_cast<int>(length), static_cast<int>(threads), found);
          }
        }
      }
    }
  }
  std::printf("%d rounds shared out, the busiest thread has at most %.3f times the mean\n", checked, worst);
  return failures == 0 ? 0 : 1;
}
