// SPDX-License-Identifier: Apache-2.0
// The staircase's kernels on AVX2. Nothing is included inside the target region but code without linkage.
#include <cstring>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt")

namespace pycore::avx2 {
namespace {
#define PYCORE_STAIRCASE_LANES 8
#include "groups.inl.h"
}  // namespace

const StaircaseKernels staircase = {column_fault, row_fault,          quantize_columns,
                                    quantize_row, dequantize_columns, dequantize_row};

}  // namespace pycore::avx2

#pragma GCC pop_options
