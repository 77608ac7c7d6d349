// SPDX-License-Identifier: Apache-2.0
// The table of one instruction set with vectors. Included inside its namespace, in a target region.
#pragma once

namespace {
#include "distance.inl.h"
// (in this order: the search calls distance and prune, each instruction set's own)
#define PYCORE_VQ_PRUNES
#include "search.inl.h"
// (in this order)
#include "prune.inl.h"

void prepare(const VqEncodeParams& params, const VqPlan& plan, int64_t book, VqBook* stage, Range codes) {
  if (codes.begin < codes.end) return prepare_codes(params, plan, book, stage, codes);
  find_shift(params, stage);
}
}  // namespace

const VqKernels vq_float = {kPanel, kLanes, kChunk, prepare, encode_rows};
