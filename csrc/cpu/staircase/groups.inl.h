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

constexpr int kLanes = PYCORE_LANES;  // as many as a vector of the target region has
constexpr int64_t kSumRows = 4096;    // whose sums fit 32 bits

// Vectors of the compiler's own, which become what the target region has: plain C++ on every lane.
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

template <class To, class From>
PYCORE_STAIRCASE_INLINE To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To out;
  __builtin_memcpy(&out, &x, sizeof out);
  return out;
}

// Numbers below 256. In two steps, which gcc makes vectors of for every instruction set.
PYCORE_STAIRCASE_INLINE void to_bytes(const Ints& x, Bytes* out) {
  const Halves half = __builtin_convertvector(x, Halves);
  *out = __builtin_convertvector(half, Bytes);
}

// T: float, or uint16_t with kBrain saying which half. Past `count` the first again.
template <class T, bool kBrain>
PYCORE_STAIRCASE_INLINE void load_lanes(const char* data, int64_t count, Floats* out) {
  T x[kLanes];
  if (count < kLanes) {
    for (int l = 0; l < kLanes; ++l) __builtin_memcpy(x + l, data + (l < count ? l : 0) * sizeof(T), sizeof(T));
    data = reinterpret_cast<const char*>(x);
  }
  if constexpr (sizeof(T) == 4) {
    __builtin_memcpy(out, data, sizeof x);
  } else {
    Halves half;
    __builtin_memcpy(&half, data, sizeof x);
    const Ints bits = __builtin_convertvector(half, Ints);
    if constexpr (kBrain) {
      *out = bits_as<Floats>(bits << 16);
    } else {  // float_from_float16, on every lane
      const Ints sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
      const Ints small = bits_as<Ints>(__builtin_convertvector(rest, Floats) * 0x1p-24f);
      const Ints plain = (rest << 13) + (112 << 23), wide = ((rest & 0x3ff) << 13) | 0x7f800000;
      const Ints magnitude = rest < 0x400 ? small : plain;
      *out = bits_as<Floats>(sign | (rest >= 0x7c00 ? wide : magnitude));
    }
  }
}

template <class T, bool kBrain>
PYCORE_STAIRCASE_INLINE void store_lanes(char* data, int64_t count, const Floats& lanes) {
  T out[kLanes];
  char* to = count < kLanes ? reinterpret_cast<char*>(out) : data;
  if constexpr (sizeof(T) == 4) {
    __builtin_memcpy(to, &lanes, sizeof out);
  } else if constexpr (kBrain) {  // bfloat16_from_float, of numbers
    const Ints bits = bits_as<Ints>(lanes), round = bits + 0x7fff + (bits >> 16 & 1);
    const Halves half = __builtin_convertvector(round >> 16 & 0xffff, Halves);
    const Ints nan = (bits & 0x7fffffff) > 0x7f800000;
    const Halves quiet = __builtin_convertvector((bits >> 16 | 0x40) & 0xffff, Halves);
    const Halves chosen = __builtin_convertvector(nan & 0xffff, Halves);
    const Halves both = (quiet & chosen) | (half & ~chosen);
    __builtin_memcpy(to, &both, sizeof out);
  } else {
    for (int l = 0; l < kLanes; ++l) {
      const uint16_t half = float16_from_float(lanes[l]);
      __builtin_memcpy(to + l * sizeof half, &half, sizeof half);
    }
  }
  if (count < kLanes) __builtin_memcpy(data, out, static_cast<size_t>(count) * sizeof(T));
}

struct LaneRange {
  Floats lo = {}, hi = {};
  Ints wrong = {};  // not zero where an element is no number or infinite
  bool any = false;

  PYCORE_STAIRCASE_INLINE void add(const Floats& x) {
    if (!any) {
      lo = hi = x;
      any = true;
    }
    lo = x < lo ? x : lo;
    hi = x > hi ? x : hi;
    wrong |= (bits_as<Ints>(x) & 0x7f800000) == 0x7f800000;
  }
  // All lanes as one group.
  PYCORE_STAIRCASE_INLINE void merge() {
    float low = lo[0], high = hi[0];
    int32_t all = wrong[0];
    for (int l = 1; l < kLanes; ++l) {
      low = lo[l] < low ? lo[l] : low;
      high = hi[l] > high ? hi[l] : high;
      all |= wrong[l];
    }
    lo = low - Floats{};  // x - 0 is x, on every lane
    hi = high - Floats{};
    wrong = all | Ints{};
  }
  // A minus zero is a zero: which of the two came first is nobody's business.
  PYCORE_STAIRCASE_INLINE void finish() {
    lo += 0.0f;
    hi += 0.0f;
  }
  PYCORE_STAIRCASE_INLINE bool fault(int l) const {
    return wrong[l] != 0 || (bits_of_float(hi[l] - lo[l]) & 0x7f800000u) == 0x7f800000u;
  }
  PYCORE_STAIRCASE_INLINE bool fault() const {
    const Floats span = hi - lo;
    const Ints all = wrong | ((bits_as<Ints>(span) & 0x7f800000) == 0x7f800000);
    int32_t some = 0;
    for (int l = 0; l < kLanes; ++l) some |= all[l];
    return some != 0;
  }
};

template <class T, bool kBrain>
PYCORE_STAIRCASE_INLINE void column_range(const GroupSource& source, int64_t channel, LaneRange* range) {
  Floats x;
  const int64_t left = source.channels - channel;
  for (int64_t t = source.skip; t < source.count; ++t) {
    load_lanes<T, kBrain>(source.row(t) + channel * sizeof(T), left, &x);
    range->add(x);
  }
  range->finish();
}

template <class T, bool kBrain>
PYCORE_STAIRCASE_INLINE void row_range(const GroupSource& source, LaneRange* range) {
  Floats x;
  for (int64_t c = 0; c < source.count; c += kLanes) {
    load_lanes<T, kBrain>(source.second + c * sizeof(T), source.count - c, &x);
    range->add(x);
  }
  range->merge();
  range->finish();
}

// What the places and codes of some lanes are; sums of what the widths cut off.
struct LaneGrid {
  bool minmax;
  int32_t bits;
  bool wanted[kPlanes];
  int32_t masks[kPlanes];
  Floats lo, span;  // span: hi - lo, or the min-max grid's step
  Ints sums[kPlanes] = {};
  int64_t totals[kPlanes][kLanes] = {};

  PYCORE_STAIRCASE_INLINE LaneGrid(const GroupResult& result, const LaneRange& range)
      : minmax(result.grid == StaircaseGrid::kMinMax), bits(result.bits), lo(range.lo), span(range.hi - range.lo) {
    if (minmax) span = span / static_cast<float>((1 << bits) - 1);  // staircase_step
    for (int k = 0; k < kPlanes; ++k) {
      wanted[k] = result.centers[k] != nullptr && !minmax;
      masks[k] = (1 << (16 - result.widths[k])) - 1;
    }
  }

  // The bits-wide codes, and in `wide` the same as eight bits. Lanes that `counted` has all bits of add to the sums.
  PYCORE_STAIRCASE_INLINE void codes(const Floats& x, const Ints& counted, Bytes* narrow, Bytes* wide) {
    const Floats zero = {};
    if (minmax) {  // minmax_code, on every lane
      const float most = static_cast<float>((1 << bits) - 1);
      Floats code = (x - lo) / span;
      code = code > zero ? code : zero;
      code = code < most ? code : most - zero;
      const Ints whole = __builtin_convertvector((code + 8388608.0f) - 8388608.0f, Ints);
      to_bytes(whole, narrow);
      to_bytes(whole << (8 - bits), wide);
      return;
    }
    Floats at = (x - lo) / span * 65536.0f;  // staircase_place, on every lane
    at = at > zero ? at : zero;
    at = at < 65535.0f ? at : 65535.0f - zero;
    const Ints place = __builtin_convertvector(at, Ints);
    to_bytes(place >> (16 - bits), narrow);
    to_bytes(place >> 8, wide);
    for (int k = 0; k < kPlanes; ++k) {
      if (wanted[k]) sums[k] += place & masks[k] & counted;
    }
  }

  PYCORE_STAIRCASE_INLINE void settle() {
    for (int k = 0; k < kPlanes; ++k) {
      for (int l = 0; l < kLanes; ++l) totals[k][l] += sums[k][l];
      sums[k] = Ints{};
    }
  }
};

PYCORE_STAIRCASE_INLINE Ints first_lanes(int64_t count) {
  Ints lane = {};
  for (int l = 0; l < kLanes; ++l) lane[l] = l < count ? -1 : 0;
  return lane;
}

// The codes [count][kLanes] of `width` channels, each channel's as a plane of its own.
PYCORE_STAIRCASE_INLINE void pack_columns(const uint8_t (*kept)[kLanes], int width, int64_t count, int32_t plane,
                                          uint8_t* out) {
  const int32_t bits = plane_bits(plane), shift = plane_shift(plane);
  const int64_t bytes = plane_bytes(count, bits);
  Bytes mask = {};
  for (int l = 0; l < kLanes; ++l) mask[l] = static_cast<uint8_t>((1 << bits) - 1);
  for (int64_t i = 0; i < bytes; ++i) {
    Bytes byte = {};
    for (int64_t part = 0, t = i; t < count; ++part, t += bytes) {
      Bytes code;
      __builtin_memcpy(&code, kept[t], sizeof code);
      byte |= (code >> shift & mask) << static_cast<int>(bits * part);
    }
    for (int l = 0; l < width; ++l) out[l * bytes + i] = byte[l];
  }
}

// The codes [count] of one group as a plane.
PYCORE_STAIRCASE_INLINE void pack_row(const uint8_t* kept, int64_t count, int32_t plane, uint8_t* out) {
  const int32_t bits = plane_bits(plane), shift = plane_shift(plane), mask = (1 << bits) - 1;
  const int64_t bytes = plane_bytes(count, bits);
  std::memset(out, 0, static_cast<size_t>(bytes));
  for (int64_t part = 0; part * bytes < count; ++part) {
    const int64_t end = count - part * bytes < bytes ? count - part * bytes : bytes;
    const uint8_t* from = kept + part * bytes;
    const int up = static_cast<int>(bits * part);
    for (int64_t i = 0; i < end; ++i) out[i] = static_cast<uint8_t>(out[i] | (from[i] >> shift & mask) << up);
  }
}

template <class T, bool kBrain>
void quantize_columns_of(const GroupSource& source, const GroupResult& result) {
  const bool packed = result.planes[0] || result.planes[1] || result.planes[2];
  for (int64_t channel = 0; channel < source.channels; channel += kLanes) {
    const int64_t left = source.channels - channel;
    const int width = static_cast<int>(left < kLanes ? left : kLanes);
    LaneRange range;
    column_range<T, kBrain>(source, channel, &range);
    store_lanes<T, kBrain>(result.lo + channel * sizeof(T), width, range.lo);
    store_lanes<T, kBrain>(result.hi + channel * sizeof(T), width, range.hi);
    LaneGrid grid(result, range);
    uint8_t kept[kMostPacked][kLanes];  // of groups that are packed
    const Ints counted_lanes = first_lanes(width);
    Floats x;
    Bytes narrow, wide;
    for (int64_t t = 0; t < source.skip && packed; ++t) std::memset(kept[t], 0, kLanes);
    for (int64_t t = source.skip; t < source.count; ++t) {
      load_lanes<T, kBrain>(source.row(t) + channel * sizeof(T), left, &x);
      grid.codes(x, counted_lanes, &narrow, &wide);
      if (result.codes)
        std::memcpy(result.codes + t * result.code_stride + channel, &narrow, static_cast<size_t>(width));
      if (packed) std::memcpy(kept[t], &wide, kLanes);
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
      }
      if (result.planes[k]) {
        const int64_t bytes = plane_bytes(source.count, plane_bits(k));
        pack_columns(kept, width, source.count, k, result.planes[k] + channel * bytes);
      }
    }
  }
}

template <class T, bool kBrain>
void quantize_row_of(const GroupSource& source, const GroupResult& result) {
  const bool packed = result.planes[0] || result.planes[1] || result.planes[2];
  LaneRange range;
  row_range<T, kBrain>(source, &range);
  store_lanes<T, kBrain>(result.lo, 1, range.lo);
  store_lanes<T, kBrain>(result.hi, 1, range.hi);
  LaneGrid grid(result, range);
  uint8_t kept[kMostPacked + kLanes];
  Floats x;
  Bytes narrow, wide;
  for (int64_t c = 0; c < source.count; c += kLanes) {
    const int64_t left = source.count - c;
    const int width = static_cast<int>(left < kLanes ? left : kLanes);
    load_lanes<T, kBrain>(source.second + c * sizeof(T), left, &x);
    grid.codes(x, first_lanes(width), &narrow, &wide);
    if (result.codes) std::memcpy(result.codes + c, &narrow, static_cast<size_t>(width));
    if (packed) std::memcpy(kept + c, &wide, kLanes);
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
    if (result.planes[k]) pack_row(kept, source.count, k, result.planes[k]);
  }
}

template <class T, bool kBrain>
bool row_fault_of(const GroupSource& source) {
  LaneRange range;
  row_range<T, kBrain>(source, &range);
  return range.fault();
}

template <class T, bool kBrain>
int64_t column_fault_of(const GroupSource& source) {
  for (int64_t channel = 0; channel < source.channels; channel += kLanes) {
    LaneRange range;
    column_range<T, kBrain>(source, channel, &range);
    if (!range.fault()) continue;
    for (int l = 0; l < kLanes && channel + l < source.channels; ++l) {
      if (range.fault(l)) return channel + l;
    }
  }
  return -1;
}

// staircase_step, on every lane.
PYCORE_STAIRCASE_INLINE Floats lane_step(StaircaseGrid grid, const Floats& lo, const Floats& hi, int32_t bits) {
  return grid == StaircaseGrid::kMinMax ? (hi - lo) / static_cast<float>((1 << bits) - 1)
                                        : (hi - lo) * (1.0f / static_cast<float>(1 << bits));
}

PYCORE_STAIRCASE_INLINE void load_codes(const uint8_t* codes, int width, Floats* out) {
  Bytes code = {};
  if (width == kLanes) {
    __builtin_memcpy(&code, codes, sizeof code);
  } else {
    std::memcpy(&code, codes, static_cast<size_t>(width));
  }
  *out = __builtin_convertvector(__builtin_convertvector(code, Ints), Floats);
}

template <class T, bool kBrain>
void dequantize_columns_of(StaircaseGrid grid, int32_t bits, int64_t rows, int64_t channels, const uint8_t* codes,
                           int64_t code_stride, const char* lo_data, const char* hi_data, const uint8_t* centers,
                           char* out) {
  for (int64_t channel = 0; channel < channels; channel += kLanes) {
    const int64_t left = channels - channel;
    const int width = static_cast<int>(left < kLanes ? left : kLanes);
    Floats lo, hi, centre = {};
    load_lanes<T, kBrain>(lo_data + channel * sizeof(T), left, &lo);
    load_lanes<T, kBrain>(hi_data + channel * sizeof(T), left, &hi);
    const Floats step = lane_step(grid, lo, hi, bits);
    for (int l = 0; l < width && grid == StaircaseGrid::kEmbedded; ++l) {
      centre[l] = static_cast<float>(centers ? centers[channel + l] : kMiddle) * 0x1p-8f;
    }
    for (int64_t t = 0; t < rows; ++t) {
      Floats code;
      load_codes(codes + t * code_stride + channel, width, &code);
      store_lanes<T, kBrain>(out + (t * code_stride + channel) * sizeof(T), width, lo + (code + centre) * step);
    }
  }
}

template <class T, bool kBrain>
void dequantize_row_of(StaircaseGrid grid, int32_t bits, int64_t count, const uint8_t* codes, const char* lo_data,
                       const char* hi_data, const uint8_t* center, char* out) {
  Floats lo, hi;
  load_lanes<T, kBrain>(lo_data, 1, &lo);
  load_lanes<T, kBrain>(hi_data, 1, &hi);
  const Floats step = lane_step(grid, lo, hi, bits);
  const float centre =
      grid == StaircaseGrid::kEmbedded ? static_cast<float>(center ? *center : kMiddle) * 0x1p-8f : 0.0f;
  for (int64_t c = 0; c < count; c += kLanes) {
    const int width = static_cast<int>(count - c < kLanes ? count - c : kLanes);
    Floats code;
    load_codes(codes + c, width, &code);
    store_lanes<T, kBrain>(out + c * sizeof(T), width, lo + (code + centre) * step);
  }
}

// ---- by dtype
// --------------------------------------------------------------------------------------------------------

#define PYCORE_BY_DTYPE(dtype, function, ...)                            \
  ((dtype) == DType::kFloat32   ? function<float, false>(__VA_ARGS__)    \
   : (dtype) == DType::kFloat16 ? function<uint16_t, false>(__VA_ARGS__) \
                                : function<uint16_t, true>(__VA_ARGS__))

int64_t column_fault(const GroupSource& source) { return PYCORE_BY_DTYPE(source.dtype, column_fault_of, source); }

bool row_fault(const GroupSource& source) { return PYCORE_BY_DTYPE(source.dtype, row_fault_of, source); }

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
