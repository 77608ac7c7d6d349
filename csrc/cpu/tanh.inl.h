// SPDX-License-Identifier: Apache-2.0
// The hyperbolic tangent on vectors, for softcap.
#pragma once

#include "softmax.inl.h"

constexpr float kTanh[] = {-3.333333323e-1f, 1.333331329e-1f,  -5.396164700e-2f,
                           2.178906705e-2f,  -8.412441214e-3f, 2.373401437e-3f};

// tanh within a few units in the last place: an odd polynomial near zero, 1 - 2 / (e^2x + 1) elsewhere.
PYCORE_INLINE Vec tanh_of(Vec x) {
  const Vec z = x * x;
  Vec y = Vec::broadcast(kTanh[5]);
  for (int i = 4; i >= 0; --i) y = Vec::fma(y, z, Vec::broadcast(kTanh[i]));
  const Vec near_zero = Vec::fma(x * z, y, x);
  const Vec one = Vec::broadcast(1.0f), top = Vec::broadcast(20.0f);  // tanh(20) is 1
  // Vec::max gives its second argument where either is NaN.
  const Vec clamped = Vec::zero() - Vec::max(Vec::zero() - top, Vec::zero() - x);
  const Vec power = (clamped * Vec::broadcast(2 * kLog2E)).exp2();
  const Vec far = Vec::fnma(Vec::broadcast(2.0f), one / (power + one), one);
  const Vec magnitude = Vec::max(x, Vec::zero() - x);
  return near_zero.select(magnitude.below(Vec::broadcast(0.6f)), far);
}
