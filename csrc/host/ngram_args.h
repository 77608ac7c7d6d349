// SPDX-License-Identifier: Apache-2.0
// What both faces check before they use a table of trigrams.
#pragma once

#include <pycore/ngram/ngram.h>
#include <pycore/tensor_view.h>

#include "checks.h"
#include "index_copies.h"

namespace pycore {

struct NgramTableArgs {
  TensorView keys, successors, scores;
};

inline NgramTable ngram_table(const char* op, const NgramTableArgs& args) {
  const struct {
    const char* name;
    const TensorView& view;
    DType dtype;
    int dims;
  } all[] = {{"keys", args.keys, DType::kInt64, 1},
             {"successors", args.successors, DType::kInt32, 2},
             {"scores", args.scores, DType::kInt32, 2}};
  const int64_t capacity = args.keys.dims == 1 ? args.keys.shape[0] : 0;
  for (const auto& [name, view, dtype, dims] : all) {
    check_on_cpu(op, name, view);
    check_value(view.dtype == dtype, op, name, " is ", dtype_name(view.dtype), " and must be ", dtype_name(dtype));
    check_value(view.dims == dims && view.shape[0] == capacity && (dims == 1 || view.shape[1] == kNgramSlots), op, name,
                " has shape ", shape_text(view), " and must have ", dims == 1 ? "[capacity]" : "[capacity, 12]");
    check_contiguous(op, name, view);
  }
  check_value(capacity >= 1 && (capacity & (capacity - 1)) == 0, op, "keys has ", capacity,
              " places and must have a power of two");
  NgramTable table;
  table.capacity = capacity;
  table.keys = args.keys.as<int64_t>();
  table.successors = args.successors.as<int32_t>();
  table.scores = args.scores.as<int32_t>();
  return table;
}

// int64 [rows, columns] of tokens, copied: what is checked is what the kernel reads.
inline const int64_t* ngram_tokens(const char* op, const char* name, const TensorView& view, int64_t columns,
                                   IndexCopies* copies) {
  check_on_cpu(op, name, view);
  check_value(view.dtype == DType::kInt64 && view.dims == 2 && view.shape[1] == columns, op, name, " is ",
              dtype_name(view.dtype), " ", shape_text(view), " and must be int64 [rows, ", columns, "]");
  check_contiguous(op, name, view);
  const int64_t* tokens = copies->keep(op, view.as<int64_t>(), view.count());
  for (int64_t i = 0; i < view.count(); ++i) {
    check_value(tokens[i] >= 0 && tokens[i] <= kNgramMostToken, op, name, "[", i / columns, ", ", i % columns, "] is ",
                tokens[i], " and must be 0 to ", kNgramMostToken);
  }
  return tokens;
}

// The caller adds result.
inline NgramUpdateParams ngram_update_params(const NgramTableArgs& table, const TensorView& trigrams,
                                             const TensorView& weights, IndexCopies* copies) {
  constexpr const char* kOp = "ngram_update";
  NgramUpdateParams params;
  params.table = ngram_table(kOp, table);
  params.trigrams = ngram_tokens(kOp, "trigrams", trigrams, 3, copies);
  params.rows = trigrams.shape[0];
  check_on_cpu(kOp, "weights", weights);
  check_value(weights.dtype == DType::kInt64 && weights.dims == 1 && weights.shape[0] == params.rows, kOp,
              "weights is ", dtype_name(weights.dtype), " ", shape_text(weights), " and must be int64 [", params.rows,
              "]");
  check_contiguous(kOp, "weights", weights);
  params.weights = copies->keep(kOp, weights.as<int64_t>(), params.rows);
  for (int64_t i = 0; i < params.rows; ++i) {
    check_value(params.weights[i] >= 0 && params.weights[i] <= kNgramMostScore, kOp, "weights[", i, "] is ",
                params.weights[i], " and must be 0 to ", kNgramMostScore);
  }
  const NamedView written[] = {{"keys", table.keys}, {"successors", table.successors}, {"scores", table.scores}};
  const NamedView read[] = {{"trigrams", trigrams}, {"weights", weights}};
  check_disjoint(kOp, written, read);
  return params;
}

// The caller adds successors and probs.
inline NgramLookupParams ngram_lookup_params(const NgramTableArgs& table, const TensorView& contexts,
                                             IndexCopies* copies) {
  constexpr const char* kOp = "ngram_lookup";
  NgramLookupParams params;
  params.table = ngram_table(kOp, table);
  params.contexts = ngram_tokens(kOp, "contexts", contexts, 2, copies);
  params.rows = contexts.shape[0];
  return params;
}

// The caller adds tokens and parents.
inline NgramDraftParams ngram_draft_params(const NgramTableArgs& table, int64_t first, int64_t second, int64_t nodes,
                                           int64_t depth) {
  constexpr const char* kOp = "ngram_draft";
  NgramDraftParams params;
  params.table = ngram_table(kOp, table);
  const struct {
    const char* name;
    int64_t value, least, most;
  } all[] = {{"first", first, 0, kNgramMostToken},
             {"second", second, 0, kNgramMostToken},
             {"nodes", nodes, 0, kNgramMostNodes},
             {"depth", depth, 0, kNgramMostNodes}};
  for (const auto& [name, value, least, most] : all) {
    check_value(value >= least && value <= most, kOp, name, " is ", value, " and must be ", least, " to ", most);
  }
  params.first = first;
  params.second = second;
  params.nodes = nodes;
  params.depth = depth;
  return params;
}

}  // namespace pycore
