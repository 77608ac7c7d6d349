// SPDX-License-Identifier: Apache-2.0
// The bfloat16 layers on AVX-512 with AVX512_BF16: the bits of avx512.cpp, with half the multiplications.
#define PYCORE_LANES 16
#define PYCORE_BFLOAT16_PRODUCTS
#include <immintrin.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")

namespace pycore::avx512_bf16 {
#include "kernels.inl.h"
}  // namespace pycore::avx512_bf16

#pragma GCC pop_options
