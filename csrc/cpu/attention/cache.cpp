// SPDX-License-Identifier: Apache-2.0
// Copies new tokens to the rows of a cache, or to the columns of its tiles. Copying rows has no faster form than
// memcpy, and a column is a number in each of many lines, whose fetching takes the time: so there is one version.
#include <pycore/attention/cache.h>
#include <pycore/sizes.h>

#include <algorithm>
#include <cstring>

namespace pycore {
namespace {

constexpr int64_t kSerialBytes = 1 << 18;  // not worth waking a second thread for

// Calls body(first, last) for each run of positions first .. last - 1 of the chunk that are written.
template <class Body>
void for_each_run(const CacheAppendParams& params, int64_t length, int64_t end, const Body& body) {
  body(length, std::min(end, params.sinks));
  // What this chunk itself would write over is not written.
  body(std::max({length, params.sinks, end - params.ring}), end);
}

// tile[d][c] = tokens[c][d], `count` columns from `tile` on.
template <class T>
void put_columns(const char* tokens, int64_t token, int64_t count, int64_t channels, char* tile) {
  for (int64_t d = 0; d < channels; ++d) {
    T* const out = reinterpret_cast<T*>(tile) + d * kKeyTile;
    for (int64_t c = 0; c < count; ++c) {
      std::memcpy(out + c, tokens + c * token + d * static_cast<int64_t>(sizeof(T)), sizeof(T));
    }
  }
}

void append(const CacheAppendParams& params, const CacheSource& source, char* cache, int64_t element, int64_t b,
            int64_t h) {
  const int64_t rows = params.sinks + params.ring, start = params.starts ? params.starts[b] : 0;
  const int64_t length = (params.seen ? params.seen : params.lengths)[b], end = length + params.tokens - start;
  char* const head = cache + (b * params.kv_heads + h) * rows * source.row_bytes;
  const char* const tokens = source.data + b * source.batch + h * source.head + start * source.token;
  for_each_run(params, length, end, [&](int64_t j, int64_t last) {
    for (int64_t count; j < last; j += count) {
      const int64_t row = cache_row(params, j);
      const char* const from = tokens + (j - length) * source.token;
      count = 1;
      if (element == 0) {
        std::memcpy(head + row * source.row_bytes, from, static_cast<size_t>(source.row_bytes));
        continue;
      }
      count = std::min(last - j, kKeyTile - row % kKeyTile);
      char* const tile = head + row / kKeyTile * kKeyTile * source.row_bytes + row % kKeyTile * element;
      const int64_t channels = source.row_bytes / element;
      switch (element) {
        case 2: put_columns<uint16_t>(from, source.token, count, channels, tile); break;
        case 4: put_columns<uint32_t>(from, source.token, count, channels, tile); break;
        default: put_columns<uint64_t>(from, source.token, count, channels, tile); break;
      }
    }
  });
}

}  // namespace

Status lambda_cache_append(const CacheAppendParams& params, const Parallel& parallel) {
  const auto item = [&](int64_t, int64_t pair) {
    append(params, params.key, params.key_cache, params.key_element, pair / params.kv_heads, pair % params.kv_heads);
    append(params, params.value, params.value_cache, 0, pair / params.kv_heads, pair % params.kv_heads);
  };
  const int64_t pairs = params.batch * params.kv_heads;
  for_each_item(limited(parallel, size_product({pairs, params.tokens, params.key.row_bytes}), kSerialBytes), pairs,
                item);
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t length = (params.seen ? params.seen : params.lengths)[b];
    params.lengths[b] = length + params.tokens - (params.starts ? params.starts[b] : 0);
  }
  return {};
}

}  // namespace pycore
