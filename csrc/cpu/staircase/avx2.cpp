// SPDX-License-Identifier: Apache-2.0
// The staircase's kernels on AVX2.
#define PYCORE_LANES 8
#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt")

namespace pycore::avx2 {
#include "kernels.inl.h"
}  // namespace pycore::avx2

#pragma GCC pop_options
