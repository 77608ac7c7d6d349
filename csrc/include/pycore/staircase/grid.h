// SPDX-License-Identifier: Apache-2.0
// The embedded grid: one 16-bit place of x within its group, of which a narrower code is the leading bits.
//
//   place = clamp(floor((x - lo) / (hi - lo) * 65536), 0, 65535), in float32 with IEEE division
//   code of b bits = place >> (16 - b)            so dropping bits is quantizing directly
//   value = lo + (code + centre_b / 256) * ((hi - lo) / 2^b)
//
// Multiplying by a power of two is exact, so the first eight bits are clamp(floor((x - lo) / (hi - lo) * 256), 0, 255).
// centre_b says where in its cell a group's elements lie on average, in 256ths of the cell: lo + (centre_b / 256 - 1/2)
// cells is the offset of width b, which is lo plus the group's mean error at that width. It is a sum of integers, so no
// order of summation changes it. hi = lo gives place 0 and value lo.
//
// The min-max grid, as in KIVI: code = round((x - lo) / ((hi - lo) / (2^b - 1))), ties to even, value = lo + code *
// ((hi - lo) / (2^b - 1)).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PYCORE_STAIRCASE_INLINE __host__ __device__ __forceinline__
#else
#define PYCORE_STAIRCASE_INLINE inline __attribute__((always_inline))
#endif

namespace pycore {

enum class StaircaseGrid : int32_t { kEmbedded, kMinMax };

inline constexpr int32_t kMiddle = 128;  // the centre where nothing better is known

PYCORE_STAIRCASE_INLINE int32_t staircase_place(float x, float lo, float range) {
  float place = (x - lo) / range * 65536.0f;
  place = place > 0.0f ? place : 0.0f;  // where range is zero, place is not a number, and no comparison holds
  return static_cast<int32_t>(place < 65535.0f ? place : 65535.0f);
}

// Of a sum of the lowest 16 - bits bits of `count` places.
PYCORE_STAIRCASE_INLINE int32_t staircase_centre(int64_t sum, int64_t count, int32_t bits) {
  if (count == 0) return kMiddle;
  const int64_t cell = int64_t{1} << (16 - bits);
  // A place is the floor of what it stands for: half a place more on average.
  const int64_t centre = (256 * (2 * sum + count) + count * cell) / (2 * count * cell);
  return static_cast<int32_t>(centre > 255 ? 255 : centre);
}

PYCORE_STAIRCASE_INLINE int32_t minmax_code(float x, float lo, float step, int32_t bits) {
  const float most = static_cast<float>((1 << bits) - 1);
  float code = (x - lo) / step;
  code = code > 0.0f ? code : 0.0f;
  code = code < most ? code : most;
  return static_cast<int32_t>((code + 8388608.0f) - 8388608.0f);  // to nearest, ties to even
}

// The width of a cell, and where in it a code's value lies.
PYCORE_STAIRCASE_INLINE float staircase_step(StaircaseGrid grid, float lo, float hi, int32_t bits) {
  return grid == StaircaseGrid::kMinMax ? (hi - lo) / static_cast<float>((1 << bits) - 1)
                                        : (hi - lo) * (1.0f / static_cast<float>(1 << bits));
}
PYCORE_STAIRCASE_INLINE float staircase_value(int32_t code, float lo, float step, float centre) {
  return lo + (static_cast<float>(code) + centre) * step;
}

// ---- bit planes
// ------------------------------------------------------------------------------------------------------ A group of n
// codes has q = ceil(n / 4). Its plane of 2 bits is q bytes, code t in byte t % q at bit 2 (t / q); its plane of 4 bits
// is 2 q bytes, code t in byte t % 2q at bit 4 (t / 2q). Unpacking is a load, a shift and a mask.

PYCORE_STAIRCASE_INLINE int64_t plane_quarter(int64_t n) { return (n + 3) / 4; }
PYCORE_STAIRCASE_INLINE int64_t plane_bytes(int64_t n, int32_t bits) { return plane_quarter(n) * (bits / 2); }

PYCORE_STAIRCASE_INLINE int32_t plane_code(const uint8_t* plane, int64_t n, int64_t t, int32_t bits) {
  const int64_t bytes = plane_bytes(n, bits);
  return plane[t % bytes] >> (bits * (t / bytes)) & ((1 << bits) - 1);
}

}  // namespace pycore
