// SPDX-License-Identifier: Apache-2.0
// The linear and norm kernels on AVX-512. Nothing is included inside the target region but code without linkage.
#include <immintrin.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt")

namespace pycore::avx512 {
namespace {
#include "../simd_avx512.h"
#include "../tile_product.inl.h"
//
#include "linear.inl.h"
#include "norm.inl.h"
}  // namespace

const LinearKernels linear_float = {
    sizeof(ForwardScratch),  sizeof(BackwardScratch), linear_forward_item, linear_grad_x_item,
    linear_grad_weight_item, linear_grad_bias_item,   norm_rows,           norm_backward_rows};

}  // namespace pycore::avx512

#pragma GCC pop_options
