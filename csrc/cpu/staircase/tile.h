// SPDX-License-Identifier: Apache-2.0
// Where a tile of a staircase cache lies, at the width that a query reads it. Internal linkage: every instruction set
// includes this.
#pragma once

#include <pycore/dtype.h>
#include <pycore/staircase/attention.h>

#include <cstdint>
#include <cstring>

namespace pycore {
namespace {

// Element i of lo, hi or full.
[[gnu::always_inline]] inline float staircase_element(DType dtype, const char* data, int64_t i) {
  if (dtype == DType::kFloat32) {
    float x;
    std::memcpy(&x, data + 4 * i, sizeof x);
    return x;
  }
  uint16_t half;
  std::memcpy(&half, data + 2 * i, sizeof half);
  return dtype == DType::kFloat16 ? float_from_float16(half) : float_from_bfloat16(half);
}

struct StaircaseTile {
  const StaircasePlanes& all;
  const StaircaseSide& side;
  int32_t bits;   // 16: not in planes
  int32_t depth;  // planes that a code is made of
  const uint8_t* planes[kStaircasePlanes];
  const char *lo, *hi;
  const uint8_t* centers;  // null: the middle of a cell

  // Of one row's KV head, `pair`; tile `index`, for a query that stands at position `query`.
  [[gnu::always_inline]] inline StaircaseTile(const StaircasePlanes& planes_of_cache, bool value, int64_t pair,
                                              int64_t index, int64_t query)
      : all(planes_of_cache), side(value ? all.value : all.key) {
    bits = staircase_bits(side, all.step, query, index * kPackedGroup);
    if (bits == 16) return;
    depth = bits <= 2 ? 1 : bits <= 4 ? 2 : 3;
    const auto slot = [&](int64_t rows) __attribute__((always_inline)) {
      const int64_t tiles = rows / kPackedGroup;
      return pair * tiles + index % tiles;
    };
    const int64_t wide = tile_groups(side, kPackedGroup), size = dtype_size(all.dtype);
    for (int32_t k = 0; k < depth; ++k) {
      planes[k] = side.planes[k] + slot(side.plane_rows[k]) * tile_plane_bytes(side, kPackedGroup, k);
    }
    lo = side.lo + slot(side.plane_rows[0]) * wide * size;
    hi = side.hi + slot(side.plane_rows[0]) * wide * size;
    const int32_t last = depth - 1;
    centers = side.centers[last] ? side.centers[last] + slot(side.center_rows[last]) * wide : nullptr;
  }

  // Of group g: the width of a cell, and what a code in the middle stands for. Codes count from there: from lo, sums of
  // codes and sums of lo would be large numbers that cancel.
  [[gnu::always_inline]] inline void grid(int64_t g, float* step, float* middle) const {
    const float low = staircase_element(all.dtype, lo, g);
    *step = staircase_step(side.grid, low, staircase_element(all.dtype, hi, g), bits);
    const float centre = side.grid == StaircaseGrid::kMinMax
                             ? 0.0f
                             : static_cast<float>(centers ? centers[g] : static_cast<uint8_t>(kMiddle)) * 0x1p-8f;
    *middle = low + (static_cast<float>(half()) + centre) * *step;
  }

  [[gnu::always_inline]] inline int32_t half() const { return 1 << (bits - 1); }

  // Code `at`, from the middle, of the `count` that begin `offset` bytes into the first plane; a plane of 4 bits has
  // twice the bytes.
  [[gnu::always_inline]] inline int32_t code(int64_t offset, int64_t count, int64_t at) const {
    int32_t code = 0;
    for (int32_t k = 0; k < depth; ++k) {
      const int32_t width = static_cast<int32_t>(plane_width(k));
      code = code << width | plane_code(planes[k] + (width / 2) * offset, count, at, width);
    }
    return code - half();
  }

  // Where the codes of token t's group g begin, and how many they are; of channel g, for keys.
  [[gnu::always_inline]] inline int64_t offset(int64_t t, int64_t g) const {
    constexpr int64_t kBytes = kPackedGroup / 4;
    return side.by_token ? t * token_plane_bytes(side, kPackedGroup, 0) + g * kBytes : g * kBytes;
  }
  [[gnu::always_inline]] inline int64_t count(int64_t g) const {
    if (!side.by_token) return kPackedGroup;
    const int64_t left = side.channels - g * kPackedGroup;
    return left < kPackedGroup ? left : kPackedGroup;
  }
};

}  // namespace
}  // namespace pycore
