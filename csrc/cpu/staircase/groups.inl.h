// SPDX-License-Identifier: Apache-2.0
// The grid of a group, a cell for every element, and back: plain loops over sixteen lanes, which the compiler turns
// into the vectors of the target region that includes this. Every step is one IEEE operation or an integer one, and
// sums are of integers, so the instruction sets agree bit for bit.
#pragma once

#include <pycore/dtype.h>
#include <pycore/staircase/grid.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

constexpr int kLanes = 16;
constexpr int64_t kSumRows = 4096;  // whose sums fit 32 bits

template <class T>
[[gnu::always_inline]] inline float to_float(T x, bool bfloat) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return bfloat ? float_from_bfloat16(x) : float_from_float16(x);
  }
}

// T: float, or uint16_t with kBrain saying which half.
template <class T, bool kBrain>
[[gnu::always_inline]] inline void load_lanes(const char* data, int64_t count, float* out) {
  const T* x = reinterpret_cast<const T*>(data);
  if (count >= kLanes) {
    for (int l = 0; l < kLanes; ++l) out[l] = to_float<T>(x[l], kBrain);
  } else {
    for (int l = 0; l < kLanes; ++l) out[l] = to_float<T>(x[l < count ? l : 0], kBrain);
  }
}

template <class T, bool kBrain>
[[gnu::always_inline]] inline void store_lanes(char* data, int64_t count, const float* x) {
  T* out = reinterpret_cast<T*>(data);
  for (int l = 0; l < (count < kLanes ? count : kLanes); ++l) {
    if constexpr (sizeof(T) == 4) {
      out[l] = x[l];
    } else {
      out[l] = kBrain ? bfloat16_from_float(x[l]) : float16_from_float(x[l]);
    }
  }
}

struct LaneRange {
  float lo[kLanes] = {}, hi[kLanes] = {};
  uint32_t wrong[kLanes] = {};  // not zero where an element is no number or infinite
  bool any = false;

  [[gnu::always_inline]] void add(const float* x) {
    if (!any) {
      for (int l = 0; l < kLanes; ++l) lo[l] = hi[l] = x[l];
      any = true;
    }
    for (int l = 0; l < kLanes; ++l) {
      lo[l] = x[l] < lo[l] ? x[l] : lo[l];
      hi[l] = x[l] > hi[l] ? x[l] : hi[l];
      wrong[l] |= (bits_of_float(x[l]) & 0x7f800000u) == 0x7f800000u;
    }
  }
  // All lanes as one group.
  [[gnu::always_inline]] void merge() {
    for (int l = 1; l < kLanes; ++l) {
      lo[0] = lo[l] < lo[0] ? lo[l] : lo[0];
      hi[0] = hi[l] > hi[0] ? hi[l] : hi[0];
      wrong[0] |= wrong[l];
    }
    for (int l = 1; l < kLanes; ++l) lo[l] = lo[0], hi[l] = hi[0], wrong[l] = wrong[0];
  }
  // A minus zero is a zero: which of the two came first is nobody's business.
  [[gnu::always_inline]] void finish() {
    for (int l = 0; l < kLanes; ++l) lo[l] += 0.0f, hi[l] += 0.0f;
  }
  bool fault(int l) const { return wrong[l] || (bits_of_float(hi[l] - lo[l]) & 0x7f800000u) == 0x7f800000u; }
};

template <class T, bool kBrain>
LaneRange column_range(const GroupSource& source, int64_t channel) {
  LaneRange range;
  float x[kLanes];
  for (int64_t t = source.skip; t < source.count; ++t) {
    load_lanes<T, kBrain>(source.row(t) + channel * sizeof(T), source.channels - channel, x);
    range.add(x);
  }
  range.finish();
  return range;
}

template <class T, bool kBrain>
LaneRange row_range(const GroupSource& source) {
  LaneRange range;
  float x[kLanes];
  for (int64_t c = 0; c < source.count; c += kLanes) {
    load_lanes<T, kBrain>(source.second + c * sizeof(T), source.count - c, x);
    range.add(x);
  }
  range.merge();
  range.finish();
  return range;
}

// What the places and codes of some lanes are; sums of what the widths cut off.
struct LaneGrid {
  const GroupResult& result;
  float lo[kLanes], span[kLanes];  // span: hi - lo, or the min-max grid's step
  int32_t sums[kPlanes][kLanes] = {};
  int64_t totals[kPlanes][kLanes] = {};

  LaneGrid(const GroupResult& result, const LaneRange& range) : result(result) {
    for (int l = 0; l < kLanes; ++l) {
      lo[l] = range.lo[l];
      span[l] = result.grid == StaircaseGrid::kMinMax
                    ? staircase_step(result.grid, range.lo[l], range.hi[l], result.bits)
                    : range.hi[l] - range.lo[l];
    }
  }

  // The bits-wide codes, and in `wide` the same as eight bits. The first `counted` lanes add to the sums.
  [[gnu::always_inline]] void codes(const float* x, int counted, uint8_t* narrow, uint8_t* wide) {
    if (result.grid == StaircaseGrid::kMinMax) {
      for (int l = 0; l < kLanes; ++l) {
        const int32_t code = minmax_code(x[l], lo[l], span[l], result.bits);
        narrow[l] = static_cast<uint8_t>(code);
        wide[l] = static_cast<uint8_t>(code << (8 - result.bits));
      }
      return;
    }
    int32_t place[kLanes];
    for (int l = 0; l < kLanes; ++l) place[l] = staircase_place(x[l], lo[l], span[l]);
    for (int l = 0; l < kLanes; ++l) {
      narrow[l] = static_cast<uint8_t>(place[l] >> (16 - result.bits));
      wide[l] = static_cast<uint8_t>(place[l] >> 8);
    }
    for (int k = 0; k < kPlanes; ++k) {
      if (!result.centers[k]) continue;
      const int32_t mask = (1 << (16 - result.widths[k])) - 1;
      for (int l = 0; l < kLanes; ++l) sums[k][l] += l < counted ? place[l] & mask : 0;
    }
  }

  void settle() {
    for (int k = 0; k < kPlanes; ++k) {
      for (int l = 0; l < kLanes; ++l) totals[k][l] += sums[k][l], sums[k][l] = 0;
    }
  }
};

// Codes [count][stride] of one channel as planes.
inline void pack(const uint8_t* wide, int64_t stride, int64_t count, int32_t plane, uint8_t* out) {
  const int32_t bits = plane_bits(plane), shift = plane_shift(plane), mask = (1 << bits) - 1;
  const int64_t bytes = plane_bytes(count, bits);
  for (int64_t i = 0; i < bytes; ++i) {
    int32_t byte = 0;
    for (int64_t part = 0, t = i; t < count; ++part, t += bytes) {
      byte |= (wide[t * stride] >> shift & mask) << (bits * part);
    }
    out[i] = static_cast<uint8_t>(byte);
  }
}

template <class T, bool kBrain>
void quantize_columns_of(const GroupSource& source, const GroupResult& result) {
  const bool packed = result.planes[0] || result.planes[1] || result.planes[2];
  for (int64_t channel = 0; channel < source.channels; channel += kLanes) {
    const int64_t left = source.channels - channel;
    const int width = static_cast<int>(left < kLanes ? left : kLanes);
    const LaneRange range = column_range<T, kBrain>(source, channel);
    store_lanes<T, kBrain>(result.lo + channel * sizeof(T), width, range.lo);
    store_lanes<T, kBrain>(result.hi + channel * sizeof(T), width, range.hi);
    LaneGrid grid(result, range);
    uint8_t kept[kMostPacked][kLanes];  // of groups that are packed
    float x[kLanes];
    uint8_t narrow[kLanes], wide[kLanes];
    for (int64_t t = 0; t < source.skip && packed; ++t) std::memset(kept[t], 0, kLanes);
    for (int64_t t = source.skip; t < source.count; ++t) {
      load_lanes<T, kBrain>(source.row(t) + channel * sizeof(T), left, x);
      grid.codes(x, width, narrow, wide);
      if (result.codes)
        std::memcpy(result.codes + t * result.code_stride + channel, narrow, static_cast<size_t>(width));
      if (packed) std::memcpy(kept[t], wide, kLanes);
      if (t % kSumRows == kSumRows - 1) grid.settle();
    }
    grid.settle();
    const int64_t counted = source.count - (source.skip < source.count ? source.skip : source.count);
    for (int k = 0; k < kPlanes; ++k) {
      for (int l = 0; l < width; ++l) {
        if (result.centers[k]) {
          const bool plain = result.grid == StaircaseGrid::kMinMax || range.lo[l] == range.hi[l];
          result.centers[k][channel + l] =
              static_cast<uint8_t>(plain ? kMiddle : staircase_centre(grid.totals[k][l], counted, result.widths[k]));
        }
        if (result.planes[k]) {
          const int64_t bytes = plane_bytes(source.count, plane_bits(k));
          pack(&kept[0][l], kLanes, source.count, k, result.planes[k] + (channel + l) * bytes);
        }
      }
    }
  }
}

template <class T, bool kBrain>
void quantize_row_of(const GroupSource& source, const GroupResult& result) {
  const bool packed = result.planes[0] || result.planes[1] || result.planes[2];
  const LaneRange range = row_range<T, kBrain>(source);
  store_lanes<T, kBrain>(result.lo, 1, range.lo);
  store_lanes<T, kBrain>(result.hi, 1, range.hi);
  LaneGrid grid(result, range);
  uint8_t kept[kMostPacked + kLanes];
  float x[kLanes];
  uint8_t narrow[kLanes], wide[kLanes];
  for (int64_t c = 0; c < source.count; c += kLanes) {
    const int64_t left = source.count - c;
    const int width = static_cast<int>(left < kLanes ? left : kLanes);
    load_lanes<T, kBrain>(source.second + c * sizeof(T), left, x);
    grid.codes(x, width, narrow, wide);
    if (result.codes) std::memcpy(result.codes + c, narrow, static_cast<size_t>(width));
    if (packed) std::memcpy(kept + c, wide, kLanes);
    if (c / kLanes % kSumRows == kSumRows - 1) grid.settle();
  }
  grid.settle();
  for (int k = 0; k < kPlanes; ++k) {
    if (result.centers[k]) {
      int64_t total = 0;
      for (int l = 0; l < kLanes; ++l) total += grid.totals[k][l];
      const bool plain = result.grid == StaircaseGrid::kMinMax || range.lo[0] == range.hi[0];
      *result.centers[k] =
          static_cast<uint8_t>(plain ? kMiddle : staircase_centre(total, source.count, result.widths[k]));
    }
    if (result.planes[k]) pack(kept, 1, source.count, k, result.planes[k]);
  }
}

template <class T, bool kBrain>
int64_t column_fault_of(const GroupSource& source) {
  for (int64_t channel = 0; channel < source.channels; channel += kLanes) {
    const LaneRange range = column_range<T, kBrain>(source, channel);
    for (int l = 0; l < kLanes && channel + l < source.channels; ++l) {
      if (range.fault(l)) return channel + l;
    }
  }
  return -1;
}

template <class T, bool kBrain>
void dequantize_columns_of(StaircaseGrid grid, int32_t bits, int64_t rows, int64_t channels, const uint8_t* codes,
                           int64_t code_stride, const char* lo_data, const char* hi_data, const uint8_t* centers,
                           char* out) {
  for (int64_t channel = 0; channel < channels; channel += kLanes) {
    const int64_t left = channels - channel;
    const int width = static_cast<int>(left < kLanes ? left : kLanes);
    float lo[kLanes], hi[kLanes], step[kLanes], centre[kLanes] = {}, x[kLanes];
    load_lanes<T, kBrain>(lo_data + channel * sizeof(T), left, lo);
    load_lanes<T, kBrain>(hi_data + channel * sizeof(T), left, hi);
    for (int l = 0; l < kLanes; ++l) step[l] = staircase_step(grid, lo[l], hi[l], bits);
    for (int l = 0; l < width && grid == StaircaseGrid::kEmbedded; ++l) {
      centre[l] = static_cast<float>(centers ? centers[channel + l] : kMiddle) * 0x1p-8f;
    }
    for (int64_t t = 0; t < rows; ++t) {
      uint8_t code[kLanes] = {};
      std::memcpy(code, codes + t * code_stride + channel, static_cast<size_t>(width));
      for (int l = 0; l < kLanes; ++l) x[l] = staircase_value(code[l], lo[l], step[l], centre[l]);
      store_lanes<T, kBrain>(out + (t * code_stride + channel) * sizeof(T), width, x);
    }
  }
}

template <class T, bool kBrain>
void dequantize_row_of(StaircaseGrid grid, int32_t bits, int64_t count, const uint8_t* codes, const char* lo_data,
                       const char* hi_data, const uint8_t* center, char* out) {
  float lo[kLanes], hi[kLanes], x[kLanes];
  load_lanes<T, kBrain>(lo_data, 1, lo);
  load_lanes<T, kBrain>(hi_data, 1, hi);
  const float step = staircase_step(grid, lo[0], hi[0], bits);
  const float centre =
      grid == StaircaseGrid::kEmbedded ? static_cast<float>(center ? *center : kMiddle) * 0x1p-8f : 0.0f;
  for (int64_t c = 0; c < count; c += kLanes) {
    const int width = static_cast<int>(count - c < kLanes ? count - c : kLanes);
    uint8_t code[kLanes] = {};
    std::memcpy(code, codes + c, static_cast<size_t>(width));
    for (int l = 0; l < kLanes; ++l) x[l] = staircase_value(code[l], lo[0], step, centre);
    store_lanes<T, kBrain>(out + c * sizeof(T), width, x);
  }
}

// ---- by dtype
// --------------------------------------------------------------------------------------------------------

#define PYCORE_BY_DTYPE(dtype, function, ...)                            \
  ((dtype) == DType::kFloat32   ? function<float, false>(__VA_ARGS__)    \
   : (dtype) == DType::kFloat16 ? function<uint16_t, false>(__VA_ARGS__) \
                                : function<uint16_t, true>(__VA_ARGS__))

int64_t column_fault(const GroupSource& source) { return PYCORE_BY_DTYPE(source.dtype, column_fault_of, source); }

bool row_fault(const GroupSource& source) { return PYCORE_BY_DTYPE(source.dtype, row_range, source).fault(0); }

void quantize_columns(const GroupSource& source, const GroupResult& result) {
  PYCORE_BY_DTYPE(source.dtype, quantize_columns_of, source, result);
}

void quantize_row(const GroupSource& source, const GroupResult& result) {
  PYCORE_BY_DTYPE(source.dtype, quantize_row_of, source, result);
}

void dequantize_columns(DType dtype, StaircaseGrid grid, int32_t bits, int64_t rows, int64_t channels,
                        const uint8_t* codes, int64_t code_stride, const char* lo, const char* hi,
                        const uint8_t* centers, char* out) {
  PYCORE_BY_DTYPE(dtype, dequantize_columns_of, grid, bits, rows, channels, codes, code_stride, lo, hi, centers, out);
}

void dequantize_row(DType dtype, StaircaseGrid grid, int32_t bits, int64_t count, const uint8_t* codes, const char* lo,
                    const char* hi, const uint8_t* center, char* out) {
  PYCORE_BY_DTYPE(dtype, dequantize_row_of, grid, bits, count, codes, lo, hi, center, out);
}

#undef PYCORE_BY_DTYPE
