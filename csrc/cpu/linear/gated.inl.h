// SPDX-License-Identifier: Apache-2.0
// out = f(gate) * up and its gradients, a run of elements at a time. Lanes do not meet, so nothing depends on where a
// run begins or which vector an element is in.
#pragma once

#include <pycore/dtype.h>
#include <pycore/linear/linear.h>

#include <cstdint>

#include "../vector_rows.inl.h"
#include "gated_functions.inl.h"
#include "kernels.h"
#include "rows.inl.h"

template <Gate kGate>
PYCORE_INLINE Activation activation(Vec x) {
  if constexpr (kGate == Gate::kSilu) return silu(x);
  if constexpr (kGate == Gate::kGelu) return gelu(x);
  return gelu_tanh(x);
}

// body(row, channel, count): runs of one row each.
template <class Body>
PYCORE_INLINE void for_each_run(int64_t channels, Range elements, const Body& body) {
  for (int64_t at = elements.begin; at < elements.end;) {
    const int64_t row = at / channels, c = at - row * channels, count = smaller(elements.end - at, channels - c);
    body(row, c, count);
    at += count;
  }
}

template <DType kType, Gate kGate>
void gated_of(const GatedParams& params, Range elements) {
  for_each_run(params.channels, elements, [&](int64_t row, int64_t c, int64_t count) __attribute__((always_inline)) {
    const char *gate = row_bytes<kType>(params.gate, row), *up = row_bytes<kType>(params.up, row);
    char* out = static_cast<char*>(params.out) + row * params.channels * kElementBytes<kType>;
    for (const int64_t end = c + count; c < end; c += Vec::kWidth) {
      const int64_t lanes = smaller(Vec::kWidth, end - c);
      const Activation f = activation<kGate>(load_some<kType>(gate, c, lanes));
      store_some<kType>(f.value * load_some<kType>(up, c, lanes), out, c, lanes);
    }
  });
}

template <DType kType, Gate kGate>
void gated_backward_of(const GatedBackwardParams& params, Range elements) {
  for_each_run(params.channels, elements, [&](int64_t row, int64_t c, int64_t count) __attribute__((always_inline)) {
    const char *gate = row_bytes<kType>(params.gate, row), *up = row_bytes<kType>(params.up, row);
    const char* grad = row_bytes<kType>(params.grad_out, row);
    const int64_t start = row * params.channels * kElementBytes<kType>;
    for (const int64_t end = c + count; c < end; c += Vec::kWidth) {
      const int64_t lanes = smaller(Vec::kWidth, end - c);
      const Activation f = activation<kGate>(load_some<kType>(gate, c, lanes));
      const Vec g = load_some<kType>(grad, c, lanes);
      if (params.grad_gate) {
        const Vec by_gate = g * load_some<kType>(up, c, lanes) * f.slope;
        store_some<kType>(by_gate, static_cast<char*>(params.grad_gate) + start, c, lanes);
      }
      if (params.grad_up) store_some<kType>(g * f.value, static_cast<char*>(params.grad_up) + start, c, lanes);
    }
  });
}

template <DType kType>
void gated_elements(const GatedParams& params, Range elements) {
  switch (params.function) {
    case Gate::kSilu: return gated_of<kType, Gate::kSilu>(params, elements);
    case Gate::kGelu: return gated_of<kType, Gate::kGelu>(params, elements);
    case Gate::kGeluTanh: return gated_of<kType, Gate::kGeluTanh>(params, elements);
  }
}

template <DType kType>
void gated_backward_elements(const GatedBackwardParams& params, Range elements) {
  switch (params.function) {
    case Gate::kSilu: return gated_backward_of<kType, Gate::kSilu>(params, elements);
    case Gate::kGelu: return gated_backward_of<kType, Gate::kGelu>(params, elements);
    case Gate::kGeluTanh: return gated_backward_of<kType, Gate::kGeluTanh>(params, elements);
  }
}
