// SPDX-License-Identifier: Apache-2.0
// The table of one instruction set with vectors. Included inside its namespace, in a target region.
#pragma once

namespace {
#include "backward.inl.h"
#include "forward.inl.h"
}  // namespace

const AttentionKernels attention_float = {kForwardRows,  kBackwardRows,   forward_scratch,  forward,
                                          forward_merge, forward_partial, backward_scratch, delta,
                                          grad_query,    grad_key_value};
