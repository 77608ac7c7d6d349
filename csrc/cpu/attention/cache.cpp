// SPDX-License-Identifier: Apache-2.0
// Copies new tokens to the rows of an evicting cache. Copying has no faster form than memcpy, so there is one version.
#include <pycore/attention/cache.h>
#include <pycore/sizes.h>

#include <algorithm>
#include <cstring>

namespace pycore {
namespace {

constexpr int64_t kSerialBytes = 1 << 18;  // not worth waking a second thread for

void append(const CacheAppendParams& params, const CacheSource& source, char* cache, int64_t b, int64_t h) {
  const int64_t rows = params.sinks + params.ring, start = params.starts ? params.starts[b] : 0;
  const int64_t length = (params.seen ? params.seen : params.lengths)[b], end = length + params.tokens - start;
  char* const head = cache + (b * params.kv_heads + h) * rows * source.row_bytes;
  const char* const tokens = source.data + b * source.batch + h * source.head + start * source.token;
  const auto copy = [&](int64_t j) {
    std::memcpy(head + cache_row(params, j) * source.row_bytes, tokens + (j - length) * source.token,
                static_cast<size_t>(source.row_bytes));
  };
  for (int64_t j = length; j < std::min(end, params.sinks); ++j) copy(j);
  // What this chunk itself would write over is not written.
  for (int64_t j = std::max({length, params.sinks, end - params.ring}); j < end; ++j) copy(j);
}

}  // namespace

Status lambda_cache_append(const CacheAppendParams& params, const Parallel& parallel) {
  const auto item = [&](int64_t, int64_t pair) {
    append(params, params.key, params.key_cache, pair / params.kv_heads, pair % params.kv_heads);
    append(params, params.value, params.value_cache, pair / params.kv_heads, pair % params.kv_heads);
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
