// SPDX-License-Identifier: Apache-2.0
// Which codes need their distance taken: scores from the tile product, which decide nothing. Include after
// search.inl.h.
//
// With a shift m (any vector; the codebook's mean keeps numbers small), x' = x - m and c' = c - m, the distance is
// |x'|^2 - 2 S with S = x'c' - |c'|^2 / 2. The tile product gives s for S, off by at most e (|x'||c'| + |c'|^2 / 2)
// and so by e (|x'|^2 / 2 + |c'|^2), where e counts the roundings of the chain, of x' and c', of |c'|^2 and of what is
// done with s. The score starts at -(1/2 - e) |c'|^2, so that it is too large rather than too small. If t is the
// score of a code d from x, the codes that may be nearer than d, or seem so by their own rounded distance (a factor of
// 1 + eta), have a score of at least
//     t - e (5 |x'|^2 + 4 d^2) - 3/2 eta d^2,   as |c'|^2 <= 2 |x'|^2 + 2 d^2,
// and d^2 is |x'|^2 - 2 t within a little. With C the length of the longest code, they also have at least
//     t - 2 e (|x'| C + C^2) - 3/2 eta d^2,
// and the better of the two counts. Products that underflow add dim * 2^-126 at most.
//
// Of kProductColumns columns that meet in a lane, only the largest score is kept: it costs a maximum where an argument
// would cost three instructions, and a lane that holds a candidate gives all of them for one.
#pragma once

#include <cstdint>

#include "../tile_product.inl.h"
#include "avx_distance.inl.h"
#include "kernels.h"

constexpr int64_t kPanel = Vec::kProductColumns * Vec::kWidth;
constexpr int64_t kLanes = Vec::kWidth;
static_assert(Vec::kProductColumns == 2 || Vec::kProductColumns == 4);
constexpr int64_t kGroup = kProductRows;
constexpr int64_t kChunk = 1024 / kPanel;                                  // panels scored before candidates are taken
constexpr int64_t kBundle = 64 / kLanes, kMostBundles = kChunk / kBundle;  // panels that are looked at as one first
constexpr double kUnit = 0x1p-24;

PYCORE_INLINE double score_error(int64_t dim) {
  return (static_cast<double>(dim) + static_cast<double>(dim) / 8 + 64) * kUnit;
}
PYCORE_INLINE double distance_error(int64_t dim) { return (static_cast<double>(dim) / 16 + 10) * kUnit; }

// shift = the mean of at most 64 codes, all over the codebook.
inline void find_shift(const VqEncodeParams& params, VqBook* stage) {
  const int64_t dim = params.dim, step = larger(stage->codes / 64, 1);
  float* code = stage->panels;  // not in use yet
  for (int64_t i = 0; i < dim; ++i) stage->shift[i] = 0.0f;
  const float share = 1.0f / static_cast<float>((stage->codes + step - 1) / step);
  for (int64_t k = 0; k < stage->codes; k += step) {
    load_code(params, *stage, k, code);
    for (int64_t i = 0; i < dim; ++i) stage->shift[i] += code[i] * share;
  }
  if (!all_finite(stage->shift, dim)) {
    for (int64_t i = 0; i < dim; ++i) stage->shift[i] = 0.0f;
  }
}

// square[i][k] = the shifted code, count codes of depth channels each; the other lanes are zero. Then transposed.
PYCORE_INLINE void load_square(const float* rows, int64_t row_stride, const float* shift, int64_t count, int64_t depth,
                               Vec (&square)[Vec::kWidth]) {
  const bool whole = depth == Vec::kWidth;
  const Vec from = whole ? Vec::load(shift) : Vec::load_first(shift, depth);
  for (int i = 0; i < Vec::kWidth; ++i) {
    const float* row = rows + i * row_stride;
    square[i] = i >= count ? Vec::zero() : (whole ? Vec::load(row) : Vec::load_first(row, depth)) - from;
  }
  transpose(square);
}

// Bits of numbers that are not negative are in the order of the numbers; a NaN is above all.
inline void raise_largest(VqBook* stage, float squares) {
  const uint32_t bits = bits_of_float(squares) & 0x7fffffffu;
  uint32_t seen = __atomic_load_n(&stage->largest, __ATOMIC_RELAXED);
  while (bits > seen &&
         !__atomic_compare_exchange_n(&stage->largest, &seen, bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

void prepare_codes(const VqEncodeParams& params, const VqPlan& plan, int64_t book, VqBook* stage, Range codes) {
  const int64_t dim = params.dim;
  if (stage->copy) {
    for (int64_t k = codes.begin; k < codes.end; ++k) load_code(params, *stage, k, stage->copy + k * dim);
  }
  if (!plan.prune) return;
  const float keep_half = static_cast<float>(score_error(dim) - 0.5);
  float largest = 0.0f;
  for (int64_t first = codes.begin; first < codes.end; first += kLanes) {
    const int64_t count = smaller(kLanes, codes.end - first);
    float* panel = stage->panels + first / kPanel * plan.depth * kPanel + first % kPanel;
    const float* rows = stage->rows + first * stage->row_stride;
    Vec squares = Vec::zero();
    int64_t k = 0;
    for (; k < dim; k += kLanes) {
      const int64_t depth = smaller(kLanes, dim - k);
      Vec square[kLanes];
      load_square(rows + k, stage->row_stride, stage->shift + k, count, depth, square);
      Vec part = Vec::zero();
      for (int64_t j = 0; j < depth; ++j) {
        part = Vec::fma(square[j], square[j], part);
        square[j].store(panel + (k + j) * kPanel);
      }
      squares = squares + part;
    }
    for (k = dim; k < plan.depth; ++k) Vec::zero().store(panel + k * kPanel);
    float lanes[kLanes];
    squares.store(lanes);
    (squares * Vec::broadcast(keep_half)).store(stage->bias + first);
    for (int64_t i = 0; i < count; ++i) {
      if (!(lanes[i] < kMostSquares)) check_code(params, book, *stage, first + i);
      largest = lanes[i] <= largest ? largest : lanes[i];
    }
    for (int64_t i = count; i < kLanes; ++i) stage->bias[first + i] = -__builtin_inff();
  }
  raise_largest(stage, largest);
  if (codes.end < stage->codes) return;
  const int64_t end = (stage->codes + kPanel - 1) / kPanel * kPanel;
  for (int64_t first = (stage->codes + kLanes - 1) / kLanes * kLanes; first < end; first += kLanes) {
    float* panel = stage->panels + first / kPanel * plan.depth * kPanel + first % kPanel;
    for (int64_t k = 0; k < plan.depth; ++k) Vec::zero().store(panel + k * kPanel);
    Vec::broadcast(-__builtin_inff()).store(stage->bias + first);
  }
}

// The reduction of the tile product: a maximum over the vectors of a panel.
struct MaxBlock {
  const float* bias;
  Vec* best;
  PYCORE_INLINE Vec start(int, int64_t n) const { return Vec::load(bias + n); }
  PYCORE_INLINE Vec start_first(int, int64_t n, int64_t) const { return start(0, n); }
  PYCORE_INLINE void finish(int m, int64_t n, Vec x) const { best[m] = n == 0 ? x : Vec::max(best[m], x); }
  PYCORE_INLINE void finish_first(int m, int64_t n, int64_t, Vec x) const { finish(m, n, x); }
};

// maxima[line][panel] of kGroup lines and one panel. Small depths are known to the compiler.
template <int kDepth>
__attribute__((noinline)) void score_group(int64_t depth, const float* x, const float* panel, const float* bias,
                                           float* maxima, int64_t line_stride) {
  const int64_t k = kDepth ? kDepth : depth;
  Vec best[kGroup];
  product_block<kGroup, Vec::kProductColumns, false, false>(k, x, k, panel, kPanel, 0, kLanes, MaxBlock{bias, best});
  for (int m = 0; m < kGroup; ++m) best[m].store(maxima + m * line_stride);
}

inline void score_chunk(const VqPlan& plan, const VqBook& stage, int64_t lines, Range panels, const VqTile& tile) {
  const int64_t line_stride = plan.chunk * kLanes;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const float* panel = stage.panels + p * plan.depth * kPanel;
    const float* bias = stage.bias + p * kPanel;
    float* maxima = tile.maxima + (p - panels.begin) * kLanes;
    for (int64_t line = 0; line < lines; line += kGroup, maxima += kGroup * line_stride) {
      const float* x = tile.shifted + line * plan.depth;
      switch (plan.depth) {
        case 2: score_group<2>(2, x, panel, bias, maxima, line_stride); break;
        case 4: score_group<4>(4, x, panel, bias, maxima, line_stride); break;
        case 8: score_group<8>(8, x, panel, bias, maxima, line_stride); break;
        default: score_group<0>(plan.depth, x, panel, bias, maxima, line_stride); break;
      }
    }
  }
}

// The keep largest scores of lanes so far, each of a code of its own, in descending order.
PYCORE_INLINE void raise_tops(float* tops, int64_t keep, float score) {
  int64_t at = keep - 1;
  for (; at > 0 && tops[at - 1] < score; --at) tops[at] = tops[at - 1];
  tops[at] = score;
}

// The distances of the codes that share a lane: first, first + kLanes, ... A function of its own, for its registers.
__attribute__((noinline)) void take_lane(const VqBook& stage, const float* line, int64_t dim, int64_t first,
                                         int64_t of_beam, int64_t keep, VqCandidate* best, int64_t* count) {
  float r[Vec::kProductColumns];
  const float* rows = stage.rows + first * stage.row_stride;
  const int64_t step = kLanes * stage.row_stride;
  const int64_t left = (stage.codes - first + kLanes - 1) / kLanes;
  const int columns = static_cast<int>(smaller(left, Vec::kProductColumns));
  if (dim == 8) {  // where the products are so few that distances show
    float four[4];
    four_distances<Vec::kProductColumns>(line, rows, step, columns, four);
    for (int v = 0; v < columns; ++v) r[v] = four[v];
  } else {
    for (int v = 0; v < columns; ++v) r[v] = distance(line, rows + v * step, dim);
  }
  if (keep == 1) {  // no branch that depends on which is the nearest; distances are finite here
    float least = r[0];
    int nearest = 0;
    for (int v = 1; v < columns; ++v) {
      nearest = r[v] < least ? v : nearest;
      least = r[v] < least ? r[v] : least;
    }
    return insert(best, count, 1, least, of_beam + first + nearest * kLanes);
  }
  for (int v = 0; v < columns; ++v) insert(best, count, keep, r[v], of_beam + first + v * kLanes);
}

// A chunk's candidates of one row.
inline void take_candidates(const VqEncodeParams& params, const VqPlan& plan, int64_t book, const VqBook& stage,
                            const float* query, int64_t row, int64_t beams, int64_t keep, Range panels,
                            const VqTile& tile) {
  const int64_t dim = params.dim, count = panels.count();
  VqCandidate* best = tile.best + row * plan.keep;
  double most = 0;
  for (int64_t beam = 0; beam < beams; ++beam) {
    const double squares = tile.squares[row * beams + beam] * 1.01;
    most = squares > most || !(squares == squares) ? squares : most;
  }
  if (!(most < kMostSquares)) {
    const Range codes = {panels.begin * kPanel, smaller(panels.end * kPanel, stage.codes)};
    for (int64_t beam = 0; beam < beams; ++beam) {
      search_directly(params, book, stage, query + (row * beams + beam) * dim, codes, beam, best, tile.counts + row,
                      keep);
    }
    return;
  }
  // Scores of several beams are compared as halves of distances.
  const auto half = [&](int64_t beam) {
    return beams == 1 ? 0.0f : static_cast<float>(tile.squares[row * beams + beam] / 2);
  };
  const auto maxima = [&](int64_t beam) { return tile.maxima + (row * beams + beam) * plan.chunk * kLanes; };
  float* tops = tile.tops + row * plan.keep;
  float bundles[kMostBundles * kLanes];
  for (int64_t beam = 0; beam < beams; ++beam) {
    const float* scores = maxima(beam);
    const Vec less = Vec::broadcast(half(beam));
    if (keep == 1) {
      Vec top = Vec::load(scores);
      for (int64_t first = 0; first < count; first += kBundle) {
        const int64_t end = smaller(first + kBundle, count);
        Vec most_of = Vec::load(scores + first * kLanes);
        for (int64_t p = first + 1; p < end; ++p) most_of = Vec::max(most_of, Vec::load(scores + p * kLanes));
        if (beams == 1) most_of.store(bundles + first / kBundle * kLanes);
        top = Vec::max(top, most_of);
      }
      const float score = (top - less).reduce_max();
      if (score > tops[0]) tops[0] = score;
      continue;
    }
    for (int64_t p = 0; p < count; ++p) {
      const Vec score = Vec::load(scores + p * kLanes) - less;
      uint64_t above = Vec::broadcast(tops[keep - 1]).below(score);
      if (above == 0) continue;
      float lanes[kLanes];
      score.store(lanes);
      for (; above; above &= above - 1) {
        const float each = lanes[__builtin_ctzll(above)];
        if (each > tops[keep - 1]) raise_tops(tops, keep, each);
      }
    }
  }
  const double top = tops[keep - 1], error = score_error(dim);
  const double room = (beams == 1 ? 1.2 : 0.2) * most - 2 * top, squared = room > 0 ? 2 * room : 0;
  // Where codes are much shorter than x, the lengths themselves say more.
  const double code = static_cast<double>(float_from_bits(stage.largest)) * 1.01;
  const double by_length = 2 * error * (__builtin_sqrt(most * code) + code) + (beams == 1 ? 0 : 4 * kUnit * most);
  const double by_squares = error * (5 * most + 4 * squared);
  const double margin = (by_length < by_squares ? by_length : by_squares) + 1.5 * distance_error(dim) * squared +
                        static_cast<double>(dim) * 0x1p-126;
  const float limit = static_cast<float>(top - margin);
  for (int64_t beam = 0; beam < beams; ++beam) {
    const float* scores = maxima(beam);
    const float* line = query + (row * beams + beam) * dim;
    const Vec less = Vec::broadcast(half(beam)), least = Vec::broadcast(limit);
    for (int64_t first = 0; first < count; first += kBundle) {
      if (keep == 1 && beams == 1) {
        const uint64_t out = Vec::load(bundles + first / kBundle * kLanes).below(least);
        if (out == (uint64_t{1} << kLanes) - 1) continue;
      }
      const int64_t end = smaller(first + kBundle, count);
      for (int64_t p = first; p < end; ++p) {
        uint64_t in = ~(Vec::load(scores + p * kLanes) - less).below(least) & ((uint64_t{1} << kLanes) - 1);
        for (; in; in &= in - 1) {
          const int64_t lane = __builtin_ctzll(in);
          take_lane(stage, line, dim, (panels.begin + p) * kPanel + lane, beam * stage.codes, keep, best,
                    tile.counts + row);
        }
      }
    }
  }
}

void search_pruned(const VqEncodeParams& params, const VqPlan& plan, int64_t book, const VqBook& stage,
                   const float* query, int64_t rows, int64_t beams, int64_t keep, const VqTile& tile) {
  const int64_t dim = params.dim, lines = rows * beams, padded = (lines + kGroup - 1) / kGroup * kGroup;
  for (int64_t line = 0; line < padded; ++line) {
    float* shifted = tile.shifted + line * plan.depth;
    int64_t i = 0;
    Vec squares = Vec::zero();
    for (; i < dim && line < lines; i += kLanes) {
      const int64_t count = smaller(kLanes, dim - i);
      const Vec x = Vec::load_first(query + line * dim + i, count) - Vec::load_first(stage.shift + i, count);
      squares = Vec::fma(x, x, squares);
      x.store_first(shifted + i, count);
    }
    for (i = line < lines ? dim : 0; i < plan.depth; ++i) shifted[i] = 0.0f;
    tile.squares[line] = static_cast<double>(squares.reduce_add());
  }
  for (int64_t i = 0; i < rows * plan.keep; ++i) tile.tops[i] = -__builtin_inff();
  const int64_t panels = (stage.codes + kPanel - 1) / kPanel;
  for (int64_t begin = 0; begin < panels; begin += plan.chunk) {
    const Range chunk = {begin, smaller(begin + plan.chunk, panels)};
    score_chunk(plan, stage, padded, chunk, tile);
    for (int64_t row = 0; row < rows; ++row) {
      take_candidates(params, plan, book, stage, query, row, beams, keep, chunk, tile);
    }
  }
}
