// SPDX-License-Identifier: Apache-2.0
// Writing new tokens into a cache: rows that stay, the sinks among them, then a ring (AttentionParams::key_ring) in
// which a token's row follows from its position alone, so that nothing is ever moved. A cache of all tokens is a ring
// that they never fill.
#pragma once

#include <pycore/attention/tile_schedule.h>
#include <pycore/export.h>
#include <pycore/parallel.h>
#include <pycore/status.h>

#include <cstdint>

namespace pycore {

// Strides in bytes.
struct CacheSource {
  const char* data = nullptr;  // [batch, kv_heads, tokens, channels]
  int64_t batch = 0, head = 0, token = 0;
  int64_t row_bytes = 0;
};

struct CacheAppendParams {
  int64_t batch = 0, kv_heads = 0, tokens = 0;
  int64_t sinks = 0, ring = 0;  // rows of each; a cache has sinks + ring
  CacheSource key, value;
  // [batch, kv_heads, sinks + ring, key channels], contiguous; or, by channel (AttentionParams::key_channel_stride),
  // [batch, kv_heads, (sinks + ring) / 64, key channels, 64], of elements of key_element bytes. Sinks are then whole
  // tiles.
  char* key_cache = nullptr;
  int64_t key_element = 0;          // 0: keys in rows
  char* value_cache = nullptr;      // [batch, kv_heads, sinks + ring, value channels], contiguous
  const int64_t* starts = nullptr;  // [batch] or null: tokens before starts[b] are padding and left out
  int64_t* lengths = nullptr;       // [batch]: tokens seen, moved on by what is appended
  const int64_t* seen = nullptr;    // [batch]: what lengths was when it was checked; null (and on a device): lengths
};

// The row of the token at position j.
PYCORE_HOST_DEVICE inline int64_t cache_row(const CacheAppendParams& params, int64_t j) {
  return j < params.sinks ? j : params.sinks + j % params.ring;
}

PYCORE_API Status lambda_cache_append(const CacheAppendParams& params, const Parallel& parallel);
// CUDA: every pointer is a device pointer.
PYCORE_API Status launch_lambda_cache_append(const CacheAppendParams& params, void* stream);

}  // namespace pycore
