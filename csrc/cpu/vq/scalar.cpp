// SPDX-License-Identifier: Apache-2.0
// Nearest codes in plain loops: every distance is taken. The definition the faster versions are held to, and equal to
// them in every code.
#include <pycore/dtype.h>

#include <cmath>

#include "kernels.h"

namespace pycore::scalar {
namespace {

#define PYCORE_INLINE inline

float distance(const float* x, const float* c, int64_t count) {
  float lanes[16] = {};
  for (int64_t i = 0; i < count; ++i) {
    const float d = x[i] - c[i];
    lanes[i % 16] = std::fma(d, d, lanes[i % 16]);
  }
  for (int64_t half = 8; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

#include "search.inl.h"

void prepare(const VqEncodeParams& params, const VqPlan&, int64_t, VqBook* stage, Range codes) {
  for (int64_t k = codes.begin; stage->copy && k < codes.end; ++k) {
    load_code(params, *stage, k, stage->copy + k * params.dim);
  }
}

}  // namespace

const VqKernels vq_float = {0, 0, 0, prepare, encode_rows};

}  // namespace pycore::scalar
