// SPDX-License-Identifier: Apache-2.0
// The distance of pycore/vq/vq.h on vectors. Include after simd_*.h, in the same target region and anonymous namespace.

constexpr int kDistanceVectors = 16 / Vec::kWidth;

PYCORE_INLINE float distance(const float* x, const float* c, int64_t count) {
  Vec sums[kDistanceVectors];
  for (int v = 0; v < kDistanceVectors; ++v) sums[v] = Vec::zero();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int v = 0; v < kDistanceVectors; ++v) {
      const Vec d = Vec::load(x + i + v * Vec::kWidth) - Vec::load(c + i + v * Vec::kWidth);
      sums[v] = Vec::fma(d, d, sums[v]);
    }
  }
  for (int v = 0; v < kDistanceVectors && i < count; ++v, i += Vec::kWidth) {
    const int64_t left = count - i < Vec::kWidth ? count - i : Vec::kWidth;
    const Vec d = Vec::load_first(x + i, left) - Vec::load_first(c + i, left);
    sums[v] = Vec::fma(d, d, sums[v]);
  }
  for (int v = 1; v < kDistanceVectors; ++v) sums[0] = sums[0] + sums[v];
  return sums[0].reduce_add();
}
