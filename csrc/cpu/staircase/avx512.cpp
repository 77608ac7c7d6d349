// SPDX-License-Identifier: Apache-2.0
// The staircase's kernels on AVX-512. Nothing is included inside the target region but code without linkage.
#include <cstring>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt")

namespace pycore::avx512 {
namespace {
#define PYCORE_STAIRCASE_LANES 16
#include "groups.inl.h"
}  // namespace

const StaircaseKernels staircase = {column_fault, row_fault,          quantize_columns,
                                    quantize_row, dequantize_columns, dequantize_row};

}  // namespace pycore::avx512

#pragma GCC pop_options
