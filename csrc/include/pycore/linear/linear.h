// SPDX-License-Identifier: Apache-2.0
// Row-invariant linear layers and RMS normalisation: a row's result has the same bits whatever rows, batch or threads
// it is computed with, because every sum has one fixed order.
//
// Linear: out[r][n] = sum over k of x[r][k] weight[n][k], + bias[n]. The sum is cut into blocks of kLinearBlock terms;
// a block is one chain of FMAs over k ascending that starts at zero, and the blocks are added in order, then the bias.
// The gradient of x is the same sum over n, the gradient of weight the same sum over the rows. The instruction sets
// cut the work differently and agree bit for bit.
//
// RMS norm: out[r][c] = x[r][c] / sqrt(mean over c of x[r][c]^2 + eps) * weight[c]. Lane l < kNormLanes of a sum holds
// the FMA chain over channels c = l mod kNormLanes, ascending; lanes are added l + (l + 32), then 16, 8, 4, 2, 1.
//
// Layer norm: out = (x - mean) / sqrt(variance + eps) * weight + bias, sums in the same lanes. The mean is rounded, so
// what the deviations from it still sum to is taken off again: with d = x - m for the rounded m and s = mean(d), the
// deviations are d - s and the variance is the mean of their squares.
//
// silu_mul and gelu_mul: out = f(gate) * up, element by element, each of one formula (cpu/linear/gated_functions.inl.h)
// on every instruction set.
//
// bfloat16 and float16 are exact in float32, where everything is computed; a result is rounded once, at its end. In the
// linear layer in bfloat16 subnormal float32 numbers count as zero, operands and results of every step, on every
// instruction set: so do the instructions that multiply pairs of bfloat16 where a machine has them.
#pragma once

#include <pycore/cpu_isa.h>
#include <pycore/export.h>
#include <pycore/parallel.h>
#include <pycore/row_view.h>
#include <pycore/status.h>
#include <pycore/tensor_view.h>

#include <cstdint>

namespace pycore {

inline constexpr int64_t kLinearBlock = 256;
inline constexpr int64_t kNormLanes = 64;
inline constexpr int64_t kNormRowBlock = 64;  // rows per FMA chain in the gradient of the norm's weight

struct LinearParams {
  CpuIsa isa = cpu_isa();         // of the whole call, asked once: scratch and kernel must agree
  DType dtype = DType::kFloat32;  // of everything; floating
  int64_t in_features = 0, out_features = 0;
  RowView x;                     // [rows, in_features]
  const void* weight = nullptr;  // [out_features, in_features], row stride weight_stride
  int64_t weight_stride = 0;
  const void* bias = nullptr;  // [out_features] contiguous, or null
  void* out = nullptr;         // [rows, out_features], row stride out_stride
  int64_t out_stride = 0;
};

struct LinearBackwardParams {
  CpuIsa isa = cpu_isa();  // of the whole call, asked once: scratch and kernel must agree
  DType dtype = DType::kFloat32;
  int64_t in_features = 0, out_features = 0;
  RowView grad_out;              // [rows, out_features]
  RowView x;                     // [rows, in_features]
  const void* weight = nullptr;  // [out_features, in_features], row stride weight_stride
  int64_t weight_stride = 0;
  void* grad_x = nullptr;       // [rows, in_features], contiguous; each of the three may be null
  void* grad_weight = nullptr;  // [out_features, in_features], contiguous
  void* grad_bias = nullptr;    // [out_features]
};

struct RmsNormParams {
  CpuIsa isa = cpu_isa();         // of the whole call, asked once: scratch and kernel must agree
  DType dtype = DType::kFloat32;  // of everything; floating
  int64_t channels = 0;
  RowView x;                     // [rows, channels]
  const void* weight = nullptr;  // [channels] contiguous, or null: ones
  double eps = 1e-6;
  bool plus_one = false;  // the factor is 1 + weight
  void* out = nullptr;    // [rows, channels], contiguous
};

struct RmsNormBackwardParams {
  CpuIsa isa = cpu_isa();  // of the whole call, asked once: scratch and kernel must agree
  DType dtype = DType::kFloat32;
  int64_t channels = 0;
  RowView grad_out, x;           // [rows, channels]
  const void* weight = nullptr;  // [channels] contiguous, or null
  double eps = 1e-6;
  bool plus_one = false;        // the factor is 1 + weight
  void* grad_x = nullptr;       // [rows, channels], contiguous, or null
  void* grad_weight = nullptr;  // [channels], or null
};

struct LayerNormParams {
  CpuIsa isa = cpu_isa();         // of the whole call, asked once: scratch and kernel must agree
  DType dtype = DType::kFloat32;  // of everything; floating
  int64_t channels = 0;
  RowView x;                     // [rows, channels]
  const void* weight = nullptr;  // [channels] contiguous, or null: ones
  const void* bias = nullptr;    // [channels] contiguous, or null: zeros
  double eps = 1e-5;
  void* out = nullptr;  // [rows, channels], contiguous
};

struct LayerNormBackwardParams {
  CpuIsa isa = cpu_isa();  // of the whole call, asked once: scratch and kernel must agree
  DType dtype = DType::kFloat32;
  int64_t channels = 0;
  RowView grad_out, x;           // [rows, channels]
  const void* weight = nullptr;  // [channels] contiguous, or null
  double eps = 1e-5;
  void* grad_x = nullptr;       // [rows, channels], contiguous; each of the three may be null
  void* grad_weight = nullptr;  // [channels]
  void* grad_bias = nullptr;    // [channels]
};

enum class Gate : int32_t { kSilu, kGelu, kGeluTanh };

struct GatedParams {
  CpuIsa isa = cpu_isa();
  DType dtype = DType::kFloat32;  // of everything; floating
  Gate function = Gate::kSilu;
  int64_t channels = 0;
  RowView gate, up;     // [rows, channels]
  void* out = nullptr;  // [rows, channels], contiguous
};

struct GatedBackwardParams {
  CpuIsa isa = cpu_isa();
  DType dtype = DType::kFloat32;
  Gate function = Gate::kSilu;
  int64_t channels = 0;
  RowView grad_out, gate, up;  // [rows, channels]
  void* grad_gate = nullptr;   // [rows, channels], contiguous; each may be null
  void* grad_up = nullptr;
};

// CPU. `scratch` holds …_scratch(params, threads) bytes, 64-byte aligned; it may be null where that is zero.
PYCORE_API int64_t linear_forward_scratch(const LinearParams& params, int64_t threads);
// `count` layers of one x, one dtype and one instruction set, in one go: their weights are read as if they were one.
PYCORE_API Status linear_forward(const LinearParams* layers, int64_t count, const Parallel& parallel, void* scratch);
PYCORE_API int64_t linear_backward_scratch(const LinearBackwardParams& params, int64_t threads);
PYCORE_API Status linear_backward(const LinearBackwardParams& params, const Parallel& parallel, void* scratch);

PYCORE_API Status rms_norm_forward(const RmsNormParams& params, const Parallel& parallel);
PYCORE_API int64_t rms_norm_backward_scratch(const RmsNormBackwardParams& params, int64_t threads);
PYCORE_API Status rms_norm_backward(const RmsNormBackwardParams& params, const Parallel& parallel, void* scratch);

PYCORE_API Status layer_norm_forward(const LayerNormParams& params, const Parallel& parallel);
PYCORE_API int64_t layer_norm_backward_scratch(const LayerNormBackwardParams& params, int64_t threads);
PYCORE_API Status layer_norm_backward(const LayerNormBackwardParams& params, const Parallel& parallel, void* scratch);

PYCORE_API Status gated_forward(const GatedParams& params, const Parallel& parallel);
PYCORE_API Status gated_backward(const GatedBackwardParams& params, const Parallel& parallel);

}  // namespace pycore
