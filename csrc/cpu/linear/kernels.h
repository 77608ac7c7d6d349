// SPDX-License-Identifier: Apache-2.0
// What dispatch.cpp asks of an instruction set: a rectangle of results at a time. No rectangle changes a bit.
#pragma once

#include <pycore/dtype.h>
#include <pycore/key_tile.h>
#include <pycore/linear/linear.h>
#include <pycore/linear/pointwise.h>

#include <cstdint>

#include "../range.h"

namespace pycore {

struct LinearKernels {
  int64_t forward_scratch, backward_scratch;  // bytes a thread
  int64_t most_rows, most_columns;            // of an item of forward or grad_x

  // out[rows][columns]; columns are output features. Up to kFewRows rows need no scratch.
  void (*forward)(const LinearParams& params, Range rows, Range columns, void* scratch);
  // grad_x[rows][columns]; columns are input features.
  void (*grad_x)(const LinearBackwardParams& params, Range rows, Range columns, void* scratch);
  // grad_weight[outs][columns], columns are input features.
  void (*grad_weight)(const LinearBackwardParams& params, Range outs, Range columns, void* scratch);
  void (*grad_bias)(const LinearBackwardParams& params, Range outs);

  void (*norm)(const RmsNormParams& params, Range rows);
  // grad_x[rows], and partial[channels] = the rows' sum for grad_weight (null: not wanted). chain: [channels], scratch.
  void (*norm_backward)(const RmsNormBackwardParams& params, Range rows, void* partial, void* chain);
  void (*layer_norm)(const LayerNormParams& params, Range rows);
  // As norm_backward; partial and chain are [2, channels], for grad_weight and grad_bias.
  void (*layer_norm_backward)(const LayerNormBackwardParams& params, Range rows, void* partial, void* chain);

  // Elements begin .. end - 1 of [rows, channels], counted along the rows.
  void (*gated)(const GatedParams& params, Range elements);
  void (*gated_backward)(const GatedBackwardParams& params, Range elements);

  void (*rotate)(const RotateParams& params, Range rows);
  void (*softcap)(const SoftcapParams& params, Range elements);
};

inline constexpr int64_t kFewRows = 6;  // rows that pass over the weight where it lies

// The most an item may have.
inline constexpr int64_t kLinearColumns = 64;                     // forward, grad_x
inline constexpr int64_t kMaxHalfRows = 192, kHalfColumns = 128;  // the same in 16 bits: an item's rows are converted
inline constexpr int64_t kMaxRows = 2 * kMaxHalfRows;             // in float32, and in bfloat16 where it stays as it is
inline constexpr int64_t kPairColumns = 2 * kHalfColumns;  // there, where a product leaves least time to copy rows
inline constexpr int64_t kWeightRows = 192, kWeightColumns = 128;  // grad_weight: both its operands are copied
inline constexpr int64_t kBiasColumns = 256;                       // grad_bias

namespace scalar {
extern const LinearKernels linear_float, linear_double, linear_bfloat16, linear_float16;
}
namespace avx2 {
extern const LinearKernels linear_float, linear_bfloat16, linear_float16;
}
namespace avx512 {
extern const LinearKernels linear_float, linear_bfloat16, linear_float16;
}
namespace avx512_bf16 {
extern const LinearKernels linear_bfloat16;
}

}  // namespace pycore
