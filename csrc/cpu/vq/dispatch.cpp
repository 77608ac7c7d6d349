// SPDX-License-Identifier: Apache-2.0
// Nearest codes on the CPU: picks the instruction set, lays out scratch, makes codebooks ready and hands tiles of rows
// to threads. Nothing here decides a code.
#include <pycore/cpu_isa.h>
#include <pycore/sizes.h>

#include <algorithm>
#include <cstddef>

#include "kernels.h"

namespace pycore {
namespace {

constexpr int64_t kFewLines = 4;          // fewer do not pay for packing a codebook
constexpr int64_t kMostLines = 96;        // of a tile
constexpr int64_t kTileFloats = 1 << 15;  // of its rows: they stay in the second cache
constexpr int64_t kMostKept = 1 << 13;    // entries of a tile's lists, where its rows allow
constexpr int64_t kSerialWork = 1 << 18;  // multiply-adds that are not worth waking a second thread for
constexpr int64_t kMostDepth = 1 << 17;   // deeper than this the bound on scores says nothing
constexpr int64_t kPrepareCodes = 256;

const VqKernels* kernels_for(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAvx512: return &avx512::vq_float;
    case CpuIsa::kAvx2: return &avx2::vq_float;
    case CpuIsa::kScalar: break;
  }
  return &scalar::vq_float;
}

int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }
Range part(int64_t index, int64_t size, int64_t total) { return {index * size, std::min((index + 1) * size, total)}; }

bool needs_copy(const VqEncodeParams& params) { return params.cosine || params.book_dtype != DType::kFloat32; }

// Bytes one after another, each piece aligned.
struct Layout {
  int64_t bytes = 0;
  int64_t take(std::initializer_list<int64_t> factors) {
    const int64_t at = bytes, size = size_product(factors);
    bytes = size_sum(bytes, size > INT64_MAX - 63 ? INT64_MAX : (size + 63) / 64 * 64);
    return at;
  }
};

VqPlan plan_for(const VqEncodeParams& params, int64_t threads) {
  const VqKernels* kernels = kernels_for(params.isa);
  VqPlan plan;
  const int64_t beams = params.stages == 1 ? 1 : params.beam_size;
  plan.keep = params.stages == 1 ? params.topk : params.beam_size;
  plan.panel = kernels->panel;
  plan.chunk = kernels->chunk;
  plan.depth = params.dim <= 2 ? 2 : params.dim <= 4 ? 4 : params.dim <= 8 ? 8 : params.dim;
  plan.prune = plan.panel > 0 && size_product({params.x.rows, beams}) >= kFewLines && params.dim <= kMostDepth;
  const int64_t lines = std::clamp(kTileFloats / plan.depth, int64_t{6}, kMostLines);
  int64_t rows = std::max<int64_t>(lines / beams, 1);
  rows = std::min(rows, std::max(kMostKept / plan.keep, int64_t{6}));
  // Enough tiles to go round, and whole groups of six lines.
  const int64_t fair = parts(parts(params.x.rows, std::max<int64_t>(threads, 1) * 3), 6) * 6;
  plan.tile_rows = std::max(std::min({rows, fair, std::max<int64_t>(params.x.rows, 1)}), int64_t{1});
  plan.tile_lines = parts(plan.tile_rows * beams, 6) * 6;

  const int64_t line_floats = size_product({plan.tile_lines, params.dim, 4});
  Layout layout;
  plan.residual = layout.take({line_floats, 2});
  // `other` is tile_lines * dim floats behind residual
  plan.query = layout.take({line_floats});
  plan.shifted = layout.take({plan.tile_lines, plan.depth, 4});
  plan.maxima = layout.take({plan.tile_lines, plan.chunk, kernels->lanes, 4});
  plan.squares = layout.take({plan.tile_lines, 8});
  plan.best = layout.take({plan.tile_rows, plan.keep, static_cast<int64_t>(sizeof(VqCandidate))});
  plan.counts = layout.take({plan.tile_rows, 8});
  plan.tops = layout.take({plan.tile_rows, plan.keep, 4});
  plan.history = layout.take({params.stages, plan.tile_rows, plan.keep, static_cast<int64_t>(sizeof(VqStep))});
  plan.bytes = layout.bytes;
  return plan;
}

// Stages that are one codebook (an expanded one) are made ready once.
int64_t distinct_stages(const VqEncodeParams& params) {
  return params.stage_stride == 0 && !params.sizes ? std::min<int64_t>(params.stages, 1) : params.stages;
}

struct BookLayout {
  int64_t shift = 0, bias = 0, panels = 0, copy = 0;
};

// Of one stage's codebook behind `layout`.
BookLayout lay_out(const VqEncodeParams& params, const VqPlan& plan, int64_t codes, Layout* layout) {
  BookLayout out;
  if (plan.prune) {
    const int64_t padded = parts(codes, plan.panel) * plan.panel;
    out.shift = layout->take({plan.depth, 4});
    out.bias = layout->take({padded, 4});
    out.panels = layout->take({padded, plan.depth, 4});
  }
  if (needs_copy(params)) out.copy = layout->take({codes, params.dim, 4});
  return out;
}

int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace

int64_t vq_encode_scratch(const VqEncodeParams& params, int64_t threads) {
  if (params.x.rows == 0 || params.books == 0) return 0;
  const VqPlan plan = plan_for(params, threads);
  Layout layout;
  layout.take({params.stages, static_cast<int64_t>(sizeof(const VqBook*))});
  layout.take({distinct_stages(params), static_cast<int64_t>(sizeof(VqBook))});
  for (int64_t stage = 0; stage < distinct_stages(params); ++stage) {
    lay_out(params, plan, params.stage_codes(stage), &layout);
  }
  return size_sum(layout.bytes, size_product({threads, plan.bytes}));
}

Status vq_encode(const VqEncodeParams& params, const Parallel& parallel, void* scratch) {
  const int64_t rows = params.x.rows;
  if (rows == 0 || params.books == 0) return {};
  const VqKernels* kernels = kernels_for(params.isa);
  const VqPlan plan = plan_for(params, parallel.threads);
  const int64_t distinct = distinct_stages(params), size = element_size(params.book_dtype);
  char* const memory = static_cast<char*>(scratch);
  Layout layout;
  const VqBook** const stages =
      reinterpret_cast<const VqBook**>(memory + layout.take({params.stages, int64_t{sizeof(const VqBook*)}}));
  VqBook* const ready = reinterpret_cast<VqBook*>(memory + layout.take({distinct, int64_t{sizeof(VqBook)}}));
  for (int64_t q = 0; q < distinct; ++q) {
    VqBook& stage = *new (ready + q) VqBook;
    stage.codes = params.stage_codes(q);
    stage.stage = q;
    const BookLayout at = lay_out(params, plan, stage.codes, &layout);
    stage.shift = reinterpret_cast<float*>(memory + at.shift);
    stage.bias = reinterpret_cast<float*>(memory + at.bias);
    stage.panels = reinterpret_cast<float*>(memory + at.panels);
    if (needs_copy(params)) stage.copy = reinterpret_cast<float*>(memory + at.copy);
  }
  for (int64_t q = 0; q < params.stages; ++q) stages[q] = ready + std::min(q, distinct - 1);
  char* const threads_memory = memory + layout.bytes;

  const bool prepares = plan.prune || needs_copy(params);
  const int64_t pieces = parts(params.most_codes, kPrepareCodes);
  const int64_t work = size_product({rows, params.stages, params.beam_size, params.most_codes, params.dim});
  for (int64_t book = 0; book < params.books; ++book) {
    for (int64_t q = 0; q < distinct; ++q) {
      VqBook& stage = ready[q];
      stage.given =
          static_cast<const char*>(params.codebooks) + (book * params.book_stride + q * params.stage_stride) * size;
      stage.given_stride = params.code_stride;
      stage.rows = stage.copy ? stage.copy : static_cast<const float*>(stage.given);
      stage.row_stride = stage.copy ? params.dim : params.code_stride;
      stage.large = 0;
    }
    if (prepares) {
      if (plan.prune) {
        for_each_item(Parallel{}, distinct,
                      [&](int64_t, int64_t q) { kernels->prepare(params, plan, book, ready + q, Range{}); });
      }
      const Parallel pool = limited(parallel, size_product({distinct, params.most_codes, params.dim}), kSerialWork);
      for_each_item(pool, distinct * pieces, [&](int64_t, int64_t item) {
        VqBook* stage = ready + item / pieces;
        const Range codes = part(item % pieces, kPrepareCodes, stage->codes);
        if (codes.begin < codes.end) kernels->prepare(params, plan, book, stage, codes);
      });
    }
    const Parallel pool = limited(parallel, work, kSerialWork);
    for_each_item(pool, parts(rows, plan.tile_rows), [&](int64_t slot, int64_t item) {
      kernels->encode(params, plan, book, stages, part(item, plan.tile_rows, rows), threads_memory + slot * plan.bytes);
    });
  }
  return {};
}

}  // namespace pycore
