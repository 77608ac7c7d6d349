// SPDX-License-Identifier: Apache-2.0
// The tables of one instruction set with vectors. Included inside its namespace, in a target region.
#pragma once

namespace {
#include "backward.inl.h"
#include "gated.inl.h"
#include "layer_norm.inl.h"
#include "linear.inl.h"
#include "norm.inl.h"
#include "pointwise.inl.h"

template <DType kType>
constexpr LinearKernels linear_table() {
  constexpr bool kFloat = kType == DType::kFloat32;
  return {kFloat ? sizeof(ForwardScratch) : sizeof(HalfScratch),
          kFloat ? sizeof(BackwardScratch) : sizeof(HalfScratch),
          kFloat || kPairs<kType> ? kMaxRows : kMaxHalfRows,
          kFloat          ? kLinearColumns
          : kPairs<kType> ? kPairColumns
                          : kHalfColumns,
          linear_forward_item<kType>,
          linear_grad_x_item<kType>,
          linear_grad_weight_item<kType>,
          linear_grad_bias_item<kType>,
          norm_rows<kType>,
          norm_backward_rows<kType>,
          layer_norm_rows<kType>,
          layer_norm_backward_rows<kType>,
          gated_elements<kType>,
          gated_backward_elements<kType>,
          rotate_rows<kType>,
          softcap_elements<kType>};
}
}  // namespace

#ifndef PYCORE_BFLOAT16_PRODUCTS
const LinearKernels linear_float = linear_table<DType::kFloat32>();
const LinearKernels linear_bfloat16 = linear_table<DType::kBFloat16>();
const LinearKernels linear_float16 = linear_table<DType::kFloat16>();
#else
const LinearKernels linear_bfloat16 = linear_table<DType::kBFloat16>();
#endif
