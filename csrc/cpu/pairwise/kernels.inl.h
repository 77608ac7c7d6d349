// SPDX-License-Identifier: Apache-2.0
// The table of one instruction set with vectors. Included inside its namespace, in a target region.
#pragma once

namespace {
#include "bounds.inl.h"
#include "gradient.inl.h"
#include "hamming.inl.h"
#include "reduce.inl.h"
#include "scores.inl.h"
#include "select.inl.h"
}  // namespace

const PairwiseKernels pairwise_float = {
    sizeof(PairwiseScratch), pairwise_scores, pairwise_bounds,         pairwise_next,     pairwise_logits,
    pairwise_reduce,         pairwise_total,  pairwise_reduce_columns, pairwise_gradient, pairwise_columns_product,
    pairwise_rows_product,   pairwise_select, pairwise_distance,       hamming_rows};
