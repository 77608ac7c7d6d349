// SPDX-License-Identifier: Apache-2.0
// The staircase's kernels for any x86-64.
#include <cstring>

#include "kernels.h"

namespace pycore::scalar {
namespace {
#define PYCORE_STAIRCASE_LANES 4
#include "groups.inl.h"
}  // namespace

const StaircaseKernels staircase = {column_fault, row_fault,          quantize_columns,
                                    quantize_row, dequantize_columns, dequantize_row};

}  // namespace pycore::scalar
