// SPDX-License-Identifier: Apache-2.0
// Four distances of eight channels at once: those of distance.inl.h to the bit, whose upper eight lanes are zeros here
// and whose lanes are added in halves. Included by avx2.cpp and avx512.cpp in their target regions.
#pragma once

#include <immintrin.h>

#include <cstdint>

PYCORE_INLINE __m128 halved_squares(__m256 x, const float* c) {
  const __m256 d = _mm256_sub_ps(x, _mm256_loadu_ps(c));
  const __m256 squares = _mm256_mul_ps(d, d);
  return _mm_add_ps(_mm256_castps256_ps128(squares), _mm256_extractf128_ps(squares, 1));
}

// out[v] = the distance of x[8] to the code at c + v * step, of the first kCount of four: two or four. Codes from
// `count` on are taken as the first.
template <int kCount>
PYCORE_INLINE void four_distances(const float* x, const float* c, int64_t step, int count, float* out) {
  const float* const second = count > 1 ? c + step : c;
  const __m256 line = _mm256_loadu_ps(x);
  const __m128 a = halved_squares(line, c), b = halved_squares(line, second);
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));  // a0 + a2, b0 + b2, a1 + a3, b1 + b3
  __m128 ef = ab;
  if (kCount > 2) {
    const float* const third = count > 2 ? c + 2 * step : c;
    const float* const fourth = count > 3 ? c + 3 * step : c;
    const __m128 e = halved_squares(line, third), f = halved_squares(line, fourth);
    ef = _mm_add_ps(_mm_unpacklo_ps(e, f), _mm_unpackhi_ps(e, f));
  }
  _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, ef), _mm_movehl_ps(ef, ab)));
}
