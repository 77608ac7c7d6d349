// SPDX-License-Identifier: Apache-2.0
// What is left of a transformer between attention and linear layers, number by number: rotation, and the softcap of
// logits. One formula on every instruction set, so a number has the same bits in any company.
//
// rotate: with c and s the cosine and sine of a row's pair i, out[i] = fma(-x[i + P], s, x[i] c) and out[i + P] =
// fma(x[i], s, x[i + P] c), P pairs; channels beyond are copied. softcap: out = cap tanh(x / cap), or its gradient.
// 16 bits are computed in float32 and rounded once. rotary_tables: cosine and sine of position times frequency, which
// is computed in float64 (portable_cos_sin) and rounded once.
#pragma once

#include <pycore/cpu_isa.h>
#include <pycore/export.h>
#include <pycore/parallel.h>
#include <pycore/row_view.h>
#include <pycore/status.h>
#include <pycore/tensor_view.h>

#include <cstdint>

namespace pycore {

struct RotaryTablesParams {
  DType dtype = DType::kFloat32;  // of the tables, float32 or float64
  int64_t rows = 0, pairs = 0;
  const int64_t* positions = nullptr;   // [rows]
  const double* frequencies = nullptr;  // [pairs], radians a position
  void* cos = nullptr;                  // [rows, pairs]
  void* sin = nullptr;
};

struct RotateParams {
  CpuIsa isa = cpu_isa();
  DType dtype = DType::kFloat32;  // of x and out; floating
  int64_t heads = 0, length = 0, channels = 0, pairs = 0;
  RowView x;  // [batch, heads, length, channels], channels >= 2 pairs
  // [batch or 1, length, pairs], contiguous; float64 where x is, else float32
  const void* cos = nullptr;
  const void* sin = nullptr;
  bool one_table = true;  // for all of the batch
  bool inverse = false;   // turns by the negative angle
  void* out = nullptr;    // [batch, heads, length, channels], contiguous

  // Of the tables, for row r of x.
  int64_t table_row(int64_t r) const { return r % length + (one_table ? 0 : r / (heads * length) * length); }
};

struct SoftcapParams {
  CpuIsa isa = cpu_isa();
  DType dtype = DType::kFloat32;  // of everything; floating
  int64_t channels = 0;
  double cap = 1;
  RowView x;              // [rows, channels]
  bool has_grad = false;  // out is the gradient of x
  RowView grad_out;       // [rows, channels]
  void* out = nullptr;    // [rows, channels], contiguous
};

// CPU.
PYCORE_API Status rotary_tables(const RotaryTablesParams& params, const Parallel& parallel);
PYCORE_API Status rotate_forward(const RotateParams& params, const Parallel& parallel);
PYCORE_API Status softcap_forward(const SoftcapParams& params, const Parallel& parallel);

}  // namespace pycore
