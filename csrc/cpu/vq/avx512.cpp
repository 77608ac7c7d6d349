// SPDX-License-Identifier: Apache-2.0
// Nearest codes on AVX-512. Nothing is included inside the target region but code without linkage.
#define PYCORE_LANES 16
#include <immintrin.h>
#include <pycore/dtype.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt")

namespace pycore::avx512 {
namespace {
#include "../simd.inl.h"
#include "../tile_product.inl.h"
//
#include "distance.inl.h"
//
#define PYCORE_VQ_PRUNES
#include "search.inl.h"
//
#include "prune.inl.h"

void prepare(const VqEncodeParams& params, const VqPlan& plan, int64_t book, VqBook* stage, Range codes) {
  if (codes.begin < codes.end) return prepare_codes(params, plan, book, stage, codes);
  find_shift(params, stage);
}
}  // namespace

const VqKernels vq_float = {kPanel, kLanes, 1024 / kPanel, prepare, encode_rows};

}  // namespace pycore::avx512

#pragma GCC pop_options
