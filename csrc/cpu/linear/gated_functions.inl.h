// SPDX-License-Identifier: Apache-2.0
// silu and gelu with their slopes, of one formula for every instruction set: each step rounds once, and all take the
// same steps. Values are within a few units in the last place of the result, also where it is tiny (but below 2^-125 of
// x, which may be zero); gelu_tanh loses some more there, by the rounding of its cubic.
#pragma once

#include <cstdint>

#include "../simd.inl.h"

struct Activation {
  Vec value, slope;  // f(x) and f'(x)
};

constexpr float kGateLog2E = 1.44269504088896340736f, kGateLog2ELow = 1.925962991e-8f;  // log2(e) in two parts
constexpr float kGateLn2 = 0.69314718055994530942f;

// e^(x + low) for -104 < x <= 0 and a low that is small beside x: x log2(e) is not rounded but carried on.
PYCORE_INLINE Vec exp_of(Vec x, Vec low) {
  const Vec log2e = Vec::broadcast(kGateLog2E), power = x * log2e;
  Vec rest = Vec::fma(x, log2e, Vec::zero() - power);
  rest = Vec::fma(x, Vec::broadcast(kGateLog2ELow), rest);
  rest = Vec::fma(low, log2e, rest);
  const Vec y = power.exp2();
  return Vec::fma(y, rest * Vec::broadcast(kGateLn2), y);
}

PYCORE_INLINE Vec clamped(Vec x, float limit) {
  // Vec::max gives its second argument where either is NaN, which so stays.
  const Vec below = Vec::zero() - Vec::max(Vec::broadcast(-limit), Vec::zero() - x);
  return Vec::max(Vec::broadcast(-limit), below);
}

PYCORE_INLINE Vec magnitude(Vec x) { return Vec::max(x, Vec::zero() - x); }

// 1 / (1 + e^-x) and 1 / (1 + e^x), |x| at most 100 (beyond, the smaller is zero).
PYCORE_INLINE void sigmoids(Vec x, Vec* of_x, Vec* of_minus_x) {
  const Vec one = Vec::broadcast(1.0f);
  const Vec power = exp_of(Vec::zero() - magnitude(clamped(x, 100.0f)), Vec::zero());
  const Vec large = one / (one + power), small = power * large;
  const uint64_t negative = x.below(Vec::zero());
  *of_x = small.select(negative, large);
  *of_minus_x = large.select(negative, small);
}

PYCORE_INLINE Activation silu(Vec x) {
  Vec rising, falling;
  sigmoids(x, &rising, &falling);
  return {x * rising, rising * Vec::fma(clamped(x, 100.0f), falling, Vec::broadcast(1.0f))};
}

// x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3) is x / (1 + e^-2u).
PYCORE_INLINE Activation gelu_tanh(Vec x) {
  constexpr float kTwice = 1.5957691216057308f, kCubic = kTwice * 0.044715f;
  const Vec near = clamped(x, 64.0f), square = near * near;
  Vec rising, falling;
  sigmoids(near * Vec::fma(square, Vec::broadcast(kCubic), Vec::broadcast(kTwice)), &rising, &falling);
  const Vec slope = Vec::fma(square, Vec::broadcast(3 * kCubic), Vec::broadcast(kTwice));
  return {x * rising, Vec::fma(near * rising, falling * slope, rising)};
}

// The normal distribution beyond a is e^(-a^2 / 2) t g(t) with t = 1 / (1 + 0.35 a), g a polynomial: 14 >= a >= 0
// within two units in the last place.
constexpr float kNormalTail[] = {1.396187097e-1f, 1.399122924e-1f,  1.194449142e-1f, 1.071145907e-1f, -2.704660781e-2f,
                                 1.650509983e-1f, -2.609612346e-1f, 1.465458274e-1f, -2.967952192e-2f};

// x times the normal distribution up to x: x (1 + erf(x / sqrt 2)) / 2.
PYCORE_INLINE Activation gelu(Vec x) {
  const Vec one = Vec::broadcast(1.0f), half = Vec::broadcast(-0.5f);
  const Vec near = clamped(x, 14.0f), a = magnitude(near);
  const Vec square = a * a, rest = Vec::fma(a, a, Vec::zero() - square);
  const Vec power = exp_of(half * square, half * rest);
  const Vec t = one / Vec::fma(a, Vec::broadcast(0.35f), one);
  Vec g = Vec::broadcast(kNormalTail[8]);
  for (int i = 7; i >= 0; --i) g = Vec::fma(g, t, Vec::broadcast(kNormalTail[i]));
  const Vec beyond = power * (t * g);
  const Vec below = beyond.select(x.below(Vec::zero()), one - beyond);
  const Vec density = power * Vec::broadcast(0.3989422804f);
  return {x * below, Vec::fma(near, density, below)};
}
