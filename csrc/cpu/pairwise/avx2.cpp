// SPDX-License-Identifier: Apache-2.0
// The pairwise kernels on AVX2+FMA.
#define PYCORE_LANES 8
#include <immintrin.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")

namespace pycore::avx2 {
#include "kernels.inl.h"
}  // namespace pycore::avx2

#pragma GCC pop_options
