// SPDX-License-Identifier: Apache-2.0
// What both faces check before a cache takes new tokens and their queries are attended to in one call: all that either
// refuses, before anything is written.
#pragma once

#include <pycore/attention/attention.h>
#include <pycore/attention/cache.h>

#include <string>
#include <vector>

#include "attention_args.h"
#include "attention_cache_args.h"

namespace pycore {

struct AppendAndAttend {
  CacheAppendParams append;
  std::vector<int64_t> lengths;  // what appending will leave
  AttentionParams attend;        // everything but out and lse; it borrows from `lengths`
};

// `args` has query and the options; keys, values and their lengths are the cache's.
inline AppendAndAttend append_and_attend_params(const CacheAppendArgs& appended, AttentionArgs* args) {
  check_on_cpu(appended.op, "key_cache", appended.key_cache);
  AppendAndAttend all;
  all.append = cache_append_params(appended);
  all.lengths = memory_for<int64_t>(appended.op, "lengths", all.append.batch);
  for (int64_t b = 0; b < all.append.batch; ++b) {
    all.lengths[b] = all.append.seen[b] + all.append.tokens - (all.append.starts ? all.append.starts[b] : 0);
  }
  args->key = appended.key_cache;
  args->value = appended.value_cache;
  args->key_layout = appended.key_cache.dims == 5 ? "tiles" : "rows";
  args->key_lengths = appended.lengths;
  args->key_lengths.data = all.lengths.data();
  all.attend = attention_params(*args);
  check_value(all.attend.query_length == all.append.tokens, args->op, "query has ", all.attend.query_length,
              " rows and must have ", all.append.tokens, ", one a token");
  const NamedView written[] = {
      {"key_cache", appended.key_cache}, {"value_cache", appended.value_cache}, {"lengths", appended.lengths}};
  const NamedView read[] = {{"query", args->query},
                            {"rope's cos", args->rope_cos},
                            {"rope's sin", args->rope_sin},
                            {"distance_bias", args->distance_bias},
                            {"alibi_slopes", args->alibi_slopes},
                            {"sink_logits", args->sink_logits}};
  check_disjoint(args->op, written, read);
  return all;
}

}  // namespace pycore
