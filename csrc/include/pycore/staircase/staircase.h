// SPDX-License-Identifier: Apache-2.0
// Group quantization on the grid of grid.h, of any tensor along any of its dimensions.
//
// x is seen as [outer, length, inner, channels]: the groups are runs of group_size along `length`, the last one maybe
// shorter. Where the groups run along x's last dimension, inner and channels are 1 and `length` is contiguous.
#pragma once

#include <pycore/cpu_isa.h>
#include <pycore/export.h>
#include <pycore/parallel.h>
#include <pycore/staircase/grid.h>
#include <pycore/status.h>
#include <pycore/tensor_view.h>

#include <cstdint>

namespace pycore {

struct StaircaseShape {
  CpuIsa isa = cpu_isa();
  DType dtype = DType::kFloat32;  // of x, lo, hi and values: float32, float16 or bfloat16
  StaircaseGrid grid = StaircaseGrid::kEmbedded;
  int32_t bits = 8;  // 1 to 8
  int64_t group_size = 64, outer = 1, length = 0, inner = 1, channels = 1;

  int64_t groups() const { return length / group_size + (length % group_size != 0); }
  bool along_last = false;
};

struct StaircaseQuantizeParams : StaircaseShape {
  TensorView x;                // as the caller has it; its last dimension is contiguous
  int32_t dim = 0;             // along which the groups run
  uint8_t* codes = nullptr;    // [outer, length, inner, channels], contiguous
  char* lo = nullptr;          // [outer, groups, inner, channels], contiguous, of dtype
  char* hi = nullptr;          // like lo
  uint8_t* centers = nullptr;  // like lo: 256ths of a cell
};

struct StaircaseDequantizeParams : StaircaseShape {
  const uint8_t* codes = nullptr;    // [outer, length, inner, channels], contiguous
  const char* lo = nullptr;          // [outer, groups, inner, channels], contiguous, of dtype
  const char* hi = nullptr;          // like lo
  const uint8_t* centers = nullptr;  // like lo, or null: the middle of a cell
  char* out = nullptr;               // [outer, length, inner, channels], contiguous, of dtype
};

// The index in lo of the first group that has no grid, because an element is not finite or hi - lo is not; -1 if all
// do.
PYCORE_API int64_t staircase_fault(const StaircaseQuantizeParams& params, const Parallel& parallel);
// Where there is no fault.
PYCORE_API Status staircase_quantize(const StaircaseQuantizeParams& params, const Parallel& parallel);
PYCORE_API Status staircase_dequantize(const StaircaseDequantizeParams& params, const Parallel& parallel);

}  // namespace pycore
