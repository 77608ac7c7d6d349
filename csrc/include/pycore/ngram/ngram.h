// SPDX-License-Identifier: Apache-2.0
// A table of what follows two tokens: for every pair that has been seen, the twelve tokens most likely to come next. A
// drafter reads it (pycore/models/draft.py). The table is three arrays of the caller's: open addressing with linear
// steps, so that a vocabulary of any size takes memory for the pairs it has.
//
// Scores are integers in 1/65536, and rows of the table are updated one after another: the same rows give the same
// table on every machine.
#pragma once

#include <pycore/export.h>
#include <pycore/status.h>

#include <cstdint>

namespace pycore {

inline constexpr int64_t kNgramSlots = 12;             // successors that a pair keeps
inline constexpr int64_t kNgramMostScore = 3 << 16;    // what a score rises to, at most
inline constexpr int64_t kNgramMostToken = INT32_MAX;  // tokens are 0 to this
inline constexpr int64_t kNgramMostNodes = 256;        // of a tree of drafts

struct NgramTable {
  int64_t capacity = 0;           // a power of two
  int64_t* keys = nullptr;        // [capacity]: first * 2^31 + second, or -1 where there is no pair
  int32_t* successors = nullptr;  // [capacity, 12], those with the highest scores first; -1 behind the last
  int32_t* scores = nullptr;      // [capacity, 12]
};

struct NgramUpdateParams {
  NgramTable table;
  int64_t rows = 0;
  const int64_t* trigrams = nullptr;  // [rows, 3]: the pair, and what follows
  const int64_t* weights = nullptr;   // [rows]
  int64_t* result = nullptr;          // [2]: pairs that are new, and rows left out because the table is full
};

struct NgramLookupParams {
  NgramTable table;
  int64_t rows = 0;
  const int64_t* contexts = nullptr;  // [rows, 2]
  int64_t* successors = nullptr;      // [rows, 12], -1 behind the last
  float* probs = nullptr;             // [rows, 12]
};

struct NgramDraftParams {
  NgramTable table;
  int64_t first = 0, second = 0;  // the two newest tokens
  int64_t nodes = 0, depth = 0;   // at most so many of either
  int64_t* tokens = nullptr;      // [nodes], -1 behind the last
  int64_t* parents = nullptr;     // [nodes], a node before it, or -1: follows the newest token
};

// Adds each row's weight to its trigram's score, row after row. A token that is not among its pair's twelve takes the
// place of the last, unless its weight is less than that one's score.
PYCORE_API Status ngram_update(const NgramUpdateParams& params);

// What follows each pair, and score / 65536 as its probability (which adaptation may bring above 1).
PYCORE_API Status ngram_lookup(const NgramLookupParams& params);

// The most likely continuations as a tree: again and again the child with the greatest product of probabilities on its
// path (in float64; of equal ones that of the earliest node). A probability above 1 counts as 1 less 2^-10, so that a
// path's product falls.
PYCORE_API Status ngram_draft(const NgramDraftParams& params);

}  // namespace pycore
