// SPDX-License-Identifier: Apache-2.0
// Attention on AVX-512: the shared vector kernels with sixteen lanes.
#include <immintrin.h>
#include <pycore/attention_rows.h>

#include "attention_kernels.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")

namespace pycore {
namespace avx512 {
namespace {

#include "simd_avx512.h"
// (in this order)
#include "tile_product.inl.h"
// (in this order)
#include "attention_tiles.inl.h"
// (in this order)
#include "attention_few_rows.inl.h"
#include "attention_logits.inl.h"
// (in this order)
#include "attention_forward.inl.h"
// (in this order)
#include "attention_backward.inl.h"

}  // namespace

const AttentionKernels attention_float = {kForwardRows,  kBackwardRows,   forward_scratch,  forward,
                                          forward_merge, forward_partial, backward_scratch, delta,
                                          grad_query,    grad_key_value};

}  // namespace avx512
}  // namespace pycore

#pragma GCC pop_options
