// SPDX-License-Identifier: Apache-2.0
// Attention on AVX-512: the shared vector kernels with sixteen lanes.
#include <immintrin.h>
#include <pycore/attention/rows.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")

namespace pycore {
namespace avx512 {
namespace {

#include "../simd_avx512.h"
// (in this order)
#include "../tile_product.inl.h"
// (in this order)
#include "tiles.inl.h"
// (in this order)
#include "few_rows.inl.h"
#include "logits.inl.h"
// (in this order)
#include "forward.inl.h"
// (in this order)
#include "backward.inl.h"

}  // namespace

const AttentionKernels attention_float = {kForwardRows,  kBackwardRows,   forward_scratch,  forward,
                                          forward_merge, forward_partial, backward_scratch, delta,
                                          grad_query,    grad_key_value};

}  // namespace avx512
}  // namespace pycore

#pragma GCC pop_options
