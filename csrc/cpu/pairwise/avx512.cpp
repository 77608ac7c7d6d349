// SPDX-License-Identifier: Apache-2.0
// The pairwise kernels on AVX-512.
#define PYCORE_LANES 16
#include <immintrin.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")

namespace pycore::avx512 {
#include "kernels.inl.h"
}  // namespace pycore::avx512

#pragma GCC pop_options
