// SPDX-License-Identifier: Apache-2.0
// Windows of equal information: text cut into pieces that are each one of 2^bits codewords, every codeword a piece.
//
// A piece is a path in a tree whose nodes own intervals [start, start + size) of the codewords. The root owns all
// 2^bits, gives every symbol at least one, by coder_math.h's rule for cumulative frequencies, and keeps none. Every
// other node of size >= 2 keeps its last codeword, STOP, and divides the rest. A walk that can go no further, because
// the node has one codeword, the next symbol has no share or there is no next symbol, ends with codeword
// start + size - 1: the node's only one, or its STOP. So each codeword belongs to exactly one node, and decoding is the
// same walk.
//
// The kernels take one step of many walks. All of it is integer arithmetic on cumulative counts, so a walk depends on
// nothing but its own counts. pycore/reference/arithmetic_coding_windows.py says the same in plain Python.
#pragma once

#include <pycore/arithmetic_coding/coder_math.h>
#include <pycore/export.h>
#include <pycore/parallel.h>
#include <pycore/row_view.h>
#include <pycore/status.h>
#include <pycore/tensor_view.h>

#include <cstdint>

namespace pycore {

inline constexpr int kMaxWindowBits = 62;
inline constexpr int64_t kMaxWindowSymbols = 1 << 16;  // their counts, each below 2^31, add up to less than 2^47

enum class WindowFault : int32_t { kNone, kBadValue, kNoMass };

// The counts of quantize_cdf, added up and not yet scaled to any precision.
struct WindowCountsParams {
  DType dtype = DType::kFloat32;  // float32, float64, float16, bfloat16
  int64_t symbols = 0;
  RowView probs;                  // [rows, symbols]
  int64_t entry_stride = 1;       // of probs' last dimension, in elements
  int64_t* cumulative = nullptr;  // [rows, symbols + 1], contiguous; undefined in rows with a fault
  WindowFault* faults = nullptr;  // [rows]
};

struct WindowStepParams {
  int bits = 16;
  int64_t symbols = 0;                  // 2 to 2^bits, so that only the root has size 2^bits
  const int64_t* cumulative = nullptr;  // [rows, symbols + 1], contiguous
  const int64_t* rows = nullptr;        // [walks], the row of each walk's node
  int64_t walks = 0;
  int64_t* start = nullptr;        // [walks], in and out
  int64_t* size = nullptr;         // [walks], in and out
  const int64_t* in = nullptr;     // [walks]; encoding: symbols; decoding: codewords inside their nodes
  int64_t* symbols_out = nullptr;  // [walks]; decoding: the symbol, or -1 at a codeword that ends the walk
  uint8_t* moved = nullptr;        // [walks]; encoding: 0 where the node gives the symbol no share, and nothing changed
};

// The first of the node's codewords that belongs to symbol i or a later one, counted from the node's start. For the
// root i + floor(C_i (size - V) / C_V), elsewhere floor(C_i (size - 1) / C_V).
PYCORE_CODER int64_t window_share(const int64_t* cumulative, int64_t i, int64_t symbols, int64_t size, bool root) {
  const uint64_t kept = static_cast<uint64_t>(root ? symbols : 1);
  const uint64_t divided = mul_div(static_cast<uint64_t>(cumulative[i]), static_cast<uint64_t>(size) - kept,
                                   static_cast<uint64_t>(cumulative[symbols]));
  return static_cast<int64_t>(divided) + (root ? i : 0);
}

PYCORE_API Status window_counts(const WindowCountsParams& params, const Parallel& parallel);
PYCORE_API Status window_encode(const WindowStepParams& params, const Parallel& parallel);
PYCORE_API Status window_decode(const WindowStepParams& params, const Parallel& parallel);

}  // namespace pycore
