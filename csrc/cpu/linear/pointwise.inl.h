// SPDX-License-Identifier: Apache-2.0
// Rotation of rows by tables, and softcap.
#pragma once

#include <pycore/dtype.h>
#include <pycore/linear/pointwise.h>

#include <cstdint>

#include "../tanh.inl.h"
#include "../vector_rows.inl.h"
#include "gated.inl.h"
#include "kernels.h"
#include "rows.inl.h"

template <DType kType>
void rotate_rows(const RotateParams& params, Range rows) {
  const int64_t pairs = params.pairs, rest = 2 * pairs;
  const Vec sign = Vec::broadcast(params.inverse ? -1.0f : 1.0f);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const char* x = row_bytes<kType>(params.x, r);
    char* out = static_cast<char*>(params.out) + r * params.channels * kElementBytes<kType>;
    const float* cos = static_cast<const float*>(params.cos) + params.table_row(r) * pairs;
    const float* sin = static_cast<const float*>(params.sin) + params.table_row(r) * pairs;
    for (int64_t c = 0; c < pairs; c += Vec::kWidth) {
      const int64_t count = smaller(Vec::kWidth, pairs - c);
      const Vec a = load_some<kType>(x, c, count), b = load_some<kType>(x, pairs + c, count);
      const Vec u = load_lanes(cos + c, count), v = load_lanes(sin + c, count) * sign;
      store_some<kType>(Vec::fnma(b, v, a * u), out, c, count);
      store_some<kType>(Vec::fma(a, v, b * u), out, pairs + c, count);
    }
    if (rest < params.channels) {
      __builtin_memcpy(out + rest * kElementBytes<kType>, x + rest * kElementBytes<kType>,
                       static_cast<size_t>((params.channels - rest) * kElementBytes<kType>));
    }
  }
}

template <DType kType>
void softcap_elements(const SoftcapParams& params, Range elements) {
  const Vec cap = Vec::broadcast(static_cast<float>(params.cap)), one = Vec::broadcast(1.0f);
  for_each_run(params.channels, elements, [&](int64_t row, int64_t c, int64_t count) __attribute__((always_inline)) {
    const char* x = row_bytes<kType>(params.x, row);
    const char* grad = params.has_grad ? row_bytes<kType>(params.grad_out, row) : nullptr;
    char* out = static_cast<char*>(params.out) + row * params.channels * kElementBytes<kType>;
    for (const int64_t end = c + count; c < end; c += Vec::kWidth) {
      const int64_t lanes = smaller(Vec::kWidth, end - c);
      const Vec t = tanh_of(load_some<kType>(x, c, lanes) / cap);
      const Vec y = grad ? load_some<kType>(grad, c, lanes) * Vec::fnma(t, t, one) : t * cap;
      store_some<kType>(y, out, c, lanes);
    }
  });
}
