// SPDX-License-Identifier: Apache-2.0
// What dispatch.cpp asks of an instruction set: codebooks made ready, and tiles of rows encoded.
#pragma once

#include <pycore/vq/vq.h>

#include <cstdint>

namespace pycore {

struct Range {
  int64_t begin = 0, end = 0;
  int64_t count() const { return end - begin; }
};

// One stage's codebook. Stages that share memory share this. What is not needed is null.
struct VqBook {
  const void* given = nullptr;  // [codes, dim] in the caller's dtype
  int64_t given_stride = 0, codes = 0, stage = 0;
  const float* rows = nullptr;  // what distances are taken to: given, or a copy in float32 or of unit length
  int64_t row_stride = 0;
  float* copy = nullptr;    // that copy, [codes, dim]
  float* shift = nullptr;   // [dim], about the mean: scores are of what is left of codes and rows
  float* bias = nullptr;    // [panels * panel]: where a score starts; -inf for padding
  float* panels = nullptr;  // [panels, depth, panel]: the codes less the shift, transposed
  int32_t large = 0;        // set if a code is so large that scores may overflow: then nothing is pruned
};

// How a call is cut and where its scratch lies. Equal for every thread.
struct VqPlan {
  int64_t panel = 0;       // codes of a panel; 0 if the instruction set does not prune
  int64_t depth = 0;       // dim, or up to the next of 2, 4 and 8
  bool prune = false;      // or score every code by its distance
  int64_t tile_rows = 0;   // rows of an item
  int64_t tile_lines = 0;  // tile_rows times the beams, to a multiple of 6
  int64_t keep = 0;        // the most that are kept of a row: topk, or the beam
  int64_t chunk = 0;       // panels scored before candidates are looked for

  // Offsets into a thread's scratch, in bytes.
  int64_t residual = 0;  // float [2][tile_lines][dim]
  int64_t query = 0;     // float [tile_lines][dim]
  int64_t shifted = 0;   // float [tile_lines][depth]
  int64_t maxima = 0;    // float [tile_lines][chunk][lanes]
  int64_t squares = 0;   // double [tile_lines]
  int64_t best = 0;      // VqCandidate [tile_rows][keep]
  int64_t counts = 0;    // int64 [tile_rows]
  int64_t tops = 0;      // float [tile_rows][keep]
  int64_t history = 0;   // VqStep [stages][tile_rows * keep]
  int64_t bytes = 0;     // of one thread
};

struct VqCandidate {
  float distance;
  int64_t index;  // beam * codes + code
};

struct VqStep {
  int32_t parent;  // the beam of the stage before
  int64_t code;
};

struct VqKernels {
  int64_t panel, lanes, chunk;  // 0, 0, 0: does not prune
  // copy, bias and panels of codes [begin, end), a range of whole panels but for the end. shift is there.
  void (*prepare)(const VqEncodeParams& params, const VqPlan& plan, int64_t book, VqBook* stage, Range codes);
  // codes[rows][book]. stages: [params.stages].
  void (*encode)(const VqEncodeParams& params, const VqPlan& plan, int64_t book, const VqBook* const* stages,
                 Range rows, char* scratch);
};

namespace scalar {
extern const VqKernels vq_float;
}
namespace avx2 {
extern const VqKernels vq_float;
}
namespace avx512 {
extern const VqKernels vq_float;
}

}  // namespace pycore
