// SPDX-License-Identifier: Apache-2.0
// What dispatch.cpp and cache.cpp ask of an instruction set: a group at a time, or a group of each of many channels.
#pragma once

#include <pycore/cpu_isa.h>
#include <pycore/dtype.h>
#include <pycore/staircase/grid.h>
#include <pycore/tensor_view.h>

#include <cstdint>
#include <cstring>

namespace pycore {

// `count` rows, one group for each of their channels; or one row, one group of its `count` channels. The first `skip`
// rows are in no group. Rows may lie in two places: those before `split`, and the rest.
struct GroupSource {
  DType dtype = DType::kFloat32;
  int64_t count = 0, channels = 1, skip = 0, split = 0;
  const char* first = nullptr;   // row 0; not read where split <= skip
  int64_t first_stride = 0;      // bytes
  const char* second = nullptr;  // row `split`
  int64_t second_stride = 0;

  const char* row(int64_t t) const {
    return t < split ? first + t * first_stride : second + (t - split) * second_stride;
  }
};

// The planes of a code of eight bits, from the top: 2, 2 and 4 bits. A code of 2 bits is the first, one of 4 the first
// two, one of 8 all three. (Functions: an array would be a weak symbol in the wide objects.)
inline constexpr int64_t kMostPacked = 256;  // codes of a group that is packed
inline constexpr int32_t kPlanes = 3;
PYCORE_STAIRCASE_INLINE int32_t plane_bits(int32_t plane) { return plane < 2 ? 2 : 4; }
PYCORE_STAIRCASE_INLINE int32_t plane_shift(int32_t plane) { return 6 - 2 * plane - (plane == 2 ? 2 : 0); }

struct GroupResult {
  StaircaseGrid grid = StaircaseGrid::kEmbedded;
  int32_t bits = 8;    // of codes, and of the min-max grid
  char* lo = nullptr;  // [channels], of the source's dtype
  char* hi = nullptr;
  int32_t widths[kPlanes] = {};    // of centres
  uint8_t* centers[kPlanes] = {};  // [channels], or null: not wanted
  uint8_t* codes = nullptr;        // null: not wanted
  int64_t code_stride = 0;         // from row to row
  uint8_t* planes[kPlanes] = {};   // [channels, plane_bytes(count)], or null
};

struct StaircaseKernels {
  // The first channel whose group has no grid, or -1.
  int64_t (*column_fault)(const GroupSource& source);
  bool (*row_fault)(const GroupSource& source);
  void (*quantize_columns)(const GroupSource& source, const GroupResult& result);
  void (*quantize_row)(const GroupSource& source, const GroupResult& result);
  // codes [rows, channels] with code_stride; lo, hi, centers [channels] (centers may be null); out like codes.
  void (*dequantize_columns)(DType dtype, StaircaseGrid grid, int32_t bits, int64_t rows, int64_t channels,
                             const uint8_t* codes, int64_t code_stride, const char* lo, const char* hi,
                             const uint8_t* centers, char* out);
  void (*dequantize_row)(DType dtype, StaircaseGrid grid, int32_t bits, int64_t count, const uint8_t* codes,
                         const char* lo, const char* hi, const uint8_t* center, char* out);
};

namespace scalar {
extern const StaircaseKernels staircase;
}
namespace avx2 {
extern const StaircaseKernels staircase;
}
namespace avx512 {
extern const StaircaseKernels staircase;
}

const StaircaseKernels& staircase_kernels(CpuIsa isa);

}  // namespace pycore
