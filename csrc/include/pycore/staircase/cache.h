// SPDX-License-Identifier: Apache-2.0
// The storage of a staircase cache, appending to it, and reading what a query reads.
//
// A side (keys or values) of a row's KV head has
//   full    [sinks + full_rows, channels]: the sinks, then a ring in which position j lies at sinks + j % full_rows
//   planes  2, 2 and 4 bits of each code of eight, from the top, in rings of plane_rows tokens
//   lo, hi  of every group ever finished, and centers of the widths 2, 4 and 8
// in tiles of `group` tokens: position j is token j % group of tile j / group, and a ring of r tokens holds tile i at
// i % (r / group). Where a ring is as long as the cache, nothing leaves it. docs/ops/staircase.md has the bytes.
//
// A tile is quantized when its last token comes, from the ring of full tokens, so that what lies in the planes does not
// depend on the chunks tokens came in. Then nothing is moved: age is the rings moving on.
#pragma once

#include <pycore/attention/cache.h>
#include <pycore/cpu_isa.h>
#include <pycore/export.h>
#include <pycore/parallel.h>
#include <pycore/staircase/grid.h>
#include <pycore/status.h>
#include <pycore/tensor_view.h>

#include <cstdint>

namespace pycore {

inline constexpr int32_t kStaircasePlanes = 3;
inline constexpr int32_t kMostStaircaseSteps = 32;

struct StaircaseSide {
  bool by_token = false;  // values: a group is `group` channels of a token; keys: the tokens of a tile, of a channel
  int64_t channels = 0, group = 1;
  StaircaseGrid grid = StaircaseGrid::kEmbedded;
  int32_t steps = 0;  // of the ladder
  int32_t bits[kMostStaircaseSteps] = {};
  char* full = nullptr;                       // [batch, kv_heads, sinks + full_rows, channels]
  int64_t full_rows = 0;                      // tokens
  uint8_t* planes[kStaircasePlanes] = {};     // [batch, kv_heads, …], null where no width needs it
  int64_t plane_rows[kStaircasePlanes] = {};  // tokens, of which there are whole tiles
  char* lo = nullptr;                         // [batch, kv_heads, …], of the cache's dtype, null in a full ladder
  char* hi = nullptr;
  uint8_t* centers[kStaircasePlanes] = {};     // of the widths 2, 4 and 8, or null
  int64_t center_rows[kStaircasePlanes] = {};  // tokens; lo and hi have plane_rows[0]
};

struct StaircaseCacheParams {
  CpuIsa isa = cpu_isa();
  DType dtype = DType::kFloat32;  // of what is appended, full, lo and hi: float32, float16 or bfloat16
  int64_t batch = 0, kv_heads = 0, tokens = 0;
  int64_t sinks = 0, step = 0, group = 0;
  StaircaseSide key, value;
  CacheSource key_source, value_source;
  const int64_t* starts = nullptr;  // [batch] or null: tokens before starts[b] are padding and left out
  int64_t* lengths = nullptr;       // [batch]: tokens seen, moved on by what is appended
  const int64_t* seen = nullptr;    // [batch]: what lengths was when it was checked
};

struct StaircaseReadParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, kv_heads = 0, tokens = 0;
  int64_t sinks = 0, step = 0, group = 0;
  StaircaseSide side;
  const int64_t* positions = nullptr;  // [batch]: of the query that reads, or -1
  const int64_t* ends = nullptr;       // [batch]: tokens it reads, later ones as its own
  DType out_dtype = DType::kFloat32;   // dtype, or float32: as the codes say, without rounding to dtype
  char* out = nullptr;                 // [batch, kv_heads, tokens, channels]; zero from ends[b] on
};

// How many groups a token's channels are, and where the group of a channel begins in a token's bytes of a plane.
PYCORE_STAIRCASE_INLINE int64_t token_groups(const StaircaseSide& side, int64_t group) {
  return (side.channels + group - 1) / group;
}
PYCORE_STAIRCASE_INLINE int64_t plane_width(int32_t plane) { return plane < 2 ? 2 : 4; }
PYCORE_STAIRCASE_INLINE int64_t token_plane_bytes(const StaircaseSide& side, int64_t group, int32_t plane) {
  const int32_t bits = static_cast<int32_t>(plane_width(plane));
  return side.channels / group * plane_bytes(group, bits) + plane_bytes(side.channels % group, bits);
}
// Of a tile, in a plane.
PYCORE_STAIRCASE_INLINE int64_t tile_plane_bytes(const StaircaseSide& side, int64_t group, int32_t plane) {
  return side.by_token ? group * token_plane_bytes(side, group, plane)
                       : side.channels * plane_bytes(group, static_cast<int32_t>(plane_width(plane)));
}
// Of a tile, in lo, hi and centers.
PYCORE_STAIRCASE_INLINE int64_t tile_groups(const StaircaseSide& side, int64_t group) {
  return side.by_token ? group * token_groups(side, group) : side.channels;
}

// The width that a query reads of the token at position j: its own group's tokens in full, whatever the ladder begins
// with, since a group has a grid only when it is whole.
PYCORE_STAIRCASE_INLINE int32_t staircase_bits(const StaircaseSide& side, int64_t step, int64_t query, int64_t j) {
  if (j / side.group >= query / side.group) return 16;
  const int64_t age = query / step - j / step, last = side.steps - 1;
  return side.bits[age < last ? (age > 0 ? age : 0) : last];
}

// 2 * (batch row * kv_heads + head) + (1 for values) of the first head for which something appended is refused: an
// element that is not finite, or a group whose range is not. -1: nothing is.
PYCORE_API int64_t staircase_cache_fault(const StaircaseCacheParams& params, const Parallel& parallel);
// Where there is no fault, and lengths[b] + tokens is no more than what the rings that lose nothing hold.
PYCORE_API Status staircase_cache_append(const StaircaseCacheParams& params, const Parallel& parallel);
PYCORE_API Status staircase_cache_read(const StaircaseReadParams& params, const Parallel& parallel);

}  // namespace pycore
