// SPDX-License-Identifier: Apache-2.0
// The table of one instruction set. Included inside its namespace, in a target region.
#pragma once

namespace {
#include "groups.inl.h"
}  // namespace

const StaircaseKernels staircase = {column_fault, row_fault,          quantize_columns,
                                    quantize_row, dequantize_columns, dequantize_row};
