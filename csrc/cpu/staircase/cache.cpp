// SPDX-License-Identifier: Apache-2.0
// Appending to a staircase cache and reading it: which tiles are finished, and where they lie. The grid and the packing
// are the kernels of groups.inl.h; reading is plain loops, for looking at a cache and for attention without a kernel.
#include <pycore/sizes.h>
#include <pycore/staircase/cache.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace pycore {
namespace {

constexpr int64_t kSerialBytes = 1 << 17;  // not worth waking a second thread for

// A side of one row's head, with the tokens that are new to it.
struct Head {
  Head(const StaircaseCacheParams& params, bool value, int64_t pair)
      : params(params), side(value ? params.value : params.key), pair(pair) {
    const CacheSource& source = value ? params.value_source : params.key_source;
    const int64_t b = pair / params.kv_heads, start = params.starts ? params.starts[b] : 0;
    length = params.seen[b];
    end = length + params.tokens - start;
    token = source.token;
    row_bytes = source.row_bytes;
    fresh = source.data + b * source.batch + pair % params.kv_heads * source.head + start * source.token;
    full = side.full + pair * (params.sinks + side.full_rows) * row_bytes;
  }

  char* ring(int64_t j) const { return full + (j < params.sinks ? j : params.sinks + j % side.full_rows) * row_bytes; }
  const char* row(int64_t j) const { return j < length ? ring(j) : fresh + (j - length) * token; }
  bool quantizes() const { return side.lo != nullptr; }

  // Tokens [from, to) of tile i as a group for each channel.
  GroupSource tile(int64_t i, int64_t from) const {
    const int64_t first = i * params.group;
    GroupSource source;
    source.dtype = params.dtype;
    source.channels = side.channels;
    source.count = std::min(params.group, end - first);
    source.skip = std::clamp<int64_t>(std::max(params.sinks, from) - first, 0, source.count);
    source.split = std::clamp<int64_t>(length - first, 0, source.count);
    source.first = full + (params.sinks + first % side.full_rows) * row_bytes;
    source.first_stride = row_bytes;
    source.second = fresh + (first + source.split - length) * token;
    source.second_stride = token;
    return source;
  }
  // One group of the channels of the token at j.
  GroupSource channels(int64_t j, int64_t group) const {
    GroupSource source;
    source.dtype = params.dtype;
    source.count = std::min(params.group, side.channels - group * params.group);
    source.second = row(j) + group * params.group * dtype_size(params.dtype);
    return source;
  }

  const StaircaseCacheParams& params;
  const StaircaseSide& side;
  int64_t pair, length = 0, end = 0, token = 0, row_bytes = 0;
  const char* fresh;  // the token at `length`
  char* full;
};

bool finite(DType dtype, const char* row, int64_t channels) {
  bool all = true;
  for (int64_t c = 0; c < channels; ++c) {
    if (dtype == DType::kFloat32) {
      uint32_t bits;
      std::memcpy(&bits, row + 4 * c, sizeof bits);
      all &= (bits & 0x7f800000u) != 0x7f800000u;
    } else {
      uint16_t bits;
      std::memcpy(&bits, row + 2 * c, sizeof bits);
      const uint16_t exponent = dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
      all &= (bits & exponent) != exponent;
    }
  }
  return all;
}

bool head_fault(const StaircaseKernels& kernels, const Head& head) {
  if (!head.quantizes()) return false;
  const StaircaseCacheParams& params = head.params;
  for (int64_t j = head.length; j < std::min(head.end, params.sinks); ++j) {
    if (!finite(params.dtype, head.row(j), head.side.channels)) return true;
  }
  if (head.side.by_token) {
    for (int64_t j = std::max(head.length, params.sinks); j < head.end; ++j) {
      for (int64_t group = 0; group < token_groups(head.side, params.group); ++group) {
        if (kernels.row_fault(head.channels(j, group))) return true;
      }
    }
    return false;
  }
  if (head.length == head.end) return false;
  for (int64_t i = head.length / params.group; i <= (head.end - 1) / params.group; ++i) {
    // The whole of a tile that is finished; of another only what is new, or appending a token would cost a tile.
    const bool finished = (i + 1) * params.group <= head.end;
    if (kernels.column_fault(head.tile(i, finished ? 0 : head.length)) >= 0) return true;
  }
  return false;
}

// Where a tile's bytes are in each tensor; null where a later tile of this chunk would be written over them.
struct TilePlaces {
  TilePlaces(const Head& head, int64_t i, int64_t last) {
    const StaircaseSide& side = head.side;
    const int64_t group = head.params.group, size = dtype_size(head.params.dtype), wide = tile_groups(side, group);
    const auto slot = [&](int64_t rows) {
      const int64_t tiles = rows / group;
      return last - i >= tiles ? int64_t{-1} : head.pair * tiles + i % tiles;
    };
    const int64_t everything = slot(side.plane_rows[0]);
    lo = side.lo + everything * wide * size;
    hi = side.hi + everything * wide * size;
    for (int32_t k = 0; k < kPlanes; ++k) {
      const int64_t at = side.planes[k] ? slot(side.plane_rows[k]) : -1;
      planes[k] = at < 0 ? nullptr : side.planes[k] + at * tile_plane_bytes(side, group, k);
    }
    for (int32_t k = 0; k < kPlanes; ++k) {
      const int64_t at = side.centers[k] ? slot(side.center_rows[k]) : -1;
      centers[k] = at < 0 ? nullptr : side.centers[k] + at * wide;
    }
  }
  char *lo, *hi;
  uint8_t* planes[kPlanes];
  uint8_t* centers[kPlanes];
};

void quantize_tile(const StaircaseKernels& kernels, const Head& head, int64_t i, int64_t last) {
  const StaircaseSide& side = head.side;
  const int64_t group = head.params.group, size = dtype_size(head.params.dtype);
  const TilePlaces places(head, i, last);
  GroupResult result;
  result.grid = side.grid;
  result.bits = side.grid == StaircaseGrid::kMinMax ? side.bits[side.steps - 1] : 8;
  result.widths[0] = 2;
  result.widths[1] = 4;
  result.widths[2] = 8;
  if (!side.by_token) {
    result.lo = places.lo;
    result.hi = places.hi;
    for (int32_t k = 0; k < kPlanes; ++k) result.planes[k] = places.planes[k];
    for (int32_t k = 0; k < kPlanes; ++k) result.centers[k] = places.centers[k];
    kernels.quantize_columns(head.tile(i, 0), result);
    return;
  }
  const int64_t groups = token_groups(side, group);
  for (int64_t t = std::clamp<int64_t>(head.params.sinks - i * group, 0, group); t < group; ++t) {
    int64_t offset[kPlanes];
    for (int32_t k = 0; k < kPlanes; ++k) offset[k] = t * token_plane_bytes(side, group, k);
    for (int64_t g = 0; g < groups; ++g) {
      const GroupSource source = head.channels(i * group + t, g);
      result.lo = places.lo + (t * groups + g) * size;
      result.hi = places.hi + (t * groups + g) * size;
      for (int32_t k = 0; k < kPlanes; ++k)
        result.centers[k] = places.centers[k] ? places.centers[k] + t * groups + g : nullptr;
      for (int32_t k = 0; k < kPlanes; ++k) {
        result.planes[k] = places.planes[k] ? places.planes[k] + offset[k] : nullptr;
        offset[k] += plane_bytes(source.count, plane_bits(k));
      }
      kernels.quantize_row(source, result);
    }
  }
}

void append_head(const StaircaseKernels& kernels, const Head& head) {
  const StaircaseCacheParams& params = head.params;
  const auto copy = [&](int64_t j) {
    std::memcpy(head.ring(j), head.fresh + (j - head.length) * head.token, static_cast<size_t>(head.row_bytes));
  };
  if (head.quantizes()) {
    const int64_t finished = head.end / params.group;  // tiles; the ring still has what was before this chunk
    for (int64_t i = head.length / params.group; i < finished; ++i) quantize_tile(kernels, head, i, finished - 1);
  }
  for (int64_t j = head.length; j < std::min(head.end, params.sinks); ++j) copy(j);
  for (int64_t j = std::max({head.length, params.sinks, head.end - head.side.full_rows}); j < head.end; ++j) copy(j);
}

// ---- reading
// ---------------------------------------------------------------------------------------------------------

void store(DType dtype, char* out, int64_t index, float x) {
  if (dtype == DType::kFloat32) {
    std::memcpy(out + 4 * index, &x, sizeof x);
  } else {
    const uint16_t half = dtype == DType::kFloat16 ? float16_from_float(x) : bfloat16_from_float(x);
    std::memcpy(out + 2 * index, &half, sizeof half);
  }
}

float load(DType dtype, const char* data, int64_t index) {
  if (dtype == DType::kFloat32) {
    float x;
    std::memcpy(&x, data + 4 * index, sizeof x);
    return x;
  }
  uint16_t half;
  std::memcpy(&half, data + 2 * index, sizeof half);
  return dtype == DType::kFloat16 ? float_from_float16(half) : float_from_bfloat16(half);
}

void read_token(const StaircaseReadParams& params, int64_t pair, int64_t j, int32_t bits, char* out) {
  const StaircaseSide& side = params.side;
  const int64_t size = dtype_size(params.dtype), group = params.group;
  if (j < params.sinks || bits == 16) {
    const int64_t row = j < params.sinks ? j : params.sinks + j % side.full_rows;
    const char* from = side.full + (pair * (params.sinks + side.full_rows) + row) * side.channels * size;
    for (int64_t c = 0; c < side.channels; ++c) store(params.out_dtype, out, c, load(params.dtype, from, c));
    return;
  }
  const int64_t tile = j / group, t = j % group, wide = tile_groups(side, group), groups = token_groups(side, group);
  const auto slot = [&](int64_t rows) { return pair * (rows / group) + tile % (rows / group); };
  const int32_t depth = bits <= 2 ? 1 : bits <= 4 ? 2 : 3;
  const int64_t bases = slot(side.plane_rows[0]) * wide;
  const int32_t last = depth - 1;
  const uint8_t* centers = side.centers[last] ? side.centers[last] + slot(side.center_rows[last]) * wide : nullptr;
  for (int64_t c = 0; c < side.channels; ++c) {
    const int64_t g = side.by_token ? t * groups + c / group : c;
    int32_t code = 0;
    for (int32_t k = 0; k < depth; ++k) {
      const int32_t width = plane_bits(k);
      const uint8_t* plane = side.planes[k] + slot(side.plane_rows[k]) * tile_plane_bytes(side, group, k);
      if (side.by_token) {
        const int64_t count = std::min(group, side.channels - c / group * group);
        plane += t * token_plane_bytes(side, group, k) + c / group * plane_bytes(group, width);
        code = code << width | plane_code(plane, count, c % group, width);
      } else {
        code = code << width | plane_code(plane + c * plane_bytes(group, width), group, t, width);
      }
    }
    const float lo = load(params.dtype, side.lo, bases + g), hi = load(params.dtype, side.hi, bases + g);
    const float centre =
        side.grid == StaircaseGrid::kMinMax ? 0.0f : static_cast<float>(centers ? centers[g] : kMiddle) * 0x1p-8f;
    store(params.out_dtype, out, c, staircase_value(code, lo, staircase_step(side.grid, lo, hi, bits), centre));
  }
}

}  // namespace

int64_t staircase_cache_fault(const StaircaseCacheParams& params, const Parallel& parallel) {
  const StaircaseKernels& kernels = staircase_kernels(params.isa);
  const int64_t heads = 2 * params.batch * params.kv_heads;
  std::atomic<int64_t> first{INT64_MAX};
  for_each_item(limited(parallel, size_product({heads, params.tokens, params.key_source.row_bytes}), kSerialBytes),
                heads, [&](int64_t, int64_t item) {
                  if (!head_fault(kernels, Head(params, item % 2 == 1, item / 2))) return;
                  for (int64_t seen = first; item < seen && !first.compare_exchange_weak(seen, item);) {
                  }
                });
  return first == INT64_MAX ? -1 : first.load();
}

Status staircase_cache_append(const StaircaseCacheParams& params, const Parallel& parallel) {
  const StaircaseKernels& kernels = staircase_kernels(params.isa);
  const int64_t heads = 2 * params.batch * params.kv_heads;
  for_each_item(limited(parallel, size_product({heads, params.tokens, params.key_source.row_bytes}), kSerialBytes),
                heads, [&](int64_t, int64_t item) { append_head(kernels, Head(params, item % 2 == 1, item / 2)); });
  for (int64_t b = 0; b < params.batch; ++b) {
    params.lengths[b] = params.seen[b] + params.tokens - (params.starts ? params.starts[b] : 0);
  }
  return {};
}

Status staircase_cache_read(const StaircaseReadParams& params, const Parallel& parallel) {
  const int64_t row = params.side.channels * dtype_size(params.out_dtype), tokens = params.tokens;
  const int64_t run = 64, runs = (tokens + run - 1) / run, pairs = params.batch * params.kv_heads;
  for_each_item(limited(parallel, size_product({pairs, tokens, row}), kSerialBytes), pairs * runs,
                [&](int64_t, int64_t item) {
                  const int64_t pair = item / runs, first = item % runs * run;
                  const int64_t b = pair / params.kv_heads, query = params.positions[b];
                  for (int64_t j = first; j < std::min(first + run, tokens); ++j) {
                    char* out = params.out + (pair * tokens + j) * row;
                    if (j >= params.ends[b]) {
                      std::memset(out, 0, static_cast<size_t>(row));
                    } else {
                      read_token(params, pair, j, staircase_bits(params.side, params.step, query, j), out);
                    }
                  }
                });
  return {};
}

}  // namespace pycore
