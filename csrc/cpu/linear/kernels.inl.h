// SPDX-License-Identifier: Apache-2.0
// The table of one instruction set with vectors. Included inside its namespace, in a target region.
#pragma once

namespace {
#include "linear.inl.h"
#include "norm.inl.h"
}  // namespace

const LinearKernels linear_float = {
    sizeof(ForwardScratch),  sizeof(BackwardScratch), linear_forward_item, linear_grad_x_item,
    linear_grad_weight_item, linear_grad_bias_item,   norm_rows,           norm_backward_rows};
